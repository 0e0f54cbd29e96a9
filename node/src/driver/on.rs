//! VMs of this host that were off and are switched on: each time as a copy of its own, which starts from the images that
//! the last one left.
//!
//! Owns the way from a request to a guest that runs: the new copy is described on the disk, a decree names it, then it
//! is booted. Invariant: no QEMU of it is there before that; one that was named and never booted, because this daemon
//! was killed, is booted by the next; one that cannot be booted is off again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::core::Core;
use godwit_protocol::id::{CopyId, VmId};
use godwit_protocol::wire::control::{Answer, Ask};
use tokio::time::Instant;

use super::node::{Node, random};
use super::{boot, clusters, hold, off, worker};
use crate::api::types::{ApiError, Done};
use crate::vmm::{CopyRecord, Mode, copy_dirs};

/// How long a start may take: its decree, and a QEMU on a busy host.
const START: Duration = Duration::from_secs(60);
/// How often the VM's host is asked meanwhile.
const LOOK: Duration = Duration::from_millis(200);

/// One request at a time is looked at; why the last start of a VM came to nothing, until somebody is told.
pub(super) type Starts = tokio::sync::Mutex<BTreeMap<VmId, String>>;

/// `godwit vm start`: the VM's host is asked until it runs.
pub(super) async fn start(node: &Arc<Node>, vm: &str) -> Result<Done, ApiError> {
    let until = Instant::now() + START;
    let mut begun = false;
    loop {
        let route = boot::find_vm(node, vm).await?;
        let host = node.host_name(route.host);
        let last = match node.ask_at(route.host, Ask::Start { vm: route.vm, begun }).await {
            Ok(Answer::Done) => {
                let how = if begun { "is started" } else { "runs already" };
                return Ok(Done { done: format!("{vm} {how} on {host}") });
            }
            Ok(Answer::Refused(cause)) if !clusters::passes(&cause) => {
                return Err(ApiError::new(cause, format!("see godwit vm show {vm} on {host}")));
            }
            Ok(Answer::Refused(cause)) => cause,
            Ok(_) => {
                begun = true;
                "no majority of its voters has agreed".to_owned()
            }
            Err(error) => error.message,
        };
        if Instant::now() >= until {
            let cause = format!("{vm} does not run within {} s: {last}", START.as_secs());
            let hint = "what was begun goes on, and it can be asked again; see godwit hosts for who is away";
            return Err(ApiError::new(cause, hint));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What is asked of a VM's host: `begun` tells that it is asked again, and how it went.
pub(super) async fn begin(node: &Arc<Node>, vm: VmId, begun: bool) -> Result<Answer, String> {
    let mut failed = node.starts.lock().await;
    if let Some(cause) = failed.remove(&vm).filter(|_| begun) {
        return Err(cause);
    }
    let look =
        move |core: &mut Core, now| (core.is_on(vm), core.may_turn_on(now, vm), core.minted(vm));
    let (on, may, minted) = node.with_core(look).await.map_err(|e| e.to_string())?;
    if on {
        return Ok(Answer::Done);
    }
    may?;
    node.takes_vms()?;
    let (_, spec) = off::kept(node, vm).await?;
    node.caps.check_runs(&spec, boot::budget(node)).await.map_err(|e| e.to_string())?;
    let id = match minted {
        Some(id) => id,
        None => CopyId(random().map_err(|e| e.to_string())?),
    };
    let dir = node.dir_of(id);
    let prepare = move || CopyRecord::prepare(&dir, id, spec).map_err(|e| e.to_string());
    tokio::task::spawn_blocking(prepare).await.map_err(|e| e.to_string())??;
    let turned = node.with_core(move |core, now| core.turn_on(now, vm, id)).await;
    turned.map_err(|e| e.to_string())?.map(|()| Answer::Begun)
}

/// A decided record names that copy.
pub(super) fn boot(node: &Arc<Node>, vm: VmId, id: CopyId) {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        let Err(error) = run(&node, vm, id).await else { return };
        tracing::warn!(%vm, copy = %id, %error, "it cannot be started and is off again");
        if let Some(copy) = worker::end(&node, id).await {
            // Not off before it is gone: it may have taken the `cont` of which nothing was heard.
            copy.qemu().exited().await;
        }
        let cause = format!("it could not be started and is off again: {error}");
        node.starts.lock().await.insert(vm, cause);
        // Fails only when the engine has ended.
        let _ = node.with_core(move |core, now| core.ended(now, vm, id)).await;
    });
}

async fn run(node: &Arc<Node>, vm: VmId, id: CopyId) -> Result<(), ApiError> {
    hold::at("named").await;
    off::settled(node, vm).await.map_err(ApiError::plain)?;
    let dir = node.dir_of(id);
    let record = tokio::task::spawn_blocking(move || CopyRecord::read(&dir)).await;
    let record = record.map_err(ApiError::plain)?.map_err(ApiError::plain)?;
    let copy = boot::start_copy(node, &record.spec, id, Mode::On).await?;
    let me = node.me;
    let named = move |core: &mut Core, _| core.record_of(vm).is_some_and(|r| r.names(vm, me, id));
    if !node.with_core(named).await? {
        return Err(ApiError::plain("its record has changed"));
    }
    let older = {
        // Before the guest runs: what comes later is of a later copy.
        let node = Arc::clone(node);
        tokio::task::spawn_blocking(move || older(&node, vm, id)).await.map_err(ApiError::plain)?
    };
    boot::let_run(node, &copy).await?;
    let node = Arc::clone(node);
    // Not waited for: a daemon that starts removes it, too.
    tokio::task::spawn_blocking(move || forget(&node, older));
    Ok(())
}

/// What describes the copies before this one. Blocks.
fn older(node: &Node, vm: VmId, id: CopyId) -> Vec<(PathBuf, CopyId)> {
    let older = |dir: PathBuf| {
        let record = CopyRecord::read(&dir).ok().filter(|r| r.spec.id == vm && r.copy != id)?;
        node.copies.get(record.copy).is_none().then_some((dir, record.copy))
    };
    copy_dirs(&node.vm_dir()).unwrap_or_default().into_iter().filter_map(older).collect()
}

/// That goes; their images are this one's. Blocks.
fn forget(node: &Node, older: Vec<(PathBuf, CopyId)>) {
    for (dir, copy) in older {
        node.images.detach_disks(copy);
        if let Err(error) = std::fs::remove_dir_all(&dir) {
            tracing::warn!(dir = %dir.display(), %error, "its directory stays");
        }
    }
}
