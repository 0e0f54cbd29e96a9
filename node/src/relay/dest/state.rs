//! What the destination knows of batches and contents.
//!
//! Owns which batches came, what was asked for, who waits for it, and which contents are in the
//! guest's own memory. No input or output; guarded by one lock. Invariant: a content is asked for
//! once at a time, and a batch is placed exactly once.

use std::collections::{BTreeMap, BTreeSet, HashMap};

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
    /// Asked for; the answer was this.
    Waiting(Vec<u8>),
    Placed,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Content (by the first half of its id) -> a page that held it.
    index: HashMap<u64, u32>,
    /// Contents that were asked for -> who else needs them.
    pending: HashMap<ChunkId, Vec<(u32, u32)>>,
    batches: BTreeMap<u32, Incoming>,
    through: u32,
    beyond: BTreeSet<u32>,
}

fn short(id: &ChunkId) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = id.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

impl State {
    pub(super) fn known(&self, seq: u32) -> Known {
        if seq <= self.through || self.beyond.contains(&seq) {
            return Known::Placed;
        }
        match self.batches.get(&seq) {
            Some(batch) => Known::Waiting(batch.bits.clone()),
            None => Known::New,
        }
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
        assert!(matches!(state.known(2), Known::Placed));
    }

    #[test]
    fn batches_finish_in_any_order() {
        let mut state = State::default();
        [3, 1, 4].into_iter().for_each(|seq| state.finish(seq));
        assert_eq!(state.through(), 1);
        state.finish(2);
        state.finish(2);
        assert_eq!(state.through(), 4);
        assert!(matches!(state.known(5), Known::New));
    }
}
