//! A record that connects NICs otherwise while the VM moves: the move goes on from it.
//!
//! Owns what both ends have to do before the guest may be stopped. Invariant: a source binds itself only to the epoch
//! after a record by which the NICs at both ends are connected.

use super::{Action, Body, Effect, Source, State, plan, wait};
use crate::time::Time;
use crate::wire::record::Record;

/// How often the destination is told, milliseconds.
const TELL_MS: u64 = 500;

/// Which ends are not as the newest record says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rebase {
    pub here: bool,
    pub there: bool,
    tell_at: Time,
}

impl Rebase {
    pub fn is_pending(self) -> bool {
        self.here || self.there
    }
}

impl Source {
    /// Whether the guest may be stopped: its pause would be short enough, and both ends start from the newest record.
    pub(super) fn is_converged(&self) -> bool {
        !self.rebase.is_pending() && plan::is_converged(&self.last, self.options.max_downtime_ms)
    }

    /// Whether the ballot may be prepared: its round trip is over by the time the guest may be stopped.
    pub(super) fn is_near(&self) -> bool {
        let soon = self.status.left_ms.is_some_and(|ms| ms <= wait::BALLOT_AHEAD_MS);
        !self.rebase.is_pending() && (soon || self.is_converged())
    }

    /// Whether this decided record only connects NICs otherwise, and nothing is bound to the one before.
    pub(super) fn follows(&self, record: &Record) -> bool {
        let unbound = matches!(
            self.state,
            State::Describing { .. } | State::Preparing { .. } | State::Transfer { .. }
        );
        unbound && record.only_rewires(&self.record, self.status.vm)
    }

    pub(super) fn rebase(&mut self, now: Time, record: Record, out: &mut Vec<Action>) {
        let nics = record.placement_of(self.status.vm).map(|p| p.nics.clone()).unwrap_or_default();
        self.status.epoch_before = record.epoch;
        self.record = record;
        let there = !matches!(self.state, State::Describing { .. });
        self.rebase = Rebase { here: true, there, tell_at: now };
        if let State::Transfer { ballot, .. } = &mut self.state {
            *ballot = super::Ballot::None;
        }
        out.push(Action::Effect(Effect::Rewire(self.record.epoch, nics)));
        out.push(Action::Report);
        self.tell_rebase(now, out);
        self.tell_lead(out);
    }

    /// The destination is told until it says that it goes on from there, too.
    pub(super) fn tell_rebase(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.rebase.there && now >= self.rebase.tell_at {
            self.rebase.tell_at = now.plus_ms(TELL_MS);
            out.push(Action::Send(self.peer, Body::Rebase(Box::new(self.record.clone()))));
        }
    }
}
