//! The destination of a migration.
//!
//! Owns the order of steps of `super`'s diagram, right side. Invariant: `cont` is asked for only
//! after a decided record names the copy that was minted at *loaded*, and only after that is on
//! disk, and never if that says that it is off; an end that is not bound yet may forget everything at any time.

mod state;
mod team;
mod timer;

use std::collections::BTreeMap;

use super::wait;
use super::{Action, Effect, Happened, Migration, Moving, Role, clip};
use crate::id::{CopyId, Epoch, HostId, VmId};
use crate::time::Time;
use crate::wire::migrate::{Body, Led, Phase, Seat, Status};
use crate::wire::record::{Cause, Record, Release, Voter};
use crate::wire::wiring::Wiring;
use state::{Qemu, Silence, State};

/// The destination's end of one migration.
#[derive(Debug, Clone)]
pub struct Destination {
    me: Voter,
    status: Status,
    record: Record,
    copy: Option<CopyId>,
    peer: HostId,
    state: State,
    rebuilds: u32,
    /// The cluster's migration that it is part of.
    led: Option<Led>,
    /// The member whose destination proposes.
    proposer: Option<Seat>,
    /// If it is this one: all members that move, and those that are loaded.
    team: Vec<Seat>,
    loaded: BTreeMap<VmId, (CopyId, Release)>,
    /// The word of its source: nothing is proposed without.
    release: Option<Release>,
    proposed: bool,
    off: bool,
    /// The record by which the copy's NICs are connected.
    rewired: Epoch,
}

impl Destination {
    /// Starts: lets the driver check and start a QEMU that waits. `record` and `spec` are the
    /// source's word; the record was checked to be well formed and to name the source.
    pub fn begin(
        now: Time,
        me: Voter,
        status: Status,
        record: Record,
        spec: Vec<u8>,
        led: Option<Led>,
        out: &mut Vec<Action>,
    ) -> Self {
        let peer = status.from;
        let nics = nics_of(&record, status.vm);
        out.push(Action::Effect(Effect::Receive { spec, nics, source: peer }));
        let state = State::Checking(Silence::since(now));
        Self::new(me, status, record, None, peer, state, led)
    }

    fn new(
        me: Voter,
        status: Status,
        record: Record,
        copy: Option<CopyId>,
        peer: HostId,
        state: State,
        led: Option<Led>,
    ) -> Self {
        let (proposer, team, loaded) = (None, Vec::new(), BTreeMap::new());
        let (rebuilds, release, proposed) = (0, None, false);
        let (off, rewired) = (record.is_off(status.vm), record.epoch);
        Self {
            rewired,
            me,
            status,
            record,
            copy,
            peer,
            state,
            rebuilds,
            led,
            proposer,
            team,
            loaded,
            release,
            proposed,
            off,
        }
    }

    /// Takes up a bound destination after a restart. `present`: its QEMU is there, loaded.
    pub fn resume(
        now: Time,
        me: Voter,
        moving: &Moving,
        record: Record,
        status: Status,
        present: bool,
        out: &mut Vec<Action>,
    ) -> Self {
        let present = present || record.is_off(moving.vm);
        let qemu = if present { Qemu::There } else { Qemu::Building };
        let status = Status { phase: Phase::Deciding, to: Some(me.host), ..status };
        let until = now.plus_ms(wait::DECISION_MS);
        // It does not propose any more: it drives a decision instead.
        let state = State::Loaded { until, tell_at: Time(u64::MAX), qemu };
        let mut this = Self::new(me, status, record, Some(moving.copy), moving.peer, state, None);
        this.proposed = true;
        if moving.started {
            // `cont` may have been sent: what the QEMU says now is the truth.
            this.status.phase = Phase::Starting;
            this.state = State::Starting { qemu, again_at: now.plus_ms(wait::CONT_AGAIN_MS) };
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
            cluster: self.record.cluster,
            base: self.record.epoch,
            role: Role::Destination,
            peer: self.peer,
            requested_on: self.status.requested_on,
            copy,
            started,
            team: Vec::new(),
        }
    }

    fn on_loaded(&mut self, now: Time, copy: CopyId, out: &mut Vec<Action>) {
        if !matches!(self.state, State::Receiving(_)) {
            return;
        }
        self.copy = Some(copy);
        let until = now.plus_ms(wait::DECISION_MS);
        let tell_at = now.plus_ms(wait::ASK_MS);
        self.state = State::Loaded { until, tell_at, qemu: Qemu::There };
        self.status.phase = Phase::Deciding;
        out.push(Action::Persist(self.moving(copy, false)));
        out.push(Action::Report);
        out.push(Action::Send(self.peer, Body::Loaded(copy)));
        self.tell_loaded(copy, out);
    }

    fn on_decided(&mut self, now: Time, record: &Record, out: &mut Vec<Action>) {
        if record.epoch <= self.record.epoch {
            return;
        }
        match (&self.state, self.copy) {
            (State::Loaded { qemu, .. }, Some(copy)) => {
                self.status.epoch_after = Some(record.epoch);
                if record.places(self.status.vm, self.me.host, copy) {
                    let mut qemu = *qemu;
                    if record.is_off(self.status.vm) {
                        // Also what the record before did not know: it left its cluster since.
                        (self.off, qemu) = (true, Qemu::There);
                    }
                    let again_at = now.plus_ms(wait::CONT_AGAIN_MS);
                    self.state = State::Starting { qemu, again_at };
                    self.status.phase = Phase::Starting;
                    out.push(Action::Report);
                    match qemu {
                        Qemu::There => self.start(copy, out),
                        Qemu::Building => {}
                        Qemu::Gone => {
                            self.rebuild(now, copy, "it could not be built again".into(), out);
                        }
                    }
                } else {
                    out.push(Action::Effect(Effect::Discard(copy)));
                    self.end(Phase::Stayed, stay_cause(record), out);
                }
            }
            (State::Checking(_) | State::Receiving(_), _) => {
                let vm = self.status.vm;
                if !record.only_rewires(&self.record, vm) {
                    return self.give_up(stay_cause(record), out);
                }
                // NICs are connected otherwise: the source goes on from there, too.
                self.status.epoch_before = record.epoch;
                out.push(Action::Effect(Effect::Rewire(record.epoch, nics_of(record, vm))));
                self.record = record.clone();
            }
            (State::Starting { .. } | State::Running { .. } | State::Lost { .. }, _) => {
                // Taken up after a restart, with the record that started it.
                self.status.epoch_after = self.status.epoch_after.or(Some(record.epoch));
            }
            _ => {}
        }
    }

    /// The VM is switched off: what was received is its disks, whole and flushed, and no QEMU is needed.
    fn is_off(&self) -> bool {
        self.off
    }

    /// What begins when the record is decided.
    fn begins(&self, copy: CopyId) -> Action {
        Action::Effect(if self.is_off() { Effect::Rest(copy) } else { Effect::Cont(copy) })
    }

    fn start(&mut self, copy: CopyId, out: &mut Vec<Action>) {
        if !self.is_off() {
            out.push(Action::Persist(self.moving(copy, true)));
        }
        out.push(self.begins(copy));
    }

    /// The end is on disk before the hard state goes: a restart between the two ends it again.
    fn end(&mut self, phase: Phase, cause: String, out: &mut Vec<Action>) {
        self.state = State::Over;
        self.status.phase = phase;
        self.status.cause = clip(cause);
        out.push(Action::Report);
        out.push(Action::Forget);
    }

    /// Decided for this copy, whose QEMU is gone: start it again, or give the guest up.
    fn rebuild(&mut self, now: Time, copy: CopyId, cause: String, out: &mut Vec<Action>) {
        if self.rebuilds >= wait::REBUILDS {
            return self.lose(now, cause, out);
        }
        if let State::Starting { qemu, .. } = &mut self.state {
            *qemu = Qemu::Building;
        }
        out.push(Action::Effect(Effect::Rebuild(copy)));
    }

    /// Not bound, and the source knows: forget what was received.
    fn give_up(&mut self, cause: String, out: &mut Vec<Action>) {
        out.push(Action::Effect(Effect::DropReceived));
        self.end(Phase::Stayed, cause, out);
    }

    fn lose(&mut self, now: Time, cause: String, out: &mut Vec<Action>) {
        let cause = clip(cause);
        self.status.phase = Phase::Lost;
        self.status.cause.clone_from(&cause);
        if let Some(copy) = self.copy {
            // What it has of its disks is the VM's: the record names it.
            out.push(Action::Effect(Effect::Rest(copy)));
        }
        out.push(Action::Send(self.peer, Body::Lost(cause.clone())));
        let (tell_at, until) = (now.plus_ms(wait::ASK_MS), now.plus_ms(wait::RUNNING_MS));
        self.state = State::Lost { tell_at, until, cause };
        out.push(Action::Report);
    }

    /// Not bound: forget what was received, and tell the source why.
    fn fail(&mut self, cause: String, out: &mut Vec<Action>) {
        out.push(Action::Send(self.peer, Body::Failed(clip(cause.clone()))));
        self.give_up(cause, out);
    }

    fn on_said(&mut self, now: Time, body: Body, out: &mut Vec<Action>) {
        if let State::Checking(silence) | State::Receiving(silence) = &mut self.state {
            *silence = Silence::since(now);
        }
        match (body, &self.state) {
            (Body::PrepareBallot(_), State::Receiving(_)) => out.push(Action::PrepareBallot),
            // It was heard with the record.
            (Body::Rebase(_), _) if self.rewired == self.record.epoch => {
                out.push(Action::Send(self.peer, Body::Rebased(self.rewired)));
            }
            (Body::Proposer(seat), _) => self.on_proposer(seat, out),
            (Body::Stopped(release), _) => {
                self.on_released(release, out);
                // It asks, too: this may be said again.
                self.on_said(now, Body::Where, out);
            }
            (Body::Cancel(cause), State::Checking(_) | State::Receiving(_)) => {
                self.give_up(cause, out);
            }
            (Body::Unknown | Body::Running { .. }, State::Checking(_) | State::Receiving(_)) => {
                self.give_up("the source node ended the move".into(), out);
            }
            (Body::Where, State::Loaded { .. } | State::Starting { .. }) => {
                if let Some(copy) = self.copy {
                    out.push(Action::Send(self.peer, Body::Loaded(copy)));
                }
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
            (Body::Prepare { .. } | Body::Where, State::Receiving(_)) => {
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
        let off = self.is_off();
        match (&mut self.state, self.copy) {
            (State::Checking(_) | State::Receiving(_), _) => {
                self.fail("the destination's QEMU ended before it had loaded".into(), out);
            }
            _ if off => {}
            (State::Starting { .. }, Some(_)) if ran => {
                self.lose(now, "the guest's QEMU ended while it was started".into(), out);
            }
            (State::Loaded { qemu, .. } | State::Starting { qemu, .. }, Some(copy))
                if *qemu == Qemu::There =>
            {
                *qemu = Qemu::Building;
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
        match (&mut self.state, self.copy) {
            (State::Loaded { qemu, .. }, _) => {
                // It may have been decided for this copy all the same: then it is tried again.
                *qemu = Qemu::Gone;
                out.push(Action::Resolve(cause));
            }
            (State::Starting { .. }, Some(copy)) => self.rebuild(now, copy, cause, out),
            _ => {}
        }
    }
}

fn nics_of(record: &Record, vm: VmId) -> Vec<Wiring> {
    record.placement_of(vm).map(|p| p.nics.clone()).unwrap_or_default()
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
            (Happened::Said(from, body), _) if team::is_team_s(&body, self.led.is_some()) => {
                self.on_team(from, body, out);
            }
            (Happened::Said(from, body), _) if from == self.peer => self.on_said(now, body, out),
            (Happened::Received, State::Checking(_)) => {
                self.state = State::Receiving(Silence::since(now));
                self.status.phase = Phase::Transfer;
                out.push(Action::Send(self.peer, Body::Ready));
                out.push(Action::Report);
            }
            (Happened::Refused(cause), State::Checking(_)) => {
                out.push(Action::Send(self.peer, Body::Refused(clip(cause.clone()))));
                self.end(Phase::Stayed, cause, out);
            }
            (Happened::TransferFailed(cause), State::Checking(_) | State::Receiving(_)) => {
                self.fail(cause, out);
            }
            (Happened::Abort, State::Checking(_) | State::Receiving(_)) => {
                self.fail("aborted on request".into(), out);
            }
            (Happened::Rewired(epoch), _) if epoch == self.record.epoch => {
                self.rewired = epoch;
                out.push(Action::Send(self.peer, Body::Rebased(epoch)));
            }
            (Happened::Loaded(copy), _) => self.on_loaded(now, copy, out),
            (Happened::BallotReady, State::Receiving(_)) => match self.led {
                None => out.push(Action::Send(self.peer, Body::BallotReady)),
                Some(led) if !self.team.is_empty() => {
                    let vm = self.status.vm;
                    out.push(Action::Tell(led.host, led.id, vm, Body::BallotReady));
                }
                Some(_) => {}
            },
            (Happened::Decided(record), _) => self.on_decided(now, &record, out),
            // Until it is loaded, which copy it will be is not known here.
            (Happened::QemuGone { copy, ran }, _) if self.copy.is_none_or(|own| own == copy) => {
                self.on_qemu_gone(now, ran, out);
            }
            (Happened::RebuildFailed(cause), _) => self.on_rebuild_failed(now, cause, out),
            (Happened::Rebuilt, State::Loaded { qemu, .. }) => *qemu = Qemu::There,
            (Happened::Rebuilt, State::Starting { qemu, again_at }) if *qemu != Qemu::There => {
                *qemu = Qemu::There;
                *again_at = now.plus_ms(wait::CONT_AGAIN_MS);
                if let Some(copy) = self.copy {
                    self.start(copy, out);
                }
            }
            (Happened::Running(resumed_us), State::Starting { .. }) => {
                if let Some(copy) = self.copy {
                    self.status.phase = Phase::Releasing;
                    let tell_at = now.plus_ms(wait::ASK_MS);
                    let until = now.plus_ms(wait::RUNNING_MS);
                    self.state = State::Running { tell_at, until, resumed_us };
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
            State::Checking(silence) | State::Receiving(silence) => {
                Some(silence.ask_at.min(silence.ends()))
            }
            State::Loaded { until, tell_at, .. } => Some(*until.min(tell_at)),
            State::Starting { again_at, .. } => Some(*again_at),
            State::Running { tell_at, until, .. } | State::Lost { tell_at, until, .. } => {
                Some(*tell_at.min(until))
            }
            State::Over => None,
        }
    }

    fn is_over(&self) -> bool {
        self.state == State::Over
    }
}
