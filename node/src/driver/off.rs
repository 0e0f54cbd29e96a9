//! VMs of this host that are switched off: their guests have ended, their records stay.
//!
//! Owns what is left of one (its images, and the description in the directory of the copy that its record
//! places here) and the QEMU that shows its disks while it moves. Invariant: that QEMU never gets `cont`, and
//! whatever becomes of a move, images and description stay at the host that the record names.

use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_protocol::core::Core;
use godwit_protocol::id::{CopyId, VmId};
use godwit_protocol::migrate::Happened;
use godwit_protocol::wire::record::Record;

use super::copies::Copy;
use super::destination::BLOB;
use super::node::{Node, wall_us};
use super::worker::{self, Worker};
use super::{boot, hold, images, nics};
use crate::vmm::{self, CopyRecord, Mode, ResolvedSpec};

/// How long the end of a VM's last move may be waited for.
const RESTS: Duration = Duration::from_secs(20);

/// What a record says of a VM whose guest has ended on this host, read from its directory. Blocks, shortly.
pub(super) fn read(
    node: &Node,
    record: &Record,
    vm: VmId,
) -> Result<(CopyId, ResolvedSpec), String> {
    let placed = record.placement_of(vm).filter(|p| p.host == node.me);
    let placed = placed.ok_or("it does not run on this host any more: ask again")?;
    let read = CopyRecord::read(&node.dir_of(placed.copy));
    let kept = read.map_err(|e| format!("its description on {} is lost: {e}", node.name))?;
    if (kept.copy, kept.spec.id) != (placed.copy, vm) {
        return Err(format!("what {} keeps of it is of another copy", node.name));
    }
    let mut spec = kept.spec;
    nics::by_record(&mut spec.nics, &placed.nics);
    Ok((kept.copy, spec))
}

/// The same, by the newest record that is known.
pub(super) async fn kept(node: &Arc<Node>, vm: VmId) -> Result<(CopyId, ResolvedSpec), String> {
    let newest = node.with_core(move |core, _| core.record_of(vm).cloned()).await;
    let record = newest.map_err(|e| e.to_string())?.ok_or("no record of it is known here")?;
    let node = Arc::clone(node);
    let read = tokio::task::spawn_blocking(move || read(&node, &record, vm)).await;
    read.map_err(|e| e.to_string())?
}

/// Whether the newest record that is known says that the VM is switched off.
pub(super) async fn is_off(node: &Arc<Node>, vm: VmId) -> bool {
    let off = move |core: &mut Core, _| core.record_of(vm).is_some_and(|r| r.is_off(vm));
    node.with_core(off).await.unwrap_or(false)
}

/// Waits until no QEMU that an earlier move needed to show the disks of a VM is about to be ended.
pub(super) async fn settled(node: &Arc<Node>, vm: VmId) -> Result<(), String> {
    let resting = Arc::clone(&node.resting);
    let rests = move || resting.wait(vm, Instant::now() + RESTS);
    match tokio::task::spawn_blocking(rests).await {
        Ok(true) => Ok(()),
        Ok(false) => Err("its last move is not over here yet: ask again".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Starts the QEMU that shows the disks of a VM that is off.
pub(super) async fn show_disks(node: &Arc<Node>, vm: VmId) -> Result<Arc<Copy>, String> {
    if !is_off(node, vm).await {
        return Err("the VM does not run here".into());
    }
    let (id, spec) = kept(node, vm).await?;
    let copy = boot::start_copy(node, &spec, id, Mode::Still).await.map_err(|e| e.to_string())?;
    // Its guest did: what this copy has is the whole VM, whatever becomes of this QEMU.
    copy.will_run();
    Ok(copy)
}

impl Worker {
    /// A decided record says that this copy is here, and it is off or its guest has ended: images and description
    /// stay, nothing else does.
    pub(super) async fn rest(&mut self, id: CopyId) {
        self.sending = None;
        self.receiving = None;
        hold::at("rest").await;
        if let Some(copy) = worker::end(&self.node, id).await {
            images::attach(&self.node, &copy);
            // Of a machine that was never started.
            let _ = tokio::fs::remove_file(copy.dir.join(BLOB)).await;
            let (images, vm) = (Arc::clone(&self.node.images), copy.vm());
            tokio::task::spawn_blocking(move || images.end_in_vain(vm));
        }
        let (vm, dir) = (self.vm, self.node.dir_of(id));
        // What is here is the whole VM: from now on it is as if its guest had run here.
        let written = tokio::task::spawn_blocking(move || vmm::record::ran(&dir)).await;
        if !matches!(written, Ok(Ok(()))) {
            tracing::error!(%vm, ?written, "not written down: its disks are here");
        }
        let (node, kept) = (Arc::clone(&self.node), kept(&self.node, vm).await);
        let tell = move |core: &mut Core, now| {
            if let Ok((copy, spec)) = &kept {
                announce(&node, core, spec, *copy);
            }
            // A guest that ended while it was started: the record does not say so yet.
            core.ended(now, vm, id);
        };
        if let Err(error) = self.node.with_core(tell).await {
            tracing::error!(%vm, %error, "where it is was not told");
        }
        self.node.moment(self.id, "its disks are here, and it stays off");
        self.node.happened(self.id, Happened::Running(wall_us())).await;
    }
}

/// Others find it here.
pub(super) fn announce(node: &Node, core: &mut Core, spec: &ResolvedSpec, copy: CopyId) {
    let record = core.record_of(spec.id);
    let epoch = record.map(|r| r.epoch).unwrap_or_default();
    let mut spec = spec.clone();
    if let Some(placed) = record.and_then(|r| r.placement_of(spec.id)) {
        nics::by_record(&mut spec.nics, &placed.nics);
    }
    if let Err(error) = core.announce(node.now(), boot::route_of(node, &spec, copy, epoch)) {
        tracing::error!(%error, "where a VM is off is not told to others");
    }
}

/// The VM was removed: its description goes, its images are whoever's they were.
pub(super) fn forget(node: &Arc<Node>, id: CopyId) {
    let node = Arc::clone(node);
    let work = move || {
        node.images.detach_disks(id);
        let dir = node.dir_of(id);
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(dir = %dir.display(), %error, "its directory stays");
            }
            _ => {}
        }
    };
    // Not waited for: a daemon that starts removes it, too.
    tokio::task::spawn_blocking(work);
}
