//! What this host can produce by chunk id: files that were named, memory of its VMs, and what a
//! running migration has brought.
//!
//! Owns the index in memory (12.3 bytes a distinct non-zero page and as much an extent of 16,
//! bounded) and its handles on the sources. Never holds content and never promises: sources change under us, so a chunk is read by
//! copying, the copy is hashed, and only a copy whose whole id is right is given out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use dashmap::DashMap;
use godwit_protocol::chunk::{ChunkKey, EXTENT_CHUNKS};
use godwit_protocol::id::{ChunkId, CopyId};
use godwit_protocol::limits::CHUNK_BYTES;

use super::index::{Index, SourceIndex, key_of};
use super::pace::Pace;
pub use super::scan::EXTENT_BYTES;
use super::scan::{self, ScanError};
use super::source::ReadAt;

/// Most sources at once.
pub const SOURCES: usize = 256;
/// Default bound of the index, distinct pages: 64 GiB of content in 200 MB.
pub const INDEX_PAGES: usize = 16 << 20;
/// Most chunks that migrations may announce with [`Corpus::learn`]: 4 GiB of content.
pub const LEARNED: usize = 1 << 20;

/// One source, as long as this process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(u32);

/// Why a source is not in the corpus. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// The source cannot be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The index is bounded.
    #[error("the index is full: it holds {held} pages and has room for {limit}")]
    Full {
        /// Distinct pages that it holds.
        held: usize,
        /// Its bound.
        limit: usize,
    },
    /// Too many sources.
    #[error("there are already {SOURCES} sources")]
    Sources,
    /// Removed meanwhile.
    #[error("the source was removed")]
    Gone,
    /// The daemon is about to end.
    #[error("stopped")]
    Stopped,
}

struct Source {
    content: Arc<dyn ReadAt>,
    /// The copy whose memory it is.
    copy: Option<CopyId>,
    index: RwLock<Arc<SourceIndex>>,
}

impl Source {
    fn index(&self) -> Arc<SourceIndex> {
        Arc::clone(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The corpus of a host. Shared by reference; look-ups run at the same time as scans.
pub struct Corpus {
    key: ChunkKey,
    pages_max: usize,
    /// Distinct pages in all indexes.
    pages: AtomicUsize,
    next: AtomicU32,
    sources: RwLock<BTreeMap<u32, Arc<Source>>>,
    /// What migrations announced: written by those who place pages while others look up.
    learned: DashMap<u64, (u32, u32)>,
}

impl std::fmt::Debug for Corpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Corpus").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl Corpus {
    /// An empty corpus under the swarm's chunk key, for at most `pages_max` distinct pages.
    #[must_use]
    pub fn new(key: [u8; 32], pages_max: usize) -> Self {
        Self {
            key: ChunkKey(key),
            pages_max,
            pages: AtomicUsize::new(0),
            next: AtomicU32::new(1),
            sources: RwLock::new(BTreeMap::new()),
            learned: DashMap::new(),
        }
    }

    /// Adds a file and indexes it now (blocks: about a second for a GiB of content).
    ///
    /// # Errors
    /// [`CorpusError`]; nothing was added.
    pub fn add_file(&self, file: File) -> Result<SourceId, CorpusError> {
        let id = self.add_memory(Arc::new(file))?;
        self.scan(id).inspect_err(|_| self.remove(id))?;
        Ok(id)
    }

    /// Adds memory without reading it: [`Corpus::scan`] it when a migration is prepared, or
    /// [`Corpus::learn`] what is placed into it.
    ///
    /// # Errors
    /// [`CorpusError::Sources`].
    pub fn add_memory(&self, content: Arc<dyn ReadAt>) -> Result<SourceId, CorpusError> {
        self.add(content, None)
    }

    fn add(&self, content: Arc<dyn ReadAt>, copy: Option<CopyId>) -> Result<SourceId, CorpusError> {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        if sources.len() >= SOURCES {
            return Err(CorpusError::Sources);
        }
        let id = self.next.fetch_add(1, Relaxed);
        sources.insert(id, Arc::new(Source { content, copy, index: RwLock::default() }));
        Ok(SourceId(id))
    }

    /// Indexes the memory of a copy as it is now (blocks) and answers with its distinct non-zero
    /// pages: a copy is one source, however often a migration is prepared.
    ///
    /// # Errors
    /// [`CorpusError`]; an older index of the copy stays.
    pub fn index_memory(
        &self,
        copy: CopyId,
        content: Arc<dyn ReadAt>,
    ) -> Result<usize, CorpusError> {
        let id = match self.memory_of(copy) {
            Some(id) => id,
            None => self.add(content, Some(copy))?,
        };
        self.scan(id)
    }

    /// Forgets the memory of a copy, if it is a source: the corpus would keep it alive.
    pub fn forget_memory(&self, copy: CopyId) {
        while let Some(id) = self.memory_of(copy) {
            self.remove(id);
        }
    }

    fn memory_of(&self, copy: CopyId) -> Option<SourceId> {
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        sources.iter().find(|(_, s)| s.copy == Some(copy)).map(|(id, _)| SourceId(*id))
    }

    /// Indexes a source as it is now (blocks) and answers with its distinct non-zero pages. The
    /// older index serves look-ups meanwhile, and stays if this fails.
    ///
    /// # Errors
    /// [`CorpusError`].
    pub fn scan(&self, id: SourceId) -> Result<usize, CorpusError> {
        let (index, _) = self.index_of(id, &Pace::free(), false)?;
        self.install(id, index)
    }

    /// Reads a source at a pace: its index, and the digest of all its bytes if asked for.
    pub(super) fn index_of(
        &self,
        id: SourceId,
        pace: &Pace,
        digest: bool,
    ) -> Result<(Arc<SourceIndex>, Option<[u8; 32]>), CorpusError> {
        let source = self.source(id.0).ok_or(CorpusError::Gone)?;
        let room = self.room(source.index().chunks.len());
        let found = scan::scan(&*source.content, &self.key, room, pace, digest);
        let found = found.map_err(|e| match e {
            ScanError::Io(e) => CorpusError::Io(e),
            ScanError::TooMany => self.full(self.pages_max - room),
            ScanError::Stopped => CorpusError::Stopped,
        })?;
        let index = SourceIndex {
            chunks: Index::build(found.chunks),
            extents: Index::build(found.extents),
        };
        Ok((Arc::new(index), found.digest))
    }

    /// Puts an index in the place of a source's older one.
    pub(super) fn install(
        &self,
        id: SourceId,
        index: Arc<SourceIndex>,
    ) -> Result<usize, CorpusError> {
        let pages = index.chunks.len();
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        let source = sources.get(&id.0).ok_or(CorpusError::Gone)?;
        let mut place = source.index.write().unwrap_or_else(PoisonError::into_inner);
        let room = self.room(place.chunks.len());
        if pages > room {
            return Err(self.full(self.pages_max - room));
        }
        self.pages.fetch_add(pages, Relaxed);
        self.pages.fetch_sub(place.chunks.len(), Relaxed);
        *place = index;
        Ok(pages)
    }

    /// Pages that a source may have which now has `old`.
    pub(super) fn room(&self, old: usize) -> usize {
        let held = self.pages.load(Relaxed).saturating_sub(old);
        self.pages_max.saturating_sub(held)
    }

    fn full(&self, held: usize) -> CorpusError {
        CorpusError::Full { held, limit: self.pages_max }
    }

    /// Forgets a source and what was learned of it.
    pub fn remove(&self, id: SourceId) {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.remove(&id.0) {
            self.pages.fetch_sub(source.index().chunks.len(), Relaxed);
            drop(sources);
            self.learned.retain(|_, (source, _)| *source != id.0);
        }
    }

    /// Says that page `page` of a source now holds `chunk`. Dropped when [`LEARNED`] are known.
    pub fn learn(&self, id: SourceId, chunk: &ChunkId, page: u32) {
        if self.learned.len() < LEARNED {
            self.learned.insert(key_of(chunk), (id.0, page));
        }
    }

    /// Whether the chunk can probably be produced. Only [`Corpus::read`] makes it sure.
    #[must_use]
    pub fn has(&self, chunk: &ChunkId) -> bool {
        let key = key_of(chunk);
        self.learned.contains_key(&key) || self.any(|index| index.chunks.find(key).is_some())
    }

    /// Whether the extent can probably be produced. Only [`Corpus::read_extent`] makes it sure.
    #[must_use]
    pub fn has_extent(&self, extent: &ChunkId) -> bool {
        let key = key_of(extent);
        self.any(|index| index.extents.find(key).is_some())
    }

    fn any(&self, has: impl Fn(&SourceIndex) -> bool) -> bool {
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        sources.values().any(|source| has(&source.index()))
    }

    /// Every source that has what `find` looks for, and where.
    fn places(&self, find: impl Fn(&SourceIndex) -> Option<u32>) -> Vec<(Arc<Source>, u32)> {
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        let place = |s: &Arc<Source>| find(&s.index()).map(|at| (Arc::clone(s), at));
        sources.values().filter_map(place).collect()
    }

    /// Copies the chunk into `into` if some source still has it; the copy's whole id was compared.
    /// On `false` the content of `into` is undefined.
    #[must_use]
    pub fn read(&self, chunk: &ChunkId, into: &mut [u8; CHUNK_BYTES]) -> bool {
        let key = key_of(chunk);
        let learned = self.learned.get(&key).map(|place| *place);
        if let Some((source, page)) = learned
            && let Some(source) = self.source(source)
            && self.verified(&*source.content, page, chunk, into)
        {
            return true;
        }
        let found = self.places(|index| index.chunks.find(key));
        found.iter().any(|(source, page)| self.verified(&*source.content, *page, chunk, into))
    }

    /// Copies the 64 KiB of an extent into `into` if some source still has it, and answers with the
    /// ids of its chunks as they are in the copy; the copy's extent id was compared. None: no source
    /// has it (any more); then the content of `into` is undefined.
    #[must_use]
    pub fn read_extent(
        &self,
        extent: &ChunkId,
        into: &mut [u8; EXTENT_BYTES],
    ) -> Option<[ChunkId; EXTENT_CHUNKS]> {
        let key = key_of(extent);
        let found = self.places(|index| index.extents.find(key));
        let zero = self.key.zero_id();
        found.iter().find_map(|(source, number)| {
            let offset = u64::from(*number) * EXTENT_BYTES as u64;
            source.content.read_exact_at(into, offset).ok()?;
            let mut ids = [zero; EXTENT_CHUNKS];
            for (chunk, id) in into.chunks_exact(CHUNK_BYTES).zip(&mut ids) {
                if !scan::is_zero(chunk) {
                    *id = self.key.id(chunk);
                }
            }
            (self.key.extent_id(&ids) == *extent).then_some(ids)
        })
    }

    /// The id of a chunk under the swarm's key.
    #[must_use]
    pub fn id_of(&self, chunk: &[u8; CHUNK_BYTES]) -> ChunkId {
        self.key.id(chunk)
    }

    /// Distinct pages of one source.
    #[must_use]
    pub fn pages_of(&self, id: SourceId) -> usize {
        self.source(id.0).map_or(0, |s| s.index().chunks.len())
    }

    /// Distinct pages in the index, and the bytes of memory that it takes.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        let bytes: usize = sources.values().map(|s| s.index().bytes()).sum();
        (self.pages.load(Relaxed), bytes + self.learned.capacity() * 24)
    }

    /// The key under which all ids of this corpus are made.
    pub(super) fn key(&self) -> &ChunkKey {
        &self.key
    }

    fn source(&self, id: u32) -> Option<Arc<Source>> {
        self.sources.read().unwrap_or_else(PoisonError::into_inner).get(&id).map(Arc::clone)
    }

    fn verified(
        &self,
        content: &dyn ReadAt,
        page: u32,
        chunk: &ChunkId,
        into: &mut [u8; CHUNK_BYTES],
    ) -> bool {
        let offset = u64::from(page) * CHUNK_BYTES as u64;
        content.read_exact_at(into, offset).is_ok() && self.id_of(into) == *chunk
    }
}

#[cfg(test)]
#[path = "corpus_tests.rs"]
mod tests;
