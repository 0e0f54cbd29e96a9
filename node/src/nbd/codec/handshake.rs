//! Greeting, options and replies to options.
//!
//! Owns their layout. Never knows which options a server grants.

use super::fields::{Fields, cut, put_counted_text};
use super::{BlockSize, CodecError, OPTION_BYTES_MAX};

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Greeting and client flag: fixed newstyle.
pub const FIXED_NEWSTYLE: u16 = 1;
/// Greeting and client flag: no 124 zeros behind the answer to `EXPORT_NAME`.
pub const NO_ZEROES: u16 = 2;

/// Flags of an export, as the server shows them before transmission.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Takes `FLUSH`.
    pub const FLUSH: u16 = 1 << 2;
    /// Takes the flag FUA.
    pub const FUA: u16 = 1 << 3;
    /// Takes `TRIM`.
    pub const TRIM: u16 = 1 << 5;
    /// Takes `WRITE_ZEROES` and its flag `NO_HOLE`.
    pub const WRITE_ZEROES: u16 = 1 << 6;
    /// Takes the flag DF of `READ`.
    pub const DF: u16 = 1 << 7;
    /// A flush on one connection covers what was written on all.
    pub const MULTI_CONN: u16 = 1 << 8;
    /// Takes `CACHE`.
    pub const CACHE: u16 = 1 << 10;
    /// Takes the flag `FAST_ZERO` of `WRITE_ZEROES`.
    pub const FAST_ZERO: u16 = 1 << 11;
}

/// Length of the server's greeting, bytes.
pub const GREETING_BYTES: usize = 18;

/// The server's greeting.
#[must_use]
pub fn encode_greeting(flags: u16) -> [u8; GREETING_BYTES] {
    let mut out = [0; GREETING_BYTES];
    out[..8].copy_from_slice(&NBD_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&flags.to_be_bytes());
    out
}

/// The flags of a server's greeting. Error: an old server or none.
pub fn decode_greeting(bytes: &[u8; GREETING_BYTES]) -> Result<u16, CodecError> {
    let mut fields = Fields(bytes);
    fields.magic("server", NBD_MAGIC)?;
    fields.magic("server of the newstyle handshake", OPTION_MAGIC)?;
    fields.u16()
}

/// What stands before the data of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option.
    pub option: u32,
    /// Length of its data, bytes. Not bounded here: a server passes over what is too long.
    pub len: u32,
}

impl OptionHeader {
    /// Length, bytes.
    pub const BYTES: usize = 16;

    /// To bytes.
    #[must_use]
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        out[8..12].copy_from_slice(&self.option.to_be_bytes());
        out[12..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// From bytes. Error: another magic number.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, CodecError> {
        let mut fields = Fields(bytes);
        fields.magic("option", OPTION_MAGIC)?;
        Ok(Self { option: fields.u32()?, len: fields.u32()? })
    }
}

/// An export and what a client wants to know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest {
    /// Name of the export.
    pub name: String,
    /// Wanted types of information, such as [`Info::BLOCK_SIZE`].
    pub items: Vec<u16>,
}

/// An export and the metadata contexts that a client wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest {
    /// Name of the export.
    pub export: String,
    /// Names of contexts, or of namespaces (`base:`).
    pub queries: Vec<String>,
}

/// What a client asks for before transmission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientOption {
    /// Begin transmission with this export; has no errors.
    ExportName(String),
    /// Leave.
    Abort,
    /// Name the exports.
    List,
    /// Describe an export.
    Info(InfoRequest),
    /// Describe an export and begin transmission.
    Go(InfoRequest),
    /// Answer with chunks.
    StructuredReply,
    /// Name metadata contexts.
    ListMeta(MetaRequest),
    /// Choose metadata contexts.
    SetMeta(MetaRequest),
    /// Something else, its data passed over.
    Other(u32),
}

impl ClientOption {
    /// The number on the wire.
    #[must_use]
    pub fn number(&self) -> u32 {
        match self {
            Self::ExportName(_) => 1,
            Self::Abort => 2,
            Self::List => 3,
            Self::Info(_) => 6,
            Self::Go(_) => 7,
            Self::StructuredReply => 8,
            Self::ListMeta(_) => 9,
            Self::SetMeta(_) => 10,
            Self::Other(number) => *number,
        }
    }

    /// Appends the option with its header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.extend_from_slice(cut(name).as_bytes()),
            Self::Info(request) | Self::Go(request) => {
                put_counted_text(&mut data, &request.name);
                put_count16(&mut data, request.items.len());
                for item in &request.items {
                    data.extend_from_slice(&item.to_be_bytes());
                }
            }
            Self::ListMeta(request) | Self::SetMeta(request) => {
                put_counted_text(&mut data, &request.export);
                data.extend_from_slice(&count32(request.queries.len()).to_be_bytes());
                for query in &request.queries {
                    put_counted_text(&mut data, query);
                }
            }
            Self::Abort | Self::List | Self::StructuredReply | Self::Other(_) => {}
        }
        let header = OptionHeader { option: self.number(), len: count32(data.len()) };
        out.extend_from_slice(&header.encode());
        out.extend_from_slice(&data);
    }

    /// From the number and the data of an option. Error: its data are not what it should have; the
    /// protocol's answer is [`Refusal::Invalid`].
    pub fn decode(number: u32, data: &[u8]) -> Result<Self, CodecError> {
        let mut fields = Fields(data);
        let option = match number {
            1 => Self::ExportName(fields.rest_text()?),
            // The protocol: data of ABORT are ignored.
            2 => return Ok(Self::Abort),
            3 => Self::List,
            6 => Self::Info(info_request(&mut fields)?),
            7 => Self::Go(info_request(&mut fields)?),
            8 => Self::StructuredReply,
            9 => Self::ListMeta(meta_request(&mut fields)?),
            10 => Self::SetMeta(meta_request(&mut fields)?),
            _ => return Ok(Self::Other(number)),
        };
        fields.end()?;
        Ok(option)
    }
}

fn count32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn put_count16(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
}

fn info_request(fields: &mut Fields<'_>) -> Result<InfoRequest, CodecError> {
    let name = fields.counted_text()?;
    let count = fields.u16()?;
    let items = (0..count).map(|_| fields.u16()).collect::<Result<_, _>>()?;
    Ok(InfoRequest { name, items })
}

fn meta_request(fields: &mut Fields<'_>) -> Result<MetaRequest, CodecError> {
    let export = fields.counted_text()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.counted_text()?);
    }
    Ok(MetaRequest { export, queries })
}

/// What stands before the data of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: u32,
    /// Type of the reply.
    pub kind: u32,
    /// Length of its data, bytes, at most [`OPTION_BYTES_MAX`].
    pub len: u32,
}

impl OptionReplyHeader {
    /// Length, bytes.
    pub const BYTES: usize = 20;

    fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
        for field in [self.option, self.kind, self.len] {
            out.extend_from_slice(&field.to_be_bytes());
        }
    }

    /// From bytes. Errors: another magic number; too long.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, CodecError> {
        let mut fields = Fields(bytes);
        fields.magic("reply to an option", REPLY_MAGIC)?;
        let header = Self { option: fields.u32()?, kind: fields.u32()?, len: fields.u32()? };
        if header.len > OPTION_BYTES_MAX {
            let len = u64::from(header.len);
            return Err(CodecError::Length { what: "reply to an option", len });
        }
        Ok(header)
    }
}

/// Why a server refuses an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not known.
    Unsupported,
    /// Known and not allowed.
    Policy,
    /// Malformed or out of place.
    Invalid,
    /// No such export.
    Unknown,
    /// The server is going.
    Shutdown,
    /// Too long.
    TooBig,
    /// Something else: the number on the wire without its highest bit.
    Other(u32),
}

const REFUSED: u32 = 1 << 31;

impl Refusal {
    fn to_wire(self) -> u32 {
        REFUSED
            | match self {
                Self::Unsupported => 1,
                Self::Policy => 2,
                Self::Invalid => 3,
                Self::Unknown => 6,
                Self::Shutdown => 7,
                Self::TooBig => 9,
                Self::Other(number) => number,
            }
    }

    fn from_wire(kind: u32) -> Self {
        match kind & !REFUSED {
            1 => Self::Unsupported,
            2 => Self::Policy,
            3 => Self::Invalid,
            6 => Self::Unknown,
            7 => Self::Shutdown,
            9 => Self::TooBig,
            number => Self::Other(number),
        }
    }
}

/// Something about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Its size and its flags.
    Export {
        /// Bytes.
        size: u64,
        /// See [`export_flag`].
        flags: u16,
    },
    /// Its canonical name.
    Name(String),
    /// How it wants to be addressed, as sent: not checked.
    BlockSize(BlockSize),
    /// Something else.
    Other(u16),
}

impl Info {
    /// Type of [`Info::Name`].
    pub const NAME: u16 = 1;
    /// Type of [`Info::BlockSize`].
    pub const BLOCK_SIZE: u16 = 3;

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Export { size, flags } => {
                out.extend_from_slice(&0_u16.to_be_bytes());
                out.extend_from_slice(&size.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
            }
            Self::Name(name) => {
                out.extend_from_slice(&Self::NAME.to_be_bytes());
                out.extend_from_slice(cut(name).as_bytes());
            }
            Self::BlockSize(size) => {
                out.extend_from_slice(&Self::BLOCK_SIZE.to_be_bytes());
                for field in [size.min, size.preferred, size.max] {
                    out.extend_from_slice(&field.to_be_bytes());
                }
            }
            Self::Other(kind) => out.extend_from_slice(&kind.to_be_bytes()),
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, CodecError> {
        Ok(match fields.u16()? {
            0 => Self::Export { size: fields.u64()?, flags: fields.u16()? },
            Self::NAME => Self::Name(fields.rest_text()?),
            Self::BLOCK_SIZE => Self::BlockSize(BlockSize {
                min: fields.u32()?,
                preferred: fields.u32()?,
                max: fields.u32()?,
            }),
            kind => {
                fields.0 = &[];
                Self::Other(kind)
            }
        })
    }
}

/// A server's reply to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// Done.
    Ack,
    /// An export's name.
    Server(String),
    /// Something about an export.
    Info(Info),
    /// A metadata context.
    Meta {
        /// Its id on this connection.
        id: u32,
        /// Its name.
        name: String,
    },
    /// No.
    Refused {
        /// The kind of no.
        why: Refusal,
        /// For a human.
        text: String,
    },
}

impl OptionReply {
    /// Appends the reply to `option` with its header.
    pub fn encode(&self, option: u32, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let kind = match self {
            Self::Ack => 1,
            Self::Server(name) => {
                put_counted_text(&mut data, name);
                2
            }
            Self::Info(info) => {
                info.encode(&mut data);
                3
            }
            Self::Meta { id, name } => {
                data.extend_from_slice(&id.to_be_bytes());
                data.extend_from_slice(cut(name).as_bytes());
                4
            }
            Self::Refused { why, text } => {
                data.extend_from_slice(cut(text).as_bytes());
                why.to_wire()
            }
        };
        OptionReplyHeader { option, kind, len: count32(data.len()) }.encode(out);
        out.extend_from_slice(&data);
    }

    /// From the type and the data of a reply. Error: not what that type should have, or a type that is
    /// neither known nor a refusal.
    pub fn decode(kind: u32, data: &[u8]) -> Result<Self, CodecError> {
        let mut fields = Fields(data);
        let reply = match kind {
            1 => Self::Ack,
            2 => {
                let name = fields.counted_text()?;
                // Behind the name may stand a description.
                fields.0 = &[];
                Self::Server(name)
            }
            3 => Self::Info(Info::decode(&mut fields)?),
            4 => Self::Meta { id: fields.u32()?, name: fields.rest_text()? },
            kind if kind & REFUSED != 0 => {
                let text = String::from_utf8_lossy(data);
                return Ok(Self::Refused {
                    why: Refusal::from_wire(kind),
                    text: cut(&text).to_owned(),
                });
            }
            found => return Err(CodecError::Unknown { what: "reply to an option", found }),
        };
        fields.end()?;
        Ok(reply)
    }
}

/// Zeros behind the answer to `EXPORT_NAME` for clients that want them, bytes.
const EXPORT_NAME_ZEROS: usize = 124;

/// Appends the answer to `EXPORT_NAME`.
pub fn encode_export_name_answer(size: u64, flags: u16, zeros: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(&size.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    if zeros {
        out.extend_from_slice(&[0; EXPORT_NAME_ZEROS]);
    }
}
