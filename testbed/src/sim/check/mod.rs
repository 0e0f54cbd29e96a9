//! What must always be true, one file each. Each function looks at a world, or at one step of it, and
//! says what is wrong; none changes anything.

pub mod content;
pub mod ends;
pub mod epochs;
pub mod frames;
pub mod one_copy;
pub mod routes;
pub mod strangers;
pub mod teams;
pub mod wiring;

use core::fmt;

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// At most one copy of a VM runs, and a decided record names it; while one can, one is there.
    OneCopy,
    /// A guest goes on with exactly what it last held.
    Content,
    /// Epochs only grow; one record each; nobody is owned twice.
    Epochs,
    /// Every frame for a NIC that moves comes once and in order, or is counted.
    Frames,
    /// All members of a move go, or none.
    Teams,
    /// A guest runs only with its NICs connected as its record says.
    Wiring,
    /// Every migration ends, nothing is left over, every queue is bounded.
    Ends,
    /// Once faults stop, everyone knows where everything runs.
    Routes,
    /// Who is no member changes nothing and learns nothing.
    Strangers,
    /// The code itself came to an end.
    Panic,
}

/// One of them did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach {
    /// Which.
    pub invariant: Invariant,
    /// What was seen.
    pub what: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.invariant, self.what)
    }
}

/// Fails with that text unless it holds.
pub(super) fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}
