//! The QEMUs of a world and what drivers do to them.
//!
//! Owns the copies: they outlive their nodes. Every `cont` is checked as it happens.

use std::collections::BTreeMap;

use godwit_protocol::core::Value;
use godwit_protocol::id::{CopyId, MigrationId, VmId};
use godwit_protocol::migrate::{Effect, Happened, Moving, Progress, Role};
use godwit_protocol::time::Time;
use godwit_protocol::wire::record::{Record, governing, has_missed};
use godwit_protocol::wire::route::{Kind, Route};
use godwit_protocol::wire::wiring::Wiring;

use super::check::{self, Invariant};
use super::event::Event;
use super::mutant::Mutant;
use super::wiring;
use super::world::{World, host, index};

/// How long the last of a stream may take to find its way.
const STREAM_MS: u64 = 60_000;

/// What a copy's process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qemu {
    /// It waits for a stream.
    Loading,
    /// It waits for `cont`, and holds the guest.
    Loaded,
    /// The guest runs.
    Running,
    /// The guest stands still.
    Stopped,
    /// It is gone.
    Dead,
}

/// One start of a VM.
#[derive(Debug, Clone)]
pub struct Copy {
    /// The VM.
    pub vm: VmId,
    /// Its host.
    pub at: usize,
    /// What its process does.
    pub qemu: Qemu,
    /// Stands for all that the guest holds: memory, devices, disks.
    pub content: u64,
    /// Its guest has run, ever.
    pub ran: bool,
    /// The driver's note that `cont` was written; a restart derives it anew.
    pub noted: bool,
    /// The memory: held by its QEMU and by the node that made it or took it up.
    pub memory: bool,
    /// The stored device state.
    pub stored: bool,
    /// How its NICs are connected.
    pub nics: Vec<Wiring>,
    /// It is described on the disk, to be booted once a record names it, and was not yet.
    pub minted: bool,
    rebuilt: u32,
}

impl World {
    /// A new copy: the first one of a VM runs.
    pub fn mint(&mut self, vm: VmId, at: usize) -> CopyId {
        self.minted += 1;
        let id = CopyId([self.minted; 16]);
        let first = !self.vms.contains(&vm);
        if first {
            self.vms.push(vm);
        }
        let qemu = if first { Qemu::Running } else { Qemu::Loading };
        let copy = Copy {
            vm,
            at,
            qemu,
            content: u64::from(vm.0[0]),
            ran: first,
            noted: first,
            memory: true,
            stored: false,
            nics: wiring::first(vm),
            minted: false,
            rebuilt: 0,
        };
        self.copies.insert(id, copy);
        id
    }

    /// The copy of a VM that runs, and where.
    pub fn running(&self, vm: VmId) -> Option<(CopyId, usize)> {
        let runs = |c: &&Copy| c.vm == vm && c.qemu == Qemu::Running;
        self.copies.iter().find(|(_, c)| runs(c)).map(|(id, c)| (*id, c.at))
    }

    /// `cont`.
    pub fn run_copy(&mut self, id: CopyId) {
        let Some(mut copy) = self.copies.get(&id).cloned() else { return };
        if self.off.contains(&copy.vm) {
            return self.broken(Invariant::OneCopy, "cont of a guest that is off");
        }
        if matches!(copy.qemu, Qemu::Dead | Qemu::Loading) {
            return self.broken(Invariant::OneCopy, format!("cont of {:?}", copy.qemu));
        }
        if copy.qemu != Qemu::Running {
            self.judge(Invariant::Content, check::content::continues(self, &copy));
            self.judge(Invariant::Wiring, check::wiring::begins(self, &copy));
        }
        copy.qemu = Qemu::Running;
        (copy.ran, copy.noted) = (true, true);
        self.copies.insert(id, copy.clone());
        self.judge(Invariant::OneCopy, check::one_copy::begins(self, id, &copy));
    }

    /// The node's routes tell where it runs.
    pub fn announce_copy(&mut self, i: usize, copy: CopyId) {
        let vm = self.copies[&copy].vm;
        let record = self.nodes[i].core.as_ref().and_then(|c| c.record_of(vm)).cloned();
        let placed = record.as_ref().and_then(|r| r.placement_of(vm));
        let (Some(record), Some(placed)) = (&record, placed) else { return };
        let name = placed.name.clone();
        let route = Route {
            vm,
            name,
            host: host(i),
            copy,
            epoch: record.epoch,
            nics: vec![],
            kind: Kind::Vm,
            gone: false,
        };
        self.act(i, |core, now| core.runs(now, vm, copy, route));
    }

    fn discard(&mut self, i: usize, id: CopyId) {
        let Some(copy) = self.copies.get(&id) else { return };
        let (vm, copy) = (copy.vm, copy.clone());
        self.judge(Invariant::OneCopy, check::one_copy::ends(self, id, &copy));
        self.judge_removal(id, &copy);
        self.copies.remove(&id);
        self.act(i, |core, _| core.runs_no_more(vm, id));
    }

    /// [`Mutant::DiscardEarly`].
    pub(super) fn discard_superseded(&mut self, i: usize) {
        let stopped = self.copies.iter().find(|(id, c)| {
            let newest = governing(self.decided.values(), c.vm);
            let named = newest.is_some_and(|r| r.names(c.vm, host(i), **id));
            c.at == i && c.qemu == Qemu::Stopped && !named
        });
        if let Some(id) = stopped.map(|(id, _)| *id) {
            self.discard(i, id);
        }
    }

    /// [`Mutant::HostOnly`].
    pub(super) fn run_all_named(&mut self, i: usize, record: &Record) {
        let here = |c: &Copy| record.placement_of(c.vm).is_some_and(|p| p.host == host(i));
        let waits = |c: &Copy| matches!(c.qemu, Qemu::Loaded | Qemu::Stopped);
        let loaded = |c: &Copy| c.at == i && waits(c) && here(c);
        let ids: Vec<_> =
            self.copies.iter().filter(|(_, c)| loaded(c)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.run_copy(id));
    }

    /// The node's process is gone: memory without a QEMU goes with it.
    pub(super) fn node_gone(&mut self, i: usize) {
        for copy in self.copies.values_mut().filter(|c| c.at == i && c.qemu == Qemu::Dead) {
            if copy.memory && copy.stored {
                self.may_lose.insert(copy.vm);
            }
            copy.memory = false;
        }
    }

    /// A QEMU is killed.
    pub fn kill(&mut self, id: CopyId) {
        self.strikes();
        let Some(copy) = self.copies.get_mut(&id) else { return };
        let (at, was) = (copy.at, core::mem::replace(&mut copy.qemu, Qemu::Dead));
        let up = self.nodes[at].core.is_some();
        if copy.ran || (was == Qemu::Loaded && !up) {
            self.may_lose.insert(copy.vm);
        }
        copy.memory &= up;
        if up {
            let (start, ms) = (self.nodes[at].start, 1 + self.below(50));
            self.at(ms, Event::Gone(at, start, id));
        }
    }

    /// What a starting daemon finds: see the driver. Returns bound ends, and copies to continue.
    pub(super) fn adopt(&mut self, i: usize) -> (Vec<(Moving, bool)>, Vec<CopyId>) {
        let disk = self.nodes[i].disk.values();
        let bound: Vec<Moving> = disk
            .filter_map(|v| if let Value::Moving(m) = v { Some(m.clone()) } else { None })
            .collect();
        let moving: BTreeMap<CopyId, &Moving> = bound.iter().map(|m| (m.copy, m)).collect();
        let disk = self.nodes[i].disk.values();
        let records: Vec<_> = disk
            .filter_map(|v| if let Value::Epoch(h) = v { Some(h.decided().clone()) } else { None })
            .collect();
        let mine: Vec<CopyId> =
            self.copies.iter().filter(|(_, c)| c.at == i).map(|(id, _)| *id).collect();
        let mut conts = Vec::new();
        for id in mine {
            let vm = self.copies[&id].vm;
            let record = governing(records.iter(), vm);
            let named = record.as_ref().is_some_and(|r| r.names(vm, host(i), id));
            let missed = has_missed(records.iter(), vm) && self.copies[&id].qemu == Qemu::Running;
            let dead = self.copies[&id].qemu == Qemu::Dead;
            match moving.get(&id) {
                Some(m) => {
                    let noted = m.role == Role::Source || m.started;
                    if let Some(copy) = self.copies.get_mut(&id) {
                        copy.noted = noted;
                    }
                }
                None if (named || missed) && !dead => conts.push(id),
                None if self.stays_off(id) || self.stays_minted(id, record.as_ref()) => {}
                None => self.discard(i, id),
            }
        }
        let present = |copy: &CopyId| {
            let copy = self.copies.get(copy);
            copy.is_some_and(|c| !matches!(c.qemu, Qemu::Dead | Qemu::Loading))
        };
        let moving = bound.iter().map(|m| (m.clone(), present(&m.copy))).collect();
        (moving, conts)
    }

    fn tell(&mut self, i: usize, id: MigrationId, happened: Happened) {
        // Always as late, so that a driver's words keep their order.
        let (start, lag) = (self.nodes[i].start, self.nodes[i].lag_ms);
        self.at(3 + lag, Event::Happened(i, start, id, Box::new(happened)));
    }

    pub(super) fn handle_qemu(&mut self, event: Event) {
        match event {
            Event::Work(i, start, id) if self.nodes[i].start == start => {
                let work = self.nodes[i].work.get_mut(&id).and_then(|w| w.pop_front());
                if let Some((vm, effect)) = work.filter(|_| !self.step(i)) {
                    self.work(i, id, vm, effect);
                    self.step(i);
                }
            }
            Event::Figures(i, start, id) if self.nodes[i].start == start => self.figures(i, id),
            Event::Stream { at, start, id, until, content } if self.nodes[at].start == start => {
                self.stream(at, id, until, content);
            }
            Event::Load(i, start, id, copy, content) if self.nodes[i].start == start => {
                self.load(i, id, copy, content);
            }
            Event::Gone(i, start, copy) if self.nodes[i].start == start => self.gone(i, copy),
            Event::ReadBack(i, start, copy) if self.nodes[i].start == start => {
                self.read_back(i, copy);
            }
            Event::Kill(running) => self.kill_any(running),
            _ => {}
        }
    }

    /// [`Mutant::CleanRead`]: resumes because everyone who is reached still names it.
    fn read_back(&mut self, i: usize, copy: CopyId) {
        let Some(vm) = self.copies.get(&copy).map(|c| c.vm) else { return };
        let stopped = self.copies[&copy].qemu == Qemu::Stopped;
        let names = |j: usize| {
            let record = self.nodes[j].core.as_ref().and_then(|c| c.record_of(vm));
            record.is_none_or(|r| r.names(vm, host(i), copy))
        };
        if stopped && (0..self.nodes.len()).all(names) {
            self.run_copy(copy);
        }
    }

    fn kill_any(&mut self, running: bool) {
        let fits = |c: &Copy| (c.qemu == Qemu::Running) == running && c.qemu != Qemu::Dead;
        // A source copy that stands still is the guest until its successor runs.
        let fits = |c: &Copy| fits(c) && (running || !c.ran);
        let ids: Vec<_> = self.copies.iter().filter(|(_, c)| fits(c)).map(|(id, _)| *id).collect();
        if !ids.is_empty() {
            let which = self.below(ids.len() as u64) as usize;
            self.kill(ids[which]);
        }
    }

    fn gone(&mut self, i: usize, id: CopyId) {
        let Some(copy) = self.copies.get(&id).filter(|c| c.qemu == Qemu::Dead) else { return };
        let (ran, vm) = (copy.noted, copy.vm);
        let moving = self.nodes[i].core.as_ref().and_then(|c| c.migration_of(vm));
        if let Some(m) = moving {
            self.act(i, |core, now| core.happened(now, m, Happened::QemuGone { copy: id, ran }));
        }
        let over = self.nodes[i].core.as_ref().is_some_and(|c| c.migration_of(vm).is_none());
        if over && !self.stays_off(id) {
            self.discard(i, id);
        }
    }

    fn work(&mut self, i: usize, id: MigrationId, vm: VmId, effect: Effect) {
        match effect {
            Effect::Receive { nics, .. } => {
                if self.chance(self.faults.fail) {
                    return self.tell(i, id, Happened::Refused("no room".into()));
                }
                let copy = self.mint(vm, i);
                self.nodes[i].receiving.insert(id, copy);
                if let Some(copy) = self.copies.get_mut(&copy) {
                    copy.nics = nics;
                }
                self.tell(i, id, Happened::Received);
            }
            Effect::Rewire(epoch, nics) => {
                match (self.nodes[i].receiving.get(&id).copied(), self.running(vm)) {
                    (Some(copy), _) => self.wire_up(copy, nics),
                    (None, Some((copy, at))) if at == i => self.follow_newest(i, copy),
                    _ => {}
                }
                self.tell(i, id, Happened::Rewired(epoch));
            }
            Effect::Describe => {
                let happened = if self.chance(self.faults.fail / 3.0) {
                    Happened::Refused("a disk that does not move".into())
                } else {
                    Happened::Described { spec: b"spec".to_vec(), ram_bytes: 1 << 20 }
                };
                self.tell(i, id, happened);
            }
            Effect::Pace(_) => {}
            Effect::Transfer { to, .. } => {
                self.show_disks(i, vm);
                self.nodes[i].sending.insert(id, (vm, index(to)));
                let start = self.nodes[i].start;
                self.at(100, Event::Figures(i, start, id));
            }
            Effect::Stop => self.stop(i, id, vm),
            Effect::CancelTransfer => drop(self.nodes[i].sending.remove(&id)),
            Effect::Cont(copy) => self.cont(i, id, copy),
            Effect::Rest(copy) => {
                let happened = self.rest(i, id, copy);
                self.tell(i, id, happened);
            }
            Effect::Discard(copy) => {
                self.nodes[i].sending.remove(&id);
                self.nodes[i].receiving.remove(&id);
                self.discard(i, copy);
            }
            Effect::DropReceived => {
                if let Some(copy) = self.nodes[i].receiving.remove(&id) {
                    self.discard(i, copy);
                }
            }
            Effect::Rebuild(copy) => {
                let happened = self.rebuild(copy);
                self.tell(i, id, happened);
            }
        }
    }

    fn cont(&mut self, i: usize, id: MigrationId, copy: CopyId) {
        let Some(c) = self.copies.get(&copy) else {
            return self.tell(i, id, Happened::QemuGone { copy, ran: false });
        };
        if c.qemu == Qemu::Dead {
            let ran = c.noted;
            return self.tell(i, id, Happened::QemuGone { copy, ran });
        }
        self.follow_newest(i, copy);
        self.run_copy(copy);
        self.announce_copy(i, copy);
        self.nodes[i].receiving.remove(&id);
        let at_us = self.nodes[i].clock.read(self.now).0;
        self.tell(i, id, Happened::Running(at_us));
    }

    fn rebuild(&mut self, id: CopyId) -> Happened {
        let failed = |why: &str| Happened::RebuildFailed(why.into());
        let flaky = self.chance(self.faults.fail);
        let Some(copy) = self.copies.get_mut(&id) else { return failed("nothing is left") };
        if !copy.memory || !copy.stored {
            return failed("its memory is gone with both processes");
        }
        if !copy.ran && copy.qemu == Qemu::Loaded {
            return Happened::Rebuilt;
        }
        if copy.ran || copy.qemu != Qemu::Dead {
            let what = format!("built again beside a QEMU, or after it ran: {copy:?}");
            self.broken(Invariant::OneCopy, what);
            return failed("a checker saw it");
        }
        copy.rebuilt += 1;
        if flaky && copy.rebuilt == 1 {
            return failed("QEMU does not start");
        }
        (copy.qemu, copy.noted) = (Qemu::Loaded, false);
        Happened::Rebuilt
    }

    fn stop(&mut self, i: usize, id: MigrationId, vm: VmId) {
        let off = self.off.contains(&vm);
        let was = if off { Qemu::Stopped } else { Qemu::Running };
        let runs = |c: &Copy| c.vm == vm && c.at == i && c.qemu == was;
        let copy = self.copies.iter_mut().find(|(_, c)| runs(c));
        let Some((copy_id, copy)) = copy else {
            return self.tell(i, id, Happened::TransferFailed("nothing to stop".into()));
        };
        let (copy_id, before) = (*copy_id, copy.content);
        // It wrote as long as it ran.
        if !off {
            copy.content = before.rotate_left(7) ^ self.now.0;
        }
        copy.qemu = Qemu::Stopped;
        let held = copy.content;
        self.truth.insert(vm, held);
        let content = if self.mutant == Mutant::EarlyRead { before } else { held };
        let (start, until) = (self.nodes[i].start, self.now.plus_ms(STREAM_MS));
        let at_us = self.nodes[i].clock.read(self.now).0;
        self.tell(i, id, Happened::Stopped(at_us));
        let ms = 1 + self.below(self.faults.delay_ms) + self.faults.wan_ms;
        self.at(ms, Event::Stream { at: i, start, id, until, content });
        self.ambush();
        if self.mutant == Mutant::CleanRead {
            self.at(2500, Event::ReadBack(i, start, copy_id));
        }
    }

    /// Figures that let the guest be stopped; and notice of a destination that is gone.
    fn figures(&mut self, i: usize, id: MigrationId) {
        let Some((vm, to)) = self.nodes[i].sending.get(&id).copied() else { return };
        if self.running(vm).is_none_or(|(_, at)| at != i) && !self.shows_disks(i, vm) {
            return;
        }
        if !self.nodes[to].receiving.contains_key(&id) && self.chance(0.05) {
            return self.tell(i, id, Happened::TransferFailed("no connection".into()));
        }
        // Members of a cluster converge one after the other, and not for ever.
        let passes = u64::from(self.vms.len() == 1 || self.chance(0.8));
        let figures = Progress {
            disks_ready: true,
            passes,
            link_bytes_per_s: 1_000_000,
            rtt_ms: 40,
            wire_per_guest_ppm: 500_000,
            ..Progress::default()
        };
        self.act(i, |core, now| core.happened(now, id, Happened::Progress(figures)));
        let start = self.nodes[i].start;
        self.at(150, Event::Figures(i, start, id));
    }

    fn stream(&mut self, at: usize, id: MigrationId, until: Time, content: u64) {
        let Some((vm, to)) = self.nodes[at].sending.get(&id).copied() else { return };
        let start = self.nodes[at].start;
        let cut = self.cut.contains(&(at, to)) || self.cut.contains(&(to, at));
        if cut && self.now < until {
            return self.at(200, Event::Stream { at, start, id, until, content });
        }
        let session = self.nodes[to].receiving.get(&id).copied().filter(|_| !cut);
        let waits = |c: &CopyId| self.copies.get(c).is_some_and(|c| c.qemu == Qemu::Loading);
        let Some(copy) = session.filter(waits) else {
            return self.tell(at, id, Happened::TransferFailed("no connection".into()));
        };
        if self.chance(self.faults.fail) {
            return self.tell(to, id, Happened::TransferFailed("digests differ".into()));
        }
        let (start, ms) = (self.nodes[to].start, 1 + self.below(60));
        self.at(ms, Event::Load(to, start, id, copy, content));
        // The last byte arrived; that it did is not heard.
        if self.mutant == Mutant::LostReply && self.chance(self.faults.loss) {
            let stopped = |c: &Copy| c.vm == vm && c.at == at && c.qemu == Qemu::Stopped;
            let copy = self.copies.iter().find(|(_, c)| stopped(c)).map(|(id, _)| *id);
            copy.into_iter().for_each(|id| self.run_copy(id));
        }
    }

    fn load(&mut self, i: usize, id: MigrationId, copy: CopyId, content: u64) {
        let session = self.nodes[i].receiving.get(&id) == Some(&copy);
        let Some(c) = self.copies.get_mut(&copy) else { return };
        if !session || c.qemu != Qemu::Loading {
            return;
        }
        (c.qemu, c.stored, c.content) = (Qemu::Loaded, true, content);
        if self.mutant == Mutant::ContEarly {
            self.run_copy(copy);
        }
        if !self.step(i) {
            self.tell(i, id, Happened::Loaded(copy));
        }
    }
}
