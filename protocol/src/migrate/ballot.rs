//! The ballot of the next epoch before the stop: who leads has it prepared, and kept fresh.
//!
//! Owns when it is asked for and how long it counts. Invariant: nobody is told to stop unless a
//! majority of the voters was seen alive a short time ago.

use super::wait;
use crate::time::Time;

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ballot {
    None,
    Asked(Time),
    Ready(Time),
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Wait,
    Ask,
    Stop,
}

impl Ballot {
    /// `near`: its round trip will be over by the time that the guest may be stopped; `converged`: it may.
    pub(super) fn step(&mut self, now: Time, near: bool, converged: bool) -> Next {
        match *self {
            Self::None if near || converged => {
                *self = Self::Asked(now);
                return Next::Ask;
            }
            Self::Asked(at) if now.ms_since(at) > wait::BALLOT_MS => *self = Self::None,
            Self::Ready(at) if now.ms_since(at) > wait::BALLOT_FRESH_MS => *self = Self::None,
            Self::Ready(_) if converged => return Next::Stop,
            _ => {}
        }
        Next::Wait
    }
}
