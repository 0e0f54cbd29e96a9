//! Records: the decided state of a cluster.

use serde::{Deserialize, Serialize};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Placement {
    /// The VM.
    pub vm: VmId,
    /// The host.
    pub host: HostId,
    /// The copy on that host.
    pub copy: CopyId,
}

/// Why a record was proposed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// First record of the cluster.
    Create,
    /// A copy moved.
    Move,
    /// A move was given up: the old placement, one epoch later. With the cause in words.
    Stay(String),
    /// The voters changed.
    Voters,
    /// The cluster was removed: its VMs run nowhere. A tombstone that keeps the epoch.
    Delete,
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
    /// Where each member runs (at most [`crate::limits::CLUSTER_VMS`]).
    pub placement: Vec<Placement>,
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
        self.placement_of(vm).is_some_and(|p| p.host == host && p.copy == copy)
    }

    /// How many voters are a majority.
    #[must_use]
    pub fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    /// Whether sizes are within the limits and voters and members are named once each.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        use crate::limits::{CLUSTER_VMS, VOTERS};
        let mut voters: Vec<_> = self.voters.iter().map(|v| v.host).collect();
        voters.sort_unstable();
        voters.dedup();
        let mut vms: Vec<_> = self.placement.iter().map(|p| p.vm).collect();
        vms.sort_unstable();
        vms.dedup();
        (1..=VOTERS).contains(&self.voters.len())
            && voters.len() == self.voters.len()
            && self.placement.len() <= CLUSTER_VMS
            && vms.len() == self.placement.len()
    }
}
