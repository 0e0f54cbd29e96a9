//! Tells a decision to everyone whom it concerns, until they say that they know it.
//!
//! Owns the list of those who have not answered. Best effort: the list is not durable, and a node
//! that was missed learns the record from the first voter that it asks.

use std::collections::BTreeSet;

use super::Epochs;
use crate::id::{Epoch, HostId, VmId};
use crate::time::Time;
use crate::wire::epoch::{Body, Message};
use crate::wire::record::Record;

/// First pause before a decision is told again, ms; doubles up to [`AGAIN_MAX_MS`].
const AGAIN_MS: u64 = 400;
const AGAIN_MAX_MS: u64 = 30_000;
/// How often a decision is told to a host that does not answer (about ten minutes in all).
const TIMES: u32 = 26;

#[derive(Debug, Clone)]
pub(super) struct Announcement {
    pub(super) next: Time,
    times: u32,
    to: BTreeSet<HostId>,
}

impl Epochs {
    /// Tells `record` to the voters and hosts that it or its base names. The messages leave with
    /// [`Epochs::retarget`], once the record is durable here.
    pub(super) fn announce(&mut self, now: Time, base: Option<&Record>, record: &Record) {
        let me = self.me.host;
        let known = self.announcements.remove(&record.cluster);
        let concerned = base.into_iter().chain([record]).flat_map(named);
        let missed = known.into_iter().flat_map(|a| a.to);
        let to = concerned.chain(missed).filter(|h| *h != me).collect();
        let announcement = Announcement { next: now, times: 0, to };
        self.announcements.insert(record.cluster, announcement);
    }

    /// Asks everyone whom the newest known record names for a newer one: a node that was away (a
    /// restart, a cut) does this first. An answer is an [`super::Output::Decided`]; silence says
    /// nothing.
    pub fn refresh(&mut self, cluster: VmId) {
        let Some(record) = self.newest(cluster) else { return };
        let epoch = record.epoch;
        let me = self.me.host;
        for host in named(record).filter(|h| *h != me).collect::<BTreeSet<_>>() {
            self.send(host, Message { cluster, epoch, body: Body::Query });
        }
    }

    /// Asks everyone whom the newest record of `cluster` names for the newest record of `vm`.
    pub fn inquire(&mut self, now: Time, cluster: VmId, vm: VmId) {
        let Some(record) = self.newest(cluster) else { return };
        let me = self.me.host;
        for host in named(record).filter(|h| *h != me).collect::<BTreeSet<_>>() {
            self.query(now, vm, host);
        }
    }

    /// A newer record was learned while an older one is being told: those who have not answered
    /// are told the newer one.
    pub(super) fn retarget(&mut self, now: Time, record: &Record) {
        if let Some(announcement) = self.announcements.get_mut(&record.cluster) {
            announcement.times = 0;
            self.announce_again(now, record.cluster);
        }
    }

    pub(super) fn announce_again(&mut self, now: Time, cluster: VmId) {
        let (Some(told), Some(hard)) =
            (self.announcements.get_mut(&cluster), self.hard.get(&cluster))
        else {
            self.announcements.remove(&cluster);
            return;
        };
        if told.to.is_empty() || told.times >= TIMES {
            self.announcements.remove(&cluster);
            return;
        }
        told.next = now.plus_ms((AGAIN_MS << told.times).min(AGAIN_MAX_MS));
        told.times += 1;
        let record = hard.decided().clone();
        let to: Vec<HostId> = told.to.iter().copied().collect();
        for host in to {
            let body = Body::Decided(record.clone());
            self.send(host, Message { cluster, epoch: record.epoch, body });
        }
    }

    /// Somebody says that a record is decided: believe it if it is newer, and say what is held.
    pub(super) fn told(&mut self, now: Time, from: HostId, cluster: VmId, record: Record) {
        if record.cluster != cluster {
            return;
        }
        self.learn(now, record);
        if let Some(epoch) = self.newest(cluster).map(|r| r.epoch) {
            self.send(from, Message { cluster, epoch, body: Body::Known(epoch) });
        }
    }

    pub(super) fn known(&mut self, cluster: VmId, from: HostId, known: Epoch) {
        let Some(newest) = self.newest(cluster).map(|r| r.epoch) else { return };
        let Some(announcement) = self.announcements.get_mut(&cluster) else { return };
        if known >= newest {
            announcement.to.remove(&from);
        }
        if announcement.to.is_empty() {
            self.announcements.remove(&cluster);
        }
    }
}

fn named(record: &Record) -> impl Iterator<Item = HostId> {
    let voters = record.voters.iter().map(|v| v.host);
    voters.chain(record.placement.iter().map(|p| p.host))
}
