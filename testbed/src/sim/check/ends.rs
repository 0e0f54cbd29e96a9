//! While a majority is reachable every migration ends; once faults stop nothing is left over; what is
//! said of a migration is so; queues have bounds.

use godwit_protocol::core::{Core, Value};
use godwit_protocol::wire::migrate::{Phase, Status};
use godwit_protocol::wire::record::{Cause, governing};

use super::ensure;
use crate::sim::node::Node;
use crate::sim::qemu::{Copy, Qemu};
use crate::sim::world::{CLUSTER, World, host, index};

/// Most commands that one event may lead to.
const COMMANDS: usize = 2000;
/// Most effects that wait for a migration's worker: as many as its queue in a node takes.
const EFFECTS: usize = 32;
/// Most migrations that a core remembers.
const STATUSES: usize = 300;

/// After everything that a core did.
pub fn bounded(node: &Node, commands: usize) -> Result<(), String> {
    ensure(commands <= COMMANDS, || format!("one event led to {commands} commands"))?;
    let longest = node.work.values().map(std::collections::VecDeque::len).max().unwrap_or(0);
    ensure(longest <= EFFECTS, || format!("{longest} effects wait for a migration's worker"))?;
    let statuses = node.core.as_ref().map_or(0, |c| c.statuses().count());
    ensure(statuses <= STATUSES, || format!("{statuses} migrations are remembered"))
}

/// Whether no node has a migration under way.
#[must_use]
pub fn idle(world: &World) -> bool {
    let moves = |c: &Core| world.vms.iter().chain([&CLUSTER]).any(|vm| c.is_moving(*vm));
    world.nodes.iter().all(|n| n.core.as_ref().is_some_and(|c| !moves(c)))
}

/// Once everything has ended.
pub fn nothing_left(world: &World) -> Result<(), String> {
    // The stopped source of a guest whose successor was lost is kept for the operator.
    let kept = |c: &&Copy| c.qemu == Qemu::Stopped && world.may_lose.contains(&c.vm);
    let living = world.copies.values().filter(|c| c.qemu != Qemu::Dead && !kept(c)).count();
    let expected = world.vms.iter().filter(|vm| world.running(**vm).is_some()).count();
    ensure(living == expected, || format!("copies are left over:\n{}", describe(world)))?;
    for vm in &world.vms {
        let newest = governing(world.decided.values(), *vm);
        let names = |copy, at| newest.as_ref().is_some_and(|r| r.names(*vm, host(at), copy));
        let named = world.running(*vm).is_none_or(|(copy, at)| names(copy, at));
        ensure(named, || format!("the newest record names another copy:\n{}", describe(world)))?;
        let off = newest.as_ref().is_none_or(|r| r.is_off(*vm));
        let runs = world.running(*vm).is_some() || world.may_lose.contains(vm);
        ensure(off || runs, || format!("named, and never started:\n{}", describe(world)))?;
    }
    for (i, node) in world.nodes.iter().enumerate() {
        ensure(!node.is_bound(), || format!("node {i} is bound for ever:\n{}", describe(world)))?;
        for value in node.disk.values() {
            let Value::Status(status) = value else { continue };
            ensure(status.phase.is_end(), || format!("open on the disk of node {i}: {status:?}"))?;
        }
        for status in node.core.iter().flat_map(Core::statuses) {
            truthful(world, i, status)?;
        }
    }
    Ok(())
}

/// What a status says is so, and both ends say the same.
fn truthful(world: &World, i: usize, s: &Status) -> Result<(), String> {
    // What others know by hearsay may be stale: the last word may be lost, they ask the source.
    ensure(s.from != host(i) || s.phase.is_end(), || format!("node {i} says {s:?}"))?;
    match s.phase {
        Phase::Moved => {
            let next = world.decided.get(&(s.cluster, s.epoch_before.next()));
            ensure(next.is_some_and(|r| matches!(r.cause, Cause::Move(_))), || {
                format!("not decided: {s:?}")
            })?;
            let to = |vm| next.and_then(|r| r.placement_of(vm)).map(|p| p.host);
            let so = if s.vm == CLUSTER {
                s.members.iter().all(|m| m.to.is_none() || to(m.vm) == m.to)
            } else {
                to(s.vm) == s.to
            };
            ensure(so, || format!("placed elsewhere: {s:?}"))?;
        }
        Phase::Lost => {
            ensure(!world.may_lose.is_empty(), || format!("lost, and nothing was killed: {s:?}"))?;
        }
        _ => {}
    }
    let (true, Some(to)) = (s.from == host(i), s.to) else { return Ok(()) };
    let Some(core) = &world.nodes[index(to)].core else { return Ok(()) };
    let other = core.statuses().find(|o| o.id == s.id && o.to == s.to);
    let phases = other.map(|o| (s.phase, o.phase));
    let split = [Some((Phase::Moved, Phase::Stayed)), Some((Phase::Stayed, Phase::Moved))];
    ensure(!split.contains(&phases), || {
        format!("the ends disagree: {phases:?}\n{}", describe(world))
    })
}

/// A world as text, for whoever looks into a breach.
#[must_use]
pub fn describe(world: &World) -> String {
    let mut text = format!("copies {:?}\nrecords {:#?}\n", world.copies, world.decided);
    for i in 0..world.nodes.len() {
        let Some(core) = &world.nodes[i].core else {
            text += &format!("node {i} is down\n");
            continue;
        };
        let moving: Vec<_> = world.vms.iter().map(|vm| core.migration_of(*vm)).collect();
        let route = |vm| core.routes().get(vm).map(|r| (index(r.host), r.epoch));
        let route: Vec<_> = world.vms.iter().map(|vm| route(*vm)).collect();
        let said: Vec<_> = core.statuses().map(|s| (s.id, s.phase, s.cause.clone())).collect();
        text += &format!("node {i}: moving {moving:?}, route {route:?}, statuses {said:?}\n");
    }
    text
}
