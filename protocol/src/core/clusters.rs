//! Virtual clusters: which record governs a VM, and how VMs join and leave.
//!
//! Owns the index of VMs to clusters and the steps of a VM from its own record into a cluster's. Each
//! step is one decree; whoever runs the VM finishes what was begun, across restarts. Invariant: of
//! all records that place a VM, the one with the highest epoch governs it.
//!
//! ```text
//!   own record n --Joined(C)--> n+1 (closed, runs on) ........ left C at x: Left(C), x+1 --> ...
//!                                  \                          /
//!   record of C  m ----------------- Add above n+1 --- ... - Release x --- ...
//! ```

use std::collections::BTreeSet;

use super::Core;
use super::voters::PROPOSE_MS;
use crate::epoch::ProposeError;
use crate::id::{CopyId, Epoch, HostId, Name, VmId};
use crate::limits::{CLUSTER_VMS, DEPARTED};
use crate::migrate;
use crate::time::Time;
use crate::wire::record::{Cause, Placement, Record};
use crate::wire::route::{Kind, Route};

impl Core {
    /// The record under which `vm` runs: its cluster's, or its own. A newer one may have been decided.
    #[must_use]
    pub fn record_of(&self, vm: VmId) -> Option<&Record> {
        let cluster = self.clusters.get(&vm).copied().unwrap_or(vm);
        let places = |r: &&Record| r.placement_of(vm).is_some();
        self.epochs.newest(cluster).filter(places).or_else(|| self.epochs.newest(vm))
    }

    /// The newest known records of clusters that are no lone VM's, tombstones excluded.
    pub fn clusters(&self) -> impl Iterator<Item = &Record> {
        self.epochs.records().filter(|r| is_cluster(r) && !r.is_closed())
    }

    /// The first record of a cluster without members. `cluster` is fresh: an id that is used for a
    /// second first record is nobody's fault but the caller's.
    ///
    /// # Errors
    /// See [`crate::epoch::Epochs::create`]; nothing changed.
    pub fn create_cluster(
        &mut self,
        now: Time,
        cluster: VmId,
        name: Name,
    ) -> Result<Record, ProposeError> {
        let first = Record {
            cluster,
            name,
            epoch: Epoch(1),
            voters: vec![self.me],
            placement: Vec::new(),
            departed: Vec::new(),
            cause: Cause::Create,
        };
        let voters = self.better_voters(now, &first).unwrap_or_else(|| vec![self.me]);
        let first = Record { voters, ..first };
        self.epochs.create(now, first.clone())?;
        self.drain(now);
        Ok(first)
    }

    /// Lets a lone VM that runs here join the cluster, of which `record` is known. Asked again, it
    /// goes on; it is done when the cluster's record names the VM.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn join(&mut self, now: Time, vm: VmId, record: Record) -> Result<(), String> {
        let cluster = record.cluster;
        self.epochs.learned(now, record);
        self.drain(now);
        let target = self.epochs.newest(cluster).filter(|r| is_cluster(r) && !r.is_closed());
        let Some(target) = target else { return Err("the cluster was deleted".into()) };
        if target.placement_of(vm).is_some() {
            return Ok(());
        }
        if target.placement.len() >= CLUSTER_VMS || is_worn(target) {
            return Err(format!("{} has had too many members: make another", target.name));
        }
        let record = self.record_of(vm).cloned().ok_or("no record of the VM is known here")?;
        let name = record.placement_of(vm).map_or(&record.name, |p| &p.name);
        match &record.cause {
            Cause::Joined(c) if *c == cluster => {
                self.finish_join(now, vm);
                self.drain(now);
                return Ok(());
            }
            Cause::Joined(_) => return Err(format!("{name} is joining another cluster")),
            _ if !record.is_lone() => {
                return Err(format!("{name} belongs to {}: remove it there first", record.name));
            }
            _ => {}
        }
        let runs = self.local.get(&vm).is_some_and(|l| record.names(vm, self.me.host, l.copy));
        if !runs {
            return Err(format!("{name} does not run on this host any more: ask again"));
        }
        if self.is_moving(vm) || self.epochs.attempting(vm).is_some() {
            return Err(format!("{name} is moving, or its record is being changed: ask again"));
        }
        let next = Record { epoch: record.epoch.next(), cause: Cause::Joined(cluster), ..record };
        let until = now.plus_ms(PROPOSE_MS);
        self.epochs.propose(now, next, until).map_err(|e| e.to_string())?;
        self.drain(now);
        Ok(())
    }

    /// Lets members leave: each has a record of its own again, or none if its VM `ended`.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn release(
        &mut self,
        now: Time,
        cluster: VmId,
        vms: &[VmId],
        ended: bool,
    ) -> Result<(), String> {
        let base = self.changeable(cluster)?;
        let members: Vec<Placement> =
            base.placement.iter().filter(|p| vms.contains(&p.vm)).cloned().collect();
        if members.is_empty() {
            return Ok(());
        }
        let placement = base.placement.iter().filter(|p| !vms.contains(&p.vm)).cloned().collect();
        self.part(now, base, placement, members.clone(), Cause::Release { members, ended })
    }

    /// Deletes a cluster: its members are lone VMs again.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn dissolve(&mut self, now: Time, cluster: VmId) -> Result<(), String> {
        if self.epochs.newest(cluster).is_some_and(|r| matches!(r.cause, Cause::Dissolve(_))) {
            return Ok(());
        }
        let base = self.changeable(cluster)?;
        let members = base.placement.clone();
        self.part(now, base, Vec::new(), members.clone(), Cause::Dissolve(members))
    }

    /// A record that another host holds as decided.
    pub fn learned(&mut self, now: Time, record: Record) {
        self.epochs.learned(now, record);
        self.drain(now);
    }

    /// Writes a new record after the majority of a cluster's voters was lost for ever: this host votes
    /// alone, the placement is as it was. To be used when those voters will never come back.
    ///
    /// # Errors
    /// See [`crate::epoch::Epochs::force`]; nothing changed.
    pub fn force(&mut self, now: Time, cluster: VmId, why: String) -> Result<Record, ProposeError> {
        let record = self.epochs.force(now, cluster, migrate::clip(why))?;
        tracing::warn!(name = %record.name, epoch = %record.epoch, "a record was forced");
        self.drain(now);
        Ok(record)
    }

    /// What VMs of this host began and has not come to an end, whether they run or have ended.
    pub(super) fn finish_joins(&mut self, now: Time) {
        let joined = self.epochs.records().filter(|r| matches!(r.cause, Cause::Joined(_)));
        let joined = joined.map(|r| r.cluster).collect::<Vec<_>>();
        joined.into_iter().for_each(|vm| self.finish_join(now, vm));
        let here = self.local.keys().chain(self.ended.keys()).copied().collect::<BTreeSet<_>>();
        for vm in here {
            if let (true, Some(cluster)) = (self.has_missed(vm), self.clusters.get(&vm)) {
                self.epochs.inquire(now, *cluster, vm);
            }
        }
    }

    /// Whether `vm` left its cluster with a record that this host missed.
    pub(super) fn has_missed(&self, vm: VmId) -> bool {
        let known = self.record_of(vm).map_or(Epoch(0), |r| r.epoch);
        let cluster = self.clusters.get(&vm).and_then(|c| self.epochs.newest(*c));
        cluster.and_then(|r| r.departed(vm)).is_some_and(|left| left > known)
    }

    /// The second step of joining, if the first is decided: the cluster's record names the VM.
    pub(super) fn finish_join(&mut self, now: Time, vm: VmId) {
        let Some(own) = self.epochs.newest(vm) else { return };
        let (Cause::Joined(cluster), Some(placed)) = (&own.cause, own.placement_of(vm)) else {
            return;
        };
        let (cluster, above, placed) = (*cluster, own.epoch, placed.clone());
        let Some(base) = self.epochs.newest(cluster).cloned() else { return };
        if base.placement_of(vm).is_some() || self.epochs.attempting(cluster).is_some() {
            return;
        }
        // It was a member and has left, which this host missed.
        let missed = base.departed(vm).is_some_and(|left| left > above);
        if missed {
            return self.epochs.inquire(now, cluster, vm);
        }
        if placed.host != self.me.host {
            return;
        }
        let next = Record {
            epoch: base.epoch.max(above).next(),
            placement: base.placement.iter().cloned().chain([placed]).collect(),
            departed: base.departed.iter().filter(|(v, _)| *v != vm).copied().collect(),
            cause: Cause::Add { vm, above },
            ..base
        };
        // Refused only if another change is under way, or the cluster is full: looked at again.
        let _ = self.epochs.propose(now, next, now.plus_ms(PROPOSE_MS));
    }

    /// A record was learned: it may govern the VMs that it names, and a cluster is found by its lead.
    pub(super) fn index(&mut self, record: &Record) {
        for placed in &record.placement {
            let newer = self.record_of(placed.vm).filter(|r| r.placement_of(placed.vm).is_some());
            if newer.is_none_or(|r| r.epoch <= record.epoch) {
                self.clusters.insert(placed.vm, record.cluster);
            }
        }
        if record.cause == Cause::Delete {
            self.clusters.remove(&record.cluster);
        }
    }

    /// Tells everyone which host leads a cluster: the lead does, or the first voter in its place.
    pub(super) fn show_cluster(&mut self, record: &Record) {
        let first = record.voters.first().map(|v| v.host);
        let lead = record.placement.first().map(|p| p.host);
        let gone = matches!(record.cause, Cause::Dissolve(_));
        let Some(host) = lead.or(first).filter(|_| is_cluster(record)) else { return };
        let me = self.me.host;
        let tells = host == me || (first == Some(me) && !self.up.contains(&host));
        if !tells {
            return;
        }
        let route = Route {
            vm: record.cluster,
            name: record.name.clone(),
            host,
            copy: CopyId(record.cluster.0),
            epoch: record.epoch,
            nics: Vec::new(),
            kind: Kind::Cluster,
            gone,
        };
        if let Err(error) = self.routes.put(route) {
            tracing::error!(%error, "the cluster's route is not told to others");
        }
    }

    /// The record of a cluster that may be changed now.
    fn changeable(&self, cluster: VmId) -> Result<Record, String> {
        let base = self.epochs.newest(cluster).ok_or("no record of the cluster is known here")?;
        if base.is_closed() || !is_cluster(base) {
            return Err(format!("{} is no cluster", base.name));
        }
        if self.is_cluster_moving(cluster) || self.epochs.attempting(cluster).is_some() {
            return Err(format!(
                "{} is moving, or its record is being changed: ask again",
                base.name
            ));
        }
        Ok(base.clone())
    }

    fn part(
        &mut self,
        now: Time,
        base: Record,
        placement: Vec<Placement>,
        members: Vec<Placement>,
        cause: Cause,
    ) -> Result<(), String> {
        let epoch = base.epoch.next();
        let mut departed = base.departed.clone();
        departed.extend(members.iter().map(|p| (p.vm, epoch)));
        let next = Record { epoch, placement, departed, cause, ..base };
        let until = now.plus_ms(PROPOSE_MS);
        self.epochs.propose(now, next, until).map_err(|e| e.to_string())?;
        self.drain(now);
        Ok(())
    }

    /// Whether a migration of that cluster, or of one of its members, is under way here.
    pub(super) fn is_cluster_moving(&self, cluster: VmId) -> bool {
        self.moves.values().any(|m| m.status().cluster == cluster)
    }

    /// The host that looks after a record: the first VM's, or the next one that is not dead.
    pub(super) fn leader(&self, now: Time, record: &Record) -> Option<HostId> {
        let hosts = record.placement.iter().map(|p| p.host);
        let mut hosts = hosts.chain(record.voters.iter().map(|v| v.host));
        hosts.find(|h| !self.is_dead(now, *h))
    }
}

/// Whether so many have left that no more may come: all must be able to leave.
fn is_worn(record: &Record) -> bool {
    record.departed.len() + record.placement.len() >= DEPARTED
}

/// Whether a record is that of a named cluster, not a lone VM's.
fn is_cluster(record: &Record) -> bool {
    let lone = record.is_lone() || matches!(record.cause, Cause::Delete);
    !lone
}
