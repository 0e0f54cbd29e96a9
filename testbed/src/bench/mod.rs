//! Benchmarks: figures that decide something, measured in the lab.

pub mod endpoints;
pub mod ram;
pub mod transport;
