//! Migrations inside the core: who hears of what, and what their actions become.
//!
//! Owns the table of moves and of statuses. Decides nothing of a move itself.

use super::{Command, Core, Key, Move, Value};
use crate::id::{CopyId, Epoch, HostId, MigrationId, VmId};
use crate::limits;
use crate::migrate::destination::Destination;
use crate::migrate::lead::Lead;
use crate::migrate::source::{Begin, Source};
use crate::migrate::{self, Action, Effect, Happened, Migration as _, Moving, Role};
use crate::time::Time;
use crate::wire::control::Control;
use crate::wire::migrate::{Body, Message, Phase, Status};
use crate::wire::record::{Cause, Record};

/// How long the ballot of a move may be driven, milliseconds.
const BALLOT_MS: u64 = 30_000;
/// Ended migrations that are remembered.
const REMEMBERED: usize = 256;
/// Longest timeline that another node may tell.
const MOMENTS: usize = 256;

impl Core {
    /// Starts a migration of a VM that this host runs. The same id asked twice starts once.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn request(&mut self, now: Time, begin: Begin) -> Result<(), String> {
        let (id, vm) = (begin.status.id, begin.status.vm);
        if self.moves.contains_key(&id) || self.statuses.contains_key(&id) {
            return Ok(());
        }
        let name = &begin.status.name;
        if self.moves.len() >= limits::MOVES {
            return Err("this host takes part in too many migrations: ask again".into());
        }
        let here = self.copy_here(&begin.record, vm) == Some(begin.copy);
        if !here || self.record_of(vm) != Some(&begin.record) {
            return Err(format!("{name} does not run on this host any more: ask again"));
        }
        if self.is_moving(vm) {
            return Err(format!(
                "{name} is moving already: wait for it (godwit migrations) or abort it"
            ));
        }
        if !begin.record.is_lone() {
            let cluster = &begin.record.name;
            return Err(format!(
                "{name} belongs to {cluster}, which moves as one: godwit migrate {cluster}, with \
                 --place {name}=HOST if nothing else shall move"
            ));
        }
        if begin.record.is_closed() {
            return Err(format!("{name} is joining a cluster just now: ask again"));
        }
        if self.epochs.attempting(begin.record.cluster).is_some() {
            return Err(format!("the record of {name} is being changed just now: ask again"));
        }
        self.persist_status(&begin.status);
        let mut out = Vec::new();
        let source = Source::begin(now, begin, &mut out);
        self.moves.insert(id, Move::Source(Box::new(source)));
        self.perform(now, id, out);
        self.drain(now);
        Ok(())
    }

    /// Gives a migration up if its guest has not been stopped.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn abort(&mut self, now: Time, id: MigrationId) -> Result<(), String> {
        let Some(m) = self.moves.get(&id) else {
            return Err(match self.statuses.get(&id) {
                Some(s) if s.phase.is_end() => {
                    format!("migration {id} is over: see godwit migrations show {id}")
                }
                _ => format!("migration {id} is not under way on this host: see godwit migrations"),
            });
        };
        if !matches!(m.status().phase, Phase::Preparing | Phase::Transfer) {
            return Err("too late to abort: the guest was stopped, the epoch decides".to_owned());
        }
        self.happened(now, id, Happened::Abort);
        Ok(())
    }

    /// Something happened to a migration of this host.
    pub fn happened(&mut self, now: Time, id: MigrationId, happened: Happened) {
        let mut out = Vec::new();
        if let Some(m) = self.moves.get_mut(&id) {
            m.get_mut().handle(now, happened, &mut out);
        }
        self.perform(now, id, out);
        self.drain(now);
    }

    /// Whether a copy of `vm` runs here already and only waits for its source to be released.
    #[must_use]
    pub fn is_releasing(&self, vm: VmId) -> bool {
        let me = Some(self.me.host);
        let here = |m: &Move| m.status().to == me && m.status().phase == Phase::Releasing;
        self.moves.values().any(|m| m.status().vm == vm && here(m))
    }

    /// Whether a migration of `vm` is under way here.
    #[must_use]
    pub fn is_moving(&self, vm: VmId) -> bool {
        self.migration_of(vm).is_some()
    }

    pub(super) fn said(&mut self, now: Time, from: HostId, message: Message) {
        let Message { id, vm, base, body } = message;
        if let (Body::Rebase(record), Some(Move::Destination(m))) = (&body, self.moves.get(&id))
            && m.status().from == from
            && record.placement_of(vm).is_some_and(|p| p.host == from)
            && record.is_well_formed()
        {
            self.epochs.learned(now, (**record).clone());
            self.drain(now);
        }
        match self.moves.get(&id) {
            Some(Move::Lead(_)) => return self.happened(now, id, Happened::Member(from, vm, body)),
            Some(_) => return self.happened(now, id, Happened::Said(from, body)),
            None => {}
        }
        let answer = match body {
            body @ Body::Prepare { .. } => match self.receive(now, from, (id, vm, base), body) {
                Ok(()) => return,
                Err(cause) => Body::Refused(cause),
            },
            Body::Order { .. } | Body::How { .. } | Body::Stand(_) | Body::Moves => {
                return self.said_of_cluster(now, from, Message { id, vm, base, body });
            }
            Body::Where => self.stands(from, id, vm, base),
            // The source of a move that is over: the other end may stop telling.
            Body::Running { .. } | Body::Lost(_) => Body::Released,
            _ => return,
        };
        self.tell(from, Message { id, vm, base, body: answer });
    }

    /// Sends; what is for this host itself is heard when everything before it is done.
    pub(super) fn tell(&mut self, to: HostId, message: Message) {
        if to == self.me.host {
            self.inbox.push_back(message);
        } else {
            self.out.push_back(Command::Send(to, Control::Migrate(message)));
        }
    }

    /// The newest record, if that is this one, or if a move of `vm` that starts from this one goes on from that: NICs are
    /// connected otherwise.
    pub(super) fn goes_on_from(&self, record: &Record, vm: VmId) -> Option<Record> {
        let newest = self.epochs.newest(record.cluster)?;
        (newest == record || newest.only_rewires(record, vm)).then(|| newest.clone())
    }

    /// Where a migration stands that is not under way here (any more).
    fn stands(&self, from: HostId, id: MigrationId, vm: VmId, base: Epoch) -> Body {
        let placed = |r: &Record| r.placement_of(vm).map(|p| p.copy);
        let newest = self.record_of(vm).filter(|r| r.epoch > base);
        let ended = self.statuses.get(&id).filter(|s| s.from == from && s.to == Some(self.me.host));
        match ended.map(|s| s.phase) {
            Some(Phase::Lost) => return Body::Lost(ended.map_or("", |s| &s.cause).to_owned()),
            Some(Phase::Moved) => {
                let copy = newest.and_then(placed).unwrap_or(CopyId([0; 16]));
                return Body::Running { copy, resumed_us: 0 };
            }
            _ => {}
        }
        // So long ago that it is forgotten; the VM is here, under a later record.
        match newest.and_then(|r| self.copy_here(r, vm)) {
            Some(copy) => Body::Running { copy, resumed_us: 0 },
            None => Body::Unknown,
        }
    }

    fn receive(
        &mut self,
        now: Time,
        from: HostId,
        (id, vm, base): (MigrationId, VmId, Epoch),
        prepare: Body,
    ) -> Result<(), String> {
        let Body::Prepare { record, spec, options: _, requested_on, led } = prepare else {
            return Ok(());
        };
        let record = *record;
        if let Some(over) = self.statuses.get(&id).filter(|s| s.phase.is_end()) {
            // A late copy of the question, or the answer was lost.
            return Err(over.cause.clone());
        }
        if record.epoch != base || record.is_closed() {
            return Err("the source's record is of something else: ask again".to_owned());
        }
        if !record.is_well_formed() || record.placement_of(vm).is_none_or(|p| p.host != from) {
            return Err("the source's record does not name it: ask again".to_owned());
        }
        if self.moves.len() >= limits::MOVES {
            return Err("the destination takes part in too many migrations".to_owned());
        }
        self.epochs.learned(now, record.clone());
        let newest = self.goes_on_from(&record, vm);
        let record = newest.ok_or("a newer record of this VM is decided: ask again")?;
        if let Some(earlier) = self.migration_of(vm) {
            // A source that asks anew knows nothing of what it began before: it was restarted.
            self.happened(now, earlier, Happened::Said(from, Body::Unknown));
            if self.is_moving(vm) {
                return Err("the destination is in another migration of this VM".to_owned());
            }
            // What that one received is put away first: the source asks again in a moment.
            return Ok(());
        }
        let status = blank(id, vm, &record, from, requested_on);
        let mut out = Vec::new();
        let status = Status { to: Some(self.me.host), ..status };
        let destination = Destination::begin(now, self.me, status, record, spec, led, &mut out);
        self.moves.insert(id, Move::Destination(Box::new(destination)));
        self.perform(now, id, out);
        Ok(())
    }

    /// Tells the moves that a decided record concerns. Who left a cluster hears the record of its own.
    pub(super) fn tell_moves(&mut self, now: Time, record: &Record) {
        let concerned = |s: &Status| record.placement_of(s.vm).is_some() || record.cluster == s.vm;
        self.tell_all(now, &Happened::Decided(record.clone()), concerned);
    }

    /// Tells the moves of a cluster that its ballot is prepared.
    pub(super) fn tell_ballot(&mut self, now: Time, cluster: VmId) {
        self.tell_all(now, &Happened::BallotReady, |s| s.cluster == cluster);
    }

    fn tell_all(&mut self, now: Time, happened: &Happened, concerned: impl Fn(&Status) -> bool) {
        let ids = self.moves.iter().filter(|(_, m)| concerned(m.status()));
        for id in ids.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.happened(now, id, happened.clone());
        }
    }

    pub(super) fn take_up(&mut self, now: Time, moving: &Moving, present: bool) {
        let Some(record) = self.epochs.newest(moving.cluster).cloned() else { return };
        let peer = moving.peer;
        let from = if moving.role == Role::Destination { peer } else { self.me.host };
        // What the end is bound to; the newest record may already be the decision.
        let base = Record { epoch: moving.base, ..record.clone() };
        let status = self
            .statuses
            .get(&moving.id)
            .cloned()
            .unwrap_or_else(|| blank(moving.id, moving.vm, &base, from, moving.requested_on));
        let mut out = Vec::new();
        let m = match moving.role {
            Role::Lead => Move::Lead(Box::new(Lead::resume(now, moving, base, status, &mut out))),
            Role::Source => {
                Move::Source(Box::new(Source::resume(now, moving, base, status, &mut out)))
            }
            Role::Destination => {
                let me = self.me;
                let d = Destination::resume(now, me, moving, base, status, present, &mut out);
                Move::Destination(Box::new(d))
            }
        };
        self.moves.insert(moving.id, m);
        if record.epoch > moving.base {
            // Who left the cluster since has a record of its own, which may not be known here yet.
            let record = self.record_of(moving.vm).filter(|r| r.epoch > moving.base).cloned();
            let names = |r: &Record| r.names(moving.vm, self.me.host, moving.copy);
            let may_run = record.as_ref().is_none_or(names);
            out.retain(|a| match a {
                Action::Resolve(_) => record.is_none(),
                Action::Effect(Effect::Rebuild(_)) => may_run,
                _ => true,
            });
            self.perform(now, moving.id, out);
            if let Some(record) = record {
                self.happened(now, moving.id, Happened::Decided(record));
            }
        } else {
            self.perform(now, moving.id, out);
        }
    }

    /// Migrations that were not bound when this node went down ended with it: the guest ran on.
    pub(super) fn close_unbound(&mut self) {
        let open: Vec<Status> = self
            .statuses
            .values()
            .filter(|s| !s.phase.is_end() && !self.moves.contains_key(&s.id))
            .filter(|s| s.from == self.me.host || s.to == Some(self.me.host))
            .cloned()
            .collect();
        for status in open {
            let cause = "the node restarted during the transfer".to_owned();
            let ended = Status { phase: Phase::Stayed, cause, ..status };
            self.publish(ended);
        }
    }

    /// Another node's word on a migration; an end that is known is never taken back.
    pub(super) fn note(&mut self, status: Status) {
        let known = self.statuses.get(&status.id);
        if known.is_some_and(|k| k.phase.is_end() && !status.phase.is_end()) {
            return;
        }
        if known.is_some_and(|k| status.is_blind_to(k)) {
            return;
        }
        // One migration has one source, and texts have bounds.
        let other = known.is_some_and(|k| (k.from, k.vm) != (status.from, status.vm));
        let long = status.cause.len() > limits::TEXT_BYTES || status.timeline.len() > MOMENTS;
        // What this host should know best and does not (its store is new): nothing of it will go on.
        let forgotten = status.from == self.me.host && !status.phase.is_end();
        if self.moves.contains_key(&status.id) || other || long || forgotten {
            return;
        }
        self.remember(status.clone());
        self.out.push_back(Command::Status(Box::new(status)));
    }

    fn remember(&mut self, status: Status) {
        if !self.statuses.contains_key(&status.id) {
            self.order.push_back(status.id);
        }
        self.statuses.insert(status.id, status);
        while self.statuses.len() > REMEMBERED {
            // The longest known that has ended, else (another node's word) any that is not ours.
            let ended = |id: &MigrationId| self.statuses.get(id).is_none_or(|s| s.phase.is_end());
            let free = |id: &MigrationId| !self.moves.contains_key(id);
            let Some(at) = self
                .order
                .iter()
                .position(|id| free(id) && ended(id))
                .or_else(|| self.order.iter().position(free))
            else {
                return;
            };
            let Some(id) = self.order.remove(at) else { return };
            self.statuses.remove(&id);
            self.out.push_back(Command::Persist(Key::Status(id), None));
        }
    }

    /// Shows a status here, and to the node that took the request.
    fn publish(&mut self, status: Status) {
        let ended = status.phase.is_end();
        if ended {
            self.persist_status(&status);
        }
        let to = status.requested_on;
        // A destination that gave up unbound is not the end: the source may try another host.
        let source_decides = status.from != self.me.host && status.is_for_the_source_to_tell();
        if source_decides && to == self.me.host {
            return;
        }
        self.remember(status.clone());
        if to != self.me.host && !source_decides {
            self.out.push_back(Command::Send(to, Control::Progress(Box::new(status.clone()))));
        }
        self.out.push_back(Command::Status(Box::new(status)));
    }

    pub(super) fn perform(&mut self, now: Time, id: MigrationId, actions: Vec<Action>) {
        let Some(m) = self.moves.get(&id) else { return };
        let (status, over) = (m.status().clone(), m.get().is_over());
        let (vm, cluster) = (status.vm, status.cluster);
        for action in actions {
            match action {
                Action::Persist(moving) => {
                    // What was measured so far outlives the node, too.
                    self.persist_status(&status);
                    let value = Value::Moving(moving);
                    self.out.push_back(Command::Persist(Key::Moving(id), Some(value)));
                }
                Action::Forget => self.out.push_back(Command::Persist(Key::Moving(id), None)),
                Action::Send(to, body) => {
                    let base = status.epoch_before;
                    self.tell(to, Message { id, vm, base, body });
                }
                Action::Tell(to, id, vm, body) => {
                    let base = status.epoch_before;
                    self.tell(to, Message { id, vm, base, body });
                }
                Action::PrepareBallot => {
                    if self.epochs.is_prepared(cluster) {
                        // The answer was lost.
                        self.happened(now, id, Happened::BallotReady);
                    } else {
                        // Refused only for a cluster without a record: the source asks again.
                        let _ = self.epochs.prepare(now, cluster, now.plus_ms(BALLOT_MS));
                    }
                }
                Action::Propose(record) => {
                    let _ = self.epochs.propose(now, record, now.plus_ms(BALLOT_MS));
                }
                Action::Resolve(why) => self.resolve(now, id, &status, why),
                Action::Effect(effect) => self.out.push_back(Command::Effect { id, vm, effect }),
                Action::Report => self.publish(status.clone()),
            }
        }
        if over {
            self.moves.remove(&id);
        }
    }

    /// Drives the epoch after `base` to a decision; if it is decided, says so. Asked again, it goes
    /// on as it was: another cause would be another record, and need another ballot.
    fn resolve(&mut self, now: Time, id: MigrationId, status: &Status, why: String) {
        let (vm, cluster, base) = (status.vm, status.cluster, status.epoch_before);
        let Some(record) = self.epochs.newest(cluster).cloned() else { return };
        if record.epoch > base {
            let own = [Some(&record), self.epochs.newest(vm)].into_iter().flatten();
            let tells = |r: &&Record| r.placement_of(vm).is_some() || r.cluster == vm;
            let own = own.filter(|r| r.epoch > base).find(tells);
            return match own.cloned() {
                Some(record) => self.happened(now, id, Happened::Decided(record)),
                // It has left the cluster, with a record that this host missed.
                None => self.epochs.inquire(now, cluster, vm),
            };
        }
        if self.epochs.is_resolving(cluster) {
            return;
        }
        let cause = Cause::Stay(migrate::clip(why));
        let stay = Record { epoch: record.epoch.next(), cause, ..record };
        // Refused only if the epoch was decided meanwhile, which is told by `Decided`.
        let _ = self.epochs.resolve(now, stay);
    }
}

/// A status of which nothing is known but who and what.
pub(super) fn blank(
    id: MigrationId,
    vm: VmId,
    record: &Record,
    from: HostId,
    requested_on: HostId,
) -> Status {
    let name = record.placement_of(vm).map_or(&record.name, |p| &p.name).clone();
    Status::new(id, vm, name, from, requested_on, record)
}
