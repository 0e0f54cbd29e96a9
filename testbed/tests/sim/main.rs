//! The simulator: many seeds, the mutants, and named cases of the core in virtual time.
//!
//! A seed that fails says which command runs it again: `godwit-lab sim --seed N`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cases;
mod clusters;
mod moves;
mod power;
mod voters;

use godwit_protocol::wire::migrate::Status;
use godwit_testbed::sim::campaign::{self, Report};
use godwit_testbed::sim::mutant::{self, Mutant};
use godwit_testbed::sim::swarm;
use godwit_testbed::sim::trace::Coverage;
use godwit_testbed::sim::world::{World, migration};

/// How many seeds: more of them are `godwit-lab sim --seeds N`.
const SEEDS: u64 = 1600;
/// How many seeds from a mutant's own one are tried: the one that caught it when it was pinned may be
/// another one after any change.
const TRIED: u64 = 400;

fn status(world: &World, i: usize, n: u8) -> Option<&Status> {
    world.core(i).statuses().find(|s| s.id == migration(n))
}

fn none_fails(report: &Report) {
    for outcome in &report.violations {
        let breach = outcome.breach.as_ref().unwrap();
        eprintln!("replay: {}\n{breach}", outcome.replay(None));
    }
    assert!(report.violations.is_empty(), "{} seeds fail", report.violations.len());
}

#[test]
fn seeds_end_well() {
    let report = campaign::run_seeds(0, SEEDS);
    none_fails(&report);
    let seen = &report.seen;
    eprintln!("{seen:?}");
    let least = [
        (seen.committed, 400),
        (seen.aborted, 200),
        (seen.unknown_resolved, 200),
        (seen.partitions, 1000),
        (seen.crashes, 1000),
        (seen.torn_writes, 20),
        (seen.pauses, 100),
        (seen.strangers, 1000),
        (seen.rebased, 20),
        (seen.lost, 1),
        (seen.cutover_faults, SEEDS / 2),
    ];
    assert!(least.iter().all(|(n, least)| n >= least), "the faults miss: {seen:?}");
}

/// Fewer seeds than a thousand are a replay, which need not see everything.
#[test]
fn a_campaign_that_missed_something_does_not_pass() {
    let seen = Coverage {
        committed: 1,
        aborted: 1,
        unknown_resolved: 1,
        partitions: 1,
        crashes: 1,
        torn_writes: 1,
        rebased: 1,
        ..Coverage::default()
    };
    let of = |seeds, seen| {
        let report = Report { seeds, violations: Vec::new(), trace: 0, seen, clusters: 0 };
        (report.passed(), report.unseen())
    };
    assert_eq!(of(1000, seen), (true, Vec::new()));
    let without = [
        ("committed", Coverage { committed: 0, ..seen }),
        ("aborted", Coverage { aborted: 0, ..seen }),
        ("unknown_resolved", Coverage { unknown_resolved: 0, ..seen }),
        ("partitions", Coverage { partitions: 0, ..seen }),
        ("crashes", Coverage { crashes: 0, ..seen }),
        ("torn_writes", Coverage { torn_writes: 0, ..seen }),
        ("rebased", Coverage { rebased: 0, ..seen }),
    ];
    for (name, seen) in without {
        assert_eq!(of(1000, seen), (false, vec![name]));
        assert_eq!(of(999, seen), (true, Vec::new()));
    }
}

/// Seeds that found what was wrong with the core, and say what. A change of the simulator makes other
/// seeds of them: the named cases and all seeds together are what keeps it right.
const FOUND: [(u64, &str); 3] = [
    (729, "the QEMU of an earlier migration's copy was taken for that of the source"),
    (1524, "and for that of a bound destination"),
    (2277, "a source that was taken up after a restart took anybody for its lead"),
];

#[test]
fn seeds_that_found_something_end_well() {
    for (seed, what) in FOUND {
        let outcome = campaign::run_one(seed, Mutant::None, false);
        assert!(outcome.breach.is_none(), "{what}: {}", outcome.breach.unwrap());
    }
}

/// Whichever thread runs a seed, and however often.
#[test]
fn the_same_seed_gives_the_same_trace() {
    let twice = [0, 1].map(|_| campaign::run_seeds(32, 64).trace);
    assert_eq!(twice[0], twice[1]);
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    (32..96).for_each(|seed| {
        hasher.update(&campaign::run_one(seed, Mutant::None, false).trace.to_le_bytes());
    });
    assert_eq!(hasher.digest(), twice[0]);
    assert_ne!(campaign::run_seeds(33, 64).trace, twice[0]);
}

#[test]
fn a_route_reaches_a_swarm_of_hundreds_in_two_seconds() {
    for seed in 1..=3 {
        let spread = swarm::spread(300, seed);
        eprintln!("{spread:?}");
        assert!(spread.most_ms < swarm::MOST_MS && spread.all_ms < 20_000, "{spread:?}");
        // Nobody is told more than a few times.
        assert!(spread.messages < 20 * 300, "{spread:?}");
    }
}

/// The checkers find what is wrong on purpose, each for its own reason.
#[test]
fn every_mutant_is_caught() {
    assert!(mutant::ALL.len() >= 10);
    for (case, outcome) in campaign::hunt_all(TRIED) {
        let seed = outcome.as_ref().map(|o| o.seed);
        eprintln!("{} is caught by seed {seed:?}", case.name);
        assert!(outcome.is_some(), "{} goes unnoticed", case.name);
    }
}
