//! Messages of the decision of one epoch (single-decree Paxos per epoch, see `crate::epoch`).

use serde::{Deserialize, Serialize};

use super::record::{Record, Voter};
use crate::id::{Epoch, VmId};

/// A ballot: ordered by round, then by proposer, so two proposers never share one. The proposer is
/// named with its store: a host that lost its hard state, and with it its rounds, is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ballot {
    /// Grows with each attempt.
    pub round: u64,
    /// Who proposes.
    pub by: Voter,
}

/// One message about the epoch `epoch` of `cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The cluster.
    pub cluster: VmId,
    /// The epoch that is being decided.
    pub epoch: Epoch,
    /// What is said.
    pub body: Body,
}

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// Phase 1: promise not to take part in lower ballots.
    Prepare(Ballot),
    /// Phase 1 answer, with what this voter accepted at this epoch, if anything.
    Promise {
        /// The ballot that is promised.
        ballot: Ballot,
        /// Who answers.
        voter: Voter,
        /// The accepted proposal with the highest ballot.
        accepted: Option<Box<(Ballot, Record)>>,
    },
    /// Phase 2: accept this record.
    Accept {
        /// The ballot.
        ballot: Ballot,
        /// The whole record of this epoch.
        record: Record,
    },
    /// Phase 2 answer.
    Accepted {
        /// The ballot.
        ballot: Ballot,
        /// Who answers.
        voter: Voter,
    },
    /// The voter has promised a higher ballot.
    Rejected {
        /// The ballot that was refused.
        ballot: Ballot,
        /// The promise that stands.
        promised: Ballot,
    },
    /// The voter does not hold the record before this epoch; it holds `newest` (none: nothing).
    Behind {
        /// Its newest decided epoch.
        newest: Option<Epoch>,
    },
    /// A decided record: of this epoch, or a newer one as the answer to an old question.
    Decided(Record),
    /// The answer to [`Body::Decided`]: the sender holds this epoch or a newer one, durably.
    Known(Epoch),
    /// Asks for the newest decided record; never a ground to act on *undecided*.
    Query,
}
