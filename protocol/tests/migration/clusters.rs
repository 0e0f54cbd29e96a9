//! Clusters come and go, VMs join and leave, and at no time are there two records that own one VM.

use std::collections::BTreeMap;

use godwit_protocol::id::{CopyId, Epoch, VmId};
use godwit_protocol::wire::record::{Cause, Record};

use super::world::{CLUSTER, Faults, World, host, vm};

/// The records that place a VM, by epoch: it goes from one cluster to the next by their rules, and no
/// two of them share a number.
pub fn owned_once(world: &World) {
    for vm in &world.vms {
        let places = |r: &&Record| r.placement_of(*vm).is_some() || r.cluster == *vm;
        let mut line: Vec<&Record> = world.decided.values().filter(places).collect();
        line.sort_by_key(|r| r.epoch);
        for pair in line.windows(2) {
            let [old, new] = pair else { continue };
            assert!(old.epoch < new.epoch, "one VM has one number twice: {old:?} {new:?}");
            let fits = match &new.cause {
                // Who was not told of every record may not know how a VM left.
                _ if old.cluster == new.cluster => true,
                Cause::Add { vm: added, above } => {
                    added == vm && old.epoch == *above && old.cause == Cause::Joined(new.cluster)
                }
                Cause::Left(_) | Cause::Delete => new.cluster == *vm,
                _ => false,
            };
            assert!(fits, "owned twice: {old:?} {new:?}");
        }
    }
}

/// The newest record that places a VM, of all that were decided.
fn newest(world: &World, vm: VmId) -> &Record {
    let places = |r: &&Record| r.placement_of(vm).is_some() || r.cluster == vm;
    world.decided.values().filter(places).max_by_key(|r| r.epoch).unwrap()
}

/// Three VMs of their own on hosts 0, 1 and 2 of four, at epochs far apart.
fn lone(seed: u64, faults: Faults) -> World {
    let mut world = World::empty(4, seed, faults);
    for (k, epoch) in [1, 40, 7].into_iter().enumerate() {
        world.add_lone(vm(k), k, epoch, &[0, 1, 2]);
    }
    world.boot();
    world
}

fn quiet() -> Faults {
    Faults { delay_ms: 20, ..Faults::default() }
}

fn create(world: &mut World, i: usize) {
    let name = "web".parse().unwrap();
    // Refused if it was begun before.
    world.act(i, |core, now| drop(core.create_cluster(now, CLUSTER, name)));
}

fn record(world: &World) -> Option<Record> {
    let of = |c: &&Record| c.cluster == CLUSTER;
    world.decided.values().filter(of).max_by_key(|r| r.epoch).cloned()
}

/// The host of VM `k` is asked to let it join.
fn join(world: &mut World, k: usize) {
    let (Some(record), Some((_, at))) = (record(world), world.running(vm(k))) else { return };
    world.act(at, |core, now| drop(core.join(now, vm(k), record)));
}

fn release(world: &mut World, i: usize, k: usize) {
    world.act(i, |core, now| drop(core.release(now, CLUSTER, &[vm(k)], false)));
}

fn all_members(world: &World) -> bool {
    record(world).is_some_and(|r| (0..3).all(|k| r.placement_of(vm(k)).is_some()))
}

/// Nobody is left between two records.
fn is_settled(world: &World) -> bool {
    (0..3).all(|k| !matches!(newest(world, vm(k)).cause, Cause::Joined(_)))
}

#[test]
fn three_vms_make_a_cluster_above_all_their_epochs_and_part_again() {
    let mut world = lone(1, quiet());
    create(&mut world, 3);
    world.run(500);
    for k in 0..3 {
        join(&mut world, k);
        world.run(3000);
    }
    assert!(all_members(&world), "{:#?}", world.decided);
    let made = record(&world).unwrap();
    assert_eq!(made.epoch, Epoch(43), "the second VM's last own epoch is 41");
    let order: Vec<VmId> = made.placement.iter().map(|p| p.vm).collect();
    assert_eq!(order, [vm(0), vm(1), vm(2)]);
    release(&mut world, 0, 1);
    world.run(3000);
    let own = newest(&world, vm(1)).clone();
    assert_eq!((own.cluster, own.epoch, own.cause), (vm(1), Epoch(45), Cause::Left(CLUSTER)));
    assert_eq!(world.core(1).record_of(vm(1)).unwrap().cluster, vm(1), "its host knows");
    // It comes back; then the cluster is deleted.
    join(&mut world, 1);
    world.run(3000);
    assert!(all_members(&world));
    world.act(0, |core, now| core.dissolve(now, CLUSTER)).unwrap().unwrap();
    world.run(3000);
    assert!((0..3).all(|k| newest(&world, vm(k)).is_lone()));
    assert_eq!(world.core(0).clusters().count(), 0);
    owned_once(&world);
}

#[test]
fn a_lone_vm_moves_again_after_it_left() {
    let mut world = lone(1, quiet());
    create(&mut world, 0);
    world.run(500);
    join(&mut world, 0);
    world.run(3000);
    assert!(!world.ask(1, |k| k), "a member does not move alone");
    release(&mut world, 0, 0);
    world.run(3000);
    assert!(world.ask(2, |k| k));
    assert!(world.run_until(60_000, |w| w.running(vm(0)).is_some_and(|(_, at)| at == 1)));
    world.run(10_000);
    owned_once(&world);
}

/// The word by which a VM joined is worth nothing once it has been a member.
#[test]
fn an_old_word_does_not_bring_a_vm_back() {
    let mut world = lone(1, quiet());
    create(&mut world, 0);
    world.run(500);
    join(&mut world, 1);
    world.run(3000);
    let joined = world.decided[&(vm(1), Epoch(41))].clone();
    release(&mut world, 1, 1);
    world.run(3000);
    let base = record(&world).unwrap();
    let stale = Record {
        epoch: base.epoch.next().max(joined.epoch.next()),
        placement: joined.placement.clone(),
        departed: Vec::new(),
        cause: Cause::Add { vm: vm(1), above: joined.epoch },
        ..base.clone()
    };
    assert!(!stale.may_follow(&base));
}

/// Whoever has a part dies before each of its steps in turn; the cluster is made all the same.
#[test]
fn every_crash_point_of_joining_ends_well() {
    let mut points = 0;
    for i in 0..4 {
        for after in 1.. {
            let mut world = lone(after, quiet());
            world.nodes[i].crash_at = Some(world.nodes[i].steps + after);
            for round in 0..6 {
                create(&mut world, 3);
                world.run(200);
                (0..3).for_each(|k| join(&mut world, k));
                world.run(if round == 0 { 2500 } else { 6000 });
            }
            assert!(all_members(&world), "node {i} at {after}: {:#?}", world.decided);
            owned_once(&world);
            if world.nodes[i].start == 0 {
                break;
            }
            points += 1;
        }
    }
    eprintln!("{points} crash points");
    assert!(points > 80);
}

fn storm(seed: u64) -> World {
    let faults =
        Faults { loss: 0.1, double: 0.1, crash: 0.004, delay_ms: 200, ..Faults::default() };
    let mut world = lone(seed, faults);
    create(&mut world, 3);
    for _ in 0..30 {
        let (ms, what, k, i) =
            (world.below(2500), world.below(10), world.below(3) as usize, world.below(4) as usize);
        world.run(ms);
        match what {
            0..=4 => join(&mut world, k),
            5 | 6 => release(&mut world, i, k),
            7 => world.act(i, |core, now| drop(core.dissolve(now, CLUSTER))).unwrap_or(()),
            8 => world.at(1, super::Event::Ask(seed as u8)),
            _ => world.crash(i, 3000),
        }
    }
    world.faults = quiet();
    world
}

#[test]
fn storms_leave_every_vm_with_one_owner() {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..400 {
        let mut world = storm(seed);
        let done = world.run_until(120_000, is_settled);
        assert!(done, "seed {seed}: between two records:\n{:#?}", world.decided);
        world.run(60_000);
        owned_once(&world);
        for k in 0..3 {
            let (_, at) = world.running(vm(k)).unwrap_or((CopyId([0; 16]), 9));
            assert!(newest(&world, vm(k)).placement_of(vm(k)).is_some_and(|p| p.host == host(at)));
        }
        for record in world.decided.values() {
            let what = match record.cause {
                Cause::Add { .. } => "added",
                Cause::Release { .. } => "released",
                Cause::Dissolve(_) => "dissolved",
                Cause::Move => "moved",
                _ => continue,
            };
            *seen.entry(what).or_default() += 1;
        }
    }
    eprintln!("{seen:?}");
    let enough = |what, least| seen.get(what).is_some_and(|n| *n >= least);
    assert!(enough("added", 400) && enough("released", 100) && enough("dissolved", 50), "{seen:?}");
}

#[test]
fn a_forced_record_ends_the_wait_for_a_lost_majority() {
    let mut world = lone(1, quiet());
    world.gossip = true;
    for i in 0..2 {
        world.crash(i, 10_000_000);
    }
    let base = newest(&world, vm(2)).clone();
    assert!(world.act(2, |core, now| core.delete(now, vm(2))).unwrap().is_ok());
    world.run(20_000);
    assert_eq!(newest(&world, vm(2)), &base, "no majority decides");
    let forced = world.act(2, |core, now| core.force(now, vm(2), "lost both".into()));
    let forced = forced.unwrap().unwrap();
    assert!(forced.epoch > Epoch(1 << 32) && forced.voters.len() == 1);
    assert_eq!(forced.placement, base.placement);
    world.run(20_000);
    assert_eq!(world.core(3).newest(vm(2)).unwrap().epoch, base.epoch, "not named, not told");
    world.act(2, |core, now| core.delete(now, vm(2))).unwrap().unwrap();
    world.run(2000);
    assert_eq!(newest(&world, vm(2)).cause, Cause::Delete);
}
