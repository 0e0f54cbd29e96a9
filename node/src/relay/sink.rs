//! The guest's memory and disks at the destination.
//!
//! Owns the trait that pages are placed through and its form for a file (a memfd). Reads by
//! `pread`, never by mapping: a read fault on a hole would allocate it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use godwit_protocol::chunk::ZERO_PAGE;
use godwit_protocol::limits::CHUNK_BYTES;

/// Guest memory and disks by page index, in one line. Calls come from several threads, never two for one page at once.
pub trait PageSink: Send + Sync {
    /// Writes consecutive pages; `content` is a multiple of 4096 bytes.
    ///
    /// # Errors
    /// The operating system's.
    fn write(&self, first: u32, content: &[u8]) -> io::Result<()>;

    /// Makes consecutive pages all zeros.
    ///
    /// # Errors
    /// The operating system's.
    fn zero(&self, first: u32, count: u32) -> io::Result<()>;

    /// Reads consecutive pages; `content` is a multiple of 4096 bytes.
    ///
    /// # Errors
    /// The operating system's.
    fn read(&self, first: u32, content: &mut [u8]) -> io::Result<()>;
}

/// A memfd (or any file of the guest's size).
#[derive(Debug)]
pub struct FileSink(File);

impl FileSink {
    /// Places pages in `file`, which must already have the size of the guest's memory.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self(file)
    }
}

fn offset(page: u32) -> u64 {
    u64::from(page) * CHUNK_BYTES as u64
}

impl PageSink for FileSink {
    fn write(&self, first: u32, content: &[u8]) -> io::Result<()> {
        self.0.write_all_at(content, offset(first))
    }

    fn zero(&self, first: u32, count: u32) -> io::Result<()> {
        (first..first + count).try_for_each(|page| self.0.write_all_at(&ZERO_PAGE, offset(page)))
    }

    fn read(&self, first: u32, content: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(content, offset(first))
    }
}
