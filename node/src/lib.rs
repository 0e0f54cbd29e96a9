//! The godwit node: everything that touches the world.
//!
//! `net`, `store`, `vmm`, `link` and `api` are adapters and never import each other; `driver` alone
//! knows them all and runs the core of `godwit-protocol`.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod api;
pub mod cli;
pub mod driver;
pub mod link;
pub mod nbd;
pub mod net;
pub mod relay;
pub mod store;
pub mod vmm;
