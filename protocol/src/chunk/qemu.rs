//! QEMU's migration stream, split into pages of guest memory and everything else.
//!
//! Owns the reading of the source's stream and its rewriting for a destination that has
//! `x-ignore-shared`: the guest's main memory block is taken out, the rest goes on in order, with
//! the capability in the header, an address per block, and a block id with each page record.
//! Never buffers, never allocates by a length from the stream. Invariant: what comes out does not
//! depend on how the input was cut.
//!
//! ```text
//! header -> configuration -> item* : START ram (block list) -> PART ram* -> END ram -> opaque
//!                                    COMMAND anywhere between
//! ```

mod cursor;
mod ram;
pub mod tail;

use super::Page;
use cursor::Cursor;
use ram::Ram;

const QEVM: u32 = 0x5145_564d;
const CONFIGURATION: u8 = 0x07;
const SUBSECTION: u8 = 0x05;
const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;
/// No token that the parser waits for is longer than this, bytes.
pub const TOKEN_BYTES: usize = 8192;
const CONFIG_NAME_BYTES: usize = 1024;
const COMMAND_BYTES: usize = 1024;

/// Takes what the parser finds, in stream order.
pub trait Sink {
    /// A page of the main memory block with its content.
    fn page(&mut self, index: u32, content: &Page);
    /// A page of the main memory block that is all zeros.
    fn zero(&mut self, index: u32);
    /// Bytes for the destination's QEMU.
    fn opaque(&mut self, bytes: &[u8]);
    /// The source's QEMU asks its return path for a PONG with this value.
    fn ping(&mut self, value: u32);
    /// All pages were given; opaque bytes from here on are device state.
    fn ram_end(&mut self);
}

/// Why a stream cannot be carried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Not a migration stream.
    #[error("what connected is not a QEMU migration stream of version 3")]
    NotQemu,
    /// A feature that the exchange does not carry.
    #[error("the migration stream has {0}, which cannot be carried: turn it off in this VM")]
    Unsupported(String),
    /// Against the format.
    #[error("malformed migration stream at byte {at}: {what}")]
    Malformed {
        /// Offset of the token.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The main memory block is not as the VM was described.
    #[error("main memory {block:?} of {expected} bytes is not in the stream (found: {found:?})")]
    Memory {
        /// Its name.
        block: String,
        /// Its size, bytes.
        expected: u64,
        /// Its size in the stream, if it is there.
        found: Option<u64>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Configuration,
    Subsections,
    Item,
    /// In the block list: bytes of memory not yet listed.
    Blocks(u64),
    /// In the page records of a section; whether it is the END section.
    Words(bool),
    /// Where a footer may be.
    Footer(bool),
    Opaque,
}

/// What one step needs to say: done, or more input first.
enum Step {
    Done,
    More,
}

/// The incremental parser of one stream.
#[derive(Debug)]
pub struct Parser {
    state: State,
    at: u64,
    ram: Ram,
    section: Option<u32>,
}

impl Parser {
    /// A parser for a guest whose main memory is the block `block` of `bytes` bytes.
    #[must_use]
    pub fn new(block: &str, bytes: u64) -> Self {
        Self { state: State::Header, at: 0, ram: Ram::new(block, bytes), section: None }
    }

    /// Pages of the main memory block.
    #[must_use]
    pub fn main_pages(&self) -> u32 {
        self.ram.main_pages()
    }

    /// Whether all pages were given and the rest is device state.
    #[must_use]
    pub fn is_opaque(&self) -> bool {
        self.state == State::Opaque
    }

    /// Reads as many whole tokens of `input` as there are and says how many bytes that was; the
    /// caller presents the rest again, with more behind it. The rest is below [`TOKEN_BYTES`].
    ///
    /// # Errors
    /// [`StreamError`]: the stream cannot be carried; the parser is of no further use.
    pub fn feed(&mut self, input: &[u8], sink: &mut impl Sink) -> Result<usize, StreamError> {
        let mut rest = input;
        while !rest.is_empty() {
            let mut cursor = Cursor::new(rest);
            let step = self.step(&mut cursor, sink)?;
            let used = rest.len() - cursor.left();
            if matches!(step, Step::More) {
                if rest.len() > TOKEN_BYTES {
                    return Err(self.malformed("token too long"));
                }
                break;
            }
            rest = &rest[used..];
            self.at += used as u64;
        }
        Ok(input.len() - rest.len())
    }

    fn malformed(&self, what: &'static str) -> StreamError {
        StreamError::Malformed { at: self.at, what }
    }

    fn step(&mut self, cursor: &mut Cursor, sink: &mut impl Sink) -> Result<Step, StreamError> {
        match self.state {
            State::Header => self.header(cursor, sink),
            State::Configuration => self.configuration(cursor, sink),
            State::Subsections => self.subsection(cursor, sink),
            State::Item => self.item(cursor, sink),
            State::Blocks(left) => self.block(left, cursor, sink),
            State::Words(end) => self.words(end, cursor, sink),
            State::Footer(end) => self.footer(end, cursor, sink),
            State::Opaque => {
                sink.opaque(cursor.all());
                Ok(Step::Done)
            }
        }
    }

    fn header(&mut self, c: &mut Cursor, sink: &mut impl Sink) -> Result<Step, StreamError> {
        let (Some(magic), Some(version)) = (c.be32(), c.be32()) else { return Ok(Step::More) };
        if magic != QEVM || version != 3 {
            return Err(StreamError::NotQemu);
        }
        sink.opaque(c.taken());
        self.state = State::Configuration;
        Ok(Step::Done)
    }

    fn configuration(&mut self, c: &mut Cursor, sink: &mut impl Sink) -> Result<Step, StreamError> {
        let Some(kind) = c.u8() else { return Ok(Step::More) };
        if kind != CONFIGURATION {
            return Err(StreamError::Unsupported("no configuration section".to_owned()));
        }
        let Some(len) = c.be32() else { return Ok(Step::More) };
        if len as usize > CONFIG_NAME_BYTES {
            return Err(self.malformed("machine name too long"));
        }
        if c.bytes(len as usize).is_none() {
            return Ok(Step::More);
        }
        sink.opaque(c.taken());
        sink.opaque(&capability());
        self.state = State::Subsections;
        Ok(Step::Done)
    }

    fn subsection(&mut self, c: &mut Cursor, sink: &mut impl Sink) -> Result<Step, StreamError> {
        if c.peek() != Some(SUBSECTION) {
            self.state = State::Item;
            return Ok(Step::Done);
        }
        c.u8();
        let (Some(name), Some(_version)) = (c.name(), c.be32()) else { return Ok(Step::More) };
        let body = match name {
            b"configuration/target-page-bits" => 4,
            b"configuration/uuid" => 16,
            b"configuration/capabilities" => {
                return Err(StreamError::Unsupported(
                    "the capability x-ignore-shared or mapped-ram at the source".to_owned(),
                ));
            }
            other => return Err(StreamError::Unsupported(lossy(other))),
        };
        if c.bytes(body).is_none() {
            return Ok(Step::More);
        }
        sink.opaque(c.taken());
        Ok(Step::Done)
    }

    fn item(&mut self, c: &mut Cursor, sink: &mut impl Sink) -> Result<Step, StreamError> {
        let Some(kind) = c.u8() else { return Ok(Step::More) };
        match kind {
            START => self.start(c, sink),
            PART | END => {
                let Some(id) = c.be32() else { return Ok(Step::More) };
                if self.section != Some(id) {
                    return Err(self.malformed("a section that never started"));
                }
                sink.opaque(c.taken());
                self.state = State::Words(kind == END);
                Ok(Step::Done)
            }
            COMMAND => self.command(c, sink),
            0x04 => Err(StreamError::Unsupported("device state before its memory".to_owned())),
            _ => Err(self.malformed("unknown section type")),
        }
    }

    fn start(&mut self, c: &mut Cursor, sink: &mut impl Sink) -> Result<Step, StreamError> {
        let (Some(id), Some(name)) = (c.be32(), c.name()) else { return Ok(Step::More) };
        let (Some(instance), Some(version)) = (c.be32(), c.be32()) else { return Ok(Step::More) };
        if name != b"ram" {
            return Err(StreamError::Unsupported(format!("the section {:?}", lossy(name))));
        }
        if instance != 0 || version != 4 || self.section.is_some() {
            return Err(StreamError::Unsupported("an unknown form of memory section".to_owned()));
        }
        let Some(word) = c.be64() else { return Ok(Step::More) };
        let Some(total) = Ram::memory_size(word) else {
            return Err(self.malformed("no block list in front of the pages"));
        };
        self.section = Some(id);
        sink.opaque(c.taken());
        self.state = State::Blocks(total);
        Ok(Step::Done)
    }

    fn block(
        &mut self,
        left: u64,
        c: &mut Cursor,
        sink: &mut impl Sink,
    ) -> Result<Step, StreamError> {
        if left == 0 {
            self.ram.check()?;
            self.state = State::Words(false);
            return Ok(Step::Done);
        }
        let (Some(name), Some(bytes)) = (c.name(), c.be64()) else { return Ok(Step::More) };
        let after = left.checked_sub(bytes);
        let Some(after) = after.filter(|_| bytes > 0 && self.ram.add(name, bytes)) else {
            return Err(self.malformed("block list does not add up"));
        };
        sink.opaque(c.taken());
        // The address of the region, compared for blocks that are not streamed: 0 for a machine's
        // own memory.
        sink.opaque(&[0; 8]);
        self.state = State::Blocks(after);
        Ok(Step::Done)
    }

    fn words(
        &mut self,
        end: bool,
        c: &mut Cursor,
        sink: &mut impl Sink,
    ) -> Result<Step, StreamError> {
        match self.ram.records(c, sink).map_err(|what| self.malformed(what))? {
            ram::Records::Eos => {
                self.state = State::Footer(end);
                Ok(Step::Done)
            }
            // Whole records were read: they count as done, what is left is presented again.
            ram::Records::Some => Ok(Step::Done),
            ram::Records::None => Ok(Step::More),
        }
    }

    fn footer(
        &mut self,
        end: bool,
        c: &mut Cursor,
        sink: &mut impl Sink,
    ) -> Result<Step, StreamError> {
        if c.peek() == Some(FOOTER) {
            c.u8();
            let Some(id) = c.be32() else { return Ok(Step::More) };
            if self.section != Some(id) {
                return Err(self.malformed("footer of another section"));
            }
            sink.opaque(c.taken());
        }
        self.state = State::Item;
        if end {
            sink.ram_end();
            self.state = State::Opaque;
        }
        Ok(Step::Done)
    }

    fn command(&mut self, c: &mut Cursor, sink: &mut impl Sink) -> Result<Step, StreamError> {
        let (Some(command), Some(len)) = (c.be16(), c.be16()) else { return Ok(Step::More) };
        if usize::from(len) > COMMAND_BYTES {
            return Err(self.malformed("command too long"));
        }
        let Some(data) = c.bytes(usize::from(len)) else { return Ok(Step::More) };
        match (command, data) {
            (1 | 11, _) => sink.opaque(c.taken()),
            (2, &[a, b, d, e]) => {
                sink.ping(u32::from_be_bytes([a, b, d, e]));
                sink.opaque(c.taken());
            }
            // POSTCOPY_ADVISE, with plain pages: x-ignore-shared excludes post-copy there.
            (3, &[0, 0, 0, 0, 0, 0, 0x10, 0, ..]) => {}
            _ => return Err(StreamError::Unsupported(format!("the command {command}"))),
        }
        Ok(Step::Done)
    }
}

/// `configuration/capabilities` with the one capability that both ends compare.
fn capability() -> Vec<u8> {
    let (name, capability) = (b"configuration/capabilities", b"x-ignore-shared");
    let mut out = vec![SUBSECTION, name.len() as u8];
    out.extend_from_slice(name);
    out.extend_from_slice(&1_u32.to_be_bytes());
    out.extend_from_slice(&1_u32.to_be_bytes());
    out.push(capability.len() as u8);
    out.extend_from_slice(capability);
    out
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).collect()
}
