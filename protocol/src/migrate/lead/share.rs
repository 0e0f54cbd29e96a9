//! What each member may take of the path, and what is shown of all together.
//!
//! Owns the arithmetic. Decides nothing else.

use super::{Lead, Member, MemberStatus, Phase, State, wait};
use crate::migrate::Action;
use crate::time::Time;
use crate::wire::migrate::Figures;

/// What a member that may be stopped keeps at least, bytes per second: control words and a little.
const LEAST_BYTES_PER_S: u64 = 64 << 10;
/// What may be left when all are stopped, if that comes soon: milliseconds of the path.
const CALM_LEFT_MS: u128 = 40;
/// Pause between two statuses of the same phase, milliseconds.
const SHOWN_MS: u64 = 250;

/// Shares of the path, bytes per second, so that all members converge at the same time: one that may
/// be stopped gets what it dirties and a quarter more, the others divide the rest by what they have
/// left. 0: what the path gives, as long as not all have measured it and no limit was asked for.
pub(super) fn shares(members: &[Option<Figures>], limit_bytes_per_s: u64) -> Vec<u64> {
    let known: Vec<Figures> = members.iter().map(|f| f.unwrap_or_default()).collect();
    let measured = members.iter().all(|f| f.is_some_and(|f| f.link_bytes_per_s > 0));
    let sum = known.iter().fold(0_u64, |sum, f| sum.saturating_add(f.link_bytes_per_s));
    // A tenth more than was measured, so that a path that has become faster is noticed.
    let total = match limit_bytes_per_s {
        0 if !measured || sum == 0 || members.len() < 2 => return vec![0; members.len()],
        0 => sum.saturating_add(sum / 10),
        limit => limit,
    };
    let even = (total / members.len().max(1) as u64).max(1);
    let keeps = |f: &Figures| {
        let held = f.dirty_bytes_per_s.saturating_add(f.dirty_bytes_per_s / 4);
        held.saturating_add(LEAST_BYTES_PER_S).min(even)
    };
    let (ready, busy): (Vec<&Figures>, Vec<&Figures>) = known.iter().partition(|f| f.converged);
    let rest = total.saturating_sub(ready.iter().map(|f| keeps(f)).sum());
    let left = |f: &Figures| u128::from(f.left_bytes).max(1);
    let all_left: u128 = busy.iter().map(|f| left(f)).sum();
    let share = |f: &Figures| match f.converged {
        true if busy.is_empty() => even,
        true => keeps(f),
        false => {
            let part = u128::from(rest) * left(f) / all_left.max(1);
            u64::try_from(part).unwrap_or(u64::MAX).max(LEAST_BYTES_PER_S)
        }
    };
    known.iter().map(share).collect()
}

/// Whether what all have left crosses in [`CALM_LEFT_MS`].
pub(super) fn is_calm(members: impl Iterator<Item = Figures>) -> bool {
    let (left, link) = members.fold((0, 0), |(left, link), f| {
        (left + u128::from(f.left_bytes), link + u128::from(f.link_bytes_per_s))
    });
    left * 1000 <= link * CALM_LEFT_MS
}

/// From the first to the last of these moments, if all are known.
fn spread_us(at_us: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    let at_us: Vec<u64> = at_us.collect::<Option<_>>()?;
    Some(at_us.iter().max()? - at_us.iter().min()?)
}

impl Lead {
    /// Shows the status if its phase is new or some time has passed.
    pub(super) fn show(&mut self, now: Time, at_once: bool, out: &mut Vec<Action>) {
        self.status.total_ms = now.ms_since(self.started);
        if at_once || now >= self.shown_at {
            self.shown_at = now.plus_ms(SHOWN_MS);
            self.gather();
            out.push(Action::Report);
        }
    }

    /// Puts the members' statuses together: sums of what crossed, the slowest of what is left.
    pub(super) fn gather(&mut self) {
        let member = |m: &Member| {
            let of_record = self.record.placement_of(m.vm).map(|p| p.name.clone());
            let stand = m.stand.as_ref().map(|s| &s.status);
            MemberStatus {
                vm: m.vm,
                name: of_record.unwrap_or_else(|| self.status.name.clone()),
                from: m.from,
                to: m.to(),
                phase: m.phase(),
                cause: stand.map_or_else(String::new, |s| s.cause.clone()),
                done_ppm: stand.map_or(0, |s| s.done_ppm),
                downtime_us: stand.and_then(|s| s.downtime_us),
            }
        };
        let members: Vec<MemberStatus> = self.members.iter().map(member).collect();
        let stands = || self.members.iter().filter_map(|m| m.stand.as_ref());
        // Those whose guests stand still and run again.
        let run = || self.members.iter().filter(|m| !m.off);
        let s = &mut self.status;
        let sum = |f: fn(&crate::wire::migrate::Status) -> u64| {
            stands().fold(0_u64, |sum, stand| sum.saturating_add(f(&stand.status)))
        };
        s.to = members.first().and_then(|m| m.to);
        s.done_ppm = s.done_ppm.max(members.iter().map(|m| m.done_ppm).min().unwrap_or(0));
        s.left_ms = stands()
            .map(|m| m.status.left_ms)
            .collect::<Option<Vec<_>>>()
            .and_then(|left| left.into_iter().max());
        (s.ram_bytes, s.ram_nonzero_bytes) = (sum(|s| s.ram_bytes), sum(|s| s.ram_nonzero_bytes));
        (s.bulk_bytes, s.dirty_bytes_per_s) = (sum(|s| s.bulk_bytes), sum(|s| s.dirty_bytes_per_s));
        (s.disk_bytes, s.disk_wan_bytes) = (sum(|s| s.disk_bytes), sum(|s| s.disk_wan_bytes));
        (s.chunks_zero, s.chunks_known) = (sum(|s| s.chunks_zero), sum(|s| s.chunks_known));
        s.chunks_literal = sum(|s| s.chunks_literal);
        s.downtime_us = stands().filter_map(|m| m.status.downtime_us).max();
        s.stop_spread_us = spread_us(run().map(|m| m.stand.as_ref().and_then(|s| s.stopped_us)));
        s.resume_spread_us = spread_us(run().map(|m| m.stand.as_ref().and_then(|s| s.resumed_us)));
        let each = || self.members.iter();
        let all = |phase: Phase| each().all(|m| m.phase() == phase || m.phase().is_end());
        s.phase = match s.phase {
            Phase::Preparing if each().all(|m| m.phase() == Phase::Transfer) => Phase::Transfer,
            Phase::Stopped if all(Phase::Deciding) => Phase::Deciding,
            phase => phase,
        };
        if matches!(self.state, State::Stopping { .. } | State::Settling { .. }) {
            s.stop_budget_us = wait::STOPPED_MS * 1000;
        }
        s.members = members;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(left_bytes: u64, converged: bool) -> Option<Figures> {
        let (link_bytes_per_s, dirty_bytes_per_s) = (1_000_000, 400_000);
        Some(Figures {
            converged,
            near: converged,
            left_bytes,
            dirty_bytes_per_s,
            link_bytes_per_s,
        })
    }

    #[test]
    fn who_has_more_left_gets_more_and_who_is_ready_little() {
        let shares = shares(&[member(1 << 20, false), member(3 << 20, false), member(0, true)], 0);
        let [few, many, ready] = shares.as_slice() else { panic!("{shares:?}") };
        assert_eq!(*ready, 500_000 + LEAST_BYTES_PER_S);
        assert!(many / few == 2 || many / few == 3, "{shares:?}");
        let sum: u64 = shares.iter().sum();
        assert!(sum > 3_200_000 && sum <= 3_300_000, "{shares:?}");
    }

    #[test]
    fn it_is_calm_when_what_all_have_left_is_little_for_the_path_of_all() {
        let calm = |left: [u64; 2]| is_calm(left.iter().filter_map(|left| member(*left, true)));
        // 2 MB/s together: 80 kB.
        assert!(calm([0, 80_000]) && calm([40_000, 40_000]));
        assert!(!calm([41_000, 40_000]));
        let unmeasured = Figures { link_bytes_per_s: 0, ..member(1, true).unwrap() };
        assert!(!is_calm([unmeasured].into_iter()), "it waits until the deadline");
    }

    #[test]
    fn nothing_is_shared_before_it_is_measured() {
        assert_eq!(shares(&[member(9, false), None], 0), [0, 0]);
        let limited = shares(&[None, member(9, false)], 10_000_000);
        assert!(limited.iter().all(|s| *s > 0), "a limit holds from the start: {limited:?}");
    }
}
