//! What a destination does when nothing came in time. Owns no state.

use super::{Action, Body, Destination, Effect, Phase, Qemu, State, wait};
use crate::time::Time;

impl Destination {
    pub(super) fn on_timer(&mut self, now: Time, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Checking(silence) | State::Receiving(silence) if now >= silence.ends() => {
                self.fail("the source does not answer any more".into(), out);
            }
            State::Checking(silence) | State::Receiving(silence) if now >= silence.ask_at => {
                silence.ask_at = now.plus_ms(wait::SILENCE_MS);
                out.push(Action::Send(self.peer, Body::Where));
            }
            State::Loaded { tell_at, .. } if now >= *tell_at => {
                *tell_at = now.plus_ms(wait::ASK_MS);
                if let Some(copy) = self.copy {
                    self.tell_loaded(copy, out);
                }
            }
            State::Loaded { until, .. } if now >= *until => {
                *until = now.plus_ms(wait::DECISION_MS);
                out.push(Action::Resolve("no decision in time after it had loaded".into()));
            }
            State::Starting { qemu, again_at } if now >= *again_at => {
                *again_at = now.plus_ms(wait::CONT_AGAIN_MS);
                match (*qemu, self.copy) {
                    (Qemu::There, Some(copy)) => out.push(self.begins(copy)),
                    // What is there already is not built again.
                    (_, Some(copy)) => out.push(Action::Effect(Effect::Rebuild(copy))),
                    (_, None) => {}
                }
            }
            // The source is away. What it keeps, it discards when it is back and asks.
            State::Running { until, .. } if now >= *until => {
                self.end(Phase::Moved, "the source has not confirmed yet".into(), out);
            }
            State::Lost { until, cause, .. } if now >= *until => {
                let cause = cause.clone();
                self.end(Phase::Lost, cause, out);
            }
            State::Running { tell_at, resumed_us, .. } if now >= *tell_at => {
                *tell_at = now.plus_ms(wait::ASK_MS);
                if let Some(copy) = self.copy {
                    let resumed_us = *resumed_us;
                    out.push(Action::Send(self.peer, Body::Running { copy, resumed_us }));
                }
            }
            State::Lost { tell_at, cause, .. } if now >= *tell_at => {
                *tell_at = now.plus_ms(wait::ASK_MS);
                out.push(Action::Send(self.peer, Body::Lost(cause.clone())));
            }
            _ => {}
        }
    }
}
