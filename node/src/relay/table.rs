//! The digest table of one end, shared by its threads. Owns one lock per region of 2 MiB.

use std::sync::{Mutex, MutexGuard};

use godwit_protocol::chunk::digest::{REGION_PAGES, Region, fold};
use godwit_protocol::id::ChunkId;

use super::pool::lock;

/// Regions are made when they are first touched.
pub(super) struct Table {
    pages: u32,
    zero: ChunkId,
    untouched: [u8; 32],
    regions: Vec<Mutex<Option<Region>>>,
}

/// A locked region.
pub(super) struct Locked<'a> {
    guard: MutexGuard<'a, Option<Region>>,
    zero: ChunkId,
}

impl Locked<'_> {
    pub(super) fn region(&mut self) -> &mut Region {
        let zero = self.zero;
        self.guard.get_or_insert_with(|| Region::new(zero))
    }
}

/// The part of a run that lies in one region: (region, first slot, first page, count).
pub(super) fn parts(first: u32, count: u32) -> impl Iterator<Item = (usize, usize, u32, u32)> {
    let (mut at, end) = (u64::from(first), u64::from(first) + u64::from(count));
    std::iter::from_fn(move || {
        let slot = at as usize % REGION_PAGES;
        let count = ((REGION_PAGES - slot) as u64).min(end.checked_sub(at).filter(|&n| n > 0)?);
        let part = (at as usize / REGION_PAGES, slot, at as u32, count as u32);
        at += count;
        Some(part)
    })
}

impl Table {
    pub(super) fn new(pages: u32, zero: ChunkId) -> Self {
        let regions = (pages as usize).div_ceil(REGION_PAGES);
        Self {
            pages,
            zero,
            untouched: Region::new(zero).close(),
            regions: (0..regions).map(|_| Mutex::new(None)).collect(),
        }
    }

    pub(super) fn pages(&self) -> u32 {
        self.pages
    }

    /// Locks a region; indexes come from page lists that were checked against `pages`.
    pub(super) fn lock(&self, region: usize) -> Locked<'_> {
        Locked { guard: lock(&self.regions[region]), zero: self.zero }
    }

    /// Brings the hashes of touched regions up to date, so that little is left for the stop.
    pub(super) fn close(&self) {
        for region in &self.regions {
            if let Some(region) = lock(region).as_mut() {
                region.close();
            }
        }
    }

    pub(super) fn digest(&self) -> [u8; 32] {
        let each = self
            .regions
            .iter()
            .map(|region| lock(region).as_mut().map_or(self.untouched, Region::close));
        fold(self.pages, each)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_at_regions() {
        let cut: Vec<_> = parts(510, 516).collect();
        assert_eq!(cut, [(0, 510, 510, 2), (1, 0, 512, 512), (2, 0, 1024, 2)]);
        assert_eq!(parts(5, 0).count(), 0);
    }

    #[test]
    fn touched_but_unchanged_is_untouched() {
        let table = Table::new(1000, ChunkId([0; 16]));
        let before = table.digest();
        table.lock(1).region().claim(4, 1);
        assert_eq!(table.digest(), before);
        table.lock(1).region().set(4, ChunkId([1; 16]));
        assert_ne!(table.digest(), before);
    }
}
