//! Reads the source QEMU's stream on a thread of its own and fills batches.
//!
//! Owns the read buffer and the batch being filled. Blocks while the store is full: that is the
//! back-pressure that reaches QEMU. Invariant: a batch names a page once, and batches are numbered
//! in stream order from 1.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use godwit_protocol::chunk::Page;
use godwit_protocol::chunk::pages::{RUNS, Runs};
use godwit_protocol::chunk::qemu::tail::Tail;
use godwit_protocol::chunk::qemu::{Parser, Sink};
use godwit_protocol::limits::{BATCH_PAGES, BATCH_ZEROS, CHUNK_BYTES, DEVICE_STATE_BYTES};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Job;
use super::session::Event;
use super::shared::Shared;
use crate::relay::RelayError;
use crate::relay::pack::Packer;
use crate::relay::pool::Pool;

const BUFFER: usize = 256 << 10;
/// Opaque bytes that are sent at once.
const OPAQUE: usize = 128 << 10;
/// Pages of a batch once the guest stands still: the first bytes leave sooner.
pub(super) const HURRIED_PAGES: usize = 64;
/// How long an unfinished batch waits for more, milliseconds.
const LINGER_MS: u16 = 20;
/// How often a silent socket is left to look for orders, milliseconds.
const LOOK_MS: u16 = 100;

/// Pages that are hashed, offered and stored together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Given when it is sent.
    pub(super) seq: u32,
    /// Blocks of a disk: their entries in the digest come from the image.
    pub(super) disk: bool,
    pub(super) pages: Runs,
    pub(super) zeros: Runs,
    pub(super) data: Vec<u8>,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.zeros.is_empty()
    }

    /// Whether its lists have as many runs as a message may carry.
    pub(super) fn is_long(&self) -> bool {
        self.zeros.runs().len() + self.pages.runs().len() >= RUNS / 2
    }
}

/// Where everything that was read goes.
struct Filler {
    shared: Arc<Shared>,
    pool: Arc<Pool<Job>>,
    events: tokio::sync::mpsc::Sender<Event>,
    batch: Batch,
    /// How many batches were begun.
    begun: u32,
    /// Per page the last batch that named it, by the count of those begun.
    named: Vec<u32>,
    /// The page before, to notice when QEMU starts over.
    previous: u32,
    opaque: Vec<u8>,
    offset: u64,
    hash: blake3::Hasher,
    held: bool,
    tail: Tail,
    /// Small, and its own: device state does not wait for what others compress.
    packer: Packer,
    failed: Option<RelayError>,
}

/// Reads until the stream is whole, the session ends, or QEMU goes away; says so as an event.
pub(super) fn run(
    mut socket: UnixStream,
    mut parser: Parser,
    shared: Arc<Shared>,
    pool: Arc<Pool<Job>>,
    events: tokio::sync::mpsc::Sender<Event>,
) {
    let outcome = Packer::new().and_then(|packer| {
        let pages = parser.main_pages() as usize;
        let mut filler = Filler::new(shared, pool, events.clone(), packer, pages);
        filler.read_all(&mut socket, &mut parser)
    });
    if let Err(cause) = outcome {
        // The session may be gone already, and with it the interest in the cause.
        let _ = events.blocking_send(Event::Failed(cause));
    }
}

impl Filler {
    fn new(
        shared: Arc<Shared>,
        pool: Arc<Pool<Job>>,
        events: tokio::sync::mpsc::Sender<Event>,
        packer: Packer,
        pages: usize,
    ) -> Self {
        Self {
            shared,
            pool,
            events,
            batch: Batch::default(),
            begun: 1,
            named: vec![0; pages],
            previous: 0,
            opaque: Vec::new(),
            offset: 0,
            hash: blake3::Hasher::new(),
            held: false,
            tail: Tail::default(),
            packer,
            failed: None,
        }
    }

    fn read_all(&mut self, socket: &mut UnixStream, parser: &mut Parser) -> Result<(), RelayError> {
        let mut buffer = vec![0; BUFFER];
        let mut filled = 0;
        loop {
            if self.shared.is_held() {
                self.flush()?;
            }
            if self.shared.wait_while_held() {
                return Err(RelayError::Aborted);
            }
            if !self.wait(socket)? {
                continue;
            }
            let read = socket.read(&mut buffer[filled..]).map_err(source_gone)?;
            if read == 0 {
                return Err(RelayError::SourceQemu("closed its migration stream".to_owned()));
            }
            filled += read;
            let used = parser.feed(&buffer[..filled], self)?;
            buffer.copy_within(used..filled, 0);
            filled -= used;
            if let Some(cause) = self.failed.take() {
                return Err(cause);
            }
            if self.tail.is_whole() {
                self.flush()?;
                let hash = *self.hash.finalize().as_bytes();
                return self.tell(Event::StreamEnd { bytes: self.offset, hash });
            }
        }
    }

    /// Whether there is something to read; what was gathered does not wait for long.
    fn wait(&mut self, socket: &UnixStream) -> Result<bool, RelayError> {
        if readable(socket, 0)? {
            return Ok(true);
        }
        let hurried = self.held || self.shared.hurried.load(Ordering::Relaxed);
        if !hurried && readable(socket, LINGER_MS)? {
            return Ok(true);
        }
        self.flush()?;
        readable(socket, LOOK_MS)
    }

    fn flush(&mut self) -> Result<(), RelayError> {
        self.flush_batch()?;
        self.flush_opaque()
    }

    fn flush_batch(&mut self) -> Result<(), RelayError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.begun += 1;
        // For QEMU's stream the session's own deadlines stand.
        let sent = self.shared.send(&self.pool, std::mem::take(&mut self.batch), &OnceLock::new());
        sent.map_err(|_| RelayError::Aborted)
    }

    fn flush_opaque(&mut self) -> Result<(), RelayError> {
        if self.opaque.is_empty() {
            return Ok(());
        }
        let content = std::mem::take(&mut self.opaque);
        self.hash.update(&content);
        let (offset, len) = (self.offset, content.len());
        self.offset += len as u64;
        if self.offset > DEVICE_STATE_BYTES as u64 {
            return Err(RelayError::StateTooLarge(DEVICE_STATE_BYTES));
        }
        let (coding, payload) = self.packer.pack(content, 3)?;
        let payload = Bytes::from(payload);
        self.tell(Event::Opaque { offset, len, held: self.held, coding, payload })
    }

    fn tell(&self, event: Event) -> Result<(), RelayError> {
        self.events.blocking_send(event).map_err(|_| RelayError::Aborted)
    }

    fn keep(&mut self, outcome: Result<(), RelayError>) {
        if let Err(cause) = outcome
            && self.failed.is_none()
        {
            self.failed = Some(cause);
        }
    }

    /// Makes room for one more page in the batch; true if this is its first time ever.
    fn admit(&mut self, index: u32) -> bool {
        let hurried = self.shared.hurried.load(Ordering::Relaxed);
        let most =
            self.shared.seat.batch_pages().min(if hurried { HURRIED_PAGES } else { BATCH_PAGES });
        // The parser has checked the index against the size of the block.
        let last = self.named[index as usize];
        let full = self.batch.pages.len() >= most
            || self.batch.zeros.len() >= BATCH_ZEROS
            || self.batch.is_long();
        if full || last == self.begun {
            let outcome = self.flush_batch();
            self.keep(outcome);
        }
        if index < self.previous {
            self.shared.passes.fetch_add(1, Ordering::Relaxed);
        }
        self.previous = index;
        self.named[index as usize] = self.begun;
        last == 0
    }
}

impl Sink for Filler {
    fn page(&mut self, index: u32, content: &Page) {
        if self.failed.is_some() {
            return;
        }
        if self.admit(index) {
            self.shared.first_nonzero.fetch_add(1, Ordering::Relaxed);
        }
        if self.batch.data.is_empty() {
            let hurried = self.shared.hurried.load(Ordering::Relaxed);
            let pages = if hurried { HURRIED_PAGES } else { self.shared.seat.batch_pages() };
            self.batch.data = self.shared.buffers().take(pages * CHUNK_BYTES);
        }
        self.batch.pages.push(index);
        self.batch.data.extend_from_slice(content);
    }

    fn zero(&mut self, index: u32) {
        if self.failed.is_none() {
            self.admit(index);
            self.batch.zeros.push(index);
        }
    }

    fn opaque(&mut self, bytes: &[u8]) {
        for bytes in bytes.chunks(OPAQUE) {
            self.opaque.extend_from_slice(bytes);
            if self.held {
                self.tail.feed(bytes);
            }
            if self.opaque.len() >= OPAQUE {
                let outcome = self.flush_opaque();
                self.keep(outcome);
            }
        }
    }

    fn ping(&mut self, value: u32) {
        let outcome = self.shared.answer_ping(value);
        self.keep(outcome);
    }

    fn ram_end(&mut self) {
        let outcome = self.flush();
        self.keep(outcome);
        self.held = true;
        // The disks have ended before: nobody sends a batch any more.
        let seq = self.shared.batches.load(Ordering::Acquire);
        let outcome = self.tell(Event::RamEnd { seq });
        self.keep(outcome);
    }
}

fn readable(socket: &UnixStream, millis: u16) -> Result<bool, RelayError> {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(millis)) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(e) => Err(RelayError::Local(e.into())),
    }
}

fn source_gone(cause: std::io::Error) -> RelayError {
    RelayError::SourceQemu(format!("broke its migration stream: {cause}"))
}
