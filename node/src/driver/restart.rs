//! Starting the daemon: opens everything, finds the copies that outlived the last one.
//!
//! Owns the order of start. Invariant: before the core runs, every living copy of this host is in
//! the table, or was ended because no record can name it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use godwit_protocol::core::{Config, Core};
use godwit_protocol::epoch::Hard as Votes;
use godwit_protocol::id::{CopyId, StoreId, VmId};
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::migrate::{Moving, Role};
use godwit_protocol::wire::codec;
use godwit_protocol::wire::migrate::Status;
use serde::de::DeserializeOwned;
use tokio::sync::{broadcast, mpsc};
use tokio::time::Instant;

use super::asks::Asks;
use super::copies::{Copies, Copy};
use super::engine::INPUTS;
use super::node::{DriverError, Input, Node, RunOptions, random, wall_us};
use super::{answers, boot, bulk, wires};
use crate::link::{self, Links};
use crate::net::{Net, NetConfig, NetEvent};
use crate::store::{Corpus, Hard, Images};
use crate::vmm::{Adoption, HostCaps, Qemu, copy_dirs, kill_copy};

/// Pages that the index of known content may hold: 64 GiB of images.
const CORPUS_PAGES: usize = 16 << 20;
/// Statuses that a slow listener may lag behind.
const STATUSES: usize = 256;

/// Tasks that end with the engine.
pub(super) struct Background(Vec<tokio::task::JoinHandle<()>>);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

pub(super) struct Started {
    pub node: Arc<Node>,
    pub core: Core,
    pub inputs: mpsc::Receiver<Input>,
    pub net_events: mpsc::Receiver<NetEvent>,
    pub background: Background,
}

struct Saved {
    votes: BTreeMap<VmId, Votes>,
    moving: Vec<Moving>,
    statuses: Vec<Status>,
}

pub(super) async fn start(options: RunOptions) -> Result<Started, DriverError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(DriverError(
            "godwit run needs root (taps, bridges, guest memory): run it with sudo".into(),
        ));
    }
    let hard = Arc::new(Hard::open(&options.state).map_err(DriverError::of)?);
    let saved = read_saved(&hard)?;
    let caps = HostCaps::probe(&options.qemu).await.map_err(DriverError::of)?;
    if let Err(refusal) = caps.check_migration() {
        tracing::warn!(%refusal, "this host takes no part in moves");
    }
    let config = NetConfig {
        advertise: options.advertise,
        store: Some(hard.id()),
        ..NetConfig::new(options.state.clone(), options.listen)
    };
    let Net { handle: net, events: net_events, bulk, bulk_inbound, frames, frames_inbound } =
        Net::start(config).await.map_err(DriverError::of)?;
    let me = net.member(net.me()).ok_or_else(|| DriverError("not a member".into()))?;
    let underlay = options.advertise.unwrap_or(options.listen);
    let (links, tunnel_out) = Links::start(link::Config {
        underlay: underlay.ip(),
        trusted_lan: options.trusted_lan.clone(),
        mtu: link::DEFAULT_MTU,
    })
    .map_err(DriverError::of)?;
    let chunk_key = net.chunk_key();
    let corpus = Arc::new(Corpus::new(chunk_key, CORPUS_PAGES));
    let images =
        Arc::new(Images::open(Arc::clone(&hard), Arc::clone(&corpus)).map_err(DriverError::of)?);
    let (inputs_in, inputs) = mpsc::channel(INPUTS);
    let memory_limit = match options.memory_limit {
        Some(limit) => limit,
        None => host_memory()?,
    };
    let node = Arc::new(Node {
        me: me.host,
        name: me.name,
        site: me.site,
        bulk,
        frames,
        wires: Mutex::default(),
        memory_limit,
        caps,
        hard,
        links,
        corpus,
        images,
        chunk_key,
        copies: Copies::default(),
        asks: Asks::default(),
        receiving: Mutex::default(),
        statuses: broadcast::channel(STATUSES).0,
        inputs: inputs_in,
        started: Instant::now(),
        net,
        options,
    });
    let core = adopt(&node, saved).await?;
    let refresh = Arc::clone(&node.images);
    let indexing = tokio::task::spawn_blocking(move || refresh.refresh());
    let mut background = vec![
        tokio::spawn(async move { drop(indexing.await) }),
        bulk::accept(&node, bulk_inbound),
        wires::shuttle_out(&node, tunnel_out),
        wires::shuttle_in(&node, frames_inbound),
    ];
    background.push(answers::serve(&node)?);
    Ok(Started { node, core, inputs, net_events, background: Background(background) })
}

fn host_memory() -> Result<u64, DriverError> {
    let info = std::fs::read_to_string("/proc/meminfo").map_err(DriverError::of)?;
    let kib: u64 = info
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:"))
        .and_then(|v| v.trim().trim_end_matches("kB").trim().parse().ok())
        .ok_or_else(|| DriverError("cannot read MemTotal: give --memory-limit".into()))?;
    Ok(kib * 1024 / 10 * 9)
}

fn read<T: DeserializeOwned>(hard: &Hard, prefix: &[u8]) -> Result<Vec<T>, DriverError> {
    let entries = hard.scan(prefix).map_err(DriverError::of)?;
    let decode = |value: &[u8]| codec::decode::<T, CONTROL_MESSAGE_BYTES>(value);
    entries
        .iter()
        .map(|(_, value)| decode(value))
        .collect::<Result<_, _>>()
        .map_err(|e| DriverError(format!("hard state is damaged ({e}): see docs/operations.md")))
}

fn read_saved(hard: &Hard) -> Result<Saved, DriverError> {
    let votes: Vec<Votes> = read(hard, b"epoch/")?;
    Ok(Saved {
        votes: votes.into_iter().map(|v| (v.decided().cluster, v)).collect(),
        moving: read(hard, b"moving/")?,
        statuses: read(hard, b"status/")?,
    })
}

/// Finds living copies and gives them to the core as what they are: bound, running, or superseded.
async fn adopt(node: &Arc<Node>, saved: Saved) -> Result<Core, DriverError> {
    let mut living: BTreeMap<CopyId, Arc<Copy>> = BTreeMap::new();
    for dir in copy_dirs(&node.vm_dir()).map_err(DriverError::of)? {
        match Qemu::readopt(&dir).await {
            Ok(Adoption::Alive(qemu)) => {
                let id = qemu.copy();
                let moving = saved.moving.iter().find(|m| m.copy == id);
                let ran = moving.is_none_or(|m| m.role == Role::Source || m.started);
                living.insert(id, Arc::new(Copy::new(qemu, ran)));
            }
            Ok(Adoption::Gone(record)) => {
                let bound = saved.moving.iter().any(|m| m.copy == record.copy);
                tracing::warn!(vm = %record.spec.name, copy = %record.copy, bound, "its QEMU is gone");
                if !bound {
                    remove(&dir);
                }
            }
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "cannot take the copy up: ending it");
                kill_copy(&dir).await.map_err(DriverError::of)?;
                remove(&dir);
            }
        }
    }
    let named = |copy: &Copy| {
        let record = saved.votes.get(&copy.vm()).map(Votes::decided);
        record.is_some_and(|r| r.names(copy.vm(), node.me, copy.id))
    };
    let bound = |id: CopyId| saved.moving.iter().any(|m| m.copy == id);
    for (id, copy) in &living {
        if !bound(*id) && !named(copy) {
            tracing::info!(vm = %copy.spec.name, copy = %id, "superseded: ending it");
            copy.qemu().kill().await.map_err(DriverError::of)?;
            remove(&copy.dir);
        }
    }
    living.retain(|id, copy| bound(*id) || named(copy));
    let mut moving = Vec::new();
    for m in &saved.moving {
        let present = match living.get(&m.copy) {
            Some(copy) => copy.qemu().run_state().await.is_ok_and(|s| s.status != "inmigrate"),
            None => false,
        };
        moving.push((m.clone(), present));
    }
    for copy in living.values() {
        node.copies.insert(Arc::clone(copy));
        wires::adopt(node, copy).await;
    }
    let seed = u64::from_le_bytes(random().map_err(DriverError::of)?);
    let unbound: Vec<_> = living.values().filter(|c| !bound(c.id)).cloned().collect();
    let epochs: BTreeMap<VmId, _> =
        saved.votes.iter().map(|(vm, v)| (*vm, v.decided().epoch)).collect();
    let mut core = Core::new(
        node.now(),
        Config {
            me: node.me,
            store: store_id(node),
            site: node.site.clone(),
            generation: wall_us() / 1_000_000,
            seed,
            hard: saved.votes,
            moving,
            statuses: saved.statuses,
        },
    );
    for copy in unbound {
        // A record names it and no move binds it: it runs, or was about to.
        copy.will_run();
        if let Err(error) = copy.qemu().cont().await {
            tracing::error!(vm = %copy.spec.name, %error, "cannot run it");
        }
        let epoch = epochs.get(&copy.vm()).copied().unwrap_or_default();
        core.runs(node.now(), copy.vm(), copy.id, boot::route(node, &copy, epoch));
    }
    for copy in living.values() {
        boot::watch(node, copy);
    }
    Ok(core)
}

fn store_id(node: &Node) -> StoreId {
    node.hard.id()
}

fn remove(dir: &std::path::Path) {
    if let Err(error) = std::fs::remove_dir_all(dir) {
        tracing::warn!(dir = %dir.display(), %error, "not removed");
    }
}
