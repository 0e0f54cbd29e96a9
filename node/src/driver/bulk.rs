//! Between the bulk connections, the relay's sessions and the store.
//!
//! Owns the small adapters that let `relay`, `net`, `store` and `vmm` stay strangers.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_protocol::chunk::EXTENT_CHUNKS;
use godwit_protocol::id::{ChunkId, HostId, MigrationId};
use godwit_protocol::wire::migrate::{Phase, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::copies::Copy;
use super::hold;
use super::node::Node;
use crate::net::BulkStream;
use crate::relay::corpus::Extent;
use crate::relay::{Connector, Corpus as RelayCorpus, PageSink};
use crate::store::SourceId;
use crate::vmm::GuestMemory;

/// How long a new connection may take to say which migration it is for.
const HELLO: Duration = Duration::from_secs(10);
/// Connections of one migration that may wait for its session.
const WAITING: usize = 4;

/// Gives inbound bulk connections to the migrations that they name.
pub(super) fn accept(
    node: &Arc<Node>,
    mut inbound: mpsc::Receiver<(HostId, BulkStream)>,
) -> tokio::task::JoinHandle<()> {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        while let Some((from, mut stream)) = inbound.recv().await {
            let node = Arc::clone(&node);
            tokio::spawn(async move {
                let mut id = [0_u8; 16];
                let read = tokio::time::timeout(HELLO, stream.read_exact(&mut id)).await;
                if !matches!(read, Ok(Ok(_))) {
                    return;
                }
                let to = node.receiving().get(&MigrationId(id)).cloned();
                match to {
                    // A full queue: the newest connection loses, the source dials again.
                    Some(to) => drop(to.try_send(stream)),
                    None => tracing::debug!(%from, "bulk connection for no migration of this host"),
                }
            });
        }
    })
}

/// Where a migration's inbound connections come out.
pub(super) fn attach(node: &Node, id: MigrationId) -> mpsc::Receiver<BulkStream> {
    let (to, streams) = mpsc::channel(WAITING);
    node.receiving().insert(id, to);
    streams
}

/// Connections that were opened while the destination prepares, one for each migration from here.
#[derive(Default)]
pub(super) struct Dialled(Mutex<BTreeMap<MigrationId, (HostId, Dial)>>);

/// The attempt; dropping it ends it.
struct Dial(JoinHandle<Option<BulkStream>>);

impl Drop for Dial {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Dialled {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, (HostId, Dial)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dials when a migration from here begins to prepare, forgets it at the end.
    pub fn follow(&self, node: &Node, status: &Status) {
        // A cluster's own migration carries nothing: its members' do.
        let carries = status.from == node.me && status.members.is_empty();
        let Some(to) = status.to.filter(|_| carries) else { return };
        if status.phase.is_end() {
            self.lock().remove(&status.id);
        } else if status.phase == Phase::Preparing {
            let mut dialled = self.lock();
            if dialled.get(&status.id).is_none_or(|(host, _)| *host != to) {
                let bulk = node.bulk.clone();
                // Without it the session dials, and says what is wrong.
                let dial = tokio::spawn(async move { bulk.connect(to).await.ok() });
                dialled.insert(status.id, (to, Dial(dial)));
            }
        }
    }

    /// The connection to `to`, once; waits for an attempt that is under way.
    async fn take(&self, id: MigrationId, to: HostId) -> Option<BulkStream> {
        let found = self.lock().remove(&id).filter(|(host, _)| *host == to);
        let (_, mut dial) = found?;
        (&mut dial.0).await.ok().flatten()
    }
}

/// Dials the destination, as often as the session asks; the first time that may have been done ahead.
pub(super) fn connector(node: &Arc<Node>, to: HostId, id: MigrationId) -> Connector {
    let node = Arc::clone(node);
    Box::new(move || {
        let node = Arc::clone(&node);
        Box::pin(async move {
            let mut stream = match node.dialled.take(id, to).await {
                Some(stream) => stream,
                None => node.bulk.connect(to).await.map_err(io::Error::other)?,
            };
            stream.write_all(&id.0).await?;
            Ok(Box::new(stream) as _)
        })
    })
}

struct Sink {
    memory: Arc<GuestMemory>,
    /// A fault that the lab asked for: the first page written is altered.
    altered: AtomicBool,
}

/// The copy's memory as the relay writes it.
pub(super) fn sink(copy: &Copy) -> Arc<dyn PageSink> {
    let altered = AtomicBool::new(!hold::fault("alter-page"));
    Arc::new(Sink { memory: Arc::clone(&copy.memory), altered })
}

impl PageSink for Sink {
    fn write(&self, first: u32, content: &[u8]) -> io::Result<()> {
        let offset = u64::from(first) * 4096;
        if !self.altered.swap(true, Ordering::Relaxed) && !content.is_empty() {
            let mut other = content.to_vec();
            other[0] ^= 1;
            return self.memory.write_at(&other, offset).map_err(io::Error::other);
        }
        self.memory.write_at(content, offset).map_err(io::Error::other)
    }

    fn zero(&self, first: u32, count: u32) -> io::Result<()> {
        self.memory.zero_pages(u64::from(first), u64::from(count)).map_err(io::Error::other)
    }

    fn read(&self, first: u32, content: &mut [u8]) -> io::Result<()> {
        self.memory.read_at(content, u64::from(first) * 4096).map_err(io::Error::other)
    }
}

struct Known {
    corpus: Arc<crate::store::Corpus>,
    /// The memory that is being filled, as far as it is: the members of a cluster have much in common.
    filled: Option<SourceId>,
    /// Its pages; disks come behind.
    pages: u64,
}

impl Drop for Known {
    fn drop(&mut self) {
        if let Some(filled) = self.filled {
            self.corpus.remove(filled);
        }
    }
}

/// What this host can produce, for the relay; what is placed into `copy`'s memory is of use to others at
/// once.
pub(super) fn corpus(node: &Node, copy: &Copy) -> Arc<dyn RelayCorpus> {
    let corpus = Arc::clone(&node.corpus);
    let memory = Arc::new(Readable(Arc::clone(&copy.memory)));
    // Without room for one more source, nobody else profits.
    let filled = corpus.add_memory(memory).ok();
    Arc::new(Known { corpus, filled, pages: copy.memory.size() / 4096 })
}

impl RelayCorpus for Known {
    fn has(&self, ids: &[ChunkId]) -> Vec<bool> {
        ids.iter().map(|id| self.corpus.has(id)).collect()
    }

    fn read(&self, id: &ChunkId, page: &mut [u8; 4096]) -> bool {
        self.corpus.read(id, page)
    }

    fn read_extent(&self, id: &ChunkId, extent: &mut Extent) -> Option<[ChunkId; EXTENT_CHUNKS]> {
        self.corpus.read_extent(id, extent)
    }

    fn learn(&self, contents: &[(u32, ChunkId)]) {
        let Some(filled) = self.filled else { return };
        for (page, id) in contents.iter().filter(|(page, _)| u64::from(*page) < self.pages) {
            self.corpus.learn(filled, id, *page);
        }
    }
}

/// Indexes the memory of a VM of this host, for a migration that is about to come.
pub(super) fn index_memory(node: &Node, copy: &Copy) {
    let memory = Arc::new(Readable(Arc::clone(&copy.memory)));
    if let Err(error) = node.corpus.index_memory(copy.id, memory) {
        tracing::debug!(%error, "memory not indexed");
    }
    // It may have ended meanwhile: the corpus would keep its memory alive.
    if node.copies.get(copy.id).is_none() {
        node.corpus.forget_memory(copy.id);
    }
}

/// Guest memory as the store reads it.
pub(super) struct Readable(pub Arc<GuestMemory>);

impl crate::store::ReadAt for Readable {
    fn len(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset).map_err(io::Error::other)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<std::ops::Range<u64>>> {
        let pages = self.0.next_data(offset / 4096).map_err(io::Error::other)?;
        Ok(pages.map(|pages| (pages.start * 4096).max(offset)..pages.end * 4096))
    }
}

/// Writes a file that only this user may read.
pub(super) async fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = tokio::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).await?;
    file.write_all(bytes).await?;
    file.flush().await
}
