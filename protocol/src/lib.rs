//! The sans-IO core of godwit.
//!
//! Owns every decision: who a member is, what a record says, which chunks cross, when a migration
//! has ended. Never touches a socket, file, thread, clock or the operating system's randomness:
//! functions take `now` and answer with commands. `clippy.toml` beside this crate enforces it.
//!
//! Modules depend on each other in one direction only:
//! `id, time, limits -> wire -> {chunk, membership, route, epoch, cutover} -> migrate -> core`.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod chunk;
pub mod core;
pub mod cutover;
pub mod epoch;
pub mod id;
pub mod limits;
pub mod membership;
pub mod migrate;
pub mod route;
pub mod time;
pub mod wire;
