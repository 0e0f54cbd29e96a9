//! What every part of the driver shares: the adapters' handles and the way to the core.
//!
//! Owns no state of its own but the tables it names.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_protocol::core::Core;
use godwit_protocol::id::{CopyId, HostId, MigrationId, Name};
use godwit_protocol::migrate::Happened;
use godwit_protocol::time::Time;
use godwit_protocol::wire::migrate::Status;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant;

use super::asks::Asks;
use super::copies::Copies;
use crate::api::types::ApiError;
use crate::link::{Cidr, Links};
use crate::net::{Bulk, BulkStream, Frames, NetHandle};
use crate::store::{Corpus, Hard, Images};
use crate::vmm::{AccelChoice, HostCaps};

/// How the daemon is started.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The state directory.
    pub state: PathBuf,
    /// Where it listens: this port for control, the next for bulk, the one after for frames.
    pub listen: SocketAddr,
    /// Where others reach it; none: the listening address.
    pub advertise: Option<SocketAddr>,
    /// Memory for all guests, bytes; none: what the host has, less a tenth.
    pub memory_limit: Option<u64>,
    /// The QEMU to use.
    pub qemu: PathBuf,
    /// The accelerator of VMs that do not name one.
    pub accel: AccelChoice,
    /// LANs on which plain VXLAN may be used.
    pub trusted_lan: Vec<Cidr>,
    /// Where the disks of received copies are made.
    pub image_dir: PathBuf,
    /// How long disks and memory that moved away are kept.
    pub keep: Duration,
    /// How much of it, bytes on the disk.
    pub keep_bytes: u64,
}

/// Why the daemon cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DriverError(pub String);

impl DriverError {
    pub(super) fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// A piece of work on the core, and what is to be done once its commands were performed.
pub(super) type Job = Box<dyn FnOnce(&mut Core, Time) -> Box<dyn FnOnce() + Send> + Send>;

/// What reaches the engine from the rest of the driver.
pub(super) enum Input {
    /// Work on the core.
    Job(Job),
    /// Something happened to a migration.
    Happened(MigrationId, Box<Happened>),
    /// The QEMU of a copy ended.
    Gone(CopyId),
}

/// Shared by all tasks of the driver.
pub(super) struct Node {
    pub me: HostId,
    pub name: Name,
    pub site: Name,
    pub options: RunOptions,
    pub caps: HostCaps,
    pub memory_limit: u64,
    pub hard: Arc<Hard>,
    pub net: NetHandle,
    pub bulk: Bulk,
    pub links: Links,
    pub corpus: Arc<Corpus>,
    pub images: Arc<Images>,
    pub keeping: Arc<super::keeping::Keeping>,
    /// VMs of which a copy is about to be let rest.
    pub resting: Arc<super::keeping::Keeping>,
    /// What the relays of all migrations may hold together.
    pub relaying: Arc<crate::relay::Budget>,
    pub chunk_key: [u8; 32],
    pub copies: Copies,
    pub asks: Asks,
    /// This host takes no VMs: it is about to go.
    pub draining: AtomicBool,
    pub timelines: super::timeline::Timelines,
    pub wires: Mutex<super::switch::Table>,
    /// Held while a route goes into the table and the kernel.
    pub turning: tokio::sync::Mutex<()>,
    pub frames: Frames,
    /// Of wires that were created, by tag: whether their frames always travel encrypted.
    pub created: Mutex<BTreeMap<u32, bool>>,
    pub uplinks: super::uplinks::Uplinks,
    /// Held while a VM's NICs are connected otherwise.
    pub rewiring: tokio::sync::Mutex<()>,
    /// A record was decided.
    pub decided: tokio::sync::Notify,
    pub starts: super::on::Starts,
    pub cutovers: super::cutover::Cutovers,
    pub receiving: Mutex<BTreeMap<MigrationId, mpsc::Sender<BulkStream>>>,
    pub dialled: super::bulk::Dialled,
    pub statuses: broadcast::Sender<Status>,
    pub inputs: mpsc::Sender<Input>,
    pub started: Instant,
}

/// How long anything may wait for the core before something is badly wrong.
const CORE_DEADLINE: Duration = Duration::from_secs(120);

impl Node {
    /// The core's time.
    pub fn now(&self) -> Time {
        Time(u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// Works on the core; returns when all commands that came of it were performed, flushes included.
    pub async fn with_core<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Core, Time) -> R + Send + 'static,
    ) -> Result<R, ApiError> {
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move |core, now| {
            let result = work(core, now);
            Box::new(move || {
                let _ = tell.send(result);
            })
        });
        let stopping = || ApiError::plain("the daemon is stopping");
        self.inputs.send(Input::Job(job)).await.map_err(|_| stopping())?;
        match tokio::time::timeout(CORE_DEADLINE, told).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(ApiError::plain("the daemon did not get to it in time")),
        }
    }

    /// Tells a migration what happened.
    pub async fn happened(&self, id: MigrationId, happened: Happened) {
        // Fails only when the engine has ended.
        let _ = self.inputs.send(Input::Happened(id, Box::new(happened))).await;
    }

    /// Where copies live.
    pub fn vm_dir(&self) -> PathBuf {
        self.options.state.join("vm")
    }

    /// Where a copy of this host has its description, its sockets and its logs.
    pub fn dir_of(&self, copy: CopyId) -> PathBuf {
        self.vm_dir().join(copy.to_string())
    }

    /// Keeps a value in the hard state, or takes it out; durable when this returns.
    pub async fn keep(&self, key: Vec<u8>, value: Option<Vec<u8>>) -> Result<(), ApiError> {
        let hard = Arc::clone(&self.hard);
        let put = move || hard.put_many(&[(key.as_slice(), value.as_deref())]);
        let kept = tokio::task::spawn_blocking(put).await;
        kept.map_err(ApiError::plain)?.map_err(ApiError::plain)
    }

    /// The table of migrations that wait for bulk connections.
    pub fn receiving(
        &self,
    ) -> std::sync::MutexGuard<'_, BTreeMap<MigrationId, mpsc::Sender<BulkStream>>> {
        self.receiving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this host takes VMs, or is about to go.
    pub fn takes_vms(&self) -> Result<(), String> {
        if self.draining.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(format!("{} is drained: it takes no VMs (godwit drain --undo)", self.name));
        }
        Ok(())
    }

    /// The hosts that can be asked now, this one first.
    pub fn reachable(&self) -> Vec<HostId> {
        let others = self.net.members().into_iter().filter(|m| m.connected && m.host != self.me);
        std::iter::once(self.me).chain(others.map(|m| m.host)).collect()
    }

    /// The name of a member, for people.
    pub fn host_name(&self, host: HostId) -> String {
        self.net
            .members()
            .into_iter()
            .find(|m| m.host == host)
            .map_or_else(|| host.to_string()[..8].to_owned(), |m| m.name.to_string())
    }
}

/// Wall clock, microseconds since 1970.
pub(super) fn wall_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

/// Fresh random bytes of the operating system.
pub(super) fn random<const N: usize>() -> Result<[u8; N], ApiError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(ApiError::plain)?;
    Ok(bytes)
}
