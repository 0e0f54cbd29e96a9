//! Extents: 64 KiB of a disk that are offered by one id, and split only where the far end lacks them.
//!
//! Owns which pages of an offer go as extents. Both ends derive it from the page list alone.

use super::EXTENT_CHUNKS;
use super::pages::Runs;

/// A part of a page list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// [`EXTENT_CHUNKS`] consecutive pages from an aligned one: (place in the list, first page).
    Extent(usize, u32),
    /// One page.
    Single(usize, u32),
}

/// Cuts a page list into extents and single pages, in order.
pub fn parts(pages: &Runs) -> impl Iterator<Item = Part> + '_ {
    const LEN: u32 = EXTENT_CHUNKS as u32;
    let mut before = 0_usize;
    pages.runs().iter().flat_map(move |&(first, count)| {
        let (start, end) = (before, first + count);
        before += count as usize;
        let mut page = first;
        std::iter::from_fn(move || {
            let at = start + (page - first) as usize;
            let whole = page.is_multiple_of(LEN) && end.checked_sub(page)? >= LEN;
            let part = match page {
                page if page >= end => return None,
                page if whole => Part::Extent(at, page),
                page => Part::Single(at, page),
            };
            page += if whole { LEN } else { 1 };
            Some(part)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_aligned_groups_are_extents() {
        let mut list = Runs::default();
        (15..49).for_each(|page| list.push(page));
        (64..80).for_each(|page| list.push(page));
        list.push(96);
        let cut: Vec<_> = parts(&list).collect();
        let expected = [
            Part::Single(0, 15),
            Part::Extent(1, 16),
            Part::Extent(17, 32),
            Part::Single(33, 48),
            Part::Extent(34, 64),
            Part::Single(50, 96),
        ];
        assert_eq!(cut, expected);
        assert_eq!(parts(&Runs::default()).count(), 0);
    }
}
