//! Every order of events of small decisions: no two records for one epoch, whatever comes when.
//!
//! The search finds each of four flaws within the same bounds, so that it is known to look where they are.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use godwit_protocol::wire::record::{Cause, Record};
use godwit_testbed::sim::explore::{Bounds, Explorer, Flaw, Found, Small, record, stay};

/// More states than any of these worlds has.
const MOST: usize = 3_000_000;

fn explore(small: Small) -> Found {
    let found = Explorer::new(small, MOST).run();
    eprintln!("{found:?}");
    found
}

/// Three voters. Node 0 holds a loaded copy and wants it named, node 1 had the guest and gives up.
fn contested(bounds: Bounds, flaw: Flaw) -> Small {
    let base = record(1, &[0, 1, 2], 1, Cause::Create);
    let moved = Record { cause: Cause::Move, ..record(2, &[0, 1, 2], 0, Cause::Move) };
    let wants = vec![(0, moved), (1, stay(&base, "gave up"))];
    Small { nodes: 3, base, without: Vec::new(), wants, bounds, flaw }
}

fn all_agree(found: &Found) {
    assert_eq!(found.breach, None);
    assert!(!found.truncated, "more states than {MOST}");
    assert!(found.records >= 2 && found.decided > 100, "each side wins somewhere");
}

#[test]
fn two_proposers_and_three_voters() {
    all_agree(&explore(contested(Bounds::default(), Flaw::None)));
}

#[test]
fn with_a_timer_that_rings() {
    all_agree(&explore(contested(Bounds { timers: 1, ..Bounds::default() }, Flaw::None)));
}

#[test]
fn with_a_crash_at_every_place() {
    all_agree(&explore(contested(Bounds { crashes: 1, ..Bounds::default() }, Flaw::None)));
}

#[test]
fn with_a_message_that_comes_twice() {
    all_agree(&explore(contested(Bounds { doubles: 1, ..Bounds::default() }, Flaw::None)));
}

fn is_found(small: Small) {
    let found = explore(small);
    assert!(found.breach.is_some(), "goes unnoticed: {found:?}");
}

#[test]
fn skipped_adoption_is_found() {
    is_found(contested(Bounds { timers: 1, ..Bounds::default() }, Flaw::NoAdoption));
}

#[test]
fn a_forgotten_promise_is_found() {
    is_found(contested(Bounds { crashes: 1, ..Bounds::default() }, Flaw::Forgets));
}

#[test]
fn a_vote_before_it_is_written_is_found() {
    is_found(contested(Bounds { crashes: 1, ..Bounds::default() }, Flaw::VoteEarly));
}
