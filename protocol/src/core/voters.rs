//! Who votes: the host of a cluster's first VM tops its voters up to three, or five where there are
//! three sites, spreads them over sites, and replaces those that are dead or will leave.
//!
//! Owns the choice. Each change is one ordinary decree, and none is begun while another change is
//! under way; membership is a hint for whom to ask.

use std::collections::BTreeSet;

use super::Core;
use crate::id::{HostId, Name, VmId};
use crate::time::Time;
use crate::wire::record::{Cause, Placement, Record, Voter};

/// How often the lead looks at its clusters' voters, milliseconds.
pub(super) const EVERY_MS: u64 = 1_000;
/// How long a proposal outside a move is driven, milliseconds.
pub(super) const PROPOSE_MS: u64 = 10_000;
/// A host that is down for so long is replaced as a voter, milliseconds: restarts take less.
const DEAD_MS: u64 = 60_000;
/// How many voters a cluster has as soon as there are hosts enough.
const WANTED: usize = 3;
/// How many where they can be spread over [`SITES`].
const WANTED_FAR: usize = 5;
const SITES: usize = 3;

impl Core {
    /// Proposes better voters for each record that this host looks after and that is not changing.
    pub(super) fn look_after_voters(&mut self, now: Time) {
        let mine = |r: &&Record| !r.is_closed() && self.looks_after(now, r);
        let records: Vec<Record> = self.epochs.records().filter(mine).cloned().collect();
        for record in records {
            let cluster = record.cluster;
            if self.is_cluster_moving(cluster) || self.epochs.attempting(cluster).is_some() {
                continue;
            }
            // A lone VM whose QEMU is gone waits for the operator.
            if record.is_lone() && !self.runs_lone(&record) {
                continue;
            }
            if let Some(voters) = self.better_voters(now, &record) {
                let next =
                    Record { epoch: record.epoch.next(), voters, cause: Cause::Voters, ..record };
                // Refused only if another change is under way: the next look will see it.
                let _ = self.epochs.propose(now, next, now.plus_ms(PROPOSE_MS));
            }
        }
    }

    /// This host will leave (it is drained, or about to be revoked), or stays after all: others see to
    /// it that it does not vote.
    pub fn leaving(&mut self, now: Time, leaving: bool) {
        self.leaving = leaving;
        for host in self.peers.keys().copied().collect::<Vec<_>>() {
            self.tell_voter(host);
        }
        self.voters_at = now;
    }

    /// That host is about to be revoked: it shall not vote any more.
    pub fn unfit(&mut self, now: Time, host: HostId) {
        if self.unfit.len() < crate::limits::MEMBERS {
            self.unfit.insert(host);
        }
        self.voters_at = now;
    }

    /// That host is not revoked after all.
    pub fn fit_again(&mut self, now: Time, host: HostId) {
        self.unfit.remove(&host);
        self.voters_at = now;
    }

    /// The records on which that host votes, by the newest of each that is known here.
    pub fn voted_by(&self, host: HostId) -> impl Iterator<Item = &Record> {
        let votes = move |r: &&Record| !r.is_closed() && r.voters.iter().any(|v| v.host == host);
        self.epochs.records().filter(votes)
    }

    /// Whether this host looks after a record's voters.
    #[must_use]
    pub fn looks_after(&self, now: Time, record: &Record) -> bool {
        self.leader(now, record) == Some(self.me.host)
    }

    fn runs_lone(&self, record: &Record) -> bool {
        let placed = record.placement.first();
        let sees_to_it =
            |p: &Placement| p.off || p.host != self.me.host || self.runs_here(p.vm, record);
        placed.is_some_and(sees_to_it)
    }

    pub(super) fn runs_here(&self, vm: VmId, record: &Record) -> bool {
        self.local.get(&vm).is_some_and(|l| record.names(vm, self.me.host, l.copy))
    }

    /// Whether a host has been down for long.
    pub(super) fn is_dead(&self, now: Time, host: HostId) -> bool {
        if host == self.me.host || self.up.contains(&host) {
            return false;
        }
        let since = self.down.get(&host).copied().unwrap_or(self.started);
        now.ms_since(since) >= DEAD_MS
    }

    /// Whether a voter should be another one: it leaves, is dead, or lost its store.
    fn is_bad(&self, now: Time, voter: Voter) -> bool {
        let host = voter.host;
        let known = self.peers.get(&host).copied().flatten();
        let leaves = if host == self.me.host {
            self.leaving
        } else {
            known.is_some_and(|(_, leaving)| leaving)
        };
        let other = known.is_some_and(|(v, _)| v != voter);
        leaves || other || self.unfit.contains(&host) || self.is_dead(now, host)
    }

    /// Who could vote: this host and those that are up and say so.
    fn fit(&self, now: Time) -> Vec<Voter> {
        let peers = self.peers.iter().filter(|(host, _)| self.up.contains(host));
        let peers = peers.filter_map(|(_, known)| known.map(|(voter, _)| voter));
        peers.chain([self.me]).filter(|v| !self.is_bad(now, *v)).collect()
    }

    /// The voters that the next record should name; none: those there are will do. A bad one is
    /// replaced, else, and if nobody can take its place, one that leaves is dropped.
    pub(super) fn better_voters(&self, now: Time, record: &Record) -> Option<Vec<Voter>> {
        let fit = self.fit(now);
        let (bad, good): (Vec<Voter>, Vec<Voter>) =
            record.voters.iter().copied().partition(|v| self.is_bad(now, *v));
        let sites: BTreeSet<_> = fit.iter().chain(&good).map(|v| self.site_of(v.host)).collect();
        let wanted = if sites.len() >= SITES { WANTED_FAR } else { WANTED };
        let mut voters = good.clone();
        let most = wanted.max(record.voters.len());
        while voters.len() < most
            && let Some(next) = self.next_voter(&fit, &voters)
        {
            voters.push(next);
        }
        let gone = |v: &Voter| self.is_dead(now, v.host);
        // One that is dead and has no successor may come back: without it the others are no safer.
        let stay = bad.iter().filter(|v| gone(v)).copied();
        let room = record.voters.len().saturating_sub(voters.len());
        voters.extend(stay.take(room));
        // An even number bears no more losses than one less, and needs more answers.
        if voters.len() % 2 == 0 && voters.len() > record.voters.len() {
            voters.pop();
        }
        let same = |a: &[Voter], b: &[Voter]| {
            a.iter().collect::<BTreeSet<_>>() == b.iter().collect::<BTreeSet<_>>()
        };
        (!voters.is_empty() && !same(&voters, &record.voters)).then_some(voters)
    }

    /// The fit host whose site has the fewest voters.
    fn next_voter(&self, fit: &[Voter], voters: &[Voter]) -> Option<Voter> {
        let taken: Vec<_> = voters.iter().map(|v| self.site_of(v.host)).collect();
        let fresh = fit.iter().filter(|f| voters.iter().all(|v| v.host != f.host));
        let crowd = |v: &Voter| taken.iter().filter(|s| **s == self.site_of(v.host)).count();
        fresh.min_by_key(|v| (crowd(v), v.host)).copied()
    }

    fn site_of(&self, host: HostId) -> Option<Name> {
        if host == self.me.host {
            return Some(self.site.clone());
        }
        self.membership.members().find(|v| v.host == host).and_then(|v| v.site)
    }
}
