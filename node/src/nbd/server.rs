//! The server's side of one connection.
//!
//! Owns the connection, one buffer for what arrives and one for what leaves. Never opens or accepts a
//! socket, never does two requests at a time, never answers before the export has. Invariant: every
//! request that can be read gets exactly one answer, in order; one that may not be done gets the
//! protocol's error and its payload is passed over.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::codec::handshake::{FIXED_NEWSTYLE, NO_ZEROES, OptionHeader, encode_greeting};
use super::codec::transmission::{
    Command, Descriptor, Request, command_flag, put_data, put_error, put_hole, put_simple,
    put_status, state_flag,
};
use super::codec::{DESCRIPTORS_MAX, ErrorCode, Extent, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX};
use super::{BlockSize, CodecError, Export, NbdError};

mod haggle;

use haggle::{CONTEXT, Haggler, Next, Terms};

/// Longest wait for a client inside a message or until it takes an answer. Between requests it may be
/// silent for ever: a mirror is, while its guest writes nothing.
pub const CLIENT_DEADLINE: Duration = Duration::from_secs(60);
/// What is read ahead of small requests, bytes.
const READ_AHEAD: usize = 64 << 10;
/// Options that a client may ask for.
const OPTIONS_MAX: u32 = 256;

/// Shows `export` under `export_name` to the client at `stream` and does what it asks for, until it leaves
/// or somebody shuts the socket down. Requests are done one after the other in the order in which they came.
///
/// Errors: a peer that breaks the protocol or does nothing until [`CLIENT_DEADLINE`], a connection that
/// ends inside a message, an export whose size and blocks do not fit. An export's own errors go to the client.
pub fn serve(stream: UnixStream, export_name: &str, export: &dyn Export) -> Result<(), NbdError> {
    let (size, block) = (export.size(), export.block_size());
    if !block.is_valid() {
        return Err(NbdError::InvalidInput("sizes of blocks"));
    }
    if !size.is_multiple_of(block.min.into()) || i64::try_from(size).is_err() {
        return Err(NbdError::InvalidInput("size"));
    }
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(CLIENT_DEADLINE))?;
    stream.set_write_timeout(Some(CLIENT_DEADLINE))?;
    let connection = Connection {
        reader: BufReader::with_capacity(READ_AHEAD, &stream),
        writer: &stream,
        export,
        size,
        block,
        received: Vec::new(),
        out: Vec::new(),
    };
    let result = connection.run(export_name);
    // Others may hold the socket too, to shut it down: the client has to see the end all the same.
    let _ = stream.shutdown(Shutdown::Both);
    result
}

/// Why a request is not done.
type Denial = (ErrorCode, &'static str);

struct Connection<'a> {
    reader: BufReader<&'a UnixStream>,
    writer: &'a UnixStream,
    export: &'a dyn Export,
    size: u64,
    block: BlockSize,
    received: Vec<u8>,
    out: Vec<u8>,
}

impl Connection<'_> {
    fn run(mut self, export_name: &str) -> Result<(), NbdError> {
        match self.haggle(export_name)? {
            Some(terms) => self.transmit(terms),
            None => Ok(()),
        }
    }

    /// Until transmission begins; none: the client left.
    fn haggle(&mut self, export_name: &str) -> Result<Option<Terms>, NbdError> {
        self.writer.write_all(&encode_greeting(FIXED_NEWSTYLE | NO_ZEROES))?;
        if !self.wait(false)? {
            return Ok(None);
        }
        let mut flags = [0; 4];
        self.reader.read_exact(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(NbdError::Protocol("unknown flags of a client"));
        }
        let zeros = flags & u32::from(NO_ZEROES) == 0;
        let mut haggler = Haggler::new(export_name, self.export, zeros);
        for _ in 0..OPTIONS_MAX {
            if !self.wait(false)? {
                return Ok(None);
            }
            let mut header = [0; OptionHeader::BYTES];
            self.reader.read_exact(&mut header)?;
            let header = OptionHeader::decode(&header)?;
            self.out.clear();
            let next = if header.len <= OPTION_BYTES_MAX {
                self.receive(header.len)?;
                haggler.option(header.option, &self.received, &mut self.out)
            } else if header.len <= PAYLOAD_BYTES_MAX {
                self.pass_over(header.len)?;
                haggler.too_big(header.option, &mut self.out)
            } else {
                let len = header.len.into();
                return Err(CodecError::Length { what: "option", len }.into());
            };
            self.writer.write_all(&self.out)?;
            match next {
                Next::Option => {}
                Next::Transmission(terms) => return Ok(Some(terms)),
                Next::Leave => return Ok(None),
            }
        }
        Err(NbdError::Protocol("a client that only asks for options"))
    }

    /// Whether a message begins; false: the client has gone. `for_ever`: it may take its time.
    fn wait(&mut self, for_ever: bool) -> Result<bool, NbdError> {
        loop {
            match self.reader.fill_buf() {
                Ok(bytes) => return Ok(!bytes.is_empty()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && for_ever => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn transmit(&mut self, terms: Terms) -> Result<(), NbdError> {
        while self.wait(true)? {
            let mut header = [0; Request::BYTES];
            self.reader.read_exact(&mut header)?;
            let request = Request::decode(&header)?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            self.out.clear();
            let done = match self.admit(&request, terms) {
                Ok(()) => {
                    self.receive(request.payload())?;
                    self.execute(&request, terms).map_err(|e| (code_of(&e), e.to_string()))
                }
                Err((code, text)) => {
                    self.pass_over(request.payload())?;
                    Err((code, text.to_owned()))
                }
            };
            if let Err((code, text)) = done {
                self.out.clear();
                match terms.structured {
                    true => put_error(request.cookie, code, &text, &mut self.out),
                    false => put_simple(request.cookie, Some(code), &mut self.out),
                }
            }
            self.writer.write_all(&self.out)?;
        }
        Ok(())
    }

    /// Whether a request may be done.
    fn admit(&self, request: &Request, terms: Terms) -> Result<(), Denial> {
        let command = request.command;
        let invalid = |text| Err((ErrorCode::Invalid, text));
        if matches!(command, Command::Other(_)) {
            return invalid("unknown command");
        }
        if request.flags & !command.flags() != 0
            || (request.has(command_flag::DF) && command == Command::Read && !terms.structured)
        {
            return invalid("a flag that this command does not have");
        }
        if command == Command::BlockStatus && !terms.status {
            return invalid("no metadata context was chosen");
        }
        if command == Command::Flush {
            return Ok(());
        }
        let allocates = matches!(command, Command::Write | Command::WriteZeroes);
        if self.export.read_only() && (allocates || command == Command::Trim) {
            return Err((ErrorCode::Perm, "the export is read-only"));
        }
        let min = u64::from(self.block.min);
        let len = u64::from(request.len);
        if len == 0 || !len.is_multiple_of(min) || !request.offset.is_multiple_of(min) {
            return invalid("not a multiple of the smallest block");
        }
        if request.offset.checked_add(len).is_none_or(|end| end > self.size) {
            let code = if allocates { ErrorCode::NoSpace } else { ErrorCode::Invalid };
            return Err((code, "beyond the end"));
        }
        if matches!(command, Command::Read | Command::Write) && request.len > self.block.max {
            let read = command == Command::Read && terms.structured;
            let code = if read { ErrorCode::Overflow } else { ErrorCode::Invalid };
            return Err((code, "longer than the largest block"));
        }
        if request.has(command_flag::FAST_ZERO) && !self.export.fast_zero() {
            return Err((ErrorCode::NotSupported, "zeros are not faster than a write"));
        }
        Ok(())
    }

    /// Does an admitted request and leaves the answer in `out`.
    fn execute(&mut self, request: &Request, terms: Terms) -> io::Result<()> {
        let (offset, len) = (request.offset, u64::from(request.len));
        match request.command {
            Command::Read => return self.read(request, terms),
            Command::BlockStatus => return self.status(request),
            Command::Write => self.export.write(offset, &self.received)?,
            Command::WriteZeroes => {
                self.export.zero(offset, len, !request.has(command_flag::NO_HOLE))?;
            }
            Command::Trim => self.export.trim(offset, len)?,
            Command::Flush => self.export.flush()?,
            // A hint without an effect: an export has no second cache.
            Command::Cache => {}
            Command::Disconnect | Command::Other(_) => {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        let writes =
            matches!(request.command, Command::Write | Command::WriteZeroes | Command::Trim);
        if writes && request.has(command_flag::FUA) {
            self.export.flush()?;
        }
        put_simple(request.cookie, None, &mut self.out);
        Ok(())
    }

    fn read(&mut self, request: &Request, terms: Terms) -> io::Result<()> {
        let Request { cookie, offset, len, .. } = *request;
        match terms.structured {
            true => put_data(cookie, offset, len, &mut self.out),
            false => put_simple(cookie, None, &mut self.out),
        }
        let start = self.out.len();
        let len_here = usize::try_from(len).map_err(io::Error::other)?;
        self.out.resize(start + len_here, 0);
        self.export.read(offset, &mut self.out[start..])?;
        if terms.structured && is_zero(&self.out[start..]) {
            self.out.clear();
            put_hole(cookie, offset, len, &mut self.out);
        }
        Ok(())
    }

    fn status(&mut self, request: &Request) -> io::Result<()> {
        let extents = self.export.status(request.offset, request.len.into())?;
        let most = match request.has(command_flag::REQ_ONE) {
            true => 1,
            false => (self.block.max / 8).min(DESCRIPTORS_MAX) as usize,
        };
        let descriptors = describe(&extents, request.len, most);
        if descriptors.is_empty() {
            return Err(io::Error::other("the export says nothing about it"));
        }
        put_status(request.cookie, CONTEXT, &descriptors, &mut self.out);
        Ok(())
    }

    /// Reads `len` bytes, checked before, into the buffer of what arrives.
    fn receive(&mut self, len: u32) -> Result<(), NbdError> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        self.received.resize(len, 0);
        Ok(self.reader.read_exact(&mut self.received)?)
    }

    /// Reads `len` bytes and forgets them.
    fn pass_over(&mut self, len: u32) -> Result<(), NbdError> {
        let passed = io::copy(&mut (&mut self.reader).take(len.into()), &mut io::sink())?;
        if passed == u64::from(len) { Ok(()) } else { Err(NbdError::Closed) }
    }
}

/// Descriptors for the first `len` bytes of `extents`, neighbours of one kind as one, at most `most`.
fn describe(extents: &[Extent], len: u32, most: usize) -> Vec<Descriptor> {
    let mut found: Vec<Descriptor> = Vec::new();
    let mut left = len;
    for extent in extents {
        let here = u32::try_from(extent.len).unwrap_or(u32::MAX).min(left);
        let hole = if extent.hole { state_flag::HOLE } else { 0 };
        let flags = hole | if extent.zero { state_flag::ZERO } else { 0 };
        let full = found.len() == most;
        match found.last_mut() {
            _ if here == 0 => continue,
            Some(last) if last.flags == flags => last.len += here,
            _ if full => break,
            _ => found.push(Descriptor { len: here, flags }),
        }
        left -= here;
    }
    found
}

/// The protocol's error for an export's.
fn code_of(error: &io::Error) -> ErrorCode {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            ErrorCode::NoSpace
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorCode::Perm,
        io::ErrorKind::InvalidInput => ErrorCode::Invalid,
        _ => ErrorCode::Io,
    }
}

fn is_zero(content: &[u8]) -> bool {
    content.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
pub(in crate::nbd) mod testing;
#[cfg(test)]
mod tests;
