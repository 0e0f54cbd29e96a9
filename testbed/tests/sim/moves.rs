//! Named cases of a cluster that moves: each crash point, and who may be away.

use godwit_protocol::migrate::wait;
use godwit_protocol::wire::control::Control;
use godwit_protocol::wire::migrate::{Body, Phase};
use godwit_protocol::wire::record::Cause;
use godwit_testbed::sim::check::epochs;
use godwit_testbed::sim::event::Event;
use godwit_testbed::sim::faults::Faults;
use godwit_testbed::sim::qemu::Qemu;
use godwit_testbed::sim::seeds::settle;
use godwit_testbed::sim::world::{CLUSTER, World, host, vm};

use super::power::one_is_off;
use super::status;

/// Three VMs on hosts 0, 0 and 1 of five; all move to hosts 3 and 4.
fn quiet(seed: u64) -> World {
    let mut world = World::empty(5, seed, Faults::quiet());
    world.add_cluster(10, &[0, 0, 1], &[0, 1, 2]);
    world.boot();
    world
}

fn ask(world: &mut World) {
    // The k-th of the others: of 0's that is k + 1.
    assert!(world.ask_cluster(1, &[(vm(0), 2), (vm(1), 3), (vm(2), 3)]));
}

fn asked() -> World {
    let mut world = quiet(1);
    ask(&mut world);
    world
}

fn at(world: &World) -> Vec<usize> {
    (0..3).filter_map(|k| world.running(vm(k)).map(|(_, at)| at)).collect()
}

fn loaded(world: &World) -> usize {
    world.copies.values().filter(|c| c.qemu == Qemu::Loaded).count()
}

fn says(message: &Control, f: fn(&Body) -> bool) -> bool {
    matches!(message, Control::Migrate(m) if f(&m.body))
}

#[test]
fn three_vms_move_in_one_epoch() {
    let mut world = asked();
    settle(&mut world);
    assert_eq!(at(&world), [3, 4, 4]);
    assert_eq!(world.decided.len(), 2);
    let lead = status(&world, 0, 1).unwrap();
    assert_eq!((lead.phase, lead.members.len(), lead.done_ppm), (Phase::Moved, 3, 1_000_000));
    assert!(lead.members.iter().all(|m| m.phase == Phase::Moved && m.downtime_us.is_some()));
    let (stop, resume) = (lead.stop_spread_us.unwrap(), lead.resume_spread_us.unwrap());
    assert!(stop < 100_000 && resume < 100_000, "{stop} {resume}");
    assert!(lead.downtime_us.is_some() && lead.stop_budget_us == wait::STOPPED_MS * 1000);
    // Who asked was told.
    assert_eq!(status(&world, 4, 1).unwrap().phase, Phase::Moved);
    // And back: host 3 leads now.
    assert!(world.ask_cluster(2, &[(vm(0), 0), (vm(1), 1), (vm(2), 2)]));
    settle(&mut world);
    assert_eq!(at(&world), [0, 1, 2]);
}

/// Every host that has a part dies before each of its steps in turn, and comes back.
#[test]
fn every_crash_point_of_a_cluster_ends_well() {
    let (mut points, mut moved) = (0, 0);
    for i in [0, 1, 2, 3, 4] {
        for after in 1.. {
            let mut world = quiet(after);
            world.nodes[i].crash_at = Some(world.nodes[i].steps + after);
            ask(&mut world);
            world.run(5000);
            settle(&mut world);
            assert_eq!(at(&world).len(), 3, "node {i} at {after}");
            moved += usize::from(at(&world) == [3, 4, 4]);
            if world.nodes[i].start == 0 {
                break;
            }
            points += 1;
        }
    }
    eprintln!("{points} crash points, {moved} moved");
    assert!(points > 200 && moved > 50 && moved < points);
}

#[test]
fn a_lead_that_dies_after_the_stop_is_not_needed() {
    let mut world = asked();
    assert!(world.run_until(60_000, |w| loaded(w) == 3));
    // Host 2 votes, and leads nothing: the proposer needs host 1 and 2.
    world.crash(0, 100_000);
    assert!(world.run_until(10_000, |w| at(w) == [3, 4, 4]), "decided without its lead");
    settle(&mut world);
    assert_eq!(status(&world, 0, 1).unwrap().phase, Phase::Moved);
}

#[test]
fn a_lead_that_dies_before_the_stop_ends_the_move() {
    let mut world = asked();
    world.hold = |m| says(m, |b| matches!(b, Body::BallotReady));
    assert!(world.run_until(60_000, |w| !w.held.is_empty()));
    world.held.clear();
    world.crash(0, 300_000);
    assert!(world.run_until(120_000, |w| w.copies.len() == 3), "nothing is left of it");
    settle(&mut world);
    assert_eq!((at(&world), world.decided.len()), (vec![0, 0, 1], 1));
}

#[test]
fn one_member_that_does_not_load_keeps_all() {
    let mut world = asked();
    // The word of host 4's members never reaches the proposer on host 3.
    world.hold = |m| says(m, |b| matches!(b, Body::LoadedToo(..)));
    assert!(world.run_until(60_000, |w| loaded(w) == 3));
    let stopped = world.now;
    assert!(world.run_until(30_000, |w| at(w) == [0, 0, 1]), "the stop phase has a deadline");
    assert!(world.now.ms_since(stopped) < 13_000);
    settle(&mut world);
    assert_eq!(at(&world), [0, 0, 1]);
    let lead = status(&world, 0, 1).unwrap();
    assert!(lead.phase == Phase::Stayed && lead.cause.contains("stood still"), "{}", lead.cause);
}

#[test]
fn a_member_that_does_not_stop_in_time_keeps_all() {
    let mut world = asked();
    let stop = |m: &Control| matches!(m, Control::Migrate(m) if matches!(m.body, Body::Stop(..)) && m.vm == vm(2));
    world.hold = stop;
    assert!(world.run_until(60_000, |w| w.copies.values().any(|c| c.qemu == Qemu::Stopped)));
    let stopped = world.now;
    assert!(world.run_until(30_000, |w| w.decided.len() == 2));
    assert!(world.now.ms_since(stopped) < 4_000, "long before the deadline of the phase");
    world.release();
    settle(&mut world);
    assert_eq!(at(&world), [0, 0, 1]);
}

#[test]
fn a_lead_in_the_minority_is_moved_without() {
    let mut world = asked();
    assert!(world.run_until(60_000, |w| loaded(w) == 3));
    world.cut_off(0, true, true);
    assert!(world.run_until(30_000, |w| at(w) == [3, 4, 4]));
    world.run(60_000);
    settle(&mut world);
    assert_eq!(at(&world), [3, 4, 4]);
    assert_eq!(status(&world, 0, 1).unwrap().phase, Phase::Moved);
}

#[test]
fn a_proposer_in_the_minority_is_stayed_without() {
    let mut world = asked();
    assert!(world.run_until(60_000, |w| loaded(w) == 2));
    world.cut_off(3, true, true);
    assert!(world.run_until(60_000, |w| at(w) == [0, 0, 1]));
    settle(&mut world);
    assert_eq!(at(&world), [0, 0, 1]);
}

/// Where the record says that VM 2 is, and that its disks are there, as they were.
fn off_at(world: &World) -> usize {
    let newest = world.decided.values().next_back().unwrap();
    let off = newest.placement_of(vm(2)).unwrap();
    let copy = &world.copies[&off.copy];
    assert!(off.off && host(copy.at) == off.host && copy.qemu == Qemu::Dead, "{copy:?}");
    assert_eq!(Some(&copy.content), world.truth.get(&vm(2)));
    assert!(!newest.names(vm(2), off.host, off.copy), "no copy of it may run");
    copy.at
}

#[test]
fn a_member_that_is_switched_off_moves_with_the_others() {
    let mut world = one_is_off(1, Faults::quiet());
    assert!(world.ask_cluster(1, &[(vm(0), 2), (vm(2), 2)]));
    settle(&mut world);
    assert_eq!(off_at(&world), 3);
    assert_eq!((world.running(vm(0)).unwrap().1, world.running(vm(1)).unwrap().1), (3, 1));
    let left = world.copies.values().filter(|c| c.vm == vm(2)).count();
    assert_eq!(left, 1, "what it had at its old host is given up");
}

#[test]
fn a_member_that_is_switched_off_moves_alone() {
    let mut world = one_is_off(1, Faults::quiet());
    assert!(world.ask_cluster(1, &[(vm(2), 2)]));
    settle(&mut world);
    assert_eq!(off_at(&world), 3);
}

#[test]
fn a_member_that_is_switched_off_is_where_the_record_says_whatever_happens() {
    let mut at = [0; 4];
    for seed in 0..60 {
        let faults = if seed % 2 == 0 { Faults::stormy() } else { Faults::stormy().aimed() };
        let mut world = one_is_off(seed, faults);
        world.ask_cluster(1, &[(vm(0), 2), (vm(2), 2)]);
        match seed % 3 {
            0 => world.at(300 + 20 * seed, Event::Kill(false)),
            1 => world.at(300 + 20 * seed, Event::Crash((seed % 4) as usize, 2000)),
            _ => {}
        }
        world.run(20_000);
        settle(&mut world);
        at[off_at(&world)] += 1;
    }
    assert!(at[1] > 0 && at[3] > 0, "{at:?}");
}

#[test]
fn a_guest_that_ended_by_itself_is_off_once_it_can_be_decided() {
    let mut world = quiet(1);
    let (copy, at) = world.running(vm(2)).unwrap();
    world.off.insert(vm(2));
    world.may_lose.insert(vm(2));
    world.kill(copy);
    for other in [0, 2] {
        world.cut_off(other, true, true);
    }
    world.act(at, |core, now| core.ended(now, vm(2), copy));
    world.run(30_000);
    assert_eq!(world.decided.len(), 1, "no majority");
    world.cut.clear();
    assert!(world.run_until(60_000, |w| w.decided.len() == 2));
    let newest = world.decided.values().next_back().unwrap();
    assert!(
        matches!(newest.cause, Cause::Off(r) if r.vm == vm(2))
            && newest.places(vm(2), host(at), copy)
    );
    assert!(newest.is_off(vm(2)) && !newest.is_off(vm(1)));
}

#[test]
fn a_change_of_the_record_ends_a_move_and_nobody_is_lost() {
    let mut world = asked();
    assert!(world.run_until(60_000, |w| loaded(w) >= 1));
    // Somebody else's view: host 2 lets a member leave.
    world.act(2, |core, now| core.release(now, CLUSTER, &[vm(2)], false)).unwrap().unwrap();
    settle(&mut world);
    assert_eq!(at(&world).len(), 3);
    epochs::owned_once(&world).unwrap();
}
