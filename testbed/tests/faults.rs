//! Each fault once, against real nodes and a real guest. Needs root; without it the test says so and ends.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use godwit_testbed::lab::cleanup::leftovers;
use godwit_testbed::scenario::{failed, faults};

#[test]
fn each_fault_once() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the lab needs root");
        return;
    }
    let report = faults::run("tfaults", &faults::once_each(), Vec::new()).unwrap();
    assert!(report["passed"] == true, "{:#?}", failed(&report));
    assert_eq!(report["runs"], 6);
    assert_eq!(report["double_runs"], 0);
    assert!(leftovers("tfaults").unwrap().is_empty());
}
