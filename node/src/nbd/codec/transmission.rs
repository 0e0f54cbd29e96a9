//! Requests and replies.
//!
//! Owns their layout. Never knows which request a reply belongs to: whoever sent it does.

use super::fields::{Fields, cut};
use super::{CodecError, DESCRIPTORS_MAX, ErrorCode, PAYLOAD_BYTES_MAX, TEXT_BYTES_MAX};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Flags of requests.
pub mod command_flag {
    /// The reply comes after the write is durable.
    pub const FUA: u16 = 1;
    /// `WRITE_ZEROES` leaves no hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// `READ` is answered with at most one content chunk.
    pub const DF: u16 = 1 << 2;
    /// `BLOCK_STATUS` is answered with one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// `WRITE_ZEROES` fails if it is not faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Status flags of `base:allocation`.
pub mod state_flag {
    /// Not allocated.
    pub const HOLE: u32 = 1;
    /// Reads as zeros.
    pub const ZERO: u32 = 2;
}

/// What a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Content.
    Read,
    /// To put the content that follows.
    Write,
    /// To leave.
    Disconnect,
    /// All that was answered to be durable.
    Flush,
    /// To drop content.
    Trim,
    /// To prepare for reading.
    Cache,
    /// To put zeros.
    WriteZeroes,
    /// Where there are holes and zeros.
    BlockStatus,
    /// Not known.
    Other(u16),
}

impl Command {
    fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Other(number) => number,
        }
    }

    fn from_wire(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            number => Self::Other(number),
        }
    }

    /// The flags that the protocol allows with it.
    #[must_use]
    pub fn flags(self) -> u16 {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
        // FUA is to be taken with every command.
        FUA | match self {
            Self::Read => DF,
            Self::WriteZeroes => NO_HOLE | FAST_ZERO,
            Self::BlockStatus => REQ_ONE,
            _ => 0,
        }
    }
}

/// A request; the payload of a write follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// See [`command_flag`].
    pub flags: u16,
    /// What is wanted.
    pub command: Command,
    /// Comes back with the reply.
    pub cookie: u64,
    /// Where, bytes.
    pub offset: u64,
    /// How much, bytes.
    pub len: u32,
}

impl Request {
    /// Length, bytes.
    pub const BYTES: usize = 28;

    /// To bytes.
    #[must_use]
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_wire().to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// From bytes. Errors: another magic number; a write with a payload above [`PAYLOAD_BYTES_MAX`],
    /// after which the stream cannot be followed.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, CodecError> {
        let mut fields = Fields(bytes);
        let found = fields.u32()?;
        if found != REQUEST_MAGIC {
            return Err(CodecError::Magic { what: "request", found: found.into() });
        }
        let request = Self {
            flags: fields.u16()?,
            command: Command::from_wire(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u32()?,
        };
        if request.payload() > PAYLOAD_BYTES_MAX {
            return Err(CodecError::Length { what: "write", len: request.len.into() });
        }
        Ok(request)
    }

    /// Bytes that follow the request.
    #[must_use]
    pub fn payload(&self) -> u32 {
        if self.command == Command::Write { self.len } else { 0 }
    }

    /// Whether a flag is set.
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A kind of chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    /// The end of a reply.
    None,
    /// Content.
    Data,
    /// Zeros.
    Hole,
    /// Where there are holes and zeros.
    Status,
    /// A failure, also one of an unknown kind.
    Error,
}

impl ChunkKind {
    fn to_wire(self) -> u16 {
        match self {
            Self::None => 0,
            Self::Data => 1,
            Self::Hole => 2,
            Self::Status => 5,
            Self::Error => ERROR_BIT | 1,
        }
    }
}

const ERROR_BIT: u16 = 1 << 15;

/// Length of the offset before the content of a chunk, bytes.
pub const DATA_OFFSET_BYTES: usize = 8;
/// Length of the payload of a hole, bytes.
pub const HOLE_BYTES: usize = 12;
const STATUS_BYTES_MAX: u32 = 4 + 8 * DESCRIPTORS_MAX;
/// A message and the fixed fields of every kind of error.
const ERROR_BYTES_MAX: u32 = TEXT_BYTES_MAX as u32 + 64;

/// What a reply begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply. Content follows if it answers a read without an error.
    Simple {
        /// The request's.
        cookie: u64,
        /// None: it worked.
        error: Option<ErrorCode>,
    },
    /// A chunk of a structured reply.
    Chunk(ChunkHeader),
}

/// What a chunk begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The last one of its reply.
    pub done: bool,
    /// Its kind.
    pub kind: ChunkKind,
    /// The request's.
    pub cookie: u64,
    /// Length of what follows, bytes; possible for this kind.
    pub len: u32,
}

impl ReplyHeader {
    /// Length of a simple reply and of the beginning of a chunk, bytes.
    pub const SIMPLE_BYTES: usize = 16;
    /// Length of a chunk's header, bytes.
    pub const CHUNK_BYTES: usize = 20;

    /// Whether a reply that begins so is a chunk, whose header is longer. Error: no reply.
    pub fn is_chunk(bytes: &[u8; Self::SIMPLE_BYTES]) -> Result<bool, CodecError> {
        match Fields(bytes).u32()? {
            CHUNK_MAGIC => Ok(true),
            SIMPLE_MAGIC => Ok(false),
            found => Err(CodecError::Magic { what: "reply", found: found.into() }),
        }
    }

    /// From the bytes of a whole header. Errors: no reply; a kind of chunk that may not be passed over;
    /// a length that this kind cannot have.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut fields = Fields(bytes);
        match fields.u32()? {
            SIMPLE_MAGIC => {
                let error = ErrorCode::from_wire(fields.u32()?);
                let cookie = fields.u64()?;
                fields.end()?;
                Ok(Self::Simple { cookie, error })
            }
            CHUNK_MAGIC => {
                let (flags, kind) = (fields.u16()?, chunk_kind(fields.u16()?)?);
                let (cookie, len) = (fields.u64()?, fields.u32()?);
                fields.end()?;
                let header = ChunkHeader { done: flags & 1 != 0, kind, cookie, len };
                header.check()?;
                Ok(Self::Chunk(header))
            }
            found => Err(CodecError::Magic { what: "reply", found: found.into() }),
        }
    }
}

fn chunk_kind(number: u16) -> Result<ChunkKind, CodecError> {
    match number {
        0 => Ok(ChunkKind::None),
        1 => Ok(ChunkKind::Data),
        2 => Ok(ChunkKind::Hole),
        5 => Ok(ChunkKind::Status),
        number if number & ERROR_BIT != 0 => Ok(ChunkKind::Error),
        number => Err(CodecError::Unknown { what: "chunk", found: number.into() }),
    }
}

impl ChunkHeader {
    fn check(&self) -> Result<(), CodecError> {
        let possible = match self.kind {
            ChunkKind::None => self.len == 0,
            ChunkKind::Data => {
                self.len > DATA_OFFSET_BYTES as u32
                    && self.len - DATA_OFFSET_BYTES as u32 <= PAYLOAD_BYTES_MAX
            }
            ChunkKind::Hole => self.len == HOLE_BYTES as u32,
            ChunkKind::Status => {
                (12..=STATUS_BYTES_MAX).contains(&self.len) && (self.len - 4).is_multiple_of(8)
            }
            ChunkKind::Error => (6..=ERROR_BYTES_MAX).contains(&self.len),
        };
        let done = self.done || self.kind != ChunkKind::None;
        match (possible, done) {
            (true, true) => Ok(()),
            (true, false) => Err(CodecError::Value("end of a reply")),
            (false, _) => Err(CodecError::Length { what: "chunk", len: self.len.into() }),
        }
    }

    fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
        out.extend_from_slice(&u16::from(self.done).to_be_bytes());
        out.extend_from_slice(&self.kind.to_wire().to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.len.to_be_bytes());
    }
}

/// Appends a simple reply.
pub fn put_simple(cookie: u64, error: Option<ErrorCode>, out: &mut Vec<u8>) {
    out.extend_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.map_or(0, ErrorCode::to_wire).to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

/// Appends the end of a structured reply.
pub fn put_none(cookie: u64, out: &mut Vec<u8>) {
    ChunkHeader { done: true, kind: ChunkKind::None, cookie, len: 0 }.encode(out);
}

/// Appends the beginning of the one chunk of a read, before `len` bytes of content.
pub fn put_data(cookie: u64, offset: u64, len: u32, out: &mut Vec<u8>) {
    let len = len.saturating_add(DATA_OFFSET_BYTES as u32);
    ChunkHeader { done: true, kind: ChunkKind::Data, cookie, len }.encode(out);
    out.extend_from_slice(&offset.to_be_bytes());
}

/// Appends the one chunk of a read that finds only zeros.
pub fn put_hole(cookie: u64, offset: u64, len: u32, out: &mut Vec<u8>) {
    ChunkHeader { done: true, kind: ChunkKind::Hole, cookie, len: HOLE_BYTES as u32 }.encode(out);
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
}

/// Appends a failure that ends its reply.
pub fn put_error(cookie: u64, error: ErrorCode, text: &str, out: &mut Vec<u8>) {
    let text = cut(text);
    // Below 4097 by the cut.
    let text_len = u16::try_from(text.len()).unwrap_or(0);
    let len = 6 + u32::from(text_len);
    ChunkHeader { done: true, kind: ChunkKind::Error, cookie, len }.encode(out);
    out.extend_from_slice(&error.to_wire().to_be_bytes());
    out.extend_from_slice(&text_len.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// One extent of a block status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Bytes, not zero.
    pub len: u32,
    /// See [`state_flag`].
    pub flags: u32,
}

/// Appends the one chunk of a block status. Takes at most [`DESCRIPTORS_MAX`] descriptors.
pub fn put_status(cookie: u64, context: u32, descriptors: &[Descriptor], out: &mut Vec<u8>) {
    let count = u32::try_from(descriptors.len()).unwrap_or(u32::MAX).min(DESCRIPTORS_MAX);
    let len = 4 + 8 * count;
    ChunkHeader { done: true, kind: ChunkKind::Status, cookie, len }.encode(out);
    out.extend_from_slice(&context.to_be_bytes());
    for descriptor in descriptors.iter().take(DESCRIPTORS_MAX as usize) {
        out.extend_from_slice(&descriptor.len.to_be_bytes());
        out.extend_from_slice(&descriptor.flags.to_be_bytes());
    }
}

/// Where a hole is: (offset, length), bytes. Error: a hole of nothing.
pub fn decode_hole(payload: &[u8; HOLE_BYTES]) -> Result<(u64, u32), CodecError> {
    let mut fields = Fields(payload);
    let hole = (fields.u64()?, fields.u32()?);
    if hole.1 == 0 {
        return Err(CodecError::Value("hole"));
    }
    Ok(hole)
}

/// A failure and what the server says about it. Errors: too short; success.
pub fn decode_error(payload: &[u8]) -> Result<(ErrorCode, String), CodecError> {
    let mut fields = Fields(payload);
    let code = ErrorCode::from_wire(fields.u32()?).ok_or(CodecError::Value("error"))?;
    let len = usize::from(fields.u16()?);
    // What stands behind the message belongs to the kind of error.
    let text = String::from_utf8_lossy(fields.bytes(len)?);
    Ok((code, cut(&text).to_owned()))
}

/// The context of a block status and its descriptors. Errors: no descriptor, or an extent of nothing.
pub fn decode_status(payload: &[u8]) -> Result<(u32, Vec<Descriptor>), CodecError> {
    let mut fields = Fields(payload);
    let context = fields.u32()?;
    let mut descriptors = Vec::with_capacity(fields.0.len() / 8);
    while !fields.0.is_empty() {
        descriptors.push(Descriptor { len: fields.u32()?, flags: fields.u32()? });
    }
    if descriptors.is_empty() || descriptors.iter().any(|d| d.len == 0) {
        return Err(CodecError::Value("extent"));
    }
    Ok((context, descriptors))
}
