//! Page records of the memory section, version 4.
//!
//! Owns the block list and the current block, which QEMU's CONTINUE flag refers to across sections.
//! Records of the main block go to the sink as pages; those of other blocks are written again with
//! their block id, because the record that CONTINUE meant may have been taken out.

use super::cursor::Cursor;
use super::{Sink, StreamError};
use crate::limits::CHUNK_BYTES;

const FLAGS: u64 = 0xfff;
const ZERO: u64 = 0x002;
const MEM_SIZE: u64 = 0x004;
const PAGE: u64 = 0x008;
const EOS: u64 = 0x010;
const CONTINUE: u64 = 0x020;
/// Most blocks of a list: ROMs and the memory of devices.
const BLOCKS: usize = 1024;

/// What [`Ram::records`] met.
pub(super) enum Records {
    /// The end of the section's records.
    Eos,
    /// At least one record, then an incomplete one.
    Some,
    /// Only an incomplete record.
    None,
}

#[derive(Debug)]
struct Block {
    name: Vec<u8>,
    bytes: u64,
}

#[derive(Debug)]
pub(super) struct Ram {
    main: String,
    main_bytes: u64,
    blocks: Vec<Block>,
    /// Index of the main block in the list.
    main_at: Option<usize>,
    current: Option<usize>,
}

impl Ram {
    pub(super) fn new(main: &str, main_bytes: u64) -> Self {
        Self { main: main.to_owned(), main_bytes, blocks: Vec::new(), main_at: None, current: None }
    }

    /// Pages of the main block; a guest's memory has page numbers of 32 bits.
    pub(super) fn main_pages(&self) -> u32 {
        (self.main_bytes / CHUNK_BYTES as u64) as u32
    }

    /// The sum of all blocks, if the word begins a block list.
    pub(super) fn memory_size(word: u64) -> Option<u64> {
        (word & FLAGS == MEM_SIZE).then_some(word & !FLAGS)
    }

    /// Adds a block of the list; false if there are too many or it is there twice.
    pub(super) fn add(&mut self, name: &[u8], bytes: u64) -> bool {
        if self.blocks.len() == BLOCKS || self.blocks.iter().any(|b| b.name == name) {
            return false;
        }
        if name == self.main.as_bytes() {
            self.main_at = Some(self.blocks.len());
        }
        self.blocks.push(Block { name: name.to_vec(), bytes });
        true
    }

    /// Whether the main block is in the list as expected.
    pub(super) fn check(&self) -> Result<(), StreamError> {
        let found = self.main_at.map(|at| self.blocks[at].bytes);
        if found == Some(self.main_bytes) {
            return Ok(());
        }
        Err(StreamError::Memory { block: self.main.clone(), expected: self.main_bytes, found })
    }

    /// Reads records until the section's end or an incomplete one, before which it stops.
    pub(super) fn records(
        &mut self,
        c: &mut Cursor,
        sink: &mut impl Sink,
    ) -> Result<Records, &'static str> {
        let first = c.position();
        loop {
            let position = c.position();
            let current = self.current;
            match self.record(c, sink)? {
                Some(true) => return Ok(Records::Eos),
                Some(false) => {}
                None => {
                    c.rewind(position);
                    self.current = current;
                    return Ok(if position > first { Records::Some } else { Records::None });
                }
            }
        }
    }

    /// One record; `None`: incomplete; true: end of section.
    fn record(
        &mut self,
        c: &mut Cursor,
        sink: &mut impl Sink,
    ) -> Result<Option<bool>, &'static str> {
        let Some(word) = c.be64() else { return Ok(None) };
        let (flags, offset) = (word & FLAGS, word & !FLAGS);
        match flags & !CONTINUE {
            EOS if flags == EOS => {
                sink.opaque(&word.to_be_bytes());
                return Ok(Some(true));
            }
            ZERO | PAGE => {}
            _ => return Err("unknown page record (turn off multifd, xbzrle and compression)"),
        }
        if flags & CONTINUE == 0 {
            let Some(name) = c.name() else { return Ok(None) };
            let found = self.blocks.iter().position(|b| b.name == name);
            self.current = Some(found.ok_or("page of an unknown block")?);
        }
        let at = self.current.ok_or("page without a block")?;
        let block = &self.blocks[at];
        if offset >= block.bytes {
            return Err("page beyond its block");
        }
        let main = self.main_at == Some(at);
        let index = (offset / CHUNK_BYTES as u64) as u32;
        if flags & PAGE != 0 {
            let Some(page) = c.page() else { return Ok(None) };
            if main {
                sink.page(index, page);
            } else {
                again(word, &block.name, page, sink);
            }
        } else {
            let Some(fill) = c.u8() else { return Ok(None) };
            match (main, fill) {
                (_, 1..) => return Err("a page filled with something but zero"),
                (true, 0) => sink.zero(index),
                (false, 0) => again(word, &block.name, &[0], sink),
            }
        }
        Ok(Some(false))
    }
}

/// Writes a record of another block with its block id.
fn again(word: u64, name: &[u8], data: &[u8], sink: &mut impl Sink) {
    sink.opaque(&(word & !CONTINUE).to_be_bytes());
    // Names came behind a length of one byte.
    sink.opaque(&[name.len() as u8]);
    sink.opaque(name);
    sink.opaque(data);
}
