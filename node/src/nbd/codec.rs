//! NBD's messages, to bytes and back.
//!
//! Owns the layout of the fixed newstyle handshake and of requests and replies, for the server's and the
//! client's side. Never touches a socket, never allocates by a length that it was only told: decoders get
//! bytes that have arrived. Invariant: what an encoder writes its decoder reads as the same value, and a
//! header whose length is out of bounds is an error before anybody waits for that many bytes.

mod fields;
pub mod handshake;
pub mod transmission;

/// Longest data of one option or of one reply to it, bytes.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Longest payload of a request or of a reply, bytes; what the protocol lets every client send.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest name or message, bytes: the protocol's limit of a string.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Most descriptors in one block status.
pub const DESCRIPTORS_MAX: u32 = 1 << 20;
/// The metadata context that a server here knows.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// QEMU's own: in which layer of an image a block is allocated, [`OWN_LAYER`] for the topmost.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// The depth of what is allocated in the image itself and not in one below it.
pub const OWN_LAYER: u32 = 1;

/// Bytes that are no message of the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// A message begins with something else than its magic number.
    #[error("no NBD {what} begins with {found:#x}")]
    Magic {
        /// What was expected.
        what: &'static str,
        /// What came instead.
        found: u64,
    },
    /// A length out of bounds.
    #[error("an NBD {what} of {len} bytes")]
    Length {
        /// What has that length.
        what: &'static str,
        /// The length, bytes.
        len: u64,
    },
    /// Ends before its last field.
    #[error("an NBD message ends too early")]
    Short,
    /// Goes on after its last field.
    #[error("an NBD message is followed by {0} bytes that do not belong to it")]
    Trailing(usize),
    /// A string that is no UTF-8 or too long.
    #[error("an NBD string is no text of at most {TEXT_BYTES_MAX} bytes")]
    Text,
    /// A type that is not known here and cannot be passed over.
    #[error("an NBD {what} of the unknown type {found:#x}")]
    Unknown {
        /// What has that type.
        what: &'static str,
        /// The type.
        found: u32,
    },
    /// A field with a value that it cannot have.
    #[error("an NBD message with a wrong {0}")]
    Value(&'static str),
}

/// How an export wants to be addressed, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Offsets and lengths are multiples of it: a power of two, at most 64 KiB.
    pub min: u32,
    /// From here on requests are efficient: a power of two, at least 512 and `min`.
    pub preferred: u32,
    /// Longest payload: a multiple of `min`, at least `preferred`, at most [`PAYLOAD_BYTES_MAX`].
    pub max: u32,
}

impl BlockSize {
    /// What holds where nothing was said.
    pub const DEFAULT: Self = Self { min: 1, preferred: 4096, max: PAYLOAD_BYTES_MAX };

    /// Whether the three are what their fields promise.
    #[must_use]
    pub fn is_valid(self) -> bool {
        self.min.is_power_of_two()
            && self.min <= 64 << 10
            && self.preferred.is_power_of_two()
            && self.preferred >= self.min.max(512)
            && self.max >= self.preferred
            && self.max <= PAYLOAD_BYTES_MAX
            && self.max.is_multiple_of(self.min)
    }
}

/// A piece of an export of one kind, following on the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not zero.
    pub len: u64,
    /// Not allocated: a write may find no space.
    pub hole: bool,
    /// Reads as zeros.
    pub zero: bool,
}

/// The protocol's errors of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// Not permitted: a write to what is read-only.
    Perm,
    /// Input or output failed.
    Io,
    /// No memory.
    NoMemory,
    /// A wrong argument, and every error that the protocol does not know.
    Invalid,
    /// No space, or beyond the end.
    NoSpace,
    /// Too long for one reply.
    Overflow,
    /// Not faster than writing.
    NotSupported,
    /// The server is going.
    Shutdown,
}

impl ErrorCode {
    const ALL: [(Self, u32); 8] = [
        (Self::Perm, 1),
        (Self::Io, 5),
        (Self::NoMemory, 12),
        (Self::Invalid, 22),
        (Self::NoSpace, 28),
        (Self::Overflow, 75),
        (Self::NotSupported, 95),
        (Self::Shutdown, 108),
    ];

    /// The number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u32 {
        Self::ALL.iter().find(|(code, _)| *code == self).map_or(22, |(_, number)| *number)
    }

    /// From the number on the wire; `None` is success.
    #[must_use]
    pub fn from_wire(number: u32) -> Option<Self> {
        let known = Self::ALL.iter().find(|(_, n)| *n == number).map(|(code, _)| *code);
        (number != 0).then(|| known.unwrap_or(Self::Invalid))
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Perm => "not permitted",
            Self::Io => "input/output error",
            Self::NoMemory => "no memory",
            Self::Invalid => "invalid argument",
            Self::NoSpace => "no space",
            Self::Overflow => "too long",
            Self::NotSupported => "not supported",
            Self::Shutdown => "shutting down",
        })
    }
}

#[cfg(test)]
mod tests;
