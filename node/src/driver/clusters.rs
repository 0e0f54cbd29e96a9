//! Virtual clusters for people: made, changed, shown, and forced when their voters are lost.
//!
//! Owns the way from a name on any node to the hosts that do each step, and the waiting until a record
//! shows it. Decides nothing: each step is one the core knows, and can be asked for again.

use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::id::{HostId, Name, VmId};
use godwit_protocol::limits::CLUSTER_VMS;
use godwit_protocol::route::NameError;
use godwit_protocol::wire::control::{Answer, Ask};
use godwit_protocol::wire::record::{Cause, Placement, Record};
use godwit_protocol::wire::route::{Kind, Route};
use tokio::time::Instant;

use super::boot;
use super::node::{Node, random, wall_us};
use crate::api::types::{ApiError, ClusterInfo, Done, MemberInfo};

/// How long one step may take until a record shows it: several decrees over a slow path, and a change of
/// voters or the end of a move before them.
const STEP: Duration = Duration::from_secs(30);
/// How often a record is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(100);
/// After this long the step is asked for again: the first word may have come to nothing.
const AGAIN: Duration = Duration::from_secs(2);

/// The route of a cluster, by name or id.
pub(super) async fn find(node: &Arc<Node>, text: &str) -> Result<Route, ApiError> {
    let none = || ApiError::new(format!("no cluster is called {text}"), "see godwit cluster list");
    let wanted = text.to_owned();
    let found = node.with_core(move |core, _| core.routes().by_name(&wanted).cloned()).await?;
    match found {
        Ok(route) if route.kind == Kind::Cluster => Ok(route),
        Ok(_) | Err(NameError::Unknown(_)) => Err(none()),
        Err(error) => Err(ApiError::plain(error)),
    }
}

/// The newest record of a cluster or VM that a host knows.
pub(super) async fn record_at(
    node: &Arc<Node>,
    host: HostId,
    id: VmId,
) -> Result<Option<Record>, ApiError> {
    match node.ask_at(host, Ask::Record(id)).await? {
        Answer::Record(record) => Ok(record.map(|r| *r)),
        _ => Err(ApiError::plain("a host gave an answer that makes no sense")),
    }
}

/// The newest record that this host and the one that leads know; of all hosts that answer, if that one
/// does not.
pub(super) async fn newest(node: &Arc<Node>, route: &Route) -> Result<Record, ApiError> {
    let own = record_at(node, node.me, route.vm).await?;
    let all = match record_at(node, route.host, route.vm).await {
        Ok(found) => vec![own, found],
        Err(_) => {
            let told = told_by_all(node, route.vm).await.into_iter();
            told.map(|(_, record)| Some(record)).chain([own]).collect()
        }
    };
    all.into_iter().flatten().max_by_key(|r| r.epoch).ok_or_else(|| {
        ApiError::new(
            format!("no host that answers knows the record of {}", route.name),
            "see godwit hosts: its voters have it",
        )
    })
}

/// What every host that can be asked knows of a record.
async fn told_by_all(node: &Arc<Node>, id: VmId) -> Vec<(HostId, Record)> {
    let hosts = node.reachable();
    let mut asked = Vec::with_capacity(hosts.len());
    for host in &hosts {
        asked.push(record_at(node, *host, id));
    }
    let told = futures::future::join_all(asked).await.into_iter();
    hosts.iter().zip(told).filter_map(|(host, r)| Some((*host, r.ok().flatten()?))).collect()
}

/// The host that leads a cluster.
pub(super) fn lead(record: &Record) -> Option<HostId> {
    let first = record.placement.first().map(|p| p.host);
    first.or_else(|| record.voters.first().map(|v| v.host))
}

/// Whether a refusal passes by itself.
pub(super) fn passes(cause: &str) -> bool {
    cause.ends_with("ask again")
}

/// Asks for a step until a record shows that it is done.
async fn insist<F: Future<Output = Result<bool, ApiError>>>(
    node: &Arc<Node>,
    (host, ask): (HostId, Ask),
    seen: impl Fn() -> F,
) -> Result<(), ApiError> {
    let until = Instant::now() + STEP;
    let mut last = ApiError::plain("no record shows it yet");
    loop {
        match node.ask_at(host, ask.clone()).await {
            Ok(Answer::Refused(cause)) if !passes(&cause) => return Err(ApiError::plain(cause)),
            Ok(Answer::Refused(cause)) => last = ApiError::plain(cause),
            Ok(_) => {}
            Err(error) => last = error,
        }
        let again = Instant::now() + AGAIN;
        while Instant::now() < again {
            match seen().await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => last = error,
            }
            if Instant::now() > until {
                let cause = format!("not within {} s: {}", STEP.as_secs(), last.message);
                return Err(ApiError::new(cause, "what was begun goes on; it can be asked again"));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// `godwit cluster create`: what an earlier try left half done is finished.
pub(super) async fn create(
    node: &Arc<Node>,
    name: Name,
    vms: &[String],
    id: Option<VmId>,
) -> Result<ClusterInfo, ApiError> {
    if vms.is_empty() || vms.len() > CLUSTER_VMS {
        return Err(ApiError::plain(format!("a cluster is made of 1 to {CLUSTER_VMS} VMs")));
    }
    let mut members: Vec<Route> = Vec::with_capacity(vms.len());
    for vm in vms {
        let route = boot::find_vm(node, vm).await?;
        if members.iter().any(|m| m.vm == route.vm) {
            return Err(ApiError::plain(format!("{vm} is named twice")));
        }
        members.push(route);
    }
    let (text, wanted) = (name.to_string(), members.iter().map(|m| m.vm).collect::<Vec<_>>());
    let found = node.with_core(move |core, _| core.routes().by_name(&text).cloned()).await?;
    let cluster = match found {
        Ok(route) => {
            let known =
                if route.kind == Kind::Cluster { newest(node, &route).await.ok() } else { None };
            let mine = |p: &Placement| wanted.contains(&p.vm);
            if known.is_none_or(|r| !r.placement.iter().all(mine)) {
                return Err(ApiError::new(
                    format!("the swarm has something else called {name} already"),
                    "choose another name, or godwit cluster add",
                ));
            }
            route.vm
        }
        Err(_) => VmId(id.map_or_else(random, |id| Ok(id.0))?),
    };
    for member in &members {
        let record = record_at(node, member.host, member.vm).await?;
        if let Some(other) = record.filter(|r| !r.is_lone() && r.cluster != cluster) {
            return Err(ApiError::new(
                format!("{} belongs to {}", member.name, other.name),
                format!(
                    "remove it there first: godwit cluster remove {} {}",
                    other.name, member.name
                ),
            ));
        }
    }
    let label = name.clone();
    // Refused only if an earlier try made it.
    node.with_core(move |core, now| drop(core.create_cluster(now, cluster, label))).await?;
    for member in &members {
        join(node, cluster, member.vm).await.map_err(|e| {
            let again = format!("finish it: godwit cluster create {name} --vms {}", vms.join(","));
            ApiError::new(format!("{} has not joined {name}: {e}", member.name), again)
        })?;
    }
    show(node, name.as_str()).await
}

/// `godwit cluster add`.
pub(super) async fn add(
    node: &Arc<Node>,
    cluster: &str,
    vm: &str,
) -> Result<ClusterInfo, ApiError> {
    let route = find(node, cluster).await?;
    let member = boot::find_vm(node, vm).await?;
    join(node, route.vm, member.vm).await?;
    show(node, cluster).await
}

/// Has a VM's host let it join, until the cluster's record names it there.
async fn join(node: &Arc<Node>, cluster: VmId, vm: VmId) -> Result<(), ApiError> {
    let cluster_route = node.with_core(move |core, _| core.routes().get(cluster).cloned()).await?;
    let record = match cluster_route {
        Some(route) => newest(node, &route).await?,
        None => record_at(node, node.me, cluster)
            .await?
            .ok_or_else(|| ApiError::plain("the cluster is not known here any more"))?,
    };
    let member = boot::find_vm(node, &vm.to_string()).await?;
    let ask = Ask::Join { vm, cluster: Box::new(record) };
    insist(node, (member.host, ask), || async {
        let known = record_at(node, member.host, vm).await?;
        Ok(known.is_some_and(|r| r.cluster == cluster && r.placement_of(vm).is_some()))
    })
    .await
}

/// `godwit cluster remove`.
pub(super) async fn remove(
    node: &Arc<Node>,
    cluster: &str,
    vm: &str,
) -> Result<ClusterInfo, ApiError> {
    let route = find(node, cluster).await?;
    let record = newest(node, &route).await?;
    let member = member_of(&record, vm)?.clone();
    let (id, lead) = (route.vm, lead(&record).unwrap_or(route.host));
    let ask = Ask::Release { cluster: id, vms: vec![member.vm] };
    insist(node, (lead, ask), || async {
        let known = record_at(node, lead, id).await?;
        Ok(known.is_some_and(|r| r.placement_of(member.vm).is_none()))
    })
    .await?;
    show(node, cluster).await
}

/// `godwit cluster delete`.
pub(super) async fn delete(node: &Arc<Node>, cluster: &str) -> Result<Done, ApiError> {
    let route = find(node, cluster).await?;
    let record = newest(node, &route).await?;
    let (id, lead) = (route.vm, lead(&record).unwrap_or(route.host));
    insist(node, (lead, Ask::Dissolve(id)), || async {
        Ok(record_at(node, lead, id).await?.is_some_and(|r| r.is_closed()))
    })
    .await?;
    Ok(Done { done: format!("{cluster} is deleted; its members run on by themselves") })
}

/// A member by name or id.
pub(super) fn member_of<'a>(record: &'a Record, text: &str) -> Result<&'a Placement, ApiError> {
    let is = |p: &&Placement| p.name.as_str() == text || text.parse() == Ok(p.vm);
    record.placement.iter().find(is).ok_or_else(|| {
        let hint = format!("see godwit cluster show {}", record.name);
        ApiError::new(format!("{text} is no member of {}", record.name), hint)
    })
}

/// `godwit cluster list`.
pub(super) async fn list(node: &Arc<Node>) -> Result<Vec<ClusterInfo>, ApiError> {
    let routes = node
        .with_core(|core, _| {
            let shown = |r: &&Route| !r.gone && r.kind == Kind::Cluster;
            core.routes().iter().filter(shown).cloned().collect::<Vec<_>>()
        })
        .await?;
    let mut asked = Vec::with_capacity(routes.len());
    for route in &routes {
        asked.push(newest(node, route));
    }
    let records = futures::future::join_all(asked).await;
    Ok(records.into_iter().flatten().map(|r| info(node, &r)).collect())
}

/// `godwit cluster show`.
pub(super) async fn show(node: &Arc<Node>, cluster: &str) -> Result<ClusterInfo, ApiError> {
    let route = find(node, cluster).await?;
    Ok(info(node, &newest(node, &route).await?))
}

fn info(node: &Node, record: &Record) -> ClusterInfo {
    let members = record.placement.iter().map(|p| MemberInfo {
        name: p.name.clone(),
        vm: p.vm,
        host: node.host_name(p.host),
        copy: p.copy,
        off: p.off,
    });
    ClusterInfo {
        name: record.name.clone(),
        cluster: record.cluster,
        epoch: record.epoch,
        lead: lead(record).map_or_else(String::new, |host| node.host_name(host)),
        voters: record.voters.iter().map(|v| node.host_name(v.host)).collect(),
        cause: in_words(record),
        members: members.collect(),
    }
}

/// What brought a record about.
fn in_words(record: &Record) -> String {
    let names = |all: &[Placement]| {
        all.iter().map(|p| p.name.as_str().to_owned()).collect::<Vec<_>>().join(", ")
    };
    match &record.cause {
        Cause::Create => "made".into(),
        Cause::Move(_) => "moved".into(),
        Cause::Stay(why) => format!("stayed: {why}"),
        Cause::Voters => "its voters changed".into(),
        Cause::Wires(vm) => match record.placement_of(*vm) {
            Some(placed) => format!("NICs of {} changed", placed.name),
            None => "NICs changed".into(),
        },
        Cause::Add { vm, .. } => match record.placement_of(*vm) {
            Some(placed) => format!("{} joined", placed.name),
            None => "a VM joined".into(),
        },
        Cause::Release { members, ended: false } => format!("{} left", names(members)),
        Cause::Release { members, ended: true } => format!("{} ended", names(members)),
        Cause::Dissolve(_) | Cause::Delete => "deleted".into(),
        Cause::Joined(_) => "joining a cluster".into(),
        Cause::Left(_) => "left a cluster".into(),
        Cause::Force(why) => format!("forced: {why}"),
        Cause::On(vm) => match record.placement_of(*vm) {
            Some(placed) => format!("{} was switched on", placed.name),
            None => "a VM was switched on".into(),
        },
        Cause::Off(release) => match record.placement_of(release.vm) {
            Some(placed) => format!("{} is off", placed.name),
            None => "a VM is off".into(),
        },
    }
}

/// `godwit cluster force`: refused while the voters can decide; written from the newest record that any
/// host knows.
pub(super) async fn force(
    node: &Arc<Node>,
    text: &str,
    by: &str,
    why: &str,
) -> Result<ClusterInfo, ApiError> {
    let route = boot::find(node, text).await?;
    let told = told_by_all(node, route.vm).await;
    let newest = told.iter().map(|(_, r)| r).max_by_key(|r| r.epoch).cloned();
    let record = newest.ok_or_else(|| {
        let hint = "ask on a host that ran or voted on one of its VMs";
        ApiError::new(format!("no host that answers knows the record of {text}"), hint)
    })?;
    if record.cluster != route.vm {
        let hint = format!("godwit cluster force {}", record.name);
        return Err(ApiError::new(format!("{text} belongs to {}", record.name), hint));
    }
    let answers = |host: HostId| told.iter().any(|(h, _)| *h == host);
    let alive = record.voters.iter().filter(|v| answers(v.host)).count();
    if alive >= record.majority() {
        return Err(ApiError::new(
            format!("{alive} of its {} voters answer: they can decide", record.voters.len()),
            "nothing is to be forced; see godwit cluster show",
        ));
    }
    let at_s = wall_us() / 1_000_000;
    let audit = format!("by {by} on {} at {at_s} (seconds since 1970): {why}", node.name);
    tracing::warn!(name = %record.name, epoch = %record.epoch, audit, "a record is forced");
    let forced = node
        .with_core(move |core, now| {
            core.learned(now, record.clone());
            core.force(now, record.cluster, audit)
        })
        .await?
        .map_err(ApiError::plain)?;
    Ok(info(node, &forced))
}
