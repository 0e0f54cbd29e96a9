//! What the destination knows of batches and contents.
//!
//! Owns which batches came, what was asked for, who waits for it, and which contents are in the
//! guest's own memory. No input or output; guarded by one lock. Invariant: a content is asked for
//! once at a time, and a batch is placed exactly once.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use godwit_protocol::chunk::EXTENT_CHUNKS;
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::KNOWN_CHUNKS;

/// A batch of which something is missing.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Pages asked for, with their ids, in the order of the literals.
    pub(super) wanted: Vec<(u32, ChunkId)>,
    /// The answer that was given, for a source that asks again.
    pub(super) bits: Vec<u8>,
    /// Pages not placed yet.
    missing: usize,
    /// Its literals are being placed.
    taken: bool,
}

/// What is known of a batch.
pub(super) enum Known {
    New,
    /// A thread is at it: its answer comes.
    Busy,
    /// The ids of these were asked for.
    Split(Vec<u8>),
    /// Asked for; the answer was this.
    Waiting(Vec<u8>),
    Placed,
}

/// An offer of which the ids of some extents were asked for.
#[derive(Debug, Default)]
pub(super) struct Splitting {
    /// Pages of the whole batch.
    pub(super) count: usize,
    /// Pages whose ids are known: (place in the offer, page, id).
    pub(super) items: Vec<(usize, u32, ChunkId)>,
    /// First pages of the extents that were asked for: (place in the offer, page).
    pub(super) asked: Vec<(usize, u32)>,
}

impl Splitting {
    /// One bit per page of the batch: those that were asked for.
    pub(super) fn bits(&self) -> Vec<u8> {
        let mut bits = vec![0; self.count.div_ceil(8)];
        for at in self.asked.iter().flat_map(|&(at, _)| at..at + EXTENT_CHUNKS) {
            bits[at / 8] |= 1 << (at % 8);
        }
        bits
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Content (by the first half of its id) -> a page that held it.
    index: HashMap<u64, u32>,
    /// Contents that were asked for -> who else needs them.
    pending: HashMap<ChunkId, Vec<(u32, u32)>>,
    batches: BTreeMap<u32, Incoming>,
    splits: BTreeMap<u32, Splitting>,
    /// Batches that a thread works on.
    busy: BTreeSet<u32>,
    through: u32,
    beyond: BTreeSet<u32>,
}

fn short(id: &ChunkId) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = id.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

impl State {
    /// What is known of a batch; a new one is busy from now on, until [`State::lack`],
    /// [`State::split`] or [`State::finish`].
    pub(super) fn begin(&mut self, seq: u32) -> Known {
        if seq <= self.through || self.beyond.contains(&seq) {
            return Known::Placed;
        }
        if let Some(batch) = self.batches.get(&seq) {
            return Known::Waiting(batch.bits.clone());
        }
        if let Some(splitting) = self.splits.get(&seq) {
            return Known::Split(splitting.bits());
        }
        if self.busy.insert(seq) { Known::New } else { Known::Busy }
    }

    /// Notes what was asked for; answers the bits to ask with.
    pub(super) fn split(&mut self, seq: u32, splitting: Splitting) -> Vec<u8> {
        let bits = splitting.bits();
        self.busy.remove(&seq);
        self.splits.insert(seq, splitting);
        bits
    }

    /// Takes up a split batch, once: busy from now on.
    pub(super) fn joined(&mut self, seq: u32) -> Option<Splitting> {
        let splitting = self.splits.remove(&seq)?;
        self.busy.insert(seq);
        Some(splitting)
    }

    /// A page that held the content; it may have changed since.
    pub(super) fn page_of(&self, id: &ChunkId) -> Option<u32> {
        self.index.get(&short(id)).copied()
    }

    /// Notes contents that were placed.
    pub(super) fn learn(&mut self, contents: &[(u32, ChunkId)]) {
        for (page, id) in contents {
            if self.index.len() < KNOWN_CHUNKS {
                self.index.insert(short(id), *page);
            } else if let Some(known) = self.index.get_mut(&short(id)) {
                *known = *page;
            }
        }
    }

    /// Enters what a batch of `count` pages lacks: (place in the offer, page, id). Answers the
    /// bits to ask for; none if the batch is placed already.
    pub(super) fn lack(
        &mut self,
        seq: u32,
        count: usize,
        lacking: &[(usize, u32, ChunkId)],
    ) -> Option<Vec<u8>> {
        if lacking.is_empty() {
            self.finish(seq);
            return None;
        }
        let mut bits = vec![0; count.div_ceil(8)];
        let mut wanted = Vec::new();
        for &(at, page, id) in lacking {
            if let Some(waiters) = self.pending.get_mut(&id) {
                waiters.push((seq, page));
            } else {
                self.pending.insert(id, Vec::new());
                bits[at / 8] |= 1 << (at % 8);
                wanted.push((page, id));
            }
        }
        self.busy.remove(&seq);
        let batch = Incoming { wanted, bits: bits.clone(), missing: lacking.len(), taken: false };
        self.batches.insert(seq, batch);
        Some(bits)
    }

    /// The pages that literals of this batch are for; none if it is placed or being placed.
    pub(super) fn take(&mut self, seq: u32) -> Option<Vec<(u32, ChunkId)>> {
        let batch = self.batches.get_mut(&seq)?;
        if std::mem::replace(&mut batch.taken, true) {
            return None;
        }
        Some(std::mem::take(&mut batch.wanted))
    }

    /// How many literals a batch waits for.
    pub(super) fn expected(&self, seq: u32) -> Option<usize> {
        self.batches.get(&seq).map(|b| b.bits.iter().map(|b| b.count_ones() as usize).sum())
    }

    /// The content is there: who else needs it.
    pub(super) fn waiters(&mut self, id: &ChunkId) -> Vec<(u32, u32)> {
        self.pending.remove(id).unwrap_or_default()
    }

    /// `count` pages of the batch are placed; true: it is whole.
    pub(super) fn settle(&mut self, seq: u32, count: usize) -> bool {
        let Some(batch) = self.batches.get_mut(&seq) else { return false };
        batch.missing = batch.missing.saturating_sub(count);
        let whole = batch.missing == 0;
        if whole {
            self.batches.remove(&seq);
            self.finish(seq);
        }
        whole
    }

    /// The batch is placed.
    pub(super) fn finish(&mut self, seq: u32) {
        self.busy.remove(&seq);
        if seq > self.through {
            self.beyond.insert(seq);
        }
        while self.beyond.remove(&(self.through + 1)) {
            self.through += 1;
        }
    }

    /// All batches up to this one are placed.
    pub(super) fn through(&self) -> u32 {
        self.through
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_content_is_asked_for_once() {
        let mut state = State::default();
        let id = ChunkId([5; 16]);
        assert_eq!(state.lack(1, 1, &[(0, 10, id)]), Some(vec![1]));
        assert_eq!(state.lack(2, 9, &[(8, 20, id)]), Some(vec![0, 0]));
        assert_eq!(state.take(1), Some(vec![(10, id)]));
        assert_eq!(state.take(1), None, "the same literals twice");
        assert_eq!(state.waiters(&id), [(2, 20)]);
        assert!(state.settle(1, 1) && state.settle(2, 1));
        assert_eq!(state.through(), 2);
        assert!(matches!(state.begin(2), Known::Placed));
    }

    #[test]
    fn a_split_batch_is_joined_once() {
        let mut state = State::default();
        let splitting =
            Splitting { count: 20, items: vec![(0, 15, ChunkId([1; 16]))], asked: vec![(1, 16)] };
        assert!(matches!(state.begin(1), Known::New));
        assert_eq!(state.split(1, splitting), [0xfe, 0xff, 1]);
        assert!(matches!(state.begin(1), Known::Split(_)));
        assert!(state.joined(1).is_some() && state.joined(1).is_none());
        assert!(matches!(state.begin(1), Known::Busy));
    }

    #[test]
    fn batches_finish_in_any_order() {
        let mut state = State::default();
        [3, 1, 4].into_iter().for_each(|seq| state.finish(seq));
        assert_eq!(state.through(), 1);
        state.finish(2);
        state.finish(2);
        assert_eq!(state.through(), 4);
        assert!(matches!(state.begin(5), Known::New));
        assert!(matches!(state.begin(5), Known::Busy));
    }
}
