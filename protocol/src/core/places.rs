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
        self.ended.remove(&vm);
        self.removing.remove(&vm);
        self.minted.retain(|_, minted| minted.copy != copy);
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
        let stays = !self.removing.contains_key(&vm);
        (stays && (placed.off || runs())).then_some(placed.copy)
    }
}
