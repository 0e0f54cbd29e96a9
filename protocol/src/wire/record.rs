//! Records: the decided state of a cluster.

use serde::{Deserialize, Serialize};

use super::wiring::Wiring;
use crate::id::{CopyId, Epoch, HostId, Name, StoreId, VmId};

/// A voter: a host and the hard state it votes with. A host that lost its state is another voter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Voter {
    /// The host.
    pub host: HostId,
    /// Its store.
    pub store: StoreId,
}

/// Where one VM runs: the only copy that may.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Placement {
    /// The VM.
    pub vm: VmId,
    /// Its alias.
    pub name: Name,
    /// The host.
    pub host: HostId,
    /// The copy on that host.
    pub copy: CopyId,
    /// It is switched off: its disks are on that host, as that copy left them, and no copy may run.
    pub off: bool,
    /// Its NICs, in the guest's order (at most [`crate::limits::NICS`], with at most [`crate::limits::RULES`] rules in
    /// all): they move with it.
    pub nics: Vec<Wiring>,
}

impl Placement {
    fn is_well_formed(&self) -> bool {
        use crate::limits::{NICS, RULES};
        self.nics.len() <= NICS
            && self.nics.iter().map(|nic| nic.filter.len()).sum::<usize>() <= RULES
    }

    /// Whether both are the same VM with the same NICs, wherever it is and whether or not it is off.
    fn is_same_vm(&self, other: &Self) -> bool {
        (self.vm, &self.name, &self.nics) == (other.vm, &other.name, &other.nics)
    }
}

/// The word of a copy's host that it stands still, on disk and in fact, and that only the record of that epoch
/// says what becomes of it (R3 in `docs/protocol.md`). Worth nothing in any other epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Release {
    /// The VM.
    pub vm: VmId,
    /// Its copy on that host.
    pub copy: CopyId,
    /// The epoch that decides.
    pub epoch: Epoch,
}

/// Why a record was proposed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// First record of a cluster: of a lone VM, or of a cluster without members.
    Create,
    /// Copies moved, all in this one record: with the word of each host that gave one up.
    Move(Vec<Release>),
    /// A move was given up: the old placement, one epoch later. With the cause in words.
    Stay(String),
    /// The voters changed.
    Voters,
    /// NICs of that member were connected, disconnected or filtered, and its route is of this epoch.
    Wires(VmId),
    /// A lone VM was removed: it runs nowhere. A tombstone that keeps the epoch.
    Delete,
    /// A lone VM belongs to that cluster from the record on which names it there. Until then its copy
    /// runs under this record, which nothing follows but what that cluster's record brings about.
    Joined(VmId),
    /// A VM was added to the cluster.
    Add {
        /// The VM.
        vm: VmId,
        /// The epoch of its own last record ([`Cause::Joined`]): this record's is above it.
        above: Epoch,
    },
    /// Members left the cluster: each has a record of its own again ([`Record::derived`]).
    Release {
        /// Who left, as they were placed.
        members: Vec<Placement>,
        /// Their VMs were removed.
        ended: bool,
    },
    /// The cluster was deleted, and all members left. A tombstone: only a VM that had joined already
    /// can still be added, so that nobody is left between two records.
    Dissolve(Vec<Placement>),
    /// First record of a lone VM after it left that cluster.
    Left(VmId),
    /// A majority of the voters was lost for ever and the operator wrote this record. With why.
    Force(String),
    /// The QEMU of that member ended by itself, by the word of its host: it is switched off, where it was.
    Off(Release),
    /// That member is switched on again, where it was: as a new copy, which starts from its images.
    On(VmId),
}

/// The decided state of a cluster. Its number is its epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The cluster; a lone VM's cluster has the VM's id.
    pub cluster: VmId,
    /// The alias that people use.
    pub name: Name,
    /// Its number.
    pub epoch: Epoch,
    /// Who decides the next epoch (at most [`crate::limits::VOTERS`]).
    pub voters: Vec<Voter>,
    /// Where each member runs (at most [`crate::limits::CLUSTER_VMS`]); the first one's host leads.
    pub placement: Vec<Placement>,
    /// Who left, and with which record (at most [`crate::limits::DEPARTED`]): a VM is added only on a
    /// word of it that is newer.
    pub departed: Vec<(VmId, Epoch)>,
    /// Why.
    pub cause: Cause,
}

impl Record {
    /// The placement of `vm`, if it is a member.
    #[must_use]
    pub fn placement_of(&self, vm: VmId) -> Option<&Placement> {
        self.placement.iter().find(|p| p.vm == vm)
    }

    /// Whether this record names `copy` of `vm` on `host`: only then it may run.
    #[must_use]
    pub fn names(&self, vm: VmId, host: HostId, copy: CopyId) -> bool {
        self.places(vm, host, copy) && !self.is_off(vm)
    }

    /// Whether this record says that `copy` of `vm` is what is left of it, or runs, on `host`.
    #[must_use]
    pub fn places(&self, vm: VmId, host: HostId, copy: CopyId) -> bool {
        self.placement_of(vm).is_some_and(|p| p.host == host && p.copy == copy)
    }

    /// Whether `vm` is a member that is switched off.
    #[must_use]
    pub fn is_off(&self, vm: VmId) -> bool {
        self.placement_of(vm).is_some_and(|p| p.off)
    }

    /// Whether it is the record of one VM that belongs to no other cluster.
    #[must_use]
    pub fn is_lone(&self) -> bool {
        matches!(self.placement.as_slice(), [p] if p.vm == self.cluster)
    }

    /// Whether nothing but what another cluster's record brings about, or a VM on its way, follows.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.cause, Cause::Delete | Cause::Joined(_) | Cause::Dissolve(_))
    }

    /// The record with which `vm` left this cluster, if it was a member once and is not now.
    #[must_use]
    pub fn departed(&self, vm: VmId) -> Option<Epoch> {
        self.departed.iter().find(|(v, _)| *v == vm).map(|(_, epoch)| *epoch)
    }

    /// How many voters are a majority.
    #[must_use]
    pub fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    /// The records of their own that members have who left with this one: decided as it is. The same
    /// wherever they are derived.
    #[must_use]
    pub fn derived(&self) -> Vec<Self> {
        let (members, ended) = match &self.cause {
            Cause::Release { members, ended } => (members, *ended),
            Cause::Dissolve(members) => (members, false),
            _ => return Vec::new(),
        };
        let own = |p: &Placement| Self {
            cluster: p.vm,
            name: p.name.clone(),
            epoch: self.epoch.next(),
            voters: self.voters.clone(),
            placement: if ended { Vec::new() } else { vec![p.clone()] },
            departed: Vec::new(),
            cause: if ended { Cause::Delete } else { Cause::Left(self.cluster) },
        };
        members.iter().filter(|p| p.vm != self.cluster).map(own).collect()
    }

    /// Whether sizes are within the limits and voters and members are named once each.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        use crate::limits::{CLUSTER_VMS, DEPARTED, TEXT_BYTES, VOTERS};
        let mut voters: Vec<_> = self.voters.iter().map(|v| v.host).collect();
        voters.sort_unstable();
        voters.dedup();
        let mut vms: Vec<_> = self.placement.iter().map(|p| p.vm).collect();
        vms.sort_unstable();
        vms.dedup();
        let bounded = |placed: &[Placement]| {
            placed.len() <= CLUSTER_VMS && placed.iter().all(Placement::is_well_formed)
        };
        let cause = match &self.cause {
            Cause::Stay(why) | Cause::Force(why) => why.len() <= TEXT_BYTES,
            Cause::Release { members, .. } | Cause::Dissolve(members) => bounded(members),
            Cause::Move(releases) => releases.len() <= CLUSTER_VMS,
            _ => true,
        };
        (1..=VOTERS).contains(&self.voters.len())
            && voters.len() == self.voters.len()
            && bounded(&self.placement)
            && vms.len() == self.placement.len()
            && self.departed.len() <= DEPARTED
            && cause
    }

    /// Whether `self` may follow the decided `base`: what each cause may change, and nothing else.
    #[must_use]
    pub fn may_follow(&self, base: &Self) -> bool {
        let next = base.epoch.next();
        let same = self.cluster == base.cluster && self.name == base.name;
        let open = match self.cause {
            // A VM between two records finds its way whatever became of the cluster.
            Cause::Add { .. } => !matches!(base.cause, Cause::Delete | Cause::Joined(_)),
            _ => !base.is_closed(),
        };
        let placed = self.placement == base.placement;
        let number = self.epoch == next;
        let departed = self.departed == base.departed;
        let fits = match &self.cause {
            Cause::Stay(_) | Cause::Voters => placed && number && departed,
            Cause::Wires(vm) => number && departed && self.rewires(base, *vm),
            Cause::Joined(cluster) => {
                placed && number && departed && base.is_lone() && *cluster != base.cluster
            }
            Cause::Move(releases) => number && departed && self.moves(base, releases),
            Cause::Off(release) => number && departed && self.turns_off(base, release),
            Cause::On(vm) => number && departed && self.turns_on(base, *vm),
            Cause::Delete => number && departed && self.placement.is_empty() && base.is_lone(),
            Cause::Add { vm, above } => self.adds(base, *vm, *above),
            Cause::Release { members, .. } => number && self.releases(base, members),
            Cause::Dissolve(members) => {
                number && self.placement.is_empty() && self.releases(base, members)
            }
            Cause::Create | Cause::Left(_) | Cause::Force(_) => false,
        };
        same && open && fits && self.is_well_formed()
    }

    /// Whether `vm` is as it was under the older `base`, and NICs were connected otherwise since: a move that is not bound
    /// goes on from this record.
    #[must_use]
    pub fn only_rewires(&self, base: &Self, vm: VmId) -> bool {
        let at = |r: &Self| r.placement_of(vm).map(|p| (p.host, p.copy, p.off));
        self.epoch > base.epoch && matches!(self.cause, Cause::Wires(_)) && at(self) == at(base)
    }

    /// The same members, in the same order, wherever; every copy that is dropped was released.
    fn moves(&self, base: &Self, releases: &[Release]) -> bool {
        let pairs = || base.placement.iter().zip(&self.placement);
        let mut dropped = pairs().filter(|(old, new)| (old.host, old.copy) != (new.host, new.copy));
        self.placement.len() == base.placement.len()
            && pairs().all(|(old, new)| old.is_same_vm(new) && old.off == new.off)
            && dropped.all(|(old, _)| releases.contains(&self.release_of(old)))
    }

    /// The NICs of that member are connected otherwise; they are the same, and nothing else is another.
    fn rewires(&self, base: &Self, vm: VmId) -> bool {
        let macs = |p: &Placement| p.nics.iter().map(|nic| nic.mac).collect::<Vec<_>>();
        let (Some(new), Some(old)) = (self.placement_of(vm), base.placement_of(vm)) else {
            return false;
        };
        let mut placement = base.placement.clone();
        placement.iter_mut().filter(|p| p.vm == vm).for_each(|p| p.nics.clone_from(&new.nics));
        self.placement == placement && macs(new) == macs(old)
    }

    /// That member was on and is off, released; nothing else is another.
    fn turns_off(&self, base: &Self, release: &Release) -> bool {
        let mut placement = base.placement.clone();
        placement.iter_mut().filter(|p| p.vm == release.vm).for_each(|p| p.off = true);
        let released =
            base.placement_of(release.vm).is_some_and(|p| self.release_of(p) == *release);
        self.placement == placement && placement != base.placement && released
    }

    /// What the host of `placed` has to have said before a record of this epoch may drop it.
    fn release_of(&self, placed: &Placement) -> Release {
        Release { vm: placed.vm, copy: placed.copy, epoch: self.epoch }
    }

    /// That member was off and is on as another copy; nothing else is another.
    fn turns_on(&self, base: &Self, vm: VmId) -> bool {
        let copies = (self.placement_of(vm), base.placement_of(vm));
        let (Some(new), Some(old)) = copies else { return false };
        let mut placement = base.placement.clone();
        placement.iter_mut().filter(|p| p.vm == vm).for_each(|p| {
            (p.copy, p.off) = (new.copy, false);
        });
        self.placement == placement && old.off && old.copy != new.copy
    }

    fn adds(&self, base: &Self, vm: VmId, above: Epoch) -> bool {
        let kept: Vec<_> = base.departed.iter().filter(|(v, _)| *v != vm).copied().collect();
        let (new, old) = match self.placement.split_last() {
            Some((new, old)) if new.vm == vm && vm != base.cluster => (new, old),
            _ => return false,
        };
        self.epoch == base.epoch.max(above).next()
            && old == base.placement
            && base.placement_of(new.vm).is_none()
            && base.departed(vm).is_none_or(|left| left < above)
            && self.departed == kept
            && !base.is_lone()
    }

    fn releases(&self, base: &Self, members: &[Placement]) -> bool {
        let stays = |p: &&Placement| !members.contains(p);
        let kept: Vec<_> = base.placement.iter().filter(stays).cloned().collect();
        let mut departed = base.departed.clone();
        departed.extend(members.iter().map(|p| (p.vm, self.epoch)));
        self.placement == kept
            && kept.len() + members.len() == base.placement.len()
            && self.departed == departed
            && !base.is_lone()
    }
}

/// Of all records that are known, the one under which `vm` runs: the one with the highest epoch that
/// places it, or its own tombstone. None: it has none, or it left a cluster with a record that is not
/// among these (see [`has_missed`]).
#[must_use]
pub fn governing<'a>(records: impl Iterator<Item = &'a Record>, vm: VmId) -> Option<Record> {
    let all = records.flat_map(|r| core::iter::once(r.clone()).chain(r.derived()));
    all.filter(|r| r.placement_of(vm).is_some() || r.cluster == vm).max_by_key(|r| r.epoch)
}

/// Whether one of these records says that `vm` left its cluster with a record that is not among them:
/// where it may run is then not known.
#[must_use]
pub fn has_missed<'a>(records: impl Iterator<Item = &'a Record> + Clone, vm: VmId) -> bool {
    let epoch = governing(records.clone(), vm).map_or(Epoch(0), |r| r.epoch);
    records.filter_map(|r| r.departed(vm)).any(|left| left > epoch)
}

#[cfg(test)]
mod tests;
