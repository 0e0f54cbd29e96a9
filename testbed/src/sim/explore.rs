//! Every order of events of a small decision, tried out on the production code of epochs.
//!
//! Owns the search: from each state every message that is under way may arrive next, once or (within
//! bounds) twice, every timer may ring, every node may die and start again from its disk, also halfway
//! through what it had begun. A message that is lost is one that never arrives. States that were seen are
//! not entered again. Invariant checked in each: one record per epoch, decided epochs only grow.

use core::fmt::Write;
use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;

use godwit_protocol::epoch::{Epochs, Hard, Output};
use godwit_protocol::id::{CopyId, Epoch, VmId};
use godwit_protocol::time::Time;
use godwit_protocol::wire::epoch::{Body, Message};
use godwit_protocol::wire::record::{Cause, Record, Release};
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

use super::world::{self, VM, index, placed, voter};

/// A search says how far it is each time that it has seen so many states.
const TELL: usize = 1_000_000;

/// How much goes wrong at most on one path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Timers that ring.
    pub timers: u8,
    /// Nodes that die and start again.
    pub crashes: u8,
    /// Messages that arrive twice.
    pub doubles: u8,
}

/// What is wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// Nothing.
    None,
    /// A restart forgets promises and votes.
    Forgets,
    /// Promises do not tell what was accepted.
    NoAdoption,
}

/// A small world: who wants what.
#[derive(Debug, Clone)]
pub struct Small {
    /// How many nodes.
    pub nodes: usize,
    /// The record that all of them hold.
    pub base: Record,
    /// What nodes propose once the record before it is decided where they are.
    pub wants: Vec<(usize, Record)>,
    /// How much goes wrong.
    pub bounds: Bounds,
    /// What is wrong on purpose.
    pub flaw: Flaw,
}

/// The record of a VM on a host, decided by these voters.
fn record(epoch: u64, voters: &[usize], at: usize, cause: Cause) -> Record {
    let place = placed(VM, at, CopyId([at as u8 + 1; 16]));
    Record {
        cluster: VM,
        name: place.name.clone(),
        epoch: Epoch(epoch),
        voters: voters.iter().map(|i| voter(*i)).collect(),
        placement: vec![place],
        departed: Vec::new(),
        cause,
    }
}

/// The same, one epoch later: somebody gave up.
fn stay(base: &Record, why: &str) -> Record {
    Record { epoch: base.epoch.next(), cause: Cause::Stay(why.into()), ..base.clone() }
}

/// Three voters. Node 0 holds a loaded copy and wants it named, node 1 had the guest and gives up.
#[must_use]
pub fn contested(bounds: Bounds, flaw: Flaw) -> Small {
    let base = record(1, &[0, 1, 2], 1, Cause::Create);
    let (copy, epoch) = (base.placement[0].copy, base.epoch.next());
    let released = Cause::Move(vec![Release { vm: VM, copy, epoch }]);
    let moved = record(epoch.0, &[0, 1, 2], 0, released);
    let wants = vec![(0, moved), (1, stay(&base, "gave up"))];
    Small { nodes: 3, base, wants, bounds, flaw }
}

/// What a search found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Found {
    /// Distinct states.
    pub states: usize,
    /// Steps tried.
    pub steps: usize,
    /// States in which some node holds a decision.
    pub decided: usize,
    /// Records that were decided somewhere.
    pub records: usize,
    /// Two records for one epoch, if that is possible.
    pub breach: Option<String>,
    /// The search was cut off at this many states.
    pub truncated: bool,
}

#[derive(Clone)]
struct Host {
    epochs: Epochs,
    disk: BTreeMap<VmId, Hard>,
    now: Time,
    print: u64,
}

#[derive(Clone)]
struct Packet {
    from: usize,
    to: usize,
    message: Rc<Message>,
    print: u64,
}

#[derive(Clone)]
struct State {
    hosts: Vec<Rc<Host>>,
    packets: Vec<Packet>,
    left: Bounds,
}

enum Step {
    /// The packet at this place arrives; whether another of it stays under way.
    Arrives(usize, bool),
    Rings(usize),
    Restarts(usize),
}

struct Hash(Xxh3);

impl Write for Hash {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

fn print_of(what: &impl core::fmt::Debug) -> u64 {
    let mut hash = Hash(Xxh3::new());
    // Writing to a hash does not fail.
    let _ = write!(hash, "{what:?}");
    hash.0.digest()
}

impl State {
    fn print(&self) -> u64 {
        let packets = self.packets.iter().fold(0_u64, |sum, p| sum.wrapping_add(p.print));
        let hosts: Vec<u64> = self.hosts.iter().map(|h| h.print).collect();
        print_of(&(hosts, packets, self.left))
    }
}

/// A search through all that can happen.
pub struct Explorer {
    small: Small,
    decided: BTreeMap<(u64, Epoch), Record>,
    seen: HashSet<u64>,
    found: Found,
    most: usize,
}

impl Explorer {
    /// For a small world; at most so many states.
    #[must_use]
    pub fn new(small: Small, most: usize) -> Self {
        let (decided, seen) = (BTreeMap::new(), HashSet::new());
        Self { small, decided, seen, found: Found::default(), most }
    }

    /// Tries everything.
    #[must_use]
    pub fn run(mut self) -> Found {
        let mut open = vec![self.begin()];
        while let Some(state) = open.pop() {
            if !self.seen.insert(state.print()) {
                continue;
            }
            self.found.states += 1;
            if self.found.states.is_multiple_of(TELL) {
                eprintln!("{} states", self.found.states);
            }
            self.judge(&state);
            if self.found.breach.is_some() {
                break;
            }
            if self.found.states >= self.most {
                self.found.truncated = true;
                break;
            }
            for step in self.steps(&state) {
                self.take(&state, &step, &mut open);
            }
        }
        self.found
    }

    fn begin(&mut self) -> State {
        let mut state = State { hosts: Vec::new(), packets: Vec::new(), left: self.small.bounds };
        for i in 0..self.small.nodes {
            let disk = BTreeMap::from([(VM, Hard::new(self.small.base.clone()))]);
            let epochs = Epochs::new(voter(i), i as u64, disk.clone());
            state.hosts.push(Rc::new(Host { epochs, disk, now: Time(0), print: 0 }));
        }
        for i in 0..self.small.nodes {
            let mut host = (*state.hosts[i]).clone();
            self.want(i, &mut host);
            let outputs = outputs(&mut host);
            self.perform(&mut state, i, host, outputs, usize::MAX);
        }
        state
    }

    /// A node proposes what it wants, if that is what comes next for it.
    fn want(&self, i: usize, host: &mut Host) {
        let newest = host.epochs.newest(VM).map_or(Epoch(0), |r| r.epoch);
        let next = |(at, r): &&(usize, Record)| *at == i && r.epoch == newest.next();
        if let Some((_, record)) = self.small.wants.iter().find(next) {
            // Refused only if it cannot follow what was decided here.
            let _ = host.epochs.resolve(host.now, record.clone());
        }
    }

    fn steps(&self, state: &State) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut seen = HashSet::new();
        for (at, packet) in state.packets.iter().enumerate() {
            if seen.insert(packet.print) {
                steps.push(Step::Arrives(at, false));
                if state.left.doubles > 0 {
                    steps.push(Step::Arrives(at, true));
                }
            }
        }
        for (i, host) in state.hosts.iter().enumerate() {
            if state.left.timers > 0 && host.epochs.poll_timeout().is_some() {
                steps.push(Step::Rings(i));
            }
            // Later it dies right after something happened to it: see `all_ends`.
            if state.left.crashes > 0 && self.seen.len() == 1 {
                steps.push(Step::Restarts(i));
            }
        }
        steps
    }

    fn take(&mut self, state: &State, step: &Step, open: &mut Vec<State>) {
        let mut next = state.clone();
        let i = match step {
            Step::Arrives(at, stays) => {
                let packet = state.packets[*at].clone();
                if *stays {
                    next.left.doubles -= 1;
                } else {
                    next.packets.swap_remove(*at);
                }
                let mut host = (*state.hosts[packet.to]).clone();
                let before = host.epochs.newest(VM).map(|r| r.epoch);
                host.epochs.handle(host.now, world::host(packet.from), (*packet.message).clone());
                if host.epochs.newest(VM).map(|r| r.epoch) != before {
                    self.want(packet.to, &mut host);
                }
                return self.all_ends(next, packet.to, host, open);
            }
            Step::Rings(i) => {
                next.left.timers -= 1;
                let mut host = (*state.hosts[*i]).clone();
                host.now = host.epochs.poll_timeout().map_or(host.now, |t| t.max(host.now));
                host.epochs.handle_timeout(host.now);
                return self.all_ends(next, *i, host, open);
            }
            Step::Restarts(i) => *i,
        };
        self.restart(&mut next, i);
        self.found.steps += 1;
        open.push(next);
    }

    /// What a node has begun is performed, or it dies after each part of it in turn.
    fn all_ends(&mut self, state: State, i: usize, mut host: Host, open: &mut Vec<State>) {
        let outputs = outputs(&mut host);
        if state.left.crashes > 0 {
            for done in 0..=outputs.len() {
                let mut next = state.clone();
                self.perform(&mut next, i, host.clone(), outputs.clone(), done);
                self.restart(&mut next, i);
                self.found.steps += 1;
                open.push(next);
            }
        }
        let mut next = state;
        self.perform(&mut next, i, host, outputs, usize::MAX);
        self.found.steps += 1;
        open.push(next);
    }

    fn restart(&mut self, state: &mut State, i: usize) {
        state.left.crashes = state.left.crashes.saturating_sub(1);
        let old = &state.hosts[i];
        let mut disk = old.disk.clone();
        if self.small.flaw == Flaw::Forgets {
            disk.values_mut().for_each(|hard| *hard = Hard::new(hard.decided().clone()));
        }
        let epochs = Epochs::new(voter(i), i as u64, disk.clone());
        let mut host = Host { epochs, disk, now: old.now, print: 0 };
        // A bound end drives a decision when it is back.
        if self.small.wants.iter().any(|(at, _)| *at == i)
            && let Some(base) = host.epochs.newest(VM).cloned()
            && base.epoch == self.small.base.epoch
        {
            let _ = host.epochs.resolve(host.now, stay(&base, &format!("{i} restarted")));
        }
        let outputs = outputs(&mut host);
        self.perform(state, i, host, outputs, usize::MAX);
    }

    /// Performs the first `most` of what a node wants done.
    fn perform(
        &mut self,
        state: &mut State,
        i: usize,
        mut host: Host,
        outputs: Vec<Output>,
        most: usize,
    ) {
        for output in outputs.into_iter().take(most) {
            match output {
                Output::Persist { cluster, hard } => {
                    drop(host.disk.insert(cluster, hard));
                }
                Output::Send { to, mut message } => {
                    if let (Flaw::NoAdoption, Body::Promise { accepted, .. }) =
                        (self.small.flaw, &mut message.body)
                    {
                        *accepted = None;
                    }
                    put(state, i, index(to), message);
                }
                _ => {}
            }
        }
        // What is on the disk is in the memory, too, once all of it was performed.
        host.print = print_of(&host.epochs);
        forget_idle(state, i, &host);
        state.hosts[i] = Rc::new(host);
    }

    /// A record that any node holds as decided is decided: on every path, of one world, the same one per
    /// epoch, whatever the path.
    fn judge(&mut self, state: &State) {
        let mut decided: BTreeMap<Epoch, &Record> = BTreeMap::new();
        for hard in state.hosts.iter().filter_map(|h| h.disk.get(&VM)) {
            let record = hard.decided();
            let known = *decided.entry(record.epoch).or_insert(record);
            if known != record {
                let what = format!("two records for one epoch: {known:?} {record:?}");
                self.found.breach.get_or_insert(what);
            }
            if record.epoch > self.small.base.epoch {
                let key = (print_of(record), record.epoch);
                self.decided.entry(key).or_insert_with(|| record.clone());
            }
        }
        self.found.decided += usize::from(decided.len() > 1);
        self.found.records = self.decided.len();
    }
}

/// Answers and decisions that change nothing at this node now never will: an attempt's ballot is used
/// once, and decided epochs only grow. They are no longer under way.
fn forget_idle(state: &mut State, i: usize, host: &Host) {
    let idle = |p: &Packet| {
        let answer = matches!(
            p.message.body,
            Body::Promise { .. } | Body::Accepted { .. } | Body::Rejected { .. } | Body::Decided(_)
        );
        if p.to != i || !answer {
            return false;
        }
        let mut trial = host.clone();
        trial.epochs.handle(trial.now, world::host(p.from), (*p.message).clone());
        let said = outputs(&mut trial);
        let known = |o: &Output| matches!(o, Output::Send { message, .. } if matches!(message.body, Body::Known(_)));
        said.iter().all(known) && print_of(&trial.epochs) == host.print
    };
    state.packets.retain(|p| !idle(p));
}

/// What a node wants done.
fn outputs(host: &mut Host) -> Vec<Output> {
    core::iter::from_fn(|| host.epochs.poll_output()).collect()
}

/// Lets a message be under way. Who says what it knows only ends announcements.
fn put(state: &mut State, from: usize, to: usize, message: Message) {
    if matches!(message.body, Body::Known(_)) {
        return;
    }
    let print = print_of(&(from, to, &message));
    state.packets.push(Packet { from, to, message: Rc::new(message), print });
}
