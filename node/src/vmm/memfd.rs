//! Guest memory: a memfd that the node creates and QEMU maps.
//!
//! Owns the descriptor and checks every access against the size. Never maps it: a read fault on a hole of a shared
//! memfd would allocate the page, so all reads are `pread` and holes are found with `SEEK_DATA`.
//! Invariant: the file is exactly [`GuestMemory::size`] bytes long, for ever (sealed against shrinking and growing).

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::FileExt;

use godwit_protocol::limits::{CHUNK_BYTES, GUEST_MEMORY_BYTES};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};
use thiserror::Error;

/// Bytes of a guest page, the unit of everything that is written from the network.
pub const PAGE: usize = CHUNK_BYTES;

/// Largest guest memory, in bytes.
pub const MAX_SIZE: u64 = GUEST_MEMORY_BYTES;

/// Pages written by one system call at most (the kernel's `IOV_MAX`).
const MAX_RUN: usize = 1024;

/// What can go wrong with guest memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size is zero, not a multiple of the page size, or above [`MAX_SIZE`].
    #[error("Guest memory of {0} bytes: must be a multiple of 4096, above zero and at most 16 TiB")]
    BadSize(u64),
    /// An access outside the guest's memory.
    #[error("Access of {len} bytes at {offset} is outside the guest's {size} bytes of memory")]
    OutOfBounds {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes that there are.
        size: u64,
    },
    /// The descriptor of a living QEMU is not the memory that was recorded.
    #[error("The memory of process {pid} is {found} bytes, recorded were {expected}")]
    SizeDiffers {
        /// The QEMU process.
        pid: u32,
        /// Its file's size in bytes.
        found: u64,
        /// The recorded size in bytes.
        expected: u64,
    },
    /// The kernel refused.
    #[error("Guest memory: {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn io_error(action: &'static str) -> impl Fn(Errno) -> MemoryError {
    move |errno| MemoryError::Io { action, source: errno.into() }
}

/// The memory of one copy of a VM. Cheap to share behind an `Arc`: all methods take `&self` and are thread-safe.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    size: u64,
}

impl GuestMemory {
    /// Makes fresh memory of `size` bytes, all zero, nothing allocated yet.
    ///
    /// # Errors
    /// [`MemoryError::BadSize`], or the kernel's refusal.
    pub fn create(size: u64) -> Result<Self, MemoryError> {
        if size == 0 || !size.is_multiple_of(PAGE as u64) || size > MAX_SIZE {
            return Err(MemoryError::BadSize(size));
        }
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"guest-ram", flags).map_err(io_error("memfd_create"))?;
        let file = File::from(fd);
        file.set_len(size)
            .map_err(|source| MemoryError::Io { action: "setting its size", source })?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(io_error("sealing its size"))?;
        Ok(Self { file, size })
    }

    /// Opens the memory that a living QEMU holds as descriptor `fd`, after the node was restarted.
    ///
    /// # Errors
    /// [`MemoryError::SizeDiffers`] when it is not `size` bytes long, or the kernel's refusal (the process is gone).
    pub fn reopen(pid: u32, fd: RawFd, size: u64) -> Result<Self, MemoryError> {
        let path = format!("/proc/{pid}/fd/{fd}");
        let opened = OpenOptions::new().read(true).write(true).open(path);
        let file = opened
            .map_err(|source| MemoryError::Io { action: "opening it again from /proc", source })?;
        let metadata = file
            .metadata()
            .map_err(|source| MemoryError::Io { action: "reading its size", source })?;
        let found = metadata.len();
        if found != size || !metadata.is_file() {
            return Err(MemoryError::SizeDiffers { pid, found, expected: size });
        }
        Ok(Self { file, size })
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of 4 KiB pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.size / PAGE as u64
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(MemoryError::OutOfBounds { offset, len, size: self.size }),
        }
    }

    fn page_offset(&self, index: u64, count: u64) -> Result<u64, MemoryError> {
        let out_of_bounds = || MemoryError::OutOfBounds {
            offset: index.saturating_mul(PAGE as u64),
            len: count.saturating_mul(PAGE as u64),
            size: self.size,
        };
        let offset = index.checked_mul(PAGE as u64).ok_or_else(out_of_bounds)?;
        let len = count.checked_mul(PAGE as u64).ok_or_else(out_of_bounds)?;
        self.check(offset, len)?;
        Ok(offset)
    }

    /// Fills `buf` from byte `offset` on. Holes read as zeros and stay holes.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] or the kernel's refusal.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), MemoryError> {
        self.check(offset, buf.len() as u64)?;
        let read = self.file.read_exact_at(buf, offset);
        read.map_err(|source| MemoryError::Io { action: "reading", source })
    }

    /// Writes `buf` at byte `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] or the kernel's refusal (the host is out of memory).
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), MemoryError> {
        self.check(offset, buf.len() as u64)?;
        let written = self.file.write_all_at(buf, offset);
        written.map_err(|source| MemoryError::Io { action: "writing", source })
    }

    /// Reads page `index` into `buf`.
    ///
    /// # Errors
    /// As [`GuestMemory::read_at`].
    pub fn read_page(&self, index: u64, buf: &mut [u8; PAGE]) -> Result<(), MemoryError> {
        let offset = self.page_offset(index, 1)?;
        self.read_at(buf, offset)
    }

    /// Writes page `index`.
    ///
    /// # Errors
    /// As [`GuestMemory::write_at`].
    pub fn write_page(&self, index: u64, page: &[u8; PAGE]) -> Result<(), MemoryError> {
        let offset = self.page_offset(index, 1)?;
        self.write_at(page, offset)
    }

    /// Writes consecutive pages from page `first` on with as few system calls as possible.
    ///
    /// # Errors
    /// As [`GuestMemory::write_at`]; some of the pages may have been written then.
    pub fn write_pages(&self, first: u64, pages: &[&[u8; PAGE]]) -> Result<(), MemoryError> {
        let mut offset = self.page_offset(first, pages.len() as u64)?;
        for run in pages.chunks(MAX_RUN) {
            let mut parts: Vec<IoSlice<'_>> =
                run.iter().map(|page| IoSlice::new(&page[..])).collect();
            let mut left = &mut parts[..];
            while !left.is_empty() {
                let at = i64::try_from(offset).map_err(|_| MemoryError::BadSize(offset))?;
                match nix::sys::uio::pwritev(&self.file, left, at) {
                    Ok(0) => return Err(io_error("writing pages")(Errno::ENOSPC)),
                    Ok(written) => {
                        offset += written as u64;
                        IoSlice::advance_slices(&mut left, written);
                    }
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(io_error("writing pages")(errno)),
                }
            }
        }
        Ok(())
    }

    /// Makes `count` pages from page `first` on zero and gives their memory back to the host.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] or the kernel's refusal.
    pub fn zero_pages(&self, first: u64, count: u64) -> Result<(), MemoryError> {
        let offset = self.page_offset(first, count)?;
        if count == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let len = count * PAGE as u64;
        loop {
            match fallocate(&self.file, flags, offset.cast_signed(), len.cast_signed()) {
                Err(Errno::EINTR) => {}
                done => return done.map_err(io_error("punching a hole")),
            }
        }
    }

    /// The next range of pages that may hold data, as `first..end`, at or after page `from`; `None` when only holes
    /// follow. A page outside every range is zero; a page inside one may be zero too.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn next_data(&self, from: u64) -> Result<Option<std::ops::Range<u64>>, MemoryError> {
        if from >= self.pages() {
            return Ok(None);
        }
        // `lseek` moves the position of this open file, which nothing else uses: all other access names its offset.
        let start = self.page_offset(from, 1)?.cast_signed();
        let data = match lseek(&self.file, start, Whence::SeekData) {
            Ok(data) => data,
            Err(Errno::ENXIO) => return Ok(None),
            Err(errno) => return Err(io_error("looking for data")(errno)),
        };
        // The guest may give pages back between the two calls: then the hole starts at once, or there is no data left.
        let hole = match lseek(&self.file, data, Whence::SeekHole) {
            Ok(hole) => hole,
            Err(Errno::ENXIO) => return Ok(None),
            Err(errno) => return Err(io_error("looking for a hole")(errno)),
        };
        let first = data.cast_unsigned() / PAGE as u64;
        let end = hole.cast_unsigned().div_ceil(PAGE as u64).max(first + 1);
        Ok(Some(first..end.min(self.pages())))
    }

    /// Host memory that the guest's memory takes now, in bytes.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn allocated(&self) -> Result<u64, MemoryError> {
        use std::os::unix::fs::MetadataExt;
        let metadata = self
            .file
            .metadata()
            .map_err(|source| MemoryError::Io { action: "reading its use", source })?;
        Ok(metadata.blocks() * 512)
    }

    /// A second handle to the same memory.
    ///
    /// # Errors
    /// The kernel's refusal (out of descriptors).
    pub fn try_clone(&self) -> Result<Self, MemoryError> {
        let file = self
            .file
            .try_clone()
            .map_err(|source| MemoryError::Io { action: "duplicating its descriptor", source })?;
        Ok(Self { file, size: self.size })
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_memory_is_zero_and_costs_nothing() {
        let memory = GuestMemory::create(1 << 20).unwrap();
        let mut page = [1u8; PAGE];
        memory.read_page(255, &mut page).unwrap();
        assert_eq!(page, [0; PAGE]);
        assert_eq!(memory.allocated().unwrap(), 0);
        assert_eq!(memory.next_data(0).unwrap(), None);
    }

    #[test]
    fn runs_are_written_found_and_punched() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let pages: Vec<[u8; PAGE]> = (0..1500u32).map(|i| [(i % 251) as u8 + 1; PAGE]).collect();
        let refs: Vec<&[u8; PAGE]> = pages.iter().collect();
        memory.write_pages(7, &refs).unwrap();
        assert_eq!(memory.next_data(0).unwrap(), Some(7..1507));
        let mut page = [0u8; PAGE];
        for (i, expected) in pages.iter().enumerate() {
            memory.read_page(7 + i as u64, &mut page).unwrap();
            assert_eq!(&page, expected);
        }
        memory.zero_pages(7, 1000).unwrap();
        assert_eq!(memory.next_data(0).unwrap(), Some(1007..1507));
        assert_eq!(memory.next_data(1507).unwrap(), None);
        memory.read_page(8, &mut page).unwrap();
        assert_eq!(page, [0; PAGE]);
        assert_eq!(memory.allocated().unwrap(), 500 * PAGE as u64);
    }

    #[test]
    fn nothing_outside_is_touched() {
        let memory = GuestMemory::create(8192).unwrap();
        let page = [1u8; PAGE];
        for index in [2, 3, u64::MAX / 4096, u64::MAX] {
            let refused = memory.write_page(index, &page);
            assert!(matches!(refused, Err(MemoryError::OutOfBounds { .. })));
        }
        assert!(memory.write_pages(1, &[&page, &page]).is_err());
        assert!(memory.zero_pages(1, u64::MAX).is_err());
        assert!(memory.write_at(&page, 4097).is_err());
        assert_eq!(memory.next_data(0).unwrap(), None);
    }

    #[test]
    fn the_size_is_sealed_and_checked() {
        for size in [0, 1, 4097, MAX_SIZE + 4096] {
            assert!(matches!(GuestMemory::create(size), Err(MemoryError::BadSize(_))));
        }
        let memory = GuestMemory::create(8192).unwrap();
        assert!(memory.file.set_len(4096).is_err());
        assert!(memory.file.set_len(16384).is_err());
        let pid = std::process::id();
        memory.write_page(1, &[9; PAGE]).unwrap();
        let again = GuestMemory::reopen(pid, memory.raw_fd(), 8192).unwrap();
        let mut page = [0u8; PAGE];
        again.read_page(1, &mut page).unwrap();
        assert_eq!(page, [9; PAGE]);
        let wrong = GuestMemory::reopen(pid, memory.raw_fd(), 4096);
        assert!(matches!(wrong, Err(MemoryError::SizeDiffers { .. })));
    }
}
