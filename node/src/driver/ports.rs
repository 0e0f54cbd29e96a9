//! Ports: addresses on a wire that are no VM's (a physical port put into the bridge, a container).
//!
//! Owns what this host has of them, across restarts, and the routes that tell of them. A port's route
//! has an id made from wire and address, so that the same port named twice is one.

use std::sync::Arc;

use godwit_protocol::core::Core;
use godwit_protocol::id::{CopyId, Epoch, Mac, Name, VmId};
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::time::Time;
use godwit_protocol::wire::codec;
use godwit_protocol::wire::route::{Kind, Nic, Route};

use super::node::{Node, wall_us};
use super::wires;
use crate::api::types::{ApiError, WireStatus};

/// Where ports are in the hard state.
pub(super) const KEYS: &[u8] = b"port/";

/// Connects an address that is no VM's to a wire of this host, or forgets it (`gone`).
pub(super) async fn set(
    node: &Arc<Node>,
    wire: &Name,
    mac: &str,
    gone: bool,
) -> Result<WireStatus, ApiError> {
    let digits: String = mac.chars().filter(|c| *c != ':').collect();
    let mac: Mac = digits.parse().map_err(|_| {
        ApiError::new(format!("{mac} is no Ethernet address"), "write it as 52:54:00:12:34:56")
    })?;
    wires::ensure(node, wire).await?;
    let nic = Nic { wire: wire.clone(), mac };
    let route = Route { gone, ..route(node, nic.clone())? };
    node.with_core(move |core, now| announce(core, now, route)).await??;
    keep(node, nic, gone).await?;
    Ok(wires::status(node, wire).await)
}

/// The ports that the last daemon had: their wires are taken up and their routes told.
pub(super) async fn adopt(node: &Node, core: &mut Core, ports: Vec<Nic>) {
    for nic in ports {
        wires::adopt(node, &nic.wire).await;
        if let Err(error) = route(node, nic).and_then(|r| announce(core, node.now(), r)) {
            tracing::error!(error = %error.message, "a port is not taken up");
        }
    }
}

async fn keep(node: &Arc<Node>, nic: Nic, gone: bool) -> Result<(), ApiError> {
    let value = codec::encode(&nic, CONTROL_MESSAGE_BYTES).map_err(ApiError::plain)?;
    node.keep([KEYS, &id(&nic)].concat(), Some(value).filter(|_| !gone)).await
}

fn id(nic: &Nic) -> [u8; 16] {
    wires::derived_id(&[b"port/", nic.wire.as_str().as_bytes(), b"/", &nic.mac.0])
}

fn route(node: &Node, nic: Nic) -> Result<Route, ApiError> {
    let id = id(&nic);
    let name = format!("port-{}", nic.mac).parse().map_err(ApiError::plain)?;
    let (vm, copy, host) = (VmId(id), CopyId(id), node.me);
    let (epoch, nics, kind) = (epoch(), vec![nic], Kind::Port);
    Ok(Route { vm, name, host, copy, epoch, nics, kind, gone: false })
}

/// Newer than all that was told before this daemon started, of which it may know nothing yet.
pub(super) fn epoch() -> Epoch {
    Epoch(wall_us() / 1_000_000)
}

/// Tells everyone of what is not a VM, as something newer than what was told before.
pub(super) fn announce(core: &mut Core, now: Time, route: Route) -> Result<(), ApiError> {
    let known = core.routes().get(route.vm).map(|known| known.epoch.next());
    let epoch = route.epoch.max(known.unwrap_or_default());
    core.announce(now, Route { epoch, ..route }).map_err(ApiError::plain)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use godwit_protocol::core::Config;
    use godwit_protocol::id::{HostId, StoreId};
    use godwit_protocol::limits::ROUTES;

    use super::*;

    fn route(number: usize) -> Route {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        let name = format!("port-{number}").parse().unwrap();
        let (host, copy) = (HostId([1; 32]), CopyId(id));
        let (vm, epoch, nics, kind) = (VmId(id), Epoch(5), Vec::new(), Kind::Port);
        Route { vm, name, host, copy, epoch, nics, kind, gone: false }
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        let config = Config {
            me: HostId([1; 32]),
            store: StoreId([1; 16]),
            site: "paris".parse().unwrap(),
            generation: 1,
            seed: 1,
            hard: BTreeMap::new(),
            moving: Vec::new(),
            statuses: Vec::new(),
        };
        let mut core = Core::new(Time(0), config);
        for number in 0..ROUTES {
            announce(&mut core, Time(0), route(number)).unwrap();
            while core.poll_command().is_some() {}
        }
        let refused = announce(&mut core, Time(0), route(ROUTES)).unwrap_err();
        assert!(refused.message.contains("use one of them again"), "{}", refused.message);
        assert_eq!(core.routes().get(route(ROUTES).vm), None);
        announce(&mut core, Time(0), route(0)).unwrap();
        assert_eq!(core.routes().get(route(0).vm).map(|r| r.epoch), Some(Epoch(6)));
    }
}
