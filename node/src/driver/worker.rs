//! One worker per migration: does its effects one after the other, off the engine.
//!
//! Owns what a migration holds at this end: sessions, the copy it receives.

use std::sync::Arc;

use godwit_protocol::id::{CopyId, MigrationId, VmId};
use godwit_protocol::migrate::{Effect, Happened};
use godwit_protocol::wire::wiring::Wiring;
use tokio::sync::mpsc;

use super::copies::Copy;
use super::destination::Receiving;
use super::keeping::Mark;
use super::node::{Node, wall_us};
use super::source::Sending;
use super::{cutover, hold, images, keeping, migrate, nics, off, wires};
use crate::vmm::{self, CopyRecord};

/// Effects that may wait at one worker. A migration has few at a time.
const EFFECTS: usize = 32;
/// How long a QEMU may take to leave before it is killed.
const QUIT: std::time::Duration = std::time::Duration::from_secs(2);
/// How long the QEMU of a copy that has moved away stands still before it is ended: that frees gigabytes, while the last
/// frames of its guest still pass through this host.
const LINGER: std::time::Duration = std::time::Duration::from_secs(1);

/// What a worker has to do; while it is about to let a copy rest, with the mark of that.
pub(super) type Todo = (Effect, Option<Mark>);

pub(super) struct Worker {
    pub node: Arc<Node>,
    pub id: MigrationId,
    pub vm: VmId,
    pub sending: Option<Sending>,
    pub receiving: Option<Receiving>,
}

impl Worker {
    /// Starts one; it ends when the sender is dropped and everything asked of it is done.
    pub fn spawn(node: &Arc<Node>, id: MigrationId, vm: VmId) -> mpsc::Sender<Todo> {
        let (effects, mut todo) = mpsc::channel(EFFECTS);
        let mut worker = Self { node: Arc::clone(node), id, vm, sending: None, receiving: None };
        tokio::spawn(async move {
            while let Some((effect, rests)) = todo.recv().await {
                worker.perform(effect).await;
                drop(rests);
            }
        });
        effects
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Receive { spec, nics, source } => self.receive(&spec, &nics, source).await,
            Effect::Rewire(epoch, nics) => {
                let happened = match self.rewire(&nics).await {
                    Ok(()) => Happened::Rewired(epoch),
                    Err(cause) => Happened::TransferFailed(cause),
                };
                self.node.happened(self.id, happened).await;
            }
            Effect::Describe => {
                let happened = match migrate::describe(&self.node, self.vm).await {
                    Ok((spec, ram_bytes)) => Happened::Described { spec, ram_bytes },
                    Err(cause) => Happened::Refused(cause),
                };
                self.node.happened(self.id, happened).await;
            }
            Effect::Pace(bytes_per_s) => {
                tracing::debug!(vm = %self.vm, bytes_per_s, "share of the path");
                self.sending.iter().for_each(|sending| sending.pace(bytes_per_s));
            }
            Effect::Transfer { to, options } => {
                if let Err(cause) = self.transfer(to, options).await {
                    self.node.happened(self.id, Happened::TransferFailed(cause)).await;
                }
            }
            Effect::Stop => {
                let happened = match self.stop().await {
                    Ok(at_us) => {
                        self.node.moment_at(self.id, at_us, "stop: the guest stands still");
                        Happened::Stopped(at_us)
                    }
                    Err(cause) => Happened::TransferFailed(cause),
                };
                self.node.happened(self.id, happened).await;
            }
            Effect::CancelTransfer => {
                self.cancel_transfer().await;
                self.node.moment(self.id, "the transfer is ended");
            }
            Effect::Cont(copy) => self.cont(copy).await,
            Effect::Rest(copy) => self.rest(copy).await,
            Effect::Discard(copy) => {
                self.sending = None;
                self.receiving = None;
                retire(&self.node, self.vm, copy).await;
            }
            Effect::DropReceived => {
                if let Some(receiving) = self.receiving.take() {
                    self.node.receiving().remove(&self.id);
                    self.node.moment(self.id, "what was received is of no use now");
                    let copy = receiving.copy;
                    drop(receiving);
                    retire(&self.node, self.vm, copy).await;
                }
            }
            Effect::Rebuild(copy) => {
                let happened = match self.rebuild(copy).await {
                    Ok(()) => {
                        self.node.moment(self.id, "the copy is built again");
                        Happened::Rebuilt
                    }
                    Err(cause) => Happened::RebuildFailed(cause),
                };
                self.node.happened(self.id, happened).await;
            }
        }
    }

    /// NICs are connected otherwise while the VM moves: here, and on the way.
    async fn rewire(&mut self, nics: &[Wiring]) -> Result<(), String> {
        let node = &self.node;
        let (copy, from) = match &self.receiving {
            Some(receiving) => (node.copies.get(receiving.copy), Some(receiving.from)),
            None => (node.copies.running(self.vm), None),
        };
        let Some(copy) = copy else { return Ok(()) };
        let followed = match from {
            Some(_) => nics::follow(node, &copy, nics).await,
            None => nics::follow_record(node, &copy).await,
        };
        followed.map_err(|e| e.to_string())?;
        match (from, &self.sending) {
            (Some(from), _) if !off::is_off(node, self.vm).await => {
                cutover::arrive(node, self.id, &copy, from).await;
            }
            (None, Some(sending)) if !copy.qemu().is_still() => {
                cutover::leave(node, self.id, &copy, sending.to).await;
            }
            _ => {}
        }
        Ok(())
    }

    /// A decided record names this copy: its guest may run.
    async fn cont(&mut self, id: CopyId) {
        let Some(copy) = self.node.copies.get(id) else {
            let gone = Happened::QemuGone { copy: id, ran: false };
            return self.node.happened(self.id, gone).await;
        };
        if self.receiving.is_some() {
            hold::at("decided").await;
        }
        let qemu = copy.qemu();
        if qemu.exit().is_some() {
            let gone = Happened::QemuGone { copy: id, ran: copy.ran() };
            return self.node.happened(self.id, gone).await;
        }
        let quiet = cutover::quiet(&self.node, id);
        let follow = nics::follow_record(&self.node, &copy);
        let (off, (), followed) = tokio::join!(off::is_off(&self.node, self.vm), quiet, follow);
        if let Err(error) = followed {
            // What cannot be connected so is not connected.
            tracing::error!(vm = %self.vm, %error, "its NICs are not as its record says");
        }
        if off {
            // It left its cluster since, so the move itself does not know it.
            return self.rest(id).await;
        }
        copy.will_run();
        match qemu.cont().await {
            Ok(at) => {
                let at_us = at.map_or_else(wall_us, |t| u64::try_from(t.micros).unwrap_or(0));
                runs_here(&self.node, &copy).await;
                if self.receiving.is_some() {
                    hold::at("running").await;
                }
                self.receiving = None;
                self.node.moment_at(self.id, at_us, "resume: the guest runs");
                self.node.happened(self.id, Happened::Running(at_us)).await;
            }
            Err(error) => {
                tracing::error!(vm = %self.vm, copy = %id, %error, "cont failed");
                if qemu.exit().is_some() {
                    let gone = Happened::QemuGone { copy: id, ran: true };
                    self.node.happened(self.id, gone).await;
                } else {
                    // It may still come: ask again, the record stands.
                    retry_cont(&self.node, self.id, &copy);
                }
            }
        }
    }
}

/// Asks a QEMU that did not take `cont` again until it does or ends; the record stands.
fn retry_cont(node: &Arc<Node>, id: MigrationId, copy: &Arc<Copy>) {
    let (node, copy) = (Arc::clone(node), Arc::clone(copy));
    tokio::spawn(async move {
        for _ in 0..60 {
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            let qemu = copy.qemu();
            if qemu.exit().is_some() {
                return node.happened(id, Happened::QemuGone { copy: copy.id, ran: true }).await;
            }
            if let Ok(at) = qemu.cont().await {
                let at_us = at.map_or_else(wall_us, |t| u64::try_from(t.micros).unwrap_or(0));
                runs_here(&node, &copy).await;
                return node.happened(id, Happened::Running(at_us)).await;
            }
        }
        tracing::error!(copy = %copy.id, "QEMU takes no cont: ending it");
        let _ = copy.qemu().kill().await;
        node.happened(id, Happened::QemuGone { copy: copy.id, ran: true }).await;
    });
}

/// Ends a copy that has moved away or was received in vain. Its disks and its memory stay for a time,
/// as content: what comes back need not cross again.
async fn retire(node: &Arc<Node>, vm: VmId, id: CopyId) {
    // Before others can hear that it is gone and try again.
    let mark = node.keeping.begin(vm);
    let copy = let_go(node, id);
    if let Some(copy) = &copy {
        if has_moved(copy).await {
            tokio::time::sleep(LINGER).await;
        }
        end_qemu(node, copy).await;
    }
    let (node, here) = (Arc::clone(node), off::kept(node, vm).await);
    // Not waited for: nobody needs it before the next migration of this VM.
    tokio::task::spawn_blocking(move || {
        let dir = node.dir_of(id);
        // One whose QEMU went before this daemon started is on the disk alone.
        let record = CopyRecord::read(&dir).ok();
        let ran = copy.as_ref().map(|copy| copy.ran());
        let whole = ran.or(record.as_ref().map(|r| r.ran)).unwrap_or_default();
        if let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(copy = %id, %error, "its directory stays");
        }
        let spared = keeping::spared(here, id);
        let spec = copy.as_ref().map(|copy| &copy.spec).or(record.as_ref().map(|r| &r.spec));
        if let Some(spec) = spec {
            keeping::disks(&node, &keeping::Left { copy: id, spec, whole, spared });
        }
        if let Some(copy) = &copy {
            keeping::memory(&node, copy, whole);
        }
        drop(mark);
    });
}

/// Its guest ran here and was stopped; what the record forbids while it runs is ended at once.
async fn has_moved(copy: &Copy) -> bool {
    let qemu = copy.qemu();
    let stands = copy.ran() && !qemu.is_still() && qemu.exit().is_none();
    stands && qemu.run_state().await.is_ok_and(|status| !status.running)
}

/// The guest runs here: others may reach it, its disks are content, and what earlier tries left of it
/// is of no more use.
async fn runs_here(node: &Arc<Node>, copy: &Arc<Copy>) {
    wires::runs_here(node, copy).await;
    images::attach(node, copy);
    let (images, vm, dir) = (Arc::clone(&node.images), copy.vm(), copy.dir.clone());
    let work = move || {
        images.end_in_vain(vm);
        vmm::record::ran(&dir)
    };
    // Waited for: until the migration ends here, hard state says that it may have run.
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(())) => {}
        failed => tracing::error!(copy = %copy.id, ?failed, "not written down: its guest runs"),
    }
}

/// Ends a copy's QEMU and removes what it held; its disks' images stay. The guest must not be needed
/// here any more.
pub(super) async fn discard(node: &Arc<Node>, id: CopyId) -> Option<Arc<Copy>> {
    let copy = end(node, id).await?;
    let dir = copy.dir.clone();
    let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(dir)).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(copy = %id, %error, "its directory stays");
    }
    let vm = copy.vm();
    let _ = node.with_core(move |core, _| core.runs_no_more(vm, id)).await;
    Some(copy)
}

/// Ends a copy's QEMU. What the copy has on the disk stays.
pub(super) async fn end(node: &Arc<Node>, id: CopyId) -> Option<Arc<Copy>> {
    let copy = let_go(node, id)?;
    end_qemu(node, &copy).await;
    Some(copy)
}

/// Nobody finds the copy here any more.
fn let_go(node: &Arc<Node>, id: CopyId) -> Option<Arc<Copy>> {
    let copy = node.copies.remove(id)?;
    node.corpus.forget_memory(id);
    cutover::gone(node, id);
    Some(copy)
}

async fn end_qemu(node: &Arc<Node>, copy: &Arc<Copy>) {
    if let Err(error) = copy.qemu().quit(QUIT).await {
        tracing::error!(copy = %copy.id, %error, "its QEMU does not end");
    }
    wires::runs_no_more(node, copy).await;
}
