//! Members that are asked to move together go together, or none of them goes.

use std::collections::BTreeSet;

use godwit_protocol::id::VmId;
use godwit_protocol::wire::record::{Cause, Record};

use super::ensure;
use crate::sim::world::{CLUSTER, World};

/// Every record that moves copies moves those of a whole team.
pub fn together(world: &World) -> Result<(), String> {
    let records: Vec<&Record> = world.decided.values().filter(|r| r.cluster == CLUSTER).collect();
    for pair in records.windows(2) {
        let [old, new] = pair else { continue };
        if !matches!(new.cause, Cause::Move(_) | Cause::Stay(_) | Cause::Voters) {
            continue;
        }
        let moved = new.placement.iter().filter(|p| old.placement_of(p.vm) != Some(*p));
        let moved: BTreeSet<VmId> = moved.map(|p| p.vm).collect();
        ensure(moved.is_empty() || matches!(new.cause, Cause::Move(_)), || {
            format!("{:?} moves", new.cause)
        })?;
        ensure(moved.is_empty() || world.teams.contains(&moved), || {
            format!("a part of the cluster moved: {moved:?}")
        })?;
    }
    Ok(())
}
