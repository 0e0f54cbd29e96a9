//! Wires: where frames go as routes change, and the shuttles between kernel and tunnels.
//!
//! Owns the translation from routes to the kernel's FDB. Decides no route.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard, PoisonError};

use bytes::Bytes;
use godwit_protocol::id::{Epoch, HostId, Mac, Name, VmId};
use godwit_protocol::wire::route::Route;
use tokio::sync::mpsc;

use super::boot;
use super::copies::Copy;
use super::node::Node;
use crate::api::types::{ApiError, WireStatus};
use crate::link::{TunnelFrame, Where};
use crate::vmm::ResolvedSpec;

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
    let told = {
        let (node_, copy_) = (Arc::clone(node), Arc::clone(copy));
        node.with_core(move |core, now| {
            let vm = copy_.vm();
            let epoch = core.record_of(vm).map_or(Epoch::default(), |r| r.epoch);
            core.runs(now, vm, copy_.id, boot::route(&node_, &copy_, epoch));
        })
        .await
    };
    if let Err(error) = told {
        tracing::error!(%error, "the route was not told");
    }
    for nic in &copy.spec.nics {
        set(node, &nic.wire, &nic.mac, Where::Local).await;
    }
    // The guest's neighbours learn nothing new (the address stays), but switches on an uplink do.
    let qmp = copy.qemu();
    if let Err(error) = qmp.qmp().announce_self(10, 550, 5, 100).await {
        tracing::debug!(%error, "no announcement");
    }
}

/// The copy is gone from this host: its frames go where the routes say.
pub(super) async fn runs_no_more(node: &Arc<Node>, copy: &Arc<Copy>) {
    let route = node.table().routes.get(&copy.vm()).cloned();
    if let Some(route) = route {
        route_changed(node, &route).await;
    }
}

/// Brings a changed route into the kernel, on wires that this host has.
pub(super) async fn route_changed(node: &Arc<Node>, route: &Route) {
    node.table().put(route.clone());
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
        set(node, &nic.wire, &nic.mac, to).await;
    }
}

async fn set(node: &Node, wire: &Name, mac: &godwit_protocol::id::Mac, to: Where) {
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
    mut frames: mpsc::Receiver<TunnelFrame>,
) -> tokio::task::JoinHandle<()> {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        while let Some(frame) = frames.recv().await {
            for host in node.targets(&frame) {
                // A frame that cannot be sent is lost, as on any link; the adapter counts it.
                let _ = node.frames.send(host, tag(&frame.wire), &frame.frame);
            }
        }
    })
}

/// Frames that came by the tunnel.
pub(super) fn shuttle_in(
    node: &Arc<Node>,
    mut frames: mpsc::Receiver<(HostId, u32, Bytes)>,
) -> tokio::task::JoinHandle<()> {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        while let Some((_, tag, frame)) = frames.recv().await {
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
    routes: BTreeMap<VmId, Route>,
    by_mac: BTreeMap<(u32, Mac), HostId>,
    groups: BTreeMap<u32, BTreeSet<HostId>>,
}

impl Table {
    fn put(&mut self, route: Route) {
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
    fn table(&self) -> MutexGuard<'_, Table> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self, wire: &Name) {
        self.table().carried.insert(tag(wire), wire.clone());
    }

    fn carries(&self, wire: &Name) -> bool {
        self.table().carried.contains_key(&tag(wire))
    }

    /// The wires that this host carries.
    pub fn carried(&self) -> Vec<Name> {
        self.table().carried.values().cloned().collect()
    }

    fn wire_of(&self, tag: u32) -> Option<Name> {
        self.table().carried.get(&tag).cloned()
    }

    /// The hosts that a frame goes to by tunnel.
    fn targets(&self, frame: &TunnelFrame) -> Vec<HostId> {
        let wire = tag(&frame.wire);
        let hosts: Vec<HostId> = if frame.is_group() {
            self.table().groups.get(&wire).into_iter().flatten().copied().collect()
        } else {
            self.table().by_mac.get(&(wire, frame.destination())).copied().into_iter().collect()
        };
        let far = |h: &HostId| *h != self.me && self.via(*h) == Where::Tunnel;
        hosts.into_iter().filter(far).collect()
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
