//! Ways out of wires: the interfaces of this host that lead outside, and the gateway that this host's guests use.
//!
//! Owns what this host has of them, across restarts, the routes that tell of them, and the choice: this host's own
//! gateway, else one of its site, else any that can be reached. Decides nothing of a packet's way beyond the gateway.

use std::net::Ipv4Addr;
use std::sync::Arc;

use godwit_protocol::core::Core;
use godwit_protocol::id::{CopyId, HostId, Mac, Name, VmId};
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::wire::codec;
use godwit_protocol::wire::route::{Kind, Nic, Route};
use serde::{Deserialize, Serialize};

use super::node::Node;
use super::ports;
use super::wires::{self, derived_id, tag};
use crate::api::types::{ApiError, Done};
use crate::link::{Uplink, Where, gateway_mac};

/// Where they are in the hard state.
pub(super) const KEYS: &[u8] = b"uplink/";
/// Bits that name a subnet with room for a gateway and a guest.
const PREFIXES: std::ops::RangeInclusive<u8> = 1..=30;

/// A way out that this host has.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Kept {
    wire: Name,
    interface: String,
    gateway: Ipv4Addr,
    prefix: u8,
}

/// `godwit wire connect WIRE --uplink IF`.
pub(super) async fn connect(
    node: &Arc<Node>,
    wire: &Name,
    interface: &str,
    gateway: Option<&str>,
) -> Result<Done, ApiError> {
    let _one = node.rewiring.lock().await;
    let (gateway, prefix) = agreed(node, wire, gateway).await?;
    let kept = Kept { wire: wire.clone(), interface: interface.to_owned(), gateway, prefix };
    wires::ensure(node, wire).await?;
    set(node, &kept).await?;
    let value = codec::encode(&kept, CONTROL_MESSAGE_BYTES).map_err(ApiError::plain)?;
    put(node, wire, Some(value)).await?;
    let route = route(node, &kept)?;
    let told = node.with_core(move |core, now| ports::announce(core, now, route)).await?;
    if let Err(error) = told {
        // Not one that was there before: that is known, and can be told again.
        node.links.remove_uplink(wire).await.map_err(ApiError::plain)?;
        put(node, wire, None).await?;
        return Err(error);
    }
    Ok(Done {
        done: format!("wire {wire} has gateway {gateway}/{prefix} here, out by {interface}"),
    })
}

/// `godwit wire disconnect WIRE --uplink`.
pub(super) async fn disconnect(node: &Arc<Node>, wire: &Name) -> Result<Done, ApiError> {
    let _one = node.rewiring.lock().await;
    let id = VmId(id(node.me, wire));
    let known = node.with_core(move |core, _| core.routes().get(id).cloned()).await?;
    // One that is gone may have been taken away halfway.
    let Some(route) = known else {
        let hint = "see godwit wire list; ask on the host that has it";
        return Err(ApiError::new(format!("wire {wire} has no uplink on this host"), hint));
    };
    // First where others find a gateway, then this one's end.
    let gone = Route { gone: true, ..route };
    node.with_core(move |core, now| ports::announce(core, now, gone)).await??;
    node.links.remove_uplink(wire).await.map_err(ApiError::plain)?;
    put(node, wire, None).await?;
    Ok(Done { done: format!("wire {wire} has no uplink on this host") })
}

/// What the last daemon had; the wires' routes are not told yet.
pub(super) async fn adopt(node: &Arc<Node>, core: &mut Core, kept: Vec<Kept>) {
    let known = kept.iter().map(|k| (k.wire.clone(), k.interface.clone())).collect();
    if let Err(error) = node.links.expect_uplinks(known).await {
        tracing::error!(%error, "what may pass by gateways is not known");
    }
    for kept in kept {
        wires::adopt(node, &kept.wire).await;
        let set = set(node, &kept).await;
        let gone = set.is_err();
        let told = route(node, &kept)
            .and_then(|route| ports::announce(core, node.now(), Route { gone, ..route }));
        if let Err(error) = told {
            tracing::error!(error = %error.message, "an uplink is not taken up");
        }
        if let Err(error) = set {
            tracing::error!(wire = %kept.wire, error = %error.message, "it has no way out here: connect it again");
            if let Err(error) = node.links.remove_uplink(&kept.wire).await {
                tracing::error!(wire = %kept.wire, %error, "what is left of it stays");
            }
        }
    }
}

/// Hosts, or ways to them, have come or gone.
pub(super) async fn choose_again(node: &Arc<Node>) {
    for wire in node.carried() {
        if node.table().has_way_out(tag(&wire)) {
            let _turn = node.turning.lock().await;
            choose(node, &wire).await;
        }
    }
}

/// Leads frames for the wire's gateway to the best that there is. The caller holds `turning`.
pub(super) async fn choose(node: &Node, wire: &Name) {
    if !node.carries(wire) {
        return;
    }
    let (tag, mac) = (tag(wire), gateway_mac(wire));
    let members = node.net.members();
    let distance = |host: &HostId| {
        let member = members.iter().find(|m| m.host == *host);
        match member {
            _ if *host == node.me => Some(0),
            Some(m) if m.connected && !m.revoked => Some(if m.site == node.site { 1 } else { 2 }),
            _ => None,
        }
    };
    let to = {
        let mut table = node.table();
        let hosts = table.ways_out(tag).filter_map(|host| distance(&host).map(|d| (d, host)));
        let best = hosts.min().map(|(_, host)| host);
        table.lead_out((tag, mac), best);
        best
    };
    let to = match to {
        Some(host) if host == node.me => Where::Gateway,
        Some(host) => node.via(tag, host),
        None => Where::None,
    };
    wires::set(node, wire, &mac, to).await;
}

/// What the gateway of a wire is, if it has one anywhere.
pub(super) fn gateway<'a>(
    routes: impl Iterator<Item = &'a Route>,
    wire: &Name,
) -> Option<(Ipv4Addr, u8)> {
    let on_wire = |r: &&Route| !r.gone && r.nics.iter().any(|nic| nic.wire == *wire);
    routes.filter(on_wire).find_map(|route| match route.kind {
        Kind::Uplink { gateway, prefix } => Some((gateway, prefix)),
        _ => None,
    })
}

/// The gateway's address: that of the wire's other uplinks, or the one that is given.
async fn agreed(
    node: &Arc<Node>,
    wire: &Name,
    given: Option<&str>,
) -> Result<(Ipv4Addr, u8), ApiError> {
    let (wanted, name) = (wire.clone(), wire.clone());
    let me = node.me;
    let revoked = node.net.members().into_iter().filter(|m| m.revoked).map(|m| m.host);
    let revoked: std::collections::BTreeSet<HostId> = revoked.collect();
    let work = move |core: &mut Core, _| {
        let others = core.routes().iter().filter(|r| r.host != me && !revoked.contains(&r.host));
        gateway(others, &wanted)
    };
    let known = node.with_core(work).await?;
    let given = given.map(read).transpose()?;
    match (given, known) {
        (Some(given), Some(known)) if given != known => Err(ApiError::new(
            format!("the gateway of wire {name} is {}/{} elsewhere", known.0, known.1),
            "it is the same on every host: leave --gateway out",
        )),
        (Some(one), _) | (None, Some(one)) => Ok(one),
        (None, None) => Err(ApiError::new(
            format!("wire {name} has no gateway yet"),
            "name its address and its subnet: --gateway 10.5.0.1/24",
        )),
    }
}

fn read(text: &str) -> Result<(Ipv4Addr, u8), ApiError> {
    let parts = text.split_once('/');
    let parsed = parts.and_then(|(ip, prefix)| Some((ip.parse().ok()?, prefix.parse().ok()?)));
    let usable = |(ip, prefix): &(Ipv4Addr, u8)| {
        let all = u32::MAX.checked_shr(u32::from(*prefix)).unwrap_or(0);
        let host = ip.to_bits() & all;
        let special = ip.is_multicast() || ip.is_loopback() || ip.is_unspecified();
        PREFIXES.contains(prefix) && !special && host != 0 && host != all
    };
    parsed.filter(usable).ok_or_else(|| {
        ApiError::new(
            format!("{text} is no host's address in an IPv4 subnet"),
            "write it as 10.5.0.1/24; IPv6 is not routed by gateways",
        )
    })
}

async fn set(node: &Arc<Node>, kept: &Kept) -> Result<(), ApiError> {
    let own = own_mac(node.me, &kept.wire);
    let Kept { wire, interface, gateway, prefix } = kept.clone();
    let uplink = Uplink { interface, gateway, prefix, own };
    node.links.set_uplink(&wire, &uplink).await.map_err(ApiError::plain)
}

async fn put(node: &Arc<Node>, wire: &Name, value: Option<Vec<u8>>) -> Result<(), ApiError> {
    node.keep([KEYS, wire.as_str().as_bytes()].concat(), value).await
}

fn id(host: HostId, wire: &Name) -> [u8; 16] {
    derived_id(&[b"uplink/", &host.0, wire.as_str().as_bytes()])
}

/// This host's own MAC on the wire: locally administered.
fn own_mac(host: HostId, wire: &Name) -> Mac {
    let [a, b, c, d, e, ..] = id(host, wire);
    Mac([0x02, a, b, c, d, e])
}

fn route(node: &Node, kept: &Kept) -> Result<Route, ApiError> {
    let (id, mac) = (id(node.me, &kept.wire), own_mac(node.me, &kept.wire));
    let name = format!("uplink-{mac}").parse().map_err(ApiError::plain)?;
    let nics = vec![Nic { wire: kept.wire.clone(), mac }];
    let (vm, copy, host, epoch) = (VmId(id), CopyId(id), node.me, ports::epoch());
    let kind = Kind::Uplink { gateway: kept.gateway, prefix: kept.prefix };
    Ok(Route { vm, name, host, copy, epoch, nics, kind, gone: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_is_an_address_that_a_host_can_have() {
        assert_eq!(read("10.5.0.1/24").unwrap(), (Ipv4Addr::new(10, 5, 0, 1), 24));
        for bad in [
            "10.5.0.1",
            "10.5.0.0/24",
            "10.5.0.255/24",
            "10.5.0.1/31",
            "10.5.0.1/0",
            "10.5.0.1/33",
            "224.0.0.1/24",
            "127.0.0.1/8",
            "fd00::1/64",
            "10.5.0.1/200",
            "",
            "/24",
            "10.5.0.1/x",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_host_and_wire_has_an_address_of_its_own() {
        let wires: [Name; 2] = ["a".parse().unwrap(), "b".parse().unwrap()];
        let hosts = [HostId([1; 32]), HostId([2; 32])];
        let all = hosts.iter().flat_map(|host| wires.iter().map(|wire| own_mac(*host, wire)));
        let all: std::collections::BTreeSet<Mac> = all.collect();
        assert_eq!(all.len(), 4);
        assert!(all.iter().all(|mac| mac.0[0] == 2));
    }
}
