//! VMs that are switched off: copies without a guest, of which the disks are all that counts.
//!
//! Owns what drivers do to them. Every rest and every discard is checked as it happens: their disks are where the
//! newest record says, unchanged.

use godwit_protocol::id::{CopyId, MigrationId, VmId};
use godwit_protocol::migrate::Happened;
use godwit_protocol::wire::record::{Placement, governing};

use super::check::Invariant;
use super::qemu::{Copy, Qemu};
use super::world::{World, host, placed};

impl World {
    /// A member of a cluster whose guest ended on that host.
    pub fn add_off(&mut self, vm: VmId, at: usize) -> Placement {
        let id = self.mint(vm, at);
        self.off.insert(vm);
        if let Some(copy) = self.copies.get_mut(&id) {
            (copy.ran, copy.noted) = (false, false);
            self.truth.insert(vm, copy.content);
        }
        self.end_quietly(id);
        Placement { off: true, ..placed(vm, at, id) }
    }

    /// What is left of a copy whose QEMU is not needed.
    fn end_quietly(&mut self, id: CopyId) {
        if let Some(copy) = self.copies.get_mut(&id) {
            (copy.qemu, copy.memory, copy.stored) = (Qemu::Dead, false, false);
        }
    }

    /// Whether the newest record of a VM that is off says that its disks are in this copy.
    fn has_disks(&self, id: CopyId, copy: &Copy) -> bool {
        let newest = governing(self.decided.values(), copy.vm);
        newest.is_some_and(|r| r.is_off(copy.vm) && r.places(copy.vm, host(copy.at), id))
    }

    /// A starting daemon, or one whose QEMU is gone, leaves these alone but for their QEMU.
    pub(super) fn stays_off(&mut self, id: CopyId) -> bool {
        let stays = self.copies.get(&id).is_some_and(|c| self.has_disks(id, c));
        if stays {
            self.end_quietly(id);
        }
        stays
    }

    /// The disks of a VM that is off can be read on host `i`.
    pub(super) fn show_disks(&mut self, i: usize, vm: VmId) {
        let here = |(id, c): (&CopyId, &Copy)| (c.vm == vm && c.at == i).then_some(*id);
        let ids: Vec<CopyId> = self.copies.iter().filter_map(here).collect();
        let shown = ids.into_iter().find(|id| self.has_disks(*id, &self.copies[id]));
        if let Some(copy) = shown.and_then(|id| self.copies.get_mut(&id)) {
            copy.qemu = Qemu::Stopped;
        }
    }

    /// Whether the QEMU that shows them is there.
    pub(super) fn shows_disks(&self, i: usize, vm: VmId) -> bool {
        let shows = |c: &Copy| c.vm == vm && c.at == i && c.qemu == Qemu::Stopped;
        self.off.contains(&vm) && self.copies.values().any(shows)
    }

    pub(super) fn rest(&mut self, i: usize, id: MigrationId, copy: CopyId) -> Happened {
        self.nodes[i].sending.remove(&id);
        self.nodes[i].receiving.remove(&id);
        if let Some(c) = self.copies.get(&copy).cloned() {
            let named = self.decided.values().any(|r| r.places(c.vm, host(c.at), copy));
            let other = self.off.contains(&c.vm) && self.truth.get(&c.vm) != Some(&c.content);
            if !named || other {
                self.broken(Invariant::Content, format!("not the disks of the guest: {c:?}"));
            }
            self.end_quietly(copy);
        }
        Happened::Running(self.nodes[i].clock.read(self.now).0)
    }

    /// A copy is about to be removed.
    pub(super) fn judge_removal(&mut self, id: CopyId, copy: &Copy) {
        if self.has_disks(id, copy) {
            self.broken(Invariant::Content, format!("the only disks are removed: {copy:?}"));
        }
    }
}
