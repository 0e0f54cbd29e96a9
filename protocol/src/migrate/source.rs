//! The source of a migration. A lone VM's leads it; a cluster's member does what its lead says (`led`).
//!
//! Owns the order of steps of `super`'s diagram, left side. Invariant: once `Stopping` is entered
//! (bound, on disk), the guest runs again here only on a decided record that names this copy.

mod led;
mod rebase;
mod state;
mod timer;

pub use led::Ordered;
use rebase::Rebase;
use state::State;

use super::ballot::{Ballot, Next};
use super::plan;
use super::wait;
use super::{Action, Effect, Happened, Migration, Moving, Progress, Role, clip};
use crate::id::{CopyId, HostId};
use crate::time::Time;
use crate::wire::migrate::{Body, Led, Options, Phase, Status};
use crate::wire::record::{Cause, Record, Release};

/// The source's end of one migration.
#[derive(Debug, Clone)]
pub struct Source {
    status: Status,
    record: Record,
    copy: CopyId,
    spec: Vec<u8>,
    options: Options,
    /// Hosts to try, the next one last.
    candidates: Vec<HostId>,
    peer: HostId,
    state: State,
    started: Time,
    last: Progress,
    refusals: Vec<String>,
    /// How often a destination forgot the transfer.
    forgotten: u32,
    /// When the transfer is given up; set when it first begins.
    deadline: Option<Time>,
    stopped_us: Option<u64>,
    resumed_us: Option<u64>,
    /// The cluster's migration that it is part of, and when its lead was last heard.
    led: Option<(Led, Time)>,
    share_bytes_per_s: u64,
    rebase: Rebase,
}

/// What a new source needs to know.
#[derive(Debug, Clone)]
pub struct Begin {
    /// How it starts out: ids, names, requester, memory size.
    pub status: Status,
    /// The decided record that names this copy.
    pub record: Record,
    /// This host's copy.
    pub copy: CopyId,
    /// The VM's description, for the destination.
    pub spec: Vec<u8>,
    /// What was asked for.
    pub options: Options,
    /// Hosts to try, best first; at least one.
    pub candidates: Vec<HostId>,
}

impl Source {
    /// Nothing has been asked yet.
    fn new(now: Time, status: Status, record: Record, copy: CopyId) -> Self {
        Self {
            peer: status.from,
            status,
            record,
            copy,
            spec: Vec::new(),
            options: Options::default(),
            candidates: Vec::new(),
            state: State::Over,
            started: now,
            last: Progress::default(),
            refusals: Vec::new(),
            forgotten: 0,
            deadline: None,
            stopped_us: None,
            resumed_us: None,
            led: None,
            share_bytes_per_s: 0,
            rebase: Rebase::default(),
        }
    }

    /// Starts: asks the first candidate.
    pub fn begin(now: Time, begin: Begin, out: &mut Vec<Action>) -> Self {
        let mut candidates = begin.candidates;
        candidates.reverse();
        let mut this = Self {
            spec: begin.spec,
            options: begin.options,
            candidates,
            ..Self::new(now, begin.status, begin.record, begin.copy)
        };
        this.ask_next(now, out);
        this
    }

    /// Takes up a bound source after a restart: only the decision of `base + 1` can end it.
    pub fn resume(
        now: Time,
        moving: &Moving,
        record: Record,
        status: Status,
        out: &mut Vec<Action>,
    ) -> Self {
        let cause = String::new();
        let status = Status { phase: Phase::Stopped, to: Some(moving.peer), cause, ..status };
        let this = Self {
            peer: moving.peer,
            state: State::Stopped {
                until: now.plus_ms(wait::DECISION_MS),
                ask_at: now.plus_ms(wait::ASK_MS),
            },
            ..Self::new(now, status, record, moving.copy)
        };
        out.push(Action::Resolve("the source node restarted while the guest stood still".into()));
        this
    }

    fn ask_next(&mut self, now: Time, out: &mut Vec<Action>) {
        let Some(next) = self.candidates.pop() else {
            let why = if self.refusals.is_empty() {
                "no host to move to".to_owned()
            } else {
                self.refusals.join("; ")
            };
            return self.end(Phase::Stayed, why, out);
        };
        self.peer = next;
        // It is told the newest record when it is asked.
        self.rebase.there = false;
        self.status.to = Some(next);
        self.status.phase = Phase::Preparing;
        self.state = State::Preparing {
            until: now.plus_ms(wait::PREPARE_MS),
            ask_at: now.plus_ms(wait::PREPARE_AGAIN_MS),
        };
        out.push(Action::Send(next, self.prepare()));
        out.push(Action::Report);
    }

    /// The destination node restarted: what it received serves the next try.
    fn ask_again(&mut self, now: Time, out: &mut Vec<Action>) {
        let cause = "the destination node restarted during the transfer";
        if self.forgotten == wait::AGAIN {
            return self.give_up(format!("{cause}, again and again"), out);
        }
        self.forgotten += 1;
        self.last = Progress::default();
        self.refusals.push(cause.into());
        self.candidates.push(self.peer);
        out.push(Action::Effect(Effect::CancelTransfer));
        self.ask_next(now, out);
    }

    fn prepare(&self) -> Body {
        Body::Prepare {
            record: Box::new(self.record.clone()),
            spec: self.spec.clone(),
            options: self.options,
            requested_on: self.status.requested_on,
            led: self.led.map(|(led, _)| led),
        }
    }

    /// The VM is switched off: its QEMU shows its disks, and must never run its guest.
    fn is_off(&self) -> bool {
        self.record.is_off(self.status.vm)
    }

    /// What the copy does when it stays, or stays off.
    fn keep(&self) -> Action {
        let keep = if self.is_off() { Effect::Rest } else { Effect::Cont };
        Action::Effect(keep(self.copy))
    }

    /// The end is on disk before the hard state goes: a restart between the two ends it again.
    fn end(&mut self, phase: Phase, cause: String, out: &mut Vec<Action>) {
        if self.is_off() && phase == Phase::Stayed {
            out.push(self.keep());
        }
        self.state = State::Over;
        self.status.phase = phase;
        self.status.cause = clip(cause);
        if phase == Phase::Moved {
            self.status.done_ppm = 1_000_000;
            self.status.left_ms = Some(0);
        }
        out.push(Action::Report);
        out.push(Action::Forget);
        self.tell_lead(out);
    }

    /// Gives up before the stop: the guest never noticed.
    fn give_up(&mut self, cause: String, out: &mut Vec<Action>) {
        out.push(Action::Effect(Effect::CancelTransfer));
        out.push(Action::Send(self.peer, Body::Cancel(cause.clone())));
        self.end(Phase::Stayed, cause, out);
    }

    fn on_progress(&mut self, now: Time, p: Progress, out: &mut Vec<Action>) {
        self.last = p;
        let (ppm, left) = plan::work_done(&p, self.status.ram_bytes);
        self.status.done_ppm = self.status.done_ppm.max(ppm);
        self.status.left_ms = left;
        state::show(&mut self.status, &p);
        self.status.total_ms = now.ms_since(self.started);
        out.push(Action::Report);
        self.tell_rebase(now, out);
        if self.led.is_some() {
            return self.tell_lead(out);
        }
        let (near, converged) = (self.is_near(), self.is_converged());
        let State::Transfer { ballot, .. } = &mut self.state else { return };
        match ballot.step(now, near, converged) {
            Next::Ask => out.push(Action::Send(self.peer, Body::PrepareBallot(Vec::new()))),
            Next::Stop => self.stop(now, out),
            Next::Wait => {}
        }
    }

    /// The one-way door: bound on disk first, then QMP `stop`.
    fn stop(&mut self, now: Time, out: &mut Vec<Action>) {
        out.push(Action::Persist(Moving {
            id: self.status.id,
            vm: self.status.vm,
            cluster: self.record.cluster,
            base: self.record.epoch,
            role: Role::Source,
            peer: self.peer,
            requested_on: self.status.requested_on,
            copy: self.copy,
            started: false,
            team: Vec::new(),
        }));
        // Whoever allows a long pause does not want it cut short by the deadline.
        let wait_ms = wait::DECISION_MS.saturating_add(self.options.max_downtime_ms);
        self.state =
            State::Stopped { until: now.plus_ms(wait_ms), ask_at: now.plus_ms(wait::ASK_MS) };
        self.status.phase = Phase::Stopped;
        out.push(Action::Effect(Effect::Stop));
        out.push(Action::Report);
    }

    fn on_decided(&mut self, now: Time, record: Record, out: &mut Vec<Action>) {
        if record.epoch <= self.record.epoch
            || matches!(self.state, State::Starting { .. } | State::Resuming { .. } | State::Over)
        {
            return;
        }
        if self.follows(&record) {
            return self.rebase(now, record, out);
        }
        self.status.epoch_after = Some(record.epoch);
        let Some(placed) = record.placement_of(self.status.vm).cloned() else {
            // The VM was removed meanwhile: no copy may run.
            out.push(Action::Effect(Effect::CancelTransfer));
            out.push(Action::Effect(Effect::Discard(self.copy)));
            return self.end(Phase::Lost, "the VM was removed while it moved".into(), out);
        };
        let bound = matches!(self.state, State::Stopped { .. });
        // One that is off stays where its disks are, as whichever copy it is switched on.
        let stays = self.is_off() && placed.host == self.status.from;
        if placed.copy == self.copy || stays {
            self.status.cause = match record.cause {
                Cause::Stay(why) => why,
                _ => "another change of the record was decided first".into(),
            };
            if bound {
                self.state = State::Resuming { ask_at: now.plus_ms(wait::SILENCE_MS) };
                out.push(Action::Send(self.peer, Body::Cancel(self.status.cause.clone())));
                out.push(Action::Effect(Effect::CancelTransfer));
                out.push(self.keep());
                out.push(Action::Report);
            } else {
                self.give_up(self.status.cause.clone(), out);
            }
        } else if !bound {
            // No move gets here; a record that was forced does. What it does not name may not run.
            out.push(Action::Effect(Effect::CancelTransfer));
            out.push(Action::Effect(Effect::Discard(self.copy)));
            self.end(Phase::Lost, "the record names another copy since".into(), out);
        } else {
            // A later record tells where the VM went from there: who moved it was the one that loaded it.
            if record.epoch == self.record.epoch.next() {
                self.status.to = Some(placed.host);
            }
            self.peer = placed.host;
            self.status.phase = Phase::Starting;
            self.state = State::Starting {
                ask_at: now.plus_ms(wait::ASK_MS),
                until: now.plus_ms(wait::RUNNING_MS),
            };
            out.push(Action::Report);
        }
    }

    fn on_running(&mut self, now: Time, resumed_us: u64, out: &mut Vec<Action>) {
        let decided = matches!(self.state, State::Starting { .. });
        if !decided {
            return;
        }
        self.status.total_ms = now.ms_since(self.started);
        self.resumed_us = Some(resumed_us).filter(|at| *at > 0);
        let stopped_us = self.stopped_us.filter(|at| *at <= resumed_us);
        self.status.downtime_us = stopped_us.filter(|_| !self.is_off()).map(|at| resumed_us - at);
        self.release(Phase::Moved, String::new(), out);
    }

    /// The destination forgets the move when it hears *released*: said once this end has forgotten.
    fn release(&mut self, phase: Phase, cause: String, out: &mut Vec<Action>) {
        out.push(Action::Effect(Effect::Discard(self.copy)));
        self.end(phase, cause, out);
        out.push(Action::Send(self.peer, Body::Released));
    }

    fn on_ready(&mut self, now: Time, out: &mut Vec<Action>) {
        let limit_ms = match self.options.deadline_s {
            0 => wait::TRANSFER_MS,
            s => s.saturating_mul(1000),
        };
        self.state = State::Transfer {
            until: *self.deadline.get_or_insert(now.plus_ms(limit_ms)),
            ask_at: now.plus_ms(wait::SILENCE_MS),
            heard: now,
            ballot: Ballot::None,
        };
        self.status.phase = Phase::Transfer;
        let (to, options) = (self.peer, self.options);
        out.push(Action::Effect(Effect::Transfer { to, options }));
        out.push(Action::Report);
    }

    fn on_said(&mut self, now: Time, body: Body, out: &mut Vec<Action>) {
        if let State::Transfer { heard, ask_at, .. } = &mut self.state {
            *heard = now;
            *ask_at = now.plus_ms(wait::SILENCE_MS);
        }
        match (body, &mut self.state) {
            (Body::Ready, State::Preparing { .. }) => self.on_ready(now, out),
            (Body::Refused(cause), State::Preparing { .. }) => {
                self.refusals.push(clip(cause));
                self.ask_next(now, out);
            }
            (
                Body::Where,
                State::Preparing { .. } | State::Transfer { .. } | State::Stopped { .. },
            ) => out.push(Action::Send(self.peer, self.at_it())),
            (Body::Where, State::Resuming { .. }) => {
                out.push(Action::Send(self.peer, Body::Cancel(self.status.cause.clone())));
            }
            (Body::BallotReady, State::Transfer { ballot, .. }) => {
                *ballot = Ballot::Ready(now);
                let last = self.last;
                self.on_progress(now, last, out);
            }
            (Body::Rebased(epoch), _) if epoch == self.record.epoch => self.rebase.there = false,
            (Body::Failed(cause), State::Transfer { .. }) => self.give_up(cause, out),
            (Body::Failed(cause), State::Stopped { .. }) => out.push(Action::Resolve(cause)),
            (Body::Loaded(_), State::Stopped { .. }) => {
                self.status.phase = Phase::Deciding;
                out.push(Action::Report);
            }
            (Body::Running { resumed_us, .. }, State::Starting { .. }) => {
                self.on_running(now, resumed_us, out);
            }
            (Body::Lost(cause), State::Starting { .. }) => self.release(Phase::Lost, cause, out),
            (Body::Running { .. } | Body::Lost(_), State::Stopped { .. }) => {
                out.push(Action::Resolve("the destination runs, the decision was missed".into()));
            }
            (Body::Unknown, State::Transfer { .. }) => self.ask_again(now, out),
            (Body::Unknown, State::Stopped { .. }) => {
                // It may have been about to bind, so the epoch is decided, not read.
                out.push(Action::Resolve("the destination forgot the move".into()));
            }
            (Body::Unknown, State::Starting { until, .. }) if now >= *until => {
                // A bound end forgets only with its store. The stopped copy is all that is left.
                let cause = "the destination knows nothing of the move that was decided for it; \
                    the stopped source copy is kept until this node restarts";
                self.end(Phase::Lost, cause.into(), out);
            }
            _ => {}
        }
    }

    /// This end is still at it: the question back, or that the guest stands still, bound.
    fn at_it(&self) -> Body {
        let still = self.stopped_us.filter(|_| matches!(self.state, State::Stopped { .. }));
        let (vm, copy, epoch) = (self.status.vm, self.copy, self.record.epoch.next());
        still.map_or(Body::Where, |_| Body::Stopped(Release { vm, copy, epoch }))
    }

    fn on_failure(&mut self, cause: String, out: &mut Vec<Action>) {
        match self.state {
            State::Describing { .. } | State::Preparing { .. } | State::Transfer { .. } => {
                self.give_up(cause, out);
            }
            State::Stopped { .. } => out.push(Action::Resolve(cause)),
            _ => {}
        }
    }

    fn on_qemu_gone(&mut self, out: &mut Vec<Action>) {
        let cause = "the guest's QEMU at the source ended".to_owned();
        match self.state {
            // The destination may have all of it: it loads and proposes, or says that it failed.
            State::Stopped { .. } | State::Starting { .. } | State::Over => {}
            // It never ran: nothing is lost with it.
            _ if self.is_off() => self.give_up(cause, out),
            State::Describing { .. } | State::Preparing { .. } | State::Transfer { .. } => {
                out.push(Action::Send(self.peer, Body::Cancel(cause.clone())));
                out.push(Action::Effect(Effect::CancelTransfer));
                self.end(Phase::Lost, cause, out);
            }
            State::Resuming { .. } => {
                out.push(Action::Effect(Effect::Rest(self.copy)));
                self.end(Phase::Lost, cause, out);
            }
        }
    }
}

impl Migration for Source {
    fn status(&self) -> &Status {
        &self.status
    }

    fn handle(&mut self, now: Time, happened: Happened, out: &mut Vec<Action>) {
        match happened {
            Happened::Said(from, body) if led::is_lead_s(&body) => {
                self.on_lead(now, from, body, out);
            }
            Happened::Described { spec, ram_bytes } => {
                self.on_described(now, spec, ram_bytes, out);
            }
            Happened::Rewired(epoch) if epoch == self.record.epoch => self.rebase.here = false,
            Happened::Refused(cause) if matches!(self.state, State::Describing { .. }) => {
                self.end(Phase::Stayed, cause, out);
            }
            Happened::Said(from, body) if from == self.peer => self.on_said(now, body, out),
            // A candidate that was given up, and did not hear so.
            Happened::Said(from, Body::Where) => out.push(Action::Send(from, Body::Unknown)),
            Happened::Progress(p) => self.on_progress(now, p, out),
            Happened::Stopped(at_us) => {
                self.stopped_us = Some(at_us);
                if matches!(self.state, State::Stopped { .. }) {
                    out.push(Action::Send(self.peer, self.at_it()));
                }
                out.push(Action::Report);
                self.tell_lead(out);
            }
            Happened::Decided(record) => self.on_decided(now, record, out),
            Happened::TransferFailed(cause) => self.on_failure(cause, out),
            Happened::QemuGone { copy, .. } if copy == self.copy => self.on_qemu_gone(out),
            Happened::Running(at_us) if matches!(self.state, State::Resuming { .. }) => {
                self.resumed_us = Some(at_us);
                self.status.total_ms = now.ms_since(self.started);
                let cause = self.status.cause.clone();
                self.end(Phase::Stayed, cause, out);
            }
            Happened::Connected(host)
                if host == self.peer
                    && matches!(self.state, State::Transfer { .. } | State::Stopped { .. }) =>
            {
                // One that was restarted unbound says that it knows nothing of the move.
                out.push(Action::Send(host, self.at_it()));
            }
            Happened::Abort => match self.state {
                State::Describing { .. } | State::Preparing { .. } | State::Transfer { .. } => {
                    self.give_up("aborted on request".into(), out);
                }
                _ => {}
            },
            Happened::Timer => self.on_timer(now, out),
            _ => {}
        }
    }

    fn timeout(&self) -> Option<Time> {
        self.next_timer()
    }

    fn is_over(&self) -> bool {
        self.state == State::Over
    }
}

#[cfg(test)]
mod tests;
