//! The content of workload pages: what page `index` of a guest holds at `version`, and what is wrong with one that does not.
//!
//! Owns the page formula, shared by the guest agent (which writes and verifies) and by tests (which look for pages from
//! outside). It never touches memory of a guest and draws no randomness: a page is a function of (seed, index, version).
//!
//! Of every four 8-byte words the first is random, the other three are a repeated byte of it plus the word's index:
//!
//! ```text
//! r(0)      = mix(seed ^ mix(index << 32 | version))        r(g+1) = r(g) * STEP + INCREMENT
//! word 4g   = r(g)
//! word 4g+j = highest byte of r(g), eight times, + (4g+j)   j = 1, 2, 3
//! ```
//!
//! Every group of four depends on seed, index and version, so a page that is stale, lost, misplaced or torn at any 32-byte
//! boundary differs from what is expected, and zstd level 1 brings it to about half, as it does with a guest's own data.
//! One multiplication for each group keeps it cheap for a guest whose every instruction is emulated.
//! `testbed/guest/bare/bare.c` has the same formula in C; the tests compare the two.

/// Bytes in one page.
pub const PAGE_BYTES: usize = 4096;
/// 8-byte words in one page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Words in one group: one random, three derived.
const GROUP: usize = 4;
/// Every byte of the word is one.
const REPEAT: u64 = 0x0101_0101_0101_0101;
/// Multiplier and increment of the random words' sequence (Knuth's MMIX generator: full period).
const STEP: u64 = 0x5851_F42D_4C95_7F2D;
const INCREMENT: u64 = 0x1405_7B7E_F767_814F;
/// How many versions back [`diagnose`] looks for the one that a stale page holds.
const STALE_SEARCH: u32 = 64;

/// One page of words, little-endian in guest memory.
pub type Page = [u64; PAGE_WORDS];

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// All words are zero: the page was lost.
    Zero,
    /// The page is exactly an earlier version of itself.
    Stale {
        /// The version that it holds.
        version: u32,
    },
    /// Some groups are the expected version, the others an earlier one.
    Torn {
        /// The earlier version.
        version: u32,
    },
    /// Anything else.
    Garbage,
}

impl Fault {
    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Zero => "zero",
            Fault::Stale { .. } => "stale",
            Fault::Torn { .. } => "torn",
            Fault::Garbage => "garbage",
        }
    }
}

/// One step of splitmix64: a bijection of 64 bits that passes the usual tests of randomness.
pub fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The groups of page `index` at `version`, in order.
struct Groups {
    random: u64,
    next: u64,
}

impl Groups {
    fn of(seed: u64, index: u32, version: u32) -> Self {
        Groups { random: mix(seed ^ mix((u64::from(index) << 32) | u64::from(version))), next: 0 }
    }
}

impl Iterator for Groups {
    type Item = [u64; GROUP];

    /// The next group; there is no last one, the page ends it.
    fn next(&mut self) -> Option<[u64; GROUP]> {
        let random = self.random;
        let first = ((random >> 56) * REPEAT).wrapping_add(self.next);
        self.random = random.wrapping_mul(STEP).wrapping_add(INCREMENT);
        self.next += GROUP as u64;
        Some([random, first.wrapping_add(1), first.wrapping_add(2), first.wrapping_add(3)])
    }
}

/// Writes the whole page `index` at `version` into `page`.
pub fn fill(page: &mut Page, seed: u64, index: u32, version: u32) {
    let groups = Groups::of(seed, index, version);
    for (words, group) in page.chunks_exact_mut(GROUP).zip(groups) {
        words.copy_from_slice(&group);
    }
}

/// The page as its bytes in guest memory.
pub fn page_bytes(seed: u64, index: u32, version: u32) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_WORDS];
    fill(&mut page, seed, index, version);
    let mut bytes = [0; PAGE_BYTES];
    for (to, word) in bytes.chunks_exact_mut(8).zip(page) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Whether `page` is exactly page `index` at `version`.
pub fn matches(page: &Page, seed: u64, index: u32, version: u32) -> bool {
    let groups = Groups::of(seed, index, version);
    page.chunks_exact(GROUP).zip(groups).all(|(words, group)| words == group)
}

/// Says what a page that should be (`index`, `version`) is instead; `None` if it is as expected.
pub fn diagnose(page: &Page, seed: u64, index: u32, version: u32) -> Option<Fault> {
    if matches(page, seed, index, version) {
        return None;
    }
    if page.iter().all(|word| *word == 0) {
        return Some(Fault::Zero);
    }
    for older in (version.saturating_sub(STALE_SEARCH).max(1)..version).rev() {
        let expected = Groups::of(seed, index, version);
        let before = Groups::of(seed, index, older);
        let mut has_expected = false;
        let explained = page.chunks_exact(GROUP).zip(expected.zip(before)).all(
            |(words, (expected, before))| {
                has_expected |= words == expected;
                words == expected || words == before
            },
        );
        if explained {
            return Some(if has_expected {
                Fault::Torn { version: older }
            } else {
                Fault::Stale { version: older }
            });
        }
    }
    Some(Fault::Garbage)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 0x6f64_7769_7421;

    fn page(index: u32, version: u32) -> Page {
        let mut page = [0; PAGE_WORDS];
        fill(&mut page, SEED, index, version);
        page
    }

    #[test]
    fn zstd_brings_a_batch_to_about_half() {
        for first in [0u32, 64, 100_000] {
            let mut batch = Vec::new();
            for index in first..first + 64 {
                batch.extend_from_slice(&page_bytes(SEED, index, 1 + index % 7));
            }
            let packed = zstd::bulk::compress(&batch, 1).unwrap();
            let ratio = packed.len() as f64 / batch.len() as f64;
            assert!((0.45..=0.55).contains(&ratio), "ratio {ratio:.3}");
        }
    }

    #[test]
    fn a_right_page_has_no_fault() {
        assert_eq!(diagnose(&page(9, 4), SEED, 9, 4), None);
        assert!(matches(&page(9, 4), SEED, 9, 4));
    }

    #[test]
    fn stale_lost_torn_and_misplaced_pages_are_found() {
        let stale = page(9, 3);
        assert_eq!(diagnose(&stale, SEED, 9, 4), Some(Fault::Stale { version: 3 }));
        assert_eq!(diagnose(&[0; PAGE_WORDS], SEED, 9, 4), Some(Fault::Zero));
        let mut torn = page(9, 4);
        torn[PAGE_WORDS - 4..].copy_from_slice(&page(9, 2)[PAGE_WORDS - 4..]);
        assert_eq!(diagnose(&torn, SEED, 9, 4), Some(Fault::Torn { version: 2 }));
        assert_eq!(diagnose(&page(10, 4), SEED, 9, 4), Some(Fault::Garbage));
        assert_eq!(diagnose(&page(9, 5), SEED, 9, 4), Some(Fault::Garbage));
        let mut other_guest = [0; PAGE_WORDS];
        fill(&mut other_guest, SEED + 1, 9, 4);
        assert_eq!(diagnose(&other_guest, SEED, 9, 4), Some(Fault::Garbage));
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found() {
        for word in 0..PAGE_WORDS {
            let mut page = page(1, 1);
            page[word] ^= 1 << (word % 64);
            assert!(!matches(&page, SEED, 1, 1));
        }
    }

    #[test]
    fn bytes_are_the_words_in_little_endian() {
        let bytes = page_bytes(SEED, 3, 2);
        assert_eq!(bytes[8..16], page(3, 2)[1].to_le_bytes());
    }
}
