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
/// The first byte of the first sender's broadcasts.
const GROUP: u8 = 0x81;
/// When the guest begins to run at the new host, ms.
const RUNS: u64 = 100;
/// Each sender sends one frame a millisecond for so long.
const SENDS: u64 = 500;
const END: u64 = RUNS + LATE_MS + ORPHAN_MS;

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
    /// A broadcast comes to both.
    GroupAtOld(Frame),
    GroupAtNew(Frame),
    /// By which stream, and its number.
    Tail(u32, u64, Item<Frame>),
    Acknowledged(u32, u64),
    /// What is in the stream is lost.
    Break,
    Resume,
}

struct World {
    delay: [[u64; HOSTS]; HOSTS],
    tail_delay: u64,
    /// Which stream carries the tail, none while it is broken, and the number of its next item.
    stream: Option<u32>,
    streams: u32,
    next: u64,
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
        let to = |host| if from == host { 0 } else { self.delay[from][host] };
        let straight = to(NEW).min(to(OLD) + self.tail_delay + TWINS_MS);
        let group = [GROUP + 2 * from as u8, a, b];
        self.at(now + to(OLD), Event::GroupAtOld(group));
        self.at(now + straight, Event::GroupAtNew(group));
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
            Event::GroupAtOld(frame) if !self.flipped[OLD] => self.old.frame(frame),
            Event::GroupAtNew(frame) if now >= RUNS => self.new.group(frame),
            Event::GroupAtOld(_) | Event::GroupAtNew(_) => {}
            Event::Tail(stream, number, item) if self.stream == Some(stream) => {
                self.new.tail(time, number, item);
                self.at(now + self.tail_delay, Event::Acknowledged(stream, number + 1));
            }
            Event::Acknowledged(stream, came) if self.stream == Some(stream) => {
                self.old.acknowledged(came);
            }
            Event::Tail(..) | Event::Acknowledged(..) => {}
            Event::Break => {
                self.stream = None;
                self.new.tail_broken(time);
            }
            Event::Resume => {
                self.streams += 1;
                self.stream = Some(self.streams);
                self.next = self.new.tail_opened();
                assert!(self.old.resumed(self.next));
            }
        }
        self.settle(now);
    }

    fn settle(&mut self, now: u64) {
        self.old.handle_timeout(Time(now * 1000));
        if self.old.close_due(Time(now * 1000)) {
            self.flipped[OLD] = true;
            self.old.close();
        }
        while let Some(stream) = self.stream
            && let Some(item) = self.old.next_item()
        {
            self.at(now + self.tail_delay, Event::Tail(stream, self.next, item));
            self.next += 1;
        }
        self.new.handle_timeout(Time(now * 1000));
        while let Some(output) = self.new.poll_output(true) {
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
            stream: None,
            streams: 0,
            next: 0,
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
        world.at(0, Event::Resume);
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
        self.beginning_with(from as u8)
    }

    /// Of its broadcasts.
    fn groups_of(&self, from: usize) -> Vec<u16> {
        self.beginning_with(GROUP + 2 * from as u8)
    }

    fn beginning_with(&self, byte: u8) -> Vec<u16> {
        let ours = self.guest.iter().filter(|f| f[0] == byte);
        ours.map(|f| u16::from_be_bytes([f[1], f[2]])).collect()
    }

    fn brought_everything_in_order(&self) -> Result<(), TestCaseError> {
        for from in 0..HOSTS {
            let all: Vec<u16> = (0..self.sent[from]).collect();
            prop_assert_eq!(self.groups_of(from), all.as_slice(), "broadcasts of {}", from);
            prop_assert_eq!(self.of(from), all, "sender {}", from);
        }
        prop_assert_eq!((self.old.counts().dropped, self.new.counts().dropped), (0, 0));
        Ok(())
    }
}

fn delays() -> impl Strategy<Value = [[u64; HOSTS]; HOSTS]> {
    proptest::array::uniform4(proptest::array::uniform4(0_u64..400))
}

proptest! {
    #[test]
    fn every_frame_comes_once_and_in_order(delay in delays(), tail in 0_u64..400) {
        let world = World::run(delay, tail, |_| {});
        world.brought_everything_in_order()?;
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
    fn a_stream_that_breaks_and_is_opened_again_loses_nothing(
        delay in delays(), tail in 0_u64..200, breaks in 0_u64..SENDS, pause in 1..RESUME_MS / 2,
    ) {
        let world = World::run(delay, tail, |w| {
            for at in [breaks, breaks + pause + 200] {
                w.at(at, Event::Break);
                w.at(at + pause, Event::Resume);
            }
        });
        world.brought_everything_in_order()?;
        prop_assert!(!world.old.counts().late && !world.new.counts().late);
    }

    #[test]
    fn a_tail_that_comes_after_the_release_costs_order_at_most(
        delay in delays(), tail in RELEASE_MS..LATE_MS / 2 - RUNS,
    ) {
        let world = World::run(delay, tail, |_| {});
        for from in 0..HOSTS {
            for mut came in [world.of(from), world.groups_of(from)] {
                came.sort_unstable();
                prop_assert_eq!(came, (0..world.sent[from]).collect::<Vec<_>>());
            }
        }
        let counts = world.new.counts();
        prop_assert!(counts.late && counts.reordered > 0 && counts.dropped == 0);
    }

    #[test]
    fn a_lost_tail_loses_no_more_than_what_it_carried(
        delay in delays(), tail in 0_u64..400, at in 0_u64..SENDS,
    ) {
        let world = World::run(delay, tail, |w| w.at(at, Event::Break));
        for from in 0..HOSTS {
            for mut came in [world.of(from), world.groups_of(from)] {
                came.sort_unstable();
                prop_assert!(came.windows(2).all(|pair| pair[0] < pair[1]));
            }
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
    assert_eq!(old.counts(), Counts { held: 3, dropped: 1, ..Counts::default() });
    assert_eq!(old.stay(), [[0, 0, 0], [1, 0, 0], [2, 0, 0]]);
    old.frame([9, 0, 0]);
    assert!(old.is_over() && old.next_item().is_none());
    assert_eq!(old.counts().dropped, 2);
}

#[test]
fn a_new_host_that_never_runs_injects_nothing_and_holds_no_more_than_its_bound() {
    let mut new = Arrival::new(6);
    for n in 0..4 {
        new.tail(Time(0), u64::from(n), Item::Frame([n, 0, 0]));
    }
    new.fresh(host(3), [7, 7, 7]);
    new.tail(Time(0), 4, Item::End);
    new.handle_timeout(Time(u64::MAX));
    assert_eq!((new.poll_output(true), new.timeout()), (None, None));
    assert_eq!(new.counts(), Counts { held: 2, dropped: 3, ..Counts::default() });
    new.runs(Time(0), [host(NEW)]);
    let outputs: Vec<_> = std::iter::from_fn(|| new.poll_output(true)).collect();
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
    assert!(!old.is_over(), "nobody has heard it");
    old.acknowledged(1);
    assert!(old.is_over());
}

#[test]
fn what_the_tap_has_no_room_for_is_kept_within_the_bound_and_not_for_ever() {
    let mut new = Arrival::new(9);
    assert_eq!(new.tail_opened(), 0);
    new.tail(Time(0), 0, Item::Frame([0; 3]));
    new.runs(Time(0), [host(NEW)]);
    new.tail(Time(0), 1, Item::Frame([1; 3]));
    new.tail(Time(0), 1, Item::Frame([1; 3]));
    new.tail(Time(0), 2, Item::Marker(host(NEW)));
    new.fresh(host(NEW), [2; 3]);
    new.fresh(host(NEW), [3; 3]);
    assert_eq!((new.counts().dropped, new.bytes_held()), (1, 9));
    assert_eq!(new.poll_output(false), None);
    assert_eq!(new.poll_output(true), Some(Output::Inject([0; 3])));
    new.fresh(host(NEW), [4; 3]);
    new.tail(Time(0), 3, Item::End);
    assert_eq!((new.counts().dropped, new.bytes_held()), (1, 9));
    assert_eq!(new.timeout(), Some(Time(LATE_MS * 1000)));
    new.handle_timeout(Time(LATE_MS * 1000));
    let outputs: Vec<_> = std::iter::from_fn(|| new.poll_output(false)).collect();
    assert_eq!(outputs, [Output::Unplug, Output::Over], "the plug is not for ever either");
    assert_eq!((new.counts().dropped, new.bytes_held()), (4, 0));
}

#[test]
fn a_tail_that_broke_holds_others_back_for_a_short_time() {
    let mut new: Arrival<Frame> = Arrival::new(9);
    new.tail_opened();
    new.tail_broken(Time(0));
    new.runs(Time(5_000_000), [host(NEW)]);
    assert_eq!(new.timeout(), Some(Time(5_000_000).plus_ms(RESUME_MS)));
    new.tail_opened();
    assert_eq!(new.timeout(), Some(Time(5_000_000).plus_ms(RELEASE_MS)));
    new.tail_broken(Time(6_000_000));
    new.handle_timeout(Time(6_000_000).plus_ms(RESUME_MS));
    let outputs: Vec<_> = std::iter::from_fn(|| new.poll_output(true)).collect();
    assert_eq!(outputs, [Output::Unplug]);
    assert_eq!(new.tail_opened(), 0);
    new.tail(Time(0), 0, Item::Frame([0; 3]));
    new.tail(Time(0), 1, Item::End);
    let outputs: Vec<_> = std::iter::from_fn(|| new.poll_output(true)).collect();
    assert_eq!(outputs, [Output::Inject([0; 3]), Output::Over]);
    assert_eq!(new.counts(), Counts { reordered: 1, late: true, ..Counts::default() });
}

#[test]
fn an_old_host_keeps_what_is_not_acknowledged_and_gives_up_in_the_end() {
    let mut old: Departure<Frame> = Departure::new(9);
    old.stopped(Vec::new(), 0);
    (0..3).for_each(|n| old.frame([n; 3]));
    while old.next_item().is_some() {}
    old.acknowledged(2);
    assert_eq!(old.bytes_held(), 9, "it may stay");
    old.moved(Time(0), [host(2)]);
    assert_eq!(old.bytes_held(), 3);
    assert!(!old.resumed(1) && !old.resumed(4) && old.resumed(2));
    assert_eq!(old.next_item(), Some(Item::Frame([2; 3])));
    assert!(old.close_due(Time(MARKERS_MS * 1000)));
    old.close();
    assert_eq!(old.timeout(), Some(Time(LATE_MS * 1000)));
    old.handle_timeout(Time(LATE_MS * 1000));
    assert!(old.is_over());
    old.acknowledged(4);
    assert_eq!((old.counts().dropped, old.bytes_held()), (1, 0));
}

#[test]
fn a_broadcast_that_came_by_both_ways_comes_once_and_equal_ones_as_often_as_they_were_sent() {
    let mut new: Arrival<Frame> = Arrival::new(1 << 10);
    let [a, b, c, d] = [1, 3, 5, 7].map(|byte| [byte; 3]);
    let inject = |frames: &[Frame]| frames.iter().copied().map(Output::Inject).collect::<Vec<_>>();
    let mut number = 0..;
    let mut tail = |new: &mut Arrival<Frame>, ms: u64, item| {
        new.tail(Time(ms * 1000), number.next().unwrap(), item);
    };
    new.tail_opened();
    // One of long ago has no other copy to come: what is equal to it is another.
    tail(&mut new, 0, Item::Frame(d));
    tail(&mut new, 200, Item::Frame(a));
    new.runs(Time(250_000), [host(NEW)]);
    [b, a, b, c, d].into_iter().for_each(|frame| new.group(frame));
    tail(&mut new, 260, Item::Frame(b));
    let outputs: Vec<_> = std::iter::from_fn(|| new.poll_output(true)).collect();
    assert_eq!(outputs, inject(&[d, a, b]), "what came here waits for the end");
    tail(&mut new, 270, Item::End);
    let outputs: Vec<_> = std::iter::from_fn(|| new.poll_output(true)).collect();
    let mut rest = inject(&[b, c, d]);
    rest.extend([Output::Unplug, Output::Over]);
    assert_eq!(outputs, rest);
    new.group(a);
    assert_eq!(new.poll_output(true), Some(Output::Inject(a)));
    assert_eq!((new.bytes_held(), new.counts().dropped), (0, 0));
}
