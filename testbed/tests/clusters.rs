//! Clusters that move, with real nodes and guests. Needs root; without it the tests say so and end.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use godwit_testbed::lab::cleanup::leftovers;
use godwit_testbed::scenario::{cluster, failed};

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: the lab needs root");
    }
    root
}

#[test]
fn three_guests_move_together_there_and_back() {
    if !root() {
        return;
    }
    let report = cluster::small().unwrap();
    assert!(report["passed"] == true, "{:#?}", failed(&report));
    assert!(leftovers("cluster").unwrap().is_empty());
}

#[test]
fn a_member_that_is_off_moves_with_its_disks() {
    if !root() {
        return;
    }
    let report = cluster::off::off().unwrap();
    assert!(report["passed"] == true, "{:#?}", failed(&report));
    assert!(leftovers("cloff").unwrap().is_empty());
}

#[test]
fn a_few_faults_at_steps_of_the_cutover() {
    if !root() {
        return;
    }
    let some = cluster::faults::some();
    let report = cluster::faults::run("tcfaults", &|name| some.iter().any(|n| n == name)).unwrap();
    assert!(report["passed"] == true, "{:#?}", failed(&report));
    assert_eq!(report["runs"], some.len());
    assert!(leftovers("tcfaults").unwrap().is_empty());
}
