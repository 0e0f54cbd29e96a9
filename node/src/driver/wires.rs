//! Wires: where frames go as routes change, and the shuttles between kernel and tunnels.
//!
//! Owns the translation from routes to the kernel's FDB. Decides no route.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard, PoisonError};

use godwit_protocol::id::{Epoch, HostId, Mac, Name, VmId};
use godwit_protocol::wire::route::Route;
use tokio::sync::mpsc;

use super::copies::Copy;
use super::cutover::{self, Key};
use super::node::Node;
use super::{boot, flip};
use crate::api::types::{ApiError, WireStatus};
use crate::link::{Outgoing, TunnelFrame, Where};
use crate::net::Payload;
use crate::vmm::ResolvedSpec;
use crate::vmm::resolved::ResolvedNic;

/// The tag of a wire in tunnel datagrams.
pub(super) fn tag(wire: &Name) -> u32 {
    let hash = blake3::hash(wire.as_str().as_bytes());
    let bytes = hash.as_bytes();
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Opens one tap per NIC; the wires are made if they are not there.
pub(super) async fn open_taps(
    node: &Arc<Node>,
    spec: &ResolvedSpec,
) -> Result<Vec<OwnedFd>, ApiError> {
    let mut taps = Vec::with_capacity(spec.nics.len());
    for nic in &spec.nics {
        ensure(node, &nic.wire).await?;
        taps.push(node.links.open_tap(&nic.wire, &nic.mac).await.map_err(ApiError::plain)?);
    }
    Ok(taps)
}

/// Makes a wire on this host and fills in the routes that are known.
pub(super) async fn ensure(node: &Arc<Node>, wire: &Name) -> Result<(), ApiError> {
    node.links.ensure_wire(wire).await.map_err(ApiError::plain)?;
    node.carry(wire);
    let wanted = wire.clone();
    let routes = node
        .with_core(move |core, _| {
            let on_wire = |r: &&Route| r.nics.iter().any(|n| n.wire == wanted);
            core.routes().iter().filter(on_wire).cloned().collect::<Vec<_>>()
        })
        .await?;
    for route in routes {
        route_changed(node, &route).await;
    }
    Ok(())
}

/// After a restart: the kernel still has what this host uses of the wire.
pub(super) async fn adopt(node: &Node, wire: &Name) {
    let adopted = node.links.ensure_wire(wire).await;
    node.carry(wire);
    if let Err(error) = adopted {
        tracing::error!(%wire, %error, "cannot take the wire up");
    }
}

/// The copy's guest runs here: its frames come here, and everyone is told.
pub(super) async fn runs_here(node: &Arc<Node>, copy: &Arc<Copy>) {
    let turn = flip::here(node, copy);
    for nic in &copy.spec.nics {
        let key = (tag(&nic.wire), nic.mac);
        if let Some(arriving) = node.cutovers.arriving(key) {
            arriving.runs(node).await;
        } else if node.cutovers.held(key).is_none() {
            take_up(node, nic).await;
        }
    }
    let told = {
        let (node_, copy_) = (Arc::clone(node), Arc::clone(copy));
        node.with_core(move |core, now| {
            let vm = copy_.vm();
            let epoch = core.record_of(vm).map_or(Epoch::default(), |r| r.epoch);
            core.runs(now, vm, copy_.id, boot::route(&node_, &copy_, epoch));
            epoch
        })
        .await
    };
    match told {
        Ok(epoch) => turn.into_iter().for_each(|turn| turn.at(epoch).end(node)),
        Err(error) => tracing::error!(%error, "the route was not told"),
    }
    for nic in &copy.spec.nics {
        if let Some(leaving) = node.cutovers.held((tag(&nic.wire), nic.mac)) {
            leaving.stays(node).await;
        }
    }
    // The guest's neighbours learn nothing new (the address stays), but switches on an uplink do.
    let qmp = copy.qemu();
    if let Err(error) = qmp.qmp().announce_self(10, 550, 5, 100).await {
        tracing::debug!(%error, "no announcement");
    }
}

/// The NIC's frames come here, and whatever a daemon that is gone left in their way ends.
pub(super) async fn take_up(node: &Node, nic: &ResolvedNic) {
    if let Err(error) = node.links.unplug(&nic.wire, &nic.mac).await {
        tracing::error!(wire = %nic.wire, %error, "its tap may be plugged");
    }
    set(node, &nic.wire, &nic.mac, Where::Local).await;
}

/// The copy is gone from this host: its frames go where the routes say.
pub(super) async fn runs_no_more(node: &Arc<Node>, copy: &Arc<Copy>) {
    let route = node.table().routes.get(&copy.vm()).cloned();
    if let Some(route) = route {
        route_changed(node, &route).await;
    }
}

/// Brings a changed route into the kernel, on wires that this host has. Where the guest ran before it is
/// told, behind the last frame that goes there.
pub(super) async fn route_changed(node: &Arc<Node>, route: &Route) {
    let turn = flip::begin(node, route);
    let local = node.copies.running(route.vm).is_some_and(|c| c.id == route.copy);
    for nic in &route.nics {
        if !node.carries(&nic.wire) {
            continue;
        }
        let to = match route.host {
            _ if route.gone => Where::None,
            host if host == node.me && local => Where::Local,
            host if host == node.me => Where::None,
            host => node.via(host),
        };
        if !cutover::moved(node, (tag(&nic.wire), nic.mac), route) {
            set(node, &nic.wire, &nic.mac, to).await;
        }
    }
    if let Some(turn) = turn {
        turn.end(node);
    }
}

pub(super) async fn set(node: &Node, wire: &Name, mac: &godwit_protocol::id::Mac, to: Where) {
    if let Err(error) = node.links.set_route(wire, mac, to).await {
        tracing::warn!(%wire, mac = %mac.colons(), ?to, %error, "route not set");
    }
}

/// Members' addresses: who may send VXLAN, and who gets broadcasts by it.
pub(super) async fn members_changed(node: &Arc<Node>) {
    let ips: Vec<IpAddr> = node
        .net
        .members()
        .iter()
        .filter(|m| m.host != node.me && !m.revoked)
        .filter_map(|m| m.addresses.first().map(std::net::SocketAddr::ip))
        .collect();
    if let Err(error) = node.links.set_members(&ips).await {
        tracing::warn!(%error, "the members' addresses are not in the filter");
    }
    let trusted: Vec<IpAddr> = ips.into_iter().filter(|ip| node.links.trusts(*ip)).collect();
    for wire in node.carried() {
        if let Err(error) = node.links.broadcast_set(&wire, &trusted).await {
            tracing::warn!(%wire, %error, "broadcasts are not sent to the trusted LAN");
        }
    }
}

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
            if frame.is_group() {
                node.cutovers.flooded(tag(&frame.wire), &frame.frame);
            }
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
            if !node.cutovers.take_in(&node, from, tag, &frame)
                && let Some(wire) = node.wire_of(tag)
            {
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
    by_mac: BTreeMap<Key, HostId>,
    groups: BTreeMap<u32, BTreeSet<HostId>>,
    /// NICs whose frames do not leave by tunnel any more, but for what is in the tunnel port still: it goes
    /// to their old host.
    pub behind: BTreeMap<Key, HostId>,
}

impl Table {
    pub fn put(&mut self, route: Route) {
        if let Some(old) = self.routes.insert(route.vm, route) {
            for nic in &old.nics {
                self.by_mac.remove(&(tag(&nic.wire), nic.mac));
            }
        }
        self.groups.clear();
        for route in self.routes.values().filter(|r| !r.gone) {
            for nic in &route.nics {
                let wire = tag(&nic.wire);
                self.by_mac.insert((wire, nic.mac), route.host);
                self.groups.entry(wire).or_default().insert(route.host);
            }
        }
    }
}

impl Node {
    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self, wire: &Name) {
        self.table().carried.insert(tag(wire), wire.clone());
    }

    pub fn carries(&self, wire: &Name) -> bool {
        self.table().carried.contains_key(&tag(wire))
    }

    /// The wires that this host carries.
    pub fn carried(&self) -> Vec<Name> {
        self.table().carried.values().cloned().collect()
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
        let far = |host: &HostId| *host != self.me && self.via(*host) == Where::Tunnel;
        let key = (wire, frame.destination());
        if frame.is_group() {
            table.groups.get(&wire).into_iter().flatten().copied().filter(far).for_each(send);
        } else if let Some(host) = table.behind.get(&key) {
            send(*host);
        } else {
            table.by_mac.get(&key).copied().filter(far).into_iter().for_each(send);
        }
    }

    /// The other hosts that may have sent frames for a NIC of the wire here, when it runs at `host` now.
    pub fn senders(&self, tag: u32, host: HostId) -> BTreeSet<HostId> {
        let mut senders = self.table().groups.get(&tag).cloned().unwrap_or_default();
        senders.insert(host);
        senders.remove(&self.me);
        senders.retain(|h| self.net.member(*h).is_some_and(|m| m.connected && !m.revoked));
        senders
    }

    /// The hosts whose frames for a NIC of the wire reach it through this host's kernel.
    pub fn kernel_senders(&self, tag: u32) -> BTreeSet<HostId> {
        let mut senders = self.table().groups.get(&tag).cloned().unwrap_or_default();
        senders.retain(|h| *h != self.me && matches!(self.via(*h), Where::Vxlan(_)));
        senders.insert(self.me);
        senders
    }

    /// How frames get to another host.
    pub fn via(&self, host: HostId) -> Where {
        let member = self.net.member(host);
        match member.and_then(|m| m.addresses.first().map(std::net::SocketAddr::ip)) {
            Some(ip) if self.links.trusts(ip) => Where::Vxlan(ip),
            _ => Where::Tunnel,
        }
    }
}

/// What can be told of a wire.
pub(super) async fn status(node: &Arc<Node>, wire: &Name) -> WireStatus {
    let mut counters = BTreeMap::new();
    let sent = node.frames.counts();
    counters.insert("tunnel_not_sent".to_owned(), sent.not_sent);
    WireStatus {
        wire: wire.clone(),
        bridge: crate::link::bridge_name(wire),
        mtu: u32::from(node.links.mtu()),
        counters,
    }
}
