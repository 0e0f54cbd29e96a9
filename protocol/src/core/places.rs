//! Where things are: what this host says of itself, and who is told.
//!
//! Owns the way from a guest that runs to the routing table. Decides nothing.

use super::{Core, Local, voters};
use crate::id::{CopyId, Epoch, HostId, VmId};
use crate::route::RouteError;
use crate::time::Time;
use crate::wire::record::{Cause, Record};
use crate::wire::route::Route;

impl Core {
    /// This host runs that copy (after `cont`, or found running after a restart).
    pub fn runs(&mut self, now: Time, vm: VmId, copy: CopyId, route: Route) {
        self.local.insert(vm, Local { copy });
        if let Err(error) = self.routes.put(route) {
            tracing::error!(%error, "the route is not told to others");
        }
        self.drain(now);
    }

    /// Tells everyone a route that is no VM's.
    ///
    /// # Errors
    /// Nobody is told.
    pub fn announce(&mut self, now: Time, route: Route) -> Result<(), RouteError> {
        let put = self.routes.put(route);
        self.drain(now);
        put.map(drop)
    }

    /// A host has sent something for `vm` here, though it is elsewhere: it is told where.
    pub fn redirect(&mut self, now: Time, to: HostId, vm: VmId) {
        self.routes.tell(to, vm);
        self.drain(now);
    }

    /// Proposes the record after which NICs of a VM that runs here are connected otherwise. Gives the epoch that it
    /// follows.
    ///
    /// # Errors
    /// One line for the user; nothing changed.
    pub fn rewire(&mut self, now: Time, vm: VmId) -> Result<Epoch, String> {
        let record = self.record_of(vm).cloned().ok_or("no record of the VM is known here")?;
        if record.is_closed() || record.placement_of(vm).is_none_or(|p| p.host != self.me.host) {
            return Err("the VM belongs elsewhere by now: ask again".to_owned());
        }
        if self.moves.values().any(|m| m.status().cluster == record.cluster) {
            return Err(
                "the VM moves: wait for it (godwit migrations), or abort it first".to_owned()
            );
        }
        let base = record.epoch;
        let next = Record { epoch: base.next(), cause: Cause::Wires(vm), ..record };
        self.epochs
            .propose(now, next, now.plus_ms(voters::PROPOSE_MS))
            .map_err(|e| e.to_string())?;
        self.drain(now);
        Ok(base)
    }

    /// The copy of `vm` that is here by that record: it runs, or is switched off.
    pub(super) fn copy_here(&self, record: &Record, vm: VmId) -> Option<CopyId> {
        let placed = record.placement_of(vm).filter(|p| p.host == self.me.host)?;
        let runs = || self.local.get(&vm).is_some_and(|l| l.copy == placed.copy);
        (placed.off || runs()).then_some(placed.copy)
    }

    /// The QEMU of this host's copy of `vm` has ended by itself: the record shall say that it is off. That is
    /// proposed until it does, or names another.
    pub fn ended(&mut self, now: Time, vm: VmId, copy: CopyId) {
        self.runs_no_more(vm, copy);
        self.ended.insert(vm, copy);
        self.turn_off(now);
        self.drain(now);
    }

    /// What [`Core::ended`] began.
    pub(super) fn turn_off(&mut self, now: Time) {
        for (vm, copy) in self.ended.clone() {
            let record = self.record_of(vm).filter(|r| r.names(vm, self.me.host, copy)).cloned();
            let Some(mut next) = record else {
                self.ended.remove(&vm);
                continue;
            };
            let busy = self.is_cluster_moving(next.cluster);
            if busy || next.is_closed() || self.epochs.attempting(next.cluster).is_some() {
                continue;
            }
            (next.epoch, next.cause) = (next.epoch.next(), Cause::Off(vm));
            next.placement.iter_mut().filter(|p| p.vm == vm).for_each(|p| p.off = true);
            // Refused only if another change is under way: looked at again.
            let _ = self.epochs.propose(now, next, now.plus_ms(voters::PROPOSE_MS));
        }
    }

    /// This host's copy of `vm` is gone.
    pub fn runs_no_more(&mut self, vm: VmId, copy: CopyId) {
        if self.local.get(&vm).is_some_and(|l| l.copy == copy) {
            self.local.remove(&vm);
        }
    }
}
