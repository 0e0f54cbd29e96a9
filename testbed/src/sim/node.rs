//! A host: its disk, its clock, and the start and end of its process.
//!
//! Owns what survives a crash. A write is on the disk before the next command is performed; a crash
//! during one leaves it there, or not, or torn, which the store undoes.

use std::collections::{BTreeMap, VecDeque};

use godwit_protocol::core::{Command, Config, Core, Key, Value};
use godwit_protocol::epoch::Hard;
use godwit_protocol::id::{CopyId, MigrationId, StoreId, VmId};
use godwit_protocol::migrate::Effect;
use godwit_protocol::time::Time;
use godwit_protocol::wire::migrate::Status;

use super::check::{self, Invariant};
use super::event::Event;
use super::mutant::Mutant;
use super::qemu::Qemu;
use super::world::{World, host};

/// A host's clock: it reads something when its process starts, and is too fast or too slow.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock {
    /// When the process started.
    pub from: Time,
    /// What it read then.
    pub read: Time,
    /// How much faster than true it runs, parts per million.
    pub fast_ppm: i64,
}

impl Clock {
    /// What it reads at a moment.
    #[must_use]
    pub fn read(&self, at: Time) -> Time {
        let us = i128::from(at.0.saturating_sub(self.from.0));
        let us = us * i128::from(1_000_000 + self.fast_ppm) / 1_000_000;
        Time(self.read.0.saturating_add(u64::try_from(us).unwrap_or(0)))
    }

    /// The first moment at which it reads that.
    #[must_use]
    pub fn when(&self, reading: Time) -> Time {
        let us = i128::from(reading.0.saturating_sub(self.read.0)) * 1_000_000;
        let rate = i128::from(1_000_000 + self.fast_ppm);
        let us = u64::try_from((us + rate - 1) / rate).unwrap_or(u64::MAX);
        Time(self.from.0.saturating_add(us))
    }
}

/// A host.
pub struct Node {
    /// Its process, if it is up.
    pub core: Option<Core>,
    /// Which start of the process this is.
    pub start: u64,
    /// Its store's id.
    pub store: StoreId,
    /// What is on its disk.
    pub disk: BTreeMap<Key, Value>,
    /// Writes that are late ([`Mutant::VoteEarly`]).
    pub late: Vec<(Key, Option<Value>)>,
    /// What the workers of its migrations have to do.
    pub work: BTreeMap<MigrationId, VecDeque<(VmId, Effect)>>,
    /// Streams that leave.
    pub sending: BTreeMap<MigrationId, (VmId, usize)>,
    /// Copies that streams come in for.
    pub receiving: BTreeMap<MigrationId, CopyId>,
    /// How many steps it has done.
    pub steps: u64,
    /// It dies before this one.
    pub crash_at: Option<u64>,
    /// Its clock.
    pub clock: Clock,
    /// How much slower than others it is, milliseconds for each thing it does.
    pub lag_ms: u64,
    /// It does nothing before.
    pub awake: Time,
}

impl Node {
    /// A host that is off, with an empty disk.
    #[must_use]
    pub fn new(store: StoreId) -> Self {
        Self {
            core: None,
            start: 0,
            store,
            disk: BTreeMap::new(),
            late: Vec::new(),
            work: BTreeMap::new(),
            sending: BTreeMap::new(),
            receiving: BTreeMap::new(),
            steps: 0,
            crash_at: None,
            clock: Clock::default(),
            lag_ms: 0,
            awake: Time(0),
        }
    }

    /// Whether an end of a migration is bound here.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.disk.values().any(|v| matches!(v, Value::Moving(_)))
    }
}

impl World {
    /// One more step of a node: if it is its last, how long it stays away.
    pub(super) fn dies(&mut self, i: usize) -> Option<u64> {
        let node = &mut self.nodes[i];
        node.steps += 1;
        if node.crash_at == Some(node.steps) {
            return Some(1000);
        }
        self.chance(self.faults.crash).then(|| 20 + self.below(8000))
    }

    /// One more step of a node; true if it was its last.
    pub(super) fn step(&mut self, i: usize) -> bool {
        let dies = self.dies(i);
        dies.into_iter().for_each(|ms| self.crash(i, ms));
        dies.is_some()
    }

    /// A node dies, and comes back after so long.
    pub fn crash(&mut self, i: usize, for_ms: u64) {
        if self.nodes[i].core.is_none() {
            return;
        }
        self.seen.crashes += 1;
        self.strikes();
        let old = &mut self.nodes[i];
        let disk = core::mem::take(&mut old.disk);
        let (start, steps, clock, lag_ms) = (old.start + 1, old.steps, old.clock, old.lag_ms);
        let fresh = Node::new(old.store);
        *old = Node { start, disk, steps, clock, lag_ms, ..fresh };
        self.node_gone(i);
        self.at(for_ms, Event::Restart(i));
    }

    /// A node does nothing for so long; what comes meanwhile waits.
    pub(super) fn pause(&mut self, i: usize, ms: u64) {
        self.seen.pauses += 1;
        self.strikes();
        self.nodes[i].awake = self.nodes[i].awake.max(self.now.plus_ms(ms));
    }

    /// Its disk cannot be read any more: it votes under another id, and knows nothing. Copies that no
    /// record names are ended when it starts.
    pub(super) fn lose_store(&mut self, i: usize) {
        self.crash(i, 3000);
        self.seen.torn_writes += 1;
        self.nodes[i].disk.clear();
        self.nodes[i].store.0[0] = self.nodes[i].store.0[0].wrapping_add(100);
        let here: Vec<VmId> = self.copies.values().filter(|c| c.at == i).map(|c| c.vm).collect();
        self.may_lose.extend(here);
    }

    /// A node died before this command was done.
    pub(super) fn interrupted(&mut self, i: usize, command: Command) {
        let Command::Persist(key, value) = command else { return };
        match self.below(3) {
            0 => self.persist(i, key, value),
            1 => self.seen.torn_writes += 1,
            _ => {}
        }
    }

    pub(super) fn persist(&mut self, i: usize, key: Key, value: Option<Value>) {
        if self.mutant == Mutant::Unbound && matches!(key, Key::Moving(_)) {
            return;
        }
        if let Some(value) = &value {
            let disk = &self.nodes[i].disk;
            self.judge(Invariant::Epochs, check::epochs::only_grow(disk.get(&key), value));
            self.learned(value);
        }
        if self.mutant == Mutant::VoteEarly && matches!(key, Key::Epoch(_)) {
            self.nodes[i].late.push((key, value));
            let (start, ms) = (self.nodes[i].start, self.below(500));
            return self.at(ms, Event::Flush(i, start));
        }
        match value {
            Some(value) => drop(self.nodes[i].disk.insert(key, value)),
            None => drop(self.nodes[i].disk.remove(&key)),
        }
    }

    /// [`Mutant::VoteEarly`].
    pub(super) fn flush(&mut self, i: usize) {
        for (key, value) in core::mem::take(&mut self.nodes[i].late) {
            drop(value.map(|v| self.nodes[i].disk.insert(key, v)));
        }
    }

    /// A record is decided as soon as one node holds it as such.
    fn learned(&mut self, value: &Value) {
        let Value::Epoch(hard) = value else { return };
        let record = hard.decided();
        let number = (record.cluster, record.epoch);
        let found = match self.decided.get(&number) {
            Some(known) => check::epochs::same(known, record),
            None => {
                self.seen.decided(record);
                drop(self.decided.insert(number, record.clone()));
                check::epochs::owned_once(self)
            }
        };
        self.judge(Invariant::Epochs, found);
    }

    /// A node starts, with what is on its disk and the QEMUs that are there.
    pub fn restart(&mut self, i: usize) {
        if self.nodes[i].core.is_some() {
            return;
        }
        if self.faults.drift {
            let read = Time(self.below(5_000_000));
            let fast_ppm = self.below(40_001) as i64 - 20_000;
            self.nodes[i].clock = Clock { from: self.now, read, fast_ppm };
        }
        let (moving, conts) = self.adopt(i);
        let mut hard = BTreeMap::new();
        let mut statuses: Vec<Status> = Vec::new();
        for value in self.nodes[i].disk.values() {
            match value {
                Value::Epoch(h) if self.mutant == Mutant::Forgets => {
                    drop(hard.insert(h.decided().cluster, Hard::new(h.decided().clone())));
                }
                Value::Epoch(h) => drop(hard.insert(h.decided().cluster, (**h).clone())),
                Value::Status(s) => statuses.push((**s).clone()),
                Value::Moving(_) => {}
            }
        }
        let config = Config {
            me: host(i),
            store: self.nodes[i].store,
            site: super::net::site(i),
            generation: self.now.0,
            seed: rand::RngExt::random(&mut self.rng),
            hard,
            moving,
            statuses,
        };
        let now = self.nodes[i].clock.read(self.now);
        self.nodes[i].core = Some(Core::new(now, config));
        for copy in conts {
            self.follow_newest(i, copy);
            self.run_copy(copy);
            self.announce_copy(i, copy);
        }
        self.tell_minted(i);
        for j in (0..self.nodes.len()).filter(|j| *j != i) {
            self.act(i, |core, now| core.connected(now, host(j)));
            self.act(j, |core, now| core.connected(now, host(i)));
        }
    }

    /// A fault strikes: is it inside a cutover?
    pub(super) fn strikes(&mut self) {
        let cluster = (2..=5).contains(&self.vms.len());
        if cluster && self.copies.values().any(|c| c.qemu == Qemu::Stopped) {
            self.seen.cutover_faults += 1;
        }
    }
}
