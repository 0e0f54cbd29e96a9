//! What crosses the network is what the far end does not have: the pure half of the exchange.
//!
//! Owns chunk ids, the coding of page lists, the digest and the reading of QEMU's stream. Never
//! reads a socket or compresses: the node's relay feeds it slices and acts on what comes out.

pub mod digest;
pub mod pages;
pub mod qemu;

use crate::id::ChunkId;
use crate::limits::CHUNK_BYTES;

/// The bytes of one page.
pub type Page = [u8; CHUNK_BYTES];

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
    }
}
