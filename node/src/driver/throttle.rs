//! Guests that write faster than the path takes.
//!
//! Owns one decision: when a guest's writes are held to a rate, and to which. A mirror follows what
//! is written; if more is written than crosses, it never ends. Holding the writes costs the guest
//! time, so it is done only after the path has lost ground for a while, shown while it lasts, and
//! taken back at the end whichever way that is.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::copies::Copy;
use super::mirrors::Copied;
use crate::relay::SourceProgress;

/// How often it is decided.
const LOOK: Duration = Duration::from_secs(1);
/// The path must have lost ground for so many looks in a row.
const PATIENCE: u32 = 5;
/// A guest that leaves no more than this to be copied keeps up, bytes.
const SLACK: u64 = 8 << 20;
/// A path on which nothing was heard for so long counts as cut, milliseconds.
const CUT_MS: u64 = 1000;
/// Least that a guest may always write, bytes per second.
const LEAST: u64 = 256 << 10;

/// See the module.
pub(super) struct Throttle {
    copy: Arc<Copy>,
    looked: Instant,
    left: u64,
    losing: u32,
    limit: u64,
    since: Option<Instant>,
}

impl Throttle {
    pub fn new(copy: Arc<Copy>) -> Self {
        Self { copy, looked: Instant::now(), left: 0, losing: 0, limit: 0, since: None }
    }

    /// What the guest may write to each disk at most, bytes per second; 0: as it likes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How long it was held to that.
    pub fn spent_ms(&self) -> u64 {
        self.since.map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(0))
    }

    /// Looks whether the disks come nearer to their end.
    pub async fn follow(&mut self, p: &SourceProgress, copied: &Copied, wire_ppm: u64) {
        if self.looked.elapsed() < LOOK || copied.bytes == 0 {
            return;
        }
        self.looked = Instant::now();
        let before = std::mem::replace(&mut self.left, copied.left);
        // A path that is cut takes nothing, however little the guest writes.
        let open = p.connected && p.silent_ms < CUT_MS;
        let losing = open && copied.left > SLACK && copied.left >= before && before > 0;
        self.losing = if losing { self.losing + 1 } else { 0 };
        if self.losing < PATIENCE {
            return;
        }
        self.losing = 0;
        // Half of what crosses is left for catching up.
        let crosses = p.link_bytes_per_s * 1e6 / wire_ppm.max(10_000) as f64;
        let half = (crosses / 2.0) as u64;
        let next = if self.limit == 0 { half } else { self.limit / 2 }.max(LEAST);
        if next == self.limit {
            return;
        }
        self.limit = next;
        self.since.get_or_insert_with(Instant::now);
        for disk in self.copy.spec.moving() {
            if let Err(error) = self.copy.qemu().throttle_disk(&disk.id, Some(next)).await {
                tracing::warn!(disk = disk.id, %error, "its writes cannot be held");
            }
        }
        tracing::info!(
            vm = %self.copy.spec.name, bytes_per_s = next,
            "the guest writes faster than the path takes: its writes are held"
        );
    }
}
