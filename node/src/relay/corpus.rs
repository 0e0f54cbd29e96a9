//! What this host can produce by chunk id. Owns the trait; the store implements it.

use std::collections::HashMap;

use godwit_protocol::chunk::{ChunkKey, EXTENT_CHUNKS, Page};
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::CHUNK_BYTES;

/// Contents by id: image files, the memory of other VMs, a cache.
pub trait Corpus: Send + Sync {
    /// For each id whether it can probably be produced (cheap: an index look-up).
    fn has(&self, ids: &[ChunkId]) -> Vec<bool>;

    /// Copies the content into `page`; false: not (or no longer) there. The caller verifies the
    /// copy, because what lies behind the index may have changed.
    fn read(&self, id: &ChunkId, page: &mut Page) -> bool;

    /// Copies a whole extent into `extent` and answers the ids of its pages, which were compared.
    fn read_extent(&self, id: &ChunkId, extent: &mut Extent) -> Option<[ChunkId; EXTENT_CHUNKS]>;

    /// These contents are now in those pages of what this session fills: others may use them.
    fn learn(&self, _contents: &[(u32, ChunkId)]) {}
}

/// The bytes of one extent.
pub type Extent = [u8; EXTENT_CHUNKS * CHUNK_BYTES];

/// Knows nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct EmptyCorpus;

impl Corpus for EmptyCorpus {
    fn has(&self, ids: &[ChunkId]) -> Vec<bool> {
        vec![false; ids.len()]
    }

    fn read(&self, _: &ChunkId, _: &mut Page) -> bool {
        false
    }

    fn read_extent(&self, _: &ChunkId, _: &mut Extent) -> Option<[ChunkId; EXTENT_CHUNKS]> {
        None
    }
}

/// Pages held in memory: for tests.
#[derive(Debug, Default, Clone)]
pub struct MemoryCorpus {
    pages: HashMap<ChunkId, Box<Page>>,
    extents: HashMap<ChunkId, [ChunkId; EXTENT_CHUNKS]>,
}

impl MemoryCorpus {
    /// Adds a page under its id.
    pub fn add(&mut self, key: &ChunkKey, page: &Page) {
        self.pages.insert(key.id(page), Box::new(*page));
    }

    /// Adds an extent and its pages.
    pub fn add_extent(&mut self, key: &ChunkKey, extent: &Extent) {
        let pages = extent.as_chunks::<CHUNK_BYTES>().0;
        let ids = std::array::from_fn(|at| key.id(&pages[at]));
        pages.iter().for_each(|page| self.add(key, page));
        self.extents.insert(key.extent_id(&ids), ids);
    }

    /// Adds a page under an id that is not its own: what a changed image file looks like.
    pub fn add_wrong(&mut self, id: ChunkId, page: &Page) {
        self.pages.insert(id, Box::new(*page));
    }
}

impl Corpus for MemoryCorpus {
    fn has(&self, ids: &[ChunkId]) -> Vec<bool> {
        ids.iter().map(|id| self.pages.contains_key(id)).collect()
    }

    fn read(&self, id: &ChunkId, page: &mut Page) -> bool {
        self.pages.get(id).is_some_and(|found| {
            page.copy_from_slice(found.as_slice());
            true
        })
    }

    fn read_extent(&self, id: &ChunkId, extent: &mut Extent) -> Option<[ChunkId; EXTENT_CHUNKS]> {
        let ids = self.extents.get(id)?;
        let pages = extent.as_chunks_mut::<CHUNK_BYTES>().0.iter_mut();
        ids.iter().zip(pages).all(|(id, page)| self.read(id, page)).then_some(*ids)
    }
}
