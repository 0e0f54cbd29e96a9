//! Starting the daemon: opens the adapters, in an order that fails before anything is changed.
//!
//! Owns the order of start; what outlived the last daemon is `adopt`'s.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use godwit_protocol::core::Core;
use tokio::sync::{broadcast, mpsc};
use tokio::time::Instant;

use super::adopt::{self, Saved};
use super::asks::Asks;
use super::copies::Copies;
use super::engine::INPUTS;
use super::node::{DriverError, Input, Node, RunOptions};
use super::{answers, bulk, leave, switch, uplinks};
use crate::link::{self, Links, Outgoing};
use crate::net::{Net, NetConfig, NetEvent};
use crate::store::{Corpus, Hard, Images, Settings};
use crate::vmm::resolved::BASELINE_CPU;
use crate::vmm::{HostCaps, reserve};

/// Pages that the index of known content may hold: 64 GiB of images.
const CORPUS_PAGES: usize = 16 << 20;
/// Allocations from so many bytes on are mapped, and given back when they are freed.
const MAPPED_BYTES: i32 = 128 << 10;
/// Heaps for smaller ones.
const HEAPS: i32 = 4;
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

/// As many descriptors as this process may have: a large cluster has a stream for each disk, memory and NIC.
pub(super) fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// What is freed goes back to the system. By itself the allocator raises the size from which it does with
/// every large buffer that is freed, and keeps what was freed in up to eight heaps a processor.
pub(super) fn bound_heaps() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: plain calls on numbers; they say how later allocations are made.
        let set = unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES)
                & libc::mallopt(libc::M_ARENA_MAX, HEAPS)
        };
        if set == 0 {
            tracing::warn!("the allocator keeps what it keeps by itself");
        }
    }
}

pub(super) async fn start(options: RunOptions) -> Result<Started, DriverError> {
    let hard = Arc::new(Hard::open(&options.state).map_err(DriverError::of)?);
    let saved = Saved::read(&hard)?;
    let drained = leave::was_drained(&hard)?;
    let caps = probe(&options).await?;
    let config = NetConfig {
        advertise: options.advertise,
        store: Some(hard.id()),
        ..NetConfig::new(options.state.clone(), options.listen)
    };
    let Net { handle: net, events: net_events, bulk, bulk_inbound, frames, frames_inbound } =
        Net::start(config).await.map_err(DriverError::of)?;
    let me = net.member(net.me()).ok_or_else(|| DriverError("not a member".into()))?;
    let (links, tunnel_out) = open_links(&options)?;
    let chunk_key = net.chunk_key();
    let corpus = Arc::new(Corpus::new(chunk_key, CORPUS_PAGES));
    let images = open_images(&options, &hard, &corpus)?;
    let (inputs_in, inputs) = mpsc::channel(INPUTS);
    let node = Arc::new(Node {
        me: me.host,
        name: me.name,
        site: me.site,
        bulk,
        frames,
        wires: Mutex::default(),
        created: Mutex::default(),
        uplinks: uplinks::Uplinks::default(),
        turning: tokio::sync::Mutex::default(),
        rewiring: tokio::sync::Mutex::default(),
        decided: tokio::sync::Notify::new(),
        starts: super::on::Starts::default(),
        cutovers: super::cutover::Cutovers::default(),
        memory_limit: options.memory_limit.map_or_else(host_memory, Ok)?,
        caps,
        hard,
        links,
        corpus,
        images,
        keeping: Arc::default(),
        resting: Arc::default(),
        relaying: Arc::default(),
        chunk_key,
        copies: Copies::default(),
        asks: Asks::default(),
        draining: AtomicBool::new(drained),
        timelines: super::timeline::Timelines::default(),
        receiving: Mutex::default(),
        dialled: bulk::Dialled::default(),
        statuses: broadcast::channel(STATUSES).0,
        inputs: inputs_in,
        started: Instant::now(),
        net,
        options,
    });
    let mut core = adopt::adopt(&node, saved).await?;
    core.leaving(node.now(), drained);
    let background = vec![
        index_images(&node),
        ask_cpu_ahead(&node),
        bulk::accept(&node, bulk_inbound),
        switch::shuttle_out(&node, tunnel_out),
        switch::shuttle_in(&node, frames_inbound),
        uplinks::watch(&node),
        answers::serve(&node)?,
    ];
    Ok(Started { node, core, inputs, net_events, background: Background(background) })
}

fn open_links(options: &RunOptions) -> Result<(Links, mpsc::Receiver<Outgoing>), DriverError> {
    let config = link::Config {
        underlay: options.advertise.unwrap_or(options.listen).ip(),
        trusted_lan: options.trusted_lan.clone(),
        mtu: link::DEFAULT_MTU,
    };
    Links::start(config).map_err(DriverError::of)
}

async fn probe(options: &RunOptions) -> Result<HostCaps, DriverError> {
    let caps = HostCaps::probe(&options.qemu).await.map_err(DriverError::of)?;
    if let Err(refusal) = caps.check_migration() {
        tracing::warn!(%refusal, "this host takes no part in moves");
    }
    Ok(caps)
}

fn open_images(
    options: &RunOptions,
    hard: &Arc<Hard>,
    corpus: &Arc<Corpus>,
) -> Result<Arc<Images>, DriverError> {
    let settings = Settings {
        state: options.state.clone(),
        keep: options.keep,
        keep_bytes: options.keep_bytes,
        room: reserve::room,
    };
    let images = Images::open(Arc::clone(hard), Arc::clone(corpus), settings);
    Ok(Arc::new(images.map_err(DriverError::of)?))
}

/// Asks QEMU for the CPU that VMs have by default: a move to here need not wait for the answer.
fn ask_cpu_ahead(node: &Arc<Node>) -> tokio::task::JoinHandle<()> {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        let caps = &node.caps;
        let (Ok(accel), Ok(machine)) =
            (caps.choose_accel(node.options.accel), caps.newest_machine())
        else {
            return;
        };
        // A refusal is remembered, too, and told to whom it concerns.
        let _ = caps.check_cpu(accel, machine, BASELINE_CPU).await;
    })
}

/// Looks for files that changed while no daemon ran: they are read in the background.
fn index_images(node: &Node) -> tokio::task::JoinHandle<()> {
    let images = Arc::clone(&node.images);
    tokio::task::spawn_blocking(move || images.refresh())
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
