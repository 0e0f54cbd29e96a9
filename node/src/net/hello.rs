//! The first words on a control stream, and the frames after them.
//!
//! Owns the forms. The hello's head (magic, version) keeps its form for ever, so that nodes of
//! different versions can at least tell each other so. The side that dialled speaks first; the other
//! answers only to a member.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use godwit_protocol::id::{StoreId, SwarmId};
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::wire::codec::{self, CodecError};
use godwit_protocol::wire::control::Control;

use super::certificate::Signed;
use super::roster::MemberRecord;

/// Longest hello, bytes.
pub const HELLO_BYTES: usize = 16 << 10;
/// Longest frame on a control stream: a control message and its envelope, bytes.
pub const FRAME_BYTES: usize = CONTROL_MESSAGE_BYTES + 64;
/// Most members or revocations in one frame.
pub const BATCH: usize = 512;

const MAGIC: &[u8; 6] = b"GODWIT";

/// What both sides say before anything else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The speaker's swarm.
    pub swarm: SwarmId,
    /// Random per start of the process: tells a restarted peer from a second connection.
    pub instance: u64,
    /// The speaker's certificate and contact.
    pub member: MemberRecord,
    /// The speaker's hard state.
    pub store: Option<StoreId>,
}

/// What travels on a control stream after the hello.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frame {
    /// A message of the core.
    Control(Box<Control>),
    /// Wants a [`Frame::Pong`] with the same number. Carries the digest of the speaker's roster.
    Ping {
        /// Microseconds since an arbitrary start of the speaker's.
        number: u64,
        /// See [`super::roster::Roster::digest`].
        digest: [u8; 16],
    },
    /// The answer.
    Pong(u64),
    /// Members and revocations that the other side may not know. At most [`BATCH`] of each.
    Roster {
        /// Members.
        members: Vec<MemberRecord>,
        /// Revocations.
        revocations: Vec<Signed>,
    },
}

/// Why a hello or a frame could not be read or written. The stream is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The stream broke.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not a message, or too long a one.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Not this protocol.
    #[error("the peer does not speak godwit's protocol")]
    Magic,
    /// The other side speaks another version.
    #[error("the peer speaks wire version {theirs}, this program speaks {ours}")]
    Version {
        /// This program's.
        ours: u16,
        /// The peer's.
        theirs: u16,
    },
}

/// Says a hello under `version`.
///
/// # Errors
/// [`StreamError`].
pub async fn write_hello<S>(to: &mut S, version: u16, hello: &Hello) -> Result<(), StreamError>
where
    S: AsyncWrite + Unpin,
{
    let body = codec::encode(hello, HELLO_BYTES)?;
    let mut bytes = head(version).to_vec();
    bytes.extend_from_slice(&length(&body)?.to_be_bytes());
    bytes.extend_from_slice(&body);
    to.write_all(&bytes).await?;
    Ok(to.flush().await?)
}

/// Says nothing but the version: the answer to a hello of another version.
///
/// # Errors
/// [`StreamError`].
pub async fn write_version<S>(to: &mut S, version: u16) -> Result<(), StreamError>
where
    S: AsyncWrite + Unpin,
{
    to.write_all(&head(version)).await?;
    Ok(to.flush().await?)
}

/// Reads a hello; `version` is this program's.
///
/// # Errors
/// [`StreamError`].
pub async fn read_hello<S>(from: &mut S, version: u16) -> Result<Hello, StreamError>
where
    S: AsyncRead + Unpin,
{
    let mut start = [0_u8; 8];
    from.read_exact(&mut start).await?;
    let theirs = u16::from_be_bytes([start[6], start[7]]);
    if start[..6] != *MAGIC {
        return Err(StreamError::Magic);
    }
    if theirs != version {
        return Err(StreamError::Version { ours: version, theirs });
    }
    read_message::<_, _, HELLO_BYTES>(from).await
}

/// Reads a message with its length in front; nothing is allocated before the length was checked.
///
/// # Errors
/// [`StreamError`].
pub async fn read_message<S, T, const LIMIT: usize>(from: &mut S) -> Result<T, StreamError>
where
    S: AsyncRead + Unpin,
    T: DeserializeOwned,
{
    let mut start = [0_u8; 4];
    from.read_exact(&mut start).await?;
    let len = u32::from_be_bytes(start) as usize;
    if len > LIMIT {
        return Err(CodecError::TooLong { len, limit: LIMIT }.into());
    }
    let mut body = Vec::new();
    // Grows with what really arrives: a length alone must not cost memory.
    from.take(len as u64).read_to_end(&mut body).await?;
    if body.len() < len {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(codec::decode::<T, LIMIT>(&body)?)
}

/// A message with its length in front, ready to be written.
///
/// # Errors
/// [`CodecError`] if it is longer than `limit`.
pub fn message<T: Serialize>(value: &T, limit: usize) -> Result<Vec<u8>, CodecError> {
    let body = codec::encode(value, limit)?;
    let mut bytes = Vec::with_capacity(body.len() + 4);
    bytes.extend_from_slice(&length(&body)?.to_be_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn head(version: u16) -> [u8; 8] {
    let mut head = [0_u8; 8];
    head[..6].copy_from_slice(MAGIC);
    head[6..].copy_from_slice(&version.to_be_bytes());
    head
}

fn length(body: &[u8]) -> Result<u32, CodecError> {
    let limit = u32::MAX as usize;
    u32::try_from(body.len()).map_err(|_| CodecError::TooLong { len: body.len(), limit })
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use futures::io::Cursor;

    use super::*;

    #[test]
    fn another_version_is_told_by_the_head_alone() {
        let mut bytes = Vec::new();
        block_on(write_version(&mut bytes, 9)).unwrap();
        let read = block_on(read_hello(&mut Cursor::new(bytes), 1));
        assert!(matches!(read, Err(StreamError::Version { ours: 1, theirs: 9 })));
    }

    proptest::proptest! {
        #[test]
        fn garbage_is_refused_without_panic(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
            good_head: bool,
        ) {
            let mut all = if good_head { head(1).to_vec() } else { Vec::new() };
            all.extend_from_slice(&bytes);
            let hello = block_on(read_hello(&mut Cursor::new(all), 1));
            assert!(hello.is_err());
            let _ = block_on(read_message::<_, Frame, FRAME_BYTES>(&mut Cursor::new(&bytes)));
            let _ = codec::decode::<Frame, FRAME_BYTES>(&bytes);
        }
    }
}
