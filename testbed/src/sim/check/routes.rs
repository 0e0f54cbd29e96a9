//! Once faults stop, every node knows where every VM runs.

use godwit_protocol::id::VmId;

use crate::sim::world::{World, host};

/// Whether they all do.
#[must_use]
pub fn converged(world: &World) -> bool {
    let routed = |vm: &VmId| match world.running(*vm) {
        Some((_, at)) => world.nodes.iter().all(|n| {
            let route = n.core.as_ref().and_then(|c| c.routes().get(*vm));
            route.is_some_and(|r| r.host == host(at))
        }),
        None => world.may_lose.contains(vm) || world.off.contains(vm),
    };
    world.vms.iter().all(routed)
}
