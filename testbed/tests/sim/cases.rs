//! Named cases: each crash point, and the races that the design speaks of.

use godwit_protocol::id::CopyId;
use godwit_protocol::wire::control::Control;
use godwit_protocol::wire::epoch::Body as Vote;
use godwit_protocol::wire::migrate::{Body, Message, Phase};
use godwit_protocol::wire::record::{Cause, Release};

use godwit_testbed::sim::faults::Faults;
use godwit_testbed::sim::qemu::Qemu;
use godwit_testbed::sim::seeds::{is_settled, settle};
use godwit_testbed::sim::world::{VM, World, host, migration};

use super::status;

fn quiet(nodes: usize, voters: &[usize], seed: u64) -> World {
    World::new(nodes, voters, seed, Faults::quiet())
}

/// Four hosts, three voters; migration 1 to host `to` is asked for.
fn asked(to: usize) -> World {
    let mut world = quiet(4, &[0, 1, 2], 1);
    assert!(world.ask(1, |k| (to - 1 + k) % 3));
    world
}

fn copy_at(world: &World, i: usize) -> Option<CopyId> {
    world.copies.iter().find(|(_, c)| c.at == i).map(|(id, _)| *id)
}

fn is(world: &World, i: usize, qemu: Qemu) -> bool {
    world.copies.values().any(|c| c.at == i && c.qemu == qemu)
}

fn phase(world: &World, i: usize) -> Phase {
    status(world, i, 1).unwrap().phase
}

fn is_move_accept(message: &Control) -> bool {
    let Control::Epoch(message) = message else { return false };
    matches!(&message.body, Vote::Accept { record, .. } if matches!(record.cause, Cause::Move(_)))
}

fn is_accept(message: &Control) -> bool {
    matches!(message, Control::Epoch(m) if matches!(m.body, Vote::Accept { .. }))
}

fn says(message: &Control, f: fn(&Body) -> bool) -> bool {
    matches!(message, Control::Migrate(m) if f(&m.body))
}

#[test]
fn a_guest_moves() {
    let mut world = asked(3);
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 3);
    assert_eq!((phase(&world, 0), phase(&world, 3)), (Phase::Moved, Phase::Moved));
    assert_eq!(world.decided.len(), 2);
}

/// Every host that has a part dies before each of its steps in turn, and comes back.
#[test]
fn every_crash_point_ends_well() {
    let mut points = 0;
    for voters in [&[0][..], &[0, 1, 2], &[1, 2, 3]] {
        for (i, seed) in (0..3).flat_map(|i| (0..3).map(move |seed| (i, seed))) {
            for after in 1.. {
                let mut world = quiet(4, voters, seed);
                world.nodes[i].crash_at = Some(world.nodes[i].steps + after);
                world.ask(1, |k| k);
                world.run(4000);
                settle(&mut world);
                assert!(world.running(VM).is_some(), "node {i} at {after}");
                if world.nodes[i].start == 0 {
                    break;
                }
                points += 1;
            }
        }
    }
    eprintln!("{points} crash points");
    assert!(points > 300);
}

#[test]
fn a_delayed_and_doubled_accept_loses_against_stay() {
    let mut world = asked(3);
    world.hold = is_move_accept;
    assert!(world.run_until(60_000, |w| w.decided.len() == 2));
    assert!(matches!(world.decided.values().last().unwrap().cause, Cause::Stay(_)));
    assert!(!world.held.is_empty());
    world.release();
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 0);
    assert_eq!((phase(&world, 0), phase(&world, 3)), (Phase::Stayed, Phase::Stayed));
}

#[test]
fn an_accept_that_reached_a_voter_is_adopted_by_the_resolving_source() {
    let mut world = asked(3);
    world.hold = is_move_accept;
    assert!(world.run_until(60_000, |w| w.held.len() >= 3));
    // One voter gets it; the destination is gone for long.
    let (from, to, message) = world.held.pop().unwrap();
    world.act(to, |core, now| core.message(now, host(from), message));
    world.held.clear();
    world.crash(3, 100_000);
    world.hold = |_| false;
    assert!(world.run_until(60_000, |w| w.decided.len() == 2));
    settle(&mut world);
    let moved = matches!(world.decided.values().last().unwrap().cause, Cause::Move(_));
    assert_eq!(world.running(VM).unwrap().1, if moved { 3 } else { 0 });
}

#[test]
fn a_destination_lost_while_loaded_is_built_again() {
    let mut world = asked(3);
    world.hold = is_accept;
    assert!(world.run_until(60_000, |w| is(w, 3, Qemu::Loaded)));
    world.run(100);
    world.kill(copy_at(&world, 3).unwrap());
    world.run(1000);
    assert!(is(&world, 3, Qemu::Loaded), "built again before the decision");
    world.kill(copy_at(&world, 3).unwrap());
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 3);
    assert!(world.may_lose.is_empty());
}

#[test]
fn a_destination_lost_between_decision_and_cont_is_built_again() {
    let mut world = asked(3);
    assert!(world.run_until(60_000, |w| w.decided.len() == 2));
    assert!(is(&world, 3, Qemu::Loaded));
    world.kill(copy_at(&world, 3).unwrap());
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 3);
}

/// The first try to build it again fails before the decision: it is tried again after it.
#[test]
fn a_failed_rebuild_before_the_decision_does_not_strand_the_guest() {
    for seed in 0..20 {
        let mut world = quiet(4, &[0, 1, 2], seed);
        assert!(world.ask(1, |k| (2 + k) % 3));
        world.hold = is_accept;
        assert!(world.run_until(60_000, |w| is(w, 3, Qemu::Loaded)));
        world.faults.fail = 1.0;
        world.run(100);
        world.kill(copy_at(&world, 3).unwrap());
        world.run(500);
        settle(&mut world);
        assert!(world.running(VM).is_some(), "seed {seed}");
    }
}

#[test]
fn a_destination_lost_after_it_ran_is_lost() {
    let mut world = asked(3);
    world.hold = |m| says(m, |b| matches!(b, Body::Running { .. }));
    assert!(world.run_until(60_000, |w| is(w, 3, Qemu::Running)));
    world.run(100);
    world.kill(copy_at(&world, 3).unwrap());
    world.run(200);
    world.held.clear();
    settle(&mut world);
    assert_eq!(world.running(VM), None);
    assert_eq!((phase(&world, 0), phase(&world, 3)), (Phase::Lost, Phase::Lost));
}

#[test]
fn the_lead_dies_in_the_transfer_and_the_guest_stays() {
    let mut world = asked(3);
    world.hold = |m| says(m, |b| matches!(b, Body::BallotReady));
    assert!(world.run_until(60_000, |w| !w.held.is_empty()));
    world.held.clear();
    world.crash(0, 5000);
    world.run(20_000);
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 0);
    assert_eq!(world.decided.len(), 1, "nothing was decided");
    assert_eq!(phase(&world, 0), Phase::Stayed);
}

#[test]
fn the_destination_dies_in_the_transfer_and_is_asked_again() {
    let mut world = asked(3);
    world.hold = |m| says(m, |b| matches!(b, Body::BallotReady));
    assert!(world.run_until(60_000, |w| !w.held.is_empty()));
    world.crash(3, 2000);
    world.held.clear();
    world.hold = |_| false;
    assert!(world.run_until(30_000, |w| is(w, 3, Qemu::Running)), "once it is back");
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 3);
}

#[test]
fn a_source_in_the_minority_is_moved_without() {
    let mut world = asked(1);
    assert!(world.run_until(60_000, |w| is(w, 1, Qemu::Loaded)));
    world.cut_off(0, true, true);
    assert!(world.run_until(30_000, |w| is(w, 1, Qemu::Running)), "the majority decides");
    world.run(60_000);
    assert!(is(&world, 0, Qemu::Stopped), "kept until it hears");
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 1);
}

#[test]
fn a_destination_in_the_minority_is_stayed_without() {
    let mut world = asked(3);
    assert!(world.run_until(60_000, |w| is(w, 3, Qemu::Loaded)));
    world.cut_off(3, true, true);
    assert!(
        world.run_until(60_000, |w| is(w, 0, Qemu::Running)),
        "the guest does not stand for ever"
    );
    world.run(60_000);
    assert!(is(&world, 3, Qemu::Loaded), "bound until it hears");
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 0);
}

#[test]
fn a_source_that_is_away_does_not_keep_the_move_open() {
    let mut world = asked(1);
    assert!(world.run_until(60_000, |w| is(w, 1, Qemu::Running)));
    world.crash(0, 900_000);
    assert!(world.run_until(200_000, |w| phase(w, 1).is_end()));
    assert_eq!(phase(&world, 1), Phase::Moved);
    assert!(world.ask(2, |_| 2), "it can be moved on: to host 3");
    assert!(world.run_until(60_000, |w| is(w, 3, Qemu::Running)));
    world.run(800_000);
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 3);
    assert_eq!(phase(&world, 0), Phase::Moved, "the returning source learns how it ended");
}

#[test]
fn lost_ballot_answers_are_given_again() {
    let mut world = asked(3);
    world.hold = |m| says(m, |b| matches!(b, Body::BallotReady));
    world.run(8000);
    world.held.clear();
    world.hold = |_| false;
    assert!(world.run_until(10_000, |w| is(w, 3, Qemu::Running)), "not before the deadline");
    settle(&mut world);
}

#[test]
fn an_earlier_candidate_keeps_nothing() {
    let mut world = asked(1);
    // Host 1 hears, but is not heard; the next candidate is host 2.
    world.cut.extend([(1, 0)]);
    world.run(70_000);
    assert!(world.run_until(30_000, |w| w.running(VM).is_some_and(|(_, at)| at == 2)));
    world.cut.clear();
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 2);
}

#[test]
fn members_that_take_no_part_change_nothing() {
    let mut world = asked(1);
    assert!(world.run_until(60_000, |w| is(w, 1, Qemu::Loading)));
    world.run(60);
    let base = world.decided.values().next().unwrap().clone();
    let (copy, epoch) = (base.placement[0].copy, base.epoch.next());
    let release = Release { vm: VM, copy, epoch };
    let bodies = [
        Body::Ready,
        Body::Refused("x".into()),
        Body::PrepareBallot(Vec::new()),
        Body::Stopped(release),
        Body::LoadedToo(CopyId([77; 16]), release),
        Body::NoLead,
        Body::BallotReady,
        Body::Cancel("x".into()),
        Body::Failed("x".into()),
        Body::Loaded(CopyId([77; 16])),
        Body::Running { copy: CopyId([77; 16]), resumed_us: 1 },
        Body::Lost("x".into()),
        Body::Unknown,
        Body::Released,
    ];
    let epoch = base.epoch;
    for to in [0, 1] {
        for body in bodies.clone() {
            let message = Message { id: migration(1), vm: VM, base: epoch, body };
            let message = Control::Migrate(message);
            world.act(to, |core, now| core.message(now, host(2), message));
        }
        let mut word = status(&world, 0, 1).unwrap().clone();
        (word.phase, word.from) = (Phase::Moved, host(2));
        let word = Control::Progress(Box::new(word));
        world.act(to, |core, now| core.message(now, host(2), word));
        assert!(!phase(&world, to).is_end());
    }
    // A record that is not the one that it says, or not of this VM's host.
    let spec = Vec::new();
    for (record, base) in [(base.clone(), epoch.next()), (base, epoch)] {
        let on = host(2);
        let options = Default::default();
        let record = Box::new(record);
        let body =
            Body::Prepare { record, spec: spec.clone(), options, requested_on: on, led: None };
        let message = Message { id: migration(9), vm: VM, base, body };
        let message = Control::Migrate(message);
        world.act(3, |core, now| core.message(now, host(2), message));
    }
    assert_eq!(world.core(3).migration_of(VM), None);
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 1);
}

#[test]
fn a_late_copy_of_prepare_starts_nothing() {
    let mut world = quiet(4, &[0, 1, 2], 1);
    world.hold = |m| says(m, |b| matches!(b, Body::Prepare { .. }));
    assert!(world.ask(1, |k| (2 + k) % 3));
    world.run(3000);
    let late = world.held.clone();
    assert!(!late.is_empty());
    world.release();
    assert!(world.run_until(60_000, is_settled));
    let copies = world.minted;
    for (from, to, message) in late {
        world.act(to, |core, now| core.message(now, host(from), message));
    }
    world.run(30_000);
    assert_eq!(world.minted, copies);
    settle(&mut world);
}
