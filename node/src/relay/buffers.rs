//! Large buffers that are used again.
//!
//! Owns what was given back, up to a bound. A fresh buffer costs a page fault and a cleared page
//! for every 4 KiB, which on a fast link is most of the work. Never hands out old content: a buffer
//! comes back empty.

use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::pool::lock;

/// Buffers below this are not worth keeping, bytes.
const LARGE: usize = 128 << 10;
/// Buffers above this are not kept, bytes.
const HUGE: usize = 2 << 20;
/// Most bytes of buffers that are kept.
const KEPT: usize = 16 << 20;

/// A shelf of buffers.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Shelf>>);

#[derive(Debug, Default)]
struct Shelf {
    kept: Vec<Vec<u8>>,
    bytes: usize,
}

struct Lent {
    bytes: Vec<u8>,
    shelf: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        let mut shelf = lock(&self.shelf.0);
        let room = bytes.capacity();
        if (LARGE..=HUGE).contains(&room) && shelf.bytes + room <= KEPT {
            bytes.clear();
            shelf.bytes += room;
            shelf.kept.push(bytes);
        }
    }
}

impl Buffers {
    /// An empty buffer with room for `len` bytes.
    pub(super) fn take(&self, len: usize) -> Vec<u8> {
        if len < LARGE {
            return Vec::with_capacity(len);
        }
        let mut shelf = lock(&self.0);
        match shelf.kept.iter().rposition(|kept| kept.capacity() >= len) {
            Some(at) => {
                let buffer = shelf.kept.swap_remove(at);
                shelf.bytes -= buffer.capacity();
                buffer
            }
            None => {
                drop(shelf);
                Vec::with_capacity(len)
            }
        }
    }

    /// Shares a buffer; it comes back when the last holder lets go.
    pub(super) fn share(&self, bytes: Vec<u8>) -> Bytes {
        if bytes.capacity() < LARGE {
            return bytes.into();
        }
        Bytes::from_owner(Lent { bytes, shelf: self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_empty() {
        let buffers = Buffers::default();
        let mut first = buffers.take(1 << 20);
        first.resize(1 << 20, 7);
        let at = first.as_ptr();
        let shared = buffers.share(first);
        let other = shared.clone();
        drop(shared);
        let second = buffers.take(1 << 20);
        assert_ne!(second.as_ptr(), at, "still held");
        drop(other);
        let again = buffers.take(1 << 20);
        assert!(again.as_ptr() == at && again.is_empty());
    }
}
