//! What may follow what, and what comes of leaving.

use super::*;
use crate::id::Mac;

const C: VmId = VmId([1; 16]);

fn vm(i: u8) -> VmId {
    VmId([i; 16])
}

fn at(i: u8, host: u8) -> Placement {
    let name = format!("vm-{i}").parse().unwrap();
    let (host, copy) = (HostId([host; 32]), CopyId([i; 16]));
    Placement { vm: vm(i), name, host, copy, off: false, nics: vec![wired(i, "lan")] }
}

fn wired(i: u8, wire: &str) -> Wiring {
    let filter = vec!["deny icmp".parse().unwrap()];
    Wiring { mac: Mac([2, 0, 0, 0, 0, i]), wire: Some(wire.parse().unwrap()), filter }
}

fn cluster(epoch: u64, members: &[u8], departed: &[(u8, u64)]) -> Record {
    Record {
        cluster: C,
        name: "web".parse().unwrap(),
        epoch: Epoch(epoch),
        voters: vec![Voter { host: HostId([9; 32]), store: StoreId([9; 16]) }],
        placement: members.iter().map(|i| at(*i, *i)).collect(),
        departed: departed.iter().map(|(i, e)| (vm(*i), Epoch(*e))).collect(),
        cause: Cause::Create,
    }
}

fn add(base: &Record, i: u8, above: u64) -> Record {
    let above = Epoch(above);
    Record {
        epoch: base.epoch.max(above).next(),
        placement: base.placement.iter().cloned().chain([at(i, i)]).collect(),
        departed: base.departed.iter().filter(|(v, _)| *v != vm(i)).copied().collect(),
        cause: Cause::Add { vm: vm(i), above },
        ..base.clone()
    }
}

#[test]
fn a_member_is_added_above_its_own_epoch_and_on_no_old_word() {
    let base = cluster(5, &[2], &[(3, 4)]);
    assert!(add(&base, 4, 50).may_follow(&base));
    assert_eq!(add(&base, 4, 50).epoch, Epoch(51));
    let below = Record { epoch: Epoch(6), ..add(&base, 4, 50) };
    assert!(!below.may_follow(&base), "below the member's epoch");
    assert!(!add(&base, 3, 3).may_follow(&base), "a word from before it left");
    assert!(add(&base, 3, 6).may_follow(&base));
    assert!(!add(&base, 2, 9).may_follow(&base), "twice");
    let moved = Record { placement: vec![at(2, 7), at(4, 4)], ..add(&base, 4, 50) };
    assert!(!moved.may_follow(&base), "nobody moves on the way");
}

#[test]
fn who_leaves_has_a_record_of_its_own_above_the_clusters() {
    let base = cluster(5, &[2, 3], &[]);
    let members = vec![at(3, 3)];
    let next = Record {
        epoch: Epoch(6),
        placement: vec![at(2, 2)],
        departed: vec![(vm(3), Epoch(6))],
        cause: Cause::Release { members: members.clone(), ended: false },
        ..base.clone()
    };
    assert!(next.may_follow(&base));
    let [own] = next.derived().try_into().unwrap();
    assert_eq!(
        (own.cluster, own.epoch, own.voters.clone()),
        (vm(3), Epoch(7), base.voters.clone())
    );
    assert!(own.is_lone() && own.names(vm(3), HostId([3; 32]), CopyId([3; 16])));
    let ended = Record { cause: Cause::Release { members, ended: true }, ..next.clone() };
    assert!(ended.derived()[0].cause == Cause::Delete && ended.derived()[0].placement.is_empty());
    let silent = Record { departed: Vec::new(), ..next.clone() };
    assert!(!silent.may_follow(&base), "it is remembered");
    let all = [base.clone(), next.clone()];
    assert_eq!(governing(all.iter(), vm(3)), Some(own));
    let later = Record { epoch: Epoch(8), cause: Cause::Voters, ..next };
    assert!(has_missed([&later].into_iter(), vm(3)) && !has_missed([&base].into_iter(), vm(3)));
}

#[test]
fn nothing_follows_a_closed_record_but_a_vm_on_its_way() {
    let base = cluster(5, &[2], &[]);
    let gone = Record {
        epoch: Epoch(6),
        placement: Vec::new(),
        departed: vec![(vm(2), Epoch(6))],
        cause: Cause::Dissolve(vec![at(2, 2)]),
        ..base.clone()
    };
    assert!(gone.may_follow(&base) && gone.derived().len() == 1);
    let stay = Record { epoch: Epoch(7), cause: Cause::Stay("x".into()), ..gone.clone() };
    assert!(!stay.may_follow(&gone));
    assert!(add(&gone, 4, 3).may_follow(&gone));
    assert!(!add(&gone, 2, 3).may_follow(&gone), "a member that was released");
    let lone = Record { cluster: vm(2), cause: Cause::Left(C), ..base };
    let joined = Record { epoch: Epoch(6), cause: Cause::Joined(C), ..lone.clone() };
    assert!(joined.may_follow(&lone));
    for cause in [Cause::Move(Vec::new()), Cause::Delete, Cause::Add { vm: vm(3), above: Epoch(1) }]
    {
        let next = Record { epoch: Epoch(7), cause, ..joined.clone() };
        assert!(!next.may_follow(&joined));
    }
}

#[test]
fn a_member_goes_off_alone_and_moves_as_it_is() {
    let base = cluster(5, &[2, 3], &[]);
    let release = |epoch| Release { vm: vm(3), copy: CopyId([3; 16]), epoch: Epoch(epoch) };
    let mut off = Record { epoch: Epoch(6), cause: Cause::Off(release(6)), ..base.clone() };
    assert!(!off.may_follow(&base), "it is on");
    off.placement[1].off = true;
    assert!(off.may_follow(&base) && off.is_off(vm(3)) && !off.is_off(vm(2)));
    assert!(!off.names(vm(3), HostId([3; 32]), CopyId([3; 16])));
    let twice = Record { epoch: Epoch(7), cause: Cause::Off(release(7)), ..off.clone() };
    assert!(!twice.may_follow(&off), "it is off already");
    let mut other = off.clone();
    other.placement[0].off = true;
    assert!(!other.may_follow(&base), "not that one");
    let cause = Cause::Move(vec![release(7)]);
    let mut moved = Record { epoch: Epoch(7), cause, ..off.clone() };
    (moved.placement[1].host, moved.placement[1].copy) = (HostId([4; 32]), CopyId([8; 16]));
    assert!(moved.may_follow(&off) && moved.places(vm(3), HostId([4; 32]), CopyId([8; 16])));
    moved.placement[1].off = false;
    assert!(!moved.may_follow(&off), "a move switches nothing on");
}

#[test]
fn a_member_that_is_off_goes_on_as_another_copy_where_it_is() {
    let mut base = cluster(5, &[2, 3], &[]);
    base.placement[1].off = true;
    let mut on = Record { epoch: Epoch(6), cause: Cause::On(vm(3)), ..base.clone() };
    on.placement[1].off = false;
    assert!(!on.may_follow(&base), "what ran before never runs again");
    on.placement[1].copy = CopyId([8; 16]);
    assert!(on.may_follow(&base) && on.names(vm(3), HostId([3; 32]), CopyId([8; 16])));
    let mut twice = Record { epoch: Epoch(7), ..on.clone() };
    twice.placement[1].copy = CopyId([9; 16]);
    assert!(!twice.may_follow(&on), "it is on already");
    let mut elsewhere = on.clone();
    elsewhere.placement[1].host = HostId([4; 32]);
    assert!(!elsewhere.may_follow(&base), "its disks are not there");
    let mut other = on.clone();
    other.placement[0].copy = CopyId([8; 16]);
    assert!(!other.may_follow(&base), "nobody else is another");
    let still = Record { placement: base.placement.clone(), ..on };
    assert!(!still.may_follow(&base), "it is off");
}

#[test]
fn no_record_drops_a_copy_that_its_host_has_not_released() {
    let base = cluster(5, &[2, 3], &[]);
    let release =
        |i: u8, copy, epoch| Release { vm: vm(i), copy: CopyId([copy; 16]), epoch: Epoch(epoch) };
    let mut moved = Record { epoch: Epoch(6), ..base.clone() };
    for (placed, copy) in moved.placement.iter_mut().zip([8, 9]) {
        (placed.host, placed.copy) = (HostId([4; 32]), CopyId([copy; 16]));
    }
    let mut with = |releases: &[Release]| {
        moved.cause = Cause::Move(releases.to_vec());
        moved.may_follow(&base)
    };
    let both = [release(2, 2, 6), release(3, 3, 6)];
    assert!(with(&both));
    assert!(!with(&[]) && !with(&both[..1]), "one of them may still run");
    assert!(!with(&[both[0], release(3, 3, 5)]), "the word of an epoch that was decided otherwise");
    assert!(!with(&[both[0], release(3, 9, 6)]), "another copy");
    // In place counts, too: another copy on the same host.
    moved.placement[0] = base.placement[0].clone();
    moved.placement[1].host = base.placement[1].host;
    moved.cause = Cause::Move(Vec::new());
    assert!(!moved.may_follow(&base));
    moved.cause = Cause::Move(vec![both[1]]);
    assert!(moved.may_follow(&base), "who stays need not release");
    let mut off = Record { epoch: Epoch(6), cause: Cause::Off(release(3, 9, 6)), ..base.clone() };
    off.placement[1].off = true;
    assert!(!off.may_follow(&base), "another copy ended");
}

#[test]
fn nics_change_by_a_decree_of_their_own_and_nothing_else_with_them() {
    let base = cluster(5, &[2, 3], &[]);
    let next = |cause, nics: Vec<Wiring>| {
        let mut next = Record { epoch: Epoch(6), cause, ..base.clone() };
        next.placement[1].nics = nics;
        next
    };
    let other = || vec![wired(3, "dmz")];
    assert!(next(Cause::Wires(vm(3)), other()).may_follow(&base));
    assert!(!next(Cause::Wires(vm(2)), other()).may_follow(&base), "of another member");
    assert!(!next(Cause::Wires(vm(3)), Vec::new()).may_follow(&base), "a NIC is not lost");
    assert!(!next(Cause::Wires(vm(3)), vec![wired(4, "dmz")]).may_follow(&base), "nor another");
    for cause in [Cause::Stay("late".into()), Cause::Voters, Cause::Move(Vec::new())] {
        assert!(!next(cause.clone(), other()).may_follow(&base), "{cause:?}");
        assert!(next(cause, base.placement[1].nics.clone()).may_follow(&base));
    }
    let mut moved = next(Cause::Wires(vm(3)), other());
    moved.placement[1].host = HostId([7; 32]);
    assert!(!moved.may_follow(&base), "nobody moves on the way");
}

#[test]
fn the_largest_record_fits_into_a_message() {
    use crate::limits::{CLUSTER_VMS, CONTROL_MESSAGE_BYTES, DEPARTED, NICS, RULES};
    let long: Name = "n".repeat(crate::limits::NAME_BYTES).parse().unwrap();
    let rule = "deny tcp 65535 from ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128".parse().unwrap();
    let nic =
        Wiring { wire: Some(long.clone()), filter: vec![rule; RULES / NICS], ..wired(1, "lan") };
    let placed = Placement { name: long.clone(), nics: vec![nic; NICS], ..at(1, 1) };
    let member = |i: usize| {
        let mut vm = placed.clone();
        vm.vm.0[..8].copy_from_slice(&i.to_be_bytes());
        vm
    };
    let mut record = cluster(u64::MAX, &[], &[]);
    record.name = long;
    record.placement = (0..CLUSTER_VMS).map(member).collect();
    record.departed = vec![(vm(1), Epoch(u64::MAX)); DEPARTED];
    assert!(record.is_well_formed());
    let bytes = crate::wire::codec::encode(&record, CONTROL_MESSAGE_BYTES).unwrap();
    assert!(bytes.len() < CONTROL_MESSAGE_BYTES * 3 / 4, "{} bytes", bytes.len());
    record.placement[0].nics[0].filter.push("deny any".parse().unwrap());
    assert!(!record.is_well_formed(), "a rule too many");
}
