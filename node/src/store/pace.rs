//! How fast a scan may go.
//!
//! Owns the time at which the next bytes are due. Never reads: who reads asks first, and sleeps
//! here. Invariant: a pace that was freed or stopped holds nobody for longer than one buffer takes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::scan::ScanError;

/// A bound on bytes per second, shared by the threads of a scan.
#[derive(Debug)]
pub struct Pace {
    bytes_per_s: u64,
    begun: Instant,
    /// When the next bytes may be read, nanoseconds since `begun`.
    due_ns: AtomicU64,
    free: AtomicBool,
    stopped: AtomicBool,
}

impl Pace {
    /// At most this many bytes per second, unless [`Pace::set_free`].
    #[must_use]
    pub fn new(bytes_per_s: u64) -> Self {
        Self {
            bytes_per_s: bytes_per_s.max(1),
            begun: Instant::now(),
            due_ns: AtomicU64::new(0),
            free: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        }
    }

    /// No bound.
    #[must_use]
    pub fn free() -> Self {
        let pace = Self::new(u64::MAX);
        pace.set_free(true);
        pace
    }

    /// Lifts the bound, or sets it again.
    pub fn set_free(&self, free: bool) {
        self.free.store(free, Relaxed);
    }

    /// Ends the scans that ask.
    pub fn stop(&self) {
        self.stopped.store(true, Relaxed);
    }

    /// Waits until `bytes` may be read.
    ///
    /// # Errors
    /// [`ScanError::Stopped`].
    pub fn take(&self, bytes: usize) -> Result<(), ScanError> {
        if self.stopped.load(Relaxed) {
            return Err(ScanError::Stopped);
        }
        if self.free.load(Relaxed) {
            return Ok(());
        }
        let now = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let cost = (bytes as u64).saturating_mul(1_000_000_000) / self.bytes_per_s;
        // Time that was not used is not saved up: there is no burst after a pause.
        let next = |due: u64| Some(due.max(now).saturating_add(cost));
        let due = self.due_ns.fetch_update(Relaxed, Relaxed, next).unwrap_or(now);
        if due > now {
            std::thread::sleep(Duration::from_nanos(due - now));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time_unless_freed() {
        let pace = Pace::new(1 << 20);
        let begun = Instant::now();
        for _ in 0..5 {
            pace.take(1 << 15).unwrap();
        }
        // The first is free; four times 31.25 ms.
        assert!(begun.elapsed() >= Duration::from_millis(120));
        pace.set_free(true);
        pace.take(1 << 40).unwrap();
        pace.take(1 << 40).unwrap();
        pace.stop();
        assert!(matches!(pace.take(1), Err(ScanError::Stopped)));
    }
}
