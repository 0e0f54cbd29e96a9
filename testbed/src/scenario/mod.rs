//! Scenarios: what a user would do, done with real nodes, guests and links, and looked at from outside.
//!
//! Owns the runs and what they call passed. Invariant: what is judged was seen by the lab (its link, its prober, the
//! guest's own check), not told by a node.

pub mod demo;
pub mod swarm;

pub use swarm::{Guest, Swarm};
