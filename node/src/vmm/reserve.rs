//! Room for the disks of a copy that is being received.
//!
//! Owns one file beside each image, `<image>.reserve`, that takes what is still to come of it from the file system.
//! Invariant: it never holds more than at its start, and is gone with its [`Reservation`].

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use super::image::ImageError;
use super::refusal::{Refusal, file_refusal};
use super::resolved::ResolvedSpec;

/// Room is given back in steps of this many bytes, so that not every write costs a system call.
const STEP: u64 = 16 << 20;
/// What share of a file system stays free: one part in so many.
const STAYS_FREE: u64 = 20;

/// Room that is held for one image. Dropping it gives it back.
#[derive(Debug)]
pub struct Reservation {
    /// The disk's id.
    pub disk: String,
    path: PathBuf,
    file: File,
    total: u64,
    held: u64,
}

impl Reservation {
    /// Bytes held now.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held
    }

    /// Gives back the room for what was written: `written` bytes of the image so far, in all.
    ///
    /// # Errors
    /// The file system's.
    pub fn shrink(&mut self, written: u64) -> io::Result<()> {
        let left = self.total.saturating_sub(written).next_multiple_of(STEP).min(self.held);
        if left < self.held {
            self.file.set_len(left)?;
            self.held = left;
        }
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Gone already: the copy was removed.
        let _ = std::fs::remove_file(&self.path);
    }
}

pub(super) fn reserve_path(image: &Path) -> PathBuf {
    let mut name = OsString::from(image);
    name.push(".reserve");
    name.into()
}

/// Holds what the moving disks of a placed spec take at their source, and 5 % more, in `dir`. Blocking. A file system
/// that cannot allocate ahead is only asked what room it has.
///
/// # Errors
/// [`Refusal::Space`]; nothing is held then.
pub fn reserve(spec: &ResolvedSpec, dir: &Path) -> Result<Vec<Reservation>, Refusal> {
    let no_space = fits(spec, dir)?;
    let mut held = Vec::new();
    for disk in spec.moving() {
        let path = reserve_path(&disk.path);
        let reservation = hold(disk.id.clone(), path.clone(), need(disk.allocated));
        held.push(reservation.map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => no_space(),
            _ => {
                let (path, reason) = (path.display().to_string(), error.to_string());
                ImageError::Create { path, reason }.into()
            }
        })?);
    }
    Ok(held)
}

/// Whether there is room in `dir` for what [`reserve`] would hold.
///
/// # Errors
/// [`Refusal::Space`].
pub fn check_room(spec: &ResolvedSpec, dir: &Path) -> Result<(), Refusal> {
    fits(spec, dir).map(drop)
}

/// What a disk that takes so much at its source needs, bytes.
fn need(allocated: u64) -> u64 {
    allocated.saturating_add(allocated / 20)
}

/// Checks that there is room; answers with what to say if it turns out otherwise.
fn fits(spec: &ResolvedSpec, dir: &Path) -> Result<impl Fn() -> Refusal + use<>, Refusal> {
    let total = spec.moving().fold(0_u64, |sum, disk| sum.saturating_add(need(disk.allocated)));
    let room = room(dir).map_err(|error| file_refusal(dir, &error))?;
    let dir = dir.display().to_string();
    let no_space = move || Refusal::Space {
        need_mib: total.div_ceil(1 << 20),
        room_mib: room >> 20,
        dir: dir.clone(),
    };
    if total > room { Err(no_space()) } else { Ok(no_space) }
}

/// Gives back what a node that was killed held for the disks of `spec`.
pub fn release(spec: &ResolvedSpec) {
    for disk in spec.moving() {
        // There is none beside an image that nothing was received into.
        let _ = std::fs::remove_file(reserve_path(&disk.path));
    }
}

/// What may still be written where `dir` lies, in bytes: one part in [`STAYS_FREE`] of a file system stays free, because
/// a node that cannot write its promises ends.
///
/// # Errors
/// The file system's.
pub fn room(dir: &Path) -> io::Result<u64> {
    let stat = statvfs(dir)?;
    let left = stat.blocks_available().saturating_sub(stat.blocks() / STAYS_FREE);
    Ok(left.saturating_mul(stat.fragment_size()))
}

fn hold(disk: String, path: PathBuf, bytes: u64) -> io::Result<Reservation> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
    let mut reservation = Reservation { disk, path, file, total: bytes, held: 0 };
    if bytes == 0 {
        return Ok(reservation);
    }
    let length = libc::off_t::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: no memory is passed; the descriptor is open.
    if unsafe { libc::fallocate(reservation.file.as_raw_fd(), 0, 0, length) } == 0 {
        reservation.held = bytes;
        return Ok(reservation);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => Ok(reservation),
        _ => Err(error),
    }
}
