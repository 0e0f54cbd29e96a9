//! A sorted index of one source: the first half of a chunk id -> page number.
//!
//! Owns 12 bytes per distinct page and a quarter of a byte for its buckets. Never holds content.
//! Invariant: half an id finds a *candidate*; who reads it compares the whole id.

use godwit_protocol::id::ChunkId;

/// The half of an id that is kept: 64 bits of a keyed hash.
#[must_use]
pub fn key_of(id: &ChunkId) -> u64 {
    let mut half = [0_u8; 8];
    half.copy_from_slice(&id.0[..8]);
    u64::from_be_bytes(half)
}

/// The index of one source. Built once, then only read.
#[derive(Debug, Default)]
pub struct Index {
    keys: Vec<u64>,
    pages: Vec<u32>,
    /// Where the keys with each leading `bits` bits begin, and one more.
    starts: Vec<u32>,
    bits: u32,
}

impl Index {
    /// Builds an index; of pages with the same key the lowest page stays.
    #[must_use]
    pub fn build(mut pairs: Vec<(u64, u32)>) -> Self {
        pairs.sort_unstable();
        pairs.dedup_by_key(|(key, _)| *key);
        let keys = pairs.iter().map(|(key, _)| *key).collect();
        let pages = pairs.iter().map(|(_, page)| *page).collect();
        Self::with_buckets(keys, pages)
    }

    /// An index of what [`Index::keys`] and [`Index::pages`] were; none: they never were of one.
    #[must_use]
    pub fn from_parts(keys: Vec<u64>, pages: Vec<u32>) -> Option<Self> {
        let sorted = keys.is_sorted_by(|a, b| a < b);
        (sorted && keys.len() == pages.len()).then(|| Self::with_buckets(keys, pages))
    }

    fn with_buckets(keys: Vec<u64>, pages: Vec<u32>) -> Self {
        // About 16 keys a bucket: two cache lines to search.
        let bits = (keys.len() / 16).max(1).ilog2();
        let mut starts = vec![0_u32; (1 << bits) + 1];
        for key in &keys {
            starts[bucket(*key, bits) + 1] += 1;
        }
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        Self { keys, pages, starts, bits }
    }

    /// All keys, in order.
    #[must_use]
    pub fn keys(&self) -> &[u64] {
        &self.keys
    }

    /// The page of each key.
    #[must_use]
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The page that has this key.
    #[must_use]
    pub fn find(&self, key: u64) -> Option<u32> {
        let bucket = bucket(key, self.bits);
        let from = *self.starts.get(bucket)? as usize;
        let to = *self.starts.get(bucket + 1)? as usize;
        let at = self.keys.get(from..to)?.binary_search(&key).ok()?;
        self.pages.get(from + at).copied()
    }

    /// Distinct pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Bytes of memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.keys.capacity() * 8 + self.pages.capacity() * 4 + self.starts.capacity() * 4
    }
}

/// What one source has: where its chunks and its extents are.
#[derive(Debug, Default)]
pub struct SourceIndex {
    /// By chunk id: the number of the chunk.
    pub chunks: Index,
    /// By extent id: the number of the extent.
    pub extents: Index,
}

impl SourceIndex {
    /// Bytes of memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.chunks.bytes() + self.extents.bytes()
    }
}

fn bucket(key: u64, bits: u32) -> usize {
    key.checked_shr(64 - bits).unwrap_or(0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn finds_what_was_put_and_nothing_else(
            pairs in proptest::collection::vec((any::<u64>(), any::<u32>()), 0..600),
            others in proptest::collection::vec(any::<u64>(), 0..50),
        ) {
            let index = Index::build(pairs.clone());
            for (key, _) in &pairs {
                let lowest = pairs.iter().filter(|(k, _)| k == key).map(|(_, p)| *p).min();
                prop_assert_eq!(index.find(*key), lowest);
            }
            let again = Index::from_parts(index.keys().to_vec(), index.pages().to_vec());
            prop_assert_eq!(again.map(|i| i.starts), Some(index.starts.clone()));
            for key in others {
                let there = pairs.iter().any(|(k, _)| *k == key);
                prop_assert_eq!(index.find(key).is_some(), there);
            }
        }
    }

    #[test]
    fn an_empty_index_finds_nothing() {
        assert_eq!(Index::default().find(7), None);
        assert_eq!(Index::build(Vec::new()).find(7), None);
    }

    #[test]
    fn parts_of_no_index_are_refused() {
        assert!(Index::from_parts(vec![1, 2], vec![0]).is_none());
        assert!(Index::from_parts(vec![2, 1], vec![0, 0]).is_none());
        assert!(Index::from_parts(vec![1, 1], vec![0, 0]).is_none());
        assert!(Index::from_parts(vec![1, 2], vec![9, 9]).is_some());
    }
}
