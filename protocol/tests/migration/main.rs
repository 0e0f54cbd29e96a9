//! Whole migrations between production cores, in virtual time, with faults from a seed.
//!
//! After every step: at most one copy runs, and only one that a decided record names; one record
//! per epoch; the guest is somewhere. Once faults stop: every migration ends, nothing is left over.
//! `GODWIT_SEED=n cargo test -p godwit-protocol --test migration replay -- --nocapture` runs one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod asks;
mod cases;
mod clusters;
mod moves;
mod qemu;
mod voters;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use godwit_protocol::core::{Core, Value};
use godwit_protocol::id::VmId;
use godwit_protocol::wire::migrate::{Phase, Status};
use godwit_protocol::wire::record::{Cause, governing};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use qemu::Qemu;
use world::{CLUSTER, Event, Faults, Mutant, World, host, index};

/// No migration may take longer than this once faults have stopped, virtual milliseconds.
const BOUND_MS: u64 = 400_000;

fn is_settled(world: &World) -> bool {
    let moves = |c: &Core| world.vms.iter().chain([&CLUSTER]).any(|vm| c.is_moving(*vm));
    let idle = |n: &world::Node| n.core.as_ref().is_some_and(|c| !moves(c));
    let routed = |vm: &VmId| match world.running(*vm) {
        Some((_, at)) => world.nodes.iter().all(|n| {
            let route = n.core.as_ref().and_then(|c| c.routes().get(*vm));
            route.is_some_and(|r| r.host == host(at))
        }),
        None => world.may_lose.contains(vm) || world.off.contains(vm),
    };
    world.nodes.iter().all(idle) && world.vms.iter().all(routed)
}

/// Faults stop: everything must end, and end well.
fn settle(world: &mut World) {
    world.faults = Faults { delay_ms: 20, ..Faults::default() };
    world.cut.clear();
    world.release();
    world.nodes.iter_mut().for_each(|n| n.crash_at = None);
    let done = world.run_until(BOUND_MS, is_settled);
    assert!(done, "never ends:\n{}", describe(world));
    // Stragglers, and what is still in the workers' hands.
    world.run(35_000);
    assert!(is_settled(world), "came back:\n{}", describe(world));
    verify(world);
}

fn statuses(world: &World, i: usize) -> Vec<&Status> {
    world.core(i).statuses().collect()
}

fn status(world: &World, i: usize, n: u8) -> Option<&Status> {
    statuses(world, i).into_iter().find(|s| s.id == world::migration(n))
}

fn describe(world: &World) -> String {
    let mut text = format!("copies {:?}\nrecords {:#?}\n", world.copies, world.decided);
    for i in 0..world.nodes.len() {
        let Some(core) = &world.nodes[i].core else {
            text += &format!("node {i} is down\n");
            continue;
        };
        let moving: Vec<_> = world.vms.iter().map(|vm| core.migration_of(*vm)).collect();
        let route = |vm: &VmId| core.routes().get(*vm).map(|r| (index(r.host), r.epoch));
        let route: Vec<_> = world.vms.iter().map(route).collect();
        let said: Vec<_> = core.statuses().map(|s| (s.id, s.phase, s.cause.clone())).collect();
        text += &format!("node {i}: moving {moving:?}, route {route:?}, statuses {said:?}\n");
    }
    text
}

fn verify(world: &World) {
    let living: Vec<_> = world.copies.values().filter(|c| c.qemu != Qemu::Dead).collect();
    let expected = world.vms.iter().filter(|vm| world.running(**vm).is_some()).count();
    assert_eq!(living.len(), expected, "copies are left over:\n{}", describe(world));
    for vm in &world.vms {
        let newest = governing(world.decided.values(), *vm).unwrap();
        let named = world.running(*vm).is_none_or(|(copy, at)| newest.names(*vm, host(at), copy));
        assert!(named, "the newest record names another copy:\n{}", describe(world));
    }
    for (i, node) in world.nodes.iter().enumerate() {
        let bound = node.disk.values().filter(|v| matches!(v, Value::Moving(_))).count();
        assert_eq!(bound, 0, "node {i} is bound for ever:\n{}", describe(world));
        for value in node.disk.values() {
            let Value::Status(status) = value else { continue };
            assert!(status.phase.is_end(), "open on the disk of node {i}: {status:?}");
        }
        for s in statuses(world, i) {
            truthful(world, i, s);
        }
    }
}

/// What a status says is so, and both ends say the same.
fn truthful(world: &World, i: usize, s: &Status) {
    // What others know by hearsay may be stale: the last word may be lost, they ask the source.
    assert!(s.from != host(i) || s.phase.is_end(), "node {i} says {s:?}");
    match s.phase {
        Phase::Moved => {
            let next = &world.decided[&(s.cluster, s.epoch_before.next())];
            assert_eq!(next.cause, Cause::Move, "{s:?}");
            let to = |vm| next.placement_of(vm).map(|p| p.host);
            if s.vm == CLUSTER {
                assert!(s.members.iter().all(|m| to(m.vm) == m.to), "{s:?}");
            } else {
                assert_eq!(to(s.vm), s.to, "{s:?}");
            }
        }
        Phase::Lost => assert!(!world.may_lose.is_empty(), "lost, and nothing was killed: {s:?}"),
        _ => {}
    }
    if let (true, Some(to)) = (s.from == host(i), s.to) {
        let other = statuses(world, index(to)).into_iter().find(|o| o.id == s.id && o.to == s.to);
        let phases = other.map(|o| (s.phase, o.phase));
        let split = [Some((Phase::Moved, Phase::Stayed)), Some((Phase::Stayed, Phase::Moved))];
        assert!(!split.contains(&phases), "the ends disagree: {phases:?}\n{}", describe(world));
    }
}

fn random_faults(rng: &mut StdRng) -> Faults {
    let mut sometimes = |p: f64, most: f64| {
        if rng.random_bool(p) { rng.random_range(0.0..most) } else { 0.0 }
    };
    Faults {
        loss: sometimes(0.6, 0.3),
        double: sometimes(0.6, 0.2),
        crash: sometimes(0.5, 0.02),
        fail: sometimes(0.3, 0.3),
        delay_ms: 2 + sometimes(0.9, 150.0) as u64,
    }
}

/// What else happens while migration `n` does.
fn random_events(world: &mut World, rng: &mut StdRng, n: u8, start: u64) {
    let nodes = world.nodes.len();
    let mut soon = || start + rng.random_range(0..3000);
    let (abort, kill, kill_running) = (soon(), soon(), soon());
    let cuts: Vec<_> = (0..2).map(|_| (soon(), soon() - start)).collect();
    if rng.random_bool(0.15) {
        world.at(abort, Event::Abort(n));
    }
    if rng.random_bool(0.25) {
        world.at(kill, Event::Kill(false));
    }
    if rng.random_bool(0.04) {
        world.at(kill_running, Event::Kill(true));
    }
    for (at, long) in cuts {
        if !rng.random_bool(0.3) {
            continue;
        }
        let (x, both) = (rng.random_range(0..nodes), rng.random_bool(0.6));
        for y in (0..nodes).filter(|y| *y != x) {
            world.at(at, Event::Cut(x, y));
            if both {
                world.at(at, Event::Cut(y, x));
            }
        }
        world.at(at + 3 * long * long / 1000, Event::Heal);
    }
}

/// A world, its migrations and its faults, all from one number.
fn random_world(seed: u64) -> World {
    let mut rng = StdRng::seed_from_u64(seed);
    let nodes = rng.random_range(3..=5);
    let voters: &[usize] = match rng.random_range(0..5) {
        0 => &[0],
        1 => &[0, 1],
        _ => &[0, 1, 2],
    };
    let faults = random_faults(&mut rng);
    let mut world = World::new(nodes, voters, seed, faults);
    for n in 1..=rng.random_range(1..=3_u8) {
        let start = u64::from(n - 1) * 7000;
        world.at(start, Event::Ask(n));
        random_events(&mut world, &mut rng, n, start);
    }
    world
}

fn run_seed(seed: u64, mutant: Mutant) -> World {
    let mut world = random_world(seed);
    world.mutant = mutant;
    world.run(24_000);
    settle(&mut world);
    world
}

/// Runs the seeds; the first that fails says how it is run again. Returns how often each end came.
fn run_seeds(
    what: &str,
    seeds: core::ops::Range<u64>,
    run: fn(u64, Mutant) -> World,
) -> BTreeMap<&'static str, u64> {
    let mut ends = BTreeMap::new();
    for seed in seeds {
        let result = catch_unwind(AssertUnwindSafe(|| run(seed, Mutant::None)));
        let world = result.unwrap_or_else(|panic| {
            eprintln!(
                "replay: GODWIT_SEED={seed} cargo test -p godwit-protocol --test migration \
                 {what} -- --nocapture"
            );
            resume_unwind(panic)
        });
        let leads = |s: &Status| world.vms.len() == 1 || s.vm == CLUSTER;
        for i in 0..world.nodes.len() {
            for s in statuses(&world, i).into_iter().filter(|s| s.from == host(i) && leads(s)) {
                *ends
                    .entry(match s.phase {
                        Phase::Moved => "moved",
                        Phase::Stayed => "stayed",
                        _ => "lost",
                    })
                    .or_default() += 1;
            }
        }
        let started: u64 = world.nodes.iter().map(|n| n.start).sum();
        *ends.entry("crashes").or_default() += started;
    }
    eprintln!("{ends:?}");
    ends
}

#[test]
fn seeds_end_well() {
    let ends = run_seeds("replay", 0..4000, run_seed);
    for (what, least) in [("moved", 400), ("stayed", 200), ("lost", 5), ("crashes", 400)] {
        assert!(ends.get(what).is_some_and(|n| *n >= least), "the faults miss: {ends:?}");
    }
}

#[test]
fn more_seeds_end_well() {
    run_seeds("replay", 10_000..14_000, run_seed);
}

/// One seed, or a range of them by hand: `GODWIT_SEED=7` or `GODWIT_SEED=0-100000`.
fn replay_seeds(what: &str, run: fn(u64, Mutant) -> World) {
    let Ok(text) = std::env::var("GODWIT_SEED") else { return };
    let (first, last) = text.split_once('-').unwrap_or((&text, &text));
    run_seeds(what, first.parse().unwrap()..last.parse::<u64>().unwrap() + 1, run);
}

#[test]
fn replay() {
    replay_seeds("replay", run_seed);
}

/// The checkers find what is wrong on purpose, each for its own reason.
fn catch_mutants(mutants: &[(Mutant, &str)], run: fn(u64, Mutant) -> World) {
    for (mutant, reasons) in mutants {
        let caught = |seed: &u64| {
            let result = catch_unwind(AssertUnwindSafe(|| run(*seed, *mutant)));
            let Err(panic) = result else { return false };
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default();
            reasons.split('|').any(|reason| text.contains(reason))
        };
        let seed = (0..3000).find(caught);
        eprintln!("{mutant:?} is caught by seed {seed:?}");
        assert!(seed.is_some(), "{mutant:?} goes unnoticed");
    }
}

#[test]
fn every_mutant_is_caught() {
    let mutants = [
        (Mutant::CleanRead, "two copies run"),
        (Mutant::ContEarly, "no decided record names the copy that runs|two copies run"),
        (Mutant::Unbound, "two copies run"),
        (Mutant::VoteEarly, "two records for one epoch"),
        (Mutant::DiscardEarly, "the source copy went before its successor ran"),
    ];
    catch_mutants(&mutants, run_seed);
}
