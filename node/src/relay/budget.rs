//! What the sessions of one node may hold together.
//!
//! Owns the counts of stored pages and of the memory of long streams, the shelf of buffers and the
//! contexts of compressors: all are the node's, however many sessions there are. Never holds a page
//! itself. Invariants: what one session stores leaves room for those that begin after it; one that
//! stores nothing may always store a batch, so none waits for another; the more sessions, the smaller
//! the batches.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use godwit_protocol::limits::{
    BATCH_PAGES, BATCH_PAGES_LEAST, CHUNK_BYTES, RELAY_STORE_BYTES, RELAY_STREAM_BYTES,
};

use super::buffers::Buffers;
use super::pack::Packers;
use super::pool::lock;
use super::stream::{WINDOW_LOGS, stream_bytes};

/// How long a full store waits before orders are looked at again.
const LOOK: Duration = Duration::from_millis(100);
/// Of the store, what is set aside for the first batch of each session.
const FIRST_BYTES: usize = RELAY_STORE_BYTES / 11;
/// A session may store so many times what is left: alone four fifths of all.
const OF_FREE: usize = 4;

/// Why nothing is stored. The session ends then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// Told to stop.
    Stopped,
    /// There was none in time.
    Late,
}

#[derive(Debug, Default)]
struct Held {
    stored: usize,
    streams: usize,
}

/// The memory of a node's relay sessions.
#[derive(Default)]
pub struct Budget {
    held: Mutex<Held>,
    seats: AtomicUsize,
    pub(super) buffers: Buffers,
    pub(super) packers: Packers,
}

/// A session's part of the budget, which is its own while this lives.
pub struct Seat {
    budget: Arc<Budget>,
    stored: AtomicUsize,
    freed: Condvar,
}

/// Memory for one end of a long stream, while this lives.
pub(super) struct Window {
    seat: Arc<Seat>,
    /// How far it may look back: 2 to this power, bytes.
    pub(super) log: u32,
}

impl Budget {
    /// Counts in a session that is about to begin: the sooner, the better the others know their parts.
    #[must_use]
    pub fn join(self: &Arc<Self>) -> Arc<Seat> {
        self.seats.fetch_add(1, Ordering::Relaxed);
        let budget = Arc::clone(self);
        Arc::new(Seat { budget, stored: AtomicUsize::new(0), freed: Condvar::new() })
    }

    /// Bytes of guest pages that are stored, up to [`RELAY_STORE_BYTES`].
    #[must_use]
    pub fn stored(&self) -> usize {
        lock(&self.held).stored
    }

    /// Bytes that long streams hold, up to [`RELAY_STREAM_BYTES`].
    #[must_use]
    pub fn streams(&self) -> usize {
        lock(&self.held).streams
    }
}

impl Seat {
    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    fn seats(&self) -> usize {
        self.budget.seats.load(Ordering::Relaxed).max(1)
    }

    /// This session's part of what one alone may have, at least `least`.
    pub(super) fn part(&self, whole: usize, least: usize) -> usize {
        (whole / self.seats()).max(least)
    }

    /// Pages of one batch: the first of all sessions together fit in what is set aside for them.
    pub(super) fn batch_pages(&self) -> usize {
        self.part(FIRST_BYTES / CHUNK_BYTES, BATCH_PAGES_LEAST).min(BATCH_PAGES)
    }

    /// Waits for room, until `by` once that is set: it may be while this waits.
    pub(super) fn take(
        &self,
        bytes: usize,
        stop: &AtomicBool,
        by: &OnceLock<Instant>,
    ) -> Result<(), NoRoom> {
        let mut held = lock(&self.budget.held);
        // Whoever waits here has something stored, and is woken when that is placed.
        while !self.has_room(&held, bytes) {
            if stop.load(Ordering::Relaxed) {
                return Err(NoRoom::Stopped);
            }
            if by.get().is_some_and(|by| Instant::now() > *by) {
                return Err(NoRoom::Late);
            }
            held = self.freed.wait_timeout(held, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        if stop.load(Ordering::Relaxed) {
            return Err(NoRoom::Stopped);
        }
        held.stored += bytes;
        self.stored.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn has_room(&self, held: &Held, bytes: usize) -> bool {
        let own = self.stored();
        let free = (RELAY_STORE_BYTES - FIRST_BYTES).saturating_sub(held.stored + bytes);
        own == 0 || own + bytes <= OF_FREE * free
    }

    pub(super) fn give(&self, bytes: usize) {
        let mut held = lock(&self.budget.held);
        let own = self.stored();
        let bytes = bytes.min(own);
        self.stored.store(own - bytes, Ordering::Relaxed);
        held.stored -= bytes;
        self.freed.notify_all();
    }

    /// Looks at orders now.
    pub(super) fn wake(&self) {
        self.freed.notify_all();
    }

    pub(super) fn stored(&self) -> usize {
        self.stored.load(Ordering::Relaxed)
    }

    /// Memory for a long stream that looks back 2 to the power of `most` at most; none: too many have
    /// one.
    pub(super) fn window(self: &Arc<Self>, most: u32) -> Option<Window> {
        let part = self.part(RELAY_STREAM_BYTES, 0);
        let mut held = lock(&self.budget.held);
        let left = part.min(RELAY_STREAM_BYTES - held.streams);
        let log = WINDOW_LOGS.rev().find(|log| *log <= most && stream_bytes(*log) <= left)?;
        held.streams += stream_bytes(log);
        Some(Window { seat: Arc::clone(self), log })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.budget.held).stored -= self.stored();
        self.budget.seats.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        lock(&self.seat.budget.held).streams -= stream_bytes(self.log);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stores batches until there is no room; answers their bytes.
    fn fill(seat: &Seat) -> usize {
        let (go, now) = (AtomicBool::new(false), OnceLock::from(Instant::now()));
        let mut all = 0;
        loop {
            let bytes = seat.batch_pages() * CHUNK_BYTES;
            match seat.take(bytes, &go, &now) {
                Ok(()) => all += bytes,
                Err(no) => {
                    assert_eq!(no, NoRoom::Late);
                    return all;
                }
            }
        }
    }

    #[test]
    fn one_alone_stores_most_and_leaves_room_for_the_next() {
        let budget = Arc::new(Budget::default());
        let first = budget.join();
        let most = fill(&first);
        assert!(most > RELAY_STORE_BYTES * 2 / 3, "{most}");
        for _ in 0..3 {
            let next = budget.join();
            assert!(fill(&next) >= 4 * next.batch_pages() * CHUNK_BYTES, "beside one that is full");
            assert!(budget.stored() <= RELAY_STORE_BYTES);
        }
        assert_eq!(budget.stored(), most, "who leaves gives back");
    }

    #[test]
    fn however_many_there_are_the_store_is_bounded_and_each_has_a_batch() {
        let budget = Arc::new(Budget::default());
        let seats: Vec<_> = (0..64).map(|_| budget.join()).collect();
        for seat in &seats {
            assert!(fill(seat) >= seat.batch_pages() * CHUNK_BYTES);
        }
        assert!(budget.stored() <= RELAY_STORE_BYTES, "{}", budget.stored());
        // Each goes on when something of its own is placed.
        for seat in &seats {
            let own = seat.stored();
            seat.give(own);
            assert!(fill(seat) > 0);
        }
        assert!(budget.stored() <= RELAY_STORE_BYTES);
    }

    #[test]
    fn windows_shrink_with_the_sessions_and_are_bounded() {
        let window_of = |count: usize| {
            let budget = Arc::new(Budget::default());
            let seats: Vec<_> = (0..count).map(|_| budget.join()).collect();
            let windows: Vec<_> = seats.iter().map(|seat| seat.window(25)).collect();
            assert!(budget.streams() <= RELAY_STREAM_BYTES);
            let logs: Vec<_> = windows.iter().map(|w| w.as_ref().map(|w| w.log)).collect();
            assert!(logs.iter().all(|log| *log == logs[0]), "{logs:?}");
            drop(windows);
            assert_eq!(budget.streams(), 0);
            logs[0]
        };
        assert_eq!([1, 2, 4].map(window_of), [Some(25), Some(24), Some(23)]);
        assert_eq!(window_of(256), None);
        let budget = Arc::new(Budget::default());
        let alone = budget.join().window(25);
        let late = budget.join().window(25).map(|window| window.log);
        assert!(alone.is_some() && late.is_some_and(|log| log < 25), "{late:?}");
        let asked = Arc::new(Budget::default()).join().window(21);
        assert_eq!(asked.map(|window| window.log), Some(21));
    }
}
