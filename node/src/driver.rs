//! The driver: the only module that knows all adapters, and the one that runs the core.
//!
//! Owns the order of the world's work: what the core commands is done here, what happens is told to
//! the core from here. Decides nothing about ownership: that is the core's.
//!
//! ```text
//!   net ----events---+                              +--> net (send)
//!   api ----jobs-----+--> engine: Core, one task ---+--> store (flush before what follows)
//!   workers-happened-+                              +--> workers (one per migration) --> vmm, relay
//!   clock------------+                              +--> wires --> link
//! ```

mod adopt;
mod answers;
mod asks;
mod boot;
mod bulk;
mod catalog;
mod clusters;
mod copies;
mod cutover;
mod destination;
mod engine;
mod flip;
mod group;
mod hold;
mod images;
mod keeping;
mod leave;
mod migrate;
mod mirrors;
mod nics;
mod node;
mod off;
mod on;
mod place;
mod ports;
mod restart;
mod source;
mod switch;
mod throttle;
mod timeline;
mod uplinks;
mod wires;
mod worker;

use std::net::SocketAddr;

pub use node::{DriverError, RunOptions};

/// Runs the daemon until it is told to stop (SIGINT, SIGTERM) or cannot go on.
///
/// # Errors
/// One that says what to do; the guests run on in any case.
pub async fn run(options: RunOptions) -> Result<(), DriverError> {
    engine::run(options).await
}

/// The default of `--listen`.
#[must_use]
pub fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7400))
}
