//! What crosses the network is what the far end does not have: the pure half of the exchange.
//!
//! Owns chunk ids, the coding of page lists, the digest and the reading of QEMU's stream. Never
//! reads a socket or compresses: the node's relay feeds it slices and acts on what comes out.

pub mod digest;
pub mod extent;
pub mod layout;
pub mod pages;
pub mod qemu;

use xxhash_rust::xxh3::xxh3_128;

use crate::id::ChunkId;
use crate::limits::CHUNK_BYTES;
pub use crate::wire::bulk::Sum;

/// The bytes of one page.
pub type Page = [u8; CHUNK_BYTES];

/// Chunks of an extent: 64 KiB, aligned at a multiple of that.
pub const EXTENT_CHUNKS: usize = 16;

/// A page of zeros.
pub const ZERO_PAGE: Page = [0; CHUNK_BYTES];

/// The swarm's secret for naming chunks: an outsider cannot test whether a host holds a content.
#[derive(Clone, PartialEq, Eq)]
pub struct ChunkKey(pub [u8; 32]);

impl ChunkKey {
    /// The id of `content` (a page or an aligned disk block of 4096 bytes).
    #[must_use]
    pub fn id(&self, content: &[u8]) -> ChunkId {
        let hash = blake3::keyed_hash(&self.0, content);
        let mut id = [0_u8; 16];
        id.copy_from_slice(&hash.as_bytes()[..16]);
        ChunkId(id)
    }

    /// The id of an extent: the hash of the ids of its chunks in order, zero chunks by their id. It is
    /// no chunk's id by accident: a chunk is hashed from 4096 bytes, [`EXTENT_CHUNKS`] ids are 256.
    #[must_use]
    pub fn extent_id(&self, chunks: &[ChunkId]) -> ChunkId {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for chunk in chunks {
            hasher.update(&chunk.0);
        }
        let mut id = [0_u8; 16];
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        ChunkId(id)
    }

    /// The checksum of `content`.
    #[must_use]
    pub fn sum(&self, how: Sum, content: &[u8]) -> ChunkId {
        match how {
            Sum::Id => self.id(content),
            Sum::Quick => ChunkId(xxh3_128(content).to_le_bytes()),
        }
    }

    /// The id of the page of zeros, which everyone holds.
    #[must_use]
    pub fn zero_id(&self) -> ChunkId {
        self.id(&ZERO_PAGE)
    }
}

impl core::fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("ChunkKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_depend_on_key_and_content() {
        let (a, b) = (ChunkKey([1; 32]), ChunkKey([2; 32]));
        assert_eq!(a.id(&ZERO_PAGE), a.zero_id());
        assert_ne!(a.zero_id(), b.zero_id());
        assert_ne!(a.id(&[7; CHUNK_BYTES]), a.zero_id());
        assert_eq!(format!("{a:?}"), "ChunkKey(..)");
        assert_eq!(a.sum(Sum::Id, &ZERO_PAGE), a.zero_id());
        assert_ne!(a.sum(Sum::Quick, &ZERO_PAGE), a.sum(Sum::Quick, &[7; CHUNK_BYTES]));
    }

    #[test]
    fn an_extent_is_named_by_its_chunks_in_order() {
        let key = ChunkKey([1; 32]);
        let mut ids = [key.zero_id(); EXTENT_CHUNKS];
        ids[3] = key.id(&[7; CHUNK_BYTES]);
        let id = key.extent_id(&ids);
        assert_eq!(id, key.id(ids.map(|i| i.0).as_flattened()));
        assert_ne!(id, ChunkKey([2; 32]).extent_id(&ids));
        ids.swap(3, 4);
        assert_ne!(id, key.extent_id(&ids));
    }
}
