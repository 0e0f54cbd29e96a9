//! Production cores in virtual time: a network with faults, disks, crashes.
//!
//! Owns time, messages and what is on disk. A crash loses everything that was not performed yet;
//! what was done to QEMUs stays done (see `qemu`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use godwit_protocol::core::{Command, Config, Core, Key, Value};
use godwit_protocol::epoch::Hard;
use godwit_protocol::id::{CopyId, Epoch, HostId, MigrationId, StoreId, VmId};
use godwit_protocol::migrate::{Effect, Happened};
use godwit_protocol::time::Time;
use godwit_protocol::wire::control::Control;
use godwit_protocol::wire::epoch::Body as Vote;
use godwit_protocol::wire::migrate::{Body, Status};
use godwit_protocol::wire::record::{Cause, Placement, Record, Voter};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::qemu::Copy;

/// The VM of worlds that have one.
pub const VM: VmId = VmId([9; 16]);
/// The cluster of worlds that have one.
pub const CLUSTER: VmId = VmId([200; 16]);

pub fn vm(k: usize) -> VmId {
    VmId([9 + k as u8; 16])
}

pub fn placed(vm: VmId, at: usize, copy: CopyId) -> Placement {
    let name = if vm == VM { "web".into() } else { format!("vm-{}", vm.0[0]) };
    Placement { vm, name: name.parse().unwrap(), host: host(at), copy, off: false }
}

fn first(cluster: VmId, epoch: u64, voters: &[usize], placement: Vec<Placement>) -> Record {
    Record {
        cluster,
        name: "web".parse().unwrap(),
        epoch: Epoch(epoch),
        voters: voters.iter().map(|i| voter(*i)).collect(),
        placement,
        departed: Vec::new(),
        cause: Cause::Create,
    }
}

pub fn host(i: usize) -> HostId {
    HostId([i as u8 + 1; 32])
}

pub fn index(host: HostId) -> usize {
    usize::from(host.0[0]) - 1
}

pub fn voter(i: usize) -> Voter {
    Voter { host: host(i), store: StoreId([i as u8 + 1; 16]) }
}

/// Apart from each other even when mixed with a VM's id.
pub fn migration(n: u8) -> MigrationId {
    MigrationId([n << 5; 16])
}

/// What is wrong on purpose: each must be caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// The source resumes after everyone it reaches still names it.
    CleanRead,
    /// The destination runs as soon as it has loaded.
    ContEarly,
    /// The bound flag never reaches the disk.
    Unbound,
    /// Votes reach the disk after they were spoken.
    VoteEarly,
    /// The source copy goes when the move is decided.
    DiscardEarly,
    /// What a voter has accepted is not told to the next proposer.
    NoAdoption,
    /// The source resumes when the connection is lost after it has stopped.
    LostReply,
    /// A record is taken to name a host, not a copy.
    HostOnly,
    /// The record of a cluster began below its members' own epochs.
    MergeBelow,
    /// The proposer waits for its own member only.
    Alone,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    pub loss: f64,
    pub double: f64,
    /// Chance of a crash at each step.
    pub crash: f64,
    /// Chance that a destination refuses, that a load or a first rebuild fails.
    pub fail: f64,
    pub delay_ms: u64,
}

pub enum Event {
    Deliver(usize, usize, Box<Control>),
    Restart(usize),
    Work(usize, u64, MigrationId),
    Happened(usize, u64, MigrationId, Box<Happened>),
    Figures(usize, u64, MigrationId),
    Stream {
        at: usize,
        start: u64,
        id: MigrationId,
        until: Time,
    },
    Load(usize, u64, MigrationId, CopyId),
    Gone(usize, u64, CopyId),
    Flush(usize, u64),
    ReadBack(usize, u64, CopyId),
    Cut(usize, usize),
    Heal,
    Kill(bool),
    Ask(u8),
    /// Members of the cluster, each to the k-th of the other hosts.
    AskCluster(u8, Vec<(VmId, usize)>),
    Abort(u8),
}

#[derive(Default)]
pub struct Node {
    pub core: Option<Core>,
    /// Which start of the process this is.
    pub start: u64,
    pub disk: BTreeMap<Key, Value>,
    pub late: Vec<(Key, Option<Value>)>,
    pub work: BTreeMap<MigrationId, VecDeque<(VmId, Effect)>>,
    pub sending: BTreeMap<MigrationId, (VmId, usize)>,
    pub receiving: BTreeMap<MigrationId, CopyId>,
    pub steps: u64,
    pub crash_at: Option<u64>,
}

pub struct World {
    pub now: Time,
    pub rng: StdRng,
    pub faults: Faults,
    pub mutant: Mutant,
    pub nodes: Vec<Node>,
    pub copies: BTreeMap<CopyId, Copy>,
    pub minted: u8,
    pub vms: Vec<VmId>,
    /// These guests may be lost: their only copy was killed.
    pub may_lose: BTreeSet<VmId>,
    /// These are switched off.
    pub off: BTreeSet<VmId>,
    /// Which members were asked to move together.
    pub teams: BTreeSet<BTreeSet<VmId>>,
    pub decided: BTreeMap<(VmId, Epoch), Record>,
    pub cut: BTreeSet<(usize, usize)>,
    /// Messages that match are kept here in place of the queue.
    pub hold: fn(&Control) -> bool,
    pub held: Vec<(usize, usize, Control)>,
    /// Whether membership messages cross (the fuzzer does without: they are hints, and many).
    pub gossip: bool,
    queue: BTreeMap<(Time, u64), Event>,
    number: u64,
}

impl World {
    /// `nodes` hosts; the VM runs on host 0 at epoch 1, decided by `voters`.
    pub fn new(nodes: usize, voters: &[usize], seed: u64, faults: Faults) -> Self {
        let mut this = Self::empty(nodes, seed, faults);
        this.add_lone(VM, 0, 1, voters);
        this.boot();
        this
    }

    /// `nodes` hosts that are off, and no VM.
    pub fn empty(nodes: usize, seed: u64, faults: Faults) -> Self {
        Self {
            now: Time(1_000_000),
            rng: StdRng::seed_from_u64(seed),
            faults,
            mutant: Mutant::None,
            nodes: (0..nodes).map(|_| Node::default()).collect(),
            copies: BTreeMap::new(),
            minted: 0,
            vms: Vec::new(),
            may_lose: BTreeSet::new(),
            off: BTreeSet::new(),
            teams: BTreeSet::new(),
            decided: BTreeMap::new(),
            cut: BTreeSet::new(),
            hold: |_| false,
            held: Vec::new(),
            gossip: false,
            queue: BTreeMap::new(),
            number: 0,
        }
    }

    /// A VM that runs on that host, alone in its record.
    pub fn add_lone(&mut self, vm: VmId, at: usize, epoch: u64, voters: &[usize]) {
        let copy = self.mint(vm, at);
        let placement = vec![placed(vm, at, copy)];
        self.decree(first(vm, epoch, voters, placement));
    }

    /// VMs that run on those hosts as one cluster, VM k on the k-th.
    pub fn add_cluster(&mut self, epoch: u64, hosts: &[usize], voters: &[usize]) {
        let member = |(k, at): (usize, &usize)| placed(vm(k), *at, self.mint(vm(k), *at));
        let placement = hosts.iter().enumerate().map(member).collect();
        self.decree(first(CLUSTER, epoch, voters, placement));
    }

    /// A record that every node has from the start.
    pub fn decree(&mut self, record: Record) {
        self.decided.insert((record.cluster, record.epoch), record.clone());
        for node in &mut self.nodes {
            let hard = Value::Epoch(Box::new(Hard::new(record.clone())));
            node.disk.insert(Key::Epoch(record.cluster), hard);
        }
    }

    /// Starts all nodes.
    pub fn boot(&mut self) {
        for i in 0..self.nodes.len() {
            self.restart(i);
        }
    }

    pub fn chance(&mut self, p: f64) -> bool {
        p > 0.0 && self.rng.random_bool(p)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.rng.random_range(0..n.max(1))
    }

    pub fn at(&mut self, ms: u64, event: Event) {
        self.number += 1;
        self.queue.insert((self.now.plus_ms(ms), self.number), event);
    }

    pub fn core(&self, i: usize) -> &Core {
        self.nodes[i].core.as_ref().unwrap()
    }

    pub fn crash(&mut self, i: usize, for_ms: u64) {
        if self.nodes[i].core.is_none() {
            return;
        }
        let node = &mut self.nodes[i];
        let disk = core::mem::take(&mut node.disk);
        let (start, steps) = (node.start + 1, node.steps);
        *node = Node { start, disk, steps, ..Node::default() };
        self.node_gone(i);
        self.at(for_ms, Event::Restart(i));
    }

    pub fn restart(&mut self, i: usize) {
        if self.nodes[i].core.is_some() {
            return;
        }
        let (moving, conts) = self.adopt(i);
        let disk = &self.nodes[i].disk;
        let mut hard = BTreeMap::new();
        let mut statuses: Vec<Status> = Vec::new();
        for value in disk.values() {
            match value {
                Value::Epoch(h) => drop(hard.insert(h.decided().cluster, (**h).clone())),
                Value::Status(s) => statuses.push((**s).clone()),
                Value::Moving(_) => {}
            }
        }
        let seed = self.rng.random();
        let config = Config {
            me: host(i),
            store: voter(i).store,
            site: ["paris", "tokyo", "lima"][i % 3].parse().unwrap(),
            generation: self.now.0,
            seed,
            hard,
            moving,
            statuses,
        };
        self.nodes[i].core = Some(Core::new(self.now, config));
        for copy in conts {
            self.run_copy(copy);
            self.announce_copy(i, copy);
        }
        for j in (0..self.nodes.len()).filter(|j| *j != i) {
            self.act(i, |core, now| core.connected(now, host(j)));
            self.act(j, |core, now| core.connected(now, host(i)));
        }
    }

    /// One more step of a node; true if it was its last.
    pub fn step(&mut self, i: usize) -> bool {
        let node = &mut self.nodes[i];
        node.steps += 1;
        let planned = node.crash_at == Some(node.steps);
        if planned || self.chance(self.faults.crash) {
            let ms = if planned { 1000 } else { 20 + self.below(8000) };
            self.crash(i, ms);
            return true;
        }
        false
    }

    pub fn act<T>(&mut self, i: usize, f: impl FnOnce(&mut Core, Time) -> T) -> Option<T> {
        let now = self.now;
        let result = self.nodes[i].core.as_mut().map(|core| f(core, now));
        while let Some(command) = self.nodes[i].core.as_mut().and_then(Core::poll_command) {
            if self.step(i) {
                break;
            }
            self.perform(i, command);
        }
        result
    }

    fn perform(&mut self, i: usize, command: Command) {
        match command {
            Command::Persist(Key::Moving(_), _) if self.mutant == Mutant::Unbound => {}
            Command::Persist(key @ Key::Epoch(_), value) if self.mutant == Mutant::VoteEarly => {
                self.learned(value.as_ref().unwrap());
                self.nodes[i].late.push((key, value));
                let (start, ms) = (self.nodes[i].start, self.below(500));
                self.at(ms, Event::Flush(i, start));
            }
            Command::Persist(key, Some(value)) => {
                self.learned(&value);
                drop(self.nodes[i].disk.insert(key, value));
            }
            Command::Persist(key, None) => drop(self.nodes[i].disk.remove(&key)),
            Command::Send(to, message) => self.send(i, index(to), message),
            Command::Effect { id, vm, effect } => {
                let ends = matches!(effect, Effect::Discard(_) | Effect::DropReceived);
                self.nodes[i].work.entry(id).or_default().push_back((vm, effect));
                // To end a QEMU can take long.
                let slow = ends && self.vms.len() > 1 && self.chance(0.2);
                let ms = 1 + self.below(if slow { 4000 } else { 20 });
                let start = self.nodes[i].start;
                self.at(ms, Event::Work(i, start, id));
            }
            Command::Decided(_) if self.mutant == Mutant::DiscardEarly => {
                self.discard_superseded(i);
            }
            Command::Decided(record) if self.mutant == Mutant::HostOnly => {
                self.run_all_named(i, &record);
            }
            Command::Decided(_)
            | Command::Undecided(..)
            | Command::Status(_)
            | Command::Route(_)
            | Command::Member(..) => {}
        }
    }

    /// A record is decided as soon as one node holds it as such.
    fn learned(&mut self, value: &Value) {
        let Value::Epoch(hard) = value else { return };
        let record = hard.decided();
        let number = (record.cluster, record.epoch);
        let known = self.decided.entry(number).or_insert_with(|| record.clone());
        assert_eq!(known, record, "two records for one epoch");
    }

    pub fn send(&mut self, from: usize, to: usize, message: Control) {
        if matches!(message, Control::Membership(_)) && !self.gossip {
            return;
        }
        if (self.hold)(&message) {
            return self.held.push((from, to, message));
        }
        let message = self.mutated(message);
        let copies = if self.chance(self.faults.double) { 2 } else { 1 };
        for _ in 0..copies {
            if self.cut.contains(&(from, to)) || self.chance(self.faults.loss) {
                continue;
            }
            let mut ms = 1 + self.below(self.faults.delay_ms);
            if self.chance(self.faults.double) {
                ms += self.below(30_000); // A straggler.
            }
            self.at(ms, Event::Deliver(from, to, Box::new(message.clone())));
        }
    }

    /// [`Mutant::NoAdoption`], [`Mutant::Alone`].
    fn mutated(&self, message: Control) -> Control {
        match message {
            Control::Epoch(mut m) if self.mutant == Mutant::NoAdoption => {
                if let Vote::Promise { accepted, .. } = &mut m.body {
                    *accepted = None;
                }
                Control::Epoch(m)
            }
            Control::Migrate(mut m) if self.mutant == Mutant::Alone => {
                if let Body::PrepareBallot(team) = &mut m.body {
                    team.retain(|s| s.vm == m.vm);
                }
                Control::Migrate(m)
            }
            other => other,
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

    /// Runs for `ms`, or until `done`; says whether it was.
    pub fn run_until(&mut self, ms: u64, done: impl Fn(&Self) -> bool) -> bool {
        let end = self.now.plus_ms(ms);
        while !done(self) {
            let timers = self.nodes.iter().enumerate();
            let timer =
                timers.filter_map(|(i, n)| Some((n.core.as_ref()?.poll_timeout(), i))).min();
            let event = self.queue.keys().next().copied();
            let next = timer.map(|t| t.0).into_iter().chain(event.map(|e| e.0)).min();
            let Some(next) = next.filter(|t| *t <= end) else {
                self.now = end;
                return done(self);
            };
            self.now = self.now.max(next);
            if let Some(key) = event.filter(|e| e.0 <= self.now) {
                let event = self.queue.remove(&key).unwrap();
                self.handle(event);
            } else if let Some((_, i)) = timer {
                self.act(i, Core::timer);
            }
            self.check();
        }
        true
    }

    pub fn run(&mut self, ms: u64) {
        self.run_until(ms, |_| false);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Deliver(from, to, message) => {
                if !self.cut.contains(&(from, to)) {
                    self.act(to, |core, now| core.message(now, host(from), *message));
                }
            }
            Event::Restart(i) => self.restart(i),
            Event::Happened(i, start, id, happened) if self.nodes[i].start == start => {
                self.act(i, |core, now| core.happened(now, id, *happened));
            }
            Event::Flush(i, start) if self.nodes[i].start == start => {
                for (key, value) in core::mem::take(&mut self.nodes[i].late) {
                    drop(value.map(|v| self.nodes[i].disk.insert(key, v)));
                }
            }
            Event::Cut(from, to) => drop(self.cut.insert((from, to))),
            Event::Heal => self.cut.clear(),
            Event::Ask(n) => {
                let others = self.nodes.len() as u64 - 1;
                let first = self.below(others) as usize;
                self.ask(n, |k| (first + k) % others as usize);
            }
            Event::AskCluster(n, to) => drop(self.ask_cluster(n, &to)),
            Event::Abort(n) => {
                for i in 0..self.nodes.len() {
                    self.act(i, |core, now| core.abort(now, migration(n)));
                }
            }
            other => self.handle_qemu(other),
        }
    }
}
