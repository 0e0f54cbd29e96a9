//! The digest table of one end, shared by its threads. Owns one lock per region of 2 MiB.

use std::sync::{Mutex, MutexGuard};

use godwit_protocol::chunk::digest::{REGION_PAGES, Region, fold};
use godwit_protocol::chunk::layout::Layout;
use godwit_protocol::id::ChunkId;

use super::pool::lock;

/// Regions are made when they are first touched.
pub(super) struct Table {
    layout: Layout,
    zero: ChunkId,
    untouched: [u8; 32],
    untouched_base: [u8; 32],
    regions: Vec<Mutex<Option<Region>>>,
}

/// The entry of a page that nobody has written on a disk that begins as its base: no content's.
const BASE: ChunkId = ChunkId([0xff; 16]);

/// A locked region.
pub(super) struct Locked<'a> {
    guard: MutexGuard<'a, Option<Region>>,
    begins: ChunkId,
}

impl Locked<'_> {
    pub(super) fn region(&mut self) -> &mut Region {
        let begins = self.begins;
        self.guard.get_or_insert_with(|| Region::new(begins))
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
    pub(super) fn new(layout: Layout, zero: ChunkId) -> Self {
        let regions = (layout.pages() as usize).div_ceil(REGION_PAGES);
        Self {
            layout,
            zero,
            untouched: Region::new(zero).close(),
            untouched_base: Region::new(BASE).close(),
            regions: (0..regions).map(|_| Mutex::new(None)).collect(),
        }
    }

    pub(super) fn pages(&self) -> u32 {
        self.layout.pages()
    }

    fn is_backed(&self, region: usize) -> bool {
        self.layout.is_backed((region * REGION_PAGES) as u32)
    }

    /// Locks a region; indexes come from page lists that were checked against `pages`.
    pub(super) fn lock(&self, region: usize) -> Locked<'_> {
        let begins = if self.is_backed(region) { BASE } else { self.zero };
        Locked { guard: lock(&self.regions[region]), begins }
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
        let each = self.regions.iter().enumerate().map(|(at, region)| match &mut *lock(region) {
            Some(region) => region.close(),
            None if self.is_backed(at) => self.untouched_base,
            None => self.untouched,
        });
        fold(self.pages(), each)
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
        let table = Table::new(Layout::new(1000 << 12, &[]).unwrap(), ChunkId([0; 16]));
        let before = table.digest();
        table.lock(1).region().claim(4, 1);
        assert_eq!(table.digest(), before);
        table.lock(1).region().set(4, ChunkId([1; 16]));
        assert_ne!(table.digest(), before);
    }
}
