//! Named cases of VMs that are off: ended, started again, removed, whoever is away.

use godwit_protocol::id::CopyId;
use godwit_protocol::migrate::Effect;
use godwit_protocol::wire::migrate::Phase;
use godwit_protocol::wire::record::{Cause, Record};
use godwit_testbed::sim::check::epochs;
use godwit_testbed::sim::event::Event;
use godwit_testbed::sim::faults::Faults;
use godwit_testbed::sim::qemu::Qemu;
use godwit_testbed::sim::seeds::{settle, three_lone};
use godwit_testbed::sim::world::{CLUSTER, World, host, vm};

use super::status;

/// VMs 0 and 1 run on hosts 0 and 1 of four, VM 2 is off on host 1.
pub fn one_is_off(seed: u64, faults: Faults) -> World {
    let mut world = World::empty(4, seed, faults);
    world.add_cluster(10, &[0, 1], &[0, 1, 2]);
    let mut record = world.decided.values().next().unwrap().clone();
    record.placement.push(world.add_off(vm(2), 1));
    world.decided.clear();
    world.decree(record);
    world.boot();
    world
}

fn newest(world: &World, k: usize) -> Record {
    epochs::newest(world, vm(k)).unwrap().clone()
}

/// The copy of VM 2 that is placed.
fn copy(world: &World) -> CopyId {
    newest(world, 2).placement_of(vm(2)).unwrap().copy
}

fn runs_at(world: &World) -> Option<usize> {
    world.running(vm(2)).map(|(_, at)| at)
}

/// The guest of a lone VM ends by itself; its host's driver sees that. Nobody answers for so long.
fn ends_unheard(world: &mut World, k: usize) -> (CopyId, usize) {
    let (copy, at) = world.running(vm(k)).unwrap();
    world.off.insert(vm(k));
    world.may_lose.insert(vm(k));
    for other in (0..4).filter(|i| *i != at) {
        world.cut_off(other, true, true);
    }
    world.kill(copy);
    (copy, at)
}

#[test]
fn a_member_that_is_off_is_started_where_it_moved_to() {
    let mut world = one_is_off(1, Faults::quiet());
    let old = copy(&world);
    assert!(world.ask_cluster(1, &[(vm(2), 2)]));
    settle(&mut world);
    assert!(world.turn_on(vm(2)));
    assert!(world.run_until(5000, |w| runs_at(w) == Some(3)));
    let record = newest(&world, 2);
    assert!(record.cause == Cause::On(vm(2)) && !record.is_off(vm(2)));
    assert!(copy(&world) != old && runs_at(&world) == Some(3), "each start is another copy");
    settle(&mut world);
    // It moves live with the others.
    assert!(world.ask_cluster(2, &[(vm(0), 1), (vm(2), 2)]));
    settle(&mut world);
    assert_eq!((world.running(vm(0)).unwrap().1, runs_at(&world)), (2, Some(2)));
}

#[test]
fn a_start_is_refused_while_it_moves_runs_or_is_removed() {
    let mut world = one_is_off(1, Faults::quiet());
    assert!(world.ask_cluster(1, &[(vm(2), 2)]));
    let no = world.run_until(20_000, |w| w.core(1).is_moving(vm(2)));
    let now = world.now;
    assert!(
        no && world.core(1).may_turn_on(now, vm(2)).unwrap_err().contains("moves: wait for it")
    );
    settle(&mut world);
    let now = world.now;
    assert!(world.core(1).may_turn_on(now, vm(2)).unwrap_err().contains("not on this host"));
    let (left, now) = (copy(&world), world.now);
    world.act(3, |core, now| core.remove(now, vm(2), left)).unwrap().unwrap();
    assert!(world.core(3).may_turn_on(now, vm(2)).unwrap_err().contains("removed"));
    let mut world = one_is_off(1, Faults::quiet());
    assert!(world.turn_on(vm(2)));
    assert!(world.run_until(5000, |w| runs_at(w) == Some(1)));
    let now = world.now;
    assert!(world.core(1).is_on(vm(2)) && world.core(1).may_turn_on(now, vm(2)).is_err());
}

/// Its host dies before each of its steps in turn: it is booted once, or not decided.
#[test]
fn every_crash_point_of_a_start_ends_well() {
    let (mut points, mut on) = (0, 0);
    for i in [0, 1, 2] {
        for after in 1.. {
            let mut world = one_is_off(after, Faults::quiet());
            world.nodes[i].crash_at = Some(world.nodes[i].steps + after);
            world.turn_on(vm(2));
            world.run(3000);
            let died = world.nodes[i].start > 0;
            settle(&mut world);
            on += usize::from(runs_at(&world) == Some(1));
            if !died {
                break;
            }
            points += 1;
        }
    }
    eprintln!("{points} crash points, {on} on");
    assert!(points > 10 && on > points / 2);
}

#[test]
fn it_is_started_once_and_moves_at_most_once_whatever_happens() {
    let (mut on, mut moved) = (0, 0);
    for seed in 0..120 {
        let faults = if seed % 2 == 0 { Faults::stormy() } else { Faults::stormy().aimed() };
        let mut world = one_is_off(seed, faults);
        world.at(40 * (seed % 60), Event::Start(vm(2), 20));
        world.ask_cluster(1, &[(vm(0), 2), (vm(2), 2)]);
        if seed % 3 == 0 {
            world.at(300 + 20 * seed, Event::Crash((seed % 4) as usize, 2000));
        }
        world.run(20_000);
        settle(&mut world);
        on += usize::from(runs_at(&world).is_some());
        moved += usize::from(newest(&world, 2).placement_of(vm(2)).unwrap().host == host(3));
    }
    assert!(on > 60 && moved > 10 && moved < 120, "{on} on, {moved} moved");
}

/// The decree comes to nothing in time, its host restarts, and it is asked for again.
#[test]
fn a_start_that_was_not_decided_in_time_is_the_same_one_when_it_is_asked_for_again() {
    let mut world = one_is_off(1, Faults::quiet());
    for other in [0, 2] {
        world.cut_off(other, true, true);
    }
    assert!(world.turn_on(vm(2)));
    world.run(15_000);
    assert!(runs_at(&world).is_none() && world.decided.len() == 1);
    world.crash(1, 100);
    world.run(1000);
    world.cut.clear();
    assert!(world.turn_on(vm(2)));
    assert!(world.run_until(20_000, |w| runs_at(w) == Some(1)));
    let minted = world.copies.values().filter(|c| c.vm == vm(2)).count();
    assert_eq!(minted, 1, "the copy that was minted first is the one that runs");
}

#[test]
fn what_cannot_be_booted_is_off_again() {
    let mut world = one_is_off(1, Faults::quiet());
    let old = copy(&world);
    world.faults.fail = 1.0;
    assert!(world.turn_on(vm(2)));
    assert!(
        world.run_until(20_000, |w| matches!(newest(w, 2).cause, Cause::Off(r) if r.vm == vm(2)))
    );
    assert!(
        copy(&world) != old && newest(&world, 2).is_off(vm(2)),
        "what was minted has its disks"
    );
    settle(&mut world);
    assert!(world.turn_on(vm(2)));
    assert!(world.run_until(20_000, |w| runs_at(w) == Some(1)));
}

#[test]
fn a_member_that_ended_meanwhile_finishes_its_join() {
    let mut world = three_lone(1, Faults::quiet());
    world.create_cluster(3);
    world.run(500);
    world.join(1);
    assert!(world.run_until(5000, |w| matches!(newest(w, 1).cause, Cause::Joined(_))));
    let (copy, at) = ends_unheard(&mut world, 1);
    world.act(at, |core, now| core.ended(now, vm(1), copy));
    world.run(30_000);
    assert!(matches!(newest(&world, 1).cause, Cause::Joined(_)), "nobody was reached");
    world.cut.clear();
    assert!(
        world.run_until(60_000, |w| matches!(newest(w, 1).cause, Cause::Off(r) if r.vm == vm(1)))
    );
    assert_eq!(newest(&world, 1).cluster, CLUSTER);
}

/// What `vm stop` begins without a majority ends when there is one, also when its daemon was restarted.
#[test]
fn a_removal_waits_for_a_majority() {
    for restarts in [false, true] {
        let mut world = three_lone(1, Faults::quiet());
        let (copy, at) = ends_unheard(&mut world, 1);
        let remove = |world: &mut World| {
            world.act(at, |core, now| core.remove(now, vm(1), copy)).unwrap().unwrap();
        };
        remove(&mut world);
        world.run(30_000);
        assert!(newest(&world, 1).cause == Cause::Create && world.core(at).is_removing(vm(1)));
        if restarts {
            world.crash(at, 100);
            world.run(1000);
            remove(&mut world); // Its driver reads that on the disk.
        }
        world.cut.clear();
        assert!(world.run_until(30_000, |w| newest(w, 1).cause == Cause::Delete));
        world.run(100);
        assert!(!world.core(at).is_removing(vm(1)));
    }
}

#[test]
fn a_record_that_was_forced_and_is_older_is_corrected() {
    let mut world = three_lone(1, Faults::quiet());
    let base = newest(&world, 1);
    let (copy, at) = ends_unheard(&mut world, 1);
    world.cut.clear();
    world.act(at, |core, now| core.ended(now, vm(1), copy));
    assert!(
        world.run_until(20_000, |w| matches!(newest(w, 1).cause, Cause::Off(r) if r.vm == vm(1)))
    );
    world.run(30_000);
    // Who forces knows only the record from before.
    let epoch = godwit_protocol::id::Epoch((1 << 32) | 7);
    let forced = Record { epoch, cause: Cause::Force("lost".into()), ..base };
    for i in 0..4 {
        world.act(i, |core, now| core.learned(now, forced.clone()));
    }
    assert!(!newest(&world, 1).is_off(vm(1)));
    assert!(world.run_until(30_000, |w| newest(w, 1).is_off(vm(1))), "without a restart");
}

fn is_rebuild(effect: &Effect) -> bool {
    matches!(effect, Effect::Rebuild(_))
}

/// A bound destination whose QEMU is gone, taken up after its VM left the cluster: there is an end to it.
#[test]
fn a_bound_destination_that_left_its_cluster_does_not_wait_for_ever() {
    let mut world = World::empty(5, 1, Faults::quiet());
    world.add_cluster(10, &[0, 0, 1], &[0, 1, 2]);
    world.boot();
    assert!(world.ask_cluster(1, &[(vm(0), 2), (vm(1), 3), (vm(2), 3)]));
    let loaded = |w: &World| w.copies.values().filter(|c| c.qemu == Qemu::Loaded).count();
    assert!(world.run_until(60_000, |w| loaded(w) == 3));
    let of = |c: &CopyId, w: &World| w.copies[c].vm == vm(2) && w.copies[c].qemu == Qemu::Loaded;
    let gone = world.copies.keys().copied().find(|c| of(c, &world)).unwrap();
    world.kill(gone);
    // Its driver does not come to building it again before it dies.
    let builds = |w: &World| w.nodes[4].work.values().flatten().any(|(_, e)| is_rebuild(e));
    assert!(world.run_until(1000, builds));
    world.nodes[4].work.values_mut().for_each(|work| work.retain(|(_, e)| !is_rebuild(e)));
    let moved = |w: &World, i| matches!(w.core(i).newest(CLUSTER).unwrap().cause, Cause::Move(_));
    assert!(world.run_until(20_000, |w| moved(w, 2) && moved(w, 4)));
    assert!(world.act(2, |core, now| core.release(now, CLUSTER, &[vm(2)], false)).unwrap().is_ok());
    let left = |w: &World| w.core(4).record_of(vm(2)).is_some_and(Record::is_lone);
    assert!(world.run_until(30_000, left) && world.nodes[4].is_bound());
    world.crash(4, 500);
    settle(&mut world);
    assert!(!world.nodes[4].is_bound());
    assert!(world.core(4).statuses().all(|s| s.phase.is_end()));
    assert_eq!(status(&world, 0, 1).unwrap().phase, Phase::Lost);
}

/// What ends where it stays does not end what the others are at: its record says so afterwards.
#[test]
fn a_member_that_stays_and_ends_lets_the_others_move() {
    let mut world = World::empty(5, 1, Faults::quiet());
    world.add_cluster(10, &[0, 1, 2], &[0, 1, 2]);
    world.boot();
    assert!(world.ask_cluster(1, &[(vm(0), 2), (vm(1), 3)]));
    assert!(world.run_until(20_000, |w| w.nodes[0].sending.len() + w.nodes[1].sending.len() == 2));
    let (gone, at) = world.running(vm(2)).unwrap();
    world.off.insert(vm(2));
    world.may_lose.insert(vm(2));
    world.kill(gone);
    world.act(at, |core, now| core.ended(now, vm(2), gone));
    assert!(world.run_until(60_000, |w| newest(w, 2).is_off(vm(2))));
    assert_eq!(status(&world, 0, 1).unwrap().phase, Phase::Moved);
    settle(&mut world);
    let at = |k| world.running(vm(k)).unwrap().1;
    assert_eq!((at(0), at(1)), (3, 4));
}
