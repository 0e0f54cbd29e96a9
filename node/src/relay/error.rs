//! Why a relay ended early. Owns the causes; each says whose turn it is.

use godwit_protocol::chunk::pages::RunsError;
use godwit_protocol::chunk::qemu::StreamError;
use godwit_protocol::wire::codec::CodecError;

/// Why a relay ended early.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// QEMU at the source did not connect, or went away.
    #[error("the source's QEMU {0}")]
    SourceQemu(String),
    /// QEMU at the destination could not be reached, or went away.
    #[error("the destination's QEMU {0}")]
    DestQemu(String),
    /// QEMU at the destination loaded the stream and refused it.
    #[error("the destination's QEMU could not load the device state (code {0}): see its log")]
    LoadFailed(u32),
    /// The source's stream cannot be carried.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The far end said something that is no message.
    #[error("the far node sent a malformed message")]
    Codec(#[from] CodecError),
    /// The far end sent a malformed page list.
    #[error("the far node sent a malformed page list")]
    Runs(#[from] RunsError),
    /// The far end said something out of place.
    #[error("the far node broke the exchange: {0}")]
    Protocol(String),
    /// The far end gave up.
    #[error("the far node gave up: {0}")]
    Peer(String),
    /// No connection to the far node until the deadline.
    #[error("no connection to the destination node for {0} s")]
    Unreachable(u64),
    /// Guest memory or a disk could not be written or read.
    #[error("cannot place pages in the guest's memory or disks: {0}")]
    Memory(#[source] std::io::Error),
    /// A disk's image at the source could not be read.
    #[error("cannot read a disk's image at the source: {0}")]
    SourceImage(#[source] std::io::Error),
    /// What was placed could not be made durable, or QEMU could not be given it.
    #[error("cannot close the disks at the destination: {0}")]
    Settle(String),
    /// Memory or disks at the destination differ from the source's.
    #[error(
        "memory or disks at the destination differ from the source's: the guest stays at the source"
    )]
    DigestMismatch,
    /// The device state is larger than a node keeps.
    #[error("device state of more than {0} bytes")]
    StateTooLarge(usize),
    /// Given up on request.
    #[error("aborted")]
    Aborted,
    /// A local resource failed (a thread, a compression context).
    #[error("local failure")]
    Local(#[from] std::io::Error),
}
