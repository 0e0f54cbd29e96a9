//! Epochs only grow, two different records are never decided for one epoch, and at no time do two
//! records own one VM.

use godwit_protocol::core::Value;
use godwit_protocol::id::VmId;
use godwit_protocol::wire::record::{Cause, Record};

use super::ensure;
use crate::sim::world::World;

/// Two nodes hold a record of the same number.
pub fn same(known: &Record, other: &Record) -> Result<(), String> {
    ensure(known == other, || format!("two records for one epoch: {known:?} {other:?}"))
}

/// A node writes over what it had written.
pub fn only_grow(old: Option<&Value>, new: &Value) -> Result<(), String> {
    let (Some(Value::Epoch(old)), Value::Epoch(new)) = (old, new) else { return Ok(()) };
    let (before, after) = (old.decided().epoch, new.decided().epoch);
    ensure(before <= after, || format!("epoch {before} is followed by {after}"))?;
    if before < after {
        return Ok(());
    }
    let ballot = |hard: &godwit_protocol::epoch::Hard| hard.accepted().map(|(ballot, _)| *ballot);
    ensure(ballot(old) <= ballot(new), || "a vote is taken back".into())
}

/// The records that place a VM, by epoch: it goes from one cluster to the next by their rules, and no
/// two of them share a number.
pub fn owned_once(world: &World) -> Result<(), String> {
    world.vms.iter().try_for_each(|vm| line_of(world, *vm))
}

fn line_of(world: &World, vm: VmId) -> Result<(), String> {
    let places = |r: &&Record| r.placement_of(vm).is_some() || r.cluster == vm;
    let mut line: Vec<&Record> = world.decided.values().filter(places).collect();
    line.sort_by_key(|r| r.epoch);
    for pair in line.windows(2) {
        let [old, new] = pair else { continue };
        ensure(old.epoch < new.epoch, || format!("one VM has one number twice: {old:?} {new:?}"))?;
        let fits = match &new.cause {
            // Who was not told of every record may not know how a VM left.
            _ if old.cluster == new.cluster => true,
            Cause::Add { vm: added, above } => {
                *added == vm && old.epoch == *above && old.cause == Cause::Joined(new.cluster)
            }
            Cause::Left(_) | Cause::Delete => new.cluster == vm,
            _ => false,
        };
        ensure(fits, || format!("owned twice: {old:?} {new:?}"))?;
    }
    Ok(())
}

/// The newest record that places a VM, of all that were decided.
#[must_use]
pub fn newest(world: &World, vm: VmId) -> Option<&Record> {
    let places = |r: &&Record| r.placement_of(vm).is_some() || r.cluster == vm;
    world.decided.values().filter(places).max_by_key(|r| r.epoch)
}
