//! Where the blocks of a disk enter the exchange, and where the source's own image is checked.
//!
//! Owns the batch being filled from what the mirror writes, and per disk a thread that reads the
//! image itself: the digest's entries of a disk come from there, never from what the mirror said.
//! Blocks while the store is full: that is the back-pressure that reaches the mirror; once the guest
//! stands still it has a deadline. Invariant:
//! every block that was written, or that the image says it holds, is read from the image once more
//! before the disk counts as checked.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use godwit_protocol::chunk::digest::REGION_PAGES;
use godwit_protocol::limits::{BATCH_ZEROS, CHUNK_BYTES};

use super::Job;
use super::blocks::Blocks;
use super::reader::{Batch, HURRIED_PAGES};
use super::session::Event;
use super::shared::Shared;
use crate::relay::RelayError;
use crate::relay::budget::NoRoom;
use crate::relay::pool::{Pool, lock};
use crate::relay::table::parts;

/// How long an unfinished batch waits for more, and how often orders are looked at.
const LINGER: Duration = Duration::from_millis(20);
/// Blocks of the image that are read at once: one region at most.
const READ_BLOCKS: u32 = 256;

/// Reads a disk's content as its QEMU sees it.
pub trait ImageReader: Send {
    /// Fills `into` from `offset`, bytes, both multiples of 4096.
    ///
    /// # Errors
    /// The image's.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

struct Filling {
    batch: Batch,
    /// Blocks that were ever said to hold something: zeros elsewhere need not be said.
    touched: Blocks,
    /// Blocks whose entry in the digest is older than the image.
    stale: Blocks,
    /// How often something was added: a batch that does not grow is sent.
    moves: u64,
    ended: bool,
    /// All is read from the image, after the end.
    checked: bool,
}

/// One disk's way into the exchange.
pub struct Inlet {
    shared: Arc<Shared>,
    pool: Arc<Pool<Job>>,
    pages: Range<u32>,
    filling: Mutex<Filling>,
    filled: Condvar,
    /// Set by [`Inlet::finish`]: nobody waits for room in the store any longer.
    by: OnceLock<Instant>,
}

impl Inlet {
    pub(super) fn new(
        shared: Arc<Shared>,
        pool: Arc<Pool<Job>>,
        pages: Range<u32>,
        backed: bool,
    ) -> Self {
        let blocks = pages.len();
        let mut touched = Blocks::new(blocks);
        if backed {
            // Zeros over a base are content.
            touched.set(0..blocks as u32);
        }
        let filling = Filling {
            batch: Batch { disk: true, ..Batch::default() },
            touched,
            stale: Blocks::new(blocks),
            moves: 0,
            ended: false,
            checked: false,
        };
        let (filling, filled, by) = (Mutex::new(filling), Condvar::new(), OnceLock::new());
        Self { shared, pool, pages, filling, filled, by }
    }

    /// Size of the disk, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages.len() as u64 * CHUNK_BYTES as u64
    }

    /// Takes what the mirror writes. Blocks while the store is full.
    ///
    /// # Errors
    /// `InvalidInput` if it is not aligned to 4096 bytes or beyond the disk, `BrokenPipe` if the
    /// session has ended.
    pub fn write(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        let blocks = self.blocks(offset, content.len() as u64)?;
        let mut filling = lock(&self.filling);
        filling.stale.set(blocks.clone());
        for (block, content) in blocks.zip(content.as_chunks::<CHUNK_BYTES>().0) {
            if *content == godwit_protocol::chunk::ZERO_PAGE {
                self.add_zero(&mut filling, block)?;
                continue;
            }
            filling.touched.set(block..block + 1);
            self.make_room(&mut filling, block)?;
            let batch = &mut filling.batch;
            if batch.data.is_empty() {
                let pages = self.shared.seat.batch_pages();
                batch.data = self.shared.buffers().take(pages * CHUNK_BYTES);
            }
            batch.pages.push(self.pages.start + block);
            batch.data.extend_from_slice(content);
        }
        self.added(&mut filling)
    }

    /// Takes a range of zeros.
    ///
    /// # Errors
    /// As [`Inlet::write`].
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let blocks = self.blocks(offset, len)?;
        let mut filling = lock(&self.filling);
        // What never held anything is zeros at the far end already.
        let held: Vec<Range<u32>> = filling.touched.runs(blocks).collect();
        for run in held {
            filling.stale.set(run.clone());
            for block in run {
                self.add_zero(&mut filling, block)?;
            }
        }
        self.added(&mut filling)
    }

    /// Says that the image holds something there: it will be read even if the mirror never writes it.
    ///
    /// # Errors
    /// `InvalidInput` as [`Inlet::write`].
    pub fn holds(&self, offset: u64, len: u64) -> io::Result<()> {
        let blocks = self.blocks(offset, len)?;
        lock(&self.filling).stale.set(blocks);
        self.filled.notify_all();
        Ok(())
    }

    /// The mirror has ended and the guest stands still: what was written is all. Waits until the
    /// image is read where it changed.
    ///
    /// # Errors
    /// `BrokenPipe` if the session has ended, `TimedOut` if the store has no room for the rest, or
    /// the image is not read, within `deadline`.
    pub fn finish(&self, deadline: Duration) -> io::Result<()> {
        // Before the lock: whoever holds it may be waiting for room.
        let until = *self.by.get_or_init(|| Instant::now() + deadline);
        let mut filling = lock(&self.filling);
        self.flush(&mut filling)?;
        filling.ended = true;
        self.filled.notify_all();
        while !filling.checked {
            if self.shared.stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if Instant::now() > until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            filling =
                self.filled.wait_timeout(filling, LINGER).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn blocks(&self, offset: u64, len: u64) -> io::Result<Range<u32>> {
        let chunk = CHUNK_BYTES as u64;
        let end = offset.checked_add(len).filter(|end| *end <= self.bytes());
        match end {
            Some(end) if offset.is_multiple_of(chunk) && end.is_multiple_of(chunk) => {
                // Both are within a disk, whose blocks have numbers of 32 bits.
                Ok((offset / chunk) as u32..(end / chunk) as u32)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn add_zero(&self, filling: &mut Filling, block: u32) -> io::Result<()> {
        if filling.touched.contains(block) {
            self.make_room(filling, block)?;
            filling.batch.zeros.push(self.pages.start + block);
        }
        Ok(())
    }

    /// Sends the batch if it is full or names the block already.
    fn make_room(&self, filling: &mut Filling, block: u32) -> io::Result<()> {
        let (batch, page) = (&filling.batch, self.pages.start + block);
        let most = self.shared.seat.batch_pages();
        let full = batch.pages.len() >= most || batch.zeros.len() >= BATCH_ZEROS;
        if full || batch.is_long() || batch.pages.contains(page) || batch.zeros.contains(page) {
            self.flush(filling)?;
        }
        Ok(())
    }

    fn added(&self, filling: &mut Filling) -> io::Result<()> {
        filling.moves += 1;
        let most =
            if self.shared.hurried.load(Ordering::Relaxed) { HURRIED_PAGES } else { usize::MAX };
        if filling.batch.pages.len() >= most {
            self.flush(filling)?;
        }
        self.filled.notify_all();
        Ok(())
    }

    fn flush(&self, filling: &mut Filling) -> io::Result<()> {
        if filling.batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::replace(&mut filling.batch, Batch { disk: true, ..Batch::default() });
        self.shared.send(&self.pool, batch, &self.by).map_err(|no| match no {
            NoRoom::Stopped => io::ErrorKind::BrokenPipe.into(),
            NoRoom::Late => io::ErrorKind::TimedOut.into(),
        })
    }

    /// Blocks to read from the image; waits a little for some. None: all is read and the disk has
    /// ended. Empty: nothing yet.
    fn next_stale(&self, seen: &mut u64) -> io::Result<Option<Range<u32>>> {
        let mut filling = lock(&self.filling);
        if filling.stale.is_empty() && !filling.ended {
            filling =
                self.filled.wait_timeout(filling, LINGER).unwrap_or_else(PoisonError::into_inner).0;
        }
        if std::mem::replace(seen, filling.moves) == filling.moves {
            self.flush(&mut filling)?;
        }
        let region = REGION_PAGES as u32;
        let next = filling.stale.take_run(READ_BLOCKS, region);
        Ok(match next {
            Some(run) => Some(run),
            None if filling.ended => None,
            None => Some(0..0),
        })
    }

    /// Keeps the digest's entries of the disk as the image is, until the end.
    pub(super) fn check(
        &self,
        mut image: Box<dyn ImageReader>,
        events: &tokio::sync::mpsc::Sender<Event>,
    ) {
        let outcome = self.check_all(&mut *image);
        let event = match outcome {
            Ok(()) => {
                lock(&self.filling).checked = true;
                self.filled.notify_all();
                Event::DiskChecked
            }
            Err(_) if self.shared.stop.load(Ordering::Relaxed) => return,
            Err(cause) => Event::Failed(RelayError::SourceImage(cause)),
        };
        // A session that has ended wants no more events.
        let _ = events.blocking_send(event);
    }

    fn check_all(&self, image: &mut dyn ImageReader) -> io::Result<()> {
        let mut content = vec![0; READ_BLOCKS as usize * CHUNK_BYTES];
        let mut seen = 0;
        while let Some(run) = self.next_stale(&mut seen)? {
            if self.shared.stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let content = &mut content[..run.len() * CHUNK_BYTES];
            if content.is_empty() {
                continue;
            }
            image.read(u64::from(run.start) * CHUNK_BYTES as u64, content)?;
            let mut sums = content.chunks_exact(CHUNK_BYTES).map(|block| self.shared.key.id(block));
            for (region, slot, _, count) in parts(self.pages.start + run.start, run.len() as u32) {
                let mut locked = self.shared.table.lock(region);
                let entries = locked.region();
                for (slot, sum) in (slot..slot + count as usize).zip(sums.by_ref()) {
                    entries.set(slot, sum);
                }
            }
        }
        Ok(())
    }
}
