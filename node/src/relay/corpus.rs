//! What this host can produce by chunk id. Owns the trait; the store implements it.

use std::collections::HashMap;

use godwit_protocol::chunk::{ChunkKey, Page};
use godwit_protocol::id::ChunkId;

/// Contents by id: image files, the memory of other VMs, a cache.
pub trait Corpus: Send + Sync {
    /// For each id whether it can probably be produced (cheap: an index look-up).
    fn has(&self, ids: &[ChunkId]) -> Vec<bool>;

    /// Copies the content into `page`; false: not (or no longer) there. The caller verifies the
    /// copy, because what lies behind the index may have changed.
    fn read(&self, id: &ChunkId, page: &mut Page) -> bool;
}

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
}

/// Pages held in memory: for tests.
#[derive(Debug, Default, Clone)]
pub struct MemoryCorpus(HashMap<ChunkId, Box<Page>>);

impl MemoryCorpus {
    /// Adds a page under its id.
    pub fn add(&mut self, key: &ChunkKey, page: &Page) {
        self.0.insert(key.id(page), Box::new(*page));
    }

    /// Adds a page under an id that is not its own: what a changed image file looks like.
    pub fn add_wrong(&mut self, id: ChunkId, page: &Page) {
        self.0.insert(id, Box::new(*page));
    }
}

impl Corpus for MemoryCorpus {
    fn has(&self, ids: &[ChunkId]) -> Vec<bool> {
        ids.iter().map(|id| self.0.contains_key(id)).collect()
    }

    fn read(&self, id: &ChunkId, page: &mut Page) -> bool {
        self.0.get(id).is_some_and(|found| {
            page.copy_from_slice(found.as_slice());
            true
        })
    }
}
