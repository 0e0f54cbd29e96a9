//! A plain file as an export.
//!
//! Owns the open file. Never changes its size. Invariant: a zero that was answered reads as zeros, on
//! file systems without holes too.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use super::{BlockSize, Export, Extent};

/// Zeros that are written at a time where the file system has no better way, bytes.
const ZEROS: usize = 1 << 20;
/// Most extents in one answer.
const EXTENTS: usize = 4096;

/// A plain file as an export, as large as the file was when it was made.
#[derive(Debug)]
pub struct FileExport {
    file: File,
    size: u64,
    block: BlockSize,
    read_only: bool,
}

impl FileExport {
    /// Shows `file`. Errors: it cannot be examined; `InvalidInput` if its size is no multiple of the
    /// smallest block or the blocks are not valid.
    pub fn new(file: File, block: BlockSize, read_only: bool) -> io::Result<Self> {
        let size = file.metadata()?.len();
        if !block.is_valid() || !size.is_multiple_of(block.min.into()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { file, size, block, read_only })
    }

    /// False: the file system cannot.
    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        let flags = flags | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            match fallocate(&self.file, flags, signed(offset)?, signed(len)?) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Where the next data (or hole) begins, at most the size.
    fn seek(&self, from: u64, whence: Whence) -> io::Result<u64> {
        match lseek(&self.file, signed(from)?, whence) {
            Ok(at) => Ok(u64::try_from(at).map_err(io::Error::other)?.min(self.size)),
            Err(Errno::ENXIO) => Ok(self.size),
            Err(e) => Err(e.into()),
        }
    }
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Export for FileExport {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> BlockSize {
        self.block
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        self.file.write_all_at(content, offset)
    }

    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        let way = match punch {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        if self.allocate(way, offset, len)? {
            return Ok(());
        }
        let zeros = vec![0; ZEROS];
        let mut done = 0;
        while done < len {
            let part = usize::try_from(len - done).map_or(ZEROS, |left| left.min(ZEROS));
            self.file.write_all_at(&zeros[..part], offset + done)?;
            done += part as u64;
        }
        Ok(())
    }

    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        // A file system that cannot keeps the content: a trim is a hint.
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len).map(drop)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
        let min = u64::from(self.block.min);
        let end = offset.saturating_add(len).min(self.size);
        let mut found = Vec::new();
        let mut at = offset;
        while at < end && found.len() < EXTENTS {
            // A block with any data in it is data.
            let data = (self.seek(at, Whence::SeekData)? / min * min).min(end);
            if data > at {
                found.push(Extent { len: data - at, hole: true, zero: true });
                at = data;
            }
            if at < end {
                let hole = self.seek(at, Whence::SeekHole)?.next_multiple_of(min).min(end);
                // A file that changes meanwhile: a block is passed in any case.
                let hole = hole.max(at + min);
                found.push(Extent { len: hole - at, hole: false, zero: false });
                at = hole;
            }
        }
        Ok(found)
    }
}
