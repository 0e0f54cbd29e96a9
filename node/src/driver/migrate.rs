//! Requests to move a VM: from a name on any node to the lead that does it.
//!
//! Owns the choice of candidates and the way of a request. The lead is the host that runs the VM.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use godwit_protocol::core::Core;
use godwit_protocol::id::{HostId, MigrationId, Name, VmId};
use godwit_protocol::migrate::source::Begin;
use godwit_protocol::time::Time;
use godwit_protocol::wire::control::{Answer, Ask};
use godwit_protocol::wire::migrate::{MemberStatus, Options, Phase, Status, Target, of_member};
use godwit_protocol::wire::route::{Kind, Route};
use serde_json::json;
use tokio::sync::{broadcast, mpsc};

use super::node::{Node, random};
use super::{boot, group, off, timeline};
use crate::api::types::{ApiError, Done, Event, Migration};
use crate::vmm::ResolvedSpec;

/// A request as it reached the lead.
pub(super) struct Wanted {
    pub id: MigrationId,
    pub vm: VmId,
    pub target: Target,
    pub options: Options,
    pub from: HostId,
}

/// How long the end of a VM's last move may be waited for.
const SETTLE: Duration = Duration::from_secs(3);

/// How often the lead is asked for the figures of a move that has ended, and the pause between.
const FIGURES_TRIES: u32 = 10;
const FIGURES_AGAIN: Duration = Duration::from_millis(100);

/// How often a watcher asks the lead, should its word not come by itself.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// Starts a migration of a VM that runs here.
pub(super) fn lead(node: &Arc<Node>, core: &mut Core, now: Time, w: Wanted) -> Result<(), String> {
    let record = core.record_of(w.vm).cloned().ok_or("this host holds no record of the VM")?;
    let (copy, spec) = match node.copies.running(w.vm) {
        Some(copy) => (copy.id, copy.described()),
        None => off::read(node, &record, w.vm)?,
    };
    let (name, memory) = (&spec.name.clone(), spec.memory);
    let spec = described(node, spec)?;
    let others: Vec<_> = node
        .net
        .members()
        .into_iter()
        .filter(|m| {
            m.host != node.me && !m.revoked && (m.connected || w.target == Target::Host(m.host))
        })
        .collect();
    let candidates: Vec<HostId> = match &w.target {
        Target::Host(host) if *host == node.me => {
            return Err(format!("{name} runs on {} already", node.name));
        }
        Target::Host(host) => vec![*host],
        Target::Site(site) => others.iter().filter(|m| m.site == *site).map(|m| m.host).collect(),
        Target::Auto => others.iter().map(|m| m.host).collect(),
        Target::AnyOf(hosts) if hosts.contains(&node.me) => {
            return Err(format!("{name} runs on {} already", node.name));
        }
        Target::AnyOf(hosts) => hosts.clone(),
    };
    if candidates.is_empty() {
        return Err("no connected host fits the target: see godwit hosts".into());
    }
    let mut status = Status::new(w.id, w.vm, name.clone(), node.me, w.from, &record);
    status.ram_bytes = memory;
    let begin = Begin { status, record, copy, spec, options: w.options, candidates };
    core.request(now, begin)
}

/// What a destination has to know of a VM that can move, with what its disks take by now: they were
/// empty when it was made.
fn described(node: &Node, mut spec: ResolvedSpec) -> Result<Vec<u8>, String> {
    spec.check_movable().map_err(|e| e.to_string())?;
    node.caps.check_migration().map_err(|e| e.to_string())?;
    for disk in spec.disks.iter_mut().filter(|disk| disk.moves()) {
        if let Err(error) = disk.measure() {
            tracing::warn!(disk = disk.id, %error, "an image cannot be measured");
        }
    }
    spec.encode().map_err(|e| e.to_string())
}

/// What a destination has to know of a VM that runs here or is off, and its memory, bytes.
pub(super) async fn describe(node: &Arc<Node>, vm: VmId) -> Result<(Vec<u8>, u64), String> {
    let spec = match node.copies.running(vm) {
        Some(copy) => copy.described(),
        None => off::kept(node, vm).await?.1,
    };
    let (node, memory) = (Arc::clone(node), spec.memory);
    let described = tokio::task::spawn_blocking(move || described(&node, spec)).await;
    Ok((described.map_err(|e| e.to_string())??, memory))
}

/// What this node tells others of itself.
pub(super) fn host_json(node: &Node) -> String {
    json!({
        "vms": node.copies.all().iter().filter(|c| c.ran()).count(),
        "memory_free_bytes": node.memory_limit.saturating_sub(node.copies.used()),
        "draining": node.draining.load(Ordering::SeqCst),
    })
    .to_string()
}

/// `HOST`, `HOST,HOST`, `site:S` or `auto`; none: nothing.
pub(super) fn target(node: &Node, text: &str) -> Result<Option<Target>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    if text.contains(',') {
        let hosts = text.split(',').map(|text| host(node, text)).collect::<Result<_, _>>()?;
        return Ok(Some(Target::AnyOf(hosts)));
    }
    if text == "auto" {
        return Ok(Some(Target::Auto));
    }
    if let Some(site) = text.strip_prefix("site:") {
        let site: Name = site.parse().map_err(ApiError::plain)?;
        if node.net.members().iter().any(|m| m.site == site) {
            return Ok(Some(Target::Site(site)));
        }
        return Err(ApiError::new(format!("no host is at site {site}"), "see godwit hosts"));
    }
    Ok(Some(Target::Host(host(node, text)?)))
}

/// A member by name or id.
pub(super) fn host(node: &Node, text: &str) -> Result<HostId, ApiError> {
    let members = node.net.members();
    let found = match text.parse::<HostId>() {
        Ok(id) => members.iter().find(|m| m.host == id),
        Err(_) => members.iter().find(|m| m.name.as_str() == text),
    };
    found.map(|m| m.host).ok_or_else(|| {
        ApiError::new(format!("no host is called {text}"), "see godwit hosts for those there are")
    })
}

/// What `godwit migrate` asks for.
pub(super) struct Asked {
    pub vm: String,
    pub target: Option<Target>,
    pub place: BTreeMap<String, String>,
    pub wait: bool,
    pub options: Options,
    pub id: Option<MigrationId>,
}

/// `godwit migrate`.
pub(super) async fn migrate(
    node: &Arc<Node>,
    asked: Asked,
    events: mpsc::Sender<Event>,
) -> Result<Migration, ApiError> {
    let route = boot::find(node, &asked.vm).await?;
    let id = match asked.id {
        Some(id) => id,
        None => MigrationId(random()?),
    };
    // Heard from before the request is sent, so that no word of it is missed.
    let mut heard = node.statuses.subscribe();
    let (vm, options) = (route.vm, asked.options);
    let (lead, ask) = match route.kind {
        Kind::Cluster => {
            let (lead, members) = group::team(node, &route, &asked).await?;
            (lead, Ask::MigrateCluster { id, cluster: vm, members, options })
        }
        Kind::Vm | Kind::Port | Kind::Wire | Kind::SealedWire | Kind::Uplink { .. } => {
            let target = alone(node, &route, &asked)?;
            (route.host, Ask::Migrate { id, vm, target, options })
        }
    };
    match node.ask_at(lead, ask).await? {
        Answer::Done => {}
        Answer::Refused(cause) => return Err(ApiError::plain(cause)),
        _ => return Err(ApiError::plain("the lead gave an answer that makes no sense")),
    }
    let named = |status: Status| Migration::new(status, |h| node.host_name(h));
    let mut shown = None;
    loop {
        let status = next(node, &mut heard, id, lead).await?;
        if let Some(status) = status {
            let status = forward(&mut shown, status);
            let end = status.phase.is_end();
            if end {
                return Ok(named(with_figures(node, lead, &mut shown, status).await));
            }
            if !asked.wait {
                return Ok(named(status));
            }
            // Progress that a slow client does not take is dropped.
            let _ = events.try_send(Event::Progress(Box::new(named(status))));
        }
        if asked.wait && events.is_closed() {
            return Err(ApiError::plain("the client has gone; the migration goes on"));
        }
    }
}

/// Where a VM that is asked for by its own name goes.
fn alone(node: &Node, route: &Route, asked: &Asked) -> Result<Target, ApiError> {
    let placed = match asked.place.iter().next() {
        Some((text, to)) if asked.place.len() == 1 && *text == route.name.as_str() => Some(to),
        Some((text, _)) => {
            let hint = "--place is for the members of a cluster";
            return Err(ApiError::new(format!("{text} is not {}", route.name), hint));
        }
        None => None,
    };
    match (placed, &asked.target) {
        (Some(to), _) => host(node, to).map(Target::Host),
        (None, Some(target)) => Ok(target.clone()),
        (None, None) => Err(ApiError::new("no host is named", "write --to HOST, site:S or auto")),
    }
}

/// A copy that runs already waits for the source's last word: a moment later it may move again.
pub(super) async fn settled(node: &Arc<Node>, vm: VmId) {
    let mut heard = node.statuses.subscribe();
    let wait = async {
        while node.with_core(move |core, _| core.is_releasing(vm)).await.unwrap_or(false) {
            // What is missed because others talk too much is asked for again.
            if let Err(broadcast::error::RecvError::Closed) = heard.recv().await {
                return;
            }
        }
    };
    // If the word does not come, the request is refused as one for a VM that moves.
    let _ = tokio::time::timeout(SETTLE, wait).await;
}

/// The destination may be the first to tell the end; when the guest was stopped, and what crossed,
/// is the lead's to tell, a moment later.
async fn with_figures(
    node: &Arc<Node>,
    lead: HostId,
    shown: &mut Option<Status>,
    mut status: Status,
) -> Status {
    for _ in 0..FIGURES_TRIES {
        if status.phase != Phase::Moved || status.downtime_us.is_some() || lead == node.me {
            break;
        }
        if let Ok(Answer::Migrations(told)) = node.ask(lead, Ask::Migrations(Some(status.id))).await
            && let Some(told) = told.into_iter().find(|told| told.id == status.id)
        {
            status = forward(shown, told);
        }
        // The lead has not heard yet that the guest runs: its round trip is all there is to wait for.
        tokio::time::sleep(FIGURES_AGAIN).await;
    }
    status
}

/// Both ends tell what they know: figures never shrink, and a phase that is over does not come back.
fn forward(shown: &mut Option<Status>, mut status: Status) -> Status {
    if let Some(last) = shown.as_ref() {
        if order(status.phase) < order(last.phase) {
            status.phase = last.phase;
        }
        status.done_ppm = status.done_ppm.max(last.done_ppm);
        status.bulk_bytes = status.bulk_bytes.max(last.bulk_bytes);
        status.ram_bytes = status.ram_bytes.max(last.ram_bytes);
        status.ram_nonzero_bytes = status.ram_nonzero_bytes.max(last.ram_nonzero_bytes);
        status.chunks_zero = status.chunks_zero.max(last.chunks_zero);
        status.chunks_known = status.chunks_known.max(last.chunks_known);
        status.chunks_literal = status.chunks_literal.max(last.chunks_literal);
        status.total_ms = status.total_ms.max(last.total_ms);
        status.downtime_us = status.downtime_us.or(last.downtime_us);
    }
    *shown = Some(status.clone());
    status
}

fn order(phase: Phase) -> u8 {
    match phase {
        // A host that refused is followed by the next.
        Phase::Preparing | Phase::Transfer => 0,
        Phase::Stopped => 1,
        Phase::Deciding => 2,
        Phase::Starting => 3,
        Phase::Releasing => 4,
        Phase::Moved | Phase::Stayed | Phase::Lost => 5,
    }
}

/// The next word on a migration, or none after a while (then the lead is asked).
async fn next(
    node: &Arc<Node>,
    heard: &mut broadcast::Receiver<Status>,
    id: MigrationId,
    lead: HostId,
) -> Result<Option<Status>, ApiError> {
    let wait = async {
        loop {
            match heard.recv().await {
                Ok(status) if status.id == id => return Ok(status),
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => {
                    return Err(ApiError::plain("the daemon is stopping"));
                }
            }
        }
    };
    match tokio::time::timeout(ASK_AGAIN, wait).await {
        Ok(status) => status.map(Some),
        Err(_) => Ok(newest(node, id, lead).await),
    }
}

/// What this node or the lead knows now.
async fn newest(node: &Arc<Node>, id: MigrationId, lead: HostId) -> Option<Status> {
    let known = node
        .with_core(move |core, _| core.statuses().find(|s| s.id == id).cloned())
        .await
        .ok()
        .flatten();
    let over = |s: &Status| s.phase.is_end() && s.phase != Phase::Lost;
    if lead == node.me || known.as_ref().is_some_and(over) {
        return known;
    }
    match node.ask(lead, Ask::Migrations(Some(id))).await {
        Ok(Answer::Migrations(statuses)) => {
            let found = statuses.into_iter().find(|s| s.id == id)?;
            let note = found.clone();
            // Kept for later questions.
            let _ = node.with_core(move |core, _| core.heard(note)).await;
            Some(found)
        }
        _ => known,
    }
}

/// `godwit migrations`, oldest first: what this node knows, and what the others know better.
pub(super) async fn list(
    node: &Arc<Node>,
    id: Option<MigrationId>,
) -> Result<Vec<Migration>, ApiError> {
    let own: Vec<Status> = node
        .with_core(move |core, _| {
            core.statuses().filter(|s| id.is_none_or(|id| is_of(s, id))).cloned().collect()
        })
        .await?;
    let own = own.into_iter().map(|s| (s.id, node.with_timeline(s, id.is_some())));
    let mut found: BTreeMap<MigrationId, Status> = own.collect();
    let others: Vec<HostId> = node
        .net
        .members()
        .iter()
        .filter(|m| m.connected && m.host != node.me)
        .map(|m| m.host)
        .collect();
    let answers =
        futures::future::join_all(others.iter().map(|h| node.ask(*h, Ask::Migrations(id)))).await;
    for (host, answer) in others.iter().zip(answers) {
        let Ok(Answer::Migrations(statuses)) = answer else { continue };
        for status in statuses {
            merge(&mut found, status, *host);
        }
    }
    add_members(&mut found);
    found.retain(|known, _| id.is_none_or(|id| id == *known));
    if let Some(id) = id.filter(|_| found.is_empty()) {
        return Err(ApiError::new(
            format!("no migration {id} is known to the hosts that answer"),
            "see godwit migrations",
        ));
    }
    let mut found: Vec<Status> = found.into_values().collect();
    // A member's is a part of its cluster's; who asks for it by its id sees it.
    found.retain(|s| id.is_some() || s.cluster == s.vm);
    found.sort_by_key(|s| s.timeline.first().map_or(0, |m| m.at_us));
    Ok(found.into_iter().map(|s| Migration::new(s, |h| node.host_name(h))).collect())
}

/// Whether it is this migration, or that of a member of its cluster.
pub(super) fn is_of(status: &Status, id: MigrationId) -> bool {
    status.id == id || of_member(status.id, status.vm) == id
}

/// What waited and was dropped at the members' hosts is the cluster's.
fn add_members(found: &mut std::collections::BTreeMap<MigrationId, Status>) {
    let clusters: Vec<Status> = found.values().filter(|s| !s.members.is_empty()).cloned().collect();
    for mut cluster in clusters {
        let member = |m: &MemberStatus| found.get(&of_member(cluster.id, m.vm));
        let members: Vec<&Status> = cluster.members.iter().filter_map(member).collect();
        cluster.frames_held = members.iter().map(|s| s.frames_held).sum();
        cluster.frames_dropped = members.iter().map(|s| s.frames_dropped).sum();
        found.insert(cluster.id, cluster);
    }
}

/// Joins two ends' knowledge: the timelines of both, the state of the source unless only the other
/// has seen the end.
fn merge(found: &mut BTreeMap<MigrationId, Status>, status: Status, told_by: HostId) {
    let Some(known) = found.get_mut(&status.id) else {
        found.insert(status.id, status);
        return;
    };
    let mut timeline = known.timeline.clone();
    timeline::join(&mut timeline, &status.timeline);
    let held = known.frames_held.max(status.frames_held);
    let dropped = known.frames_dropped.max(status.frames_dropped);
    let lead_says = told_by == status.from && (status.phase.is_end() || !known.phase.is_end());
    let end =
        status.phase.is_end() && !(told_by != status.from && status.is_for_the_source_to_tell());
    let better = known.is_blind_to(&status) || lead_says || (end && !known.phase.is_end());
    if better && !status.is_blind_to(known) {
        *known = status;
    }
    known.timeline = timeline;
    (known.frames_held, known.frames_dropped) = (held, dropped);
}

/// `godwit abort`.
pub(super) async fn abort(node: &Arc<Node>, id: MigrationId) -> Result<Done, ApiError> {
    let known = list(node, Some(id)).await?;
    let lead = known.first().map_or(node.me, |m| m.status.from);
    if lead == node.me {
        node.with_core(move |core, now| core.abort(now, id)).await?.map_err(ApiError::plain)?;
    } else {
        if let Answer::Refused(cause) = node.ask(lead, Ask::Abort(id)).await? {
            return Err(ApiError::plain(cause));
        }
    }
    Ok(Done { done: format!("migration {id} is given up; the VM runs on where it was") })
}
