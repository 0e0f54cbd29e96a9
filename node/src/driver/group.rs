//! Where a migration takes its VMs: who moves, which hosts may take each, and what they say to it.
//!
//! Owns the questions to the hosts and the order to a cluster's lead. The choice itself is `place`'s.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::join_all;
use godwit_protocol::id::{HostId, MigrationId, Name, VmId};
use godwit_protocol::migrate::lead::Begin;
use godwit_protocol::wire::control::{Answer, Ask};
use godwit_protocol::wire::migrate::{Status, Target};
use godwit_protocol::wire::record::Record;
use godwit_protocol::wire::route::{Kind, Route};

use super::clusters;
use super::migrate::{self, Asked};
use super::node::Node;
use super::place::{Among, Room, Wish, spread};
use crate::api::types::{ApiError, Plan, Planned};
use crate::vmm::ResolvedSpec;

/// A VM that may move.
struct Mover {
    vm: VmId,
    name: Name,
    from: HostId,
    fixed: Option<HostId>,
    /// What a destination has to know of it, and its memory; or why it cannot move.
    spec: Result<(Vec<u8>, u64), String>,
}

/// Who moves and where to.
struct Placed {
    movers: Vec<Mover>,
    /// For each the hosts to try, best first; empty: it stays.
    to: Vec<Vec<HostId>>,
}

/// The members of a cluster that move, with the hosts to try, and the host that leads.
pub(super) async fn team(
    node: &Arc<Node>,
    route: &Route,
    asked: &Asked,
) -> Result<(HostId, Vec<(VmId, Vec<HostId>)>), ApiError> {
    let record = clusters::newest(node, route).await?;
    let lead = clusters::lead(&record).unwrap_or(route.host);
    let placed = place(node, route, Some(&record), asked).await?;
    let mut team = Vec::new();
    for (mover, to) in placed.movers.into_iter().zip(placed.to) {
        if to.is_empty() {
            continue;
        }
        mover.spec.map_err(|cause| ApiError::plain(format!("{}: {cause}", mover.name)))?;
        team.push((mover.vm, to));
    }
    if team.is_empty() {
        return Err(ApiError::new(
            format!("every member of {} is there already", route.name),
            format!("see godwit cluster show {}", route.name),
        ));
    }
    Ok((lead, team))
}

/// `godwit migrate --dry-run`.
pub(super) async fn plan(node: &Arc<Node>, route: &Route, asked: &Asked) -> Result<Plan, ApiError> {
    let record = match route.kind {
        Kind::Cluster => Some(clusters::newest(node, route).await?),
        _ => None,
    };
    let Placed { movers, to } = place(node, route, record.as_ref(), asked).await?;
    let mut beside: BTreeMap<HostId, u64> = BTreeMap::new();
    let mut verdicts = Vec::with_capacity(movers.len());
    for (mover, to) in movers.iter().zip(&to) {
        let memory = mover.spec.as_ref().map_or(0, |(_, memory)| *memory);
        let sum = to.first().map(|to| beside.entry(*to).or_default());
        let beside_bytes = sum.map_or(0, |sum| std::mem::replace(sum, *sum + memory));
        verdicts.push(verdict(node, &mover.spec, to.first().copied(), beside_bytes));
    }
    let verdicts = join_all(verdicts).await;
    let planned = |((mover, to), refused): ((Mover, Vec<HostId>), String)| Planned {
        vm: mover.vm,
        name: mover.name,
        from: node.host_name(mover.from),
        to: to.first().map(|to| node.host_name(*to)),
        memory_bytes: mover.spec.as_ref().map_or(0, |(_, memory)| *memory),
        refused,
    };
    let placement: Vec<Planned> = movers.into_iter().zip(to).zip(verdicts).map(planned).collect();
    let fits = placement.iter().all(|p| p.refused.is_empty());
    Ok(Plan { name: route.name.clone(), placement, fits })
}

/// Why a VM would not go there; empty: it would.
async fn verdict(
    node: &Arc<Node>,
    spec: &Result<(Vec<u8>, u64), String>,
    to: Option<HostId>,
    beside_bytes: u64,
) -> String {
    let Some(to) = to else { return String::new() };
    let spec = match spec {
        Ok((spec, _)) => spec.clone(),
        Err(cause) => return cause.clone(),
    };
    match node.ask_at(to, Ask::Fits { spec, beside_bytes }).await {
        Ok(Answer::Refused(cause)) => cause,
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

async fn place(
    node: &Arc<Node>,
    route: &Route,
    record: Option<&Record>,
    asked: &Asked,
) -> Result<Placed, ApiError> {
    let among = among(node, &asked.target).await?;
    let mut fixed: BTreeMap<VmId, HostId> = BTreeMap::new();
    for (text, host) in &asked.place {
        let vm = match record {
            Some(record) => clusters::member_of(record, text)?.vm,
            None if route.name.as_str() == text || text.parse() == Ok(route.vm) => route.vm,
            None => return Err(ApiError::plain(format!("{text} is not {}", route.name))),
        };
        fixed.insert(vm, migrate::host(node, host)?);
    }
    let members: Vec<(VmId, Name, HostId)> = match record {
        Some(r) => r.placement.iter().map(|p| (p.vm, p.name.clone(), p.host)).collect(),
        None => vec![(route.vm, route.name.clone(), route.host)],
    };
    let mut told = Vec::with_capacity(members.len());
    for (vm, _, from) in &members {
        told.push(describe(node, *from, *vm));
    }
    let told = join_all(told).await;
    let mover = |((vm, name, from), spec)| {
        let fixed = fixed.get(&vm).copied();
        Mover { vm, name, from, fixed, spec }
    };
    let movers: Vec<Mover> = members.into_iter().zip(told).map(mover).collect();
    let wishes: Vec<Wish> = movers
        .iter()
        .map(|m| Wish {
            from: m.from,
            memory: m.spec.as_ref().map_or(0, |(_, memory)| *memory),
            fixed: m.fixed,
        })
        .collect();
    let to = spread(&wishes, &among);
    Ok(Placed { movers, to })
}

/// A VM's description, and its memory, by the host that runs it or has what is left of it.
async fn describe(node: &Arc<Node>, from: HostId, vm: VmId) -> Result<(Vec<u8>, u64), String> {
    match node.ask_at(from, Ask::Describe(vm)).await {
        Ok(Answer::Description(bytes)) => {
            let spec = ResolvedSpec::decode(&bytes).map_err(|e| e.to_string())?;
            Ok((bytes, spec.memory))
        }
        Ok(Answer::Refused(cause)) => Err(cause),
        Ok(_) => Err("its host gave an answer that makes no sense".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// The hosts that a target allows and that can be asked, with what they have left. One that is drained
/// is not chosen, only taken by name.
async fn among(node: &Arc<Node>, target: &Option<Target>) -> Result<Among, ApiError> {
    let Some(target) = target else { return Ok(Among::Nobody) };
    let members = node.net.members();
    let reachable = node.reachable();
    let hosts: Vec<HostId> = match target {
        Target::Host(host) => vec![*host],
        Target::AnyOf(hosts) => hosts.clone(),
        Target::Site(site) => {
            let there = members.iter().filter(|m| m.site == *site && reachable.contains(&m.host));
            there.map(|m| m.host).collect()
        }
        Target::Auto => reachable.clone(),
    };
    let named = matches!(target, Target::Host(_) | Target::AnyOf(_));
    let mut asked = Vec::with_capacity(hosts.len());
    for host in &hosts {
        asked.push(node.ask_at(*host, Ask::Host));
    }
    let told = join_all(asked).await;
    let mut rooms = Vec::new();
    for (host, told) in hosts.into_iter().zip(told) {
        let Ok(Answer::Json(text)) = told else {
            if named {
                let name = node.host_name(host);
                return Err(ApiError::new(format!("{name} does not answer"), "see godwit hosts"));
            }
            continue;
        };
        let told: serde_json::Value = serde_json::from_str(&text).map_err(ApiError::plain)?;
        if named || told["draining"] != true {
            rooms.push(Room { host, free: told["memory_free_bytes"].as_u64().unwrap_or(0) });
        }
    }
    if rooms.is_empty() {
        return Err(ApiError::new("no connected host fits the target", "see godwit hosts"));
    }
    Ok(if *target == Target::Auto { Among::Others(rooms) } else { Among::These(rooms) })
}

/// A request as it reached a cluster's lead.
pub(super) struct Wanted {
    pub id: MigrationId,
    pub cluster: VmId,
    pub members: Vec<(VmId, Vec<HostId>)>,
    pub options: godwit_protocol::wire::migrate::Options,
    pub from: HostId,
}

/// How the migration of a cluster that this host leads begins.
pub(super) fn begin(me: HostId, record: Record, w: Wanted) -> Begin {
    let status = Status::new(w.id, w.cluster, record.name.clone(), me, w.from, &record);
    Begin { status, record, options: w.options, members: w.members }
}
