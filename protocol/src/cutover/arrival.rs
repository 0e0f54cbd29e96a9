//! The host that a NIC comes to: older frames first, fresh ones when their sender is released.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Counts, RELEASE_MS};
use crate::id::HostId;
use crate::time::Time;
use crate::wire::tail::Item;

/// What the caller has to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output<F> {
    /// Put this into the tap, past the plug.
    Inject(F),
    /// Take the plug off the tap: whoever sends through this host's kernel is released.
    Unplug,
    /// All senders are released: fresh frames need no holding any more.
    Over,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Waiting,
    Running { until: Time },
    Over,
}

/// One NIC that comes. `F` is a frame.
#[derive(Debug)]
pub struct Arrival<F> {
    state: State,
    /// The tail, until the guest runs.
    tail: VecDeque<Item<F>>,
    /// Senders whose frames wait in the kernel, behind the plug.
    kernel: BTreeSet<HostId>,
    plugged: bool,
    /// Fresh frames of the others.
    fresh: BTreeMap<HostId, VecDeque<F>>,
    marked: BTreeSet<HostId>,
    quiet: bool,
    bytes: usize,
    limit: usize,
    counts: Counts,
    outputs: VecDeque<Output<F>>,
}

impl<F: AsRef<[u8]>> Arrival<F> {
    /// Holds at most `limit` bytes. The tap is plugged.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            state: State::Waiting,
            tail: VecDeque::new(),
            kernel: BTreeSet::new(),
            plugged: true,
            fresh: BTreeMap::new(),
            marked: BTreeSet::new(),
            quiet: false,
            bytes: 0,
            limit,
            counts: Counts::default(),
            outputs: VecDeque::new(),
        }
    }

    /// The next item of the tail.
    pub fn tail(&mut self, item: Item<F>) {
        self.quiet |= matches!(item, Item::Quiet | Item::End);
        if self.state != State::Waiting {
            return self.apply(item);
        }
        if self.bytes + item.len() > self.limit {
            self.counts.dropped += 1;
            return;
        }
        self.bytes += item.len();
        self.counts.held += u64::from(!item.is_empty());
        self.tail.push_back(item);
    }

    /// The tail broke off, or there is none: nobody waits for what does not come.
    pub fn tail_lost(&mut self) {
        self.tail(Item::End);
    }

    /// A frame that a host sent here, not by way of the old host. Of a sender that is released it comes
    /// back at once as [`Output::Inject`].
    pub fn fresh(&mut self, from: HostId, frame: F) {
        if self.state == State::Over || self.marked.contains(&from) {
            return self.outputs.push_back(Output::Inject(frame));
        }
        let length = frame.as_ref().len();
        if self.bytes + length > self.limit {
            self.counts.dropped += 1;
            return;
        }
        self.bytes += length;
        self.counts.held += 1;
        self.fresh.entry(from).or_default().push_back(frame);
    }

    /// The guest runs here. `kernel`: the hosts whose frames come through this host's kernel, itself
    /// included; they wait behind the plug until all of them are marked.
    pub fn runs(&mut self, now: Time, kernel: impl IntoIterator<Item = HostId>) {
        if self.state != State::Waiting {
            return;
        }
        self.state = State::Running { until: now.plus_ms(RELEASE_MS) };
        self.kernel = kernel.into_iter().collect();
        for item in std::mem::take(&mut self.tail) {
            self.bytes -= item.len();
            self.apply(item);
        }
        self.unplug_if_free();
    }

    fn apply(&mut self, item: Item<F>) {
        if self.state == State::Over {
            return;
        }
        match item {
            Item::Frame(frame) => self.outputs.push_back(Output::Inject(frame)),
            Item::Quiet => {}
            Item::Marker(host) => {
                self.marked.insert(host);
                let waiting = self.fresh.remove(&host).unwrap_or_default();
                self.inject(waiting);
                self.kernel.remove(&host);
                self.unplug_if_free();
            }
            Item::End => self.finish(),
        }
    }

    fn inject(&mut self, frames: VecDeque<F>) {
        for frame in frames {
            self.bytes -= frame.as_ref().len();
            self.outputs.push_back(Output::Inject(frame));
        }
    }

    fn unplug_if_free(&mut self) {
        if self.plugged && self.kernel.is_empty() {
            self.plugged = false;
            self.outputs.push_back(Output::Unplug);
        }
    }

    fn finish(&mut self) {
        if self.state == State::Over {
            return;
        }
        self.state = State::Over;
        for (_, waiting) in std::mem::take(&mut self.fresh) {
            self.inject(waiting);
        }
        self.kernel.clear();
        self.unplug_if_free();
        self.outputs.push_back(Output::Over);
    }

    /// Releases what has waited for too long.
    pub fn handle_timeout(&mut self, now: Time) {
        if let State::Running { until } = self.state
            && now >= until
        {
            self.counts.late = true;
            self.finish();
        }
    }

    /// When [`Arrival::handle_timeout`] is due.
    #[must_use]
    pub fn timeout(&self) -> Option<Time> {
        if let State::Running { until } = self.state { Some(until) } else { None }
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

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_output(&mut self) -> Option<Output<F>> {
        self.outputs.pop_front()
    }

    /// What became of frames so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }
}
