//! A voter's side of one cluster: what it has promised and accepted for the next epoch.
//!
//! Owns [`Hard`], the state that must be durable before a vote is spoken. Never sends, never asks
//! for time. Invariant: `promised` never falls within an epoch, and `accepted.0 <= promised`.

use serde::{Deserialize, Serialize};

use crate::wire::epoch::{Ballot, Body};
use crate::wire::record::{Record, Voter};

/// The durable state of one cluster on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hard {
    decided: Record,
    promised: Option<Ballot>,
    accepted: Option<(Ballot, Record)>,
    round: u64,
}

/// A voter's answer.
#[derive(Debug)]
pub(super) enum Vote {
    /// None: this node has no vote, or the question breaks a rule.
    Silent,
    /// This, and the state is as it was.
    Same(Body),
    /// This, once the changed state is durable.
    Changed(Body),
}

impl Hard {
    /// The state of a node that holds `decided` and has not voted on the next epoch.
    #[must_use]
    pub fn new(decided: Record) -> Self {
        Self { decided, promised: None, accepted: None, round: 0 }
    }

    /// The newest decided record.
    #[must_use]
    pub fn decided(&self) -> &Record {
        &self.decided
    }

    /// What this node accepted for the next epoch: perhaps decided, perhaps not.
    #[must_use]
    pub fn accepted(&self) -> Option<&(Ballot, Record)> {
        self.accepted.as_ref()
    }

    /// A round that this node has not used in this epoch, above `seen` and above its promise.
    pub(super) fn next_round(&mut self, seen: u64) -> u64 {
        let promised = self.promised.map_or(0, |b| b.round);
        self.round = self.round.max(seen).max(promised).saturating_add(1);
        self.round
    }

    pub(super) fn prepare(&mut self, me: Voter, ballot: Ballot) -> Vote {
        if !self.decided.voters.contains(&me) {
            return Vote::Silent;
        }
        let accepted = self.accepted.clone().map(Box::new);
        let promise = Body::Promise { ballot, voter: me, accepted };
        match self.promised {
            Some(promised) if promised > ballot => Vote::Same(Body::Rejected { ballot, promised }),
            Some(promised) if promised == ballot => Vote::Same(promise),
            _ => {
                self.promised = Some(ballot);
                Vote::Changed(promise)
            }
        }
    }

    pub(super) fn accept(&mut self, me: Voter, ballot: Ballot, record: Record) -> Vote {
        if !self.decided.voters.contains(&me) || !record.may_follow(&self.decided) {
            return Vote::Silent;
        }
        if let Some(promised) = self.promised.filter(|p| *p > ballot) {
            return Vote::Same(Body::Rejected { ballot, promised });
        }
        let accepted = Body::Accepted { ballot, voter: me };
        match &self.accepted {
            Some((b, r)) if *b == ballot && *r == record => Vote::Same(accepted),
            Some((b, _)) if *b == ballot => {
                tracing::error!(cluster = %record.cluster, "two records under one ballot");
                Vote::Silent
            }
            _ => {
                self.promised = Some(ballot);
                self.accepted = Some((ballot, record));
                Vote::Changed(accepted)
            }
        }
    }
}
