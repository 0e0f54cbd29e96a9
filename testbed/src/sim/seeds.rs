//! From a number to a whole world: its hosts, its VMs, what they are asked for, and what goes wrong.
//!
//! Owns the kinds of seeds and how a run ends: faults stop, then everything must end, and end well.

use godwit_protocol::id::VmId;
use godwit_protocol::wire::record::Cause;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::check::{self, Invariant, epochs};
use super::event::Event;
use super::faults::Faults;
use super::frames;
use super::mutant::Mutant;
use super::world::{CLUSTER, VM, World, host, vm};

/// No migration may take longer than this once faults have stopped, virtual milliseconds.
const BOUND_MS: u64 = 400_000;

/// What a seed is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One VM moves.
    Lone,
    /// One NIC moves while others send to it.
    Nic,
    /// VMs join a cluster, leave it, and it is deleted.
    Joining,
    /// A cluster of two to five VMs moves.
    Cluster,
    /// The same, and one more that is off is started meanwhile.
    Power,
}

/// What that seed is about: thirteen of sixteen are clusters that move, one of them with a member that is started.
#[must_use]
pub fn kind(seed: u64) -> Kind {
    match seed % 16 {
        0 => Kind::Lone,
        1 => Kind::Joining,
        2 => Kind::Nic,
        3 => Kind::Power,
        _ => Kind::Cluster,
    }
}

/// Runs a seed to its end. Everything follows from it. With `log` it tells everything that happens.
#[must_use]
pub fn run(seed: u64, mutant: Mutant, log: bool) -> World {
    let mut world = match kind(seed) {
        Kind::Lone => lone(seed, mutant),
        Kind::Cluster | Kind::Power => cluster(seed, mutant),
        Kind::Joining => three_lone(seed, Faults::stormy()),
        Kind::Nic => return frames::run(seed, mutant),
    };
    world.log = log;
    match kind(seed) {
        Kind::Lone => finish(world, 24_000),
        Kind::Cluster | Kind::Power => finish(world, 28_000),
        Kind::Joining | Kind::Nic => joining(world, seed, mutant),
    }
}

fn finish(mut world: World, ms: u64) -> World {
    world.run(ms);
    settle(&mut world);
    let lost = |vm: &&VmId| world.running(**vm).is_none() && !world.off.contains(vm);
    world.seen.lost = world.vms.iter().filter(lost).count() as u64;
    world
}

/// Faults stop: everything must end, and end well.
pub fn settle(world: &mut World) {
    world.calm();
    world.release();
    let ended = world.run_until(BOUND_MS, is_settled);
    // Stragglers, and what is still in the workers' hands.
    world.run(35_000);
    let came_back = !is_settled(world);
    if world.breach.is_none() && (!ended || came_back) {
        let what = if ended { "came back" } else { "never ends" };
        let which = if check::ends::idle(world) { Invariant::Routes } else { Invariant::Ends };
        return world.broken(which, format!("{what}:\n{}", check::ends::describe(world)));
    }
    world.judge(Invariant::Ends, check::ends::nothing_left(world));
    world.judge(Invariant::Teams, check::teams::together(world));
}

/// Whether every migration has ended, and everyone knows where everything runs.
#[must_use]
pub fn is_settled(world: &World) -> bool {
    check::ends::idle(world) && check::routes::converged(world)
}

/// A world that breaches nothing by ending its process.
fn lenient(nodes: usize, seed: u64, rng: &mut StdRng, mutant: Mutant) -> World {
    let faults = Faults::random(rng);
    let mut world = World::empty(nodes, seed, faults);
    (world.strict, world.mutant) = (false, mutant);
    if mutant == Mutant::AnyVote {
        world.faults.strangers = 0.3;
    }
    if rng.random_bool(0.3) {
        let slow = rng.random_range(0..nodes);
        world.nodes[slow].lag_ms = rng.random_range(1..400);
    }
    world
}

fn lone(seed: u64, mutant: Mutant) -> World {
    let mut rng = StdRng::seed_from_u64(seed);
    let nodes = rng.random_range(3..=5);
    let mut world = lenient(nodes, seed, &mut rng, mutant);
    let voters: &[usize] = match rng.random_range(0..5) {
        0 => &[0],
        1 => &[0, 1],
        _ => &[0, 1, 2],
    };
    world.add_lone(VM, 0, 1, voters);
    world.boot();
    for n in 1..=rng.random_range(1..=3_u8) {
        let start = u64::from(n - 1) * 7000;
        world.at(start, Event::Ask(n));
        world.plan(&mut rng, n, start);
    }
    lose_store(&mut world, &mut rng, voters.len());
    world
}

fn cluster(seed: u64, mutant: Mutant) -> World {
    let mut rng = StdRng::seed_from_u64(seed);
    let nodes = rng.random_range(3..=5);
    let vms = rng.random_range(2..=5);
    let mut world = lenient(nodes, seed, &mut rng, mutant);
    let aimed = rng.random_bool(0.65);
    if aimed {
        world.faults = world.faults.aimed();
    }
    let voters: &[usize] = match rng.random_range(0..6) {
        0 => &[0],
        1 => &[0, 1],
        2 => &[1, 2, 0],
        _ => &[0, 1, 2],
    };
    // With gossip, voters are topped up and replaced meanwhile.
    world.gossip = rng.random_bool(0.2);
    let hosts: Vec<usize> = (0..vms).map(|_| rng.random_range(0..nodes)).collect();
    world.add_cluster(10, &hosts, voters);
    let vms = vms + usize::from(kind(seed) == Kind::Power);
    if kind(seed) == Kind::Power {
        one_more_is_off(&mut world, &mut rng, vm(vms - 1));
    }
    world.boot();
    // Some insist: again and again, on the same hosts, before what the last try left is gone.
    let insists = rng.random_bool(0.4);
    let most = if insists { 6 } else { 3 };
    if insists {
        // So that one move follows the other.
        world.faults.ambush = 0.25;
    }
    let mut to: Vec<(VmId, usize)> = Vec::new();
    for n in 1..=rng.random_range(1..=most) {
        let start = u64::from(n - 1) * if insists { 600 } else { 8000 };
        if to.is_empty() || !insists {
            let stays = if rng.random_bool(0.3) { rng.random_range(0..vms) } else { vms };
            let member = |k| (vm(k), rng.random_range(0..nodes));
            to = (0..vms).filter(|k| *k != stays).map(member).collect();
        }
        let tries = if insists { 60 } else { 0 };
        world.at(start, Event::AskCluster(n, to.clone(), tries));
        if !aimed {
            world.plan(&mut rng, n, start);
        }
    }
    lose_store(&mut world, &mut rng, voters.len());
    world
}

/// One more member is off, and is asked for at some moments.
fn one_more_is_off(world: &mut World, rng: &mut StdRng, vm: VmId) {
    let Some(mut record) = world.cluster().cloned() else { return };
    let at = rng.random_range(0..world.nodes.len());
    record.placement.push(world.add_off(vm, at));
    world.decided.remove(&(CLUSTER, record.epoch));
    world.decree(record);
    for _ in 0..rng.random_range(1..=3) {
        world.at(rng.random_range(0..24_000), Event::Start(vm, rng.random_range(0..20)));
    }
}

/// One store may be lost where a majority of voters does without it.
fn lose_store(world: &mut World, rng: &mut StdRng, voters: usize) {
    if voters >= 3 && rng.random_bool(0.04) {
        let (at, i) = (rng.random_range(0..6000), rng.random_range(0..world.nodes.len()));
        world.at(at, Event::LoseStore(i));
    }
}

/// Three VMs of their own on hosts 0, 1 and 2 of four, at epochs far apart.
#[must_use]
pub fn three_lone(seed: u64, faults: Faults) -> World {
    let mut world = World::empty(4, seed, faults);
    for (k, epoch) in [1, 40, 7].into_iter().enumerate() {
        world.add_lone(vm(k), k, epoch, &[0, 1, 2]);
    }
    world.boot();
    world
}

fn joining(mut world: World, seed: u64, mutant: Mutant) -> World {
    (world.strict, world.mutant) = (false, mutant);
    world.create_cluster(3);
    for _ in 0..30 {
        let (ms, what, k, i) =
            (world.below(2500), world.below(10), world.below(3) as usize, world.below(4) as usize);
        world.run(ms);
        match what {
            0..=4 => world.join(k),
            5 | 6 => world.part(i, k),
            7 => world.act(i, |core, now| drop(core.dissolve(now, CLUSTER))).unwrap_or(()),
            8 => world.at(1, Event::Ask(seed as u8)),
            _ => world.crash(i, 3000),
        }
    }
    world.calm();
    let done = world.run_until(120_000, nobody_between);
    if !done && world.breach.is_none() {
        let what = format!("between two records:\n{:#?}", world.decided);
        world.broken(Invariant::Ends, what);
    }
    world.run(60_000);
    for vm in world.vms.clone() {
        let placed = epochs::newest(&world, vm).and_then(|r| r.placement_of(vm)).map(|p| p.host);
        let runs = world.running(vm).map(|(_, at)| host(at));
        if world.breach.is_none() && placed != runs {
            world.broken(Invariant::Epochs, format!("{vm:?} runs on {runs:?}, not on {placed:?}"));
        }
    }
    world
}

/// Nobody is left between two records.
#[must_use]
pub fn nobody_between(world: &World) -> bool {
    let between =
        |vm: &VmId| epochs::newest(world, *vm).is_some_and(|r| matches!(r.cause, Cause::Joined(_)));
    !world.vms.iter().any(between)
}
