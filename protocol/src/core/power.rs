//! VMs of this host that are switched off, switched on, and removed.
//!
//! Owns what is proposed until a record says it, across lost majorities. Invariant: a copy is booted only once a
//! decided record names it, and once by this process; what has ended is never booted.

use super::{Command, Core, voters};
use crate::id::{CopyId, VmId};
use crate::time::Time;
use crate::wire::record::{Cause, Record, Release};

/// A copy that was minted here to be booted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Minted {
    pub copy: CopyId,
    /// A record names it, and the driver knows.
    booting: bool,
}

impl Core {
    /// The QEMU of this host's copy of `vm` has ended by itself, or it could not be booted: the record shall say that
    /// it is off. That is proposed until it does, or names another.
    pub fn ended(&mut self, now: Time, vm: VmId, copy: CopyId) {
        self.runs_no_more(vm, copy);
        self.minted.retain(|_, minted| minted.copy != copy);
        let places = |r: &Record, copy| r.places(vm, self.me.host, copy);
        let known = self.ended.get(&vm).copied();
        // An older copy whose end is told late is no news.
        let newer = self.record_of(vm).zip(known).is_some_and(|(r, known)| places(r, known));
        if !newer || known == Some(copy) {
            self.ended.insert(vm, copy);
        }
        self.turn_off(now);
        self.drain(now);
    }

    /// What [`Core::ended`] began. A record that was forced may be older than what it led to.
    pub(super) fn turn_off(&mut self, now: Time) {
        for (vm, copy) in self.ended.clone() {
            let record = self.record_of(vm).filter(|r| r.places(vm, self.me.host, copy)).cloned();
            let Some(mut next) = record else {
                if !self.has_missed(vm) {
                    self.ended.remove(&vm);
                }
                continue;
            };
            // A decree would end what other members are at.
            let busy = self.is_led(now, next.cluster) || !self.may_change(&next);
            if next.is_off(vm) || self.removing.contains_key(&vm) || busy {
                continue;
            }
            next.epoch = next.epoch.next();
            next.cause = Cause::Off(Release { vm, copy, epoch: next.epoch });
            next.placement.iter_mut().filter(|p| p.vm == vm).for_each(|p| p.off = true);
            // Refused only if another change is under way: looked at again.
            let _ = self.epochs.propose(now, next, now.plus_ms(voters::PROPOSE_MS));
        }
    }

    /// Whether nothing else is under way with a record.
    fn may_change(&self, record: &Record) -> bool {
        let busy = self.is_cluster_moving(record.cluster);
        !busy && !record.is_closed() && self.epochs.attempting(record.cluster).is_none()
    }

    /// Proposes the record in which `vm`, which is off on this host, is on as that copy: a fresh one, or the one that
    /// [`Core::minted`] gives. Once it is decided, [`Command::Boot`] follows, also after this came to nothing in time.
    ///
    /// # Errors
    /// See [`Core::may_turn_on`]; nothing changed.
    pub fn turn_on(&mut self, now: Time, vm: VmId, copy: CopyId) -> Result<(), String> {
        let mut next = self.may_turn_on(now, vm)?;
        (next.epoch, next.cause) = (next.epoch.next(), Cause::On(vm));
        next.placement.iter_mut().filter(|p| p.vm == vm).for_each(|p| {
            (p.copy, p.off) = (copy, false);
        });
        self.minted.insert(vm, Minted { copy, booting: false });
        let until = now.plus_ms(voters::PROPOSE_MS);
        self.epochs.propose(now, next, until).map_err(|e| e.to_string())?;
        self.drain(now);
        Ok(())
    }

    /// The record after which `vm` may be switched on here.
    ///
    /// # Errors
    /// One line for the user; what passes by itself ends in *ask again*.
    pub fn may_turn_on(&self, now: Time, vm: VmId) -> Result<Record, String> {
        let record = self.record_of(vm).ok_or("no record of the VM is known here")?;
        let placed = record.placement_of(vm).filter(|p| p.host == self.me.host);
        let placed = placed.ok_or("it is not on this host any more: ask again")?;
        let name = &placed.name;
        if self.removing.contains_key(&vm) {
            return Err(format!("{name} is being removed"));
        }
        if self.is_booting(vm) {
            return Err(format!("{name} is being started: ask again"));
        }
        if self.is_moving(vm) || self.is_led(now, record.cluster) {
            let which = if record.is_lone() { name } else { &record.name };
            let wait = "wait for it (godwit migrations), or abort it first";
            return Err(format!("{which} moves: {wait}"));
        }
        if !placed.off {
            return Err(format!("no record says yet that {name} is off: ask again"));
        }
        if !self.may_change(record) {
            return Err(format!("the record of {name} is being changed: ask again"));
        }
        Ok(record.clone())
    }

    /// A copy that this host minted before it was restarted, and that never ran: a record may name it, or come to.
    pub fn was_minted(&mut self, now: Time, vm: VmId, copy: CopyId) {
        self.minted.insert(vm, Minted { copy, booting: false });
        self.boot_named();
        self.drain(now);
    }

    /// The copy that was minted to switch `vm` on and that no record names so far.
    #[must_use]
    pub fn minted(&self, vm: VmId) -> Option<CopyId> {
        self.minted.get(&vm).map(|m| m.copy)
    }

    /// Whether a copy of `vm` runs here by the newest record that is known.
    #[must_use]
    pub fn is_on(&self, vm: VmId) -> bool {
        self.record_of(vm).is_some_and(|r| self.runs_here(vm, r))
    }

    /// Whether a record names a copy of `vm` that is being booted here.
    fn is_booting(&self, vm: VmId) -> bool {
        self.minted.get(&vm).is_some_and(|m| m.booting)
    }

    /// Boots what a record names by now, and forgets what none can name any more.
    pub(super) fn boot_named(&mut self) {
        for (vm, minted) in self.minted.clone() {
            let Minted { copy, booting } = minted;
            let me = self.me.host;
            let record = self.record_of(vm);
            let placed = record.and_then(|r| r.placement_of(vm)).filter(|p| p.host == me);
            match placed {
                Some(placed) if placed.copy == copy && !placed.off => {
                    if !booting {
                        self.minted.insert(vm, Minted { copy, booting: true });
                        self.out.push_back(Command::Boot(vm, copy));
                    }
                }
                Some(placed) if placed.off => {}
                _ if self.has_missed(vm) => {}
                _ => drop(self.minted.remove(&vm)),
            }
        }
    }

    /// `vm`, of which this host has what that copy left, shall be removed. That is proposed until a record says it;
    /// then [`Command::Removed`] follows.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn remove(&mut self, now: Time, vm: VmId, copy: CopyId) -> Result<(), String> {
        self.may_remove(vm)?;
        self.runs_no_more(vm, copy);
        self.removing.insert(vm, copy);
        self.end_removals();
        self.finish_removals(now);
        self.drain(now);
        Ok(())
    }

    /// Whether no copy of `vm` is being booted here.
    ///
    /// # Errors
    /// One line for the user.
    pub fn may_remove(&self, vm: VmId) -> Result<(), String> {
        if !self.is_booting(vm) {
            return Ok(());
        }
        let name = self.record_of(vm).and_then(|r| r.placement_of(vm)).map(|p| p.name.to_string());
        Err(format!("{} is being started: ask again", name.unwrap_or_default()))
    }

    /// Whether [`Core::remove`] is at it.
    #[must_use]
    pub fn is_removing(&self, vm: VmId) -> bool {
        self.removing.contains_key(&vm)
    }

    /// What [`Core::remove`] began.
    pub(super) fn finish_removals(&mut self, now: Time) {
        for vm in self.removing.keys().copied().collect::<Vec<_>>() {
            let may = |r: &Record| self.may_change(r) && !self.is_led(now, r.cluster);
            if self.record_of(vm).is_some_and(may) {
                // Refused only if another change is under way: looked at again.
                let _ = self.delete(now, vm);
            }
        }
    }

    /// What a record says is removed, or is elsewhere.
    pub(super) fn end_removals(&mut self) {
        for (vm, copy) in self.removing.clone() {
            let places = |r: &Record| r.places(vm, self.me.host, copy);
            if self.has_missed(vm) || self.record_of(vm).is_some_and(places) {
                continue;
            }
            self.removing.remove(&vm);
            self.out.push_back(Command::Removed(vm, copy));
        }
    }

    /// This host's copy of `vm` is gone.
    pub fn runs_no_more(&mut self, vm: VmId, copy: CopyId) {
        if self.local.get(&vm).is_some_and(|l| l.copy == copy) {
            self.local.remove(&vm);
        }
    }

    /// Proposes the end of a VM: it will run nowhere, and leaves the cluster that it belongs to.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn delete(&mut self, now: Time, vm: VmId) -> Result<(), String> {
        let record = self.record_of(vm).cloned().ok_or("no record of the VM is known here")?;
        self.may_remove(vm)?;
        if !record.is_lone() {
            return self.release(now, record.cluster, &[vm], true);
        }
        let record = Record {
            epoch: record.epoch.next(),
            placement: Vec::new(),
            cause: Cause::Delete,
            ..record
        };
        let until = now.plus_ms(voters::PROPOSE_MS);
        self.epochs.propose(now, record, until).map_err(|e| e.to_string())?;
        self.drain(now);
        Ok(())
    }
}
