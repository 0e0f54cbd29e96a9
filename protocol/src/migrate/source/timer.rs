//! What a source does when nothing came in time. Owns no state.

use super::{Action, Body, Phase, Source, State, wait};
use crate::time::Time;

impl Source {
    pub(super) fn on_timer(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.is_left(now) {
            return self.give_up("the lead of the cluster's migration does not answer".into(), out);
        }
        match &mut self.state {
            State::Describing { until } if now >= *until => {
                self.end(Phase::Stayed, "the source node is busy".into(), out);
            }
            State::Preparing { until, .. } if now >= *until => {
                self.refusals.push("the destination did not answer in time".into());
                out.push(Action::Send(self.peer, Body::Cancel("no answer in time".into())));
                self.ask_next(now, out);
            }
            State::Preparing { ask_at, .. } if now >= *ask_at => {
                *ask_at = now.plus_ms(wait::PREPARE_AGAIN_MS);
                out.push(Action::Send(self.peer, self.prepare()));
                self.tell_rebase(now, out);
            }
            State::Transfer { until, .. } if now >= *until => {
                self.give_up(self.too_late(now), out);
            }
            State::Transfer { heard, .. } if now >= heard.plus_ms(wait::HEARD_MS) => {
                self.give_up("the destination does not answer any more".into(), out);
            }
            State::Transfer { ask_at, .. } if now >= *ask_at => {
                *ask_at = now.plus_ms(wait::SILENCE_MS);
                out.push(Action::Send(self.peer, Body::Where));
            }
            State::Stopped { until, .. } if now >= *until => {
                *until = now.plus_ms(wait::DECISION_MS);
                out.push(Action::Resolve("no decision in time while the guest stood still".into()));
            }
            State::Stopped { ask_at, .. } if now >= *ask_at => {
                *ask_at = now.plus_ms(wait::ASK_MS);
                out.push(Action::Send(self.peer, self.at_it()));
            }
            State::Starting { ask_at, until } if now >= *ask_at => {
                let in_vain = now >= *until;
                let pause = if in_vain { wait::SILENCE_MS } else { wait::ASK_MS };
                *ask_at = now.plus_ms(pause);
                out.push(Action::Send(self.peer, Body::Where));
                if in_vain && self.status.phase != Phase::Lost {
                    self.lose_sight(out);
                }
            }
            State::Resuming { ask_at } if now >= *ask_at => {
                *ask_at = now.plus_ms(wait::SILENCE_MS);
                out.push(self.keep());
            }
            _ => {}
        }
    }

    /// When the next step is due.
    pub(super) fn next_timer(&self) -> Option<Time> {
        let own = match &self.state {
            State::Describing { until } => Some(*until),
            State::Preparing { until, ask_at } | State::Stopped { until, ask_at } => {
                Some(*until.min(ask_at))
            }
            State::Transfer { until, ask_at, heard, .. } => {
                Some(heard.plus_ms(wait::HEARD_MS).min(*until).min(*ask_at))
            }
            State::Starting { ask_at, .. } | State::Resuming { ask_at } => Some(*ask_at),
            State::Over => None,
        };
        own.map(|t| self.left_at().map_or(t, |left| left.min(t)))
    }

    /// For those who wait the move has ended. Nothing may be started here any more: the copy stays,
    /// stopped and bound, and so does the question.
    fn lose_sight(&mut self, out: &mut Vec<Action>) {
        let cause = "decided for the destination, which does not say that the guest runs: look at its \
            node; until it does, the stopped source copy is kept";
        self.status.phase = Phase::Lost;
        self.status.cause = cause.into();
        out.push(Action::Report);
        self.tell_lead(out);
    }

    /// What kept the move from its end, and what would help.
    fn too_late(&self, now: Time) -> String {
        let (p, after_s) = (&self.last, now.ms_since(self.started) / 1000);
        let path = p.link_bytes_per_s / 1000;
        if p.disks_ready {
            format!(
                "deadline: not converged after {after_s} s (the guest dirties {} KB/s, the path gives \
                 {path} KB/s); allow a longer --max-downtime",
                p.dirty_bytes_per_s / 1000
            )
        } else {
            format!(
                "deadline: the disks are not copied after {after_s} s ({} MB are left, the path gives \
                 {path} KB/s); allow a longer --deadline",
                p.disk_left_bytes / 1_000_000
            )
        }
    }
}
