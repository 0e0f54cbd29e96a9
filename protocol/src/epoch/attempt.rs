//! A proposer's side of one attempt at one epoch.
//!
//! Owns the phase, the answers counted so far and the times of the next step. Never sends.
//! Invariant: under one ballot at most one record is ever spoken, and if phase 1 finds accepted
//! records, it is the one with the highest ballot.

use std::collections::BTreeSet;

use rand::RngExt;
use rand::rngs::SmallRng;

use crate::id::{Epoch, HostId};
use crate::time::Time;
use crate::wire::epoch::{Ballot, Body};
use crate::wire::record::Record;

/// First pause before a question is sent again, ms; doubles up to [`RESEND_MAX_MS`].
const RESEND_MS: u64 = 300;
const RESEND_MAX_MS: u64 = 2400;
/// First pause after a lost ballot, ms; doubles [`BACKOFF_DOUBLINGS`] times, and as much again is
/// added at random, so that two proposers do not meet for ever.
const BACKOFF_MS: u64 = 60;
const BACKOFF_DOUBLINGS: u32 = 5;

/// What an answer led to.
#[derive(Debug)]
pub(super) enum Step {
    /// Phase 1 ended.
    Ready { adopted: bool },
    /// There is something new to send.
    Speak,
    /// A higher ballot: the attempt pauses.
    Preempted(Ballot),
}

#[derive(Debug, Clone)]
enum Phase {
    Preparing { promised: BTreeSet<HostId>, found: Option<(Ballot, Record)> },
    Prepared,
    Accepting { record: Record, accepted: BTreeSet<HostId>, majority: usize },
    Waiting,
}

#[derive(Debug, Clone)]
pub(super) struct Attempt {
    pub(super) epoch: Epoch,
    pub(super) ballot: Ballot,
    /// What this node wants, if it knows that yet.
    pub(super) value: Option<Record>,
    pub(super) deadline: Option<Time>,
    /// Voters that were given the base since the last resend.
    pub(super) helped: BTreeSet<HostId>,
    /// The highest round that stood in the way.
    pub(super) seen_round: u64,
    /// Ballots lost in a row.
    pub(super) lost: u32,
    phase: Phase,
    next: Time,
    pause_ms: u64,
}

impl Attempt {
    pub(super) fn new(
        now: Time,
        epoch: Epoch,
        ballot: Ballot,
        value: Option<Record>,
        deadline: Option<Time>,
        lost: u32,
    ) -> Self {
        Self {
            epoch,
            ballot,
            value,
            deadline,
            helped: BTreeSet::new(),
            seen_round: 0,
            lost,
            phase: Phase::Preparing { promised: BTreeSet::new(), found: None },
            next: now.plus_ms(RESEND_MS),
            pause_ms: RESEND_MS,
        }
    }

    pub(super) fn is_prepared(&self) -> bool {
        matches!(self.phase, Phase::Prepared)
    }

    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Waiting)
    }

    /// Never earlier than before; `None` is never.
    pub(super) fn extend(&mut self, deadline: Option<Time>) {
        self.deadline = match (self.deadline, deadline) {
            (Some(a), Some(b)) => Some(a.max(b)),
            _ => None,
        };
    }

    pub(super) fn poll_timeout(&self) -> Time {
        let next = if self.is_prepared() { Time(u64::MAX) } else { self.next };
        self.deadline.map_or(next, |d| d.min(next))
    }

    pub(super) fn retransmit(&mut self, now: Time) {
        self.pause_ms = (self.pause_ms * 2).min(RESEND_MAX_MS);
        self.next = now.plus_ms(self.pause_ms);
        self.helped.clear();
    }

    /// What every voter has to be asked in this phase.
    pub(super) fn question(&self) -> Option<Body> {
        match &self.phase {
            Phase::Preparing { .. } => Some(Body::Prepare(self.ballot)),
            Phase::Accepting { record, .. } => {
                Some(Body::Accept { ballot: self.ballot, record: record.clone() })
            }
            Phase::Prepared | Phase::Waiting => None,
        }
    }

    pub(super) fn has_answered(&self, host: HostId) -> bool {
        match &self.phase {
            Phase::Preparing { promised, .. } => promised.contains(&host),
            Phase::Accepting { accepted, .. } => accepted.contains(&host),
            Phase::Prepared | Phase::Waiting => false,
        }
    }

    /// The record that a majority has accepted.
    pub(super) fn won(&self) -> Option<Record> {
        match &self.phase {
            Phase::Accepting { record, accepted, majority } if accepted.len() >= *majority => {
                Some(record.clone())
            }
            _ => None,
        }
    }

    /// Phase 2 with this node's own value, if the ballot is ready for it.
    pub(super) fn use_value(&mut self, now: Time, majority: usize) -> Option<Step> {
        if !self.is_prepared() {
            return None;
        }
        let record = self.value.clone()?;
        self.begin_accepting(now, record, majority);
        Some(Step::Speak)
    }

    fn begin_accepting(&mut self, now: Time, record: Record, majority: usize) {
        self.phase = Phase::Accepting { record, accepted: BTreeSet::new(), majority };
        self.pause_ms = RESEND_MS;
        self.next = now.plus_ms(RESEND_MS);
    }

    /// An answer from `from`; counted only if `base` names that very voter, host and store.
    pub(super) fn answer(
        &mut self,
        now: Time,
        from: HostId,
        body: Body,
        base: &Record,
        rng: &mut SmallRng,
    ) -> Option<Step> {
        match (body, &mut self.phase) {
            (Body::Promise { ballot, voter, accepted }, Phase::Preparing { promised, found })
                if ballot == self.ballot && voter.host == from && base.voters.contains(&voter) =>
            {
                promised.insert(from);
                if let Some(new) = accepted
                    && found.as_ref().is_none_or(|(b, _)| *b < new.0)
                {
                    *found = Some(*new);
                }
                if promised.len() < base.majority() {
                    return None;
                }
                let found = found.take();
                self.promised_by_majority(now, found, base.majority())
            }
            (Body::Accepted { ballot, voter }, Phase::Accepting { accepted, .. })
                if ballot == self.ballot && voter.host == from && base.voters.contains(&voter) =>
            {
                accepted.insert(from);
                None
            }
            (Body::Rejected { ballot, promised }, phase)
                if ballot == self.ballot
                    && promised > ballot
                    && !matches!(phase, Phase::Waiting)
                    && base.voters.iter().any(|v| v.host == from) =>
            {
                self.seen_round = promised.round;
                let pause = BACKOFF_MS << self.lost.min(BACKOFF_DOUBLINGS);
                self.lost = self.lost.saturating_add(1);
                self.next = now.plus_ms(pause + rng.random_range(0..=pause));
                self.phase = Phase::Waiting;
                Some(Step::Preempted(promised))
            }
            _ => None,
        }
    }

    fn promised_by_majority(
        &mut self,
        now: Time,
        found: Option<(Ballot, Record)>,
        majority: usize,
    ) -> Option<Step> {
        let adopted = found.is_some();
        match found.map(|(_, record)| record).or_else(|| self.value.clone()) {
            Some(record) => self.begin_accepting(now, record, majority),
            None => self.phase = Phase::Prepared,
        }
        Some(Step::Ready { adopted })
    }
}
