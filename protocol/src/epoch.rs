//! Decides epochs: one single-decree consensus per (cluster, epoch).
//!
//! Owns the votes, ballots and decided records of one node. Never learns who is up or down (that
//! is gossip), never decides what a record should say, and never starts or stops a copy.
//!
//! Invariants: no two different records are decided for one epoch; decided epochs only grow;
//! nothing is spoken before the state it rests on is durable (a [`Output::Persist`] comes before
//! the outputs that rest on it). A deadline that passes says *unknown*, never *not decided*.
//!
//! Acceptors of epoch n are the voters that the decided record n-1 names; the value is the whole
//! record n. One attempt of a proposer:
//!
//! ```text
//!             prepare / propose / resolve
//!                        v
//!   +--------------> Preparing --majority, accepted record found--+
//!   |                    |                                        | (adopted)
//!   |                    | majority promised, nothing found       v
//!   |                    v                                    Accepting --majority--> decided
//!   |                 Prepared --propose / resolve: own value-->  |
//!   |                    |                                        |
//!   +--backoff-- Waiting <--------- a higher promise -------------+
//! ```
//!
//! A voter, per cluster; `learn` of a newer record from anywhere starts the next epoch:
//!
//! ```text
//!   decided n-1 --Prepare(b)--> promised b --Accept(b, r)--> accepted (b, r)
//!        ^                                                        |
//!        +------------------- Decided(n or newer) <---------------+
//! ```

mod acceptor;
mod announce;
mod attempt;
mod output;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::id::{Epoch, HostId, VmId};
use crate::limits::CLUSTERS;
use crate::time::Time;
use crate::wire::epoch::{Ballot, Body, Message};
use crate::wire::record::{Cause, Record, Voter};
pub use acceptor::Hard;
use acceptor::Vote;
use announce::Announcement;
use attempt::{Attempt, Step};
pub use output::{Output, ProposeError};

/// The votes and proposals of one node, for all clusters.
#[derive(Debug, Clone)]
pub struct Epochs {
    me: Voter,
    rng: SmallRng,
    hard: BTreeMap<VmId, Hard>,
    attempts: BTreeMap<VmId, Attempt>,
    announcements: BTreeMap<VmId, Announcement>,
    inbox: VecDeque<Message>,
    outputs: VecDeque<Output>,
}

impl Epochs {
    /// A node that votes as `me`, with the hard state that its store holds. `seed` feeds the
    /// pauses after lost ballots and should differ between nodes.
    #[must_use]
    pub fn new(me: Voter, seed: u64, hard: BTreeMap<VmId, Hard>) -> Self {
        let mut this = Self {
            me,
            rng: SmallRng::seed_from_u64(seed),
            hard,
            attempts: BTreeMap::new(),
            announcements: BTreeMap::new(),
            inbox: VecDeque::new(),
            outputs: VecDeque::new(),
        };
        // A crash may have come between a record and those that it brings about.
        for record in this.hard.values().flat_map(|h| h.decided().derived()).collect::<Vec<_>>() {
            this.learn(Time(0), record);
        }
        this
    }

    /// The voter that this node is.
    #[must_use]
    pub fn me(&self) -> Voter {
        self.me
    }

    /// The newest decided record of `cluster` that this node knows. Another may have been decided.
    #[must_use]
    pub fn newest(&self, cluster: VmId) -> Option<&Record> {
        self.hard.get(&cluster).map(Hard::decided)
    }

    /// The newest known record of each cluster, tombstones included.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.hard.values().map(Hard::decided)
    }

    /// The epoch that this node is trying to have decided, if any.
    #[must_use]
    pub fn attempting(&self, cluster: VmId) -> Option<Epoch> {
        self.attempts.get(&cluster).map(|a| a.epoch)
    }

    /// Whether this node drives the next epoch to a decision, whatever it is: without a deadline.
    #[must_use]
    pub fn is_resolving(&self, cluster: VmId) -> bool {
        self.attempts.get(&cluster).is_some_and(|a| a.deadline.is_none())
    }

    /// Whether this node holds a prepared ballot for the next epoch, with no record found in it.
    #[must_use]
    pub fn is_prepared(&self, cluster: VmId) -> bool {
        self.attempts.get(&cluster).is_some_and(Attempt::is_prepared)
    }

    /// The first record of a cluster. It counts as decided here and is sent to all that it names.
    /// Doing it again with the same record is no error.
    ///
    /// # Errors
    /// [`ProposeError::Malformed`], [`ProposeError::Exists`], [`ProposeError::Full`].
    pub fn create(&mut self, now: Time, record: Record) -> Result<(), ProposeError> {
        if !record.is_well_formed() || record.epoch == Epoch(0) {
            return Err(ProposeError::Malformed(record.epoch));
        }
        match self.newest(record.cluster) {
            Some(known) if *known == record => return Ok(()),
            Some(_) => return Err(ProposeError::Exists(record.cluster)),
            None if self.hard.len() >= CLUSTERS => return Err(ProposeError::Full),
            None => {}
        }
        self.announce(now, None, &record);
        self.learn(now, record);
        self.drain(now);
        Ok(())
    }

    /// Runs phase 1 for the next epoch before its record is known; returns that epoch. While the
    /// answer is [`Output::BallotReady`] with `adopted: false`, [`Epochs::propose`] takes one round
    /// trip. An attempt that is under way is kept, with the later of both deadlines.
    ///
    /// # Errors
    /// [`ProposeError::Unknown`]; [`ProposeError::Malformed`] for a record that nothing follows.
    pub fn prepare(
        &mut self,
        now: Time,
        cluster: VmId,
        deadline: Time,
    ) -> Result<Epoch, ProposeError> {
        let base = self.newest(cluster).ok_or(ProposeError::Unknown(cluster))?;
        let epoch = base.epoch.next();
        if base.is_closed() {
            return Err(ProposeError::Malformed(epoch));
        }
        if let Some(attempt) = self.attempts.get_mut(&cluster) {
            attempt.extend(Some(deadline));
        } else {
            self.start(now, cluster, None, Some(deadline));
        }
        self.drain(now);
        Ok(epoch)
    }

    /// Proposes `record` for its epoch, which must be the next one. A prepared ballot is used;
    /// another record of this node that is being proposed gives way to a higher ballot (and is
    /// adopted if a voter accepted it). After `deadline` the outcome is [`Output::Failed`].
    ///
    /// # Errors
    /// [`ProposeError`] except `Exists` and `Full`.
    pub fn propose(
        &mut self,
        now: Time,
        record: Record,
        deadline: Time,
    ) -> Result<(), ProposeError> {
        self.drive(now, record, Some(deadline))
    }

    /// Drives the next epoch to a decision and never gives up: adopts what a voter accepted, else
    /// proposes `stay` (a record with the old placement and [`Cause::Stay`]).
    ///
    /// # Errors
    /// [`ProposeError`] except `Exists` and `Full`. `NotNext` means that it is decided already.
    pub fn resolve(&mut self, now: Time, stay: Record) -> Result<(), ProposeError> {
        self.drive(now, stay, None)
    }

    /// Writes a record without its voters, because a majority of them is lost for ever: the one way in
    /// which two records of a cluster can come to contradict each other, should they come back. Its
    /// epoch is above all that they can decide meanwhile, and no other host forces the same one.
    ///
    /// # Errors
    /// [`ProposeError::Unknown`]; [`ProposeError::Malformed`] if nothing may follow the record.
    pub fn force(&mut self, now: Time, cluster: VmId, why: String) -> Result<Record, ProposeError> {
        let base = self.newest(cluster).ok_or(ProposeError::Unknown(cluster))?.clone();
        let host = self.me.host.0;
        let low = u64::from(u32::from_be_bytes([host[0], host[1], host[2], host[3]]));
        let epoch = Epoch(((base.epoch.0 >> 32) + 1) << 32 | low);
        let (voters, cause) = (vec![self.me], Cause::Force(why));
        let record = Record { epoch, voters, cause, ..base.clone() };
        if base.is_closed() || !record.is_well_formed() {
            return Err(ProposeError::Malformed(epoch));
        }
        self.announce(now, Some(&base), &record);
        self.learn(now, record.clone());
        self.drain(now);
        Ok(record)
    }

    /// Stops the attempt for `cluster`. Its record may still be decided: what it sent is under way.
    pub fn abandon(&mut self, cluster: VmId) {
        self.attempts.remove(&cluster);
    }

    /// Takes a record that is known to be decided (from another node's message or store). Older
    /// ones, malformed ones and those over the limit of clusters change nothing.
    pub fn learned(&mut self, now: Time, record: Record) {
        self.learn(now, record);
        self.drain(now);
    }

    /// Asks `host` for its newest record of `cluster`.
    pub fn query(&mut self, now: Time, cluster: VmId, host: HostId) {
        let epoch = self.newest(cluster).map_or(Epoch(0), |r| r.epoch);
        self.send(host, Message { cluster, epoch, body: Body::Query });
        self.drain(now);
    }

    /// A message from another node, which the caller has authenticated as `from`.
    pub fn handle(&mut self, now: Time, from: HostId, message: Message) {
        self.dispatch(now, from, message);
        self.drain(now);
    }

    /// Does what is due at `now`: sends again, begins again after a pause, gives up at deadlines.
    pub fn handle_timeout(&mut self, now: Time) {
        let due = self.attempts.iter().filter(|(_, a)| a.poll_timeout() <= now);
        for cluster in due.map(|(id, _)| *id).collect::<Vec<_>>() {
            let Some(attempt) = self.attempts.get_mut(&cluster) else { continue };
            if attempt.deadline.is_some_and(|d| d <= now) {
                let epoch = attempt.epoch;
                self.attempts.remove(&cluster);
                self.outputs.push_back(Output::Failed { cluster, epoch });
            } else if attempt.is_waiting() {
                let (value, deadline) = (attempt.value.take(), attempt.deadline);
                self.start(now, cluster, value, deadline);
            } else {
                attempt.retransmit(now);
                self.speak(cluster, None);
            }
        }
        let due = self.announcements.iter().filter(|(_, a)| a.next <= now);
        for cluster in due.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.announce_again(now, cluster);
        }
        self.drain(now);
    }

    /// When [`Epochs::handle_timeout`] wants to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let attempts = self.attempts.values().map(Attempt::poll_timeout);
        attempts.chain(self.announcements.values().map(|a| a.next)).min()
    }

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn drive(
        &mut self,
        now: Time,
        record: Record,
        deadline: Option<Time>,
    ) -> Result<(), ProposeError> {
        let cluster = record.cluster;
        let hard = self.hard.get(&cluster).ok_or(ProposeError::Unknown(cluster))?;
        let newest = hard.decided().epoch;
        let jumps = matches!(record.cause, Cause::Add { .. }) && record.epoch > newest;
        if record.epoch != newest.next() && !jumps {
            return Err(ProposeError::NotNext { proposed: record.epoch, newest });
        }
        if !record.may_follow(hard.decided()) {
            return Err(ProposeError::Malformed(record.epoch));
        }
        let majority = hard.decided().majority();
        match self.attempts.get_mut(&cluster) {
            Some(attempt) if attempt.value.as_ref().is_none_or(|v| *v == record) => {
                attempt.deadline = deadline;
                attempt.value = Some(record);
                if let Some(step) = attempt.use_value(now, majority) {
                    self.take(cluster, step);
                }
            }
            // Two records never share a ballot.
            _ => self.start(now, cluster, Some(record), deadline),
        }
        self.drain(now);
        Ok(())
    }

    /// Begins phase 1 with a round above every one seen, made durable first: a node that restarts
    /// must never use a ballot for a second record.
    fn start(&mut self, now: Time, cluster: VmId, value: Option<Record>, deadline: Option<Time>) {
        let Some(hard) = self.hard.get_mut(&cluster) else { return };
        let seen = self.attempts.get(&cluster).map_or(0, |a| a.seen_round);
        let ballot = Ballot { round: hard.next_round(seen), by: self.me };
        let hard = hard.clone();
        let lost = self.attempts.get(&cluster).map_or(0, |a| a.lost);
        let attempt = Attempt::new(now, hard.decided().epoch.next(), ballot, value, deadline, lost);
        self.outputs.push_back(Output::Persist { cluster, hard });
        self.attempts.insert(cluster, attempt);
        self.speak(cluster, None);
    }

    /// Sends the attempt's message to the voters that have not answered it (or to `only`).
    fn speak(&mut self, cluster: VmId, only: Option<HostId>) {
        let (Some(attempt), Some(hard)) = (self.attempts.get(&cluster), self.hard.get(&cluster))
        else {
            return;
        };
        let Some(body) = attempt.question() else { return };
        let epoch = attempt.epoch;
        let voters = hard.decided().voters.iter().map(|v| v.host);
        let to: Vec<HostId> = voters
            .filter(|h| only.is_none_or(|only| only == *h) && !attempt.has_answered(*h))
            .collect();
        for host in to {
            self.send(host, Message { cluster, epoch, body: body.clone() });
        }
    }

    fn send(&mut self, to: HostId, message: Message) {
        if to == self.me.host {
            self.inbox.push_back(message);
        } else {
            self.outputs.push_back(Output::Send { to, message });
        }
    }

    /// Messages to this node itself. Ends: each answer moves a phase forward or is dropped.
    fn drain(&mut self, now: Time) {
        while let Some(message) = self.inbox.pop_front() {
            self.dispatch(now, self.me.host, message);
        }
    }

    fn dispatch(&mut self, now: Time, from: HostId, message: Message) {
        let Message { cluster, epoch, body } = message;
        match body {
            Body::Prepare(ballot) => {
                self.vote(from, cluster, epoch, |hard, me| hard.prepare(me, ballot))
            }
            Body::Accept { ballot, record } => {
                self.vote(from, cluster, epoch, |hard, me| hard.accept(me, ballot, record))
            }
            Body::Decided(record) => self.told(now, from, cluster, record),
            Body::Known(known) => self.known(cluster, from, known),
            Body::Query => {
                if let Some(record) = self.newest(cluster).cloned() {
                    self.send(from, Message { cluster, epoch, body: Body::Decided(record) });
                }
            }
            Body::Behind { newest } => self.help(from, cluster, epoch, newest),
            body @ (Body::Promise { .. } | Body::Accepted { .. } | Body::Rejected { .. }) => {
                self.answered(now, from, cluster, epoch, body);
            }
        }
    }

    /// A question of phase 1 or 2: old epochs are answered with the newest record for ever, and an
    /// epoch whose base is not known here is not voted on.
    fn vote(
        &mut self,
        from: HostId,
        cluster: VmId,
        epoch: Epoch,
        ask: impl FnOnce(&mut Hard, Voter) -> Vote,
    ) {
        let me = self.me;
        let newest = self.newest(cluster).map(|r| r.epoch);
        let body = match self.hard.get_mut(&cluster) {
            Some(hard) if epoch == hard.decided().epoch.next() => match ask(hard, me) {
                Vote::Silent => return,
                Vote::Same(body) => body,
                Vote::Changed(body) => {
                    let hard = hard.clone();
                    self.outputs.push_back(Output::Persist { cluster, hard });
                    body
                }
            },
            Some(hard) if epoch <= hard.decided().epoch => Body::Decided(hard.decided().clone()),
            _ => Body::Behind { newest },
        };
        self.send(from, Message { cluster, epoch, body });
    }

    /// A voter lacks the base of this node's attempt: give it, and ask again. Once per interval,
    /// so that a voter that cannot learn is no loop.
    fn help(&mut self, from: HostId, cluster: VmId, epoch: Epoch, newest: Option<Epoch>) {
        let (Some(attempt), Some(hard)) =
            (self.attempts.get_mut(&cluster), self.hard.get(&cluster))
        else {
            return;
        };
        let base = hard.decided().clone();
        let lacks = newest.is_none_or(|n| n < base.epoch);
        if attempt.epoch != epoch || !lacks || !attempt.helped.insert(from) {
            return;
        }
        let body = Body::Decided(base);
        self.send(from, Message { cluster, epoch, body });
        self.speak(cluster, Some(from));
    }

    fn answered(&mut self, now: Time, from: HostId, cluster: VmId, epoch: Epoch, body: Body) {
        let (Some(attempt), Some(hard)) =
            (self.attempts.get_mut(&cluster), self.hard.get(&cluster))
        else {
            return;
        };
        if attempt.epoch != epoch {
            return;
        }
        if let Some(step) = attempt.answer(now, from, body, hard.decided(), &mut self.rng) {
            self.take(cluster, step);
        }
        let won = self.attempts.get(&cluster).and_then(Attempt::won);
        if let (Some(record), Some(base)) = (won, self.newest(cluster).cloned()) {
            self.announce(now, Some(&base), &record);
            self.learn(now, record);
        }
    }

    fn take(&mut self, cluster: VmId, step: Step) {
        let Some(attempt) = self.attempts.get(&cluster) else { return };
        let (epoch, ballot) = (attempt.epoch, attempt.ballot);
        match step {
            Step::Ready { adopted } => {
                self.outputs.push_back(Output::BallotReady { cluster, epoch, ballot, adopted });
                self.speak(cluster, None);
            }
            Step::Speak => self.speak(cluster, None),
            Step::Preempted(by) => {
                self.outputs.push_back(Output::Preempted { cluster, epoch, by });
            }
        }
    }

    /// The one way in which a record becomes decided here.
    fn learn(&mut self, now: Time, record: Record) {
        let cluster = record.cluster;
        if !record.is_well_formed() {
            return;
        }
        match self.hard.get(&cluster).map(Hard::decided) {
            Some(newest) if record.epoch <= newest.epoch => {
                if record.epoch == newest.epoch && record != *newest {
                    tracing::error!(%cluster, epoch = %record.epoch, "two records for one epoch");
                }
                return;
            }
            None if self.hard.len() >= CLUSTERS => return,
            _ => {}
        }
        let hard = Hard::new(record.clone());
        self.hard.insert(cluster, hard.clone());
        if self.attempts.get(&cluster).is_some_and(|a| a.epoch <= record.epoch) {
            self.attempts.remove(&cluster);
        }
        self.outputs.push_back(Output::Persist { cluster, hard });
        self.retarget(now, &record);
        let derived = record.derived();
        self.outputs.push_back(Output::Decided(record));
        for record in derived {
            self.learn(now, record);
        }
    }
}
