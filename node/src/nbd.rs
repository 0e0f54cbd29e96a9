//! Disks over the Network Block Device protocol, on local unix sockets.
//!
//! Owns the protocol's messages ([`codec`]), a server for whatever is an [`Export`] ([`server`]), a client
//! ([`client`]) and a plain file as an export ([`file`]). Never decides what a disk holds or where it goes,
//! never speaks to another host: both ends of a connection are on this one. Invariant: a peer can make
//! this side neither wait beyond a deadline inside a message nor hold more than two payloads of
//! [`codec::PAYLOAD_BYTES_MAX`] a connection.

use std::io;

pub mod client;
pub mod codec;
pub mod file;
pub mod server;

pub use client::Client;
pub use codec::{BlockSize, CodecError, ErrorCode, Extent};
pub use file::FileExport;
pub use server::serve;

/// What a server shows as a disk. Called by one thread per connection, ranges checked: inside the size,
/// multiples of the smallest block, not empty. A call that blocks holds its connection's client back.
pub trait Export: Send + Sync {
    /// Bytes: a multiple of the smallest block, the same for the life of a connection.
    fn size(&self) -> u64;

    /// How it wants to be addressed, the same for the life of a connection.
    fn block_size(&self) -> BlockSize;

    /// Whether writes are refused.
    fn read_only(&self) -> bool {
        false
    }

    /// Whether [`Export::zero`] is faster than writing the zeros. A client asks so before it copies.
    fn fast_zero(&self) -> bool {
        true
    }

    /// Fills `into` from `offset` on.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Puts `content`, at most the largest block, at `offset`.
    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()>;

    /// Makes `len` bytes read as zeros. `punch`: they need not stay allocated.
    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()>;

    /// The content of `len` bytes is no longer wanted, whatever it reads as afterwards.
    fn trim(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes durable what was written before, over whichever connection.
    fn flush(&self) -> io::Result<()>;

    /// What `len` bytes from `offset` on are: a beginning of that range, at least one block of it.
    fn status(&self, offset: u64, len: u64) -> io::Result<Vec<Extent>>;
}

/// How a connection or a request failed. [`NbdError::Failed`] and [`NbdError::InvalidInput`] leave a
/// client usable, all others end its connection.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket failed.
    #[error("the NBD connection failed")]
    Io(#[source] io::Error),
    /// The peer ended the connection inside a message or before an answer.
    #[error("the NBD peer closed the connection")]
    Closed,
    /// The peer neither sent nor took anything for as long as was agreed.
    #[error("the NBD peer did nothing until its deadline")]
    Deadline,
    /// The peer said something that is no message.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The peer said something out of place.
    #[error("the NBD peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server does not grant what is needed.
    #[error("the NBD server refuses {what}: {text}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// What it says.
        text: String,
    },
    /// The server could not do what was asked; parts of it may be done.
    #[error("NBD {what} failed: {code} {text}")]
    Failed {
        /// What was asked for.
        what: &'static str,
        /// The error.
        code: ErrorCode,
        /// What the server says about it.
        text: String,
    },
    /// Asked for something that may not be asked for; nothing was sent.
    #[error("not possible with this NBD export: {0}")]
    InvalidInput(&'static str),
    /// An earlier call ended the connection.
    #[error("the NBD connection has ended")]
    Ended,
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // What a timeout of a socket looks like.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Deadline,
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

impl From<NbdError> for io::Error {
    fn from(error: NbdError) -> Self {
        let kind = match &error {
            NbdError::Io(cause) => cause.kind(),
            NbdError::Closed | NbdError::Ended => io::ErrorKind::ConnectionAborted,
            NbdError::Deadline => io::ErrorKind::TimedOut,
            NbdError::Codec(_) | NbdError::Protocol(_) => io::ErrorKind::InvalidData,
            NbdError::Refused { .. } => io::ErrorKind::PermissionDenied,
            NbdError::InvalidInput(_) => io::ErrorKind::InvalidInput,
            NbdError::Failed { code, .. } => match code {
                ErrorCode::Perm => io::ErrorKind::PermissionDenied,
                ErrorCode::NoSpace => io::ErrorKind::StorageFull,
                ErrorCode::NoMemory => io::ErrorKind::OutOfMemory,
                ErrorCode::Invalid | ErrorCode::Overflow => io::ErrorKind::InvalidInput,
                ErrorCode::NotSupported => io::ErrorKind::Unsupported,
                ErrorCode::Shutdown => io::ErrorKind::ConnectionAborted,
                ErrorCode::Io => io::ErrorKind::Other,
            },
        };
        Self::new(kind, error)
    }
}
