//! Time as the core sees it: an argument, never a clock.
//!
//! Owns the one time type of the core. Never reads a clock: the adapter passes `now`.

use serde::{Deserialize, Serialize};

/// Microseconds since an arbitrary start that is fixed for the life of one process (monotonic).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Time(pub u64);

impl Time {
    /// The moment `millis` milliseconds later (saturating).
    #[must_use]
    pub fn plus_ms(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis.saturating_mul(1000)))
    }

    /// Milliseconds from `earlier` to `self`; zero if `earlier` is later.
    #[must_use]
    pub fn ms_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1000
    }
}
