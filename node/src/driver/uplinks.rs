//! Ways out of wires: the interfaces of this host that lead outside, and the gateway that this host's guests use.
//!
//! Owns what this host has of them, across restarts, the routes that tell of them, and the choice: this host's own
//! gateway, else one of its site, else any that can be reached. Decides nothing of a packet's way beyond the gateway.
//! Invariant: an uplink is told of while it works: its interface runs, and no newer word names another gateway.

mod words;

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use godwit_protocol::core::Core;
use godwit_protocol::id::{CopyId, HostId, Mac, Name, VmId};
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::membership::State;
use godwit_protocol::wire::codec;
use godwit_protocol::wire::route::{Kind, Nic, Route};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::copies::lock;
use super::node::Node;
use super::ports;
use super::wires::{self, derived_id, tag};
use crate::api::types::{ApiError, Done, UplinkStatus};
use crate::link::{DeviceNews, Uplink, Where, gateway_mac};
pub(super) use words::Word;
use words::{Refused, Said};

/// Where they are in the hard state.
pub(super) const KEYS: &[u8] = b"uplink/";
/// How often interfaces are looked at besides: that one forwards again is told by nobody.
const LOOK: Duration = Duration::from_secs(5);
/// Changes of devices within this time are looked at together.
const TOGETHER: Duration = Duration::from_millis(100);

/// A way out that this host has.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Kept {
    wire: Name,
    interface: String,
    word: Word,
    /// The newer word for which it was given up.
    given_up: Option<Word>,
}

/// Those of this host.
#[derive(Default)]
pub(super) struct Uplinks {
    own: std::sync::Mutex<BTreeMap<Name, Own>>,
    /// Held while one of them is changed.
    changing: tokio::sync::Mutex<()>,
    /// What others say of a gateway has changed.
    news: Notify,
}

#[derive(Clone)]
struct Own {
    kept: Kept,
    /// Why it does not work.
    down: Option<String>,
}

impl Uplinks {
    fn own(&self) -> MutexGuard<'_, BTreeMap<Name, Own>> {
        lock(&self.own)
    }

    fn put(&self, kept: Kept, down: Option<String>) {
        self.own().insert(kept.wire.clone(), Own { kept, down });
    }

    /// Somebody has said something of a gateway.
    pub fn heard(&self) {
        self.news.notify_one();
    }

    /// What this host has of the wire's.
    pub fn status(&self, wire: &Name) -> Option<UplinkStatus> {
        let own = self.own().get(wire)?.clone();
        let Kept { interface, word, given_up, .. } = own.kept;
        let elsewhere = given_up.map(|other| {
            format!("given up: {other} was named later; connect it again, or disconnect it")
        });
        Some(UplinkStatus { interface, gateway: word.to_string(), down: elsewhere.or(own.down) })
    }
}

/// `godwit wire connect WIRE --uplink IF`.
pub(super) async fn connect(
    node: &Arc<Node>,
    wire: &Name,
    interface: &str,
    gateway: Option<&str>,
    replace: bool,
) -> Result<Done, ApiError> {
    let _one = node.uplinks.changing.lock().await;
    let word = agreed(node, wire, gateway, replace).await?;
    let (wire, interface) = (wire.clone(), interface.to_owned());
    let kept = Kept { wire, interface, word, given_up: None };
    let Kept { wire, interface, .. } = &kept;
    wires::ensure(node, wire).await?;
    let told = async {
        set(node, &kept).await?;
        put(node, wire, Some(&kept)).await?;
        tell(node, &kept, false).await
    };
    if let Err(error) = told.await {
        let before = node.uplinks.own().get(wire).map(|own| own.kept.clone());
        node.links.remove_uplink(wire).await.map_err(ApiError::plain)?;
        put(node, wire, before.as_ref()).await?;
        // One that was there before is taken up again by who looks after them.
        if let Some(before) = before {
            node.uplinks.put(before, Some(error.message.clone()));
            node.uplinks.heard();
        }
        return Err(error);
    }
    node.uplinks.put(kept.clone(), None);
    Ok(Done { done: format!("wire {wire} has gateway {word} here, out by {interface}") })
}

/// `godwit wire disconnect WIRE --uplink`.
pub(super) async fn disconnect(node: &Arc<Node>, wire: &Name) -> Result<Done, ApiError> {
    let _one = node.uplinks.changing.lock().await;
    let own = node.uplinks.own().get(wire).cloned();
    let Some(own) = own else {
        let hint = "see godwit wire list; ask on the host that has it";
        return Err(ApiError::new(format!("wire {wire} has no uplink on this host"), hint));
    };
    take_down(node, &own.kept).await?;
    put(node, wire, None).await?;
    node.uplinks.own().remove(wire);
    Ok(Done { done: format!("wire {wire} has no uplink on this host") })
}

/// First where others find a gateway, then this one's end.
async fn take_down(node: &Arc<Node>, kept: &Kept) -> Result<(), ApiError> {
    tell(node, kept, true).await?;
    node.links.remove_uplink(&kept.wire).await.map_err(ApiError::plain)
}

/// What the last daemon had; the wires' routes are not told yet.
pub(super) async fn adopt(node: &Arc<Node>, core: &mut Core, kept: Vec<Kept>) {
    let (given_up, kept): (Vec<_>, Vec<_>) = kept.into_iter().partition(|k| k.given_up.is_some());
    given_up.into_iter().for_each(|kept| node.uplinks.put(kept, None));
    let known = kept.iter().map(|k| (k.wire.clone(), k.interface.clone())).collect();
    if let Err(error) = node.links.expect_uplinks(known).await {
        tracing::error!(%error, "what may pass by gateways is not known");
    }
    for kept in kept {
        wires::adopt(node, &kept.wire).await;
        let set = set(node, &kept).await;
        let gone = set.is_err();
        let told = route(node, &kept, gone).and_then(|r| ports::announce(core, node.now(), r));
        let untold = told.err().map(|error| error.message);
        if let Some(error) = &untold {
            tracing::error!(error, "an uplink is not told to others");
        }
        if let Err(error) = &set {
            tracing::warn!(wire = %kept.wire, error = %error.message, "it has no way out here for now");
            if let Err(error) = node.links.remove_uplink(&kept.wire).await {
                tracing::error!(wire = %kept.wire, %error, "what is left of it stays");
            }
        }
        node.uplinks.put(kept, set.err().map(|error| error.message).or(untold));
    }
}

/// Takes uplinks down whose interfaces fail, or whose gateway was named otherwise later, and up again.
pub(super) fn watch(node: &Arc<Node>) -> tokio::task::JoinHandle<()> {
    let warn = |error: &_| tracing::warn!(%error, "uplinks are looked at now and then");
    let mut devices = DeviceNews::open().inspect_err(warn).ok();
    let node = Arc::clone(node);
    tokio::spawn(async move {
        loop {
            if !look(&node).await {
                // What fails for another reason than its interface is not tried with every change.
                sleep(LOOK).await;
            }
            let lost = tokio::select! {
                changed = async { devices.as_ref()?.next().await.err() }, if devices.is_some() => changed,
                () = node.uplinks.news.notified() => None,
                () = sleep(LOOK) => None,
            };
            if let Some(error) = lost {
                tracing::warn!(%error, "uplinks are looked at now and then");
                devices = None;
            }
            sleep(TOGETHER).await;
        }
    })
}

/// False: something could not be done.
async fn look(node: &Arc<Node>) -> bool {
    let _one = node.uplinks.changing.lock().await;
    let all: Vec<Own> = node.uplinks.own().values().cloned().collect();
    let mut done = true;
    for own in all.into_iter().filter(|own| own.kept.given_up.is_none()) {
        let wire = own.kept.wire.clone();
        if let Err(error) = look_at(node, own).await {
            tracing::warn!(%wire, error = %error.message, "its way out");
            done = false;
        }
    }
    done
}

async fn look_at(node: &Arc<Node>, Own { kept, down }: Own) -> Result<(), ApiError> {
    let others = others(node, &kept.wire).await?;
    let newer = words::newest(&others).filter(|w| *w > kept.word && !w.agrees(&kept.word));
    if let Some(newer) = newer {
        tracing::warn!(wire = %kept.wire, ours = %kept.word, theirs = %newer, "another gateway was named later: ours is given up");
        // Until all of it is done it counts as down, and is looked at again.
        node.uplinks.put(kept.clone(), Some(format!("{newer} was named later")));
        take_down(node, &kept).await?;
        let kept = Kept { given_up: Some(newer), ..kept };
        put(node, &kept.wire, Some(&kept)).await?;
        node.uplinks.put(kept, None);
        return Ok(());
    }
    let works = node.links.leads_out(&kept.interface).await.map_err(|e| e.to_string());
    match (works, down) {
        (Ok(()), Some(_)) => {
            let up = async {
                wires::ensure(node, &kept.wire).await?;
                set(node, &kept).await?;
                tell(node, &kept, false).await
            };
            let failed = up.await.err();
            match &failed {
                None => {
                    tracing::info!(wire = %kept.wire, interface = %kept.interface, "its way out is back")
                }
                Some(error) => node.uplinks.put(kept.clone(), Some(error.message.clone())),
            }
            failed.map_or(Ok(()), Err)?;
            node.uplinks.put(kept, None);
        }
        (Err(cause), None) => {
            tracing::warn!(wire = %kept.wire, %cause, "it has no way out here for now");
            // First: if taking it down fails, it is taken up anew when the interface is back.
            node.uplinks.put(kept.clone(), Some(cause));
            take_down(node, &kept).await?;
        }
        (Err(cause), Some(_)) => node.uplinks.put(kept, Some(cause)),
        (Ok(()), None) => {}
    }
    Ok(())
}

/// Hosts, or ways to them, have come or gone.
pub(super) async fn choose_again(node: &Arc<Node>) {
    node.uplinks.heard();
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
    let member = |host: HostId| members.iter().find(|m| m.host == host).filter(|m| !m.revoked);
    let distance = |host: HostId| match member(host) {
        _ if host == node.me => Some(0),
        Some(m) if m.connected => Some(if m.site == node.site { 1 } else { 2 }),
        _ => None,
    };
    let to = {
        let mut table = node.table();
        let said: Vec<_> = table.ways_out(tag).filter(|(h, _)| member(*h).is_some()).collect();
        let best = said.iter().map(|(_, word)| *word).max();
        let agree = said.iter().filter(|(_, word)| best.is_some_and(|best| best.agrees(word)));
        let best = agree.filter_map(|(host, _)| Some((distance(*host)?, *host))).min();
        let best = best.map(|(_, host)| host);
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
pub(super) fn gateway(node: &Node, routes: &[Route], wire: &Name) -> Option<Word> {
    let mut said = words::said(routes, wire);
    said.retain(|s| node.net.member(s.host).is_some_and(|m| !m.revoked));
    words::newest(&said)
}

/// What the other members have said of the wire's gateway.
async fn others(node: &Arc<Node>, wire: &Name) -> Result<Vec<Said>, ApiError> {
    let routes = node
        .with_core(|core: &mut Core, _| {
            let way_out = |r: &&Route| matches!(r.kind, Kind::Uplink { .. });
            core.routes().iter().filter(way_out).cloned().collect::<Vec<_>>()
        })
        .await?;
    let mut said = words::said(&routes, wire);
    said.retain(|s| s.host != node.me && node.net.member(s.host).is_some_and(|m| !m.revoked));
    Ok(said)
}

/// The gateway's address: that of the wire's other uplinks, or the one that is given.
async fn agreed(
    node: &Arc<Node>,
    wire: &Name,
    given: Option<&str>,
    replace: bool,
) -> Result<Word, ApiError> {
    let given = given.map(words::read).transpose()?;
    let others = others(node, wire).await?;
    let states = node
        .with_core(|core: &mut Core, _| {
            core.membership().members().map(|m| (m.host, m.state)).collect::<BTreeMap<_, _>>()
        })
        .await?;
    let reached = |host| {
        node.net.member(host).is_some_and(|m| m.connected)
            || states.get(&host).is_some_and(|state| *state != State::Down)
    };
    let names = |hosts: Vec<HostId>| {
        hosts.into_iter().map(|host| node.host_name(host)).collect::<Vec<_>>().join(", ")
    };
    words::agree(&others, given, replace, reached, ports::epoch()).map_err(|refused| match refused {
        Refused::Unnamed => ApiError::new(
            format!("wire {wire} has no gateway yet"),
            "name its address and its subnet: --gateway 10.5.0.1/24",
        ),
        Refused::Elsewhere(word, hosts) => ApiError::new(
            format!("the gateway of wire {wire} is {word} on {}", names(hosts)),
            format!("it is the same on every host: leave --gateway out, or take it away there first (godwit wire disconnect {wire} --uplink)"),
        ),
        Refused::Unreached(word, hosts) => ApiError::new(
            format!("the gateway of wire {wire} is {word} on {}, not reached now", names(hosts)),
            "leave --gateway out; or, if they are gone for good, --replace: should they come back, they give theirs up",
        ),
    })
}

async fn set(node: &Arc<Node>, kept: &Kept) -> Result<(), ApiError> {
    let own = own_mac(node.me, &kept.wire);
    let Kept { wire, interface, word: Word { gateway, prefix, .. }, .. } = kept.clone();
    let uplink = Uplink { interface, gateway, prefix, own };
    node.links.set_uplink(&wire, &uplink).await.map_err(ApiError::plain)
}

async fn put(node: &Arc<Node>, wire: &Name, kept: Option<&Kept>) -> Result<(), ApiError> {
    let encode = |kept| codec::encode(kept, CONTROL_MESSAGE_BYTES).map_err(ApiError::plain);
    let value = kept.map(encode).transpose()?;
    node.keep([KEYS, wire.as_str().as_bytes()].concat(), value).await
}

async fn tell(node: &Arc<Node>, kept: &Kept, gone: bool) -> Result<(), ApiError> {
    let route = route(node, kept, gone)?;
    node.with_core(move |core, now| ports::announce(core, now, route)).await?
}

fn id(host: HostId, wire: &Name) -> [u8; 16] {
    derived_id(&[b"uplink/", &host.0, wire.as_str().as_bytes()])
}

/// This host's own MAC on the wire: locally administered.
fn own_mac(host: HostId, wire: &Name) -> Mac {
    let [a, b, c, d, e, ..] = id(host, wire);
    Mac([0x02, a, b, c, d, e])
}

fn route(node: &Node, kept: &Kept, gone: bool) -> Result<Route, ApiError> {
    let (id, mac) = (id(node.me, &kept.wire), own_mac(node.me, &kept.wire));
    let name = format!("uplink-{mac}").parse().map_err(ApiError::plain)?;
    let nics = vec![Nic { wire: kept.wire.clone(), mac }];
    let (vm, copy, host, epoch) = (VmId(id), CopyId(id), node.me, ports::epoch());
    let Word { since, gateway, prefix } = kept.word;
    let kind = Kind::Uplink { gateway, prefix, since };
    Ok(Route { vm, name, host, copy, epoch, nics, kind, gone })
}

#[cfg(test)]
mod tests {
    use super::*;

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
