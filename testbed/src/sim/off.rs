//! VMs that are switched off: copies without a guest, of which the disks are all that counts.
//!
//! Owns what drivers do to them. Every rest and every discard is checked as it happens: their disks are where the
//! newest record says, unchanged.

use godwit_protocol::id::{CopyId, MigrationId, VmId};
use godwit_protocol::migrate::Happened;
use godwit_protocol::wire::record::{Placement, Record, governing};

use super::check::Invariant;
use super::qemu::{Copy, Qemu};
use super::world::{World, host, index, placed};

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

    /// The host of a VM that is off is asked to start it, as its driver is.
    pub fn turn_on(&mut self, vm: VmId) -> bool {
        let newest = governing(self.decided.values(), vm).and_then(|r| r.placement_of(vm).cloned());
        let Some(placed) = newest.filter(|p| p.off) else { return true };
        let i = index(placed.host);
        let look = |core: &mut godwit_protocol::core::Core, now| {
            core.may_turn_on(now, vm).ok().map(|record| (record, core.minted(vm)))
        };
        let Some((record, minted)) = self.act(i, look).flatten() else { return false };
        // What this host knows may be old; it starts from what it has itself.
        let left = record.placement_of(vm).and_then(|p| self.copies.get(&p.copy)).cloned();
        let Some(left) = left else { return false };
        let id = minted.filter(|id| self.copies.contains_key(id)).unwrap_or_else(|| {
            let id = self.mint(vm, i);
            if let Some(copy) = self.copies.get_mut(&id) {
                (copy.qemu, copy.memory, copy.minted) = (Qemu::Dead, false, true);
                copy.content = left.content;
            }
            id
        });
        self.act(i, |core, now| core.turn_on(now, vm, id)).is_some_and(|r| r.is_ok())
    }

    /// A record names a copy that was minted on host `i`.
    pub(super) fn boot_copy(&mut self, i: usize, id: CopyId) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        let vm = copy.vm;
        if !copy.minted || copy.qemu != Qemu::Dead {
            return self.broken(Invariant::OneCopy, "booted twice");
        }
        copy.minted = false;
        if self.chance(self.faults.fail) {
            self.act(i, |core, now| core.ended(now, vm, id));
            return;
        }
        let Some(copy) = self.copies.get_mut(&id) else { return };
        (copy.qemu, copy.memory) = (Qemu::Stopped, true);
        self.off.remove(&vm);
        self.follow_newest(i, id);
        self.run_copy(id);
        self.announce_copy(i, id);
        let older = |o: &CopyId, c: &Copy| c.vm == vm && c.at == i && *o != id;
        self.copies.retain(|o, c| !older(o, c) || c.qemu != Qemu::Dead);
    }

    /// A starting daemon keeps what was minted and may come to be named, and what could not be booted.
    pub(super) fn stays_minted(&self, id: CopyId, record: Option<&Record>) -> bool {
        let Some(copy) = self.copies.get(&id) else { return false };
        let (vm, at, minted) = (copy.vm, host(copy.at), copy.minted);
        record.is_some_and(|r| {
            let here = r.placement_of(vm).is_some_and(|p| p.host == at);
            let named = r.names(vm, at, id) && (minted || self.off.contains(&vm));
            named || (minted && r.is_off(vm) && here)
        })
    }

    /// It tells its core of that.
    pub(super) fn tell_minted(&mut self, i: usize) {
        let minted = self.copies.iter().filter(|(_, c)| c.at == i && c.minted);
        let minted: Vec<_> = minted.map(|(id, c)| (c.vm, *id)).collect();
        for (vm, id) in minted {
            self.act(i, |core, now| core.was_minted(now, vm, id));
        }
        let ended = |c: &Copy| c.at == i && !c.minted && c.qemu == Qemu::Dead;
        let ended = self.copies.iter().filter(|(_, c)| ended(c) && self.off.contains(&c.vm));
        let ended: Vec<_> = ended.map(|(id, c)| (c.vm, *id)).collect();
        for (vm, id) in ended {
            self.act(i, |core, now| core.ended(now, vm, id));
        }
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
