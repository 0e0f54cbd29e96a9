//! What can be read as a source of chunks: files and guests' memory.
//!
//! Owns the way to read them: by copying, holes skipped. Never maps and never writes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Something whose bytes can be read at any offset while others change them.
pub trait ReadAt: Send + Sync {
    /// Its length now, bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset`, by copying.
    ///
    /// # Errors
    /// If not all bytes are there.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The first range at or after `offset` that is no hole; none: only holes follow.
    ///
    /// # Errors
    /// If the source cannot be asked.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
}

impl ReadAt for File {
    fn len(&self) -> u64 {
        self.metadata().map_or(0, |m| m.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let seek = |from: u64, whence| -> io::Result<Option<u64>> {
            let from = i64::try_from(from).map_err(io::Error::other)?;
            // SAFETY: plain system call on a descriptor that `self` keeps open. It moves the file
            // position, which nothing here uses: all reads name their offset.
            let at = unsafe { libc::lseek(self.as_raw_fd(), from, whence) };
            match u64::try_from(at) {
                Ok(at) => Ok(Some(at)),
                Err(_) => match io::Error::last_os_error() {
                    e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                    e => Err(e),
                },
            }
        };
        let Some(start) = seek(offset, libc::SEEK_DATA)? else { return Ok(None) };
        let end = seek(start, libc::SEEK_HOLE)?.unwrap_or_else(|| ReadAt::len(self));
        // The file may have been cut between the two calls.
        Ok((start < end).then_some(start..end))
    }
}
