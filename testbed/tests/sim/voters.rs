//! Voters are topped up as hosts join: spread over sites, once, and not while the VM moves.

use std::collections::BTreeSet;

use godwit_protocol::wire::control::Control;
use godwit_protocol::wire::migrate::Body;
use godwit_protocol::wire::record::Cause;

use godwit_testbed::sim::faults::Faults;
use godwit_testbed::sim::seeds::settle;
use godwit_testbed::sim::world::{VM, World, host, index};

fn gossiping(nodes: usize) -> World {
    let faults = Faults::quiet();
    let mut world = World::new(nodes, &[0], 1, faults);
    world.gossip = true;
    for i in 0..nodes {
        for j in (0..nodes).filter(|j| *j != i) {
            world.act(i, |core, now| core.connected(now, host(j)));
        }
    }
    world
}

#[test]
fn three_hosts_make_three_voters_once() {
    let mut world = gossiping(3);
    world.run(30_000);
    let record = world.core(0).newest(VM).unwrap().clone();
    assert_eq!((record.voters.len(), record.cause), (3, Cause::Voters));
    assert_eq!(world.decided.len(), 2);
    // A host that comes and goes changes nothing.
    for _ in 0..3 {
        world.crash(2, 8000);
        world.run(30_000);
    }
    assert_eq!(world.decided.len(), 2, "{:?}", world.decided);
}

#[test]
fn voters_are_spread_over_sites() {
    // Sites by turns: hosts 0 and 3 share one, as do 1 and 4, and 2 and 5.
    let mut world = gossiping(6);
    world.run(30_000);
    let voters = &world.core(0).newest(VM).unwrap().voters;
    let sites: BTreeSet<usize> = voters.iter().map(|v| index(v.host) % 3).collect();
    assert_eq!((voters.len(), sites.len()), (5, 3));
}

#[test]
fn two_hosts_keep_one_voter() {
    let mut world = gossiping(2);
    world.run(30_000);
    assert_eq!(world.decided.len(), 1);
}

#[test]
fn no_voter_is_added_while_the_vm_moves() {
    let mut world = gossiping(2);
    world.hold = |m| matches!(m, Control::Migrate(m) if matches!(m.body, Body::BallotReady));
    assert!(world.ask(1, |k| k));
    world.run(20_000);
    // Moving for long; then a third host would be there, were it not for the move.
    assert_eq!(world.decided.len(), 1);
    world.held.clear();
    settle(&mut world);
    assert_eq!(world.running(VM).unwrap().1, 1);
    let record = world.core(1).newest(VM).unwrap();
    assert_eq!(
        record.voters.iter().map(|v| v.host).collect::<Vec<_>>(),
        [host(1)],
        "its owner votes"
    );
}

#[test]
fn a_dead_voter_is_replaced_and_a_restart_is_no_death() {
    let mut world = gossiping(4);
    world.run(30_000);
    let voters = |w: &World| {
        let record = w.core(0).newest(VM).unwrap();
        record.voters.iter().map(|v| index(v.host)).collect::<BTreeSet<_>>()
    };
    let before = voters(&world);
    assert_eq!(before.len(), 3);
    let spare = (0..4).find(|i| !before.contains(i)).unwrap();
    let dies = *before.iter().find(|i| **i != 0).unwrap();
    world.crash(dies, 20_000);
    world.run(60_000);
    assert_eq!(voters(&world), before, "it came back");
    world.crash(dies, 10_000_000);
    world.run(100_000);
    let after = voters(&world);
    assert!(after.contains(&spare) && !after.contains(&dies) && after.len() == 3, "{after:?}");
}

#[test]
fn who_will_leave_votes_no_more() {
    let mut world = gossiping(4);
    world.run(30_000);
    world.act(2, |core, now| core.leaving(now, true));
    world.run(5000);
    let record = world.core(0).newest(VM).unwrap();
    assert!(record.voters.len() == 3 && record.voters.iter().all(|v| v.host != host(2)));
    // Nobody is left to take its place.
    world.act(0, |core, now| core.unfit(now, host(3)));
    world.run(5000);
    let record = world.core(0).newest(VM).unwrap();
    assert_eq!(record.voters.len(), 2);
}
