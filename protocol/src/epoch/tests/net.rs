//! A network in virtual time. A crash loses everything that was not performed yet: the state that
//! was not persisted, and every message after it. Every decision is checked as it is learned.

use rand::rngs::StdRng;

use super::*;

#[derive(Clone, Copy, Default)]
pub(super) struct Faults {
    pub(super) loss: f64,
    pub(super) double: f64,
    pub(super) crash: f64,
    pub(super) delay_ms: u64,
}

pub(super) enum Event {
    Deliver(u8, u8, Box<Message>),
    Restart(u8),
}

pub(super) struct Net {
    pub(super) now: Time,
    pub(super) nodes: Vec<Option<Epochs>>,
    pub(super) stores: Vec<(Voter, BTreeMap<VmId, Hard>)>,
    pub(super) queue: BTreeMap<(Time, u64), Event>,
    pub(super) number: u64,
    pub(super) rng: StdRng,
    pub(super) faults: Faults,
    /// Messages that match are kept here in place of the queue.
    pub(super) hold: fn(&Message) -> bool,
    pub(super) held: Vec<(u8, u8, Message)>,
    pub(super) decided: BTreeMap<Epoch, Record>,
    /// Per node: everything but `Send` and `Persist`.
    pub(super) log: Vec<Vec<Output>>,
}

impl Net {
    pub(super) fn new(nodes: u8, seed: u64, faults: Faults) -> Self {
        Self {
            now: Time(0),
            nodes: (0..nodes).map(|i| Some(Epochs::new(voter(i), seed, BTreeMap::new()))).collect(),
            stores: (0..nodes).map(|i| (voter(i), BTreeMap::new())).collect(),
            queue: BTreeMap::new(),
            number: 0,
            rng: StdRng::seed_from_u64(seed),
            faults,
            hold: |_| false,
            held: Vec::new(),
            decided: BTreeMap::new(),
            log: vec![Vec::new(); usize::from(nodes)],
        }
    }

    pub(super) fn quiet(nodes: u8) -> Self {
        Self::new(nodes, 1, Faults { delay_ms: 40, ..Faults::default() })
    }

    pub(super) fn chance(&mut self, p: f64) -> bool {
        use rand::RngExt;
        p > 0.0 && self.rng.random_bool(p)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        use rand::RngExt;
        self.rng.random_range(0..n)
    }

    pub(super) fn at(&mut self, ms: u64, event: Event) {
        self.number += 1;
        self.queue.insert((self.now.plus_ms(ms), self.number), event);
    }

    pub(super) fn crash(&mut self, i: u8, for_ms: u64) {
        self.nodes[usize::from(i)] = None;
        self.at(for_ms, Event::Restart(i));
    }

    pub(super) fn act<T>(&mut self, i: u8, f: impl FnOnce(&mut Epochs, Time) -> T) -> Option<T> {
        let now = self.now;
        let result = self.nodes[usize::from(i)].as_mut().map(|e| f(e, now));
        self.settle(i);
        result
    }

    pub(super) fn settle(&mut self, i: u8) {
        let n = usize::from(i);
        while let Some(output) = self.nodes[n].as_mut().and_then(Epochs::poll_output) {
            if self.chance(self.faults.crash) {
                let ms = 1 + self.below(2000);
                return self.crash(i, ms);
            }
            match output {
                Output::Persist { cluster, hard } => {
                    self.stores[n].1.insert(cluster, hard);
                }
                Output::Send { to, message } => self.send(i, to.0[0], message),
                Output::Decided(record) => {
                    let known = self.decided.entry(record.epoch).or_insert_with(|| record.clone());
                    assert_eq!(*known, record, "two records for one epoch");
                    let last = self.log[n].iter().rev().find_map(decided_epoch);
                    assert!(last.is_none_or(|l| l < record.epoch), "an epoch came back");
                    assert_eq!(self.stores[n].1[&VM].decided().epoch, record.epoch, "not durable");
                    self.log[n].push(Output::Decided(record));
                }
                other => self.log[n].push(other),
            }
        }
    }

    pub(super) fn send(&mut self, from: u8, to: u8, message: Message) {
        if (self.hold)(&message) {
            return self.held.push((from, to, message));
        }
        let copies = if self.chance(self.faults.double) { 2 } else { 1 };
        for _ in 0..copies {
            if !self.chance(self.faults.loss) {
                let ms = 1 + self.below(self.faults.delay_ms);
                self.at(ms, Event::Deliver(from, to, Box::new(message.clone())));
            }
        }
    }

    /// Runs until nothing is left to do, or for `ms`.
    pub(super) fn run(&mut self, ms: u64) {
        let end = self.now.plus_ms(ms);
        loop {
            let timer = self.nodes.iter().flatten().filter_map(Epochs::poll_timeout).min();
            let event = self.queue.keys().next().copied();
            let next = timer.into_iter().chain(event.map(|e| e.0)).min();
            let Some(next) = next.filter(|t| *t <= end) else { break };
            self.now = self.now.max(next);
            if let Some(key) = event.filter(|e| e.0 <= self.now) {
                match self.queue.remove(&key) {
                    Some(Event::Deliver(from, to, m)) => {
                        self.act(to, |e, now| e.handle(now, host(from), *m));
                    }
                    Some(Event::Restart(i)) => self.restart(i),
                    None => {}
                }
            } else {
                for i in 0..self.nodes.len() as u8 {
                    self.act(i, Epochs::handle_timeout);
                }
            }
        }
        self.now = self.now.max(end);
    }

    pub(super) fn restart(&mut self, i: u8) {
        let (me, hard) = self.stores[usize::from(i)].clone();
        let seed = self.now.0;
        self.nodes[usize::from(i)].get_or_insert_with(|| Epochs::new(me, seed, hard));
    }

    pub(super) fn release(&mut self) {
        self.hold = |_| false;
        for (from, to, message) in core::mem::take(&mut self.held) {
            self.act(to, |e, now| e.handle(now, host(from), message));
        }
    }

    pub(super) fn newest(&self, i: u8) -> Option<&Record> {
        self.nodes[usize::from(i)].as_ref().and_then(|e| e.newest(VM))
    }

    pub(super) fn create(&mut self, voters: &[u8]) -> Record {
        let first = record(1, voters, 0, 0, Cause::Create);
        self.act(0, |e, now| e.create(now, first.clone())).unwrap().unwrap();
        self.run(500);
        first
    }
}

fn decided_epoch(output: &Output) -> Option<Epoch> {
    match output {
        Output::Decided(record) => Some(record.epoch),
        _ => None,
    }
}
