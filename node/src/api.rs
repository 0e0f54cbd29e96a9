//! The local API: what `godwit` on the command line says to the daemon of the same host.
//!
//! Owns the unix socket `<state>/api.sock` (mode 0600 in a 0700 directory), its JSON lines, and the
//! command line. Never decides anything and knows no other adapter: the driver gives it a handler.
//! Invariant: line length, connections and time per request are bounded (constants in `types`).
//!
//! ```text
//! client                                  daemon
//!   {"op":"migrate","vm":"web",...}\n  ->
//!                                      <-  {"event":{"progress":{...}}}\n      any number
//!                                      <-  {"result":{...}}\n                  or
//!                                      <-  {"error":"...","hint":"..."}\n      exactly one, last
//! ```

pub mod cli;
pub mod client;
pub mod server;
pub mod types;

pub use server::{Handler, serve};
pub use types::{ApiError, Event, Request};
