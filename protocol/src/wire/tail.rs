//! What the old host of a NIC sends to the new one: the frames that came to it, in their order.
//!
//! Owns the form, big-endian, on a stream of its own for each NIC: `kind u8 | length u16 | bytes`, over and over.
//! The other way go numbers, `u64`: how many items the new host has. The first is said as soon as the stream is
//! open, and tells where to go on; the others are acknowledgements.

use serde::{Deserialize, Serialize};

use crate::id::{Epoch, HostId, Mac};
use crate::limits::FRAME_BYTES;

/// Bytes in front of each item.
pub const HEAD_BYTES: usize = 3;
/// Most items between two acknowledgements.
pub const UNACKNOWLEDGED: u64 = 256;
/// Longest encoded [`Flipped`], bytes.
pub const FLIPPED_BYTES: usize = 32;

const FRAME: u8 = 0;
const MARKER: u8 = 1;
const QUIET: u8 = 2;
const END: u8 = 3;

/// One item of the tail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item<F> {
    /// An Ethernet frame for the NIC.
    Frame(F),
    /// All that this host sent by the old way is in front of this.
    Marker(HostId),
    /// All that the guest sent before it was stopped has left the old host.
    Quiet,
    /// Nothing follows.
    End,
}

/// What a sender says in its tunnel to the old host, behind its last frame: the next ones for this NIC
/// go to where it is at that epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flipped {
    /// The NIC; its wire is the datagram's.
    pub mac: Mac,
    /// The epoch of the route that the sender follows now.
    pub epoch: Epoch,
}

/// Why bytes are no item. The stream is of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an item of the tail of kind {kind} and {length} bytes")]
pub struct TailError {
    kind: u8,
    length: usize,
}

impl<F: AsRef<[u8]>> Item<F> {
    /// The head and the bytes that follow it; none for a frame longer than [`FRAME_BYTES`].
    pub fn parts(&self) -> Option<([u8; HEAD_BYTES], &[u8])> {
        let (kind, bytes) = match self {
            Self::Frame(frame) => (FRAME, frame.as_ref()),
            Self::Marker(host) => (MARKER, host.0.as_slice()),
            Self::Quiet => (QUIET, [].as_slice()),
            Self::End => (END, [].as_slice()),
        };
        let length = u16::try_from(bytes.len()).ok().filter(|_| bytes.len() <= FRAME_BYTES)?;
        let [a, b] = length.to_be_bytes();
        Some(([kind, a, b], bytes))
    }

    /// How many bytes of content this item has.
    #[must_use]
    pub fn len(&self) -> usize {
        if let Self::Frame(frame) = self { frame.as_ref().len() } else { 0 }
    }

    /// Whether it carries no frame.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How many bytes follow a head.
///
/// # Errors
/// [`TailError`], before anything is allocated.
pub fn length(head: [u8; HEAD_BYTES]) -> Result<usize, TailError> {
    let [kind, a, b] = head;
    let length = usize::from(u16::from_be_bytes([a, b]));
    let fits = match kind {
        FRAME => (1..=FRAME_BYTES).contains(&length),
        MARKER => length == 32,
        QUIET | END => length == 0,
        _ => false,
    };
    if fits { Ok(length) } else { Err(TailError { kind, length }) }
}

/// The item of a head and the bytes that followed it.
///
/// # Errors
/// [`TailError`].
pub fn item<F: AsRef<[u8]>>(head: [u8; HEAD_BYTES], bytes: F) -> Result<Item<F>, TailError> {
    let kind = head[0];
    let error = TailError { kind, length: bytes.as_ref().len() };
    if length(head)? != bytes.as_ref().len() {
        return Err(error);
    }
    Ok(match kind {
        FRAME => Item::Frame(bytes),
        MARKER => Item::Marker(HostId(bytes.as_ref().try_into().map_err(|_| error)?)),
        QUIET => Item::Quiet,
        _ => Item::End,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn items_survive_and_garbage_is_refused(
            frame in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..2000),
            head in proptest::prelude::any::<[u8; 3]>(),
        ) {
            let all = [Item::Frame(frame), Item::Marker(HostId([7; 32])), Item::Quiet, Item::End];
            for one in all {
                let (head, bytes) = one.parts().unwrap();
                assert_eq!(length(head), Ok(bytes.len()));
                assert_eq!(item(head, bytes.to_vec()), Ok(one));
            }
            if let Ok(length) = length(head) {
                assert!(length <= FRAME_BYTES && item(head, vec![0; length]).is_ok());
                assert!(item(head, vec![0; length + 1]).is_err());
            }
        }
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        assert_eq!(Item::Frame(vec![0; FRAME_BYTES + 1]).parts(), None);
    }
}
