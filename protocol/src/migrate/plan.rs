//! When to stop the guest: one documented predicate, and the figures shown while it is not yet so.
//!
//! Owns the prediction. Decides nothing else.

use super::Progress;

/// Pause that is spent whatever the memory does: stop, device state, load, decide, `cont`.
const FIXED_MS: u64 = 60;
/// How long the other end may be silent beyond two round trips before the path counts as cut.
const SILENT_MS: u64 = 300;
/// Longest planned pause unless the request says otherwise.
pub const DOWNTIME_MS: u64 = 300;

/// Predicted pause if the guest were stopped now, milliseconds; none while nothing is measured.
///
/// What is in the node and what QEMU still holds must cross at the measured rate; then come one
/// round trip (last byte there, decision back) and a fixed part.
#[must_use]
pub fn predicted_downtime_ms(p: &Progress) -> Option<u64> {
    if p.link_bytes_per_s == 0 {
        return None;
    }
    let left = p.remaining_bytes.saturating_add(p.disk_left_bytes);
    let guest = u128::from(left) * u128::from(p.wire_per_guest_ppm) / 1_000_000;
    let bytes = u128::from(p.backlog_bytes) + guest;
    let crossing = bytes * 1000 / u128::from(p.link_bytes_per_s);
    Some(u64::try_from(crossing).unwrap_or(u64::MAX).saturating_add(p.rtt_ms + FIXED_MS))
}

/// Whether the guest may be stopped: one pass is over, the disks are copied, the other end was heard
/// of lately (or the rate is one of the past), and the predicted pause is short enough.
#[must_use]
pub fn is_converged(p: &Progress, max_downtime_ms: u64) -> bool {
    let limit = if max_downtime_ms == 0 { DOWNTIME_MS } else { max_downtime_ms };
    let heard = p.silent_ms <= 2 * p.rtt_ms + SILENT_MS;
    p.passes >= 1
        && p.disks_ready
        && heard
        && predicted_downtime_ms(p).is_some_and(|ms| ms <= limit)
}

/// Share of the work that is done (parts per million) and the milliseconds left, if known.
#[must_use]
pub fn work_done(p: &Progress, ram_bytes: u64) -> (u32, Option<u64>) {
    // QEMU's estimate says nothing before its first look at memory.
    let first = ram_bytes.saturating_sub(p.first_pass_bytes);
    let ram_left = if p.passes == 0 { first } else { p.remaining_bytes };
    let guest_left = ram_left.saturating_add(p.disk_left_bytes);
    let wire_left = p.backlog_bytes
        + (u128::from(guest_left) * u128::from(p.wire_per_guest_ppm) / 1_000_000) as u64;
    let handled = p.bulk_bytes;
    let total = handled.saturating_add(wire_left).max(1);
    let crossed = u128::from(handled) * 1_000_000 / u128::from(total);
    let disk_read = p.disk_bytes.saturating_sub(p.disk_left_bytes);
    let read = u128::from(p.first_pass_bytes.min(ram_bytes).saturating_add(disk_read)) * 1_000_000
        / u128::from(ram_bytes.saturating_add(p.disk_bytes).max(1));
    let ppm = crossed.min(read);
    // The dirtied bytes of the time left must cross as well: the net rate is what shrinks the rest.
    let dirtied = u128::from(p.dirty_bytes_per_s) * u128::from(p.wire_per_guest_ppm) / 1_000_000;
    let net = u128::from(p.link_bytes_per_s).saturating_sub(dirtied);
    let left = (net > 0).then(|| (u128::from(wire_left) * 1000 / net) as u64);
    (u32::try_from(ppm.min(990_000)).unwrap_or(990_000), left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet() -> Progress {
        Progress {
            passes: 1,
            disks_ready: true,
            link_bytes_per_s: 12_000_000,
            rtt_ms: 80,
            wire_per_guest_ppm: 500_000,
            ..Progress::default()
        }
    }

    #[test]
    fn a_quiet_guest_is_stopped_after_one_pass_and_not_before() {
        assert!(is_converged(&quiet(), 0));
        assert!(!is_converged(&Progress { passes: 0, ..quiet() }, 0));
    }

    #[test]
    fn a_disk_that_is_not_copied_or_a_silent_path_holds_the_stop_back() {
        assert!(!is_converged(&Progress { disks_ready: false, ..quiet() }, 0));
        assert!(!is_converged(&Progress { silent_ms: 5_000, ..quiet() }, 0));
        assert!(is_converged(&Progress { silent_ms: 400, ..quiet() }, 0));
    }

    #[test]
    fn a_backlog_holds_the_stop_back() {
        let busy = Progress { backlog_bytes: 12_000_000, ..quiet() };
        assert_eq!(predicted_downtime_ms(&busy), Some(1_140));
        assert!(!is_converged(&busy, 300));
        assert!(is_converged(&busy, 2_000));
    }

    #[test]
    fn without_a_measured_rate_nothing_is_promised() {
        assert_eq!(predicted_downtime_ms(&Progress::default()), None);
        assert_eq!(work_done(&Progress::default(), 1 << 20).1, None);
    }
}
