//! Both ends and their senders in virtual time: links keep their order and differ in delay.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::id::HostId;
use crate::time::Time;
use crate::wire::tail::Item;

/// Sender and number.
type Frame = [u8; 3];
const OLD: usize = 0;
const NEW: usize = 1;
const HOSTS: usize = 4;
/// When the guest begins to run at the new host, ms.
const RUNS: u64 = 100;
/// Each sender sends one frame a millisecond for so long.
const SENDS: u64 = 500;
const END: u64 = RUNS + RELEASE_MS + ORPHAN_MS;

fn host(n: usize) -> HostId {
    HostId([n as u8; 32])
}

enum Event {
    Emit(usize),
    /// The guest runs at the new host.
    Runs,
    /// The new route is known there.
    Route(usize),
    AtOld(Frame),
    Marker(usize),
    AtNew(usize, Frame),
    Tail(Item<Frame>),
    TailLost,
}

struct World {
    delay: [[u64; HOSTS]; HOSTS],
    tail_delay: u64,
    /// A sender whose marker is lost.
    mute: Option<usize>,
    old: Departure<Frame>,
    new: Arrival<Frame>,
    flipped: [bool; HOSTS],
    sent: [u16; HOSTS],
    plug: Option<VecDeque<Frame>>,
    guest: Vec<Frame>,
    agenda: BTreeMap<(u64, u64), Event>,
    order: u64,
}

impl World {
    fn at(&mut self, ms: u64, event: Event) {
        self.order += 1;
        self.agenda.insert((ms, self.order), event);
    }

    fn emit(&mut self, now: u64, from: usize) {
        let [a, b] = self.sent[from].to_be_bytes();
        let frame = [from as u8, a, b];
        self.sent[from] += 1;
        match (from, self.flipped[from]) {
            (OLD, false) => self.old.frame(frame),
            (NEW, true) => match &mut self.plug {
                Some(plug) => plug.push_back(frame),
                None => self.guest.push(frame),
            },
            (_, false) => self.at(now + self.delay[from][OLD], Event::AtOld(frame)),
            (_, true) => self.at(now + self.delay[from][NEW], Event::AtNew(from, frame)),
        }
        if now < SENDS {
            self.at(now + 1, Event::Emit(from));
        }
    }

    fn flip(&mut self, now: u64, from: usize) {
        self.flipped[from] = true;
        if self.mute != Some(from) {
            self.at(now + self.delay[from][OLD], Event::Marker(from));
        }
    }

    fn handle(&mut self, now: u64, event: Event) {
        let time = Time(now * 1000);
        match event {
            Event::Emit(from) => self.emit(now, from),
            Event::Runs => {
                self.new.runs(time, [host(NEW)]);
                self.flip(now, NEW);
                for to in [OLD, 2, 3] {
                    self.at(now + self.delay[NEW][to], Event::Route(to));
                }
            }
            Event::Route(OLD) => self.old.moved(time, [host(NEW), host(2), host(3)]),
            Event::Route(from) => self.flip(now, from),
            Event::AtOld(frame) => self.old.frame(frame),
            Event::Marker(from) => self.old.marker(host(from)),
            Event::AtNew(from, frame) => self.new.fresh(host(from), frame),
            Event::Tail(item) => self.new.tail(item),
            Event::TailLost => {
                self.old.tail_lost();
                self.new.tail_lost();
            }
        }
        self.settle(now);
    }

    fn settle(&mut self, now: u64) {
        if self.old.close_due(Time(now * 1000)) {
            self.flipped[OLD] = true;
            self.old.close();
        }
        while let Some(item) = self.old.next_item() {
            self.at(now + self.tail_delay, Event::Tail(item));
        }
        self.new.handle_timeout(Time(now * 1000));
        while let Some(output) = self.new.poll_output() {
            match output {
                Output::Inject(frame) => self.guest.push(frame),
                Output::Unplug => self.guest.extend(self.plug.take().unwrap()),
                Output::Over => assert!(self.plug.is_none()),
            }
        }
    }

    fn run(delay: [[u64; HOSTS]; HOSTS], tail_delay: u64, change: impl FnOnce(&mut Self)) -> Self {
        let mut world = Self {
            delay,
            tail_delay,
            mute: None,
            old: Departure::new(1 << 20),
            new: Arrival::new(1 << 20),
            flipped: [false; HOSTS],
            sent: [0; HOSTS],
            plug: Some(VecDeque::new()),
            guest: Vec::new(),
            agenda: BTreeMap::new(),
            order: 0,
        };
        (0..HOSTS).for_each(|from| world.at(0, Event::Emit(from)));
        world.old.stopped(Vec::new(), 0);
        world.at(RUNS, Event::Runs);
        change(&mut world);
        for now in 0..END {
            while let Some(next) = world.agenda.first_entry().filter(|e| e.key().0 <= now) {
                let event = next.remove();
                world.handle(now, event);
            }
            world.settle(now);
        }
        assert!(world.old.is_over() && world.new.is_over());
        assert_eq!((world.old.bytes_held(), world.new.bytes_held()), (0, 0));
        world
    }

    /// The numbers that came of one sender.
    fn of(&self, from: usize) -> Vec<u16> {
        let ours = self.guest.iter().filter(|f| usize::from(f[0]) == from);
        ours.map(|f| u16::from_be_bytes([f[1], f[2]])).collect()
    }
}

fn delays() -> impl Strategy<Value = [[u64; HOSTS]; HOSTS]> {
    proptest::array::uniform4(proptest::array::uniform4(0_u64..400))
}

proptest! {
    #[test]
    fn every_frame_comes_once_and_in_order(delay in delays(), tail in 0_u64..400) {
        let world = World::run(delay, tail, |_| {});
        for from in 0..HOSTS {
            let all: Vec<u16> = (0..world.sent[from]).collect();
            prop_assert_eq!(world.of(from), all, "sender {}", from);
        }
        prop_assert_eq!((world.old.counts().dropped, world.new.counts().dropped), (0, 0));
        prop_assert!(!world.old.counts().late && !world.new.counts().late);
    }

    #[test]
    fn a_lost_marker_costs_time_and_its_senders_order_at_most(
        delay in delays(), tail in 0_u64..400, mute in 1_usize..HOSTS,
    ) {
        let world = World::run(delay, tail, |w| w.mute = Some(mute));
        for from in 0..HOSTS {
            let mut came = world.of(from);
            prop_assert!(came.is_sorted() || from == mute);
            came.sort_unstable();
            prop_assert_eq!(came, (0..world.sent[from]).collect::<Vec<_>>());
        }
        prop_assert!(world.old.counts().late);
    }

    #[test]
    fn a_lost_tail_loses_no_more_than_what_it_carried(
        delay in delays(), tail in 0_u64..400, at in 0_u64..SENDS,
    ) {
        let world = World::run(delay, tail, |w| w.at(at, Event::TailLost));
        for from in 0..HOSTS {
            let came = world.of(from);
            prop_assert!(came.iter().all(|n| came.iter().filter(|m| *m == n).count() == 1));
        }
    }
}

#[test]
fn what_stays_gets_all_that_was_held_whether_it_was_sent_or_not() {
    let mut old = Departure::new(9);
    old.frame([1, 0, 0]);
    assert_eq!(old.next_item(), None, "something older may turn up");
    old.stopped(vec![[0, 0, 0]], 0);
    assert_eq!(old.next_item(), Some(Item::Frame([0, 0, 0])));
    assert_eq!(old.next_item(), Some(Item::Frame([1, 0, 0])));
    assert_eq!(old.next_item(), None);
    for n in 2..4 {
        old.frame([n, 0, 0]);
    }
    assert_eq!(old.counts(), Counts { held: 3, dropped: 1, late: false });
    assert_eq!(old.stay(), [[0, 0, 0], [1, 0, 0], [2, 0, 0]]);
    old.frame([9, 0, 0]);
    assert!(old.is_over() && old.next_item().is_none());
    assert_eq!(old.counts().dropped, 2);
}

#[test]
fn a_new_host_that_never_runs_injects_nothing_and_holds_no_more_than_its_bound() {
    let mut new = Arrival::new(6);
    for n in 0..4 {
        new.tail(Item::Frame([n, 0, 0]));
    }
    new.fresh(host(3), [7, 7, 7]);
    new.tail(Item::End);
    new.handle_timeout(Time(u64::MAX));
    assert_eq!((new.poll_output(), new.timeout()), (None, None));
    assert_eq!(new.counts(), Counts { held: 2, dropped: 3, late: false });
    new.runs(Time(0), [host(NEW)]);
    let outputs: Vec<_> = std::iter::from_fn(|| new.poll_output()).collect();
    let frame = |n| Output::Inject([n, 0, 0]);
    assert_eq!(outputs, [frame(0), frame(1), Output::Unplug, Output::Over]);
}

#[test]
fn an_old_host_that_hears_nothing_ends() {
    let mut old: Departure<Frame> = Departure::new(9);
    assert!(!old.close_due(Time(u64::MAX)));
    old.orphaned(Time(0));
    assert!(!old.close_due(Time(0)));
    assert!(old.close_due(Time(ORPHAN_MS * 1000)));
    assert!(!old.close_due(Time(ORPHAN_MS * 1000)));
    old.stopped(Vec::new(), 0);
    old.close();
    assert_eq!(old.next_item(), Some(Item::End));
    assert!(old.is_over());
}
