//! What a guest's memory holds, read from outside: how much there is to move at all.
//!
//! Owns the counting. Reads by copying, never by mapping: a read fault on a hole would allocate it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

/// Bytes of a page.
const PAGE: usize = 4096;
/// Pages compressed together for the yardstick.
const BATCH: usize = 64;

/// What a guest's memory held when its move was requested.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Content {
    /// Bytes of pages that are not all zero.
    pub nonzero_bytes: u64,
    /// Those pages, 64 at a time, compressed by zstd level 1.
    pub zstd1_bytes: u64,
}

/// Reads the memory of the guest that the QEMU `pid` runs: its memfd of `ram_bytes`.
pub(super) fn of_qemu(pid: u32, ram_bytes: u64) -> Result<Content> {
    let path = memfd(pid, ram_bytes)?;
    let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    count(&file, ram_bytes)
}

fn memfd(pid: u32, ram_bytes: u64) -> Result<PathBuf> {
    let dir = format!("/proc/{pid}/fd");
    for entry in std::fs::read_dir(&dir).with_context(|| dir.clone())? {
        let path = entry?.path();
        let Ok(target) = std::fs::read_link(&path) else { continue };
        let is_memfd = target.to_str().is_some_and(|t| t.starts_with("/memfd:"));
        if is_memfd && std::fs::metadata(&path).is_ok_and(|m| m.len() == ram_bytes) {
            return Ok(path);
        }
    }
    anyhow::bail!("process {pid} has no memfd of {ram_bytes} bytes")
}

fn count(file: &File, ram_bytes: u64) -> Result<Content> {
    let mut zstd = zstd::bulk::Compressor::new(1)?;
    let mut content = Content::default();
    let mut window = vec![0; 1 << 20];
    let mut batch = Vec::with_capacity(BATCH * PAGE);
    let mut at = 0;
    while at < ram_bytes {
        let length = window.len().min(usize::try_from(ram_bytes - at)?);
        file.read_exact_at(&mut window[..length], at)?;
        for page in window[..length].chunks(PAGE).filter(|page| page.iter().any(|b| *b != 0)) {
            content.nonzero_bytes += page.len() as u64;
            batch.extend_from_slice(page);
            if batch.len() == BATCH * PAGE {
                content.zstd1_bytes += zstd.compress(&batch)?.len() as u64;
                batch.clear();
            }
        }
        at += length as u64;
    }
    if !batch.is_empty() {
        content.zstd1_bytes += zstd.compress(&batch)?.len() as u64;
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn zero_pages_are_not_counted() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; PAGE]).unwrap();
        file.write_all(&[7; PAGE]).unwrap();
        file.set_len(4 * PAGE as u64).unwrap();
        let content = count(&file, 4 * PAGE as u64).unwrap();
        assert_eq!(content.nonzero_bytes, PAGE as u64);
        assert!((1..100).contains(&content.zstd1_bytes));
    }
}
