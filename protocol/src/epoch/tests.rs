//! Named cases, and seeds with loss, delay, doubling, reordering and crashes.

mod net;

use net::{Faults, Net};
use proptest::prelude::*;

use super::*;
use crate::id::{CopyId, StoreId};
use crate::wire::record::{Placement, Release};

const VM: VmId = VmId([9; 16]);

fn host(i: u8) -> HostId {
    HostId([i; 32])
}

fn voter(i: u8) -> Voter {
    Voter { host: host(i), store: StoreId([i; 16]) }
}

fn record(epoch: u64, voters: &[u8], at: u8, copy: u8, cause: Cause) -> Record {
    Record {
        cluster: VM,
        name: "web".parse().unwrap(),
        epoch: Epoch(epoch),
        voters: voters.iter().map(|i| voter(*i)).collect(),
        placement: vec![Placement {
            vm: VM,
            name: "web".parse().unwrap(),
            host: host(at),
            copy: CopyId([copy; 16]),
            off: false,
            nics: Vec::new(),
        }],
        departed: Vec::new(),
        cause,
    }
}

/// The copies of `base` are released, and the VM goes to `at`.
fn moved(base: &Record, voters: &[u8], at: u8, copy: u8) -> Record {
    let epoch = base.epoch.next();
    let released = |p: &Placement| Release { vm: p.vm, copy: p.copy, epoch };
    let cause = Cause::Move(base.placement.iter().map(released).collect());
    record(epoch.0, voters, at, copy, cause)
}

fn stay(base: &Record) -> Record {
    let cause = Cause::Stay("gave up".into());
    Record { epoch: base.epoch.next(), cause, ..base.clone() }
}

fn is_accept(message: &Message) -> bool {
    matches!(message.body, Body::Accept { .. })
}

#[test]
fn one_voter_moves_to_the_other_host() {
    let mut net = Net::quiet(2);
    let base = net.create(&[0]);
    // The destination learns the base from the voter, prepares, and then knows its copy.
    net.act(1, |e, now| e.query(now, VM, host(0)));
    net.run(200);
    let deadline = net.now.plus_ms(5000);
    net.act(1, |e, now| e.prepare(now, VM, deadline)).unwrap().unwrap();
    net.run(200);
    assert!(net.nodes[1].as_ref().unwrap().is_prepared(VM));
    let moved = moved(&base, &[1], 1, 1);
    let start = net.now;
    net.act(1, |e, now| e.propose(now, moved.clone(), deadline)).unwrap().unwrap();
    while net.newest(1).is_some_and(|r| r.epoch == Epoch(1)) {
        net.run(1);
    }
    assert!(net.now.ms_since(start) <= 81, "one round trip of at most 40 ms each way");
    net.run(500);
    assert_eq!((net.newest(0), net.newest(1)), (Some(&moved), Some(&moved)));
    // The old voter answers for ever with the newest; the new one votes on the next epoch.
    let next = stay(&moved);
    net.act(0, |e, now| e.resolve(now, next.clone())).unwrap().unwrap();
    net.run(500);
    assert_eq!(net.newest(1), Some(&next));
    let old = self::moved(&base, &[0], 0, 7);
    let refused = net.act(0, |e, now| e.propose(now, old, deadline)).unwrap();
    assert_eq!(
        refused,
        Err(ProposeError::NotNext { proposed: Epoch(2), newest: Epoch(3) }),
        "wins only the next epoch"
    );
    assert_eq!(net.nodes.iter().flatten().filter_map(Epochs::poll_timeout).count(), 0, "all quiet");
}

#[test]
fn three_voters_decide_with_one_down_and_not_with_two() {
    let mut net = Net::quiet(4);
    let base = net.create(&[0, 1, 2]);
    net.crash(2, 60_000);
    let moved = moved(&base, &[1, 2, 3], 3, 3);
    let deadline = net.now.plus_ms(5000);
    net.act(1, |e, now| e.propose(now, moved.clone(), deadline)).unwrap().unwrap();
    net.run(1000);
    assert_eq!(net.newest(0), Some(&moved));
    assert_eq!(net.newest(3), Some(&moved), "a host that is named is told");
    // 1, 2, 3 vote now; with 2 and 3 down nothing is decided, and the outcome is unknown.
    net.crash(3, 30_000);
    let deadline = net.now.plus_ms(5000);
    net.act(1, |e, now| e.propose(now, stay(&moved), deadline)).unwrap().unwrap();
    net.run(6000);
    let failed = Output::Failed { cluster: VM, epoch: Epoch(3) };
    assert_eq!(net.log[1].last(), Some(&failed));
    assert_eq!(net.newest(1), Some(&moved));
    // Any bound node drives it on, and it ends as soon as a majority is back.
    net.act(0, |e, now| e.resolve(now, stay(&moved))).unwrap().unwrap();
    net.run(120_000);
    for i in 0..4 {
        assert_eq!(net.newest(i), Some(&stay(&moved)), "node {i}");
    }
    assert_eq!(net.decided.len(), 3);
    assert_eq!(net.decided[&Epoch(1)], base);
}

#[test]
fn voters_do_not_accept_that_a_copy_goes_which_is_not_released() {
    let mut net = Net::quiet(4);
    let base = net.create(&[0, 1, 2]);
    let mut record = moved(&base, &[0, 1, 2], 3, 3);
    let ballot = Ballot { round: 9, by: voter(3) };
    let mut accepted = |record: &Record| {
        let body = Body::Accept { ballot, record: record.clone() };
        let message = Message { cluster: VM, epoch: Epoch(2), body };
        net.act(1, |e, now| e.handle(now, host(3), message));
        net.run(200);
        net.stores[1].1[&VM].accepted().is_some()
    };
    let released = std::mem::replace(&mut record.cause, Cause::Move(Vec::new()));
    assert!(!accepted(&record));
    record.cause = released;
    assert!(accepted(&record));
}

#[test]
fn a_delayed_and_doubled_accept_loses_against_a_resolved_stay() {
    let mut net = Net::quiet(4);
    let base = net.create(&[0, 1, 2]);
    net.act(3, |e, now| e.learned(now, base.clone()));
    net.hold = is_accept;
    let moved = moved(&base, &[0, 1, 2], 3, 3);
    let deadline = net.now.plus_ms(1000);
    net.act(3, |e, now| e.propose(now, moved.clone(), deadline)).unwrap().unwrap();
    net.run(2000);
    assert!(net.held.len() >= 6, "sent again and again, all delayed: {}", net.held.len());
    let delayed = core::mem::take(&mut net.held);
    net.hold = |_| false;
    net.act(0, |e, now| e.resolve(now, stay(&base))).unwrap().unwrap();
    net.run(60);
    net.held = [delayed.clone(), delayed].concat();
    net.release();
    net.run(10_000);
    for i in 0..4 {
        assert_eq!(net.newest(i), Some(&stay(&base)), "node {i}");
    }
}

#[test]
fn a_clean_read_of_the_old_epoch_is_no_ground_to_resume() {
    let mut net = Net::quiet(4);
    let base = net.create(&[0, 1, 2]);
    net.act(3, |e, now| e.learned(now, base.clone()));
    net.hold = is_accept;
    let moved = moved(&base, &[0, 1, 2], 3, 3);
    let deadline = net.now.plus_ms(1000);
    net.act(3, |e, now| e.propose(now, moved.clone(), deadline)).unwrap().unwrap();
    net.run(2000);
    // The source asks every voter, and every one says: epoch 1.
    for i in 1..3 {
        net.act(0, |e, now| e.query(now, VM, host(i)));
    }
    net.run(500);
    assert_eq!(net.newest(0), Some(&base));
    // Had it resumed: the delayed accepts now win all the same, and nobody could have known.
    net.release();
    net.run(500);
    net.act(0, |e, now| e.resolve(now, stay(&base))).unwrap().unwrap();
    net.run(5000);
    for i in 0..4 {
        assert_eq!(net.newest(i), Some(&moved), "node {i}: what was accepted is adopted");
    }
    let adopted = |o: &Output| matches!(o, Output::BallotReady { adopted: true, .. });
    assert!(net.log[0].iter().any(adopted), "and the source was told so");
}

#[test]
fn of_several_accepted_records_the_highest_ballot_is_adopted() {
    let mut net = Net::quiet(4);
    let base = net.create(&[0, 1, 2]);
    // What two lost proposers left behind: the later one had a majority, so it is decided.
    let (lost, won) = (moved(&base, &[0], 0, 4), moved(&base, &[1], 1, 5));
    for (i, round, value) in [(0, 1, &lost), (1, 2, &won), (2, 2, &won)] {
        let mut hard = Hard::new(base.clone());
        let ballot = Ballot { round, by: voter(3) };
        assert!(matches!(hard.accept(voter(i), ballot, value.clone()), Vote::Changed(_)));
        net.stores[usize::from(i)].1.insert(VM, hard);
        net.crash(i, 1);
    }
    net.crash(2, 60_000);
    net.run(10);
    net.act(0, |e, now| e.resolve(now, stay(&base))).unwrap().unwrap();
    net.run(2000);
    assert_eq!(net.newest(0), Some(&won));
}

#[test]
fn a_new_voter_gets_the_record_before_it_votes() {
    let mut net = Net::quiet(4);
    net.create(&[0]);
    let grown = record(2, &[0, 1, 2], 0, 0, Cause::Voters);
    net.hold = |m| matches!(m.body, Body::Decided(_));
    let deadline = net.now.plus_ms(20_000);
    net.act(0, |e, now| e.propose(now, grown.clone(), deadline)).unwrap().unwrap();
    net.run(500);
    assert_eq!((net.newest(0), net.newest(1)), (Some(&grown), None), "nobody was told");
    net.held.clear();
    net.hold = |_| false;
    let next = stay(&grown);
    net.act(0, |e, now| e.propose(now, next.clone(), deadline)).unwrap().unwrap();
    net.run(300);
    assert_eq!(net.newest(0), Some(&next), "helped at once, without waiting for a resend");
}

#[test]
fn a_replaced_store_does_not_vote_under_the_old_id() {
    let mut net = Net::quiet(3);
    let base = net.create(&[0, 1, 2]);
    let anew = Voter { host: host(2), store: StoreId([77; 16]) };
    net.stores[2] = (anew, BTreeMap::new());
    net.log[2].clear();
    net.crash(2, 1);
    net.crash(1, 60_000);
    net.run(100);
    let deadline = net.now.plus_ms(5000);
    net.act(0, |e, now| e.propose(now, stay(&base), deadline)).unwrap().unwrap();
    net.run(6000);
    assert_eq!(net.newest(0), Some(&base), "one real voter of three is no majority");
    assert_eq!(net.newest(2), Some(&base), "it learned, but had no vote");
    let forged = Body::Promise {
        ballot: Ballot { round: 1, by: voter(0) },
        voter: voter(1),
        accepted: None,
    };
    net.act(0, |e, now| e.prepare(now, VM, now.plus_ms(900))).unwrap().unwrap();
    let message = Message { cluster: VM, epoch: Epoch(2), body: forged };
    net.act(0, |e, now| e.handle(now, host(2), message));
    assert!(!net.nodes[0].as_ref().unwrap().is_prepared(VM), "nobody speaks for another");
}

#[test]
fn a_restarted_proposer_never_uses_a_ballot_twice() {
    let mut net = Net::quiet(4);
    let base = net.create(&[0, 1, 2]);
    net.act(3, |e, now| e.learned(now, base.clone()));
    let mut ballots = Vec::new();
    for _ in 0..3 {
        let epoch = net.act(3, |e, now| e.prepare(now, VM, now.plus_ms(5000)));
        assert_eq!(epoch, Some(Ok(Epoch(2))));
        net.run(200);
        net.crash(3, 1);
        net.run(10);
    }
    for output in &net.log[3] {
        if let Output::BallotReady { ballot, .. } = output {
            ballots.push(*ballot);
        }
    }
    assert_eq!(ballots.len(), 3);
    assert!(ballots.is_sorted() && ballots.windows(2).all(|w| w[0] != w[1]));
}

#[test]
fn rules_of_records_are_kept() {
    let mut net = Net::quiet(1);
    let base = net.create(&[0]);
    let t = net.now.plus_ms(100);
    let renamed = Record { name: "other".parse().unwrap(), ..stay(&base) };
    let moved = Record { placement: Vec::new(), ..stay(&base) };
    let crowd = record(2, &[0, 1, 2, 3, 4, 5], 0, 0, Cause::Voters);
    for bad in [renamed, moved, crowd] {
        let result = net.act(0, |e, now| e.propose(now, bad, t));
        assert_eq!(result, Some(Err(ProposeError::Malformed(Epoch(2)))));
    }
    let other = Record { cluster: VmId([8; 16]), ..stay(&base) };
    let result = net.act(0, |e, now| e.propose(now, other, t));
    assert_eq!(result, Some(Err(ProposeError::Unknown(VmId([8; 16])))));
    assert_eq!(net.act(0, |e, now| e.create(now, base.clone())), Some(Ok(())), "idempotent");
    let again = Record { epoch: Epoch(5), ..base.clone() };
    assert_eq!(net.act(0, |e, now| e.create(now, again)), Some(Err(ProposeError::Exists(VM))));
    let deleted = Record { placement: Vec::new(), cause: Cause::Delete, ..stay(&base) };
    net.act(0, |e, now| e.propose(now, deleted, t)).unwrap().unwrap();
    assert_eq!(net.newest(0).map(|r| r.epoch), Some(Epoch(2)));
    let result = net.act(0, |e, now| e.prepare(now, VM, t));
    assert_eq!(result, Some(Err(ProposeError::Malformed(Epoch(3)))), "a tombstone is the end");
}

/// Anything at all that nodes may do, with every fault; then the faults end and it must end too.
fn storm(seed: u64) -> (Net, u64) {
    let faults = Faults { loss: 0.15, double: 0.15, crash: 0.01, delay_ms: 600 };
    let mut net = Net::new(5, seed, faults);
    let sets: [&[u8]; 5] = [&[0], &[0, 1, 2], &[2, 3, 4], &[0, 1, 2, 3, 4], &[1, 3]];
    let first = net.below(4) as usize;
    let first = record(1, if first == 2 { sets[1] } else { sets[first] }, 0, 0, Cause::Create);
    while net.newest(0).is_none() {
        net.act(0, |e, now| e.create(now, first.clone()));
        net.run(100);
    }
    for copy in 1..30_u8 {
        let ms = net.below(700);
        net.run(ms);
        let (i, what, set) = (net.below(5) as u8, net.below(8), net.below(5) as usize);
        let Some(base) = net.newest(i).cloned() else { continue };
        let deadline = net.now.plus_ms(500 + net.below(4000));
        let moved = moved(&base, sets[set], i, copy);
        net.act(i, |e, now| match what {
            0 | 1 => drop(e.prepare(now, VM, deadline)),
            2..=4 => drop(e.propose(now, moved, deadline)),
            5 | 6 => drop(e.resolve(now, stay(&base))),
            _ => e.abandon(VM),
        });
    }
    net.faults = Faults { delay_ms: 100, ..Faults::default() };
    net.run(20_000);
    let before = net.decided.keys().max().map_or(0, |e| e.0);
    let knows = (0..5_u8).max_by_key(|i| net.newest(*i).map(|r| r.epoch)).unwrap();
    let base = net.newest(knows).cloned().unwrap();
    let result = net.act(knows, |e, now| e.resolve(now, stay(&base)));
    assert_eq!(result, Some(Ok(())));
    net.run(60_000);
    (net, before)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]
    #[test]
    fn agreement_survives_storms(seed in any::<u64>()) {
        let (net, before) = storm(seed);
        let last = net.decided.values().max_by_key(|r| r.epoch).unwrap();
        prop_assert!(last.epoch.0 > before, "a decision is reached once the faults end");
        for (i, node) in (0..).zip(&net.nodes) {
            let named = last.voters.contains(&voter(i)) || last.placement[0].host == host(i);
            let newest = node.as_ref().and_then(|e| e.newest(VM));
            prop_assert!(!named || newest == Some(last), "node {i} has {newest:?}");
        }
    }
}

#[test]
fn a_seed_run_twice_is_the_same() {
    let (a, b) = (storm(42).0, storm(42).0);
    assert_eq!((a.number, a.log), (b.number, b.log));
}

#[test]
fn storms_decide_something() {
    let epochs: usize = (0..50).map(|seed| storm(seed).0.decided.len()).sum();
    assert!(epochs > 200, "only {epochs} decisions in 50 storms: the storm tests little");
}
