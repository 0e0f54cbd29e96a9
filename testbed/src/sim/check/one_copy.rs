//! At most one copy of a VM runs at any moment, and only one that a decided record names; a guest is
//! gone only if all that held it was killed.

use godwit_protocol::id::CopyId;

use super::ensure;
use crate::sim::qemu::{Copy, Qemu};
use crate::sim::world::{World, host};

/// After every step.
pub fn holds(world: &World) -> Result<(), String> {
    for vm in &world.vms {
        let copies = || world.copies.values().filter(|c| c.vm == *vm);
        let running = copies().filter(|c| c.qemu == Qemu::Running).count();
        ensure(running <= 1, || "two copies run".into())?;
        let alive = copies().any(|c| c.ran && c.qemu != Qemu::Dead);
        let off = world.off.contains(vm);
        ensure(alive || off || world.may_lose.contains(vm), || {
            "no copy of the guest is left".into()
        })?;
    }
    Ok(())
}

/// A copy begins to run.
pub fn begins(world: &World, id: CopyId, copy: &Copy) -> Result<(), String> {
    let named = world.decided.values().any(|r| r.names(copy.vm, host(copy.at), id));
    ensure(named, || "no decided record names the copy that runs".into())?;
    holds(world)
}

/// A copy is ended for good: its guest must go on elsewhere, or never have run in it.
pub fn ends(world: &World, id: CopyId, copy: &Copy) -> Result<(), String> {
    let lives = |c: &Copy| c.vm == copy.vm && c.ran && c.qemu != Qemu::Dead;
    let other = world.copies.iter().any(|(o, c)| *o != id && lives(c));
    let lost = world.may_lose.contains(&copy.vm);
    let kept = !copy.ran || copy.qemu == Qemu::Dead || other || lost;
    ensure(kept, || "the source copy went before its successor ran".into())
}
