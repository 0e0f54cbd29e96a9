//! Wires that were created by name, and what holds for each on every host.
//!
//! Owns what this host has heard of them, across restarts, and the routes that tell of them. Invariants: nothing leaves by
//! VXLAN on a wire of which this host has not heard that it may; a wire that is encrypted stays so, and a host that has
//! heard of it makes no VXLAN device for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use godwit_protocol::core::Core;
use godwit_protocol::id::{CopyId, Epoch, Name, VmId};
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::wire::codec;
use godwit_protocol::wire::route::{Kind, Route};

use super::copies::lock;
use super::node::Node;
use super::{uplinks, wires};
use crate::api::types::{ApiError, Done, OnWire, WireStatus};

/// Where wires are in the hard state.
pub(super) const KEYS: &[u8] = b"wire/";
/// Before a wire that could not be set up anew is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// `godwit wire create`. A wire that is encrypted is told of under an id of its own, so that nothing that is said of a
/// plain one of that name, now or later, takes it back.
pub(super) async fn create(node: &Arc<Node>, wire: &Name, encrypt: bool) -> Result<Done, ApiError> {
    if node.created(wires::tag(wire)) == Some(true) && !encrypt {
        return Err(ApiError::new(
            format!("wire {wire} is encrypted, for ever"),
            "choose another name for one that is not",
        ));
    }
    let kind = if encrypt { Kind::SealedWire } else { Kind::Wire };
    let id = id(wire, kind);
    let (host, copy) = (node.me, CopyId(id.0));
    let (name, nics) = (wire.clone(), Vec::new());
    let route = Route { vm: id, name, host, copy, epoch: Epoch(1), nics, kind, gone: false };
    let tell = move |core: &mut Core, now| core.announce(now, route);
    node.with_core(tell).await?.map_err(ApiError::plain)?;
    if node.carries(wire) {
        wires::ensure(node, wire).await?;
    }
    let how = if encrypt { "always encrypted" } else { "not encrypted on a trusted LAN" };
    Ok(Done { done: format!("wire {wire} is there, {how}") })
}

/// A wire was created, here or elsewhere.
pub(super) async fn heard(node: &Arc<Node>, route: &Route) {
    let key = [KEYS, &route.vm.0].concat();
    match codec::encode(route, CONTROL_MESSAGE_BYTES) {
        Ok(value) => {
            if node.keep(key, Some(value)).await.is_err() {
                tracing::error!(wire = %route.name, "not kept: after a restart it is heard of again");
            }
        }
        Err(error) => tracing::error!(%error, "not kept"),
    }
    if node.heard_of(route) && node.carries(&route.name) {
        // Its routes lead another way now.
        tokio::spawn(renew(Arc::clone(node), route.name.clone()));
    }
}

/// Of a named type: setting a wire up goes through its routes, and so comes by here.
fn renew(node: Arc<Node>, wire: Name) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        while let Err(error) = wires::ensure(&node, &wire).await {
            tracing::error!(%wire, error = %error.message, "its frames do not travel as they are to");
            tokio::time::sleep(AGAIN).await;
        }
    })
}

/// What the last daemon had heard; before any wire is taken up.
pub(super) fn adopt(node: &Node, wires: &[Route]) {
    for route in wires {
        node.heard_of(route);
    }
}

/// `godwit wire list`: all that are known, with who is on them.
pub(super) async fn list(node: &Arc<Node>) -> Result<Vec<WireStatus>, ApiError> {
    let routes = node
        .with_core(|core: &mut Core, _| core.routes().iter().cloned().collect::<Vec<_>>())
        .await?;
    let created = routes.iter().filter(|r| r.kind.is_wire()).map(|r| r.name.clone());
    let mut on: BTreeMap<Name, Vec<OnWire>> =
        created.chain(node.carried()).map(|wire| (wire, Vec::new())).collect();
    for route in routes.iter().filter(|r| !r.gone) {
        for nic in &route.nics {
            let (name, mac) = (route.name.clone(), nic.mac);
            let host = node.host_name(route.host);
            on.entry(nic.wire.clone()).or_default().push(OnWire { name, mac, host });
        }
    }
    let mut all = Vec::with_capacity(on.len());
    for (wire, nics) in on {
        let gateway = uplinks::gateway(node, &routes, &wire).map(|word| word.to_string());
        all.push(WireStatus { nics, gateway, ..wires::status(node, &wire).await });
    }
    Ok(all)
}

fn id(wire: &Name, kind: Kind) -> VmId {
    let prefix: &[u8] = if kind == Kind::SealedWire { b"sealed/" } else { b"wire/" };
    VmId(wires::derived_id(&[prefix, wire.as_str().as_bytes()]))
}

impl Node {
    /// Whether frames of the wire always travel encrypted; `None`: nothing was heard of it.
    pub fn created(&self, tag: u32) -> Option<bool> {
        lock(&self.created).get(&tag).copied()
    }

    /// Whether they may travel by VXLAN.
    pub fn is_open(&self, tag: u32) -> bool {
        self.created(tag) == Some(false)
    }

    /// A wire was created; whether its frames travel otherwise for that.
    fn heard_of(&self, route: &Route) -> bool {
        hear(&mut lock(&self.created), wires::tag(&route.name), route.kind == Kind::SealedWire)
    }
}

fn hear(created: &mut BTreeMap<u32, bool>, tag: u32, encrypted: bool) -> bool {
    let known = created.get(&tag).copied();
    let now = encrypted || known == Some(true);
    created.insert(tag, now);
    known != Some(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encrypted_stays_so_whatever_is_heard_when() {
        let mut created = BTreeMap::new();
        assert!(hear(&mut created, 1, false) && !hear(&mut created, 1, false));
        assert!(hear(&mut created, 1, true) && !hear(&mut created, 1, false));
        assert!(hear(&mut created, 2, true) && !hear(&mut created, 2, false));
        assert_eq!(created, BTreeMap::from([(1, true), (2, true)]));
    }
}
