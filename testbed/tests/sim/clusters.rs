//! Clusters come and go, VMs join and leave, and at no time are there two records that own one VM.

use godwit_protocol::id::{Epoch, VmId};
use godwit_protocol::wire::record::{Cause, Record};
use godwit_testbed::sim::check::{Invariant, epochs};
use godwit_testbed::sim::faults::Faults;
use godwit_testbed::sim::mutant::Mutant;
use godwit_testbed::sim::seeds::three_lone;
use godwit_testbed::sim::world::{CLUSTER, World, vm};

fn newest(world: &World, vm: VmId) -> &Record {
    epochs::newest(world, vm).unwrap()
}

fn owned_once(world: &World) {
    epochs::owned_once(world).unwrap();
}

fn all_members(world: &World) -> bool {
    world.cluster().is_some_and(|r| (0..3).all(|k| r.placement_of(vm(k)).is_some()))
}

#[test]
fn three_vms_make_a_cluster_above_all_their_epochs_and_part_again() {
    let mut world = three_lone(1, Faults::quiet());
    world.create_cluster(3);
    world.run(500);
    for k in 0..3 {
        world.join(k);
        world.run(3000);
    }
    assert!(all_members(&world), "{:#?}", world.decided);
    let made = world.cluster().cloned().unwrap();
    assert_eq!(made.epoch, Epoch(43), "the second VM's last own epoch is 41");
    let order: Vec<VmId> = made.placement.iter().map(|p| p.vm).collect();
    assert_eq!(order, [vm(0), vm(1), vm(2)]);
    world.part(0, 1);
    world.run(3000);
    let own = newest(&world, vm(1)).clone();
    assert_eq!((own.cluster, own.epoch, own.cause), (vm(1), Epoch(45), Cause::Left(CLUSTER)));
    assert_eq!(world.core(1).record_of(vm(1)).unwrap().cluster, vm(1), "its host knows");
    // It comes back; then the cluster is deleted.
    world.join(1);
    world.run(3000);
    assert!(all_members(&world));
    world.act(0, |core, now| core.dissolve(now, CLUSTER)).unwrap().unwrap();
    world.run(3000);
    assert!((0..3).all(|k| newest(&world, vm(k)).is_lone()));
    assert_eq!(world.core(0).clusters().count(), 0);
    owned_once(&world);
}

/// Voters cannot know the VM's own epochs: they vote for such a record, and the checker sees it.
#[test]
fn a_record_below_a_members_own_is_seen() {
    for (mutant, epoch) in [(Mutant::None, 42), (Mutant::MergeBelow, 2)] {
        let mut world = three_lone(1, Faults::quiet());
        (world.strict, world.mutant) = (false, mutant);
        world.create_cluster(3);
        world.run(500);
        world.join(1);
        world.run(3000);
        let added = |r: &&Record| matches!(r.cause, Cause::Add { .. });
        let first = world.decided.values().find(added).unwrap();
        assert_eq!((first.epoch, first.voters.len()), (Epoch(epoch), 1));
        let breach = world.breach.as_ref().map(|b| (b.invariant, &b.what[..11]));
        let seen = (mutant == Mutant::MergeBelow).then_some((Invariant::Epochs, "owned twice"));
        assert_eq!(breach, seen);
    }
}

#[test]
fn a_lone_vm_moves_again_after_it_left() {
    let mut world = three_lone(1, Faults::quiet());
    world.create_cluster(0);
    world.run(500);
    world.join(0);
    world.run(3000);
    assert!(!world.ask(1, |k| k), "a member does not move alone");
    world.part(0, 0);
    world.run(3000);
    assert!(world.ask(2, |k| k));
    assert!(world.run_until(60_000, |w| w.running(vm(0)).is_some_and(|(_, at)| at == 1)));
    world.run(10_000);
    owned_once(&world);
}

/// The word by which a VM joined is worth nothing once it has been a member.
#[test]
fn an_old_word_does_not_bring_a_vm_back() {
    let mut world = three_lone(1, Faults::quiet());
    world.create_cluster(0);
    world.run(500);
    world.join(1);
    world.run(3000);
    let joined = world.decided[&(vm(1), Epoch(41))].clone();
    world.part(1, 1);
    world.run(3000);
    let base = world.cluster().cloned().unwrap();
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
            let mut world = three_lone(after, Faults::quiet());
            world.nodes[i].crash_at = Some(world.nodes[i].steps + after);
            for round in 0..6 {
                world.create_cluster(3);
                world.run(200);
                (0..3).for_each(|k| world.join(k));
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

#[test]
fn a_forced_record_ends_the_wait_for_a_lost_majority() {
    let mut world = three_lone(1, Faults::quiet());
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
