//! What moved away or was received in vain, kept as a source for a time.
//!
//! Owns the bound on it and the files in `<state>/kept/`. Invariant: after each change no more bytes
//! are kept than the bound, except for files of the operator, which are forgotten and not deleted.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use godwit_protocol::id::{CopyId, VmId};
use godwit_protocol::limits::CHUNK_BYTES;

use super::entry::{Kept, Listed};
use super::library::{Library, Table, delete};
use super::{IMAGES, Image, ImageError, Kind};
use crate::store::scan::is_zero;
use crate::store::source::ReadAt;

/// Bytes copied at a time.
const BUFFER: usize = 1 << 20;

/// Wall clock, seconds since 1970.
pub fn wall_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Library {
    fn kept_dir(&self) -> PathBuf {
        self.settings.state.join("kept")
    }

    /// Removes what was being written when the last daemon ended.
    pub fn sweep_kept(&self) {
        let Ok(found) = std::fs::read_dir(self.kept_dir()) else { return };
        let named: BTreeSet<PathBuf> = self.lock().entries.keys().cloned().collect();
        for path in found.filter_map(|entry| entry.ok()?.path().canonicalize().ok()) {
            if !named.contains(&path) {
                // Tried again at the next start.
                let _ = std::fs::remove_file(path);
            }
        }
    }

    pub fn keep(
        &self,
        path: &Path,
        kind: Kind,
        vm: VmId,
        owned: bool,
        now_s: u64,
    ) -> Result<Option<Image>, ImageError> {
        let unusable = |e: io::Error| ImageError::unusable(path, e);
        let meta = path.metadata().map_err(unusable)?;
        let allocated = meta.blocks() * 512;
        let kept = Kept {
            vm,
            owned,
            ino: meta.ino(),
            allocated,
            kept_at_s: now_s,
            expires_s: now_s.saturating_add(self.settings.keep.as_secs()),
        };
        let listed = match kind {
            Kind::KeptDisk => Listed::KeptDisk(kept),
            Kind::KeptMemory => Listed::KeptMemory(kept),
            Kind::Image | Kind::Disk => {
                return Err(ImageError::unusable(path, format!("is not kept as {kind}")));
            }
        };
        match self.lock().entries.get(path) {
            Some(e) if !e.live.is_empty() => return Err(ImageError::Live(path.to_owned())),
            // The operator's for ever.
            Some(e) if e.listed == Some(Listed::Image) => return Ok(Some(e.shown(path))),
            _ => {}
        }
        if self.settings.keep_bytes == 0 || allocated > self.settings.keep_bytes {
            tracing::info!(path = %path.display(), allocated, "not kept: over --keep-bytes");
            delete(path, &kept);
            return Ok(None);
        }
        self.make_room(path);
        let before = self.insert(path, Some(listed), None)?;
        if let Err(error) = std::fs::set_permissions(path, Permissions::from_mode(0o600)) {
            self.put_back(path, before)?;
            return Err(unusable(error));
        }
        self.prune(now_s);
        self.queue([path.to_owned()]);
        Ok(self.shown(path))
    }

    /// Ends the oldest of what is kept if the list is full.
    fn make_room(&self, path: &Path) {
        let table = self.lock();
        if table.listed() < IMAGES || table.entries.contains_key(path) {
            return;
        }
        let oldest = oldest_first(&table).into_iter().next();
        drop(table);
        if let Some((path, _)) = oldest
            && let Err(error) = self.forget(&path)
        {
            tracing::warn!(path = %path.display(), %error, "still kept");
        }
    }

    pub fn prune(&self, now_s: u64) -> usize {
        let kept = oldest_first(&self.lock());
        let mut total: u64 = kept.iter().map(|(_, kept)| kept.allocated).sum();
        let mut ended = 0;
        for (path, kept) in kept {
            if now_s < kept.expires_s && total <= self.settings.keep_bytes {
                continue;
            }
            match self.forget(&path) {
                Ok(deleted) => {
                    tracing::info!(path = %path.display(), deleted, "kept no longer");
                    total -= kept.allocated;
                    ended += 1;
                }
                // Became a live disk meanwhile, or is gone already.
                Err(error) => tracing::debug!(path = %path.display(), %error, "not pruned"),
            }
        }
        ended
    }

    pub fn keep_memory(
        &self,
        memory: &dyn ReadAt,
        vm: VmId,
        copy: CopyId,
    ) -> Result<Option<Image>, ImageError> {
        if self.settings.keep_bytes == 0 {
            return Ok(None);
        }
        let dir = self.kept_dir();
        let path = dir.join(format!("{copy}.mem"));
        let unusable = |e: io::Error| ImageError::unusable(&path, e);
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(unusable)?;
        let mut options = OpenOptions::new();
        let file = options.create_new(true).write(true).mode(0o600).open(&path);
        let file = file.map_err(unusable)?;
        let kept = match copy_data(memory, &file, self.settings.keep_bytes) {
            Ok(true) => {
                let real = path.canonicalize().map_err(unusable)?;
                self.keep(&real, Kind::KeptMemory, vm, true, wall_s())
            }
            Ok(false) => Ok(None),
            Err(error) => Err(unusable(error)),
        };
        if !matches!(kept, Ok(Some(_))) {
            // Gone already if it was not kept.
            let _ = std::fs::remove_file(&path);
        }
        kept
    }
}

/// What is kept and not in use, the oldest first.
fn oldest_first(table: &Table) -> Vec<(PathBuf, Kept)> {
    let kept = table.entries.iter().filter_map(|(path, e)| Some((path.clone(), e.idle_kept()?)));
    let mut kept: Vec<_> = kept.collect();
    kept.sort_by_key(|(_, kept)| kept.kept_at_s);
    kept
}

/// Copies what is not zero to the same place of an empty file; false: it is more than `most` bytes.
fn copy_data(from: &dyn ReadAt, to: &File, most: u64) -> io::Result<bool> {
    let len = from.len();
    let mut buffer = vec![0_u8; BUFFER];
    let (mut at, mut written) = (0, 0_u64);
    while at < len {
        let Some(data) = from.next_data(at)? else { break };
        // Pages are written whole, so that they are chunks of the file, too.
        at = data.start / CHUNK_BYTES as u64 * CHUNK_BYTES as u64;
        let end = data.end.min(len);
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(BUFFER).min(BUFFER);
            let part = &mut buffer[..want];
            from.read_exact_at(part, at)?;
            written += put_pages(part, to, at)?;
            if written > most {
                return Ok(false);
            }
            at += want as u64;
        }
    }
    to.set_len(len)?;
    Ok(true)
}

/// Writes runs of pages that are not zero; answers with their bytes.
fn put_pages(part: &[u8], to: &File, at: u64) -> io::Result<u64> {
    let mut written = 0;
    let mut start = 0;
    let pages: Vec<&[u8]> = part.chunks(CHUNK_BYTES).collect();
    for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let bytes: usize = run.iter().map(|page| page.len()).sum();
        if run.first().is_some_and(|page| !is_zero(page)) {
            to.write_all_at(&part[start..start + bytes], at + start as u64)?;
            written += bytes as u64;
        }
        start += bytes;
    }
    Ok(written)
}
