//! No page and no acknowledged write is lost or changed: a guest goes on with exactly what it held when
//! it last stood still, never with something older, and never with a mixture.

use super::ensure;
use crate::sim::qemu::Copy;
use crate::sim::world::World;

/// A copy begins to run.
pub fn continues(world: &World, copy: &Copy) -> Result<(), String> {
    let last = world.truth.get(&copy.vm);
    ensure(last.is_none_or(|held| *held == copy.content), || {
        format!("{:?} goes on with what it did not hold when it was stopped", copy.vm)
    })
}
