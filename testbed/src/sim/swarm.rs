//! A large swarm: how long a change of a route takes to reach everyone, and what it costs.
//!
//! Owns the hosts' routing tables (the production ones), latencies and losses. A route change is one
//! guest that moved: its new host tells everyone, and whom that does not reach learns it by comparing.

use std::collections::BTreeMap;

use godwit_protocol::id::{CopyId, Epoch, HostId, VmId};
use godwit_protocol::route::{Output, Routes};
use godwit_protocol::time::Time;
use godwit_protocol::wire::codec;
use godwit_protocol::wire::route::{Kind, Message, Route};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Median latency of a message, milliseconds.
const MEDIAN_MS: f64 = 50.0;
/// Messages that are lost.
const LOSS: f64 = 0.02;
/// Guests of each host.
const GUESTS: usize = 4;
/// What a host sends on takes its time, bytes per millisecond: 100 Mbit/s.
const UPLINK: u64 = 12_500;
/// 99 of 100 hosts must know a change by then, milliseconds.
pub const MOST_MS: u64 = 2000;
/// How long after the change the swarm is watched, milliseconds.
const WATCHED_MS: u64 = 20_000;

/// What was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spread {
    /// Hosts.
    pub hosts: usize,
    /// Routes of the table.
    pub routes: usize,
    /// Until half of all hosts knew, milliseconds.
    pub half_ms: u64,
    /// Until 99 of 100 did.
    pub most_ms: u64,
    /// Until all did.
    pub all_ms: u64,
    /// Messages that the change cost until then.
    pub messages: u64,
    /// Bytes of all messages in the watched time, of one host on average and second.
    pub host_bytes_per_s: u64,
}

struct Swarm {
    now: Time,
    rng: StdRng,
    hosts: Vec<Routes>,
    /// When a host's link is free again.
    free: Vec<Time>,
    queue: BTreeMap<(Time, u64), (usize, usize, Message)>,
    timers: BTreeMap<(Time, usize), ()>,
    number: u64,
    messages: u64,
    bytes: u64,
}

fn host(i: usize) -> HostId {
    let mut id = [7; 32];
    id[..8].copy_from_slice(&(i as u64).to_be_bytes());
    HostId(id)
}

fn index(host: HostId) -> usize {
    host.0[..8].iter().fold(0, |n, b| n << 8 | usize::from(*b))
}

fn route(k: usize, at: usize, epoch: u64) -> Option<Route> {
    let vm = VmId((k as u128 + 1).to_be_bytes());
    let name = format!("vm-{k}").parse().ok()?;
    let (host, copy, epoch) = (host(at), CopyId(vm.0), Epoch(epoch));
    Some(Route { vm, name, host, copy, epoch, nics: Vec::new(), kind: Kind::Vm, gone: false })
}

impl Swarm {
    /// Hosts that know each other and every guest.
    fn new(hosts: usize, seed: u64) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        let mut this = Self {
            now: Time(0),
            rng,
            hosts: Vec::new(),
            free: vec![Time(0); hosts],
            queue: BTreeMap::new(),
            timers: BTreeMap::new(),
            number: 0,
            messages: 0,
            bytes: 0,
        };
        let all: Vec<Route> = (0..hosts * GUESTS).filter_map(|k| route(k, k / GUESTS, 1)).collect();
        for i in 0..hosts {
            // They did not all start at the same moment.
            let start = Time(this.rng.random_range(0..2_000_000));
            let mut routes = Routes::new(host(i), i as u64 + seed, start);
            routes.handle(host(i), Message::Push(all.clone()));
            routes.set_peers((0..hosts).map(host));
            while routes.poll_output().is_some() {}
            this.hosts.push(routes);
            this.arm(i);
        }
        this
    }

    fn arm(&mut self, i: usize) {
        if let Some(at) = self.hosts[i].poll_timeout() {
            self.timers.insert((at, i), ());
        }
    }

    /// Lognormal, with the median and a tail that is three times as long once in forty.
    fn latency_us(&mut self) -> u64 {
        let sum: f64 = (0..12).map(|_| self.rng.random_range(0.0..1.0)).sum();
        (MEDIAN_MS * 1000.0 * (0.55 * (sum - 6.0)).exp()) as u64
    }

    fn drain(&mut self, i: usize) {
        while let Some(output) = self.hosts[i].poll_output() {
            let Output::Send { to, message } = output else { continue };
            let bytes = codec::encode(&message, usize::MAX).map_or(0, |b| b.len() as u64);
            self.messages += 1;
            self.bytes += bytes;
            // One link, one message after the other; then on its way.
            let sent = Time(self.free[i].max(self.now).0 + bytes * 1000 / UPLINK);
            self.free[i] = sent;
            if !self.rng.random_bool(LOSS) {
                let at = Time(sent.0 + self.latency_us());
                self.number += 1;
                self.queue.insert((at, self.number), (i, index(to), message));
            }
        }
    }

    /// The next thing that happens, unless it is later than `end`.
    fn step(&mut self, end: Time) -> bool {
        let message = self.queue.keys().next().copied();
        let timer = self.timers.keys().next().copied();
        let next = message.map(|k| k.0).into_iter().chain(timer.map(|k| k.0)).min();
        let Some(next) = next.filter(|t| *t <= end) else { return false };
        self.now = next;
        if let Some((from, to, message)) =
            message.filter(|k| k.0 <= next).and_then(|k| self.queue.remove(&k))
        {
            self.hosts[to].handle(host(from), message);
            self.drain(to);
        } else if let Some(key) = timer {
            self.timers.remove(&key);
            self.hosts[key.1].handle_timeout(next);
            self.drain(key.1);
            self.arm(key.1);
        }
        true
    }
}

/// One guest moves in a swarm of so many hosts; how the word of it spreads.
#[must_use]
pub fn spread(hosts: usize, seed: u64) -> Spread {
    let mut swarm = Swarm::new(hosts, seed);
    while swarm.step(Time(3_000_000)) {}
    (swarm.messages, swarm.bytes) = (0, 0);
    let began = swarm.now;
    let to = hosts / 2;
    let vm = VmId(1_u128.to_be_bytes());
    if let Some(moved) = route(0, to, 2) {
        // The table has room: it is not refused.
        let _ = swarm.hosts[to].put(moved);
    }
    swarm.drain(to);
    let (mut knows, mut reached) = (vec![false; hosts], Vec::new());
    let mut messages = 0;
    let end = Time(began.0 + WATCHED_MS * 1000);
    loop {
        for i in (0..hosts).filter(|i| !knows[*i]).collect::<Vec<_>>() {
            if swarm.hosts[i].get(vm).is_some_and(|r| r.epoch == Epoch(2)) {
                knows[i] = true;
                reached.push(swarm.now.ms_since(began));
                messages = swarm.messages;
            }
        }
        if !swarm.step(end) {
            break;
        }
    }
    let by = |part: usize| {
        let needed = (hosts * part).div_ceil(100).max(1);
        reached.get(needed - 1).copied().unwrap_or(u64::MAX)
    };
    let host_bytes_per_s = swarm.bytes * 1000 / WATCHED_MS / hosts as u64;
    Spread {
        hosts,
        routes: hosts * GUESTS,
        half_ms: by(50),
        most_ms: by(99),
        all_ms: by(100),
        messages,
        host_bytes_per_s,
    }
}
