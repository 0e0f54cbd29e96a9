//! Benchmarks: figures that decide something, measured in the lab.

pub mod cluster;
pub mod disk;
pub mod endpoints;
pub mod ram;
pub mod transport;
pub mod versus;
pub mod wire;
