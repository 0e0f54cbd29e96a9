//! What outlived the last daemon: hard state, and copies whose QEMU still lives.
//!
//! Owns their way back into the table and the core. Invariant: before the core runs, every living
//! copy of this host is in the table, or was ended because no record can name it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::core::{Config, Core};
use godwit_protocol::epoch::Hard as Votes;
use godwit_protocol::id::{CopyId, VmId};
use godwit_protocol::limits::STORED_BYTES;
use godwit_protocol::migrate::{Moving, Role};
use godwit_protocol::wire::codec;
use godwit_protocol::wire::migrate::Status;
use godwit_protocol::wire::record::{self, Record};
use godwit_protocol::wire::route::{Nic, Route};
use serde::de::DeserializeOwned;

use super::copies::Copy;
use super::node::{DriverError, Node, random, wall_us};
use super::{boot, catalog, images, keeping, mirrors, nics, off, ports, uplinks, wires};
use crate::store::Hard;
use crate::vmm::{Adoption, CopyRecord, Qemu, copy_dirs, kill_copy, reserve};

/// How long a superseded QEMU may take to leave.
const QUIT: Duration = Duration::from_secs(5);

/// Hard state as the last daemon left it.
pub(super) struct Saved {
    votes: BTreeMap<VmId, Votes>,
    moving: Vec<Moving>,
    statuses: Vec<Status>,
    ports: Vec<Nic>,
    wires: Vec<Route>,
    uplinks: Vec<uplinks::Kept>,
}

impl Saved {
    /// Reads it.
    pub fn read(hard: &Hard) -> Result<Self, DriverError> {
        let votes: Vec<Votes> = read(hard, b"epoch/")?;
        Ok(Self {
            votes: votes.into_iter().map(|v| (v.decided().cluster, v)).collect(),
            moving: read(hard, b"moving/")?,
            statuses: read(hard, b"status/")?,
            ports: read(hard, ports::KEYS)?,
            wires: read(hard, catalog::KEYS)?,
            uplinks: read(hard, uplinks::KEYS)?,
        })
    }

    /// Whether a migration waits for the decision on this copy.
    fn binds(&self, copy: CopyId) -> bool {
        self.moving.iter().any(|m| m.copy == copy)
    }

    /// Whether the newest known record lets this copy run here.
    fn names(&self, node: &Node, copy: &Copy) -> bool {
        self.places(node, copy.vm(), copy.id) && !self.is_off(copy.vm())
    }

    /// Whether that record says that this copy is here: it runs, or its guest has ended.
    fn places(&self, node: &Node, vm: VmId, copy: CopyId) -> bool {
        let record = record::governing(self.records(), vm);
        record.is_some_and(|r| r.places(vm, node.me, copy))
    }

    /// Whether it says that the VM is off.
    fn is_off(&self, vm: VmId) -> bool {
        record::governing(self.records(), vm).is_some_and(|r| r.is_off(vm))
    }

    /// Whether it was minted here to be booted, and is not what is left of a VM that is off.
    fn is_minted(&self, node: &Node, copy: &CopyRecord) -> bool {
        let vm = copy.spec.id;
        let rests = self.is_off(vm) && self.places(node, vm, copy.copy);
        copy.is_prepared() && !rests
    }

    /// Whether there ever was a record of the VM.
    fn knows(&self, vm: VmId) -> bool {
        record::governing(self.records(), vm).is_some()
    }

    /// Whether the record that says is not known here yet.
    fn has_missed(&self, vm: VmId) -> bool {
        record::has_missed(self.records(), vm)
    }

    fn records(&self) -> impl Iterator<Item = &Record> + Clone {
        self.votes.values().map(Votes::decided)
    }
}

fn read<T: DeserializeOwned>(hard: &Hard, prefix: &[u8]) -> Result<Vec<T>, DriverError> {
    let entries = hard.scan(prefix).map_err(DriverError::of)?;
    let decode = |value: &[u8]| codec::decode::<T, STORED_BYTES>(value);
    entries
        .iter()
        .map(|(_, value)| decode(value))
        .collect::<Result<_, _>>()
        .map_err(|e| DriverError(format!("hard state is damaged ({e}): see docs/operations.md")))
}

/// The moves that bind copies of this host, each with whether its QEMU is there, loaded.
async fn still_moving(saved: &Saved, living: &BTreeMap<CopyId, Arc<Copy>>) -> Vec<(Moving, bool)> {
    let mut moving = Vec::new();
    for m in &saved.moving {
        let present = match living.get(&m.copy) {
            Some(copy) => copy.qemu().run_state().await.is_ok_and(|s| s.status != "inmigrate"),
            None => false,
        };
        moving.push((m.clone(), present));
    }
    moving
}

/// Finds living copies and gives them to the core as what they are: bound, running, or superseded.
pub(super) async fn adopt(node: &Arc<Node>, saved: Saved) -> Result<Core, DriverError> {
    catalog::adopt(node, &saved.wires);
    saved.statuses.iter().for_each(|status| node.timelines.restore(status));
    let (mut living, mut ended) = find_living(node, &saved).await?;
    let minted: Vec<_> = ended.extract_if(.., |r| saved.is_minted(node, r)).collect();
    end_superseded(node, &saved, &mut living).await?;
    for copy in living.values() {
        node.copies.insert(Arc::clone(copy));
        for nic in copy.wired() {
            wires::adopt(node, &nic.wire).await;
        }
        if copy.ran() && !saved.binds(copy.id) {
            let record = record::governing(saved.records(), copy.vm());
            nics::adopt(node, copy, record.as_ref()).await;
            for nic in copy.wired() {
                wires::take_up(node, &nic).await;
            }
            // What an unfinished migration of the last daemon left.
            mirrors::clear(copy).await;
            images::attach(node, copy);
        }
    }
    let moving = still_moving(&saved, &living).await;
    let unbound: Vec<_> = living.values().filter(|c| !saved.binds(c.id)).cloned().collect();
    let governing = |c: &Copy| record::governing(saved.records(), c.vm());
    let unbound: Vec<_> =
        unbound.into_iter().map(|c| (governing(&c), saved.names(node, &c), c)).collect();
    let config = Config {
        me: node.me,
        store: node.hard.id(),
        site: node.site.clone(),
        generation: wall_us() / 1_000_000,
        seed: u64::from_le_bytes(random().map_err(DriverError::of)?),
        hard: saved.votes,
        moving,
        statuses: saved.statuses,
    };
    let mut core = Core::new(node.now(), config);
    for wire in saved.wires {
        if let Err(error) = core.announce(node.now(), wire) {
            tracing::error!(%error, "a wire is not told to others");
        }
    }
    ports::adopt(node, &mut core, saved.ports).await;
    uplinks::adopt(node, &mut core, saved.uplinks).await;
    for (record, named, copy) in unbound {
        if !named && !copy.qemu().run_state().await.is_ok_and(|s| s.running) {
            continue; // Until the record is known that says whether it may.
        }
        // A record names it and no move binds it: it runs, or was about to.
        copy.will_run();
        if let Err(error) = copy.qemu().cont().await {
            tracing::error!(vm = %copy.spec.name, %error, "cannot run it");
        }
        core.runs(node.now(), copy.vm(), copy.id, boot::route(node, &copy, record.as_ref()));
    }
    ended.iter().for_each(|record| is_off(node, &mut core, record));
    minted.iter().for_each(|r| core.was_minted(node.now(), r.spec.id, r.copy));
    for copy in living.values() {
        boot::watch(node, copy);
    }
    Ok(core)
}

/// A copy that its record places here, and whose guest has ended.
fn is_off(node: &Node, core: &mut Core, ended: &CopyRecord) {
    let (vm, copy) = (ended.spec.id, ended.copy);
    off::announce(node, core, &ended.spec, copy);
    core.ended(node.now(), vm, copy);
    if ended.removed
        && let Err(error) = core.remove(node.now(), vm, copy)
    {
        tracing::error!(%vm, error, "it is not removed");
    }
}

/// Copies whose QEMU lives, and those that a record names all the same.
async fn find_living(
    node: &Node,
    saved: &Saved,
) -> Result<(BTreeMap<CopyId, Arc<Copy>>, Vec<CopyRecord>), DriverError> {
    let (mut living, mut ended) = (BTreeMap::new(), Vec::new());
    for dir in copy_dirs(&node.vm_dir()).map_err(DriverError::of)? {
        let record = match Qemu::readopt(&dir).await {
            Ok(Adoption::Alive(qemu)) => {
                reserve::release(qemu.spec());
                let (vm, copy) = (qemu.spec().id, qemu.copy());
                let rests = saved.is_off(vm) && saved.places(node, vm, copy);
                if !rests || saved.binds(copy) {
                    let moving = saved.moving.iter().find(|m| m.copy == copy);
                    let ran = moving.is_none_or(|m| m.role == Role::Source || m.started);
                    living.insert(copy, Arc::new(Copy::new(qemu, ran)));
                    continue;
                }
                // Nobody needs to see its disks any more, which stay.
                if qemu.quit(QUIT).await.is_err() {
                    qemu.kill().await.map_err(DriverError::of)?;
                }
                CopyRecord::read(&dir)
            }
            Ok(Adoption::Gone(record)) => Ok(*record),
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "cannot take the copy up: ending it");
                kill_copy(&dir).await.map_err(DriverError::of)?;
                CopyRecord::read(&dir)
            }
        };
        match record {
            Ok(record) => ended.extend(left(node, saved, record, &dir)),
            Err(_) => remove(&dir),
        }
    }
    Ok((living, ended))
}

/// What is left of a copy whose QEMU is gone stays while it may be needed. Given back: it is of a VM that is here.
fn left(node: &Node, saved: &Saved, record: CopyRecord, dir: &Path) -> Option<CopyRecord> {
    let (vm, copy) = (record.spec.id, record.copy);
    let bound = saved.binds(copy);
    if !saved.is_off(vm) {
        tracing::warn!(vm = %record.spec.name, %copy, bound, "its QEMU is gone");
    }
    reserve::release(&record.spec);
    if bound {
        return None; // The decision says what becomes of it.
    }
    // A copy that was minted to switch it on may come to be named.
    let minted = record.is_prepared() && saved.is_off(vm);
    let here = record::governing(saved.records(), vm);
    let here = here.map_or(Err(String::new()), |r| off::read(node, &r, vm));
    if saved.places(node, vm, copy) || (minted && here.is_ok()) {
        return Some(record);
    }
    if saved.has_missed(vm) {
        return record.is_prepared().then_some(record);
    }
    if !record.ran && saved.knows(vm) && keeping::spared(here, copy).is_empty() {
        // Its memory is gone, so it never will run; who has the guest has all that is in them.
        keeping::discard(node, &record.spec, copy);
    }
    remove(dir);
    None
}

/// A copy that no record names and no move binds never runs again.
async fn end_superseded(
    node: &Arc<Node>,
    saved: &Saved,
    living: &mut BTreeMap<CopyId, Arc<Copy>>,
) -> Result<(), DriverError> {
    let superseded =
        |c: &Copy| !saved.binds(c.id) && !saved.names(node, c) && !saved.has_missed(c.vm());
    for copy in living.values().filter(|c| superseded(c)) {
        tracing::info!(vm = %copy.spec.name, copy = %copy.id, "superseded: ending it");
        let ran = copy.qemu().run_state().await.is_ok_and(|s| s.status != "inmigrate");
        // Not by a signal: what it has of its disks is content for the next try.
        if copy.qemu().quit(QUIT).await.is_err() {
            copy.qemu().kill().await.map_err(DriverError::of)?;
        }
        remove(&copy.dir);
        if !saved.knows(copy.vm()) {
            // It was never made a VM: its images are whoever's they were.
            continue;
        }
        // The next thing that is heard may be that the source tries again: that waits for the mark.
        let mark = node.keeping.begin(copy.vm());
        let here = record::governing(saved.records(), copy.vm());
        let here = here.map_or(Err(String::new()), |r| off::read(node, &r, copy.vm()));
        let spared = keeping::spared(here, copy.id);
        let (node, copy) = (Arc::clone(node), Arc::clone(copy));
        // Not waited for: this host's votes are.
        tokio::task::spawn_blocking(move || {
            let left = keeping::Left { copy: copy.id, spec: &copy.spec, whole: ran, spared };
            keeping::disks(&node, &left);
            keeping::memory(&node, &copy, ran);
            drop(mark);
        });
    }
    living.retain(|_, c| !superseded(c));
    Ok(())
}

fn remove(dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir) {
        tracing::warn!(dir = %dir.display(), %error, "not removed");
    }
}
