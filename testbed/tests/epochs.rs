//! Every order of events of small decisions: no two records for one epoch, whatever comes when.
//!
//! The search finds each of two flaws within like bounds, so that it is known to look where they are.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use godwit_testbed::sim::explore::{Bounds, Explorer, Flaw, Found, Small, contested};

/// More states than any of these worlds has.
const MOST: usize = 3_000_000;

fn explore(small: Small) -> Found {
    let found = Explorer::new(small, MOST).run();
    eprintln!("{found:?}");
    found
}

/// The same three voters; only the destination proposes. Should it die, it gives up when it is back.
fn alone(bounds: Bounds) -> Small {
    let mut small = contested(bounds, Flaw::None);
    small.wants.truncate(1);
    small
}

/// Two voters, who are those that want something.
fn pair(bounds: Bounds) -> Small {
    let mut small = contested(bounds, Flaw::None);
    small.nodes = 2;
    small.base.voters.truncate(2);
    small.wants.iter_mut().for_each(|(_, record)| record.voters.truncate(2));
    small
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
fn a_crash_at_every_place_of_one_proposal() {
    all_agree(&explore(alone(Bounds { crashes: 1, ..Bounds::default() })));
}

#[test]
fn two_voters_with_a_crash_a_timer_and_a_double() {
    all_agree(&explore(pair(Bounds { crashes: 1, timers: 1, doubles: 1 })));
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
