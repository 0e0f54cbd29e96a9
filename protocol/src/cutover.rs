//! Cutting a NIC over from one host to the next: every frame once, in the order of its sender.
//!
//! Owns, at each end, which frames wait and who may release them. Never touches a device or a
//! stream: the driver moves frames in and out. Invariants: what waits is bounded and what does not fit
//! is counted; nothing waits without a deadline.
//!
//! ```text
//!   senders ----------> old host: Departure ---- tail, a stream ----> new host: Arrival -> tap
//!     |  (until they know the new route;      frames, markers, end      ^ past the plug
//!     |   then a marker behind the last)                                |
//!     +------------------- fresh frames ---------------------> held for each tunnel sender,
//!                                                              or behind the plug on the tap
//!
//!   Departure   Holding --moved--> Forwarding --all marked, or late--> Closing --> Closed
//!                  +-----stay----> (what was held goes back into the tap) -------> Closed
//!   Arrival     Waiting --runs---> Running --end------------------> Over
//!                                     +------late----> Late --end---^
//! ```
//!
//! What is held crosses at once, before the decision: then it is there when the guest runs. Exactly
//! one of the two ends uses it, the one that the decision names. The items of the tail are numbered, and
//! the old host keeps those that the new one has not acknowledged: a stream that breaks goes on by another.
//!
//! Broadcasts and multicasts go to every host of a wire, so to both. The old host's copies count as long as there are any; those
//! that come to the new one wait until the tail has ended, and only what was not in it goes to the guest.

mod arrival;
mod departure;
#[cfg(test)]
mod tests;
mod twins;

pub use arrival::{Arrival, Output};
pub use departure::Departure;

/// How long the old host waits for markers once it knows that the guest runs elsewhere, milliseconds.
pub const MARKERS_MS: u64 = 1500;
/// How long the new host holds fresh frames back after its guest began to run, milliseconds.
pub const RELEASE_MS: u64 = 3000;
/// How much later than by way of the old host a broadcast may come straight to the new one, milliseconds.
pub const TWINS_MS: u64 = 100;
/// How long the new host holds them back for a tail whose stream is broken, milliseconds.
pub const RESUME_MS: u64 = 1000;
/// How long after that guest began to run the tail may come, and what waits for the guest to read, milliseconds.
/// Longer than TCP needs to go on after a cut of 5 s.
pub const LATE_MS: u64 = 15_000;
/// How long an old host whose copy is gone goes on holding without having heard where the guest runs.
pub const ORPHAN_MS: u64 = 10_000;

/// What became of frames at one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Frames that waited here for a time, and then went on.
    pub held: u64,
    /// Frames that did not fit, or whose way was lost.
    pub dropped: u64,
    /// Frames of the tail that came after newer ones had been released.
    pub reordered: u64,
    /// Whether a deadline released what had not been marked: order was not certain.
    pub late: bool,
}
