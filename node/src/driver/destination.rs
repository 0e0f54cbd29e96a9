//! The destination's work of a migration: a QEMU that waits, a session that fills its memory.
//!
//! Owns the session of one incoming migration. Never lets a guest run: that is `cont`'s worker step.

use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::chunk::ChunkKey;
use godwit_protocol::id::{CopyId, HostId};
use godwit_protocol::migrate::Happened;
use godwit_protocol::wire::wiring::Wiring;

use super::boot;
use super::copies::Copy;
use super::images::{self, Room};
use super::node::{Node, random};
use super::worker::Worker;
use super::{bulk, cutover, hold, nics, off};
use crate::relay::dest::feed_blob;
use crate::relay::{DestHandle, DestParams, DestinationSession, Seat};
use crate::vmm::probe::MemoryBudget;
use crate::vmm::{Mode, ResolvedSpec, image};

/// The stored device state of a copy that was loaded and not started yet.
pub(super) const BLOB: &str = "device.state";
/// How long a QEMU may take to load device state.
const LOAD: Duration = Duration::from_secs(30);
/// How long a move waits for what is being kept of its VM.
const KEEPING: Duration = Duration::from_secs(20);
/// How long the source may be silent on the bulk connection.
const SILENCE: Duration = Duration::from_secs(90);

/// One incoming migration.
pub(super) struct Receiving {
    pub copy: CopyId,
    pub from: HostId,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Worker {
    /// Checks, reserves, starts a QEMU that waits.
    pub(super) async fn receive(&mut self, spec: &[u8], nics: &[Wiring], from: HostId) {
        let happened = match self.prepare(spec, nics, from).await {
            Ok(()) => {
                self.node.moment(self.id, "a QEMU waits");
                Happened::Received
            }
            Err(cause) => Happened::Refused(cause),
        };
        self.node.happened(self.id, happened).await;
    }

    async fn prepare(&mut self, spec: &[u8], nics: &[Wiring], from: HostId) -> Result<(), String> {
        let mut spec = ResolvedSpec::decode(spec).map_err(|e| format!("the source's VM: {e}"))?;
        nics::by_record(&mut spec.nics, nics);
        if spec.id != self.vm {
            return Err("the source's description is of another VM".into());
        }
        // What is being kept of it is content for this very move, and its memory still counts.
        let (keeping, vm) = (Arc::clone(&self.node.keeping), self.vm);
        if keeping.holds(vm) {
            self.node.images.hurry_memory();
        }
        let kept = move || keeping.wait(vm, std::time::Instant::now() + KEEPING);
        if !tokio::task::spawn_blocking(kept).await.map_err(|e| e.to_string())? {
            tracing::warn!(%vm, "a migration begins before what was here of it is kept");
        }
        let budget = boot::budget(&self.node);
        self.node.takes_vms()?;
        self.node.caps.check_accepts(&spec, budget).await.map_err(|e| e.to_string())?;
        self.index_memory();
        // Counted in before pages come: those of a cluster's other members are, too.
        let seat = self.node.relaying.join();
        let id = CopyId(random().map_err(|e| e.to_string())?);
        let (node, dir) = (Arc::clone(&self.node), self.node.options.image_dir.clone());
        let make = {
            let spec = spec.clone();
            move || images::make(&node, &spec, id)
        };
        let made = tokio::task::spawn_blocking(make).await.map_err(|e| e.to_string());
        let started = match made.and_then(|made| made) {
            Ok(room) => self.start(room, id, from, seat).await,
            Err(cause) => Err(cause),
        };
        if started.is_err() {
            super::worker::discard(&self.node, id).await;
            if let Err(error) = image::remove(&spec, &dir, id) {
                tracing::warn!(%error, "an image of a migration that did not begin stays");
            }
        }
        started
    }

    async fn start(
        &mut self,
        room: Room,
        id: CopyId,
        from: HostId,
        seat: Arc<Seat>,
    ) -> Result<(), String> {
        let copy = boot::start_copy(&self.node, &room.spec, id, Mode::Incoming)
            .await
            .map_err(|e| e.to_string())?;
        if !off::is_off(&self.node, self.vm).await {
            cutover::arrive(&self.node, self.id, &copy, from).await;
        }
        self.open_session(&copy, from, room, seat).await
    }

    /// Memory of the VMs on this host is content that need not cross.
    fn index_memory(&self) {
        for copy in self.node.copies.all() {
            if copy.ran() {
                let node = Arc::clone(&self.node);
                tokio::task::spawn_blocking(move || bulk::index_memory(&node, &copy));
            }
        }
    }

    async fn open_session(
        &mut self,
        copy: &Arc<Copy>,
        from: HostId,
        room: Room,
        seat: Arc<Seat>,
    ) -> Result<(), String> {
        let socket = copy.dir.join("in.sock");
        let qemu = copy.qemu();
        qemu.incoming_start(&socket, true).await.map_err(|e| e.to_string())?;
        let filling = images::open(copy, room.reserved).await?;
        let session = DestinationSession::spawn(DestParams {
            seat,
            qemu_socket: socket,
            sink: filling.sink,
            corpus: bulk::corpus(&self.node, copy),
            key: ChunkKey(self.node.chunk_key),
            layout: filling.layout,
            settle: filling.settle,
            migration: self.id,
            silence_deadline: SILENCE,
            load_deadline: LOAD,
        })
        .map_err(|e| e.to_string())?;
        let attach = bulk::attach(&self.node, self.id);
        let (node, id, copy_) = (Arc::clone(&self.node), self.id, Arc::clone(copy));
        let task = tokio::spawn(async move {
            let happened = match until_loaded(session, attach, &copy_).await {
                Ok(()) => {
                    node.moment(id, "device state loaded, digests equal");
                    Happened::Loaded(copy_.id)
                }
                Err(cause) => Happened::TransferFailed(cause),
            };
            node.receiving().remove(&id);
            node.happened(id, happened).await;
        });
        self.receiving = Some(Receiving { copy: copy.id, from, task });
        Ok(())
    }

    /// The copy's QEMU is gone and its guest never ran: the memory and the stored state are the copy.
    pub(super) async fn rebuild(&mut self, id: CopyId) -> Result<(), String> {
        let copy = self.node.copies.get(id).ok_or("its memory is gone with both processes")?;
        let old = copy.qemu();
        if old.exit().is_none() {
            if old.run_state().await.is_ok_and(|s| s.status != "inmigrate") {
                return Ok(()); // It is there: nothing is to be built beside it.
            }
            // A restart of this node cut an earlier try short.
            old.kill().await.map_err(|e| e.to_string())?;
        } else if copy.ran() {
            return Err("its guest ran: the stored state is of the past".into());
        }
        let blob = tokio::fs::read(copy.dir.join(BLOB)).await.map_err(|e| e.to_string())?;
        // What the dead QEMU left; its record is written anew.
        for name in
            ["copy.json", "qmp.sock", "console.sock", "serial1.sock", "in.sock", "images.sock"]
        {
            let _ = std::fs::remove_file(copy.dir.join(name));
        }
        let memory = Arc::clone(&copy.memory);
        let qemu = boot::start_qemu(&self.node, &copy.described(), id, Mode::Incoming, memory)
            .await
            .map_err(|e| e.to_string())?;
        let socket = copy.dir.join("in.sock");
        let fed = async {
            qemu.incoming_start(&socket, true).await.map_err(|e| e.to_string())?;
            feed_blob(&socket, &blob, LOAD).await.map_err(|e| e.to_string())?;
            qemu.wait_incoming(LOAD).await.map_err(|e| e.to_string())
        };
        if let Err(cause) = fed.await {
            let _ = qemu.kill().await;
            return Err(cause);
        }
        copy.replace(qemu);
        cutover::plug_again(&self.node, &copy).await;
        boot::watch(&self.node, &copy);
        tracing::info!(copy = %id, "built again from its memory and the stored device state");
        Ok(())
    }
}

/// Whether this host would take a VM of that description, were others with so much memory to come, too.
/// Nothing is reserved or made.
pub(super) async fn would_take(node: &Arc<Node>, spec: &[u8], beside: u64) -> Result<(), String> {
    let spec = ResolvedSpec::decode(spec).map_err(|e| format!("the source's VM: {e}"))?;
    node.takes_vms()?;
    let budget = boot::budget(node);
    let budget = MemoryBudget { used: budget.used.saturating_add(beside), ..budget };
    node.caps.check_accepts(&spec, budget).await.map_err(|e| e.to_string())?;
    let node = Arc::clone(node);
    let room = tokio::task::spawn_blocking(move || images::has_room(&node, &spec)).await;
    room.map_err(|e| e.to_string())?
}

async fn until_loaded(
    mut session: DestHandle,
    mut attach: tokio::sync::mpsc::Receiver<crate::net::BulkStream>,
    copy: &Arc<Copy>,
) -> Result<(), String> {
    let end = loop {
        tokio::select! {
            end = session.ended() => break end.map_err(|e| e.to_string())?,
            Some(stream) = attach.recv() => {
                // Refused only by a session that has ended, which says so above.
                let _ = session.attach(Box::new(stream)).await;
            }
        }
    };
    copy.qemu().wait_incoming(LOAD).await.map_err(|e| e.to_string())?;
    let path = copy.dir.join(BLOB);
    super::bulk::write_secret(&path, &end.blob).await.map_err(|e| e.to_string())?;
    hold::at("stopped").await;
    Ok(())
}
