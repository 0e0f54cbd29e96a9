//! Where the destination of a migration stands. Owns the states; the transitions are the parent's.

use crate::migrate::wait;
use crate::time::Time;

/// Where the destination stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// The driver checks and starts a QEMU.
    Checking(Silence),
    /// Pages arrive.
    Receiving(Silence),
    /// Bound: loaded, and proposed once the source has released its copy; until a decision or the deadline. It is told, or
    /// asked about, again.
    Loaded { until: Time, tell_at: Time, qemu: Qemu },
    /// Decided for this copy; `cont` when its QEMU is there, and again if that is not answered.
    Starting { qemu: Qemu, again_at: Time },
    /// Runs; the source is told until it says *released*, or for long enough.
    Running { tell_at: Time, until: Time, resumed_us: u64 },
    /// It ran and is gone; the source is told until it says *released*, or for long enough.
    Lost { tell_at: Time, until: Time, cause: String },
    /// Nothing more.
    Over,
}

/// The source was last heard; when it is asked where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Silence {
    pub heard: Time,
    pub ask_at: Time,
}

impl Silence {
    pub fn since(now: Time) -> Self {
        Self { heard: now, ask_at: now.plus_ms(wait::SILENCE_MS) }
    }

    pub fn ends(&self) -> Time {
        self.heard.plus_ms(wait::HEARD_MS)
    }
}

/// The bound copy's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Qemu {
    /// Loaded, it waits.
    There,
    /// Being started again.
    Building,
    /// Gone, and nobody is at it.
    Gone,
}
