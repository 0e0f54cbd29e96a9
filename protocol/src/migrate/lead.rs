//! The lead of a cluster's migration: the host of its first VM.
//!
//! Owns the order of steps for all members: asks every source to move its VM, shares the path so that
//! all converge together, has the ballot prepared, orders all to stop, and drives a decision if not all
//! are loaded in time. Never decides which record is right, and is not needed for a decision: any
//! bound end drives one. Invariant: before it orders the first to stop, that is on disk; from then on
//! it says *moved* or *stayed* only by a decided record.
//!
//! ```text
//!   Gathering --all converged, ballot ready--> Stopping --decided--> Settling --all ended--> over
//!       |                                         |
//!       +-- refused, silent, deadline: cancel all +-- late, failed: resolve (adopt, else stay)
//! ```

mod share;

use std::collections::BTreeSet;

use super::ballot::{Ballot, Next};
use super::{Action, Happened, Migration, Moving, Role, clip, wait};
use crate::id::{CopyId, Epoch, HostId, VmId};
use crate::time::Time;
use crate::wire::migrate::{
    Body, Figures, MemberStatus, Options, Phase, Seat, Stand, Status, of_member,
};
use crate::wire::record::{Cause, Placement, Record};

/// Where the lead stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// The members are asked, and their pages cross.
    /// `calm_by`: when all are stopped at the latest, if they may be; counted from when they first might.
    Gathering { until: Time, ballot: Ballot, calm_by: Option<Time> },
    /// Bound: all are told to stop; until a decision or a deadline.
    Stopping { until: Time, stopped_by: Time },
    /// Decided; the members tell how they end.
    Settling { until: Time, moved: bool },
    /// Nothing more.
    Over,
}

/// A member that moves, as the lead knows it.
#[derive(Debug, Clone)]
struct Member {
    vm: VmId,
    from: HostId,
    copy: CopyId,
    /// Switched off: when it is stopped and resumed says nothing.
    off: bool,
    candidates: Vec<HostId>,
    stand: Option<Stand>,
    heard: Time,
    /// Its source has forgotten it.
    forgotten: bool,
}

impl Member {
    fn phase(&self) -> Phase {
        self.stand.as_ref().map_or(Phase::Preparing, |s| s.status.phase)
    }

    fn to(&self) -> Option<HostId> {
        self.stand.as_ref().and_then(|stand| stand.status.to)
    }

    fn figures(&self) -> Option<Figures> {
        self.stand.as_ref().and_then(|s| s.figures)
    }

    /// The epoch that its source starts from.
    fn base(&self) -> Option<Epoch> {
        self.stand.as_ref().map(|stand| stand.status.epoch_before)
    }

    /// Its source was heard, and not that its guest was stopped.
    fn runs_on(&self) -> bool {
        self.stand.is_some() && matches!(self.phase(), Phase::Preparing | Phase::Transfer)
    }

    fn is_over(&self) -> bool {
        self.forgotten || self.phase().is_end()
    }
}

/// The lead's end of a cluster's migration.
#[derive(Debug, Clone)]
pub struct Lead {
    status: Status,
    record: Record,
    options: Options,
    members: Vec<Member>,
    state: State,
    started: Time,
    say_at: Time,
    shown_at: Time,
}

/// What a new lead needs to know.
#[derive(Debug, Clone)]
pub struct Begin {
    /// How it starts out: ids, name, requester.
    pub status: Status,
    /// The decided record of the cluster.
    pub record: Record,
    /// What was asked for.
    pub options: Options,
    /// The members that move, each with the hosts to try, best first; at least one.
    pub members: Vec<(VmId, Vec<HostId>)>,
}

impl Lead {
    /// Starts: asks every source.
    pub fn begin(now: Time, begin: Begin, out: &mut Vec<Action>) -> Self {
        let Begin { status, record, options, members } = begin;
        let members = members.into_iter().filter_map(|(vm, candidates)| {
            let placed = record.placement_of(vm)?;
            let (from, copy, off) = (placed.host, placed.copy, placed.off);
            let (stand, forgotten) = (None, false);
            Some(Member { vm, from, copy, off, candidates, stand, heard: now, forgotten })
        });
        let members: Vec<Member> = members.collect();
        let limit_ms = match options.deadline_s {
            0 => wait::TRANSFER_MS,
            s => s.saturating_mul(1000),
        };
        let state =
            State::Gathering { until: now.plus_ms(limit_ms), ballot: Ballot::None, calm_by: None };
        let (say_at, shown_at) = (now, now);
        let mut this =
            Self { status, record, options, members, state, started: now, say_at, shown_at };
        this.say(now, out);
        this.show(now, true, out);
        this
    }

    /// Takes up a lead that had ordered the stop before a restart.
    pub fn resume(
        now: Time,
        moving: &Moving,
        record: Record,
        status: Status,
        out: &mut Vec<Action>,
    ) -> Self {
        let member = |s: &Seat| Member {
            vm: s.vm,
            from: s.from,
            copy: s.copy,
            off: record.is_off(s.vm),
            candidates: vec![s.to],
            stand: None,
            heard: now,
            forgotten: false,
        };
        let members = moving.team.iter().map(member).collect();
        let status = Status { phase: Phase::Stopped, ..status };
        out.push(Action::Resolve("the lead's node restarted while the guests stood still".into()));
        let until = now.plus_ms(wait::DECISION_MS);
        let state = State::Stopping { until, stopped_by: until };
        let options = Options::default();
        let (started, say_at, shown_at) = (now, now, now);
        Self { status, record, options, members, state, started, say_at, shown_at }
    }

    /// Where each member goes, once that is known of all.
    fn team(&self) -> Option<Vec<Seat>> {
        let seat = |m: &Member| Some(Seat { vm: m.vm, from: m.from, to: m.to()?, copy: m.copy });
        self.members.iter().map(seat).collect()
    }

    /// The member whose destination proposes: the first one.
    fn proposer(&self) -> Option<Seat> {
        self.team()?.first().copied()
    }

    fn tell(&self, to: HostId, vm: VmId, body: Body) -> Action {
        Action::Tell(to, of_member(self.status.id, vm), vm, body)
    }

    /// Asks every member whose end is not known how it stands, or to begin.
    fn say(&mut self, now: Time, out: &mut Vec<Action>) {
        let again = match &self.state {
            State::Over => return,
            State::Stopping { .. } => wait::ASK_MS,
            State::Gathering { .. } | State::Settling { .. } => wait::LEAD_MS,
        };
        self.say_at = now.plus_ms(again);
        for stays in
            self.record.placement.iter().filter(|p| self.members.iter().all(|m| m.vm != p.vm))
        {
            out.push(self.tell(stays.host, stays.vm, Body::Moves));
        }
        let stopping =
            matches!(&self.state, State::Stopping { stopped_by, .. } if now < *stopped_by);
        let gathering = matches!(self.state, State::Gathering { .. });
        let stays = matches!(self.state, State::Settling { moved: false, .. });
        let proposer = self.proposer().filter(|_| stopping);
        let figures: Vec<_> = self.members.iter().map(Member::figures).collect();
        let shares = share::shares(&figures, self.options.bandwidth_bytes_per_s);
        let members = self.members.iter().zip(shares);
        for (m, share_bytes_per_s) in members.filter(|(m, _)| !m.is_over()) {
            let body = match (&m.stand, proposer) {
                (None, _) if gathering => Body::Order {
                    record: Box::new(self.record.clone()),
                    to: m.candidates.clone(),
                    options: self.options,
                },
                (Some(stand), Some(seat)) if stand.stopped_us.is_none() => {
                    Body::Stop(seat, self.record.epoch)
                }
                _ => Body::How { share_bytes_per_s },
            };
            out.push(self.tell(m.from, m.vm, body));
            // One that has not stopped does not hear of it otherwise if it starts from the decided record.
            if stays && m.runs_on() {
                out.push(self.tell(m.from, m.vm, Body::Cancel(self.status.cause.clone())));
            }
        }
    }

    /// The end is on disk before the hard state goes: a restart between the two ends it again.
    fn end(&mut self, phase: Phase, cause: String, out: &mut Vec<Action>) {
        self.state = State::Over;
        self.status.phase = phase;
        self.status.cause = clip(cause);
        if phase == Phase::Moved {
            (self.status.done_ppm, self.status.left_ms) = (1_000_000, Some(0));
        }
        out.push(Action::Report);
        out.push(Action::Forget);
    }

    /// Gives up before anybody was told to stop.
    fn give_up(&mut self, cause: String, out: &mut Vec<Action>) {
        for m in &self.members {
            out.push(self.tell(m.from, m.vm, Body::Cancel(clip(cause.clone()))));
        }
        self.end(Phase::Stayed, cause, out);
    }

    /// What the members' words lead to.
    fn look(&mut self, now: Time, out: &mut Vec<Action>) {
        let ended = |m: &&Member| m.is_over();
        let cause = self.members.iter().find(ended).map(|m| {
            let stand = m.stand.as_ref().map(|s| (&s.status.name, s.status.cause.as_str()));
            let (name, cause) = stand.map_or((None, ""), |(n, c)| (Some(n), c));
            let name = name.map_or_else(|| m.vm.to_string(), ToString::to_string);
            format!("{name}: {}", if m.forgotten { "its node restarted" } else { cause })
        });
        let all = |f: &dyn Fn(&Figures) -> bool| {
            let fresh = |m: &Member| now.ms_since(m.heard) <= wait::FRESH_MS;
            // One that has not heard of the newest record could not go on from it.
            let same = |m: &Member| m.base() == Some(self.record.epoch);
            let fits = |m: &Member| fresh(m) && same(m) && m.figures().is_some_and(|p| f(&p));
            self.members.iter().all(fits)
        };
        let (near, converged) = (all(&|f| f.near), all(&|f| f.converged));
        match (&mut self.state, cause) {
            (State::Gathering { .. }, Some(cause)) => self.give_up(cause, out),
            (State::Gathering { until, ballot, calm_by }, None) => {
                // What all have left crosses together: a little later it may be much less. If that time is not left, they
                // are stopped at once.
                let last = now.plus_ms(wait::CALM_MS);
                let by = converged.then(|| *calm_by.get_or_insert(last));
                let calm = share::is_calm(self.members.iter().filter_map(Member::figures));
                let may_stop = by.is_some_and(|by| calm || now >= by || last >= *until);
                match ballot.step(now, near, may_stop) {
                    Next::Ask => {
                        if let (Some(team), Some(seat)) = (self.team(), self.proposer()) {
                            out.push(self.tell(seat.to, seat.vm, Body::PrepareBallot(team)));
                        }
                    }
                    Next::Stop => self.stop(now, out),
                    Next::Wait => {}
                }
            }
            (State::Stopping { .. }, Some(cause)) => out.push(Action::Resolve(clip(cause))),
            (State::Settling { .. }, _) if self.members.iter().all(Member::is_over) => {
                self.finish(false, out);
            }
            _ => {}
        }
    }

    /// On disk first; then all are told.
    fn stop(&mut self, now: Time, out: &mut Vec<Action>) {
        let (Some(team), Some(seat)) = (self.team(), self.proposer()) else { return };
        out.push(Action::Persist(Moving {
            id: self.status.id,
            vm: self.status.vm,
            cluster: self.record.cluster,
            base: self.record.epoch,
            role: Role::Lead,
            peer: seat.to,
            requested_on: self.status.requested_on,
            copy: CopyId([0; 16]),
            started: false,
            team,
        }));
        let phase_ms = wait::STOP_PHASE_MS.saturating_add(self.options.max_downtime_ms);
        let (until, stopped_by) = (now.plus_ms(phase_ms), now.plus_ms(wait::STOPPED_MS));
        self.state = State::Stopping { until, stopped_by };
        self.status.phase = Phase::Stopped;
        self.say(now, out);
        self.show(now, true, out);
    }

    fn on_decided(&mut self, now: Time, record: &Record, out: &mut Vec<Action>) {
        if record.epoch <= self.record.epoch {
            return;
        }
        let cause = match &record.cause {
            Cause::Stay(why) => why.clone(),
            Cause::Move(_) => String::new(),
            other => format!("another change of the record was decided first: {other:?}"),
        };
        match &mut self.state {
            // NICs are connected otherwise: each source hears it, and all go on from there.
            State::Gathering { ballot, .. } if matches!(record.cause, Cause::Wires(_)) => {
                *ballot = Ballot::None;
                self.status.epoch_before = record.epoch;
                self.record = record.clone();
            }
            State::Gathering { .. } => self.give_up(cause, out),
            State::Stopping { .. } => {
                self.status.epoch_after = Some(record.epoch);
                let stays = |m: &Member| {
                    let same = |p: &Placement| p.copy == m.copy || m.off;
                    record.placement_of(m.vm).is_none_or(|p| same(p) && p.host == m.from)
                };
                let moved = !self.members.iter().all(stays);
                self.status.phase = if moved { Phase::Starting } else { Phase::Stopped };
                self.status.cause = if moved { String::new() } else { clip(cause) };
                // The members say it first.
                let until = now.plus_ms(wait::RUNNING_MS + wait::STOP_PHASE_MS);
                self.state = State::Settling { until, moved };
                self.say(now, out);
                self.show(now, true, out);
                self.look(now, out);
            }
            State::Settling { .. } | State::Over => {}
        }
    }

    /// Decided, and every member has ended, or was waited for long enough.
    fn finish(&mut self, late: bool, out: &mut Vec<Action>) {
        self.gather();
        let moved = matches!(self.state, State::Settling { moved: true, .. });
        let silent = |vm| late && moved && self.members.iter().any(|m| m.vm == vm && !m.is_over());
        let word = |m: &MemberStatus| match m.phase {
            Phase::Lost => Some(format!("{}: {}", m.name, m.cause)),
            _ if silent(m.vm) => Some(format!("{}: is not known to run", m.name)),
            _ => None,
        };
        let lost: BTreeSet<String> = self.status.members.iter().filter_map(word).collect();
        let (phase, cause) = match (lost.is_empty(), moved) {
            (false, _) => (Phase::Lost, lost.into_iter().collect::<Vec<_>>().join("; ")),
            (true, true) => (Phase::Moved, String::new()),
            (true, false) => (Phase::Stayed, self.status.cause.clone()),
        };
        self.end(phase, cause, out);
    }

    fn on_member(&mut self, now: Time, from: HostId, vm: VmId, body: Body, out: &mut Vec<Action>) {
        let Some(at) = self.members.iter().position(|m| m.vm == vm) else { return };
        let Some(member) = self.members.get_mut(at) else { return };
        let (source, to) = (from == member.from, Some(from) == member.to());
        match body {
            Body::Stand(stand) if source && stand.status.vm == vm => {
                // Words overtake each other; an end is an end.
                if !member.phase().is_end() {
                    member.stand = Some(*stand);
                }
                member.heard = now;
                self.show(now, false, out);
                self.look(now, out);
            }
            Body::Unknown if source && member.stand.is_some() => {
                member.forgotten = true;
                self.look(now, out);
            }
            Body::BallotReady if to => {
                if let State::Gathering { ballot, .. } = &mut self.state {
                    *ballot = Ballot::Ready(now);
                }
                self.look(now, out);
            }
            // It may not know yet who proposes.
            Body::Loaded(_) if to && matches!(self.state, State::Stopping { .. }) => {
                if let Some(seat) = self.proposer() {
                    out.push(self.tell(from, vm, Body::Proposer(seat)));
                }
            }
            _ => {}
        }
    }

    fn on_timer(&mut self, now: Time, out: &mut Vec<Action>) {
        let silent = |m: &Member| now.ms_since(m.heard) >= wait::LED_MS;
        match &mut self.state {
            State::Gathering { until, .. } if now >= *until => {
                self.give_up("deadline: the members did not converge together".into(), out);
            }
            State::Gathering { .. } if self.members.iter().any(silent) => {
                self.give_up("a member's host does not answer any more".into(), out);
            }
            State::Stopping { until, .. } if now >= *until => {
                *until = now.plus_ms(wait::DECISION_MS);
                out.push(Action::Resolve(
                    "no decision in time while the guests stood still".into(),
                ));
            }
            State::Stopping { stopped_by, .. } if now >= *stopped_by => {
                *stopped_by = Time(u64::MAX);
                if self.members.iter().any(Member::runs_on) {
                    out.push(Action::Resolve("not all members stopped in time".into()));
                }
            }
            State::Settling { until, .. } if now >= *until => {
                self.finish(true, out);
            }
            _ => {}
        }
        if now >= self.say_at {
            self.say(now, out);
            self.look(now, out);
        }
    }
}

impl Migration for Lead {
    fn status(&self) -> &Status {
        &self.status
    }

    fn handle(&mut self, now: Time, happened: Happened, out: &mut Vec<Action>) {
        match happened {
            Happened::Member(from, vm, body) => self.on_member(now, from, vm, body, out),
            Happened::Decided(record) => self.on_decided(now, &record, out),
            Happened::Abort if matches!(self.state, State::Gathering { .. }) => {
                self.give_up("aborted on request".into(), out);
            }
            Happened::Timer => self.on_timer(now, out),
            _ => {}
        }
    }

    fn timeout(&self) -> Option<Time> {
        match &self.state {
            State::Gathering { until, .. } | State::Settling { until, .. } => {
                Some(self.say_at.min(*until))
            }
            State::Stopping { until, stopped_by } => Some(self.say_at.min(*until).min(*stopped_by)),
            State::Over => None,
        }
    }

    fn is_over(&self) -> bool {
        self.state == State::Over
    }
}
