//! The destination of a migration.
//!
//! Owns the order of steps of `super`'s diagram, right side. Invariant: `cont` is asked for only
//! after a decided record names the copy that was minted at *loaded*, and only after that is on
//! disk; an end that is not bound yet may forget everything at any time.

use super::wait;
use super::{Action, Effect, Happened, Migration, Moving, Role};
use crate::id::{CopyId, HostId};
use crate::time::Time;
use crate::wire::migrate::{Body, Phase, Status};
use crate::wire::record::{Cause, Placement, Record};

/// Where the destination stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// The driver checks and starts a QEMU.
    Checking,
    /// Pages arrive; the source is asked where it stands after a silence.
    Receiving { silent_at: Time },
    /// Bound: loaded, proposed; until a decision or the deadline.
    Loaded { until: Time, present: bool },
    /// Decided for this copy; `cont` when its QEMU is there.
    Starting { present: bool },
    /// Runs; the source is told until it says *released*.
    Running { tell_at: Time, resumed_us: u64 },
    /// It ran and is gone; the source is told until it says *released*.
    Lost { tell_at: Time, cause: String },
    /// Nothing more.
    Over,
}

/// The destination's end of one migration.
#[derive(Debug, Clone)]
pub struct Destination {
    me: HostId,
    status: Status,
    record: Record,
    copy: Option<CopyId>,
    peer: HostId,
    state: State,
    rebuilds: u32,
}

impl Destination {
    /// Starts: lets the driver check and start a QEMU that waits. `record` and `spec` are the
    /// source's word; the record was checked to be well formed and to name the source.
    pub fn begin(
        me: HostId,
        status: Status,
        record: Record,
        spec: Vec<u8>,
        out: &mut Vec<Action>,
    ) -> Self {
        let peer = status.from;
        out.push(Action::Effect(Effect::Receive { spec, source: peer }));
        Self { me, status, record, copy: None, peer, state: State::Checking, rebuilds: 0 }
    }

    /// Takes up a bound destination after a restart. `present`: its QEMU is there, loaded.
    pub fn resume(
        now: Time,
        me: HostId,
        moving: &Moving,
        record: Record,
        status: Status,
        present: bool,
        out: &mut Vec<Action>,
    ) -> Self {
        let mut this = Self {
            me,
            status: Status { phase: Phase::Deciding, to: Some(me), ..status },
            record,
            copy: Some(moving.copy),
            peer: moving.peer,
            state: State::Loaded { until: now.plus_ms(wait::DECISION_MS), present },
            rebuilds: 0,
        };
        if moving.started {
            // `cont` may have been sent: what the QEMU says now is the truth.
            this.state = State::Starting { present };
            if present {
                out.push(Action::Effect(Effect::Cont(moving.copy)));
            } else {
                this.lose(now, "the guest's QEMU ended after it was started".into(), out);
            }
        } else {
            if !present {
                out.push(Action::Effect(Effect::Rebuild(moving.copy)));
            }
            out.push(Action::Resolve("the destination node restarted after it had loaded".into()));
        }
        this
    }

    fn moving(&self, copy: CopyId, started: bool) -> Moving {
        Moving {
            id: self.status.id,
            vm: self.status.vm,
            base: self.record.epoch,
            role: Role::Destination,
            peer: self.peer,
            requested_on: self.status.requested_on,
            copy,
            started,
        }
    }

    /// The record that this move proposes: the next epoch, with this copy in place of the source's.
    fn proposal(&self, copy: CopyId) -> Record {
        let mut record = self.record.clone();
        record.epoch = record.epoch.next();
        record.cause = Cause::Move;
        for placement in &mut record.placement {
            if placement.vm == self.status.vm {
                *placement = Placement { vm: self.status.vm, host: self.me, copy };
            }
        }
        record
    }

    fn on_loaded(&mut self, now: Time, copy: CopyId, out: &mut Vec<Action>) {
        if !matches!(self.state, State::Receiving { .. }) {
            return;
        }
        self.copy = Some(copy);
        self.state = State::Loaded { until: now.plus_ms(wait::DECISION_MS), present: true };
        self.status.phase = Phase::Deciding;
        out.push(Action::Persist(self.moving(copy, false)));
        out.push(Action::Report);
        out.push(Action::Send(self.peer, Body::Loaded(copy)));
        out.push(Action::Propose(self.proposal(copy)));
    }

    fn on_decided(&mut self, record: &Record, out: &mut Vec<Action>) {
        if record.epoch <= self.record.epoch {
            return;
        }
        match (&self.state, self.copy) {
            (State::Loaded { present, .. }, Some(copy)) => {
                self.status.epoch_after = Some(record.epoch);
                if record.names(self.status.vm, self.me, copy) {
                    let present = *present;
                    self.state = State::Starting { present };
                    self.status.phase = Phase::Starting;
                    out.push(Action::Report);
                    if present {
                        self.start(copy, out);
                    }
                } else {
                    out.push(Action::Effect(Effect::Discard(copy)));
                    self.end(Phase::Stayed, stay_cause(record), out);
                }
            }
            (State::Checking | State::Receiving { .. }, _) => {
                out.push(Action::Effect(Effect::DropReceived));
                self.end(Phase::Stayed, stay_cause(record), out);
            }
            _ => {}
        }
    }

    fn start(&mut self, copy: CopyId, out: &mut Vec<Action>) {
        out.push(Action::Persist(self.moving(copy, true)));
        out.push(Action::Effect(Effect::Cont(copy)));
    }

    fn end(&mut self, phase: Phase, cause: String, out: &mut Vec<Action>) {
        self.state = State::Over;
        self.status.phase = phase;
        self.status.cause = cause;
        out.push(Action::Forget);
        out.push(Action::Report);
    }

    fn lose(&mut self, now: Time, cause: String, out: &mut Vec<Action>) {
        self.status.phase = Phase::Lost;
        self.status.cause.clone_from(&cause);
        out.push(Action::Send(self.peer, Body::Lost(cause.clone())));
        self.state = State::Lost { tell_at: now.plus_ms(wait::ASK_MS), cause };
        out.push(Action::Report);
    }

    /// Not bound: forget what was received, and tell the source why.
    fn fail(&mut self, cause: String, out: &mut Vec<Action>) {
        out.push(Action::Effect(Effect::DropReceived));
        out.push(Action::Send(self.peer, Body::Failed(cause.clone())));
        self.end(Phase::Stayed, cause, out);
    }

    fn on_said(&mut self, now: Time, body: Body, out: &mut Vec<Action>) {
        if let State::Receiving { silent_at } = &mut self.state {
            *silent_at = now.plus_ms(wait::SILENCE_MS);
        }
        match (body, &self.state) {
            (Body::PrepareBallot, State::Receiving { .. }) => out.push(Action::PrepareBallot),
            (Body::Cancel(cause), State::Checking | State::Receiving { .. }) => {
                out.push(Action::Effect(Effect::DropReceived));
                self.end(Phase::Stayed, cause, out);
            }
            (Body::Unknown, State::Checking | State::Receiving { .. }) => {
                out.push(Action::Effect(Effect::DropReceived));
                self.end(Phase::Stayed, "the source node forgot the move".into(), out);
            }
            (Body::Where, State::Running { resumed_us, .. }) => {
                if let Some(copy) = self.copy {
                    let resumed_us = *resumed_us;
                    out.push(Action::Send(self.peer, Body::Running { copy, resumed_us }));
                }
            }
            (Body::Where, State::Lost { cause, .. }) => {
                out.push(Action::Send(self.peer, Body::Lost(cause.clone())));
            }
            (Body::Prepare { .. }, State::Receiving { .. }) => {
                out.push(Action::Send(self.peer, Body::Ready));
            }
            (Body::Released, State::Running { .. }) => {
                self.end(Phase::Moved, String::new(), out);
            }
            (Body::Released, State::Lost { cause, .. }) => {
                let cause = cause.clone();
                self.end(Phase::Lost, cause, out);
            }
            _ => {}
        }
    }

    fn on_qemu_gone(&mut self, now: Time, ran: bool, out: &mut Vec<Action>) {
        match (&mut self.state, self.copy) {
            (State::Checking | State::Receiving { .. }, _) => {
                self.fail("the destination's QEMU ended before it had loaded".into(), out);
            }
            (State::Starting { .. }, Some(_)) if ran => {
                self.lose(now, "the guest's QEMU ended while it was started".into(), out);
            }
            (State::Loaded { present, .. } | State::Starting { present }, Some(copy))
                if *present =>
            {
                *present = false;
                // The guest never ran in it: the stored state is still the truth.
                out.push(Action::Persist(self.moving(copy, false)));
                out.push(Action::Effect(Effect::Rebuild(copy)));
            }
            (State::Running { .. }, _) => {
                self.lose(now, "the guest's QEMU ended after the move".into(), out);
            }
            _ => {}
        }
    }

    fn on_rebuild_failed(&mut self, now: Time, cause: String, out: &mut Vec<Action>) {
        self.rebuilds += 1;
        match (&self.state, self.copy) {
            (State::Loaded { .. }, _) => out.push(Action::Resolve(cause)),
            (State::Starting { .. }, Some(copy)) if self.rebuilds < wait::REBUILDS => {
                out.push(Action::Effect(Effect::Rebuild(copy)));
            }
            (State::Starting { .. }, _) => self.lose(now, cause, out),
            _ => {}
        }
    }

    fn on_timer(&mut self, now: Time, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Receiving { silent_at } if now >= *silent_at => {
                *silent_at = now.plus_ms(wait::SILENCE_MS);
                out.push(Action::Send(self.peer, Body::Where));
            }
            State::Loaded { until, .. } if now >= *until => {
                *until = now.plus_ms(wait::DECISION_MS);
                out.push(Action::Resolve("no decision in time after it had loaded".into()));
            }
            State::Running { tell_at, resumed_us } if now >= *tell_at => {
                *tell_at = now.plus_ms(wait::ASK_MS);
                if let Some(copy) = self.copy {
                    let resumed_us = *resumed_us;
                    out.push(Action::Send(self.peer, Body::Running { copy, resumed_us }));
                }
            }
            State::Lost { tell_at, cause } if now >= *tell_at => {
                *tell_at = now.plus_ms(wait::ASK_MS);
                out.push(Action::Send(self.peer, Body::Lost(cause.clone())));
            }
            _ => {}
        }
    }
}

fn stay_cause(record: &Record) -> String {
    match &record.cause {
        Cause::Stay(why) => why.clone(),
        other => format!("another change was decided first: {other:?}"),
    }
}

impl Migration for Destination {
    fn status(&self) -> &Status {
        &self.status
    }

    fn handle(&mut self, now: Time, happened: Happened, out: &mut Vec<Action>) {
        match (happened, &mut self.state) {
            (Happened::Said(from, body), _) if from == self.peer => self.on_said(now, body, out),
            (Happened::Received, State::Checking) => {
                self.state = State::Receiving { silent_at: now.plus_ms(wait::SILENCE_MS) };
                self.status.phase = Phase::Transfer;
                out.push(Action::Send(self.peer, Body::Ready));
                out.push(Action::Report);
            }
            (Happened::Refused(cause), State::Checking) => {
                out.push(Action::Send(self.peer, Body::Refused(cause.clone())));
                self.end(Phase::Stayed, cause, out);
            }
            (Happened::TransferFailed(cause), State::Checking | State::Receiving { .. }) => {
                self.fail(cause, out);
            }
            (Happened::Loaded(copy), _) => self.on_loaded(now, copy, out),
            (Happened::BallotReady, State::Receiving { .. }) => {
                out.push(Action::Send(self.peer, Body::BallotReady));
            }
            (Happened::Decided(record), _) => self.on_decided(&record, out),
            (Happened::QemuGone { ran }, _) => self.on_qemu_gone(now, ran, out),
            (Happened::RebuildFailed(cause), _) => self.on_rebuild_failed(now, cause, out),
            (Happened::Rebuilt, State::Loaded { present, .. }) => *present = true,
            (Happened::Rebuilt, State::Starting { present }) if !*present => {
                *present = true;
                if let Some(copy) = self.copy {
                    self.start(copy, out);
                }
            }
            (Happened::Running(resumed_us), State::Starting { .. }) => {
                if let Some(copy) = self.copy {
                    self.status.phase = Phase::Releasing;
                    self.state = State::Running { tell_at: now.plus_ms(wait::ASK_MS), resumed_us };
                    out.push(Action::Send(self.peer, Body::Running { copy, resumed_us }));
                    out.push(Action::Report);
                }
            }
            (Happened::Timer, _) => self.on_timer(now, out),
            _ => {}
        }
    }

    fn timeout(&self) -> Option<Time> {
        match &self.state {
            State::Receiving { silent_at } => Some(*silent_at),
            State::Loaded { until, .. } => Some(*until),
            State::Running { tell_at, .. } | State::Lost { tell_at, .. } => Some(*tell_at),
            State::Checking | State::Starting { .. } | State::Over => None,
        }
    }

    fn is_over(&self) -> bool {
        self.state == State::Over
    }
}
