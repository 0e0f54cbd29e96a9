//! What this host can produce by chunk id: files that were named, memory of its VMs, and what a
//! running migration has brought.
//!
//! Owns the index in memory (12.3 bytes a distinct non-zero page, bounded) and its handles on the
//! sources. Never holds content and never promises: sources change under us, so a chunk is read by
//! copying, the copy is hashed, and only a copy whose whole id is right is given out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use dashmap::DashMap;
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::CHUNK_BYTES;

use super::index::{Index, key_of};
use super::scan::{self, ScanError};

/// Most sources at once.
pub const SOURCES: usize = 256;
/// Default bound of the index, distinct pages: 64 GiB of content in 200 MB.
pub const INDEX_PAGES: usize = 16 << 20;
/// Most chunks that migrations may announce with [`Corpus::learn`]: 4 GiB of content.
pub const LEARNED: usize = 1 << 20;

/// Something whose bytes can be read at any offset while others change them.
pub trait ReadAt: Send + Sync {
    /// Its length now, bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset`, by copying.
    ///
    /// # Errors
    /// If not all bytes are there.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The first range at or after `offset` that is no hole; none: only holes follow.
    ///
    /// # Errors
    /// If the source cannot be asked.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
}

impl ReadAt for File {
    fn len(&self) -> u64 {
        self.metadata().map_or(0, |m| m.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let seek = |from: u64, whence| -> io::Result<Option<u64>> {
            let from = i64::try_from(from).map_err(io::Error::other)?;
            // SAFETY: plain system call on a descriptor that `self` keeps open. It moves the file
            // position, which nothing here uses: all reads name their offset.
            let at = unsafe { libc::lseek(self.as_raw_fd(), from, whence) };
            match u64::try_from(at) {
                Ok(at) => Ok(Some(at)),
                Err(_) => match io::Error::last_os_error() {
                    e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                    e => Err(e),
                },
            }
        };
        let Some(start) = seek(offset, libc::SEEK_DATA)? else { return Ok(None) };
        let end = seek(start, libc::SEEK_HOLE)?.unwrap_or_else(|| ReadAt::len(self));
        // The file may have been cut between the two calls.
        Ok((start < end).then_some(start..end))
    }
}

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
}

struct Source {
    content: Arc<dyn ReadAt>,
    index: RwLock<Arc<Index>>,
}

impl Source {
    fn index(&self) -> Arc<Index> {
        Arc::clone(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The corpus of a host. Shared by reference; look-ups run at the same time as scans.
pub struct Corpus {
    key: [u8; 32],
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
            key,
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
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        if sources.len() >= SOURCES {
            return Err(CorpusError::Sources);
        }
        let id = self.next.fetch_add(1, Relaxed);
        sources.insert(id, Arc::new(Source { content, index: RwLock::default() }));
        Ok(SourceId(id))
    }

    /// Indexes a source as it is now (blocks) and answers with its distinct non-zero pages. The
    /// older index serves look-ups meanwhile, and stays if this fails.
    ///
    /// # Errors
    /// [`CorpusError`].
    pub fn scan(&self, id: SourceId) -> Result<usize, CorpusError> {
        let source = self.source(id.0).ok_or(CorpusError::Gone)?;
        let old = source.index().len();
        let room = self.pages_max.saturating_sub(self.pages.load(Relaxed)) + old;
        let pairs = scan::scan(&*source.content, &self.key, room).map_err(|e| match e {
            ScanError::Io(e) => CorpusError::Io(e),
            ScanError::TooMany => {
                CorpusError::Full { held: self.pages.load(Relaxed) - old, limit: self.pages_max }
            }
        })?;
        let index = Arc::new(Index::build(pairs));
        let pages = index.len();
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        if !sources.contains_key(&id.0) {
            return Err(CorpusError::Gone);
        }
        let mut place = source.index.write().unwrap_or_else(PoisonError::into_inner);
        self.pages.fetch_add(pages, Relaxed);
        self.pages.fetch_sub(place.len(), Relaxed);
        *place = index;
        Ok(pages)
    }

    /// Forgets a source and what was learned of it.
    pub fn remove(&self, id: SourceId) {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.remove(&id.0) {
            self.pages.fetch_sub(source.index().len(), Relaxed);
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
        self.learned.contains_key(&key)
            || self
                .sources
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .values()
                .any(|source| source.index().find(key).is_some())
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
        let found: Vec<_> = {
            let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
            let place = |s: &Arc<Source>| s.index().find(key).map(|page| (Arc::clone(s), page));
            sources.values().filter_map(place).collect()
        };
        found.iter().any(|(source, page)| self.verified(&*source.content, *page, chunk, into))
    }

    /// The id of a chunk under the swarm's key.
    #[must_use]
    pub fn id_of(&self, chunk: &[u8; CHUNK_BYTES]) -> ChunkId {
        scan::chunk_id(&self.key, chunk)
    }

    /// Distinct pages of one source.
    #[must_use]
    pub fn pages_of(&self, id: SourceId) -> usize {
        self.source(id.0).map_or(0, |s| s.index().len())
    }

    /// Distinct pages in the index, and the bytes of memory that it takes.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        let bytes: usize = sources.values().map(|s| s.index().bytes()).sum();
        (self.pages.load(Relaxed), bytes + self.learned.capacity() * 24)
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
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    const KEY: [u8; 32] = [7; 32];

    fn page(n: u32) -> [u8; CHUNK_BYTES] {
        let mut page = [0_u8; CHUNK_BYTES];
        for (i, word) in page.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&(n.wrapping_mul(2_654_435_761) ^ i as u32).to_le_bytes());
        }
        page
    }

    /// 40 MiB with data at both ends, across a segment's border, and a cut tail.
    fn file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        for n in [0_u32, 1, 4095, 4096, 10_000, 10_001] {
            file.seek(SeekFrom::Start(u64::from(n) * 4096)).unwrap();
            file.write_all(&page(n)).unwrap();
        }
        file.write_all(b"less than a chunk").unwrap();
        file
    }

    fn reads(corpus: &Corpus, n: u32) -> bool {
        let mut out = [0_u8; CHUNK_BYTES];
        let got = corpus.read(&corpus.id_of(&page(n)), &mut out);
        if got {
            assert_eq!(out, page(n), "page {n}");
        }
        got
    }

    #[test]
    fn indexes_data_and_skips_holes_and_tails() {
        let corpus = Corpus::new(KEY, 1000);
        let id = corpus.add_file(file()).unwrap();
        assert_eq!(corpus.size().0, 6);
        assert!([0, 1, 4095, 4096, 10_000, 10_001].iter().all(|n| reads(&corpus, *n)));
        assert!(!reads(&corpus, 2));
        assert!(!corpus.has(&corpus.id_of(&[0; CHUNK_BYTES])));
        corpus.remove(id);
        assert!(!reads(&corpus, 0));
        assert_eq!(corpus.size().0, 0);
    }

    #[test]
    fn a_changed_page_is_never_given_out() {
        let file = Arc::new(file());
        let corpus = Corpus::new(KEY, 1000);
        let id = corpus.add_memory(Arc::clone(&file) as Arc<dyn ReadAt>).unwrap();
        assert!(!reads(&corpus, 1));
        assert_eq!(corpus.scan(id).unwrap(), 6);
        FileExt::write_all_at(&*file, &page(77), 4096).unwrap();
        assert!(corpus.has(&corpus.id_of(&page(1))));
        assert!(!reads(&corpus, 1));
        assert!(!reads(&corpus, 77));
        assert_eq!(corpus.scan(id).unwrap(), 6);
        assert!(reads(&corpus, 77));
        file.set_len(0).unwrap();
        assert!(!reads(&corpus, 77));
    }

    #[test]
    fn a_second_source_stands_in_and_learned_chunks_are_found() {
        let corpus = Corpus::new(KEY, 1000);
        let first = Arc::new(file());
        let a = corpus.add_memory(Arc::clone(&first) as Arc<dyn ReadAt>).unwrap();
        corpus.scan(a).unwrap();
        corpus.add_file(file()).unwrap();
        FileExt::write_all_at(&*first, &page(500), 0).unwrap();
        assert!(reads(&corpus, 0), "from the second file");
        assert!(!reads(&corpus, 500));
        corpus.learn(a, &corpus.id_of(&page(500)), 0);
        assert!(reads(&corpus, 500));
        corpus.remove(a);
        assert!(!reads(&corpus, 500));
    }

    #[test]
    fn the_index_is_bounded() {
        let corpus = Corpus::new(KEY, 8);
        corpus.add_file(file()).unwrap();
        assert!(matches!(corpus.add_file(file()), Err(CorpusError::Full { held: 6, limit: 8 })));
        assert_eq!(corpus.size().0, 6);
    }

    #[test]
    fn another_swarms_key_gives_other_ids() {
        let ours = Corpus::new(KEY, 8);
        let theirs = Corpus::new([8; 32], 8);
        assert_ne!(ours.id_of(&page(1)), theirs.id_of(&page(1)));
    }
}
