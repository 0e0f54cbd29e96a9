//! A VM's disks as they travel: ids, images, backing chains, where they lie at a destination.
//!
//! Owns [`ResolvedDisk`] and its bounds, and the names of a copy's own images. Never opens one: that is
//! [`super::image`]. Invariant: both ends build the same graph of block nodes from it, whatever a qcow2 says about its
//! backing file.

use std::path::{Path, PathBuf};

use godwit_protocol::id::{CopyId, VmId};
use serde::{Deserialize, Serialize};

use super::spec::{DiskFormat, SpecError, check_path, value_error};

/// Deepest backing chain.
pub const MAX_BACKING: usize = 16;
/// Largest disk, in bytes.
pub const MAX_DISK_BYTES: u64 = 64 << 40;
/// A disk that moves is a whole number of these bytes: the grid on which its content is exchanged.
pub const DISK_BLOCK: u64 = 4096;
/// The id of the disk that holds the firmware's variables.
pub const NVRAM: &str = "nvram";

/// A read-only layer under a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// The file, an absolute path on this host.
    pub path: PathBuf,
    /// Its form.
    pub format: DiskFormat,
    /// BLAKE3 of the whole file: what it is known by on other hosts.
    pub blake3: [u8; 32],
    /// Length of the file in bytes.
    pub bytes: u64,
}

/// A disk with everything settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedDisk {
    /// `disk0`, `disk1`, ... in the guest's order, or [`NVRAM`]; also the name of its block node.
    pub id: String,
    /// The image, an absolute path on this host.
    pub path: PathBuf,
    /// Its form.
    pub format: DiskFormat,
    /// Whether every host reaches the same image at this path: it does not move then.
    pub shared: bool,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// Whether what the guest discards is given back to the file system.
    pub discard: bool,
    /// What the guest sees, in bytes.
    pub size: u64,
    /// What the image itself (without its backing) took of the file system when last asked, in bytes.
    pub allocated: u64,
    /// The layers under it, nearest first. Empty for shared disks, whose chain QEMU finds by itself.
    pub backing: Vec<Backing>,
}

impl ResolvedDisk {
    /// Whether it moves with the VM.
    #[must_use]
    pub fn moves(&self) -> bool {
        !self.shared
    }

    /// Takes anew how much of the file system the image takes; a source calls it when a migration begins.
    ///
    /// # Errors
    /// When the image cannot be looked at.
    pub fn measure(&mut self) -> std::io::Result<()> {
        use std::os::unix::fs::MetadataExt;
        self.allocated = std::fs::metadata(&self.path)?.blocks().saturating_mul(512);
        Ok(())
    }

    /// Checks every bound; for a disk that came from elsewhere, as the `index`th of its VM.
    pub(super) fn check(&self, index: usize, nvram: bool) -> Result<(), SpecError> {
        check_path("disk.path", &self.path)?;
        let id = if nvram { NVRAM.to_owned() } else { format!("disk{index}") };
        if self.id != id {
            return Err(value_error("disk.id", format!("`{}` is not {id}", self.id)));
        }
        if self.size > MAX_DISK_BYTES || self.allocated > 2 * MAX_DISK_BYTES {
            return Err(value_error("disk.size", "must be at most 64 TiB"));
        }
        if self.moves() && (self.size == 0 || !self.size.is_multiple_of(DISK_BLOCK)) {
            let rounded = self.size.next_multiple_of(DISK_BLOCK).max(DISK_BLOCK);
            let message = format!(
                "{} has {} bytes, not a multiple of {DISK_BLOCK}: `qemu-img resize -f {} {} {rounded}`",
                self.path.display(),
                self.size,
                self.format.name(),
                self.path.display(),
            );
            return Err(value_error("disk.path", message));
        }
        if self.backing.len() > MAX_BACKING {
            return Err(value_error("disk.backing", format!("at most {MAX_BACKING} layers")));
        }
        if !self.backing.is_empty() && (self.shared || self.format == DiskFormat::Raw) {
            return Err(value_error("disk.backing", "only a qcow2 that moves has layers"));
        }
        // A raw layer can only be the last one.
        let raw = self.backing.iter().position(|layer| layer.format == DiskFormat::Raw);
        if raw.is_some_and(|raw| raw + 1 < self.backing.len()) {
            return Err(value_error("disk.backing", "a raw layer has layers under it"));
        }
        self.backing.iter().try_for_each(|layer| check_path("disk.backing", &layer.path))
    }
}

/// Whether the image of a disk lies in `dir` as that of some copy of the VM: of this one, or of one that it was
/// switched on after.
#[must_use]
pub fn is_image_of(dir: &Path, vm: VmId, disk: &ResolvedDisk) -> bool {
    let name = disk.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let copy = name.strip_prefix(&format!("{vm}-")).and_then(|rest| rest.split('-').next());
    let copy = copy.and_then(|text| text.parse().ok());
    copy.is_some_and(|copy| disk.path == image_path(dir, vm, copy, disk))
}

/// Where a copy's own image of a disk lies, in `dir`.
#[must_use]
pub fn image_path(dir: &Path, vm: VmId, copy: CopyId, disk: &ResolvedDisk) -> PathBuf {
    dir.join(format!("{vm}-{copy}-{}.{}", disk.id, disk.format.name()))
}
