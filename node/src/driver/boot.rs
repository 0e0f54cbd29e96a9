//! Starting, stopping and showing the VMs of this host.
//!
//! Owns the way from a specification to a guest that runs: a QEMU that waits, a first record on the
//! disk, then `cont`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::core::Core;
use godwit_protocol::id::{CopyId, Epoch, Mac, VmId};
use godwit_protocol::wire::record::Record;
use godwit_protocol::wire::route::{Kind, Route};
use godwit_protocol::wire::wiring::Wiring;
use serde_json::json;
use tokio::time::Instant;

use super::copies::{Copy, wired};
use super::node::{Input, Node, random};
use super::{images, nics, off, wires, worker};
use crate::api::types::{ApiError, Console, Done, VmInfo};
use crate::vmm::{
    self, GuestMemory, Mode, Qemu, Resolution, ResolvedDisk, ResolvedSpec, StartParams, VmSpec,
    probe::MemoryBudget,
};

/// How long a guest may take to power down before the user is told.
const POWERDOWN: Duration = Duration::from_secs(60);
/// How long the record of a VM that has ended may take to say so, and how often it is looked at.
const ENDED: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(200);

pub(super) fn budget(node: &Node) -> MemoryBudget {
    MemoryBudget { limit: node.memory_limit, used: node.copies.used() }
}

/// Makes memory, taps and a QEMU that waits, and puts the copy into the table.
pub(super) async fn start_copy(
    node: &Arc<Node>,
    spec: &ResolvedSpec,
    id: CopyId,
    mode: Mode,
) -> Result<Arc<Copy>, ApiError> {
    node.copies.promise(id, spec.memory);
    let bytes = spec.memory;
    let made = async {
        let memory = tokio::task::spawn_blocking(move || GuestMemory::create(bytes))
            .await
            .map_err(ApiError::plain)?
            .map_err(ApiError::plain)?;
        start_qemu(node, spec, id, mode, Arc::new(memory)).await
    };
    let qemu = match made.await {
        Ok(qemu) => qemu,
        Err(error) => {
            node.copies.remove(id);
            if mode.keeps_directory() {
                return Err(error); // The description in it is all that is known of the VM.
            }
            let _ = tokio::fs::remove_dir_all(node.dir_of(id)).await;
            return Err(error);
        }
    };
    let copy = Arc::new(Copy::new(qemu, false));
    node.copies.insert(Arc::clone(&copy));
    watch(node, &copy);
    Ok(copy)
}

/// Starts a QEMU on memory that exists.
pub(super) async fn start_qemu(
    node: &Arc<Node>,
    spec: &ResolvedSpec,
    id: CopyId,
    mode: Mode,
    memory: Arc<GuestMemory>,
) -> Result<Qemu, ApiError> {
    let taps: Vec<OwnedFd> = wires::open_taps(node, spec).await?;
    let params = StartParams {
        spec: spec.clone(),
        copy: id,
        dir: node.dir_of(id),
        memory,
        taps,
        mode,
        qemu: node.options.qemu.clone(),
    };
    Qemu::start(params).await.map_err(ApiError::plain)
}

/// Tells the engine when the copy's QEMU ends.
pub(super) fn watch(node: &Arc<Node>, copy: &Arc<Copy>) {
    let (inputs, qemu, id) = (node.inputs.clone(), copy.qemu(), copy.id);
    tokio::spawn(async move {
        qemu.exited().await;
        // Fails only when the engine has ended.
        let _ = inputs.send(Input::Gone(id)).await;
    });
}

/// `godwit vm run`.
pub(super) async fn run(node: &Arc<Node>, text: &str) -> Result<VmInfo, ApiError> {
    let spec: VmSpec = text.parse().map_err(ApiError::plain)?;
    node.takes_vms().map_err(ApiError::plain)?;
    let name = spec.name.clone();
    let taken = node.with_core(move |core, _| core.routes().by_name(&name).is_ok()).await?;
    if taken {
        return Err(ApiError::new(
            format!("the swarm has a VM or a cluster called {} already", spec.name),
            "choose another name, or stop that one: godwit vm stop",
        ));
    }
    let wish =
        if spec.accel == crate::vmm::AccelChoice::Auto { node.options.accel } else { spec.accel };
    let mut macs = Vec::new();
    for _ in &spec.nic {
        let r: [u8; 3] = random()?;
        macs.push(Mac([0x52, 0x54, 0x00, r[0], r[1], r[2]]));
    }
    let with = Resolution {
        id: VmId(random()?),
        machine: node.caps.newest_machine().map_err(ApiError::plain)?.to_owned(),
        accel: node.caps.choose_accel(wish).map_err(ApiError::plain)?,
        mtu: node.links.mtu(),
        macs,
    };
    let images = Arc::clone(&node.images);
    let resolve = move || {
        let digest = |path: &Path| images.digest_of(path).map_err(std::io::Error::other);
        ResolvedSpec::resolve_with(&spec, with, &digest)
    };
    let resolved = tokio::task::spawn_blocking(resolve)
        .await
        .map_err(ApiError::plain)?
        .map_err(ApiError::plain)?;
    node.caps.check_runs(&resolved, budget(node)).await.map_err(ApiError::plain)?;
    let copy = start_copy(node, &resolved, CopyId(random()?), Mode::Boot).await?;
    let started = start_guest(node, &copy).await;
    if let Err(error) = started {
        worker::discard(node, copy.id).await;
        return Err(error);
    }
    show(node, resolved.name.as_str()).await
}

async fn start_guest(node: &Arc<Node>, copy: &Arc<Copy>) -> Result<(), ApiError> {
    let (vm, name, id) = (copy.vm(), copy.spec.name.clone(), copy.id);
    let nics = nics::wiring(&copy.spec);
    node.with_core(move |core, now| core.create(now, vm, name, id, nics))
        .await?
        .map_err(ApiError::plain)?;
    let_run(node, copy).await
}

/// A decided record names this copy, which never ran.
pub(super) async fn let_run(node: &Arc<Node>, copy: &Arc<Copy>) -> Result<(), ApiError> {
    // As that record says now, not when the copy was described.
    nics::follow_record(node, copy).await?;
    copy.will_run();
    copy.qemu().cont().await.map_err(ApiError::plain)?;
    wires::runs_here(node, copy).await;
    images::attach(node, copy);
    Ok(())
}

/// The route that tells others that this copy runs here, by that record: one epoch has one route.
pub(super) fn route(node: &Node, copy: &Copy, record: Option<&Record>) -> Route {
    let (mut spec, vm) = (copy.described(), copy.vm());
    if let Some(placed) = record.and_then(|r| r.placement_of(vm)) {
        nics::by_record(&mut spec.nics, &placed.nics);
    }
    let epoch = record.map(|r| r.epoch).unwrap_or_default();
    route_of(node, &spec, copy.id, epoch)
}

/// The same, of a copy that need not run.
pub(super) fn route_of(node: &Node, spec: &ResolvedSpec, copy: CopyId, epoch: Epoch) -> Route {
    Route {
        vm: spec.id,
        name: spec.name.clone(),
        host: node.me,
        copy,
        epoch,
        nics: wired(&spec.nics),
        kind: Kind::Vm,
        gone: false,
    }
}

/// Finds a VM by name or id in the routing table.
pub(super) async fn find(node: &Arc<Node>, vm: &str) -> Result<Route, ApiError> {
    let wanted = vm.to_owned();
    let found = node.with_core(move |core, _| core.routes().by_name(&wanted).cloned()).await?;
    found.map_err(ApiError::plain)
}

/// Finds a VM by name or id: no cluster.
pub(super) async fn find_vm(node: &Arc<Node>, vm: &str) -> Result<Route, ApiError> {
    let route = find(node, vm).await?;
    match route.kind {
        Kind::Vm => Ok(route),
        Kind::Cluster => {
            let hint = format!("see godwit cluster show {vm}");
            Err(ApiError::new(format!("{vm} is a cluster, no VM"), hint))
        }
        Kind::Port | Kind::Wire | Kind::SealedWire | Kind::Uplink { .. } => {
            Err(ApiError::new(format!("{vm} is no VM"), "see godwit vm list"))
        }
    }
}

/// `godwit vm show`.
pub(super) async fn show(node: &Arc<Node>, vm: &str) -> Result<VmInfo, ApiError> {
    let route = find_vm(node, vm).await?;
    info(node, route).await
}

/// `godwit vm list`.
pub(super) async fn list(node: &Arc<Node>) -> Result<Vec<VmInfo>, ApiError> {
    let routes = node
        .with_core(|core, _| {
            let shown = |r: &&Route| !r.gone && r.kind == Kind::Vm;
            core.routes().iter().filter(shown).cloned().collect::<Vec<_>>()
        })
        .await?;
    let mut vms = Vec::with_capacity(routes.len());
    for route in routes {
        vms.push(info(node, route).await?);
    }
    Ok(vms)
}

async fn info(node: &Arc<Node>, route: Route) -> Result<VmInfo, ApiError> {
    let vm = route.vm;
    let look = move |core: &mut Core, _| {
        (core.record_of(vm).cloned(), core.is_moving(vm), core.is_removing(vm))
    };
    let (record, moving, removing) = node.with_core(look).await?;
    let mut info = VmInfo {
        name: route.name,
        vm,
        state: if moving { "moving" } else { "elsewhere" }.into(),
        host: node.host_name(route.host),
        copy: Some(route.copy),
        epoch: record.as_ref().map_or(route.epoch, |r| r.epoch.max(route.epoch)),
        memory_bytes: 0,
        accel: String::new(),
        machine: String::new(),
        pid: None,
        nics: route.nics,
        detail: BTreeMap::new(),
    };
    if let Some(record) = record {
        let voters: Vec<_> = record.voters.iter().map(|v| node.host_name(v.host)).collect();
        info.detail.insert("voters".into(), json!(voters));
        if (record.is_off(vm) || removing) && !moving {
            info.state = if removing { "removing" } else { "off" }.into();
        }
        if !record.is_lone() {
            info.detail.insert("cluster".into(), json!(record.name));
        }
        let nic = |n: &Wiring| json!({ "mac": n.mac.colons(), "wire": n.wire, "filter": n.filter });
        if let Some(placed) = record.placement_of(vm) {
            info.detail.insert("cards".into(), placed.nics.iter().map(nic).collect());
        }
    }
    if let Some(copy) = node.copies.running(vm) {
        let qemu = copy.qemu();
        let state = qemu.run_state().await;
        if !moving {
            info.state = match &state {
                Ok(s) if s.running => "running".into(),
                Ok(s) => s.status.clone(),
                Err(_) if qemu.exit().is_some() => "gone".into(),
                Err(_) => "unknown".into(),
            };
        }
        info.copy = Some(copy.id);
        info.memory_bytes = copy.spec.memory;
        info.accel = copy.spec.accel.to_string();
        info.machine.clone_from(&copy.spec.machine);
        info.pid = Some(qemu.pid());
        info.detail.insert("cpu".into(), json!(copy.spec.cpu));
        info.detail.insert("console".into(), json!(qemu.console()));
        info.detail.insert("disks".into(), disks_of(&copy.spec));
        info.detail.insert("log".into(), json!(qemu.dir().join("qemu.log")));
        if let Some(serial1) = qemu.serial1() {
            info.detail.insert("serial1".into(), json!(serial1));
        }
    }
    if matches!(info.state.as_str(), "off" | "removing")
        && let Ok((_, spec)) = off::kept(node, vm).await
    {
        info.memory_bytes = spec.memory;
        info.detail.insert("disks".into(), disks_of(&spec));
    }
    Ok(info)
}

fn disks_of(spec: &ResolvedSpec) -> serde_json::Value {
    let shown = |d: &ResolvedDisk| json!({ "id": d.id, "path": d.path, "bytes": d.size, "shared": d.shared });
    spec.disks.iter().map(shown).collect()
}

/// The copy of a VM that runs on this host.
pub(super) async fn local(node: &Arc<Node>, vm: &str) -> Result<Arc<Copy>, ApiError> {
    let route = find_vm(node, vm).await?;
    node.copies.running(route.vm).ok_or_else(|| {
        if route.host == node.me {
            return ApiError::new(format!("{vm} does not run"), "see godwit vm show");
        }
        ApiError::new(
            format!("{vm} runs on {}", node.host_name(route.host)),
            "ask there: this needs the host that runs it",
        )
    })
}

/// `godwit vm console`.
pub(super) async fn console(node: &Arc<Node>, vm: &str) -> Result<Console, ApiError> {
    Ok(Console { socket: local(node, vm).await?.qemu().console() })
}

/// `godwit vm stop`: the guest ends, then its record. A VM whose QEMU has ended by itself has only that.
pub(super) async fn stop(node: &Arc<Node>, vm: &str, kill: bool) -> Result<Done, ApiError> {
    let route = find_vm(node, vm).await?;
    let id = route.vm;
    let (copy, disks, how) = match node.copies.running(id) {
        None if route.host == node.me => match off::kept(node, id).await {
            Ok((copy, spec)) => (copy, paths(&spec), "is removed"),
            Err(_) => (route.copy, Vec::new(), "is removed"),
        },
        _ => {
            let copy = local(node, vm).await?;
            end_guest(node, vm, &copy, kill).await?;
            (copy.id, paths(&copy.spec), "is stopped and removed")
        }
    };
    remove(node, vm, id, copy).await?;
    Ok(Done { done: format!("{vm} {how}{}", stay(&disks)) })
}

async fn end_guest(
    node: &Arc<Node>,
    vm: &str,
    copy: &Arc<Copy>,
    kill: bool,
) -> Result<(), ApiError> {
    let id = copy.vm();
    if node.with_core(move |core, _| core.is_moving(id)).await? {
        return Err(ApiError::new(
            format!("{vm} is moving"),
            "wait for it (godwit migrations) or abort it first",
        ));
    }
    if !kill {
        let qemu = copy.qemu();
        qemu.qmp().system_powerdown().await.map_err(ApiError::plain)?;
        if tokio::time::timeout(POWERDOWN, qemu.exited()).await.is_err() {
            return Err(ApiError::new(
                format!("{vm} was asked to power down and still runs"),
                "wait, or end it at once with --kill",
            ));
        }
    }
    worker::end(node, copy.id).await;
    Ok(())
}

/// Has a VM whose guest has ended removed, and waits until a record says it. That goes on without who asked, and over
/// restarts: what describes it stays until then.
async fn remove(node: &Arc<Node>, vm: &str, id: VmId, copy: CopyId) -> Result<(), ApiError> {
    node.with_core(move |core, _| core.may_remove(id)).await?.map_err(ApiError::plain)?;
    let dir = node.dir_of(copy);
    let marked = tokio::task::spawn_blocking(move || vmm::record::removed(&dir)).await;
    if let Ok(Err(error)) = marked {
        tracing::warn!(%vm, %error, "not written down: it is to be removed");
    }
    let asked = node.with_core(move |core, now| core.remove(now, id, copy)).await?;
    asked.map_err(ApiError::plain)?;
    let until = Instant::now() + ENDED;
    let look = move |core: &mut Core, _| {
        let record = core.record_of(id).filter(|r| r.placement_of(id).is_some()).cloned();
        (record, core.is_removing(id))
    };
    while let (Some(record), removing) = node.with_core(look).await? {
        if !removing {
            return Err(ApiError::new(
                format!("{vm} was started meanwhile"),
                "see godwit vm show; it can be stopped again",
            ));
        }
        if Instant::now() >= until {
            let voters: Vec<_> = record.voters.iter().map(|v| node.host_name(v.host)).collect();
            return Err(ApiError::new(
                format!(
                    "{vm} has ended, but no majority of its voters ({}) has agreed to its removal",
                    voters.join(", ")
                ),
                "it goes as soon as they do, nothing is to be done here; see godwit hosts for who is away",
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

fn paths(spec: &ResolvedSpec) -> Vec<String> {
    spec.moving().map(|d| d.path.display().to_string()).collect()
}

/// What a VM leaves to the operator, in words.
fn stay(disks: &[String]) -> String {
    if disks.is_empty() {
        return String::new();
    }
    format!("; its disks stay: {}", disks.join(", "))
}
