//! The source end: from the source's QEMU to the network.
//!
//! Owns the session's start and its handle. Never stops the guest: the driver does, and says so by
//! [`SourceHandle::begin_cutover`] and [`SourceHandle::release_source`].

mod blocks;
mod exchange;
mod inlet;
mod reader;
mod session;
mod shared;
mod work;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use godwit_protocol::chunk::ChunkKey;
use godwit_protocol::chunk::layout::{DiskSpace, Layout};
use godwit_protocol::id::MigrationId;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::frames::{Connector, Meter};
use super::{RelayError, Seat, pool::Pool};
pub use inlet::{ImageReader, Inlet};
use shared::Shared;
use work::{Job, Worker};

/// Threads that hash and compress.
const WORKERS: usize = 2;
const EVENTS: usize = 64;

/// What a source session needs.
pub struct SourceParams {
    /// Its part of what this node's sessions may hold together.
    pub seat: Arc<Seat>,
    /// Where the source's QEMU will connect (`migrate unix:PATH`).
    pub listener: UnixListener,
    /// Opens a bulk stream to the destination node; called again after a cut.
    pub connect: Connector,
    /// The swarm's chunk key.
    pub key: ChunkKey,
    /// Name of the main memory block in the stream (the id of the memory backend).
    pub ram_block: String,
    /// Its size, bytes.
    pub ram_bytes: u64,
    /// The disks that move, and who reads their images.
    pub disks: Vec<(DiskSpace, Box<dyn ImageReader>)>,
    /// The migration.
    pub migration: MigrationId,
    /// Most bytes per second that leave on the bulk stream; 0: no limit.
    pub bandwidth: u64,
    /// How long QEMU may take to connect.
    pub accept_deadline: Duration,
    /// How long the session lives without a connection to the destination node.
    pub reconnect_deadline: Duration,
}

/// Pages by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// All zeros.
    pub zero: u64,
    /// The destination produced them itself.
    pub known: u64,
    /// Their content crossed.
    pub literal: u64,
}

/// How far a source session is. Counts of pages are of pages sent, with repetitions.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SourceProgress {
    /// All pages, of memory and disks.
    pub pages: PageCounts,
    /// Of these, blocks of disks.
    pub disk_blocks: PageCounts,
    /// Bytes that left for disks: ids and compressed content.
    pub disk_wire_bytes: u64,
    /// Bytes that left on bulk streams.
    pub wire_bytes_out: u64,
    /// Bytes that came on bulk streams.
    pub wire_bytes_in: u64,
    /// Guest bytes read from QEMU and not yet placed.
    pub unplaced_bytes: u64,
    /// Of these, what crosses whole: the destination wants it, or it is sent unasked.
    pub literal_bytes: u64,
    /// What a byte that crosses whole becomes on the link, parts per million.
    pub literal_ppm: u64,
    /// Pages that were not all zeros when they were first read.
    pub first_pass_nonzero_pages: u64,
    /// Estimate of what the link takes, bytes per second.
    pub link_bytes_per_s: f64,
    /// What the path gave when nothing held the stream back, bytes per second.
    pub path_bytes_per_s: f64,
    /// Shortest round trip seen, microseconds; 0: none yet.
    pub rtt_us: u64,
    /// Milliseconds since the destination was last heard.
    pub silent_ms: u64,
    /// How often QEMU started over (0: first pass).
    pub passes: u32,
    /// Present compression level (0: raw, without asking).
    pub level: i32,
    /// How often the stream was replaced.
    pub reconnects: u32,
    /// Whether a stream to the destination node is up.
    pub connected: bool,
    /// The device state has begun to leave: all memory was read.
    pub ram_read: bool,
    /// All that was said is placed, as far as it has been read from QEMU.
    pub drained: bool,
}

/// How a source session ended well: the digests are equal.
#[derive(Debug, Clone)]
pub struct SourceEnd {
    /// The digest of memory that both ends have.
    pub ram_digest: [u8; 32],
    /// Bytes of the stream that the destination's QEMU was given.
    pub opaque_bytes: u64,
    /// The last progress.
    pub progress: SourceProgress,
}

/// Starts source sessions.
#[derive(Debug, Clone, Copy)]
pub struct SourceSession;

/// A running source session. Dropping it closes QEMU's stream: stop the guest or cancel the
/// migration before, or QEMU goes on at the source by itself.
pub struct SourceHandle {
    shared: Arc<Shared>,
    meter: Arc<Meter>,
    inlets: Vec<Arc<Inlet>>,
    progress: watch::Receiver<SourceProgress>,
    abort: mpsc::Sender<()>,
    /// The outcome; the session has ended, but QEMU's stream stays open for
    /// [`SourceHandle::release_source`].
    pub finished: JoinHandle<Result<SourceEnd, RelayError>>,
}

impl SourceSession {
    /// Starts the session; give QEMU its `migrate` command afterwards.
    ///
    /// # Errors
    /// [`RelayError::Protocol`] if the memory size is none that a guest can have,
    /// [`RelayError::Local`] if threads cannot be started.
    pub fn spawn(params: SourceParams) -> Result<SourceHandle, RelayError> {
        let spaces: Vec<DiskSpace> = params.disks.iter().map(|(space, _)| *space).collect();
        let layout = layout(params.ram_bytes, &spaces)?;
        let shared = Arc::new(Shared::new(params.key.clone(), layout.clone(), params.seat));
        let (events_out, events) = mpsc::channel(EVENTS);
        let (abort, aborted) = mpsc::channel(1);
        let (progress_out, progress) = watch::channel(SourceProgress::default());
        let pool = Pool::start("relay-source", WORKERS, || {
            let worker = Worker::new(Arc::clone(&shared), events_out.clone());
            move |job| worker.run(job)
        })?;
        let pool = Arc::new(pool);
        let meter = Arc::new(Meter::default());
        meter.cap.store(params.bandwidth, Ordering::Relaxed);
        let mut inlets = Vec::with_capacity(spaces.len());
        for (index, (space, image)) in params.disks.into_iter().enumerate() {
            let pages = layout.disk(index).unwrap_or_default();
            let (shared, pool) = (Arc::clone(&shared), Arc::clone(&pool));
            let inlet = Arc::new(Inlet::new(shared, pool, pages, space.backed));
            inlets.push(Arc::clone(&inlet));
            let events = events_out.clone();
            std::thread::Builder::new()
                .name("relay-image".to_owned())
                .spawn(move || inlet.check(image, &events))?;
        }
        let session = session::Session::new(
            Arc::clone(&shared),
            pool,
            session::Channels { events_out, events, progress: progress_out },
            Arc::clone(&meter),
            session::Params {
                connect: params.connect,
                ram_block: params.ram_block,
                ram_bytes: params.ram_bytes,
                disks: spaces.len(),
                migration: params.migration,
                accept_deadline: params.accept_deadline,
                reconnect_deadline: params.reconnect_deadline,
            },
        );
        let finished = tokio::spawn(session.run(params.listener, aborted));
        Ok(SourceHandle { shared, meter, inlets, progress, abort, finished })
    }
}

/// The line of pages of memory and disks of these sizes.
pub(super) fn layout(ram_bytes: u64, disks: &[DiskSpace]) -> Result<Layout, RelayError> {
    Layout::new(ram_bytes, disks).ok_or_else(|| {
        RelayError::Protocol(format!("{ram_bytes} bytes of memory and disks {disks:?}"))
    })
}

impl SourceHandle {
    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<SourceProgress> {
        self.progress.clone()
    }

    /// Where the blocks of the disks go, in the order of the parameters.
    #[must_use]
    pub fn inlets(&self) -> &[Arc<Inlet>] {
        &self.inlets
    }

    /// From now on at most so many bytes per second leave; 0: what the path gives.
    pub fn set_bandwidth(&self, bytes_per_s: u64) {
        self.meter.cap.store(bytes_per_s, Ordering::Relaxed);
    }

    /// The guest is about to be stopped: what was read goes without asking, as a round trip would be downtime, and
    /// nothing is read until [`Self::begin_cutover`], so that the path is free by then.
    pub fn brace(&self) {
        self.shared.braced.store(true, Ordering::Relaxed);
        self.shared.hold(true);
    }

    /// The guest stops: from now on batches are small and go without asking.
    pub fn begin_cutover(&self) {
        self.shared.hurried.store(true, Ordering::Relaxed);
        self.shared.hold(false);
    }

    /// Tells the source's QEMU that the destination has loaded (it ends `postmigrate`) or not
    /// (it ends `failed`, paused if it was stopped before).
    ///
    /// # Errors
    /// [`RelayError::SourceQemu`] if QEMU is gone.
    pub fn release_source(&self, ok: bool) -> Result<(), RelayError> {
        self.shared.shut(u32::from(!ok))
    }

    /// Gives up: closes QEMU's stream and the bulk stream.
    pub fn abort(&self) {
        // Full: it was told before; closed: it has ended.
        let _ = self.abort.try_send(());
        self.shared.stop();
    }
}

impl Drop for SourceHandle {
    fn drop(&mut self) {
        self.shared.stop();
        self.finished.abort();
    }
}
