//! The fast path: frames between this host's kernel and the tunnels to other hosts.
//!
//! Owns the table that each frame is looked up in, and the two shuttles. Decides no route. Invariant: what came by
//! a tunnel leaves by one only if it is for one NIC that has moved away; a broadcast never does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::id::{HostId, Mac, Name, VmId};
use godwit_protocol::wire::route::{Kind, Route};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::cutover::{self, Key};
use super::node::Node;
use super::uplinks::Word;
use super::wires::tag;
use crate::link::{Outgoing, TunnelFrame, Where};
use crate::net::Payload;

/// Before a host is told again where a VM is.
const TELL_AGAIN: Duration = Duration::from_millis(100);
/// Hosts and VMs that are remembered for that.
const TOLD: usize = 4096;

/// Frames that leave by the tunnel: one host for a known address, all hosts of the wire for a group.
pub(super) fn shuttle_out(
    node: &Arc<Node>,
    mut frames: mpsc::Receiver<Outgoing>,
) -> tokio::task::JoinHandle<()> {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        while let Some(out) = frames.recv().await {
            let frame = match out {
                Outgoing::Frame(frame) => frame,
                Outgoing::Fence(tell) => {
                    // Whoever asked may have given up.
                    let _ = tell.send(());
                    continue;
                }
            };
            node.send_frame(&frame);
        }
    })
}

/// Frames that came by the tunnel.
pub(super) fn shuttle_in(
    node: &Arc<Node>,
    mut frames: mpsc::Receiver<(HostId, u32, Payload)>,
) -> tokio::task::JoinHandle<()> {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        while let Some((from, tag, payload)) = frames.recv().await {
            let frame = match payload {
                Payload::Frame(frame) => frame,
                Payload::Marker(bytes) => {
                    cutover::marker(&node, from, tag, &bytes);
                    continue;
                }
            };
            if node.cutovers.take_in(from, tag, &frame) || node.pass_on(from, tag, &frame) {
                continue;
            }
            if let Some(wire) = node.wire_of(tag) {
                node.links.inject(&wire, &frame);
            }
        }
    })
}

/// What the fast path looks up.
#[derive(Default)]
pub(super) struct Table {
    carried: BTreeMap<u32, Name>,
    pub routes: BTreeMap<VmId, Route>,
    by_mac: BTreeMap<Key, (VmId, HostId)>,
    /// How many NICs each host has on each wire.
    groups: BTreeMap<u32, BTreeMap<HostId, u32>>,
    /// The hosts that have an uplink of each wire, and what they say of its gateway.
    ways_out: BTreeMap<u32, BTreeMap<HostId, Word>>,
    /// Where this host sends frames for the wires' gateways.
    gateways: BTreeMap<Key, HostId>,
    /// NICs whose frames do not leave by tunnel any more, but for what is in the tunnel port still: it goes
    /// to their old host.
    pub behind: BTreeMap<Key, HostId>,
    /// Who was told where a VM is, because it sent a frame to where it was.
    told: BTreeMap<(HostId, VmId), Instant>,
}

impl Table {
    pub fn put(&mut self, route: Route) {
        let (vm, host, here) = (route.vm, route.host, !route.gone);
        let nics = route.nics.clone();
        let tags: Vec<u32> = nics.iter().map(|nic| tag(&nic.wire)).collect();
        let way_out = Word::of(&route);
        if let Some(old) = self.routes.insert(route.vm, route) {
            for nic in old.nics.iter().filter(|_| !old.gone) {
                let wire = tag(&nic.wire);
                self.by_mac.remove(&(wire, nic.mac));
                let hosts = self.groups.entry(wire).or_default();
                if let Some(nics) = hosts.get_mut(&old.host) {
                    *nics -= 1;
                }
                hosts.retain(|_, nics| *nics > 0);
                if matches!(old.kind, Kind::Uplink { .. }) {
                    self.ways_out.entry(wire).or_default().remove(&old.host);
                }
            }
        }
        for nic in nics.into_iter().filter(|_| here) {
            let wire = tag(&nic.wire);
            self.by_mac.insert((wire, nic.mac), (vm, host));
            *self.groups.entry(wire).or_default().entry(host).or_default() += 1;
        }
        if let Some(word) = way_out.filter(|_| here) {
            for wire in tags {
                self.ways_out.entry(wire).or_default().insert(host, word);
            }
        }
    }

    /// Whether the wire has an uplink anywhere.
    pub fn has_way_out(&self, wire: u32) -> bool {
        self.ways_out.contains_key(&wire)
    }

    /// The hosts that have an uplink of the wire, and what they say of its gateway.
    pub fn ways_out(&self, wire: u32) -> impl Iterator<Item = (HostId, Word)> {
        self.ways_out.get(&wire).into_iter().flatten().map(|(host, word)| (*host, *word))
    }

    /// Frames for this gateway go there.
    pub fn lead_out(&mut self, gateway: Key, host: Option<HostId>) {
        match host {
            Some(host) => self.gateways.insert(gateway, host),
            None => self.gateways.remove(&gateway),
        };
    }

    /// Where a NIC is.
    pub fn host_of(&self, key: Key) -> Option<HostId> {
        self.by_mac.get(&key).map(|(_, host)| *host)
    }

    /// The hosts that have a NIC on the wire.
    fn group(&self, wire: u32) -> impl Iterator<Item = HostId> {
        self.groups.get(&wire).into_iter().flat_map(|hosts| hosts.keys().copied())
    }

    /// Who gets a frame for one NIC that the kernel has put into the tunnel port. Whatever the way to that host is by
    /// now: this one goes by tunnel.
    fn receiver(&self, key: Key) -> Option<HostId> {
        let known = self.behind.get(&key).copied().or_else(|| self.host_of(key));
        known.or_else(|| self.gateways.get(&key).copied())
    }

    /// What becomes of a frame that came by tunnel for a NIC that is elsewhere: the host that it goes on to, and
    /// the VM of which its sender is to be told. `None`: it is for this host's kernel.
    fn pass_on(
        &mut self,
        me: HostId,
        from: HostId,
        key: Key,
        held: impl FnOnce() -> bool,
    ) -> Option<(Option<HostId>, Option<VmId>)> {
        let (vm, host) = self.by_mac.get(&key).copied().filter(|(_, host)| *host != me)?;
        if held() {
            return None;
        }
        let tell = host != from && self.may_tell(from, vm);
        Some((Some(host).filter(|host| *host != from), Some(vm).filter(|_| tell)))
    }

    /// Whether `to` was not told lately where the VM is.
    fn may_tell(&mut self, to: HostId, vm: VmId) -> bool {
        let now = Instant::now();
        if self.told.len() >= TOLD {
            self.told.retain(|_, at| now.duration_since(*at) < TELL_AGAIN);
        }
        let known = self.told.get(&(to, vm));
        let due = known.is_none_or(|at| now.duration_since(*at) >= TELL_AGAIN);
        let tell = due && (self.told.len() < TOLD || known.is_some());
        if tell {
            self.told.insert((to, vm), now);
        }
        tell
    }
}

impl Node {
    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn carry(&self, wire: &Name) {
        self.table().carried.insert(tag(wire), wire.clone());
    }

    pub fn carries(&self, wire: &Name) -> bool {
        self.table().carried.contains_key(&tag(wire))
    }

    /// The wires that this host carries.
    pub fn carried(&self) -> Vec<Name> {
        self.table().carried.values().cloned().collect()
    }

    /// Whether some VM has this NIC.
    pub fn is_known(&self, tag: u32, mac: Mac) -> bool {
        self.table().by_mac.contains_key(&(tag, mac))
    }

    fn wire_of(&self, tag: u32) -> Option<Name> {
        self.table().carried.get(&tag).cloned()
    }

    /// Sends a frame to the hosts that it goes to by tunnel. The table stays locked: what is sent after a
    /// change, or said of it, is behind what was sent before.
    fn send_frame(&self, frame: &TunnelFrame) {
        let wire = tag(&frame.wire);
        let table = self.table();
        let send = |host: HostId| {
            // A frame that cannot be sent is lost, as on any link; the adapter counts it.
            let _ = self.frames.send(host, wire, &frame.frame);
        };
        let others = |host: &HostId| *host != self.me;
        if frame.is_group() {
            // The kernel has given it to those that it reaches.
            let far = |host: &HostId| self.via(wire, *host) == Where::Tunnel;
            table.group(wire).filter(others).filter(far).for_each(send);
        } else {
            table.receiver((wire, frame.destination())).filter(others).into_iter().for_each(send);
        }
    }

    /// Passes a frame on that came here because its sender has not heard where its NIC is now, and tells
    /// the sender. From host to host a frame meets ever newer routes, as who had a VM knows its next
    /// route: it cannot go round in circles.
    fn pass_on(self: &Arc<Self>, from: HostId, tag: u32, frame: &Bytes) -> bool {
        let Some(mac) = frame.first_chunk::<6>().filter(|mac| mac[0] & 1 == 0) else {
            return false;
        };
        let key = (tag, Mac(*mac));
        let passed = self.table().pass_on(self.me, from, key, || self.cutovers.held(key).is_some());
        let Some((on, told)) = passed else { return false };
        if let Some(host) = on {
            // Lost as on any link, and counted there.
            let _ = self.frames.send(host, tag, frame);
        }
        if let Some(vm) = told {
            let node = Arc::clone(self);
            tokio::spawn(async move {
                // Told again if this fails, or is lost: with its next frame.
                let _ = node.with_core(move |core, now| core.redirect(now, from, vm)).await;
            });
        }
        true
    }

    /// Members that reach this host by VXLAN. Theirs are senders to wait for even if no NIC of the wire is known
    /// to be there: what they send by the old way goes past this node, which could not pass it on.
    fn near(&self, tag: u32) -> impl Iterator<Item = HostId> {
        let members = self.net.members().into_iter().filter(|m| m.connected && !m.revoked);
        let vxlan = move |h: &HostId| matches!(self.via(tag, *h), Where::Vxlan(_));
        members.map(|m| m.host).filter(move |h| *h != self.me && vxlan(h))
    }

    /// The other hosts that may have sent frames for a NIC of the wire here, when it runs at `host` now.
    pub fn senders(&self, tag: u32, host: HostId) -> BTreeSet<HostId> {
        let mut senders: BTreeSet<HostId> = self.table().group(tag).collect();
        senders.insert(host);
        senders.extend(self.near(tag));
        senders.remove(&self.me);
        senders.retain(|h| self.net.member(*h).is_some_and(|m| m.connected && !m.revoked));
        senders
    }

    /// The hosts whose frames for a NIC of the wire reach it through this host's kernel.
    pub fn kernel_senders(&self, tag: u32) -> BTreeSet<HostId> {
        let mut senders: BTreeSet<HostId> = self.table().group(tag).collect();
        senders.retain(|h| *h != self.me && matches!(self.via(tag, *h), Where::Vxlan(_)));
        senders.extend(self.near(tag));
        senders.insert(self.me);
        senders
    }

    /// How frames of a wire get to another host.
    pub fn via(&self, tag: u32, host: HostId) -> Where {
        if !self.is_open(tag) {
            return Where::Tunnel;
        }
        let member = self.net.member(host);
        match member.and_then(|m| m.addresses.first().map(std::net::SocketAddr::ip)) {
            Some(ip) if self.links.trusts(ip) => Where::Vxlan(ip),
            _ => Where::Tunnel,
        }
    }
}

#[cfg(test)]
mod tests {
    use godwit_protocol::core::{Command, Config, Core};
    use godwit_protocol::id::{CopyId, Epoch, StoreId};
    use godwit_protocol::time::Time;
    use godwit_protocol::wire::route::{Kind, Nic};

    use super::*;

    const SENDER: HostId = HostId([1; 32]);
    const OLD: HostId = HostId([2; 32]);
    const NEW: HostId = HostId([3; 32]);
    const VM: VmId = VmId([7; 16]);
    const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);

    fn route(host: HostId, epoch: u64) -> Route {
        let wire = "red".parse().unwrap();
        Route {
            vm: VM,
            name: "guest".parse().unwrap(),
            host,
            copy: CopyId([1; 16]),
            epoch: Epoch(epoch),
            nics: vec![Nic { wire, mac: MAC }],
            kind: Kind::Vm,
            gone: false,
        }
    }

    fn core(me: HostId, knows: Route) -> Core {
        let config = Config {
            me,
            store: StoreId([1; 16]),
            site: "paris".parse().unwrap(),
            generation: 1,
            seed: 1,
            hard: BTreeMap::new(),
            moving: Vec::new(),
            statuses: Vec::new(),
        };
        let mut core = Core::new(Time(0), config);
        core.announce(Time(0), knows).unwrap();
        while core.poll_command().is_some() {}
        core
    }

    /// It has not heard of a move: its frames reach the guest, and it hears of it.
    #[test]
    fn a_stale_sender_is_told_and_its_frame_goes_on() {
        let key = (tag(&"red".parse().unwrap()), MAC);
        let (mut sender, mut sends) = (core(SENDER, route(OLD, 1)), Table::default());
        let (mut old, mut passes) = (core(OLD, route(NEW, 2)), Table::default());
        sends.put(route(OLD, 1));
        passes.put(route(OLD, 1));
        assert_eq!(sends.receiver(key), Some(OLD));
        assert_eq!(passes.pass_on(OLD, SENDER, key, || false), None, "the guest is here");
        passes.put(route(NEW, 2));
        assert_eq!(passes.pass_on(OLD, SENDER, key, || true), None, "it moves just now");
        let first = passes.pass_on(OLD, SENDER, key, || false);
        assert_eq!(first, Some((Some(NEW), Some(VM))));
        let second = passes.pass_on(OLD, SENDER, key, || false);
        assert_eq!(second, Some((Some(NEW), None)), "not with every frame");
        assert_eq!(passes.pass_on(OLD, NEW, key, || false), Some((None, None)), "never in circles");

        old.redirect(Time(1), SENDER, VM);
        while let Some(command) = old.poll_command() {
            let Command::Send(to, said) = command else { continue };
            assert_eq!(to, SENDER);
            sender.message(Time(2), OLD, said);
        }
        while let Some(command) = sender.poll_command() {
            if let Command::Route(route) = command {
                sends.put(route);
            }
        }
        assert_eq!(sends.routes.get(&VM).map(|r| r.epoch), Some(Epoch(2)));
        assert_eq!(sends.receiver(key), Some(NEW));
    }

    #[test]
    fn the_rest_of_a_tunnel_port_goes_where_it_was_to_go() {
        let key = (tag(&"red".parse().unwrap()), MAC);
        let mut table = Table::default();
        table.put(route(NEW, 2));
        table.behind.insert(key, OLD);
        assert_eq!(table.receiver(key), Some(OLD));
        table.behind.remove(&key);
        assert_eq!(table.receiver(key), Some(NEW));
    }
}
