//! One NIC that moves while others send to its guest: the production code of both ends, in virtual time.
//!
//! Owns senders, links that keep their order, the taps, and what goes wrong: a tail that breaks off for a time or for good,
//! markers that are lost, routes that are told late, holds that are too small, a move that ends with *stay*, and the
//! daemon of one end that dies and starts again: its hold ends with it, a plug is taken off when it takes the guest up.

use std::collections::{BTreeMap, VecDeque};

use godwit_protocol::cutover::{Arrival, Counts, Departure, Output};
use godwit_protocol::id::HostId;
use godwit_protocol::time::Time;
use godwit_protocol::wire::tail::Item;

use super::check::{self, Invariant};
use super::faults::Faults;
use super::mutant::Mutant;
use super::world::{World, host};

/// A frame: its sender and number, and so many bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The host whose guest sent it.
    pub from: usize,
    /// Its number among those of this sender.
    pub number: u16,
}

impl AsRef<[u8]> for Frame {
    fn as_ref(&self) -> &[u8] {
        &[0; 60]
    }
}

/// The hosts that the NIC leaves and comes to.
const OLD: usize = 0;
const NEW: usize = 1;
/// Everyone sends for so long, milliseconds, one frame each.
const SENDS_MS: u64 = 400;
/// Then everything must have come through.
const END_MS: u64 = 20_000;

enum Event {
    Emit(usize),
    Hold,
    Stop,
    Stay,
    Runs,
    Route(usize),
    AtOld(Frame),
    Marker(usize),
    AtNew(usize, Frame),
    /// By which stream, and its number.
    Tail(u32, u64, Item<Frame>),
    Acknowledged(u32, u64),
    TailBreaks,
    TailOpens,
    /// The daemon of that end.
    Dies(usize),
    Starts(usize),
}

struct Nic {
    now_ms: u64,
    mutant: Mutant,
    delay: Vec<[u64; 2]>,
    tail_delay: u64,
    lost_marker: Option<usize>,
    limit: usize,
    old: Option<Departure<Frame>>,
    new: Arrival<Frame>,
    stays: bool,
    /// The stream of the tail that is open, how many were, and the number of its next item.
    stream: Option<u32>,
    streams: u32,
    next: u64,
    /// It is not opened again.
    torn: bool,
    /// The end whose daemon died, and whether it still is away.
    died: Option<usize>,
    away: bool,
    /// What came by the tail.
    came: Vec<Frame>,
    /// What waits in the tap of the guest that stands still, as nothing holds it any more.
    unheld: Vec<Frame>,
    /// What was lost with a daemon.
    lost: Vec<Frame>,
    /// What machines that are gone had counted.
    counted: Counts,
    flipped: Vec<bool>,
    sent: Vec<u16>,
    plug: Option<VecDeque<Frame>>,
    got: Vec<Frame>,
    agenda: BTreeMap<(u64, u64), Event>,
    number: u64,
}

/// Runs the seed of that world to its end.
#[must_use]
pub fn run(seed: u64, mutant: Mutant) -> World {
    let mut world = World::empty(1, seed, Faults::quiet());
    (world.strict, world.mutant) = (false, mutant);
    let mut nic = Nic::random(&mut world);
    nic.play(&mut world);
    let old = nic.old.as_ref().map(Departure::counts).unwrap_or_default();
    let counts = [old, nic.new.counts(), nic.counted];
    nic.lost.append(&mut nic.unheld);
    // Those that came and were not acknowledged are counted, too.
    let exact = !nic.torn && nic.died != Some(NEW);
    let found = check::frames::delivered(&nic.got, &nic.sent, &nic.lost, &counts, exact);
    world.judge(Invariant::Frames, found);
    nic.got.iter().for_each(|f| world.trace.moment(Time(u64::from(f.number)), 200, f.from));
    world
}

impl Nic {
    fn random(world: &mut World) -> Self {
        let hosts = 2 + world.below(4) as usize;
        let delay = (0..hosts).map(|_| [1 + world.below(90), 1 + world.below(90)]).collect();
        let stays = world.chance(0.25);
        let small = world.chance(0.15);
        let lost_marker =
            if world.chance(0.2) { Some(world.below(hosts as u64) as usize) } else { None };
        let limit = if small { 60 * (1 + world.below(40) as usize) } else { 1 << 20 };
        let mut this = Self {
            now_ms: 0,
            mutant: world.mutant,
            delay,
            tail_delay: 1 + world.below(90),
            lost_marker,
            limit,
            old: None,
            new: Arrival::new(limit),
            stays,
            stream: None,
            streams: 0,
            next: 0,
            torn: false,
            died: None,
            away: false,
            came: Vec::new(),
            unheld: Vec::new(),
            lost: Vec::new(),
            counted: Counts::default(),
            flipped: vec![false; hosts],
            sent: vec![0; hosts],
            plug: Some(VecDeque::new()),
            got: Vec::new(),
            agenda: BTreeMap::new(),
            number: 0,
        };
        (0..hosts).for_each(|from| this.at(0, Event::Emit(from)));
        this.at(0, Event::TailOpens);
        let hold = 20 + world.below(60);
        let stop = hold + 1 + world.below(20);
        let runs = stop + 5 + world.below(200);
        this.at(hold, Event::Hold);
        this.at(stop, Event::Stop);
        this.at(runs, if stays { Event::Stay } else { Event::Runs });
        if !stays {
            for to in (0..hosts).filter(|to| *to != NEW) {
                let late = if world.chance(0.1) { world.below(2500) } else { 0 };
                this.at(runs + this.delay[to][NEW] + late, Event::Route(to));
            }
        }
        if world.chance(0.2) {
            let breaks = stop + world.below(400);
            this.at(breaks, Event::TailBreaks);
            this.torn = world.chance(0.3);
            if !this.torn {
                this.at(breaks + 1 + world.below(600), Event::TailOpens);
            }
        }
        if world.chance(0.25) {
            let end = if stays || world.chance(0.5) { OLD } else { NEW };
            // The old one before the guest runs or after, the new one after.
            let from = if end == OLD { stop } else { runs };
            let most = if stays { runs - from } else { runs - from + 400 };
            let dies = from + world.below(most);
            this.at(dies, Event::Dies(end));
            this.at(dies + 50 + world.below(1500), Event::Starts(end));
            world.seen.crashes += 1;
        }
        this
    }

    fn at(&mut self, ms: u64, event: Event) {
        self.number += 1;
        self.agenda.insert((ms, self.number), event);
    }

    fn play(&mut self, world: &mut World) {
        while let Some(next) = self.agenda.first_entry() {
            let ms = next.key().0;
            // Deadlines ring between what happens.
            for due in self.now_ms..ms.min(END_MS) {
                self.now_ms = due;
                self.settle();
            }
            let Some((_, event)) = self.agenda.pop_first() else { break };
            self.now_ms = ms;
            world.trace.moment(Time(ms * 1000), 201, self.got.len());
            self.handle(event);
            self.settle();
        }
        for ms in self.now_ms..END_MS {
            self.now_ms = ms;
            self.settle();
        }
        // What the deadlines set going.
        while let Some((_, event)) = self.agenda.pop_first() {
            self.handle(event);
            self.settle();
        }
    }

    fn now(&self) -> Time {
        Time(self.now_ms * 1000)
    }

    fn is_away(&self, end: usize) -> bool {
        self.away && self.died == Some(end)
    }

    fn at_old(&mut self, frame: Frame) {
        let (away, passes) = (self.is_away(OLD), self.flipped[OLD]);
        match &mut self.old {
            Some(old) => old.frame(frame),
            None if self.died != Some(OLD) => self.got.push(frame),
            // Nobody takes it out of the tunnel.
            None if away && frame.from != OLD => self.lost.push(frame),
            None if passes => {
                self.at(self.now_ms + self.delay[OLD][NEW], Event::AtNew(OLD, frame));
            }
            None => self.unheld.push(frame),
        }
    }

    fn at_new(&mut self, by: usize, frame: Frame) {
        match self.died {
            Some(NEW) if self.away => self.lost.push(frame),
            Some(NEW) => self.got.push(frame),
            _ => self.new.fresh(host(by), frame),
        }
    }

    /// The daemon of that end dies: what its machine holds is lost, and nobody goes on with it.
    fn dies(&mut self, end: usize) {
        (self.died, self.away, self.stream) = (Some(end), true, None);
        self.new.tail_broken(self.now());
        if end == NEW {
            let mut new = std::mem::replace(&mut self.new, Arrival::new(self.limit));
            self.gone(new.counts());
            new.tail_lost();
            while let Some(output) = new.poll_output(true) {
                if let Output::Inject(frame) = output {
                    self.lost.push(frame);
                }
            }
        } else if let Some(mut old) = self.old.take() {
            self.gone(old.counts());
            // What has come to the new host is there when the guest runs.
            let there = |frame: &Frame| !self.stays && self.came.contains(frame);
            self.lost.extend(old.stay().into_iter().filter(|frame| !there(frame)));
        }
    }

    fn gone(&mut self, counts: Counts) {
        self.counted.dropped += counts.dropped;
        self.counted.late |= counts.late;
    }

    fn emit(&mut self, from: usize) {
        let frame = Frame { from, number: self.sent[from] };
        self.sent[from] += 1;
        let ms = self.now_ms;
        match (from, self.flipped[from]) {
            (OLD, false) => self.at_old(frame),
            (NEW, true) => match &mut self.plug {
                Some(plug) => plug.push_back(frame),
                None => self.got.push(frame),
            },
            (_, false) => self.at(ms + self.delay[from][OLD], Event::AtOld(frame)),
            (_, true) if self.is_away(from) => self.lost.push(frame),
            (_, true) => self.at(ms + self.delay[from][NEW], Event::AtNew(from, frame)),
        }
        if ms < SENDS_MS {
            self.at(ms + 1, Event::Emit(from));
        }
    }

    fn flip(&mut self, from: usize) {
        self.flipped[from] = true;
        if self.lost_marker != Some(from) {
            self.at(self.now_ms + self.delay[from][OLD], Event::Marker(from));
        }
    }

    fn others(&self) -> Vec<HostId> {
        (1..self.sent.len()).map(host).collect()
    }

    fn handle(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Emit(from) => self.emit(from),
            Event::Hold => self.old = Some(Departure::new(self.limit)),
            Event::Stop => {
                if let Some(old) = &mut self.old {
                    old.stopped(Vec::new(), 0);
                }
            }
            // It is for a daemon to do, and to hear.
            Event::Stay | Event::Route(OLD) if self.is_away(OLD) => self.at(self.now_ms + 1, event),
            Event::Stay => {
                // What was held goes into the own tap, and the next comes there by itself.
                if let Some(mut old) = self.old.take() {
                    self.got.extend(old.stay());
                    self.gone(old.counts());
                }
                self.got.append(&mut self.unheld);
                self.died = None;
            }
            Event::Runs => {
                if self.mutant == Mutant::UnplugEarly {
                    self.unplug();
                }
                self.new.runs(now, [host(NEW)]);
                self.flip(NEW);
            }
            Event::Route(OLD) => {
                let others = self.others();
                match &mut self.old {
                    Some(old) => old.moved(now, others),
                    None => self.flipped[OLD] = true,
                }
            }
            Event::Route(from) => self.flip(from),
            Event::AtOld(frame) => self.at_old(frame),
            Event::Marker(from) => {
                if let Some(old) = &mut self.old {
                    old.marker(host(from));
                }
            }
            Event::AtNew(by, frame) => self.at_new(by, frame),
            Event::Dies(end) => self.dies(end),
            Event::Starts(end) => {
                self.away = false;
                if end == NEW {
                    self.unplug();
                }
            }
            tail => self.handle_tail(tail),
        }
    }

    fn handle_tail(&mut self, event: Event) {
        match event {
            Event::Tail(stream, number, item) if self.stream == Some(stream) && !self.stays => {
                if let Item::Frame(frame) = &item {
                    self.came.push(frame.clone());
                }
                self.new.tail(self.now(), number, item);
                let heard = Event::Acknowledged(stream, number + 1);
                self.at(self.now_ms + self.tail_delay, heard);
            }
            Event::Acknowledged(stream, came) if self.stream == Some(stream) => {
                if let Some(old) = &mut self.old {
                    old.acknowledged(came);
                }
            }
            Event::TailBreaks => {
                self.stream = None;
                self.new.tail_broken(self.now());
            }
            Event::TailOpens if self.died.is_none() => {
                self.streams += 1;
                self.stream = Some(self.streams);
                self.next = self.new.tail_opened();
                if self.old.as_mut().is_some_and(|old| !old.resumed(self.next)) {
                    self.stream = None;
                }
            }
            _ => {}
        }
    }

    fn unplug(&mut self) {
        self.got.extend(self.plug.take().into_iter().flatten());
    }

    fn settle(&mut self) {
        let now = self.now();
        if let Some(old) = &mut self.old {
            old.handle_timeout(now);
            if old.close_due(now) {
                self.flipped[OLD] = true;
                old.close();
            }
            while let Some(stream) = self.stream
                && let Some(item) = self.old.as_mut().and_then(Departure::next_item)
            {
                let number = self.next;
                self.next += 1;
                self.at(self.now_ms + self.tail_delay, Event::Tail(stream, number, item));
            }
        }
        self.new.handle_timeout(now);
        while let Some(output) = self.new.poll_output(true) {
            match output {
                Output::Inject(frame) => self.got.push(frame),
                Output::Unplug => self.unplug(),
                Output::Over => {}
            }
        }
    }
}
