//! What a client asks for before transmission.
//!
//! Owns the order of its options. Never sends a request. Invariant: terms that are returned are ones
//! that requests can be made under, whatever the server said.

use std::io::{Read, Write};

use super::super::codec::handshake::{
    ClientOption, FIXED_NEWSTYLE, GREETING_BYTES, Info, InfoRequest, MetaRequest, NO_ZEROES,
    OptionReply, OptionReplyHeader, Refusal, decode_greeting,
};
use super::super::codec::{BlockSize, PAYLOAD_BYTES_MAX};
use super::NbdError;

/// Replies to one option.
const REPLIES_MAX: u32 = 256;

/// What was agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terms {
    /// Bytes.
    pub size: u64,
    /// See `export_flag`.
    pub flags: u16,
    pub block: BlockSize,
    /// Reads are answered with chunks.
    pub structured: bool,
    /// The id of the metadata context that was asked for, if the server has it.
    pub context: Option<u32>,
}

/// From the greeting to transmission; `meta` is the metadata context to ask for.
pub(super) fn handshake(
    reader: &mut impl Read,
    writer: &mut impl Write,
    export: &str,
    meta: &str,
) -> Result<Terms, NbdError> {
    let mut greeting = [0; GREETING_BYTES];
    reader.read_exact(&mut greeting)?;
    let flags = decode_greeting(&greeting)?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(NbdError::Protocol("no fixed newstyle handshake"));
    }
    let flags = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
    writer.write_all(&flags.to_be_bytes())?;

    let ask = &mut |option: &ClientOption| ask(reader, writer, option);
    let structured = ask(&ClientOption::StructuredReply)?.1.is_none();
    let mut context = None;
    if structured {
        let queries = vec![meta.to_owned()];
        let request = MetaRequest { export: export.to_owned(), queries };
        let (replies, refusal) = ask(&ClientOption::SetMeta(request))?;
        if refusal.is_none() {
            context = replies.into_iter().find_map(|reply| match reply {
                OptionReply::Meta { id, name } if name == meta => Some(id),
                _ => None,
            });
        }
    }
    let request = InfoRequest { name: export.to_owned(), items: vec![Info::BLOCK_SIZE] };
    let (replies, refusal) = ask(&ClientOption::Go(request))?;
    if let Some((why, text)) = refusal {
        return Err(NbdError::Refused { what: "the export", text: format!("{text} ({why:?})") });
    }
    let (mut found, mut block) = (None, BlockSize::DEFAULT);
    for reply in replies {
        match reply {
            OptionReply::Info(Info::Export { size, flags }) => found = Some((size, flags)),
            OptionReply::Info(Info::BlockSize(sizes)) => block = usable(sizes)?,
            _ => {}
        }
    }
    let (size, flags) = found.ok_or(NbdError::Protocol("an export without a size"))?;
    if i64::try_from(size).is_err() {
        return Err(NbdError::Protocol("an export of an impossible size"));
    }
    Ok(Terms { size, flags, block, structured, context })
}

/// Block sizes that hold here: what is sent has no upper bound for the largest.
fn usable(sent: BlockSize) -> Result<BlockSize, NbdError> {
    let max = sent.max.min(PAYLOAD_BYTES_MAX);
    let max = max - max.checked_rem(sent.min).unwrap_or(0);
    let block = BlockSize { max, ..sent };
    if block.is_valid() { Ok(block) } else { Err(NbdError::Protocol("impossible sizes of blocks")) }
}

type Replies = (Vec<OptionReply>, Option<(Refusal, String)>);

/// Sends an option and takes its replies: what was said before the last one, and whether that was a refusal.
fn ask(
    reader: &mut impl Read,
    writer: &mut impl Write,
    option: &ClientOption,
) -> Result<Replies, NbdError> {
    let mut message = Vec::new();
    option.encode(&mut message);
    writer.write_all(&message)?;
    let mut replies = Vec::new();
    for _ in 0..REPLIES_MAX {
        let mut header = [0; OptionReplyHeader::BYTES];
        reader.read_exact(&mut header)?;
        let header = OptionReplyHeader::decode(&header)?;
        if header.option != option.number() {
            return Err(NbdError::Protocol("a reply to another option"));
        }
        let mut data = Vec::new();
        reader.by_ref().take(header.len.into()).read_to_end(&mut data)?;
        if data.len() as u64 != u64::from(header.len) {
            return Err(NbdError::Closed);
        }
        match OptionReply::decode(header.kind, &data)? {
            OptionReply::Ack => return Ok((replies, None)),
            OptionReply::Refused { why, text } => return Ok((replies, Some((why, text)))),
            reply => replies.push(reply),
        }
    }
    Err(NbdError::Protocol("a reply without an end"))
}
