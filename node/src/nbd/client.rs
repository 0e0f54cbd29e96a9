//! The client's side of one connection.
//!
//! Owns the connection and what is in flight on it during one call. Never retries, never reconnects,
//! never keeps a request across calls. Invariant: when a call returns nothing is in flight; if that cannot
//! be had (a deadline, a broken protocol) every later call is [`NbdError::Ended`].

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::NbdError;
use super::codec::handshake::export_flag;
use super::codec::transmission::{
    ChunkHeader, ChunkKind, Command, DATA_OFFSET_BYTES, HOLE_BYTES, ReplyHeader, Request,
    command_flag, decode_error, decode_hole, decode_status, state_flag,
};
use super::codec::{
    ALLOCATION_DEPTH, BASE_ALLOCATION, BlockSize, ErrorCode, Extent, OWN_LAYER, PAYLOAD_BYTES_MAX,
};

mod handshake;
mod pieces;

use handshake::{Terms, handshake};
use pieces::{Piece, Pieces};

/// Requests in flight: as many as QEMU takes. Their replies fit into a socket's buffer if nobody reads
/// them, so that two ends that both send cannot wait for each other.
const WINDOW: usize = 16;
/// Longest piece of a request without payload, bytes: a server has to do it until the deadline.
const ZERO_BYTES_MAX: u32 = 128 << 20;
/// What is read ahead of small replies, bytes.
const READ_AHEAD: usize = 64 << 10;

/// A connection to an export.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    terms: Terms,
    meta: &'static str,
    cookie: u64,
    ended: bool,
}

/// What goes with the requests of one call or comes back with its replies.
enum Content<'a> {
    None,
    Send(&'a [u8]),
    Fill(&'a mut [u8]),
    Status(&'a mut Vec<Extent>),
}

/// One call: pieces of one command that follow on one another.
struct Call<'a> {
    what: &'static str,
    command: Command,
    flags: u16,
    offset: u64,
    len: u64,
    piece_max: u32,
    content: Content<'a>,
}

impl Client {
    /// Connects to the export of that name at the unix socket `path`. `deadline`: longest wait for the
    /// server, now and in every later call, each time that nothing comes or goes.
    ///
    /// Errors: nobody listens, the deadline, no such export, a peer that is no NBD server.
    pub fn connect(path: &Path, export: &str, deadline: Duration) -> Result<Self, NbdError> {
        Self::over(dial(path, deadline)?, export, deadline)
    }

    /// As [`Client::connect`], to an export of QEMU's whose [`Client::status`] then tells what is allocated
    /// in the image itself: all else is a hole, whatever the images below it hold.
    pub fn connect_own_layer(
        path: &Path,
        export: &str,
        deadline: Duration,
    ) -> Result<Self, NbdError> {
        Self::shake(dial(path, deadline)?, export, deadline, ALLOCATION_DEPTH)
    }

    /// As [`Client::connect`], over a connected socket.
    pub fn over(stream: UnixStream, export: &str, deadline: Duration) -> Result<Self, NbdError> {
        Self::shake(stream, export, deadline, BASE_ALLOCATION)
    }

    fn shake(
        stream: UnixStream,
        export: &str,
        deadline: Duration,
        meta: &'static str,
    ) -> Result<Self, NbdError> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(deadline))?;
        stream.set_read_timeout(Some(deadline))?;
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::with_capacity(READ_AHEAD, stream);
        let terms = handshake(&mut reader, &mut writer, export, meta)?;
        Ok(Self { reader, writer, terms, meta, cookie: 0, ended: false })
    }

    /// Size of the export, bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.terms.size
    }

    /// How the export wants to be addressed. Longer calls than its largest block are split here.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.terms.block
    }

    /// Whether the server refuses writes.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.terms.flags & export_flag::READ_ONLY != 0
    }

    /// Whether [`Client::status`] knows more than that everything may be data.
    #[must_use]
    pub fn knows_status(&self) -> bool {
        self.terms.context.is_some()
    }

    /// Fills `into` from `offset` on. After an error its content is undefined.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), NbdError> {
        let (len, piece_max) = (into.len() as u64, self.terms.block.max);
        let content = Content::Fill(into);
        let command = Command::Read;
        self.call(Call { what: "read", command, flags: 0, offset, len, piece_max, content })
    }

    /// Writes `content` at `offset`.
    pub fn write(&mut self, offset: u64, content: &[u8]) -> Result<(), NbdError> {
        let (len, piece_max) = (content.len() as u64, self.terms.block.max);
        let content = Content::Send(content);
        let command = Command::Write;
        self.call(Call { what: "write", command, flags: 0, offset, len, piece_max, content })
    }

    /// Makes `len` bytes zeros. `punch`: they need not stay allocated. `InvalidInput` also where the
    /// server has no such request.
    pub fn zero(&mut self, offset: u64, len: u64, punch: bool) -> Result<(), NbdError> {
        self.needs(export_flag::WRITE_ZEROES, "no request for zeros")?;
        let flags = if punch { 0 } else { command_flag::NO_HOLE };
        let (command, content) = (Command::WriteZeroes, Content::None);
        // Valid blocks are powers of two of at most 64 KiB: they divide it.
        let piece_max = ZERO_BYTES_MAX;
        self.call(Call { what: "zeroing", command, flags, offset, len, piece_max, content })
    }

    /// Makes durable what was written before. Nothing to do where the server has no such request.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        if self.terms.flags & export_flag::FLUSH == 0 {
            return Ok(());
        }
        let (command, content) = (Command::Flush, Content::None);
        // One request of no length.
        let (offset, len, piece_max) = (0, 0, 0);
        self.call(Call { what: "flush", command, flags: 0, offset, len, piece_max, content })
    }

    /// What the bytes from `offset` on are, in order and without gaps, as far as the server says in one
    /// answer: a beginning of `len` bytes, or more than them, never beyond the end.
    pub fn status(&mut self, offset: u64, len: u64) -> Result<Vec<Extent>, NbdError> {
        let min = u64::from(self.terms.block.min);
        let most = u64::from(u32::MAX) / min * min;
        let asked = len.min(most);
        self.check(offset, asked)?;
        if asked == 0 || self.terms.context.is_none() {
            let all = Extent { len, hole: false, zero: false };
            return Ok(if len == 0 { Vec::new() } else { vec![all] });
        }
        let mut found = Vec::new();
        self.call(Call {
            what: "block status",
            command: Command::BlockStatus,
            flags: 0,
            offset,
            len: asked,
            piece_max: u32::MAX,
            content: Content::Status(&mut found),
        })?;
        Ok(self.inside(offset, found))
    }

    /// Says goodbye. Does not flush. Dropping a client closes its connection without a word.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        if !self.ended {
            let (command, cookie) = (Command::Disconnect, self.cookie);
            let request = Request { flags: 0, command, cookie, offset: 0, len: 0 };
            self.writer.write_all(&request.encode())?;
        }
        Ok(self.writer.shutdown(Shutdown::Both)?)
    }

    fn needs(&self, flag: u16, without: &'static str) -> Result<(), NbdError> {
        let has = self.terms.flags & flag != 0;
        if has { Ok(()) } else { Err(NbdError::InvalidInput(without)) }
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        let min = u64::from(self.terms.block.min);
        if !offset.is_multiple_of(min) || !len.is_multiple_of(min) {
            return Err(NbdError::InvalidInput("not a multiple of the smallest block"));
        }
        if offset.checked_add(len).is_none_or(|end| end > self.terms.size) {
            return Err(NbdError::InvalidInput("beyond the end"));
        }
        Ok(())
    }

    /// The part of `extents` before the end of the export.
    fn inside(&self, offset: u64, mut extents: Vec<Extent>) -> Vec<Extent> {
        let mut left = self.terms.size.saturating_sub(offset);
        extents.retain_mut(|extent| {
            extent.len = extent.len.min(left);
            left -= extent.len;
            extent.len > 0
        });
        extents
    }

    fn call(&mut self, mut call: Call<'_>) -> Result<(), NbdError> {
        if self.ended {
            return Err(NbdError::Ended);
        }
        self.check(call.offset, call.len)?;
        match self.exchange(&mut call) {
            Ok(None) => Ok(()),
            Ok(Some((code, text))) => Err(NbdError::Failed { what: call.what, code, text }),
            Err(error) => {
                self.ended = true;
                let _ = self.writer.shutdown(Shutdown::Both);
                Err(error)
            }
        }
    }

    /// All pieces of a call, [`WINDOW`] of them at a time in flight. A server's error is an answer: what
    /// is in flight is waited for.
    fn exchange(&mut self, call: &mut Call<'_>) -> Result<Option<(ErrorCode, String)>, NbdError> {
        let mut flight = Pieces::default();
        let mut failure = None;
        let mut sent = 0;
        let mut all_sent = call.len == 0 && call.command != Command::Flush;
        loop {
            while !all_sent && failure.is_none() && flight.len() < WINDOW {
                let left = call.len - sent;
                let len = u32::try_from(left).unwrap_or(u32::MAX).min(call.piece_max);
                self.cookie = self.cookie.wrapping_add(1);
                let piece = Piece::new(self.cookie, sent, len);
                self.send(call, &piece)?;
                flight.add(piece);
                sent += u64::from(len);
                all_sent = sent == call.len;
            }
            if flight.len() == 0 {
                return Ok(failure);
            }
            let failed = self.take_reply(call, &mut flight)?;
            failure = failure.or(failed);
        }
    }

    fn send(&mut self, call: &Call<'_>, piece: &Piece) -> Result<(), NbdError> {
        let request = Request {
            flags: call.flags,
            command: call.command,
            cookie: piece.cookie,
            offset: call.offset + piece.at,
            len: piece.len,
        };
        let header = request.encode();
        let payload = match &call.content {
            Content::Send(all) => &all[piece.range()],
            _ => &[],
        };
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        let first = loop {
            match self.writer.write_vectored(&parts) {
                Ok(0) => return Err(NbdError::Closed),
                Ok(count) => break count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        };
        self.writer.write_all(&header[first.min(header.len())..])?;
        Ok(self.writer.write_all(&payload[first.saturating_sub(header.len())..])?)
    }

    /// Takes one reply or one chunk of one; answers the first failure that the server reports.
    fn take_reply(
        &mut self,
        call: &mut Call<'_>,
        flight: &mut Pieces,
    ) -> Result<Option<(ErrorCode, String)>, NbdError> {
        match self.reply_header()? {
            ReplyHeader::Simple { cookie, error } => {
                let piece = flight.take(cookie)?;
                let Some(code) = error else {
                    match &mut call.content {
                        Content::Fill(into) if !self.terms.structured => {
                            self.reader.read_exact(&mut into[piece.range()])?;
                        }
                        Content::None | Content::Send(_) => {}
                        Content::Fill(_) | Content::Status(_) => {
                            return Err(NbdError::Protocol("content without a chunk"));
                        }
                    }
                    return Ok(None);
                };
                Ok(Some((code, String::new())))
            }
            ReplyHeader::Chunk(_) if !self.terms.structured => {
                Err(NbdError::Protocol("a chunk that was not agreed on"))
            }
            ReplyHeader::Chunk(header) => {
                let failure = self.take_chunk(call, flight.find(header.cookie)?, header)?;
                if header.done {
                    let piece = flight.take(header.cookie)?;
                    let content = matches!(call.content, Content::Fill(_) | Content::Status(_));
                    if content && !piece.failed && !piece.is_covered() {
                        return Err(NbdError::Protocol("an incomplete reply"));
                    }
                }
                Ok(failure)
            }
        }
    }

    fn reply_header(&mut self) -> Result<ReplyHeader, NbdError> {
        let mut header = [0; ReplyHeader::CHUNK_BYTES];
        let (simple, rest) = header.split_at_mut(ReplyHeader::SIMPLE_BYTES);
        self.reader.read_exact(simple)?;
        let Some(simple) = simple.first_chunk() else { return Err(NbdError::Closed) };
        if ReplyHeader::is_chunk(simple)? {
            self.reader.read_exact(rest)?;
            return Ok(ReplyHeader::decode(&header)?);
        }
        Ok(ReplyHeader::decode(simple)?)
    }

    fn take_chunk(
        &mut self,
        call: &mut Call<'_>,
        piece: &mut Piece,
        header: ChunkHeader,
    ) -> Result<Option<(ErrorCode, String)>, NbdError> {
        match (header.kind, &mut call.content) {
            (ChunkKind::None, _) => {}
            (ChunkKind::Data, Content::Fill(into)) => {
                let mut at = [0; DATA_OFFSET_BYTES];
                self.reader.read_exact(&mut at)?;
                let len = header.len - DATA_OFFSET_BYTES as u32;
                let range = piece.cover(call.offset, u64::from_be_bytes(at), len)?;
                self.reader.read_exact(&mut into[range])?;
            }
            (ChunkKind::Hole, Content::Fill(into)) => {
                let mut payload = [0; HOLE_BYTES];
                self.reader.read_exact(&mut payload)?;
                let (at, len) = decode_hole(&payload)?;
                into[piece.cover(call.offset, at, len)?].fill(0);
            }
            (ChunkKind::Status, Content::Status(found)) => {
                let payload = self.payload(header.len)?;
                let (context, descriptors) = decode_status(&payload)?;
                if Some(context) != self.terms.context {
                    return Err(NbdError::Protocol("a context that was not chosen"));
                }
                // Exactly one: a second one overlaps the first.
                piece.cover(call.offset, call.offset, piece.len)?;
                let own = self.meta == ALLOCATION_DEPTH;
                found.extend(descriptors.iter().map(|d| Extent {
                    len: d.len.into(),
                    hole: if own { d.flags != OWN_LAYER } else { d.flags & state_flag::HOLE != 0 },
                    zero: !own && d.flags & state_flag::ZERO != 0,
                }));
            }
            (ChunkKind::Error, _) => {
                piece.failed = true;
                return Ok(Some(decode_error(&self.payload(header.len)?)?));
            }
            _ => return Err(NbdError::Protocol("a chunk that answers another command")),
        }
        Ok(None)
    }

    /// Reads `len` bytes, bounded by the codec, without believing that they come.
    fn payload(&mut self, len: u32) -> Result<Vec<u8>, NbdError> {
        let mut payload = Vec::new();
        (&mut self.reader).take(len.min(PAYLOAD_BYTES_MAX).into()).read_to_end(&mut payload)?;
        if payload.len() as u64 == u64::from(len) { Ok(payload) } else { Err(NbdError::Closed) }
    }
}

/// A connected socket. Before connecting it gets its deadline: also a full backlog is a wait.
fn dial(path: &Path, deadline: Duration) -> Result<UnixStream, NbdError> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    socket.set_write_timeout(Some(deadline))?;
    socket.set_read_timeout(Some(deadline))?;
    socket.connect(&socket2::SockAddr::unix(path)?)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

#[cfg(test)]
mod tests;
