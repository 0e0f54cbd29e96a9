//! The host that a NIC leaves: holds, and forwards in order.

use std::collections::{BTreeSet, VecDeque};

use super::{Counts, LATE_MS, MARKERS_MS, ORPHAN_MS};
use crate::id::HostId;
use crate::time::Time;
use crate::wire::tail::Item;

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// The epoch is not decided, as far as this host knows.
    Holding {
        until: Option<Time>,
    },
    /// The guest runs elsewhere; these senders may still send here.
    Forwarding {
        waiting: BTreeSet<HostId>,
        until: Time,
    },
    /// The caller turns its own way round, and gives what was left.
    Closing,
    Closed,
}

/// One NIC that leaves. `F` is a frame.
#[derive(Debug)]
pub struct Departure<F> {
    state: State,
    items: VecDeque<Item<F>>,
    /// How many of `items` are in the tail already: kept until the new host has them, and in case that the
    /// decision is *stay*.
    sent: usize,
    /// The number of the first of `items`.
    first: u64,
    /// How many items the new host has.
    acknowledged: u64,
    bytes: usize,
    limit: usize,
    marked: BTreeSet<HostId>,
    tail: bool,
    /// The guest stands still: nothing older than what is held can turn up.
    stopped: bool,
    /// When the tail has to be there.
    last: Option<Time>,
    counts: Counts,
}

impl<F: AsRef<[u8]> + Clone> Departure<F> {
    /// Holds at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            state: State::Holding { until: None },
            items: VecDeque::new(),
            sent: 0,
            first: 0,
            acknowledged: 0,
            bytes: 0,
            limit,
            marked: BTreeSet::new(),
            tail: true,
            stopped: false,
            last: None,
            counts: Counts::default(),
        }
    }

    /// A frame came for the NIC.
    pub fn frame(&mut self, frame: F) {
        let length = frame.as_ref().len();
        if self.state == State::Closed || !self.tail || self.bytes + length > self.limit {
            self.counts.dropped += 1;
            return;
        }
        self.bytes += length;
        self.counts.held += 1;
        self.items.push_back(Item::Frame(frame));
    }

    /// The guest stands still, and left these frames, older than what is held here, and `lost` more. From
    /// now on what is held goes into the tail.
    pub fn stopped(&mut self, rest: Vec<F>, lost: u64) {
        self.counts.dropped += lost;
        for frame in rest.into_iter().rev() {
            self.bytes += frame.as_ref().len();
            self.counts.held += 1;
            self.items.push_front(Item::Frame(frame));
        }
        self.stopped = true;
    }

    /// This sender sends to the new host from now on; all that it sent here was given before.
    pub fn marker(&mut self, from: HostId) {
        if self.state == State::Closed || !self.marked.insert(from) {
            return;
        }
        self.items.push_back(Item::Marker(from));
        if let State::Forwarding { waiting, .. } = &mut self.state {
            waiting.remove(&from);
        }
    }

    /// What the guest had sent has left this host.
    pub fn quiet(&mut self) {
        self.items.push_back(Item::Quiet);
    }

    /// The guest runs elsewhere; `senders` may still send here until they say otherwise.
    pub fn moved(&mut self, now: Time, senders: impl IntoIterator<Item = HostId>) {
        if !matches!(self.state, State::Holding { .. }) {
            return;
        }
        let waiting = senders.into_iter().filter(|h| !self.marked.contains(h)).collect();
        self.stopped = true;
        self.state = State::Forwarding { waiting, until: now.plus_ms(MARKERS_MS) };
        self.last = Some(now.plus_ms(LATE_MS));
        self.forget_acknowledged();
    }

    /// The copy is gone from this host, and where the guest runs has not been heard.
    pub fn orphaned(&mut self, now: Time) {
        if let State::Holding { until } = &mut self.state {
            *until = until.or(Some(now.plus_ms(ORPHAN_MS)));
        }
    }

    /// A stream to the new host was opened, which has `came` items. False: it cannot go on from there.
    pub fn resumed(&mut self, came: u64) -> bool {
        if came < self.first || came > self.first + self.sent as u64 {
            return false;
        }
        // Fewer than before while it is held: the new host was started again.
        self.acknowledged = came;
        self.sent = (came - self.first) as usize;
        self.forget_acknowledged();
        true
    }

    /// The new host has `came` items.
    pub fn acknowledged(&mut self, came: u64) {
        let most = self.first + self.sent as u64;
        self.acknowledged = self.acknowledged.max(came.min(most));
        self.forget_acknowledged();
    }

    fn forget_acknowledged(&mut self) {
        if matches!(self.state, State::Holding { .. }) {
            return;
        }
        for item in self.items.drain(..(self.acknowledged - self.first) as usize) {
            self.bytes -= item.len();
            self.sent -= 1;
        }
        self.first = self.acknowledged;
    }

    /// Gives up what has waited for too long: the new host is not to be reached.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.last.is_none_or(|last| now < last) || self.is_over() {
            return;
        }
        self.tail = false;
        // Sent and not acknowledged: they may have come, but nobody says so.
        let frames = self.items.iter().filter(|i| matches!(i, Item::Frame(_))).count();
        self.counts.dropped += frames as u64;
        self.forget_all();
        if let State::Forwarding { waiting, .. } = &mut self.state {
            waiting.clear();
        }
    }

    /// The next item for the tail.
    pub fn next_item(&mut self) -> Option<Item<F>> {
        let item = self.items.get(self.sent).filter(|_| self.tail && self.stopped)?;
        self.sent += 1;
        Some(item.clone())
    }

    /// Whether it is time to send this host's own frames to the new host: then do so, give what was
    /// still held, and call [`Departure::close`]. True once.
    pub fn close_due(&mut self, now: Time) -> bool {
        let due = match &self.state {
            State::Forwarding { waiting, until } => {
                self.counts.late |= !waiting.is_empty() && now >= *until;
                waiting.is_empty() || now >= *until
            }
            State::Holding { until } => until.is_some_and(|t| now >= t),
            State::Closing | State::Closed => false,
        };
        if due {
            self.state = State::Closing;
            self.last.get_or_insert(now.plus_ms(LATE_MS));
        }
        due
    }

    /// Nothing comes here any more: the tail ends.
    pub fn close(&mut self) {
        if self.state == State::Closing {
            self.state = State::Closed;
            self.stopped = true;
            self.items.push_back(Item::End);
            self.forget_acknowledged();
        }
    }

    /// Decided: the guest stays. What was held, in its order, for the NIC's own tap.
    pub fn stay(&mut self) -> Vec<F> {
        self.state = State::Closed;
        let frame = |item| if let Item::Frame(frame) = item { Some(frame) } else { None };
        let frames = self.items.drain(..).filter_map(frame).collect();
        self.forget_all();
        frames
    }

    fn forget_all(&mut self) {
        self.items.clear();
        (self.bytes, self.sent) = (0, 0);
        self.first = self.acknowledged;
    }

    /// Whether all was said, and heard.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Closed && (self.items.is_empty() || !self.tail)
    }

    /// When [`Departure::handle_timeout`] is due, and then [`Departure::close_due`] to be asked again.
    #[must_use]
    pub fn timeout(&self) -> Option<Time> {
        match self.state {
            State::Forwarding { until, .. } => Some(until),
            State::Holding { until } => until,
            State::Closing | State::Closed => self.last,
        }
    }

    #[cfg(test)]
    pub(super) fn bytes_held(&self) -> usize {
        self.bytes
    }

    /// What became of frames so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }
}
