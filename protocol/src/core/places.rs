//! Where things are: what this host says of itself, and who is told.
//!
//! Owns the way from a guest that runs to the routing table. Decides nothing.

use super::{Core, Local};
use crate::id::{CopyId, HostId, VmId};
use crate::time::Time;
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
    pub fn announce(&mut self, now: Time, route: Route) {
        if let Err(error) = self.routes.put(route) {
            tracing::error!(%error, "the route is not told to others");
        }
        self.drain(now);
    }

    /// A host has sent something for `vm` here, though it is elsewhere: it is told where.
    pub fn redirect(&mut self, now: Time, to: HostId, vm: VmId) {
        self.routes.tell(to, vm);
        self.drain(now);
    }

    /// This host's copy of `vm` is gone.
    pub fn runs_no_more(&mut self, vm: VmId, copy: CopyId) {
        if self.local.get(&vm).is_some_and(|l| l.copy == copy) {
            self.local.remove(&vm);
        }
    }
}
