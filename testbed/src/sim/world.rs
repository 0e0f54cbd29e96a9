//! Production cores in virtual time, on hosts that fail.
//!
//! Owns time, the heap of events and what each host holds. A crash loses everything that was not
//! performed yet; what was done to QEMUs stays done (see `qemu`). Never decides what is right: the
//! checkers do. Invariant: everything follows from the seed, so the same seed gives the same trace.

use std::collections::{BTreeMap, BTreeSet};

use godwit_protocol::core::{Command, Core, Key, Value};
use godwit_protocol::epoch::Hard;
use godwit_protocol::id::{CopyId, Epoch, HostId, MigrationId, StoreId, VmId};
use godwit_protocol::migrate::Effect;
use godwit_protocol::time::Time;
use godwit_protocol::wire::control::Control;
use godwit_protocol::wire::record::{Cause, Placement, Record, Voter};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::check::{self, Breach, Invariant};
use super::event::Event;
use super::faults::Faults;
use super::mutant::Mutant;
use super::node::Node;
use super::qemu::Copy;
use super::trace::{Coverage, Trace};
use super::wiring;

/// The VM of worlds that have one.
pub const VM: VmId = VmId([9; 16]);
/// The cluster of worlds that have one.
pub const CLUSTER: VmId = VmId([200; 16]);

/// The k-th VM.
#[must_use]
pub fn vm(k: usize) -> VmId {
    VmId([9 + k as u8; 16])
}

/// The i-th host.
#[must_use]
pub fn host(i: usize) -> HostId {
    HostId([i as u8 + 1; 32])
}

/// Which host it is.
#[must_use]
pub fn index(host: HostId) -> usize {
    usize::from(host.0[0]) - 1
}

/// The voter that the i-th host is with its first store.
#[must_use]
pub fn voter(i: usize) -> Voter {
    Voter { host: host(i), store: StoreId([i as u8 + 1; 16]) }
}

/// Apart from each other even when mixed with a VM's id.
#[must_use]
pub fn migration(n: u8) -> MigrationId {
    MigrationId([n << 5; 16])
}

/// Where a VM is placed.
#[must_use]
pub fn placed(vm: VmId, at: usize, copy: CopyId) -> Placement {
    let (name, host, nics) = (name_of(vm), host(at), wiring::first(vm));
    Placement { vm, name, host, copy, off: false, nics }
}

fn name_of(vm: VmId) -> godwit_protocol::id::Name {
    let text = if vm == VM || vm == CLUSTER { "web".into() } else { format!("vm-{}", vm.0[0]) };
    text.parse().unwrap_or_else(|e| panic!("{text} is a name: {e}"))
}

fn first(cluster: VmId, epoch: u64, voters: &[usize], placement: Vec<Placement>) -> Record {
    Record {
        cluster,
        name: name_of(CLUSTER),
        epoch: Epoch(epoch),
        voters: voters.iter().map(|i| voter(*i)).collect(),
        placement,
        departed: Vec::new(),
        cause: Cause::Create,
    }
}

/// Hosts, what they run, and what is between them.
pub struct World {
    /// The moment.
    pub now: Time,
    /// All that is random.
    pub rng: StdRng,
    /// What goes wrong, and how often.
    pub faults: Faults,
    /// What is wrong on purpose.
    pub mutant: Mutant,
    /// The hosts.
    pub nodes: Vec<Node>,
    /// Every copy that has a process, or memory.
    pub copies: BTreeMap<CopyId, Copy>,
    /// How many copies were made.
    pub minted: u8,
    /// The VMs.
    pub vms: Vec<VmId>,
    /// These guests may be lost: their only copy was killed.
    pub may_lose: BTreeSet<VmId>,
    /// These are switched off.
    pub off: BTreeSet<VmId>,
    /// Which members were asked to move together.
    pub teams: BTreeSet<BTreeSet<VmId>>,
    /// Every record that was decided.
    pub decided: BTreeMap<(VmId, Epoch), Record>,
    /// What each guest holds, as of when it last stood still.
    pub truth: BTreeMap<VmId, u64>,
    /// From whom nothing gets to whom.
    pub cut: BTreeSet<(usize, usize)>,
    /// Messages that match are kept in `held` in place of the queue.
    pub hold: fn(&Control) -> bool,
    /// Kept messages: from, to, what.
    pub held: Vec<(usize, usize, Control)>,
    /// Whether membership messages cross (most seeds do without: they are hints, and many).
    pub gossip: bool,
    /// Everything that happens is told on standard error.
    pub log: bool,
    /// A breach ends the process with a panic, for tests.
    pub strict: bool,
    /// The first breach of an invariant.
    pub breach: Option<Breach>,
    /// What happened, for the report.
    pub seen: Coverage,
    /// A hash over everything that happened.
    pub trace: Trace,
    queue: BTreeMap<(Time, u64), Event>,
    number: u64,
}

impl World {
    /// `nodes` hosts; the VM runs on host 0 at epoch 1, decided by `voters`.
    #[must_use]
    pub fn new(nodes: usize, voters: &[usize], seed: u64, faults: Faults) -> Self {
        let mut this = Self::empty(nodes, seed, faults);
        this.add_lone(VM, 0, 1, voters);
        this.boot();
        this
    }

    /// `nodes` hosts that are off, and no VM.
    #[must_use]
    pub fn empty(nodes: usize, seed: u64, faults: Faults) -> Self {
        Self {
            now: Time(1_000_000),
            rng: StdRng::seed_from_u64(seed),
            faults,
            mutant: Mutant::None,
            nodes: (0..nodes).map(|i| Node::new(voter(i).store)).collect(),
            copies: BTreeMap::new(),
            minted: 0,
            vms: Vec::new(),
            may_lose: BTreeSet::new(),
            off: BTreeSet::new(),
            teams: BTreeSet::new(),
            decided: BTreeMap::new(),
            truth: BTreeMap::new(),
            cut: BTreeSet::new(),
            hold: |_| false,
            held: Vec::new(),
            gossip: false,
            log: false,
            strict: true,
            breach: None,
            seen: Coverage::default(),
            trace: Trace::default(),
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
        (0..self.nodes.len()).for_each(|i| self.restart(i));
    }

    /// An invariant does not hold.
    pub fn broken(&mut self, invariant: Invariant, what: impl Into<String>) {
        let breach = Breach { invariant, what: what.into() };
        assert!(!self.strict, "{breach}");
        self.breach.get_or_insert(breach);
    }

    /// What a checker found.
    pub fn judge(&mut self, invariant: Invariant, found: Result<(), String>) {
        if let Err(what) = found {
            self.broken(invariant, what);
        }
    }

    /// True with that chance.
    pub fn chance(&mut self, p: f64) -> bool {
        p > 0.0 && self.rng.random_bool(p)
    }

    /// Something below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.rng.random_range(0..n.max(1))
    }

    /// Lets something happen after so many milliseconds.
    pub fn at(&mut self, ms: u64, event: Event) {
        self.put(self.now.plus_ms(ms), event);
    }

    fn put(&mut self, at: Time, event: Event) {
        self.number += 1;
        self.queue.insert((at, self.number), event);
    }

    /// The core of a node that is up.
    #[must_use]
    pub fn core(&self, i: usize) -> &Core {
        self.nodes[i].core.as_ref().unwrap_or_else(|| panic!("node {i} is down"))
    }

    /// Gives the core of a node something to do, and performs what it answers.
    pub fn act<T>(&mut self, i: usize, f: impl FnOnce(&mut Core, Time) -> T) -> Option<T> {
        let now = self.nodes[i].clock.read(self.now);
        let result = self.nodes[i].core.as_mut().map(|core| f(core, now));
        let mut commands = 0;
        while let Some(command) = self.nodes[i].core.as_mut().and_then(Core::poll_command) {
            commands += 1;
            if let Some(ms) = self.dies(i) {
                self.interrupted(i, command);
                self.crash(i, ms);
                break;
            }
            self.perform(i, command);
        }
        self.judge(Invariant::Ends, check::ends::bounded(&self.nodes[i], commands));
        result
    }

    pub(super) fn perform(&mut self, i: usize, command: Command) {
        self.trace.command(i, &command);
        self.tell_log(|| format!("    {i}: {command:?}"));
        match command {
            Command::Persist(key, value) => self.persist(i, key, value),
            Command::Send(to, message) => self.send(i, to, message),
            Command::Effect { id, vm, effect } => {
                let ends = matches!(effect, Effect::Discard(_) | Effect::DropReceived);
                self.nodes[i].work.entry(id).or_default().push_back((vm, effect));
                // To end a QEMU can take long.
                let slow = ends && self.vms.len() > 1 && self.chance(0.2);
                let ms = 1 + self.below(if slow { 4000 } else { 20 }) + self.nodes[i].lag_ms;
                let start = self.nodes[i].start;
                self.at(ms, Event::Work(i, start, id));
            }
            Command::Boot(_, copy) => {
                let ms = 1 + self.below(500) + self.nodes[i].lag_ms;
                self.at(ms, Event::Boot(i, self.nodes[i].start, copy));
            }
            Command::Removed(_, copy) => drop(self.copies.remove(&copy)),
            Command::Decided(_) if self.mutant == Mutant::DiscardEarly => {
                self.discard_superseded(i);
            }
            Command::Decided(record) if self.mutant == Mutant::HostOnly => {
                self.run_all_named(i, &record);
            }
            Command::Decided(record) => self.follow_soon(i, &record),
            Command::Undecided(..)
            | Command::Status(_)
            | Command::Route(_)
            | Command::Member(..) => {}
        }
    }

    /// Faults stop, and those that were planned do not come.
    pub fn calm(&mut self) {
        self.faults = Faults { drift: self.faults.drift, ..Faults::quiet() };
        self.cut.clear();
        for node in &mut self.nodes {
            (node.crash_at, node.awake) = (None, self.now);
        }
        let fault = |e: &Event| matches!(e.kind(), 11 | 13..=17);
        self.queue.retain(|_, event| !fault(event));
    }

    /// Runs for `ms`, or until `done`; says whether it was. Ends at once when an invariant breaks.
    pub fn run_until(&mut self, ms: u64, done: impl Fn(&Self) -> bool) -> bool {
        let end = self.now.plus_ms(ms);
        while !done(self) {
            if self.breach.is_some() {
                return false;
            }
            let timer = (0..self.nodes.len()).filter_map(|i| Some((self.timer(i)?, i))).min();
            let event = self.queue.keys().next().copied();
            let next = timer.map(|t| t.0).into_iter().chain(event.map(|e| e.0)).min();
            let Some(next) = next.filter(|t| *t <= end) else {
                self.now = end;
                return done(self);
            };
            self.now = self.now.max(next);
            if let Some(event) =
                event.filter(|e| e.0 <= self.now).and_then(|k| self.queue.remove(&k))
            {
                self.happens(event);
            } else if let Some((_, i)) = timer {
                self.trace.moment(self.now, 255, i);
                self.act(i, Core::timer);
            }
            self.judge(Invariant::OneCopy, check::one_copy::holds(self));
        }
        true
    }

    fn tell_log(&self, what: impl FnOnce() -> String) {
        if self.log {
            let text: String = what().chars().take(300).collect();
            eprintln!("{:>10.3} {text}", self.now.0 as f64 / 1e6);
        }
    }

    /// Runs for `ms`.
    pub fn run(&mut self, ms: u64) {
        self.run_until(ms, |_| false);
    }

    /// When a node's core wants to be woken, in the world's time.
    fn timer(&self, i: usize) -> Option<Time> {
        let node = &self.nodes[i];
        let due = node.clock.when(node.core.as_ref()?.poll_timeout());
        let stuck = self.mutant == Mutant::Sleepy && node.is_bound();
        (!stuck).then(|| due.max(node.awake))
    }

    fn happens(&mut self, event: Event) {
        if let Some(awake) = event.node().map(|i| self.nodes[i].awake).filter(|t| *t > self.now) {
            return self.put(awake, event);
        }
        self.trace.moment(self.now, event.kind(), event.node().unwrap_or(usize::MAX));
        self.tell_log(|| format!("{event:?}"));
        match event {
            Event::Deliver(from, to, message) => self.deliver(from, to, *message),
            Event::Restart(i) => self.restart(i),
            Event::Happened(i, start, id, happened) if self.nodes[i].start == start => {
                self.act(i, |core, now| core.happened(now, id, *happened));
            }
            Event::Flush(i, start) if self.nodes[i].start == start => self.flush(i),
            Event::Cut(from, to) => {
                if self.cut.insert((from, to)) {
                    self.seen.partitions += 1;
                    self.strikes();
                }
            }
            Event::Heal => self.cut.clear(),
            Event::Crash(i, ms) => self.crash(i, ms),
            Event::Pause(i, ms) => self.pause(i, ms),
            Event::LoseStore(i) => self.lose_store(i),
            Event::Stranger(to, message) => self.stranger(to, *message),
            Event::Ask(n) => {
                let others = self.nodes.len() as u64 - 1;
                let first = self.below(others) as usize;
                self.ask(n, |k| (first + k) % others as usize);
            }
            Event::AskCluster(n, to, tries) => {
                // Refused while an earlier move is under way: asked again soon.
                if !self.ask_cluster(n, &to) && tries > 0 {
                    self.at(400, Event::AskCluster(n, to, tries - 1));
                }
            }
            Event::Abort(n) => {
                for i in 0..self.nodes.len() {
                    self.act(i, |core, now| core.abort(now, migration(n)));
                }
            }
            Event::Start(vm, tries) => {
                if !self.turn_on(vm) && tries > 0 {
                    self.at(700, Event::Start(vm, tries - 1));
                }
            }
            Event::Rewire(vm) => self.rewire(vm),
            Event::Follow(i, start, copy) if self.nodes[i].start == start => {
                self.follow_newest(i, copy);
            }
            Event::Boot(i, start, copy) if self.nodes[i].start == start => {
                if !self.step(i) {
                    self.boot_copy(i, copy);
                    self.step(i);
                }
            }
            other => self.handle_qemu(other),
        }
    }
}
