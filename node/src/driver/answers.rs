//! What the local API answers.
//!
//! Owns the dispatch of requests; the work is done by the modules it names.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use godwit_protocol::membership::State;
use godwit_protocol::wire::codec::WIRE_VERSION;
use godwit_protocol::wire::control::{Answer, Ask};
use godwit_protocol::wire::migrate::Options;
use godwit_protocol::wire::route::Route;
use godwit_protocol::wire::wiring::Change;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::node::{self, DriverError, Node};
use super::{boot, catalog, clusters, group, leave, migrate, nics, on, ports, uplinks, wires};
use crate::api::server::Listener;
use crate::api::types::{
    ApiError, Done, Event, HostInfo, ImageInfo, NodeStatus, Request, RouteInfo, Token,
};
use crate::link::Where;

/// How long a round trip may take that is shown.
const RTT: std::time::Duration = std::time::Duration::from_secs(5);

/// Opens the local socket and answers there.
pub(super) fn serve(node: &Arc<Node>) -> Result<tokio::task::JoinHandle<()>, DriverError> {
    let listener = Listener::bind(&node.options.state.join("api.sock")).map_err(DriverError::of)?;
    let node = Arc::clone(node);
    let handler = move |request: Request, events: mpsc::Sender<Event>| {
        let node = Arc::clone(&node);
        async move { answer(&node, request, events).await }
    };
    Ok(tokio::spawn(listener.run(Arc::new(handler))))
}

fn value<T: serde::Serialize>(answer: T) -> Result<Value, ApiError> {
    serde_json::to_value(answer).map_err(ApiError::plain)
}

/// What a request to move a VM asks for.
fn asked(node: &Node, request: Request) -> Result<migrate::Asked, ApiError> {
    let Request::Migrate {
        vm,
        to,
        place,
        dry_run: _,
        wait,
        bandwidth_bytes_per_s,
        max_downtime_ms,
        deadline_s,
        disk_bandwidth_bytes_per_s,
        id,
    } = request
    else {
        return Err(ApiError::plain("no request to move a VM"));
    };
    let options =
        Options { bandwidth_bytes_per_s, max_downtime_ms, deadline_s, disk_bandwidth_bytes_per_s };
    let target = migrate::target(node, &to)?;
    Ok(migrate::Asked { vm, target, place, wait, options, id })
}

async fn answer(
    node: &Arc<Node>,
    request: Request,
    events: mpsc::Sender<Event>,
) -> Result<Value, ApiError> {
    match request {
        Request::VmRun { spec_toml, .. } => value(boot::run(node, &spec_toml).await?),
        Request::VmList {} => value(boot::list(node).await?),
        Request::VmShow { vm } => value(boot::show(node, &vm).await?),
        Request::VmStart { vm } => value(on::start(node, &vm).await?),
        Request::VmStop { vm, kill } => value(boot::stop(node, &vm, kill).await?),
        Request::VmConsole { vm } => value(boot::console(node, &vm).await?),
        Request::Migrate { dry_run: true, .. } => {
            let asked = asked(node, request)?;
            let route = boot::find(node, &asked.vm).await?;
            value(group::plan(node, &route, &asked).await?)
        }
        Request::Migrate { .. } => {
            value(migrate::migrate(node, asked(node, request)?, events).await?)
        }
        Request::ClusterCreate { .. }
        | Request::ClusterList {}
        | Request::ClusterShow { .. }
        | Request::ClusterAdd { .. }
        | Request::ClusterRemove { .. }
        | Request::ClusterDelete { .. }
        | Request::ClusterForce { .. } => of_clusters(node, request).await,
        Request::Migrations { id } => value(migrate::list(node, id).await?),
        Request::Abort { id } => value(migrate::abort(node, id).await?),
        Request::Routes {} => value(routes(node).await?),
        Request::Hosts {} => value(hosts(node).await?),
        Request::Token { ttl_s } => value(token(node, ttl_s).await?),
        Request::Revoke { host, now } => value(leave::revoke(node, &host, now).await?),
        Request::Drain { undo } => value(leave::drain(node, undo).await?),
        Request::Leave {} => {
            if node.copies.all().iter().any(|c| c.ran()) {
                return Err(ApiError::new(
                    "VMs run on this host",
                    "move them first: godwit migrate VM --to auto",
                ));
            }
            node.net.leave().await.map_err(ApiError::plain)?;
            value(Done { done: "this host has left the swarm; stop the daemon".into() })
        }
        Request::ImageAdd { path } => {
            let images = Arc::clone(&node.images);
            let added = tokio::task::spawn_blocking(move || images.add(&path));
            value(image(&added.await.map_err(ApiError::plain)?.map_err(ApiError::plain)?))
        }
        Request::ImageList {} => {
            let images = Arc::clone(&node.images);
            let list = tokio::task::spawn_blocking(move || images.list()).await;
            value(list.map_err(ApiError::plain)?.iter().map(image).collect::<Vec<_>>())
        }
        Request::ImageRemove { path } => {
            let images = Arc::clone(&node.images);
            let removed = tokio::task::spawn_blocking(move || forget(&images, &path));
            value(removed.await.map_err(ApiError::plain)??)
        }
        Request::Status {} => value(status(node)),
        Request::WireInfo {}
        | Request::WireCreate { .. }
        | Request::WireConnect { .. }
        | Request::WireFilter { .. }
        | Request::WireUplink { .. }
        | Request::WirePort { .. } => of_wires(node, request).await,
    }
}

async fn token(node: &Node, ttl_s: u64) -> Result<Token, ApiError> {
    let life = std::time::Duration::from_secs(ttl_s);
    let token = node.net.mint_token(life, false).await.map_err(ApiError::plain)?;
    Ok(Token { token, expires_s: node::wall_us() / 1_000_000 + ttl_s })
}

async fn of_wires(node: &Arc<Node>, request: Request) -> Result<Value, ApiError> {
    match request {
        Request::WireConnect { vm, wire, mac, disconnect } => {
            let change = if disconnect { Change::Disconnect } else { Change::Connect };
            value(nics::change(node, &vm, mac.as_deref(), change(wire)).await?)
        }
        Request::WireFilter { vm, mac, rules } => {
            let rules = rules.iter().map(|rule| rule.parse()).collect::<Result<_, _>>();
            let change = Change::Filter(rules.map_err(ApiError::plain)?);
            value(nics::change(node, &vm, mac.as_deref(), change).await?)
        }
        Request::WireUplink { wire, interface: Some(interface), gateway, replace } => {
            value(uplinks::connect(node, &wire, &interface, gateway.as_deref(), replace).await?)
        }
        Request::WireUplink { wire, interface: None, .. } => {
            value(uplinks::disconnect(node, &wire).await?)
        }
        Request::WirePort { wire, mac, remove } => {
            value(ports::set(node, &wire, &mac, remove).await?)
        }
        Request::WireCreate { wire, encrypt } => {
            value(catalog::create(node, &wire, encrypt).await?)
        }
        _ => value(catalog::list(node).await?),
    }
}

async fn of_clusters(node: &Arc<Node>, request: Request) -> Result<Value, ApiError> {
    match request {
        Request::ClusterCreate { cluster, vms, id } => {
            value(clusters::create(node, cluster, &vms, id).await?)
        }
        Request::ClusterList {} => value(clusters::list(node).await?),
        Request::ClusterShow { cluster } => value(clusters::show(node, &cluster).await?),
        Request::ClusterAdd { cluster, vm } => value(clusters::add(node, &cluster, &vm).await?),
        Request::ClusterRemove { cluster, vm } => {
            value(clusters::remove(node, &cluster, &vm).await?)
        }
        Request::ClusterDelete { cluster } => value(clusters::delete(node, &cluster).await?),
        Request::ClusterForce { cluster, by, why } => {
            value(clusters::force(node, &cluster, &by, &why).await?)
        }
        _ => Err(ApiError::plain("no request about a cluster")),
    }
}

fn forget(images: &crate::store::Images, path: &std::path::Path) -> Result<Done, ApiError> {
    let deleted = images.remove(path).map_err(ApiError::plain)?;
    let file = if deleted { "the file is deleted" } else { "the file stays" };
    Ok(Done { done: format!("{} is forgotten; {file}", path.display()) })
}

fn image(image: &crate::store::images::Image) -> ImageInfo {
    ImageInfo {
        path: image.path.clone(),
        kind: image.kind.to_string(),
        bytes: image.bytes,
        allocated_bytes: image.allocated,
        state: image.state.to_string(),
        chunks: image.chunks as u64,
        vm: image.vm,
        expires_s: image.expires_s,
    }
}

async fn routes(node: &Arc<Node>) -> Result<Vec<RouteInfo>, ApiError> {
    let routes = node
        .with_core(|core, _| {
            core.routes()
                .iter()
                .filter(|r| !r.gone && !r.kind.is_wire())
                .cloned()
                .collect::<Vec<_>>()
        })
        .await?;
    let via = |r: &Route| match r.nics.first().map(|nic| node.via(wires::tag(&nic.wire), r.host)) {
        _ if r.host == node.me => "local",
        None => "none",
        Some(Where::Vxlan(_)) => "vxlan",
        _ => "tunnel",
    };
    Ok(routes
        .into_iter()
        .map(|r| RouteInfo {
            via: via(&r).into(),
            name: r.name,
            vm: r.vm,
            host: node.host_name(r.host),
            host_id: r.host,
            epoch: r.epoch,
            nics: r.nics,
        })
        .collect())
}

async fn hosts(node: &Arc<Node>) -> Result<Vec<HostInfo>, ApiError> {
    let members = node.net.members();
    let asked = members.iter().filter(|m| m.connected && m.host != node.me);
    let asked: Vec<_> = asked.map(|m| m.host).collect();
    // The round trip apart from the question, which waits its turn behind other messages.
    let look =
        |host| async move { (node.net.probe(host, RTT).await, node.ask(host, Ask::Host).await) };
    let answers = futures::future::join_all(asked.iter().map(|h| look(*h))).await;
    let mut told: BTreeMap<_, Value> = BTreeMap::new();
    let mut rtts = BTreeMap::new();
    for (host, (rtt, answer)) in asked.into_iter().zip(answers) {
        rtts.extend(rtt.and_then(|rtt| Some((host, u64::try_from(rtt.as_micros()).ok()?))));
        if let Ok(Answer::Json(text)) = answer {
            told.insert(host, serde_json::from_str(&text).unwrap_or(Value::Null));
        }
    }
    let own = serde_json::from_str(&migrate::host_json(node)).unwrap_or(Value::Null);
    told.insert(node.me, own);
    let states = node
        .with_core(|core, _| {
            core.membership().members().map(|m| (m.host, m.state)).collect::<BTreeMap<_, _>>()
        })
        .await?;
    Ok(members
        .into_iter()
        .map(|m| {
            let told = told.get(&m.host).unwrap_or(&Value::Null);
            let state = if m.revoked {
                "revoked".to_owned()
            } else if m.host == node.me {
                "alive".to_owned()
            } else {
                states
                    .get(&m.host)
                    .map_or("unknown", |s| match s {
                        State::Alive => "alive",
                        State::Suspect => "suspect",
                        State::Down => "down",
                    })
                    .to_owned()
            };
            HostInfo {
                name: m.name.to_string(),
                host: m.host,
                site: m.site.to_string(),
                state,
                here: m.host == node.me,
                addresses: m.addresses.iter().map(ToString::to_string).collect(),
                vms: told["vms"].as_u64().and_then(|n| u32::try_from(n).ok()),
                memory_free_bytes: told["memory_free_bytes"].as_u64(),
                rtt_us: rtts.get(&m.host).copied(),
            }
        })
        .collect())
}

fn status(node: &Node) -> NodeStatus {
    let mut detail = BTreeMap::new();
    detail.insert("qemu".into(), json!(node.caps.version_text()));
    detail.insert("kvm".into(), json!(node.caps.kvm));
    detail.insert("memory_limit_bytes".into(), json!(node.memory_limit));
    detail.insert("memory_used_bytes".into(), json!(node.copies.used()));
    let (pages, bytes) = node.corpus.size();
    detail.insert("draining".into(), json!(node.draining.load(Ordering::SeqCst)));
    detail.insert("corpus_chunks".into(), json!(pages));
    detail.insert("corpus_index_bytes".into(), json!(bytes));
    NodeStatus {
        name: node.name.to_string(),
        host: node.me,
        site: node.site.to_string(),
        swarm: node.net.swarm(),
        store: node.hard.id(),
        version: env!("CARGO_PKG_VERSION").into(),
        wire_version: WIRE_VERSION,
        vms: u32::try_from(node.copies.all().iter().filter(|c| c.ran()).count()).unwrap_or(0),
        detail,
    }
}
