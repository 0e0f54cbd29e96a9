//! Where a stream ends: device state has no length, but its description at the very end has.
//!
//! Owns the search for `00 06 be32(len) {...}` whose length reaches exactly the end of what came.
//! Never keeps the state itself.

use std::collections::BTreeSet;

/// Most bytes of a description: larger lengths are other data.
const DESCRIPTION_BYTES: u32 = 16 << 20;
/// Most places that may still turn out to be the description.
const CANDIDATES: usize = 64;
const MARK: usize = 7;

/// Watches device state go by.
#[derive(Debug, Default)]
pub struct Tail {
    total: u64,
    ends: BTreeSet<u64>,
    last: Vec<u8>,
}

impl Tail {
    /// Takes the next bytes of device state.
    pub fn feed(&mut self, bytes: &[u8]) {
        let mut seam = std::mem::take(&mut self.last);
        let before = seam.len();
        seam.extend_from_slice(&bytes[..bytes.len().min(MARK - 1)]);
        self.scan(&seam, self.total - before as u64);
        self.scan(bytes, self.total);
        self.total += bytes.len() as u64;
        let joined = if bytes.len() >= MARK - 1 { bytes } else { &seam };
        self.last = joined[joined.len().saturating_sub(MARK - 1)..].to_vec();
        let total = self.total;
        self.ends.retain(|&end| end >= total);
    }

    /// Whether what came so far is a whole stream.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.last.last() == Some(&b'}') && self.ends.contains(&self.total)
    }

    fn scan(&mut self, bytes: &[u8], at: u64) {
        for (i, window) in bytes.windows(MARK).enumerate() {
            let &[0, 0x06, a, b, c, d, b'{'] = window else { continue };
            let len = u32::from_be_bytes([a, b, c, d]);
            if len <= DESCRIPTION_BYTES && self.ends.len() < CANDIDATES {
                self.ends.insert(at + i as u64 + 6 + u64::from(len));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn found_however_it_is_cut(
            state in prop::collection::vec(any::<u8>(), 0..300),
            json in prop::collection::vec(b'a'..=b'z', 0..300),
            cuts in prop::collection::vec(1_usize..40, 1..20),
        ) {
            let mut stream = state.clone();
            stream.extend_from_slice(&[0, 6]);
            stream.extend_from_slice(&(json.len() as u32 + 2).to_be_bytes());
            stream.push(b'{');
            stream.extend_from_slice(&json);
            stream.push(b'}');
            let mut tail = Tail::default();
            let (mut rest, mut cut) = (stream.as_slice(), 0);
            while !rest.is_empty() {
                prop_assert!(!tail.is_whole());
                let (now, later) = rest.split_at(cuts[cut % cuts.len()].min(rest.len()));
                tail.feed(now);
                (rest, cut) = (later, cut + 1);
            }
            prop_assert!(tail.is_whole());
            tail.feed(b"}");
            prop_assert!(!tail.is_whole());
        }
    }
}
