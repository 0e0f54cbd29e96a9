//! What crosses the network: one type per message, one codec for all.
//!
//! Owns the forms of messages and their bounds. Decides nothing.

pub mod bulk;
pub mod codec;
pub mod control;
pub mod epoch;
pub mod filter;
pub mod migrate;
pub mod record;
pub mod route;
pub mod tail;
pub mod wiring;
