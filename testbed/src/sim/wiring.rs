//! How VMs' NICs are connected: requests to change it, and what drivers make of records.
//!
//! Owns what a driver does to a copy's NICs. Every `cont` of a guest that stood still is checked as it happens.

use godwit_protocol::id::{CopyId, Mac, VmId};
use godwit_protocol::wire::filter::{Protocol, Rule};
use godwit_protocol::wire::record::Record;
use godwit_protocol::wire::wiring::{Change, Wiring};

use super::event::Event;
use super::mutant::Mutant;
use super::world::{World, host};

/// How a VM's NICs are connected at first.
#[must_use]
pub fn first(vm: VmId) -> Vec<Wiring> {
    let mac = Mac([2, 0, 0, 0, 0, vm.0[0]]);
    vec![Wiring { mac, wire: "lan".parse().ok(), filter: Vec::new() }]
}

impl World {
    /// The host that runs the VM is asked to filter its NIC in a way that it was not before.
    pub(super) fn rewire(&mut self, vm: VmId) {
        let Some((_, at)) = self.running(vm) else { return };
        let port = Some(1 + self.below(60_000) as u16);
        let rule = Rule { allow: false, protocol: Protocol::Tcp, port, from: None };
        let change = Change::Filter(vec![rule]);
        // Refused while the VM is about to run elsewhere.
        let _ = self.act(at, |core, now| core.rewire(now, vm, first(vm)[0].mac, &change));
    }

    /// A record was decided: copies that it names here follow it, each when its driver comes to it.
    pub(super) fn follow_soon(&mut self, i: usize, record: &Record) {
        for placed in record.placement.iter().filter(|p| p.host == host(i)) {
            let ms = 1 + self.below(200) + self.nodes[i].lag_ms;
            self.at(ms, Event::Follow(i, self.nodes[i].start, placed.copy));
        }
    }

    /// A copy's NICs are connected as the newest record says that the host knows, if it names the copy.
    pub(super) fn follow_newest(&mut self, i: usize, id: CopyId) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        let record = self.nodes[i].core.as_ref().and_then(|core| core.record_of(copy.vm));
        let placed = record.and_then(|r| r.placement_of(copy.vm));
        let named = placed.filter(|p| p.host == host(i) && p.copy == id);
        if let Some(placed) = named.filter(|_| self.mutant != Mutant::StaleNics) {
            copy.nics.clone_from(&placed.nics);
        }
    }

    /// A copy that arrives.
    pub(super) fn wire_up(&mut self, id: CopyId, nics: Vec<Wiring>) {
        self.seen.rebased += u64::from(self.copies.get(&id).is_some_and(|c| c.nics != nics));
        if let Some(copy) = self.copies.get_mut(&id) {
            copy.nics = nics;
        }
    }
}
