//! The network between hosts: late, lossy, doubled, out of order, and cut in one direction or both.
//!
//! Owns what becomes of a message between a core that sends and one that hears. Every message is
//! encoded as on the wire, for its length and for the trace.

use godwit_protocol::core::Core;
use godwit_protocol::id::{Epoch, HostId, Name};
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::wire::codec;
use godwit_protocol::wire::control::Control;
use godwit_protocol::wire::epoch::{Body as Vote, Message};
use godwit_protocol::wire::migrate::Body;
use godwit_protocol::wire::record::{Cause, Record};
use godwit_protocol::wire::route;

use super::check::{self, Invariant};
use super::event::Event;
use super::mutant::Mutant;
use super::world::{World, host, index};

/// Somebody who is no member.
const STRANGER: HostId = HostId([250; 32]);

/// The site of the i-th host: three sites by turns.
#[must_use]
pub fn site(i: usize) -> Name {
    let text = ["paris", "tokyo", "lima"][i % 3];
    text.parse().unwrap_or_else(|e| panic!("{text} is a name: {e}"))
}

impl World {
    /// A core sends.
    pub(super) fn send(&mut self, from: usize, to: HostId, message: Control) {
        if to == STRANGER {
            return; // Nobody is there; what it was told is looked at when it is said.
        }
        let to = index(to);
        if matches!(message, Control::Membership(_)) && !self.gossip {
            return;
        }
        match codec::encode(&message, CONTROL_MESSAGE_BYTES) {
            Ok(bytes) => self.trace.message(&bytes),
            Err(error) => self.broken(Invariant::Ends, format!("a message is too long: {error}")),
        }
        if (self.hold)(&message) {
            return self.held.push((from, to, message));
        }
        let Some(message) = self.mutated(message) else { return };
        self.note_unknown(&message);
        if self.chance(self.faults.strangers) {
            let ms = self.below(2000);
            let to = self.below(self.nodes.len() as u64) as usize;
            self.at(ms, Event::Stranger(to, Box::new(message.clone())));
        }
        let copies = if self.chance(self.faults.double) { 2 } else { 1 };
        for _ in 0..copies {
            if self.cut.contains(&(from, to)) || self.chance(self.faults.loss) {
                continue;
            }
            let far = if site(from) == site(to) { 0 } else { self.faults.wan_ms };
            let mut ms = 1 + far + self.below(self.faults.delay_ms) + self.nodes[to].lag_ms;
            if self.chance(self.faults.double) {
                ms += self.below(30_000); // A straggler.
            }
            self.at(ms, Event::Deliver(from, to, Box::new(message.clone())));
        }
    }

    /// A core hears.
    pub(super) fn deliver(&mut self, from: usize, to: usize, message: Control) {
        if self.cut.contains(&(from, to)) {
            return;
        }
        if let (Mutant::NewVoter, Control::Epoch(m)) = (self.mutant, &message)
            && let Some(body) = self.premature(to, m)
        {
            let answer = Message { cluster: m.cluster, epoch: m.epoch, body };
            return self.send(to, host(from), Control::Epoch(answer));
        }
        self.act(to, |core, now| core.message(now, host(from), message));
    }

    /// [`Mutant::NewVoter`]: votes on an epoch without the record before it, and forgets that it did.
    fn premature(&self, i: usize, m: &Message) -> Option<Vote> {
        let known = self.nodes[i].core.as_ref()?.newest(m.cluster)?.epoch;
        let voter = super::world::voter(i);
        if m.epoch <= known.next() {
            return None;
        }
        match &m.body {
            Vote::Prepare(ballot) => Some(Vote::Promise { ballot: *ballot, voter, accepted: None }),
            Vote::Accept { ballot, .. } => Some(Vote::Accepted { ballot: *ballot, voter }),
            _ => None,
        }
    }

    /// What a mutant makes of a message on its way.
    fn mutated(&self, message: Control) -> Option<Control> {
        match (self.mutant, message) {
            (Mutant::NoAdoption, Control::Epoch(mut m)) => {
                if let Vote::Promise { accepted, .. } = &mut m.body {
                    *accepted = None;
                }
                Some(Control::Epoch(m))
            }
            (Mutant::Alone, Control::Migrate(mut m)) => {
                if let Body::PrepareBallot(team) = &mut m.body {
                    team.retain(|s| s.vm == m.vm);
                }
                Some(Control::Migrate(m))
            }
            (Mutant::MergeBelow, Control::Epoch(mut m)) => {
                if let Vote::Accept { record, .. } | Vote::Decided(record) = &mut m.body {
                    self.merge_below(record);
                }
                Some(Control::Epoch(m))
            }
            (Mutant::ToldOnce, Control::Route(m)) => {
                matches!(m, route::Message::Push(_)).then_some(Control::Route(m))
            }
            (_, message) => Some(message),
        }
    }

    /// [`Mutant::MergeBelow`]: the record that adds a VM is the cluster's next, and claims that the VM's own was no
    /// higher. To voters it looks right: only who adds the VM reads its own record.
    fn merge_below(&self, record: &mut Record) {
        let Cause::Add { above, .. } = &mut record.cause else { return };
        let earlier = (record.cluster, Epoch(0))..(record.cluster, record.epoch);
        let base = self.decided.range(earlier).next_back().map(|((_, epoch), _)| *epoch);
        if let Some(base) = base.filter(|base| base < above) {
            (*above, record.epoch) = (base, base.next());
        }
    }

    /// Somebody who is no member repeats what a member said. What is believed from whomever says it
    /// (records, routes, membership) stays outside by admission; what is believed from its author
    /// alone must not be taken from another.
    pub(super) fn stranger(&mut self, to: usize, message: Control) {
        let own = match &message {
            Control::Epoch(m) => {
                matches!(
                    m.body,
                    Vote::Promise { .. } | Vote::Accepted { .. } | Vote::Rejected { .. }
                )
            }
            Control::Migrate(m) => !matches!(m.body, Body::Prepare { .. }),
            Control::Progress(_) | Control::Voter { .. } => true,
            _ => false,
        };
        if !own || self.nodes[to].core.is_none() {
            return;
        }
        self.seen.strangers += 1;
        let author = match (&message, self.mutant) {
            (Control::Epoch(m), Mutant::AnyVote) => match &m.body {
                Vote::Promise { voter, .. } | Vote::Accepted { voter, .. } => voter.host,
                _ => STRANGER,
            },
            _ => STRANGER,
        };
        let now = self.nodes[to].clock.read(self.now);
        let Some(core) = self.nodes[to].core.as_mut() else { return };
        core.message(now, author, message);
        let mut said = Vec::new();
        while let Some(command) = self.nodes[to].core.as_mut().and_then(Core::poll_command) {
            said.push(command);
        }
        self.judge(Invariant::Strangers, check::strangers::nothing(&said, STRANGER));
        said.into_iter().for_each(|command| self.perform(to, command));
    }

    /// Nothing gets from `i` to the others, or from them to it, or both.
    pub fn cut_off(&mut self, i: usize, out: bool, inward: bool) {
        for j in (0..self.nodes.len()).filter(|j| *j != i) {
            if out {
                self.cut.insert((i, j));
            }
            if inward {
                self.cut.insert((j, i));
            }
        }
    }

    /// Lets the held messages go, twice each.
    pub fn release(&mut self) {
        self.hold = |_| false;
        for (from, to, message) in core::mem::take(&mut self.held) {
            self.at(1, Event::Deliver(from, to, Box::new(message.clone())));
            self.at(900, Event::Deliver(from, to, Box::new(message)));
        }
    }

    /// A bound end that does not know drives the epoch: it proposes to stay.
    fn note_unknown(&mut self, message: &Control) {
        let Control::Epoch(m) = message else { return };
        let Vote::Accept { record, .. } = &m.body else { return };
        if matches!(record.cause, Cause::Stay(_)) {
            self.seen.unknown_resolved += 1;
        }
    }
}
