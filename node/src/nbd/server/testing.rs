//! An export for tests. Owns its content; fails where it is told to.

use std::io;
use std::sync::Mutex;

use super::{BlockSize, Export, Extent, is_zero};

/// Size of [`Memory`], bytes.
pub(in crate::nbd) const SIZE: usize = 256 << 10;

/// Memory as an export, which insists on what [`Export`] promises to it.
pub(in crate::nbd) struct Memory {
    pub(in crate::nbd) content: Mutex<Vec<u8>>,
    pub(in crate::nbd) block: BlockSize,
    pub(in crate::nbd) read_only: bool,
    pub(in crate::nbd) flushes: Mutex<u32>,
    /// Requests that touch this byte fail.
    pub(in crate::nbd) bad: Option<(u64, io::ErrorKind)>,
}

impl Memory {
    pub(in crate::nbd) fn new(min: u32) -> Self {
        Self {
            content: Mutex::new(vec![0; SIZE]),
            block: BlockSize { min, preferred: 4096, max: 64 << 10 },
            read_only: false,
            flushes: Mutex::new(0),
            bad: None,
        }
    }

    fn on<R>(&self, offset: u64, len: u64, act: impl FnOnce(&mut [u8]) -> R) -> io::Result<R> {
        let min = u64::from(self.block.min);
        assert!(len > 0 && len.is_multiple_of(min) && offset.is_multiple_of(min));
        if let Some((bad, kind)) = self.bad
            && (offset..offset + len).contains(&bad)
        {
            return Err(kind.into());
        }
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        Ok(act(&mut self.content.lock().unwrap()[range]))
    }
}

impl Export for Memory {
    fn size(&self) -> u64 {
        SIZE as u64
    }
    fn block_size(&self) -> BlockSize {
        self.block
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        assert!(into.len() <= self.block.max as usize);
        self.on(offset, into.len() as u64, |content| into.copy_from_slice(content))
    }
    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        assert!(!self.read_only && content.len() <= self.block.max as usize);
        self.on(offset, content.len() as u64, |range| range.copy_from_slice(content))
    }
    fn zero(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        assert!(!self.read_only);
        self.on(offset, len, |range| range.fill(0))
    }
    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len, true)
    }
    fn flush(&self) -> io::Result<()> {
        *self.flushes.lock().unwrap() += 1;
        Ok(())
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
        let block = self.block.min.max(512);
        self.on(offset, len, |range| {
            let kinds = range.chunks(block as usize).map(|block| (block.len(), is_zero(block)));
            kinds.map(|(len, zero)| Extent { len: len as u64, hole: zero, zero }).collect()
        })
    }
}
