//! The digest: what both ends compare before anything is decided.
//!
//! Owns a table page -> (last batch, checksum of its content) per region of 2 MiB and how it is
//! folded. Never reads a page: the source sets what it read from its QEMU, the destination what it
//! reads back after a write. Invariant: an older batch never replaces a younger one's entry.

use crate::id::ChunkId;
use crate::limits::{CHUNK_BYTES, REGION_BYTES};

/// Pages of one region.
pub const REGION_PAGES: usize = REGION_BYTES / CHUNK_BYTES;

/// The entries of one region.
#[derive(Debug, Clone)]
pub struct Region {
    batch: Box<[u32; REGION_PAGES]>,
    sum: Box<[ChunkId; REGION_PAGES]>,
    closed: Option<[u8; 32]>,
}

impl Region {
    /// A region of zero pages that no batch has named; `zero` is the id of the page of zeros.
    #[must_use]
    pub fn new(zero: ChunkId) -> Self {
        Self {
            batch: Box::new([0; REGION_PAGES]),
            sum: Box::new([zero; REGION_PAGES]),
            closed: None,
        }
    }

    /// Notes that `batch` names the page; false if a younger batch already did.
    pub fn claim(&mut self, slot: usize, batch: u32) -> bool {
        let current = &mut self.batch[slot];
        *current = batch.max(*current);
        *current == batch
    }

    /// The youngest batch that named the page; 0: none.
    #[must_use]
    pub fn batch(&self, slot: usize) -> u32 {
        self.batch[slot]
    }

    /// The checksum of the page.
    #[must_use]
    pub fn sum(&self, slot: usize) -> ChunkId {
        self.sum[slot]
    }

    /// Sets the checksum of the page.
    pub fn set(&mut self, slot: usize, sum: ChunkId) {
        if self.sum[slot] != sum {
            self.sum[slot] = sum;
            self.closed = None;
        }
    }

    /// Whether the hash is up to date.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// The hash over the checksums in order; kept until one changes.
    pub fn close(&mut self) -> [u8; 32] {
        if let Some(hash) = self.closed {
            return hash;
        }
        let mut hasher = blake3::Hasher::new();
        for sum in self.sum.iter() {
            hasher.update(&sum.0);
        }
        let hash = *hasher.finalize().as_bytes();
        self.closed = Some(hash);
        hash
    }
}

/// Folds the hashes of all regions, in order, into one.
pub fn fold(pages: u32, regions: impl Iterator<Item = [u8; 32]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&pages.to_le_bytes());
    for region in regions {
        hasher.update(&region);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_batches_lose() {
        let mut region = Region::new(ChunkId([0; 16]));
        assert!(region.claim(3, 7));
        assert!(region.claim(3, 7));
        assert!(!region.claim(3, 6));
        assert_eq!(region.batch(3), 7);
    }

    #[test]
    fn one_changed_or_moved_checksum_changes_the_hash() {
        let mut region = Region::new(ChunkId([0; 16]));
        let before = region.close();
        region.set(0, ChunkId([0; 16]));
        assert!(region.is_closed());
        region.set(0, ChunkId([1; 16]));
        assert!(!region.is_closed());
        let at_0 = region.close();
        region.set(0, ChunkId([0; 16]));
        assert_eq!(region.close(), before);
        region.set(1, ChunkId([1; 16]));
        assert!(region.close() != at_0 && at_0 != before);
        assert_ne!(fold(2, [before, at_0].into_iter()), fold(2, [at_0, before].into_iter()));
    }
}
