//! Where things are: what this host says of itself, and who is told.
//!
//! Owns the way from a guest that runs to the routing table. Decides nothing.

use super::{Core, Local, Move, voters};
use crate::id::{CopyId, Epoch, HostId, Mac, VmId};
use crate::limits::RULES;
use crate::route::RouteError;
use crate::time::Time;
use crate::wire::migrate::Phase;
use crate::wire::record::{Cause, Record};
use crate::wire::route::Route;
use crate::wire::wiring::Change;

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

    /// Proposes the record after which a NIC of a VM that is here, on or off, is connected otherwise. A move that is not
    /// bound goes on from it. Gives the epoch that it follows; none: it is so, and nothing was proposed.
    ///
    /// # Errors
    /// One line for the user; nothing changed. What passes by itself ends in *ask again*.
    pub fn rewire(
        &mut self,
        now: Time,
        vm: VmId,
        mac: Mac,
        change: &Change,
    ) -> Result<Option<Epoch>, String> {
        let mut next = self.record_of(vm).cloned().ok_or("no record of the VM is known here")?;
        let me = self.me.host;
        let placed = next.placement.iter_mut().find(|p| p.vm == vm && p.host == me);
        let placed = placed.ok_or("the VM belongs elsewhere by now: ask again")?;
        let before = placed.nics.clone();
        change.apply(&mut placed.nics, mac)?;
        let (base, is_so) = (next.epoch, placed.nics == before);
        if is_so {
            return Ok(None);
        }
        (next.epoch, next.cause) = (base.next(), Cause::Wires(vm));
        if !next.is_well_formed() {
            return Err(format!("a VM has at most {RULES} rules, over all its NICs"));
        }
        let bound = |m: &Move| {
            let phase = m.status().phase;
            !matches!(phase, Phase::Preparing | Phase::Transfer | Phase::Releasing)
        };
        if self.moves.values().any(|m| m.status().cluster == next.cluster && bound(m)) {
            return Err("the VM is about to run elsewhere: ask again".to_owned());
        }
        if self.epochs.newest(next.cluster).is_none_or(Record::is_closed) {
            return Err("the VM is joining a cluster just now: ask again".to_owned());
        }
        self.epochs
            .propose(now, next, now.plus_ms(voters::PROPOSE_MS))
            .map_err(|e| e.to_string())?;
        self.drain(now);
        Ok(Some(base))
    }

    /// The copy of `vm` that is here by that record: it runs, or is switched off.
    pub(super) fn copy_here(&self, record: &Record, vm: VmId) -> Option<CopyId> {
        let placed = record.placement_of(vm).filter(|p| p.host == self.me.host)?;
        let runs = || self.local.get(&vm).is_some_and(|l| l.copy == placed.copy);
        let stays = !self.removing.contains_key(&vm);
        (stays && (placed.off || runs())).then_some(placed.copy)
    }
}
