//! One line of pages for everything that a migration moves: memory first, then each disk.
//!
//! Owns where each space begins. One line means one exchange, one digest and one resume: a page of
//! memory finds the same content on a disk, and the other way round. Invariant: every space begins
//! at a digest region, so that a region never holds two of them.

use std::ops::Range;

use super::digest::REGION_PAGES;
use crate::limits::{CHUNK_BYTES, DISKS, GUEST_MEMORY_BYTES};

/// A disk that moves, as the exchange sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpace {
    /// Its size, bytes: a multiple of 4096.
    pub bytes: u64,
    /// Whether it begins as the content of a base that both ends have; else it begins as zeros.
    pub backed: bool,
}

/// Memory and disks in one line of pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    ram: u32,
    disks: Vec<(Range<u32>, bool)>,
    end: u32,
}

/// A page of the line, as the space that it is of sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A page of memory.
    Ram(u32),
    /// A block of a disk: which one, and the block.
    Disk(usize, u32),
}

impl Layout {
    /// The layout for memory and disks of these sizes, bytes. None if a size is no multiple of 4096
    /// or zero, if there are too many disks, or if the line is longer than 16 TiB.
    #[must_use]
    pub fn new(ram_bytes: u64, spaces: &[DiskSpace]) -> Option<Self> {
        let pages = |bytes: u64| {
            let fits = bytes > 0
                && bytes <= GUEST_MEMORY_BYTES
                && bytes.is_multiple_of(CHUNK_BYTES as u64);
            u32::try_from(bytes / CHUNK_BYTES as u64).ok().filter(|_| fits)
        };
        if spaces.len() > DISKS {
            return None;
        }
        let ram = pages(ram_bytes)?;
        let (mut end, mut disks) = (ram, Vec::with_capacity(spaces.len()));
        for space in spaces {
            let first = end.checked_next_multiple_of(REGION_PAGES as u32)?;
            end = first.checked_add(pages(space.bytes)?)?;
            disks.push((first..end, space.backed));
        }
        Some(Self { ram, disks, end })
    }

    /// Pages of the line, gaps included.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.end
    }

    /// Pages of memory: they come first.
    #[must_use]
    pub fn ram_pages(&self) -> u32 {
        self.ram
    }

    /// The pages of a disk.
    #[must_use]
    pub fn disk(&self, index: usize) -> Option<Range<u32>> {
        self.disks.get(index).map(|disk| disk.0.clone())
    }

    /// Whether what nobody has written at this page is the content of a base, not zeros.
    #[must_use]
    pub fn is_backed(&self, page: u32) -> bool {
        self.disks.iter().any(|(pages, backed)| *backed && pages.contains(&page))
    }

    /// How many disks.
    #[must_use]
    pub fn disks(&self) -> usize {
        self.disks.len()
    }

    /// What lies at a page; none: a gap, or beyond the end.
    #[must_use]
    pub fn place(&self, page: u32) -> Option<Place> {
        if page < self.ram {
            return Some(Place::Ram(page));
        }
        let at = self.disks.partition_point(|disk| disk.0.end <= page);
        let (disk, _) = self.disks.get(at).filter(|disk| disk.0.contains(&page))?;
        Some(Place::Disk(at, page - disk.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(sizes: &[u64]) -> Vec<DiskSpace> {
        sizes.iter().map(|&bytes| DiskSpace { bytes, backed: false }).collect()
    }

    #[test]
    fn spaces_begin_at_regions_and_gaps_are_nobodys() {
        let layout = Layout::new(5 << 12, &plain(&[3 << 12, 600 << 12])).unwrap();
        assert_eq!((layout.ram_pages(), layout.disks(), layout.pages()), (5, 2, 1624));
        assert_eq!((layout.disk(0), layout.disk(1)), (Some(512..515), Some(1024..1624)));
        assert_eq!(layout.place(4), Some(Place::Ram(4)));
        assert_eq!(layout.place(5), None);
        assert_eq!(layout.place(514), Some(Place::Disk(0, 2)));
        assert_eq!(layout.place(515), None);
        assert_eq!(layout.place(1623), Some(Place::Disk(1, 599)));
        assert_eq!(layout.place(1624), None);
    }

    #[test]
    fn a_base_is_known_by_page() {
        let backed = DiskSpace { bytes: 4096, backed: true };
        let layout = Layout::new(4096, &[plain(&[4096])[0], backed]).unwrap();
        assert!(layout.is_backed(1024) && !layout.is_backed(512) && !layout.is_backed(0));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        assert!(Layout::new(0, &[]).is_none() && Layout::new(4097, &[]).is_none());
        assert!(Layout::new(4096, &plain(&[512])).is_none());
        assert!(Layout::new(4096, &plain(&[1 << 44])).is_none(), "longer than page numbers reach");
        assert!(Layout::new(4096, &plain(&[4096; DISKS + 1])).is_none());
    }
}
