//! Wires: where frames go as routes change.
//!
//! Owns the translation from routes to the kernel's FDB. Decides no route.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use futures::future::join_all;
use godwit_protocol::core::Core;
use godwit_protocol::id::{Epoch, Mac, Name};
use godwit_protocol::wire::route::{Kind, Nic, Route};

use super::copies::Copy;
use super::node::Node;
use super::{boot, catalog, cutover, flip, hold, uplinks};
use crate::api::types::{ApiError, WireStatus};
use crate::link::{LinkError, Where};
use crate::vmm::ResolvedSpec;

/// The tag of a wire in tunnel datagrams.
pub(super) fn tag(wire: &Name) -> u32 {
    let hash = blake3::hash(wire.as_str().as_bytes());
    let bytes = hash.as_bytes();
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// An id of what is no VM, made from what it is.
pub(super) fn derived_id(parts: &[&[u8]]) -> [u8; 16] {
    let hash = blake3::hash(&parts.concat());
    let mut id = [0; 16];
    id.copy_from_slice(&hash.as_bytes()[..16]);
    id
}

/// Opens one tap per NIC; the wires are made if they are not there.
pub(super) async fn open_taps(
    node: &Arc<Node>,
    spec: &ResolvedSpec,
) -> Result<Vec<OwnedFd>, ApiError> {
    let mut taps = Vec::with_capacity(spec.nics.len());
    for nic in &spec.nics {
        let tap = match &nic.wire {
            Some(wire) => {
                ensure(node, wire).await?;
                node.links.open_tap(wire, &nic.mac, &nic.filter).await
            }
            None => node.links.open_loose_tap(spec.id, &nic.mac).await,
        };
        taps.push(tap.map_err(ApiError::plain)?);
    }
    Ok(taps)
}

/// Makes a wire on this host and fills in the routes that are known.
pub(super) async fn ensure(node: &Arc<Node>, wire: &Name) -> Result<(), ApiError> {
    loop {
        let created = node.created(tag(wire));
        make(node, wire).await.map_err(ApiError::plain)?;
        node.carry(wire);
        broadcasts(node, wire).await;
        // Whoever hears later how its frames travel finds it carried.
        if node.created(tag(wire)) == created {
            break;
        }
    }
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

/// One of which nothing was heard takes what comes by VXLAN, as others may have heard that they may send it.
async fn make(node: &Node, wire: &Name) -> Result<(), LinkError> {
    let sealed = node.created(tag(wire)) == Some(true);
    node.links.ensure_wire(wire, sealed).await
}

/// After a restart: the kernel still has what this host uses of the wire.
pub(super) async fn adopt(node: &Node, wire: &Name) {
    let adopted = make(node, wire).await;
    node.carry(wire);
    match adopted {
        Ok(()) => {
            broadcasts(node, wire).await;
            let open = node.is_open(tag(wire));
            for (mac, to) in node.links.routes(wire).await {
                if !open && matches!(to, Where::Vxlan(_)) {
                    set(node, wire, &mac, Where::Tunnel).await;
                }
            }
        }
        Err(error) => tracing::error!(%wire, %error, "cannot take the wire up"),
    }
}

/// The copy's guest runs here: its frames come here, and everyone is told.
pub(super) async fn runs_here(node: &Arc<Node>, copy: &Arc<Copy>) {
    let turns = flip::here(node, copy);
    let nics = copy.wired();
    for nic in &nics {
        let key = (tag(&nic.wire), nic.mac);
        if let Some(arriving) = node.cutovers.arriving(key) {
            arriving.runs(node).await;
        } else if node.cutovers.held(key).is_none() {
            take_up(node, nic).await;
        }
    }
    let epoch = tell(node, copy).await.unwrap_or_else(|error| {
        tracing::error!(%error, "the route was not told");
        Epoch::default()
    });
    turns.into_iter().for_each(|turn| turn.at(epoch).end(node));
    let held = nics.iter().filter_map(|nic| node.cutovers.held((tag(&nic.wire), nic.mac)));
    join_all(held.map(|leaving| async move { leaving.stays(node).await })).await;
    // The guest's neighbours learn nothing new (the address stays), but switches on an uplink do.
    let qmp = copy.qemu();
    if let Err(error) = qmp.qmp().announce_self(10, 550, 5, 100).await {
        tracing::debug!(%error, "no announcement");
    }
}

/// Everyone is told which wires a VM that runs here is on, by the newest record. Gives its epoch.
pub(super) async fn tell(node: &Arc<Node>, copy: &Arc<Copy>) -> Result<Epoch, ApiError> {
    let (node_, copy) = (Arc::clone(node), Arc::clone(copy));
    let work = move |core: &mut Core, now| {
        let route = boot::route(&node_, &copy, core.record_of(copy.vm()));
        let epoch = route.epoch;
        // It may have ended meanwhile, and the core knows.
        if copy.qemu().exit().is_none() {
            core.runs(now, copy.vm(), copy.id, route);
        }
        epoch
    };
    node.with_core(work).await
}

/// The NIC's frames come here, and whatever a daemon that is gone left in their way ends.
pub(super) async fn take_up(node: &Node, nic: &Nic) {
    cutover::lead_back(node, &nic.wire, &nic.mac).await;
    if let Err(error) = node.links.unplug(&nic.wire, &nic.mac, None).await {
        tracing::error!(wire = %nic.wire, %error, "its tap may be plugged");
    }
    set(node, &nic.wire, &nic.mac, Where::Local).await;
}

/// The copy is gone from this host: its frames go where the routes say.
pub(super) async fn runs_no_more(node: &Arc<Node>, copy: &Arc<Copy>) {
    for nic in copy.wired() {
        if let Err(error) = node.links.forget_tap(&nic.wire, &nic.mac).await {
            tracing::warn!(wire = %nic.wire, %error, "a filter of no use stays");
        }
    }
    let route = node.table().routes.get(&copy.vm()).cloned();
    if let Some(route) = route {
        route_changed(node, &route).await;
    }
}

/// Brings a changed route into the kernel, on wires that this host has. Where the guest ran before it is
/// told, behind the last frame that goes there.
pub(super) async fn route_changed(node: &Arc<Node>, route: &Route) {
    if route.kind.is_wire() {
        return catalog::heard(node, route).await;
    }
    // One after the other: table and kernel change in the same order, and never back to an older route.
    let _turn = node.turning.lock().await;
    if flip::is_old(node, route) {
        return;
    }
    if flip::is_due(node, route) {
        hold::at("turn").await;
    }
    let known = node.table().routes.get(&route.vm).map(|r| r.nics.clone());
    let turns = flip::begin(node, route);
    let left = known.into_iter().flatten().filter(|nic| !route.nics.contains(nic));
    for nic in left.filter(|nic| node.carries(&nic.wire)) {
        // Unless another VM has it by now.
        if !node.is_known(tag(&nic.wire), nic.mac) {
            set(node, &nic.wire, &nic.mac, Where::None).await;
        }
    }
    let way_out = matches!(route.kind, Kind::Uplink { .. });
    let local = node.copies.running(route.vm).is_some_and(|c| c.id == route.copy);
    for nic in &route.nics {
        if !node.carries(&nic.wire) {
            continue;
        }
        let to = match route.host {
            _ if route.gone => Where::None,
            host if host == node.me && way_out => Where::Gateway,
            host if host == node.me && local => Where::Local,
            host if host == node.me => Where::None,
            host => node.via(tag(&nic.wire), host),
        };
        if !cutover::moved(node, (tag(&nic.wire), nic.mac), route) {
            set(node, &nic.wire, &nic.mac, to).await;
        }
        if way_out {
            uplinks::choose(node, &nic.wire).await;
        }
    }
    if way_out {
        node.uplinks.heard();
    }
    turns.into_iter().for_each(|turn| turn.end(node));
}

pub(super) async fn set(node: &Node, wire: &Name, mac: &Mac, to: Where) {
    if let Err(error) = node.links.set_route(wire, mac, to).await {
        tracing::warn!(%wire, mac = %mac.colons(), ?to, %error, "route not set");
    }
}

/// Members' addresses: who may send VXLAN, and who gets broadcasts by it.
pub(super) async fn members_changed(node: &Arc<Node>) {
    if let Err(error) = node.links.set_members(&underlay(node)).await {
        tracing::warn!(%error, "the members' addresses are not in the filter");
    }
    for wire in node.carried() {
        broadcasts(node, &wire).await;
        ways_changed(node, &wire).await;
    }
    uplinks::choose_again(node).await;
}

/// Routes to hosts that are reached another way now. What is on its way by the tunnel may be overtaken by what
/// follows it by VXLAN: a marker would need a host that holds the one until it has the other, for what happens once,
/// when a host is heard of for the first time.
async fn ways_changed(node: &Node, wire: &Name) {
    let _turn = node.turning.lock().await;
    let tag = tag(wire);
    let host = |mac| node.table().host_of((tag, mac)).filter(|host| *host != node.me);
    let routes = node.links.routes(wire).await;
    for (mac, to) in other_ways(&routes, |mac| host(mac).map(|host| node.via(tag, host))) {
        set(node, wire, &mac, to).await;
    }
}

/// Those that lead to another host by another way than theirs, with that.
fn other_ways(routes: &[(Mac, Where)], via: impl Fn(Mac) -> Option<Where>) -> Vec<(Mac, Where)> {
    let away = |to: &Where| matches!(to, Where::Tunnel | Where::Vxlan(_));
    let away = routes.iter().filter(|(_, to)| away(to));
    let other = away.filter_map(|(mac, old)| Some((*mac, via(*mac).filter(|new| new != old)?)));
    other.collect()
}

/// The other members' addresses.
fn underlay(node: &Node) -> Vec<IpAddr> {
    let members = node.net.members();
    let others = members.iter().filter(|m| m.host != node.me && !m.revoked);
    others.filter_map(|m| m.addresses.first().map(std::net::SocketAddr::ip)).collect()
}

/// Broadcasts of the wire go to every member on the trusted LAN.
async fn broadcasts(node: &Node, wire: &Name) {
    let open = node.is_open(tag(wire));
    let near = |ip: &IpAddr| open && node.links.trusts(*ip);
    let trusted: Vec<IpAddr> = underlay(node).into_iter().filter(near).collect();
    if let Err(error) = node.links.broadcast_set(wire, &trusted).await {
        tracing::warn!(%wire, %error, "broadcasts are not sent to the trusted LAN");
    }
}

/// What can be told of a wire.
pub(super) async fn status(node: &Arc<Node>, wire: &Name) -> WireStatus {
    let mut counters = BTreeMap::new();
    let sent = node.frames.counts();
    counters.insert("tunnel_not_sent".to_owned(), sent.not_sent);
    WireStatus {
        wire: wire.clone(),
        encrypted: !node.is_open(tag(wire)),
        here: node.carries(wire),
        nics: Vec::new(),
        gateway: None,
        uplink: node.uplinks.status(wire),
        bridge: crate::link::bridge_name(wire),
        mtu: u32::from(node.links.mtu()),
        counters,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_routes_whose_way_has_changed_are_set_anew() {
        let [a, b] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(|ip| Where::Vxlan(ip.into()));
        let old = [Where::Tunnel, a, a, a, Where::Tunnel, Where::Local, Where::Hold, Where::None];
        let new = [Some(a), Some(Where::Tunnel), Some(b), Some(a), None, Some(a), Some(a), Some(a)];
        let mac = |n: usize| Mac([2, 0, 0, 0, 0, n as u8]);
        let routes: Vec<_> = old.into_iter().enumerate().map(|(n, to)| (mac(n), to)).collect();
        let changed = other_ways(&routes, |mac| new[usize::from(mac.0[5])]);
        assert_eq!(changed, [(mac(0), a), (mac(1), Where::Tunnel), (mac(2), b)]);
    }
}
