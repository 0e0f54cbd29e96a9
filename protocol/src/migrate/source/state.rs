//! Where the source of a migration stands. Owns the states and what is shown; the transitions are the parent's.

use crate::migrate::Progress;
use crate::migrate::ballot::Ballot;
use crate::time::Time;
use crate::wire::migrate::Status;

/// Where the source stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// A cluster's member: the driver tells what the destination has to know.
    Describing { until: Time },
    /// Waiting for the destination's answer, which is asked again.
    Preparing { until: Time, ask_at: Time },
    /// Pages cross; with what is known of the ballot, and when the destination was last heard.
    Transfer { until: Time, ask_at: Time, heard: Time, ballot: Ballot },
    /// Bound; QMP `stop` is on its way or done; until a decision or the deadline. The destination
    /// is asked: if it has forgotten, the guest need not stand still until the deadline.
    Stopped { until: Time, ask_at: Time },
    /// Decided for the destination; asking it for *running*.
    Starting { ask_at: Time, until: Time },
    /// Decided to stay; `cont` is on its way.
    Resuming { ask_at: Time },
    /// Nothing more.
    Over,
}

/// Puts what was measured into what is shown.
pub(super) fn show(status: &mut Status, p: &Progress) {
    status.ram_nonzero_bytes = status.ram_nonzero_bytes.max(p.nonzero_bytes);
    status.bulk_bytes = p.bulk_bytes;
    status.dirty_bytes_per_s = p.dirty_bytes_per_s;
    status.disk_bytes = p.disk_bytes;
    status.disk_wan_bytes = p.disk_wire_bytes;
    status.disk_throttle_bytes_per_s = p.disk_throttle_bytes_per_s;
    status.disk_throttled_ms = p.disk_throttled_ms;
    status.chunks_zero = p.zero;
    status.chunks_known = p.known;
    status.chunks_literal = p.literal;
}
