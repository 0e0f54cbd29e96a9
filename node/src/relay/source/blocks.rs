//! A set of a disk's blocks: one bit each.

use std::ops::Range;

/// See the module.
#[derive(Debug)]
pub(super) struct Blocks {
    words: Vec<u64>,
    len: u32,
    count: usize,
    /// No block below this one is in the set.
    lowest: u32,
}

impl Blocks {
    pub(super) fn new(len: usize) -> Self {
        // Callers have blocks with numbers of 32 bits.
        Self { words: vec![0; len.div_ceil(64)], len: len as u32, count: 0, lowest: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(super) fn contains(&self, block: u32) -> bool {
        self.words.get(block as usize / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Adds blocks, all below the length.
    pub(super) fn set(&mut self, blocks: Range<u32>) {
        self.lowest = self.lowest.min(blocks.start);
        for block in blocks {
            let word = &mut self.words[block as usize / 64];
            self.count += usize::from(*word >> (block % 64) & 1 == 0);
            *word |= 1 << (block % 64);
        }
    }

    /// The first block of the set at or after `from`; words of none are skipped.
    fn next(&self, from: u32) -> Option<u32> {
        let mut at = from as usize / 64;
        let mut word = self.words.get(at)? & (u64::MAX << (from % 64));
        while word == 0 {
            at += 1;
            word = *self.words.get(at)?;
        }
        Some((at * 64) as u32 + word.trailing_zeros())
    }

    /// The runs of the set within `blocks`.
    pub(super) fn runs(&self, blocks: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut at = blocks.start;
        std::iter::from_fn(move || {
            let first = self.next(at).filter(|first| *first < blocks.end)?;
            let end = (first..blocks.end).find(|block| !self.contains(*block));
            at = end.unwrap_or(blocks.end);
            Some(first..at)
        })
    }

    /// Takes the first run out, at most `most` blocks, none beyond a multiple of `border`.
    pub(super) fn take_run(&mut self, most: u32, border: u32) -> Option<Range<u32>> {
        let first = self.next(self.lowest)?;
        let limit = (first / border + 1).saturating_mul(border).min(first.saturating_add(most));
        let run = self.runs(first..limit.min(self.len)).next()?;
        for block in run.clone() {
            self.words[block as usize / 64] &= !(1 << (block % 64));
        }
        self.count -= run.len();
        self.lowest = run.end;
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_out_once_and_cut() {
        let mut set = Blocks::new(1000);
        set.set(10..20);
        set.set(500..530);
        set.set(15..22);
        assert!(set.contains(21) && !set.contains(22) && !set.contains(1000));
        assert_eq!(set.runs(0..510).collect::<Vec<_>>(), [10..22, 500..510]);
        assert_eq!(set.take_run(8, 512), Some(10..18));
        set.set(3..4);
        assert_eq!(set.take_run(8, 512), Some(3..4));
        assert_eq!(set.take_run(8, 512), Some(18..22));
        assert_eq!(set.take_run(100, 512), Some(500..512));
        assert_eq!(set.take_run(100, 512), Some(512..530));
        assert!(set.is_empty() && set.take_run(1, 512).is_none());
    }
}
