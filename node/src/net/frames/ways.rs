//! The connections with one peer, and which of them is used: both sides may dial at once.
//!
//! Owns the choice. Invariant: it is the same until that connection ends, so that nothing that is sent
//! overtakes what was sent before by another one.

/// Most connections with one peer: two when both dial at once, more while old ones die.
const PER_HOST: usize = 4;

/// The connections with one peer.
pub(super) struct Ways<C>(Vec<C>);

impl<C> Default for Ways<C> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<C: Clone> Ways<C> {
    /// The one that is used for sending.
    pub fn used(&self) -> Option<C> {
        self.0.first().cloned()
    }

    /// One more; gives back the one that has to give way to it.
    pub fn add(&mut self, way: C) -> Option<C> {
        let other = (self.0.len() >= PER_HOST).then(|| self.0.remove(1));
        self.0.push(way);
        other
    }

    /// Forgets those that ended.
    pub fn retain(&mut self, lives: impl FnMut(&C) -> bool) {
        self.0.retain(lives);
    }

    /// Forgets all.
    pub fn take(&mut self) -> Vec<C> {
        std::mem::take(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_is_used_stays_until_it_ends() {
        let mut ways = Ways::default();
        let others: Vec<_> = (0..=PER_HOST).map(|n| ways.add(n)).collect();
        assert_eq!(others, [None, None, None, None, Some(1)]);
        assert_eq!(ways.used(), Some(0));
        ways.retain(|way| *way != 3);
        assert_eq!(ways.used(), Some(0));
        ways.retain(|way| *way != 0);
        assert_eq!(ways.used(), Some(2));
        assert_eq!((ways.take(), ways.used()), (vec![2, 4], None));
    }
}
