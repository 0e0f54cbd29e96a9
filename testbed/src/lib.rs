//! The testbed of godwit: lab hosts as network namespaces, an emulated WAN, real guests, scenarios, benchmarks.
//!
//! Owns everything that is needed to watch the product from outside. Never part of the product: `godwit` does not
//! know that this crate exists.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod bench;
pub mod guest;
pub mod lab;
pub mod scenario;
pub mod sim;
