//! A guest never runs with a NIC that is connected, or filtered, otherwise than the record says by which it runs.

use super::ensure;
use crate::sim::qemu::Copy;
use crate::sim::world::World;

/// A copy begins to run.
pub fn begins(world: &World, copy: &Copy) -> Result<(), String> {
    let core = world.nodes[copy.at].core.as_ref();
    let placed = core.and_then(|c| c.record_of(copy.vm)).and_then(|r| r.placement_of(copy.vm));
    ensure(placed.is_none_or(|p| p.nics == copy.nics), || {
        format!("{:?} runs with NICs as they were: {:?}", copy.vm, copy.nics)
    })
}
