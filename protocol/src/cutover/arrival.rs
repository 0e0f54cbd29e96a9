//! The host that a NIC comes to: older frames first, fresh ones when their sender is released.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::twins::{Twins, Way};
use super::{Counts, LATE_MS, RELEASE_MS, RESUME_MS, TWINS_MS};
use crate::id::HostId;
use crate::limits::MEMBERS;
use crate::time::Time;
use crate::wire::tail::Item;

/// What the caller has to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output<F> {
    /// Put this into the tap, past the plug.
    Inject(F),
    /// Take the plug off the tap: whoever sends through this host's kernel is released.
    Unplug,
    /// All senders are released: fresh frames need no holding any more, nor broadcasts.
    Over,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Waiting,
    /// The guest runs since then.
    Running(Time),
    /// And all senders are released, but the tail has not ended.
    Late(Time),
    Over,
}

/// One NIC that comes. `F` is a frame.
#[derive(Debug)]
pub struct Arrival<F> {
    state: State,
    /// The tail, until the guest runs, and when it came.
    tail: VecDeque<(Time, Item<F>)>,
    /// How many items of the tail have come.
    came: u64,
    /// There is no stream that brings the tail, since then.
    broken: Option<Time>,
    /// Senders whose frames wait in the kernel, behind the plug.
    kernel: BTreeSet<HostId>,
    plugged: bool,
    /// Fresh frames of the others.
    fresh: BTreeMap<HostId, VecDeque<F>>,
    /// Broadcasts and multicasts that came here.
    groups: VecDeque<F>,
    twins: Twins,
    marked: BTreeSet<HostId>,
    /// Senders whose markers wait in the tail.
    coming: BTreeSet<HostId>,
    quiet: bool,
    /// Of all frames that are here, `outputs` included.
    bytes: usize,
    limit: usize,
    counts: Counts,
    outputs: VecDeque<Output<F>>,
    /// When what the guest has not taken is given up.
    last: Option<Time>,
}

impl<F: AsRef<[u8]>> Arrival<F> {
    /// Holds at most `limit` bytes. The tap is plugged.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            state: State::Waiting,
            tail: VecDeque::new(),
            came: 0,
            broken: Some(Time(0)),
            kernel: BTreeSet::new(),
            plugged: true,
            fresh: BTreeMap::new(),
            groups: VecDeque::new(),
            twins: Twins::default(),
            marked: BTreeSet::new(),
            coming: BTreeSet::new(),
            quiet: false,
            bytes: 0,
            limit,
            counts: Counts::default(),
            outputs: VecDeque::new(),
            last: None,
        }
    }

    /// There is a stream that brings the tail, from the item of the returned number on.
    pub fn tail_opened(&mut self) -> u64 {
        self.broken = None;
        self.came
    }

    /// It broke off. The next one is waited for, though not for long.
    pub fn tail_broken(&mut self, now: Time) {
        self.broken = Some(now);
    }

    /// Whether there is one.
    #[must_use]
    pub fn has_tail(&self) -> bool {
        self.broken.is_none()
    }

    /// An item of the tail. One that came before, by a stream that broke, is left out.
    pub fn tail(&mut self, now: Time, number: u64, item: Item<F>) {
        if number == self.came {
            self.came += 1;
            self.take(now, item);
        }
    }

    /// Nothing more is waited for.
    pub fn tail_lost(&mut self) {
        self.take(Time(0), Item::End);
    }

    fn take(&mut self, now: Time, item: Item<F>) {
        self.quiet |= matches!(item, Item::Quiet | Item::End);
        if let Item::Frame(frame) = &item
            && !self.admits(frame.as_ref().len())
        {
            return;
        }
        let known =
            |marked: &BTreeSet<HostId>, host| marked.contains(host) || marked.len() >= MEMBERS;
        match &item {
            // Said by the flag.
            Item::Quiet => return,
            Item::Marker(host) if known(&self.marked, host) => return,
            Item::Marker(host) if self.state == State::Waiting => {
                if known(&self.coming, host) {
                    return;
                }
                self.coming.insert(*host);
            }
            _ => {}
        }
        if self.state == State::Waiting {
            self.counts.held += u64::from(!item.is_empty());
            self.tail.push_back((now, item));
        } else {
            self.apply(item, true);
        }
    }

    /// A frame that a host sent here, not by way of the old host. Of a sender that is released it comes
    /// back as [`Output::Inject`].
    pub fn fresh(&mut self, from: HostId, frame: F) {
        if !self.admits(frame.as_ref().len()) {
            return;
        }
        let released = matches!(self.state, State::Late(_) | State::Over);
        if released || self.marked.contains(&from) {
            return self.outputs.push_back(Output::Inject(frame));
        }
        self.counts.held += 1;
        self.fresh.entry(from).or_default().push_back(frame);
    }

    /// A broadcast or multicast that came here, not by way of the old host, since the guest runs. Ends with [`Output::Over`]: what
    /// comes after the last of these may go its own way.
    pub fn group(&mut self, frame: F) {
        if !self.admits(frame.as_ref().len()) {
            return;
        }
        if matches!(self.state, State::Late(_) | State::Over) {
            return self.give(frame, Way::Own);
        }
        self.groups.push_back(frame);
    }

    /// To the guest, unless its other copy went there.
    fn give(&mut self, frame: F, way: Way) {
        if self.twins.is_first(frame.as_ref(), way) {
            self.outputs.push_back(Output::Inject(frame));
        } else {
            self.bytes -= frame.as_ref().len();
        }
    }

    fn admits(&mut self, length: usize) -> bool {
        let fits = self.bytes + length <= self.limit;
        if fits {
            self.bytes += length;
        } else {
            self.counts.dropped += 1;
        }
        fits
    }

    /// The guest runs here. `kernel`: the hosts whose frames come through this host's kernel, itself
    /// included; they wait behind the plug until all of them are marked.
    pub fn runs(&mut self, now: Time, kernel: impl IntoIterator<Item = HostId>) {
        if self.state != State::Waiting {
            return;
        }
        self.state = State::Running(now);
        self.last = Some(now.plus_ms(LATE_MS));
        // Whatever was before: from now on somebody waits for it.
        self.broken = self.broken.map(|_| now);
        self.kernel = kernel.into_iter().collect();
        for (came, item) in std::mem::take(&mut self.tail) {
            self.apply(item, came.plus_ms(TWINS_MS) >= now);
        }
        self.unplug_if_free();
    }

    /// `twin`: of a broadcast another copy may come here.
    fn apply(&mut self, item: Item<F>, twin: bool) {
        match item {
            Item::Frame(frame) => {
                self.counts.reordered += u64::from(!matches!(self.state, State::Running(_)));
                if twin {
                    self.give(frame, Way::Tail);
                } else {
                    self.outputs.push_back(Output::Inject(frame));
                }
            }
            Item::Quiet => {}
            Item::Marker(host) => {
                self.marked.insert(host);
                let waiting = self.fresh.remove(&host).unwrap_or_default();
                self.outputs.extend(waiting.into_iter().map(Output::Inject));
                self.kernel.remove(&host);
                self.unplug_if_free();
            }
            Item::End => self.finish(),
        }
    }

    fn unplug_if_free(&mut self) {
        if self.plugged && self.kernel.is_empty() {
            self.plugged = false;
            self.outputs.push_back(Output::Unplug);
        }
    }

    /// Lets all senders go on.
    fn release(&mut self) {
        for (_, waiting) in std::mem::take(&mut self.fresh) {
            self.outputs.extend(waiting.into_iter().map(Output::Inject));
        }
        for frame in std::mem::take(&mut self.groups) {
            self.give(frame, Way::Own);
        }
        self.kernel.clear();
        self.unplug_if_free();
    }

    fn finish(&mut self) {
        if self.state != State::Over {
            self.state = State::Over;
            self.release();
            self.outputs.push_back(Output::Over);
        }
    }

    /// Gives up what the guest has not taken.
    pub fn cut(&mut self) {
        let before = self.outputs.len();
        self.outputs.retain(|output| match output {
            Output::Inject(frame) => {
                self.bytes -= frame.as_ref().len();
                false
            }
            Output::Unplug | Output::Over => true,
        });
        self.counts.dropped += (before - self.outputs.len()) as u64;
    }

    /// Releases what has waited for too long.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.timeout().is_none_or(|due| now < due) {
            return;
        }
        if let State::Running(since) = self.state {
            self.counts.late = true;
            self.state = State::Late(since);
            self.release();
        }
        if self.last.is_some_and(|last| now >= last) {
            self.finish();
            self.cut();
        }
    }

    /// When [`Arrival::handle_timeout`] is due.
    #[must_use]
    pub fn timeout(&self) -> Option<Time> {
        match self.state {
            State::Waiting => None,
            State::Running(since) => {
                let release = since.plus_ms(RELEASE_MS);
                Some(self.broken.map_or(release, |at| release.min(at.plus_ms(RESUME_MS))))
            }
            State::Late(_) => self.last,
            State::Over => self.last.filter(|_| self.has_output()),
        }
    }

    /// Whether what the guest sent at the old host has left it: what it sends here comes after.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Whether every sender is released.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    #[cfg(test)]
    pub(super) fn bytes_held(&self) -> usize {
        self.bytes
    }

    /// Whether there is something to do.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// The next thing to do. Call until `None` after every other call. Frames come only if the tap has `room`: what it
    /// has none for is kept here, and counts.
    pub fn poll_output(&mut self, room: bool) -> Option<Output<F>> {
        let output = self.outputs.pop_front_if(|next| room || !matches!(next, Output::Inject(_)));
        if let Some(Output::Inject(frame)) = &output {
            self.bytes -= frame.as_ref().len();
        }
        output
    }

    /// What became of frames so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }
}
