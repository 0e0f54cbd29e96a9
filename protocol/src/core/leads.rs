//! Migrations of clusters inside the core: who leads, and which sources are asked.
//!
//! Owns the checks before a lead or a member begins. Decides nothing of a move itself.

use super::moves::blank;
use super::{Core, Move};
use crate::id::{HostId, VmId};
use crate::limits;
use crate::migrate::lead::{Begin, Lead};
use crate::migrate::source::{Ordered, Source};
use crate::migrate::wait;
use crate::time::Time;
use crate::wire::migrate::{Body, Led, Message, Phase, Stand, Status, of_member};
use crate::wire::record::Record;

impl Core {
    /// Starts a migration of a cluster that this host leads. The same id asked twice starts once.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn request_cluster(&mut self, now: Time, begin: Begin) -> Result<(), String> {
        let id = begin.status.id;
        if self.moves.contains_key(&id) || self.statuses.contains_key(&id) {
            return Ok(());
        }
        let (record, name) = (&begin.record, &begin.record.name);
        let cluster = record.cluster;
        if self.epochs.newest(cluster) != Some(record) || record.is_closed() {
            return Err(format!("the record of {name} has changed: ask again"));
        }
        if record.placement.first().is_none_or(|p| p.host != self.me.host) {
            return Err(format!("{name} is led by another host: ask there"));
        }
        let places = |vm, to: &Vec<HostId>| {
            record.placement_of(vm).is_some_and(|p| !to.is_empty() && !to.contains(&p.host))
        };
        if begin.members.is_empty() || !begin.members.iter().all(|(vm, to)| places(*vm, to)) {
            return Err(format!("no host to move to for a member of {name}"));
        }
        if self.is_cluster_moving(cluster) || self.epochs.attempting(cluster).is_some() {
            return Err(format!(
                "{name} is moving already, or its record is being changed: see godwit migrations"
            ));
        }
        if self.moves.len() >= limits::MOVES {
            return Err("this host takes part in too many migrations: ask again".into());
        }
        self.persist_status(&begin.status);
        let mut out = Vec::new();
        let lead = Lead::begin(now, begin, &mut out);
        self.moves.insert(id, Move::Lead(Box::new(lead)));
        self.perform(now, id, out);
        self.drain(now);
        Ok(())
    }

    /// A message about a cluster's migration that nobody here is at (any more).
    pub(super) fn said_of_cluster(&mut self, now: Time, from: HostId, message: Message) {
        let Message { id, vm, base, body } = message;
        // From the member's id to the cluster's, and back.
        let other = of_member(id, vm);
        let answer = match body {
            Body::Moves => return self.others_move(now, from, vm),
            Body::Stand(stand) if stand.status.phase.is_end() => return,
            Body::Stand(_) => Body::NoLead,
            body => {
                let known = self.statuses.get(&id).filter(|s| s.phase.is_end());
                let known = known.filter(|s| s.from == self.me.host).cloned();
                match (known, body) {
                    (Some(status), _) => ended(status),
                    (None, body @ Body::Order { .. }) => {
                        match self.ordered(now, from, Message { id, vm, base, body }) {
                            Ok(()) => return,
                            Err(status) => ended(*status),
                        }
                    }
                    (None, _) => Body::Unknown,
                }
            }
        };
        self.tell(from, Message { id: other, vm, base, body: answer });
    }

    /// The lead of a cluster says that others of it move than this member.
    fn others_move(&mut self, now: Time, from: HostId, vm: VmId) {
        let leads = |r: &&Record| r.placement.first().is_some_and(|p| p.host == from);
        if let Some(cluster) = self.record_of(vm).filter(leads).map(|r| r.cluster) {
            self.led.insert(cluster, now.plus_ms(wait::FRESH_MS));
        }
    }

    /// Whether a migration of that cluster is under way here, or elsewhere by its lead's word.
    pub(super) fn is_led(&self, now: Time, cluster: VmId) -> bool {
        self.is_cluster_moving(cluster) || self.led.get(&cluster).is_some_and(|until| now < *until)
    }

    /// A lead asks this host to move a member.
    fn ordered(&mut self, now: Time, from: HostId, message: Message) -> Result<(), Box<Status>> {
        let Message { id, vm, base, body } = message;
        let Body::Order { record, to, options } = body else { return Ok(()) };
        let me = self.me.host;
        let status = blank(id, vm, &record, me, me);
        let refused = |cause: &str| {
            let cause = cause.to_owned();
            Err(Box::new(Status { phase: Phase::Stayed, cause, ..status.clone() }))
        };
        let leads = record.placement.first().is_some_and(|p| p.host == from);
        if !leads || record.epoch != base || record.is_closed() || !record.is_well_formed() {
            return refused("the lead's record is of something else: ask again");
        }
        self.epochs.learned(now, (*record).clone());
        let start = self.goes_on_from(&record, vm);
        let Some((record, copy)) = start.and_then(|r| self.copy_here(&r, vm).map(|copy| (r, copy)))
        else {
            return refused("it does not run on this host any more: ask again");
        };
        let status = blank(id, vm, &record, me, me);
        if self.is_moving(vm) || to.is_empty() || self.moves.len() >= limits::MOVES {
            return refused("it is moving already: wait for it (godwit migrations) or abort it");
        }
        self.persist_status(&status);
        let led = Led { id: of_member(id, vm), host: from };
        let ordered = Ordered { status, record, copy, options, candidates: to, led };
        let mut out = Vec::new();
        let source = Source::ordered(now, ordered, &mut out);
        self.moves.insert(id, Move::Source(Box::new(source)));
        self.perform(now, id, out);
        Ok(())
    }
}

/// What a lead is told of a member whose migration is over.
fn ended(status: Status) -> Body {
    let (figures, stopped_us, resumed_us) = (None, None, None);
    Body::Stand(Box::new(Stand { status, figures, stopped_us, resumed_us }))
}
