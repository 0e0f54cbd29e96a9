//! What moved away or was received in vain, kept as a source for a time.
//!
//! Owns the bounds on it and the files in `<state>/kept/`. What moved away follows the operator's
//! bound; what was received in vain is kept whatever that says, so that the next try of its move need
//! not begin anew, but for [`GRACE`] only and until a move of its VM has ended here. Invariants: after
//! each change no more bytes are kept than the bound, except for what waits for a next try and for
//! files of the operator, which are forgotten and not deleted; nothing is written where no room is left.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use godwit_protocol::id::{CopyId, VmId};
use godwit_protocol::limits::CHUNK_BYTES;

use super::entry::{Kept, Listed};
use super::library::{Library, Table, delete};
use super::{IMAGES, Image, ImageError, Keep, Kind};
use crate::store::pace::Pace;
use crate::store::scan::is_zero;
use crate::store::source::ReadAt;

/// How long what was received in vain waits for the next try.
const GRACE: Duration = Duration::from_secs(3600);
/// Bytes copied at a time.
const BUFFER: usize = 1 << 20;
/// How long memory is written gently: guests that have just moved have everything to do, and on a small machine
/// with the same processors. Then it goes at full speed: what is not written yet is memory that nobody else can have.
const GENTLE_FOR: Duration = Duration::from_secs(10);

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
        keep: Keep,
        now_s: u64,
    ) -> Result<Option<Image>, ImageError> {
        let Keep { vm, owned, in_vain } = keep;
        let unusable = |e: io::Error| ImageError::unusable(path, e);
        let meta = path.metadata().map_err(unusable)?;
        let allocated = meta.blocks() * 512;
        let time = if in_vain { GRACE } else { self.settings.keep };
        let kept = Kept {
            vm,
            owned,
            ino: meta.ino(),
            allocated,
            kept_at_s: now_s,
            expires_s: now_s.saturating_add(time.as_secs()),
        };
        let listed = match (kind, in_vain) {
            (Kind::KeptDisk, false) => Listed::KeptDisk(kept),
            (Kind::KeptMemory, false) => Listed::KeptMemory(kept),
            (Kind::KeptDisk, true) => Listed::DiskInVain(kept),
            (Kind::KeptMemory, true) => Listed::MemoryInVain(kept),
            (Kind::Image | Kind::Disk, _) => {
                return Err(ImageError::unusable(path, format!("is not kept as {kind}")));
            }
        };
        match self.lock().entries.get(path) {
            Some(e) if !e.live.is_empty() => return Err(ImageError::Live(path.to_owned())),
            // The operator's for ever.
            Some(e) if e.listed == Some(Listed::Image) => return Ok(Some(e.shown(path))),
            _ => {}
        }
        let most = self.settings.keep_bytes;
        if !in_vain && (most == 0 || allocated > most) {
            tracing::info!(path = %path.display(), allocated, "not kept: over --keep-bytes");
            delete(path, &kept);
            return Ok(None);
        }
        self.make_room(path);
        let before = self.insert(path, Some(listed), None)?;
        if owned && let Err(error) = std::fs::set_permissions(path, Permissions::from_mode(0o600)) {
            self.put_back(path, before)?;
            return Err(unusable(error));
        }
        if in_vain {
            let smaller = |other: &Path, old: &Kept| {
                other != path && same_part(other, path) && old.allocated <= allocated
            };
            self.end_in_vain(vm, smaller);
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
        if let Some((path, ..)) = oldest {
            self.end(&path);
        }
    }

    pub fn prune(&self, now_s: u64) -> usize {
        let kept = oldest_first(&self.lock());
        let bounded = kept.iter().filter(|(.., in_vain)| !in_vain);
        let mut total: u64 = bounded.map(|(_, kept, _)| kept.allocated).sum();
        let mut ended = 0;
        for (path, kept, in_vain) in kept {
            let over = !in_vain && total > self.settings.keep_bytes;
            if (over || now_s >= kept.expires_s) && self.end(&path) {
                total -= if in_vain { 0 } else { kept.allocated };
                ended += 1;
            }
        }
        ended
    }

    /// Ends the keeping of a file; whether it did.
    fn end(&self, path: &Path) -> bool {
        match self.forget(path) {
            Ok(deleted) => tracing::info!(path = %path.display(), deleted, "kept no longer"),
            // Became a live disk meanwhile, or is gone already.
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "not ended");
                return false;
            }
        }
        true
    }

    /// Ends what waits for the next try of a move of `vm`, where `which` says so.
    pub fn end_in_vain(&self, vm: VmId, which: impl Fn(&Path, &Kept) -> bool) {
        let kept = oldest_first(&self.lock());
        let of_vm = kept.iter().filter(|(_, kept, in_vain)| *in_vain && kept.vm == vm);
        for (path, ..) in of_vm.filter(|(path, kept, _)| which(path, kept)) {
            self.end(path);
        }
    }

    /// What is kept where `dir` lies and is godwit's to delete, the oldest first.
    fn spare(&self, dir: &Path) -> Vec<(PathBuf, Kept)> {
        let Ok(dev) = dir.metadata().map(|m| m.dev()) else { return Vec::new() };
        let kept = oldest_first(&self.lock()).into_iter().map(|(path, kept, _)| (path, kept));
        let there = |path: &Path| path.metadata().is_ok_and(|m| m.dev() == dev);
        kept.filter(|(path, kept)| kept.owned && there(path)).collect()
    }

    pub fn spare_bytes(&self, dir: &Path) -> u64 {
        self.spare(dir).iter().map(|(_, kept)| kept.allocated).sum()
    }

    pub fn give_up(&self, dir: &Path, bytes: u64, last: VmId) -> bool {
        let mut spare = self.spare(dir);
        if spare.iter().map(|(_, kept)| kept.allocated).sum::<u64>() < bytes {
            return false;
        }
        spare.sort_by_key(|(_, kept)| kept.vm == last);
        let mut freed = 0;
        for (path, kept) in spare {
            if freed < bytes && self.end(&path) {
                freed += kept.allocated;
            }
        }
        freed >= bytes
    }

    pub fn keep_memory(
        &self,
        memory: &dyn ReadAt,
        vm: VmId,
        copy: CopyId,
        in_vain: bool,
    ) -> Result<Option<Image>, ImageError> {
        let most = if in_vain { u64::MAX } else { self.settings.keep_bytes };
        if most == 0 {
            return Ok(None);
        }
        let dir = self.kept_dir();
        let path = dir.join(format!("{copy}.mem"));
        let unusable = |e: io::Error| ImageError::unusable(&path, e);
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(unusable)?;
        let mut options = OpenOptions::new();
        let file = options.create_new(true).write(true).mode(0o600).open(&path);
        let file = file.map_err(unusable)?;
        let room = || (self.settings.room)(&dir);
        let copied = copy_data(memory, &file, most, &room, &self.gentle);
        // Whoever was in a hurry has what it waited for.
        self.gentle.set_free(self.lock().stopped);
        let kept = match copied {
            Ok(true) => {
                let real = path.canonicalize().map_err(unusable)?;
                let keep = Keep { vm, owned: true, in_vain };
                self.keep(&real, Kind::KeptMemory, keep, wall_s())
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

/// What is kept and not in use, with whether it was received in vain, the oldest first.
fn oldest_first(table: &Table) -> Vec<(PathBuf, Kept, bool)> {
    let kept = table.entries.iter();
    let kept = kept.filter_map(|(path, e)| Some((path.clone(), e.idle_kept()?, e.in_vain())));
    let mut kept: Vec<_> = kept.collect();
    kept.sort_by_key(|(_, kept, _)| kept.kept_at_s);
    kept
}

/// Whether two files of godwit's are the same disk of a VM, or both memory: such names differ in the
/// copy alone.
fn same_part(a: &Path, b: &Path) -> bool {
    let part = |path: &Path| {
        let name = path.file_name()?.to_str()?.to_owned();
        Some(match name.rsplit_once('-') {
            Some((_, disk)) => disk.to_owned(),
            None => name.rsplit_once('.')?.1.to_owned(),
        })
    };
    part(a).is_some() && part(a) == part(b)
}

/// Copies what is not zero to the same place of an empty file; false: it is more than `most` bytes, there
/// is no more `room`, or it was told to stop.
fn copy_data(
    from: &dyn ReadAt,
    to: &File,
    most: u64,
    room: &dyn Fn() -> io::Result<u64>,
    pace: &Pace,
) -> io::Result<bool> {
    let (len, began) = (from.len(), Instant::now());
    let mut buffer = vec![0_u8; BUFFER];
    let (mut at, mut written) = (0, 0_u64);
    while at < len {
        let Some(data) = from.next_data(at)? else { break };
        // Pages are written whole, so that they are chunks of the file, too.
        at = data.start / CHUNK_BYTES as u64 * CHUNK_BYTES as u64;
        let end = data.end.min(len);
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(BUFFER).min(BUFFER);
            // Asked each time: others write there, too.
            if room()? < want as u64 {
                return Ok(false);
            }
            if began.elapsed() >= GENTLE_FOR {
                pace.set_free(true);
            }
            if pace.take(want).is_err() {
                return Ok(false);
            }
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
