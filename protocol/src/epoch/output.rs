//! What the module answers with: commands in their order of durability, and refusals.
//!
//! Owns types only.

use super::Hard;
use crate::id::{Epoch, HostId, VmId};
use crate::limits::CLUSTERS;
use crate::wire::epoch::{Ballot, Message};
use crate::wire::record::Record;

/// What the caller has to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Make this state of the cluster durable before any later output is performed.
    Persist {
        /// The cluster.
        cluster: VmId,
        /// Its state; replaces what was stored before.
        hard: Hard,
    },
    /// Send this to another node. It may be lost, delayed or doubled.
    Send {
        /// The receiver; never this node.
        to: HostId,
        /// What to send.
        message: Message,
    },
    /// A record was learned as decided. Once per record, in the order of epochs; epochs that this
    /// node slept through are skipped.
    Decided(Record),
    /// Phase 1 ended: a majority is alive and has promised `ballot`.
    BallotReady {
        /// The cluster.
        cluster: VmId,
        /// The epoch that the ballot is for.
        epoch: Epoch,
        /// The ballot.
        ballot: Ballot,
        /// A voter had accepted a record already: that one is driven on, the caller's never will be.
        adopted: bool,
    },
    /// Another proposer's ballot is higher. The attempt goes on by itself after a pause.
    Preempted {
        /// The cluster.
        cluster: VmId,
        /// The epoch.
        epoch: Epoch,
        /// The ballot that stands in the way.
        by: Ballot,
    },
    /// The deadline of an attempt passed. Whether the epoch was or will be decided, and with which
    /// record, is **unknown**: only [`super::Epochs::resolve`] finds out.
    Failed {
        /// The cluster.
        cluster: VmId,
        /// The epoch.
        epoch: Epoch,
    },
}

/// Why a proposal was not taken. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// No record of the cluster is known here.
    #[error("no record of cluster {0} is known on this host")]
    Unknown(VmId),
    /// The proposal's epoch is not the one after the newest decided record.
    #[error("epoch {proposed} cannot be proposed: the newest decided epoch is {newest}")]
    NotNext {
        /// The epoch that was asked for.
        proposed: Epoch,
        /// The newest decided epoch.
        newest: Epoch,
    },
    /// The record breaks a rule: sizes, names, a *stay* that moves something, a successor of a
    /// deleted cluster.
    #[error("the record for epoch {0} is not a valid successor of the one before")]
    Malformed(Epoch),
    /// A first record for a cluster that has one.
    #[error("cluster {0} exists")]
    Exists(VmId),
    /// The table of clusters is full.
    #[error("this host keeps {CLUSTERS} clusters already: delete some first")]
    Full,
}
