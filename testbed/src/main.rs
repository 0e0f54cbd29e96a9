//! `godwit-lab`: scenarios and benchmarks.
fn main() {}
