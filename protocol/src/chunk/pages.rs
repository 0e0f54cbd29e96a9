//! Lists of pages as runs.
//!
//! Owns the delta coding of page indexes. Order is kept: it is the order of the literals that go
//! with a list. Never trusts a length: decoding is bounded by the caller before it allocates.

/// Most runs of one list.
pub const RUNS: usize = 8192;

/// A list of page indexes as (first, count) runs, in order, repetitions allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Runs {
    runs: Vec<(u32, u32)>,
    pages: u32,
}

/// Why bytes are no page list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RunsError {
    /// The bytes end within a number, or a number is over 32 bits.
    #[error("malformed page list")]
    Malformed,
    /// More pages or runs than agreed, or a page outside the guest's memory.
    #[error("page list out of bounds")]
    Bounds,
}

impl Runs {
    /// Appends one page.
    pub fn push(&mut self, index: u32) {
        self.pages += 1;
        match self.runs.last_mut() {
            Some((first, count)) if first.wrapping_add(*count) == index => *count += 1,
            _ => self.runs.push((index, 1)),
        }
    }

    /// How many pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages as usize
    }

    /// Whether there is no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// The (first, count) runs.
    #[must_use]
    pub fn runs(&self) -> &[(u32, u32)] {
        &self.runs
    }

    /// Whether a page is in the list.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        self.runs.iter().any(|&(first, count)| page.wrapping_sub(first) < count)
    }

    /// All indexes, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.runs.iter().flat_map(|&(first, count)| first..first + count)
    }

    /// The wire form: per run, the zigzag distance from the end of the run before and the count.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.runs.len() * 3);
        let mut at = 0_i64;
        for &(first, count) in &self.runs {
            let delta = i64::from(first) - at;
            put(&mut out, ((delta << 1) ^ (delta >> 63)) as u64);
            put(&mut out, u64::from(count));
            at = i64::from(first) + i64::from(count);
        }
        out
    }

    /// Reads the wire form; every page must be below `limit`, and there may be at most
    /// `most` pages.
    ///
    /// # Errors
    /// [`RunsError`].
    pub fn decode(bytes: &[u8], limit: u32, most: u32) -> Result<Self, RunsError> {
        let mut list = Self::default();
        let (mut rest, mut at) = (bytes, 0_i64);
        while !rest.is_empty() {
            let zigzag = take(&mut rest)?;
            let count = take(&mut rest)?;
            let delta = ((zigzag >> 1) as i64) ^ -((zigzag & 1) as i64);
            let first = at + delta;
            let end = first + i64::try_from(count).map_err(|_| RunsError::Malformed)?;
            if first < 0 || end > i64::from(limit) || count == 0 || list.runs.len() == RUNS {
                return Err(RunsError::Bounds);
            }
            // Both fit: they are between 0 and `limit`.
            list.pages = list.pages.checked_add(count as u32).ok_or(RunsError::Bounds)?;
            if list.pages > most {
                return Err(RunsError::Bounds);
            }
            list.runs.push((first as u32, count as u32));
            at = end;
        }
        Ok(list)
    }
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// At most 35 bits: a zigzag distance between two 32-bit indexes has 34.
fn take(rest: &mut &[u8]) -> Result<u64, RunsError> {
    let mut value = 0_u64;
    for shift in [0, 7, 14, 21, 28] {
        let (&byte, tail) = rest.split_first().ok_or(RunsError::Malformed)?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(RunsError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reads_back(indexes in prop::collection::vec(0_u32..1 << 20, 0..500)) {
            let mut list = Runs::default();
            indexes.iter().for_each(|&i| list.push(i));
            let back = Runs::decode(&list.encode(), 1 << 20, 500).unwrap();
            prop_assert_eq!(&back, &list);
            prop_assert_eq!(back.iter().collect::<Vec<_>>(), indexes);
        }

        #[test]
        fn garbage_stays_in_bounds(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            if let Ok(list) = Runs::decode(&bytes, 1000, 100) {
                prop_assert!(list.len() <= 100);
                prop_assert!(list.iter().all(|i| i < 1000));
            }
        }
    }

    #[test]
    fn neighbours_cost_two_bytes() {
        let mut list = Runs::default();
        (100..20_000).for_each(|i| list.push(i));
        assert!(list.encode().len() <= 5);
        assert_eq!(Runs::decode(&list.encode(), 19_999, 1 << 20), Err(RunsError::Bounds));
    }
}
