//! What the source's reader thread, workers, session and handle share.
//!
//! Owns the session's seat in the node's budget, the orders to the reader and the way back to QEMU.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use godwit_protocol::chunk::ChunkKey;
use godwit_protocol::chunk::layout::Layout;

use super::reader::Batch;
use super::work::Job;
use crate::relay::RelayError;
use crate::relay::budget::{NoRoom, Seat};
use crate::relay::buffers::Buffers;
use crate::relay::pool::{Pool, lock};
use crate::relay::stream::StreamPacker;
use crate::relay::table::Table;

/// How long a hold waits before orders are looked at again.
const LOOK: Duration = Duration::from_millis(100);

/// See the module.
pub(super) struct Shared {
    pub(super) key: ChunkKey,
    pub(super) table: Table,
    pub(super) seat: Arc<Seat>,
    /// How far the destination lets the long stream look back: 2 to this power; 0: not at all.
    pub(super) window: AtomicU32,
    /// The long stream of the present connection; one message at a time is packed into it.
    pub(super) stream: Mutex<Option<StreamPacker>>,
    pub(super) stop: AtomicBool,
    /// The guest is about to be stopped.
    pub(super) braced: AtomicBool,
    /// What is left is what the guest waits for.
    pub(super) hurried: AtomicBool,
    /// The link outruns the processor: pages go as they are, without asking.
    pub(super) raw: AtomicBool,
    /// The newest batch that was filled.
    pub(super) batches: AtomicU32,
    pub(super) passes: AtomicU32,
    pub(super) first_nonzero: AtomicU32,
    hold: Mutex<bool>,
    released: Condvar,
    qemu: Mutex<Option<UnixStream>>,
}

impl Shared {
    pub(super) fn new(key: ChunkKey, layout: Layout, seat: Arc<Seat>) -> Self {
        let zero = key.zero_id();
        Self {
            key,
            table: Table::new(layout, zero),
            seat,
            window: AtomicU32::new(0),
            stream: Mutex::default(),
            stop: AtomicBool::new(false),
            braced: AtomicBool::new(false),
            hurried: AtomicBool::new(false),
            raw: AtomicBool::new(false),
            batches: AtomicU32::new(0),
            passes: AtomicU32::new(0),
            first_nonzero: AtomicU32::new(0),
            hold: Mutex::new(false),
            released: Condvar::new(),
            qemu: Mutex::new(None),
        }
    }

    /// Numbers a batch and has it hashed, once there is room for its pages; see [`Seat::take`].
    pub(super) fn send(
        &self,
        pool: &Pool<Job>,
        mut batch: Batch,
        by: &OnceLock<Instant>,
    ) -> Result<(), NoRoom> {
        self.seat.take(batch.data.len(), &self.stop, by)?;
        batch.seq = self.batches.fetch_add(1, Ordering::AcqRel) + 1;
        pool.put(Job::Hash(batch), true);
        Ok(())
    }

    /// Where large buffers come from.
    pub(super) fn buffers(&self) -> Buffers {
        self.seat.budget().buffers.clone()
    }

    /// Whether new batches go without asking.
    pub(super) fn pushes(&self) -> bool {
        [&self.braced, &self.hurried, &self.raw].iter().any(|flag| flag.load(Ordering::Relaxed))
    }

    pub(super) fn set_qemu(&self, socket: UnixStream) {
        *lock(&self.qemu) = Some(socket);
    }

    /// Whether QEMU's stream is read; the cutover's own word counts for more.
    pub(super) fn hold(&self, on: bool) {
        let mut hold = lock(&self.hold);
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        *hold = (on || is(&self.braced)) && !is(&self.hurried);
        drop(hold);
        self.released.notify_all();
    }

    pub(super) fn is_held(&self) -> bool {
        *lock(&self.hold)
    }

    /// Waits while reading is held back; true: told to stop.
    pub(super) fn wait_while_held(&self) -> bool {
        let mut hold = lock(&self.hold);
        while *hold && !self.stop.load(Ordering::Relaxed) {
            hold = self.released.wait_timeout(hold, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.stop.load(Ordering::Relaxed)
    }

    /// Answers QEMU's PING on its return path.
    pub(super) fn answer_ping(&self, value: u32) -> Result<(), RelayError> {
        self.to_qemu(2, value)
    }

    /// Says on QEMU's return path that the destination has loaded (0) or failed.
    pub(super) fn shut(&self, code: u32) -> Result<(), RelayError> {
        self.to_qemu(1, code)
    }

    fn to_qemu(&self, kind: u16, value: u32) -> Result<(), RelayError> {
        let mut message = [0; 8];
        message[..2].copy_from_slice(&kind.to_be_bytes());
        message[2..4].copy_from_slice(&4_u16.to_be_bytes());
        message[4..].copy_from_slice(&value.to_be_bytes());
        let mut qemu = lock(&self.qemu);
        let socket = qemu.as_mut().ok_or_else(|| {
            RelayError::SourceQemu("has not connected to its migration socket".to_owned())
        })?;
        socket
            .write_all(&message)
            .map_err(|e| RelayError::SourceQemu(format!("does not read its return path: {e}")))
    }

    /// Ends reader and workers; QEMU sees its stream close.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.released.notify_all();
        self.seat.wake();
        if let Some(socket) = lock(&self.qemu).take() {
            // Already closed by QEMU is as good.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}
