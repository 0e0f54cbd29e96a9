//! The distributed routing table: which host carries which VM, since which epoch.
//!
//! Owns the table and how it spreads. Never decides where a VM runs (records do), never touches
//! the kernel (the FDB is a cache of this table, filled from [`Output::Changed`]).
//!
//! Invariants: the epoch of an entry only grows; an entry of the same epoch is never replaced, so
//! one host (the one that the record names) writes an epoch's entry; a removed VM stays as a
//! tombstone. Nothing is ever answered twice: every exchange below ends.
//!
//! Every host is told of every entry: any may be asked for any VM by its name. Those whose senders may have to turn are
//! told first: who carries something on a wire of the entry, and who carried the VM so far.
//!
//! ```text
//!   put --Push--> all peers, who needs it first    on each change
//!
//!   A --Digest--> B      one peer, every 2 s, and each new peer
//!     <--Have---         if B's digest differs: B's (VM, epoch), in ranges
//!     ---Push-->         what A holds newer or B lacks
//!     ---Want-->         what A lacks or holds older
//!     <--Push---
//! ```

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::id::{Epoch, HostId, Mac, Name, VmId};
use crate::limits::{NICS, ROUTES, ROUTES_PER_HAVE, ROUTES_PER_PUSH};
use crate::time::Time;
use crate::wire::route::{Message, Nic, Route};

/// How often one peer is asked whether its table is the same, ms; up to a quarter is added.
const COMPARE_MS: u64 = 2000;

/// What the caller has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send this to a peer. Loss is healed by the next comparison.
    Send {
        /// The receiver.
        to: HostId,
        /// What to send.
        message: Message,
    },
    /// This entry is new or newer, from here or from elsewhere.
    Changed(Route),
}

/// Why an entry was not taken. The table is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// More NICs than a VM may have.
    #[error("VM {vm} has {nics} NICs, at most {NICS} are possible")]
    Nics {
        /// The VM.
        vm: VmId,
        /// How many.
        nics: usize,
    },
    /// The table is full.
    #[error(
        "the swarm has known {ROUTES} VMs, ports, wires and uplinks, those that were removed included, and can know no more: use one of them again"
    )]
    Full,
}

/// Why a text names no VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No VM of that name or id.
    #[error("no VM is called '{0}': 'godwit vm list' shows them")]
    Unknown(String),
    /// Several.
    #[error("{} VMs are called '{name}': say which by its id: {}", ids.len(), list(ids))]
    Ambiguous {
        /// The name.
        name: String,
        /// The ids.
        ids: Vec<VmId>,
    },
}

fn list(ids: &[VmId]) -> String {
    ids.iter().map(VmId::to_string).collect::<Vec<_>>().join(", ")
}

/// One node's copy of the table.
#[derive(Debug)]
pub struct Routes {
    me: HostId,
    table: BTreeMap<VmId, Route>,
    names: BTreeSet<(Name, VmId)>,
    macs: BTreeSet<(Name, Mac, VmId)>,
    /// Who has something on a wire.
    carriers: BTreeSet<(Name, HostId, VmId)>,
    /// Sum of the hashes of all (VM, epoch): order does not matter, and one entry is one step.
    digest: u128,
    peers: BTreeSet<HostId>,
    rng: StdRng,
    compare_at: Time,
    outputs: VecDeque<Output>,
}

impl Routes {
    /// An empty table. `seed` feeds the choice of peers and should differ between nodes.
    #[must_use]
    pub fn new(me: HostId, seed: u64, now: Time) -> Self {
        Self {
            me,
            table: BTreeMap::new(),
            names: BTreeSet::new(),
            macs: BTreeSet::new(),
            carriers: BTreeSet::new(),
            digest: 0,
            peers: BTreeSet::new(),
            rng: StdRng::seed_from_u64(seed),
            compare_at: now.plus_ms(COMPARE_MS),
            outputs: VecDeque::new(),
        }
    }

    /// Enters what this node knows first hand (its own VM at the epoch of its record; an entry of
    /// its store). Returns whether it was new or newer; then every peer is told, who needs it first.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn put(&mut self, route: Route) -> Result<bool, RouteError> {
        let before = self.table.get(&route.vm).cloned();
        if !self.enter(route.clone())? {
            return Ok(false);
        }
        let needs = |peer: &HostId| before.iter().chain([&route]).any(|r| self.concerns(r, *peer));
        let (first, then): (Vec<_>, Vec<_>) = self.peers.iter().partition(|peer| needs(peer));
        for to in first.into_iter().chain(then) {
            let message = Message::Push(vec![route.clone()]);
            self.outputs.push_back(Output::Send { to, message });
        }
        Ok(true)
    }

    /// The entry of `vm`, tombstones included.
    #[must_use]
    pub fn get(&self, vm: VmId) -> Option<&Route> {
        self.table.get(&vm)
    }

    /// All entries, tombstones included, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.table.values()
    }

    /// The VM that `text` names: an id, or a name that only one VM has.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn by_name(&self, text: &str) -> Result<&Route, NameError> {
        let by_id = text.parse().ok().and_then(|vm: VmId| self.table.get(&vm));
        if let Some(route) = by_id.filter(|r| !r.gone) {
            return Ok(route);
        }
        let unknown = || NameError::Unknown(text.to_owned());
        let name: Name = text.parse().map_err(|_| unknown())?;
        let range = (name.clone(), VmId([0; 16]))..=(name, VmId([0xff; 16]));
        let ids: Vec<VmId> = self.names.range(range).map(|(_, vm)| *vm).collect();
        match ids.as_slice() {
            [] => Err(unknown()),
            [vm] => self.table.get(vm).ok_or_else(unknown),
            _ => Err(NameError::Ambiguous { name: text.to_owned(), ids }),
        }
    }

    /// The VM whose NIC has `mac` on `wire`; of several that claim it, the one with the lowest id.
    #[must_use]
    pub fn by_mac(&self, wire: &Name, mac: Mac) -> Option<&Route> {
        let from = (wire.clone(), mac, VmId([0; 16]));
        let (w, m, vm) = self.macs.range(from..).next()?;
        if w == wire && *m == mac { self.table.get(vm) } else { None }
    }

    /// The VMs that `host` carries, by id.
    pub fn of_host(&self, host: HostId) -> impl Iterator<Item = &Route> {
        self.table.values().filter(move |r| r.host == host && !r.gone)
    }

    /// Whom to push to and to compare with: the living members. New ones are compared with at once.
    pub fn set_peers(&mut self, peers: impl IntoIterator<Item = HostId>) {
        let me = self.me;
        let peers: BTreeSet<HostId> = peers.into_iter().filter(|p| *p != me).collect();
        for to in peers.difference(&self.peers) {
            let message = Message::Digest(self.digest.to_be_bytes());
            self.outputs.push_back(Output::Send { to: *to, message });
        }
        self.peers = peers;
    }

    /// Tells one peer where `vm` is, because it did not know.
    pub fn tell(&mut self, to: HostId, vm: VmId) {
        let found = self.table.get(&vm).cloned();
        self.send_push(to, found.into_iter().collect());
    }

    /// A message of a peer, which the caller has authenticated as `from`. Entries that break a
    /// limit are passed over.
    pub fn handle(&mut self, from: HostId, message: Message) {
        match message {
            Message::Push(routes) => {
                for route in routes {
                    let vm = route.vm;
                    if let Err(error) = self.enter(route) {
                        tracing::debug!(%vm, %from, %error, "route passed over");
                    }
                }
            }
            Message::Digest(digest) => {
                if digest != self.digest.to_be_bytes() {
                    self.send_have(from);
                }
            }
            Message::Have { first, last, held } => self.compare(from, first, last, held),
            Message::Want(vms) => {
                // A set: nobody makes this node send an entry twice for one question.
                let vms: BTreeSet<VmId> = vms.into_iter().collect();
                let found = vms.iter().filter_map(|vm| self.table.get(vm)).cloned().collect();
                self.send_push(from, found);
            }
        }
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.compare_at > now {
            return;
        }
        self.compare_at = now.plus_ms(COMPARE_MS + self.rng.random_range(0..COMPARE_MS / 4));
        if self.peers.is_empty() {
            return;
        }
        let index = self.rng.random_range(0..self.peers.len());
        if let Some(to) = self.peers.iter().nth(index).copied() {
            let message = Message::Digest(self.digest.to_be_bytes());
            self.outputs.push_back(Output::Send { to, message });
        }
    }

    /// When [`Routes::handle_timeout`] wants to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        Some(self.compare_at)
    }

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether a host is the entry's, or has something on one of its wires.
    fn concerns(&self, route: &Route, host: HostId) -> bool {
        let carries = |nic: &Nic| {
            let of = |vm| (nic.wire.clone(), host, VmId([vm; 16]));
            self.carriers.range(of(0)..=of(0xff)).next().is_some()
        };
        route.host == host || route.nics.iter().any(carries)
    }

    fn enter(&mut self, route: Route) -> Result<bool, RouteError> {
        let vm = route.vm;
        if route.nics.len() > NICS {
            return Err(RouteError::Nics { vm, nics: route.nics.len() });
        }
        match self.table.get(&vm) {
            Some(known) if known.epoch >= route.epoch => return Ok(false),
            Some(known) => {
                self.names.remove(&(known.name.clone(), vm));
                for nic in &known.nics {
                    self.macs.remove(&(nic.wire.clone(), nic.mac, vm));
                    self.carriers.remove(&(nic.wire.clone(), known.host, vm));
                }
                self.digest = self.digest.wrapping_sub(hash(vm, known.epoch));
            }
            None if self.table.len() >= ROUTES => return Err(RouteError::Full),
            None => {}
        }
        self.digest = self.digest.wrapping_add(hash(vm, route.epoch));
        if !route.gone {
            if !route.kind.is_wire() {
                self.names.insert((route.name.clone(), vm));
            }
            let macs = route.nics.iter().map(|nic| (nic.wire.clone(), nic.mac, vm));
            self.macs.extend(macs);
            let wires = route.nics.iter().map(|nic| (nic.wire.clone(), route.host, vm));
            self.carriers.extend(wires);
        }
        self.table.insert(vm, route.clone());
        self.outputs.push_back(Output::Changed(route));
        Ok(true)
    }

    /// The whole table as ranges that join without a gap, so that the receiver sees what lacks.
    fn send_have(&mut self, to: HostId) {
        let all: Vec<(VmId, Epoch)> = self.table.values().map(|r| (r.vm, r.epoch)).collect();
        let mut first = VmId([0; 16]);
        let mut rest = all.as_slice();
        loop {
            let (held, after) = rest.split_at(rest.len().min(ROUTES_PER_HAVE));
            rest = after;
            let last = match (held.last(), rest.is_empty()) {
                (Some((vm, _)), false) => *vm,
                _ => VmId([0xff; 16]),
            };
            let message = Message::Have { first, last, held: held.to_vec() };
            self.outputs.push_back(Output::Send { to, message });
            if rest.is_empty() {
                return;
            }
            first = VmId(u128::from_be_bytes(last.0).saturating_add(1).to_be_bytes());
        }
    }

    fn compare(&mut self, from: HostId, first: VmId, last: VmId, held: Vec<(VmId, Epoch)>) {
        if first > last {
            return;
        }
        let held: BTreeMap<VmId, Epoch> = held.into_iter().collect();
        let mine = self.table.range(first..=last).map(|(_, route)| route);
        let newer = mine.filter(|r| held.get(&r.vm).is_none_or(|e| *e < r.epoch)).cloned();
        let newer: Vec<Route> = newer.collect();
        let lacks = |vm: &VmId, e: &Epoch| self.table.get(vm).is_none_or(|r| r.epoch < *e);
        let want: Vec<VmId> =
            held.iter().filter(|(vm, e)| lacks(vm, e)).map(|(vm, _)| *vm).collect();
        self.send_push(from, newer);
        for part in want.chunks(ROUTES_PER_HAVE) {
            let message = Message::Want(part.to_vec());
            self.outputs.push_back(Output::Send { to: from, message });
        }
    }

    fn send_push(&mut self, to: HostId, routes: Vec<Route>) {
        for part in routes.chunks(ROUTES_PER_PUSH) {
            let message = Message::Push(part.to_vec());
            self.outputs.push_back(Output::Send { to, message });
        }
    }
}

fn hash(vm: VmId, epoch: Epoch) -> u128 {
    let mut hasher = blake3::Hasher::new_derive_key("godwit 2026-11 route digest");
    hasher.update(&vm.0);
    hasher.update(&epoch.0.to_be_bytes());
    let mut out = [0; 16];
    hasher.finalize_xof().fill(&mut out);
    u128::from_be_bytes(out)
}
