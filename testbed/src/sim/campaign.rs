//! Many seeds on all processors, and the mutants, in one report.
//!
//! Owns the threads. Invariant: the hash of a campaign is that of its seeds in their order, whichever
//! thread ran them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use serde_json::{Value, json};

use super::check::{Breach, Invariant};
use super::mutant::{self, Mutant};
use super::seeds::{self, Kind};
use super::swarm;
use super::trace::Coverage;

/// How a seed ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// The hash over all that happened in it.
    pub trace: u64,
    /// What it saw.
    pub seen: Coverage,
    /// The first invariant that did not hold.
    pub breach: Option<Breach>,
}

impl Outcome {
    /// The command that runs it again.
    #[must_use]
    pub fn replay(&self, mutant: Option<&str>) -> String {
        let mutant = mutant.map(|name| format!(" --mutant {name}")).unwrap_or_default();
        format!("godwit-lab sim --seed {}{mutant}", self.seed)
    }
}

/// Runs one seed; an end of the code itself is a breach like others. With `log` everything is told.
#[must_use]
pub fn run_one(seed: u64, mutant: Mutant, log: bool) -> Outcome {
    match catch_unwind(AssertUnwindSafe(|| seeds::run(seed, mutant, log))) {
        Ok(world) => {
            Outcome { seed, trace: world.trace.hash(), seen: world.seen, breach: world.breach }
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
            let breach = Breach { invariant: Invariant::Panic, what: text.to_owned() };
            Outcome { seed, trace: 0, seen: Coverage::default(), breach: Some(breach) }
        }
    }
}

/// Does `job` for each number on every processor; the answers are in the order of the numbers.
fn on_all<T: Send>(numbers: core::ops::Range<u64>, job: impl Fn(u64) -> T + Sync) -> Vec<T> {
    let next = AtomicU64::new(numbers.start);
    let done = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= numbers.end {
                        return;
                    }
                    let answer = job(number);
                    let mut done = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    done.push((number, answer));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, answer)| answer).collect()
}

/// A campaign of fewer seeds is not judged by what it saw: it replays.
const JUDGED: u64 = 1000;

/// What a campaign found.
#[derive(Debug)]
pub struct Report {
    /// How many seeds.
    pub seeds: u64,
    /// Those that breached something.
    pub violations: Vec<Outcome>,
    /// The hash over all.
    pub trace: u64,
    /// What they saw, together.
    pub seen: Coverage,
    /// Seeds in which a cluster moves.
    pub clusters: u64,
}

/// Runs the seeds from `first` on.
#[must_use]
pub fn run_seeds(first: u64, seeds: u64) -> Report {
    let outcomes = on_all(first..first + seeds, |seed| run_one(seed, Mutant::None, false));
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    let (mut seen, mut violations, mut clusters) = (Coverage::default(), Vec::new(), 0);
    for outcome in outcomes {
        hasher.update(&outcome.trace.to_le_bytes());
        seen.add(&outcome.seen);
        clusters += u64::from(seeds::kind(outcome.seed) == Kind::Cluster);
        if outcome.breach.is_some() {
            violations.push(outcome);
        }
    }
    Report { seeds, violations, trace: hasher.digest(), seen, clusters }
}

impl Report {
    /// What a campaign of so many seeds must have seen and has not.
    #[must_use]
    pub fn unseen(&self) -> Vec<&'static str> {
        let seen = &self.seen;
        let all = [
            ("committed", seen.committed),
            ("aborted", seen.aborted),
            ("unknown_resolved", seen.unknown_resolved),
            ("partitions", seen.partitions),
            ("crashes", seen.crashes),
            ("torn_writes", seen.torn_writes),
            ("rebased", seen.rebased),
        ];
        let judged = self.seeds >= JUDGED;
        all.into_iter().filter(|(_, n)| judged && *n == 0).map(|(name, _)| name).collect()
    }

    /// Whether nothing was breached, and enough was seen to say so.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.violations.is_empty() && self.unseen().is_empty()
    }
}

/// The first seed of its range that catches a mutant, and whether for the right reason.
#[must_use]
pub fn hunt(case: &mutant::Case, tried: u64) -> Option<Outcome> {
    let caught =
        |o: &Outcome| o.breach.as_ref().is_some_and(|b| case.caught_by.contains(&b.invariant));
    (case.seed..case.seed + tried).map(|seed| run_one(seed, case.mutant, false)).find(caught)
}

/// Hunts all mutants.
#[must_use]
pub fn hunt_all(tried: u64) -> Vec<(&'static mutant::Case, Option<Outcome>)> {
    let all = 0..mutant::ALL.len() as u64;
    on_all(all, |i| {
        let case = &mutant::ALL[i as usize];
        (case, hunt(case, tried))
    })
}

/// One seed again, with a mutant or none, as `godwit-lab sim --seed` tells it.
///
/// # Errors
/// If no mutant has that name.
pub fn replay(seed: u64, name: Option<&str>, log: bool) -> anyhow::Result<Value> {
    let mutant = match name {
        Some(name) => {
            mutant::find(name).with_context(|| format!("no mutant is called {name}"))?.mutant
        }
        None => Mutant::None,
    };
    let outcome = run_one(seed, mutant, log);
    let breach = outcome.breach.as_ref().map(ToString::to_string);
    if let Some(breach) = &breach {
        eprintln!("{breach}");
    }
    Ok(json!({
        "passed": breach.is_none(),
        "seed": seed,
        "kind": format!("{:?}", seeds::kind(seed)),
        "trace_hash": format!("{:016x}", outcome.trace),
        "violation": breach.map(|b| b.lines().next().unwrap_or_default().to_owned()),
        "seen": format!("{:?}", outcome.seen),
    }))
}

/// A campaign as `godwit-lab sim` reports it.
#[must_use]
pub fn report(seeds: u64, swarm: usize) -> Value {
    let began = Instant::now();
    let spread = swarm::spread(swarm, 1);
    let found = run_seeds(0, seeds);
    let seeds_s = began.elapsed().as_secs_f64();
    for outcome in found.violations.iter().take(5) {
        if let Some(breach) = &outcome.breach {
            let what: String = breach.what.chars().take(600).collect();
            eprintln!("{:?}: {what}\n  {}", breach.invariant, outcome.replay(None));
        }
    }
    let mutants = hunt_all(mutant::TRIED);
    let caught = mutants.iter().filter(|(_, o)| o.is_some()).count();
    let tell = |(case, outcome): &(&mutant::Case, Option<Outcome>)| {
        let seed = outcome.as_ref().map(|o| o.seed);
        let by = outcome.as_ref().and_then(|o| o.breach.as_ref());
        let by = by.map(|b| format!("{:?}", b.invariant));
        json!({ "name": case.name, "caught": outcome.is_some(), "seed": seed, "by": by })
    };
    let seen = &found.seen;
    let replays: Vec<_> = found.violations.iter().map(|o| o.replay(None)).collect();
    json!({
        "passed": found.passed()
            && caught == mutants.len()
            && spread.most_ms < swarm::MOST_MS,
        "seeds": found.seeds,
        "violations": found.violations.len(),
        "replay": replays,
        "trace_hash": format!("{:016x}", found.trace),
        "coverage": {
            "committed": seen.committed,
            "aborted": seen.aborted,
            "unknown_resolved": seen.unknown_resolved,
            "partitions": seen.partitions,
            "crashes": seen.crashes,
            "torn_writes": seen.torn_writes,
            "rebased": seen.rebased,
            "unseen": found.unseen(),
            "pauses": seen.pauses,
            "strangers": seen.strangers,
            "seeds_of_clusters": found.clusters,
            "seeds_with_fault_in_cluster_cutover": seen.cutover_faults,
        },
        "mutants_caught": caught,
        "mutants_total": mutants.len(),
        "mutants": mutants.iter().map(tell).collect::<Vec<_>>(),
        "swarm": {
            "hosts": spread.hosts,
            "routes": spread.routes,
            "half_ms": spread.half_ms,
            "most_ms": spread.most_ms,
            "all_ms": spread.all_ms,
            "messages": spread.messages,
            "host_bytes_per_s": spread.host_bytes_per_s,
        },
        "seeds_s": seeds_s,
        "time_s": began.elapsed().as_secs_f64(),
    })
}
