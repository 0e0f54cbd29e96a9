//! Messages of the bulk connection: pages and device state of one migration.
//!
//! Owns their form: two lengths, a head, a payload that is never copied into the head. Bounded
//! before anything is allocated. The connection may be replaced at any time; both ends then go on
//! from [`Head::Hello`] and [`Head::Welcome`], and every message may arrive twice.

use serde::{Deserialize, Serialize};

use super::codec::{self, CodecError};
use crate::id::MigrationId;
use crate::limits::BULK_MESSAGE_BYTES;

/// Longest head, bytes.
pub const HEAD_BYTES: usize = 128 << 10;
/// Bytes in front of the head: the length of the head and of the payload, both big-endian.
pub const PREFIX_BYTES: usize = 8;

/// How a payload is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Coding {
    /// As it is.
    Raw,
    /// One zstd frame of this many bytes of content.
    Zstd(u32),
    /// The next part of one long zstd frame.
    Stream {
        /// Bytes of content.
        len: u32,
        /// Whether the frame begins here: with the first such message of a connection.
        begins: bool,
    },
}

/// How the checksum of a page in the digest's table is made. Both ends use what the batch says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sum {
    /// The chunk's id, which has to be made anyway to ask for it.
    Id,
    /// XXH3 of 128 bits, for what crosses without being asked for: it finds what a faulty machine
    /// does to a page; what an attacker could do is the link's business.
    Quick,
}

/// What is said. `seq` numbers batches from 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Head {
    /// Source, first on every connection.
    Hello {
        /// [`codec::WIRE_VERSION`].
        version: u16,
        /// The migration that this connection serves.
        migration: MigrationId,
        /// Pages of the guest's memory and disks, gaps included.
        pages: u32,
    },
    /// Destination: what it has.
    Welcome {
        /// All batches up to this one are placed.
        placed: u32,
        /// Bytes of device state received.
        opaque: u64,
        /// How far a long compressed stream may look back: 2 to this power, bytes; 0: there may be none.
        window: u8,
    },
    /// Source: a batch by ids. Payload: 16 bytes for each of `pages`; with `extents` for each part
    /// of [`crate::chunk::extent::parts`].
    Offer {
        /// The batch.
        seq: u32,
        /// Pages with content (coded as [`crate::chunk::pages::Runs`]).
        pages: Vec<u8>,
        /// Pages of zeros (coded likewise).
        zeros: Vec<u8>,
        /// Whether whole extents go by one id.
        extents: bool,
    },
    /// Destination: what it knows not by its extent. Payload: one bit per offered page, low bit
    /// first.
    Split {
        /// The batch.
        seq: u32,
    },
    /// Source: the ids of the pages that a split asked for. Payload: 16 bytes for each.
    Ids {
        /// The batch.
        seq: u32,
    },
    /// Destination: what it lacks. Payload: one bit per offered page, low bit first.
    Want {
        /// The batch.
        seq: u32,
    },
    /// Source: what was wanted. Payload: the pages of all segments one after the other.
    Literals {
        /// (batch, number of pages), each batch whole.
        segments: Vec<(u32, u32)>,
        /// How the payload is coded.
        coding: Coding,
    },
    /// Source: a batch without asking. Payload: its pages.
    Push {
        /// The batch.
        seq: u32,
        /// Pages with content.
        pages: Vec<u8>,
        /// Pages of zeros.
        zeros: Vec<u8>,
        /// How both ends make the checksums of its pages.
        sum: Sum,
        /// How the payload is coded.
        coding: Coding,
    },
    /// Destination: every page of the batch is where it belongs.
    Placed {
        /// The batch.
        seq: u32,
    },
    /// Source: bytes of the stream for the destination's QEMU. Payload: the bytes.
    Opaque {
        /// Where they belong.
        offset: u64,
        /// Not to be fed before all pages are placed.
        held: bool,
        /// How the payload is coded.
        coding: Coding,
    },
    /// Destination: how many bytes of the stream it has.
    OpaqueHave {
        /// Bytes.
        bytes: u64,
    },
    /// Source: no batch follows this one.
    RamEnd {
        /// The last batch.
        seq: u32,
    },
    /// Source: everything was said.
    End {
        /// The source's digest of memory and disks.
        digest: [u8; 32],
        /// Bytes of the stream.
        opaque_bytes: u64,
        /// BLAKE3 of the stream.
        opaque: [u8; 32],
    },
    /// Destination: all is placed; whether the digests are equal.
    Verdict {
        /// Equal.
        equal: bool,
    },
    /// Either: this end gives up.
    Failed {
        /// One line of cause.
        cause: String,
    },
    /// Source: asks for a [`Head::Pong`] with the same stamp.
    Ping {
        /// Any number.
        stamp: u64,
    },
    /// Destination: the answer.
    Pong {
        /// The number asked with.
        stamp: u64,
    },
}

/// The bytes in front of a payload of `payload` bytes: both lengths and the head.
///
/// # Errors
/// [`CodecError::TooLong`] if head or payload are over their limits.
pub fn prefix(head: &Head, payload: usize) -> Result<Vec<u8>, CodecError> {
    if payload > BULK_MESSAGE_BYTES {
        return Err(CodecError::TooLong { len: payload, limit: BULK_MESSAGE_BYTES });
    }
    let head = codec::encode(head, HEAD_BYTES)?;
    let mut out = Vec::with_capacity(PREFIX_BYTES + head.len());
    out.extend_from_slice(&(head.len() as u32).to_be_bytes());
    out.extend_from_slice(&(payload as u32).to_be_bytes());
    out.extend_from_slice(&head);
    Ok(out)
}

/// The lengths (head, payload) that the first [`PREFIX_BYTES`] announce.
///
/// # Errors
/// [`CodecError::TooLong`] if one is over its limit.
pub fn lengths(bytes: [u8; PREFIX_BYTES]) -> Result<(usize, usize), CodecError> {
    let [a, b, c, d, e, f, g, h] = bytes;
    let head = u32::from_be_bytes([a, b, c, d]) as usize;
    let payload = u32::from_be_bytes([e, f, g, h]) as usize;
    for (len, limit) in [(head, HEAD_BYTES), (payload, BULK_MESSAGE_BYTES)] {
        if len > limit {
            return Err(CodecError::TooLong { len, limit });
        }
    }
    Ok((head, payload))
}

/// Reads a head.
///
/// # Errors
/// [`CodecError`].
pub fn head(bytes: &[u8]) -> Result<Head, CodecError> {
    codec::decode::<Head, HEAD_BYTES>(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_read_back_and_are_bounded() {
        let said = Head::Offer { seq: 7, pages: vec![1, 2], zeros: vec![], extents: false };
        let bytes = prefix(&said, 32).unwrap();
        let (first, rest) = bytes.split_at(PREFIX_BYTES);
        assert_eq!(lengths(first.try_into().unwrap()).unwrap(), (rest.len(), 32));
        assert_eq!(head(rest).unwrap(), said);
        assert!(prefix(&said, BULK_MESSAGE_BYTES + 1).is_err());
        assert!(lengths([0xff; 8]).is_err());
        assert!(head(&[200, 1, 2]).is_err());
    }
}
