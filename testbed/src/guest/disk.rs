//! Disks of guests: their forms, and how their images are made.
//!
//! Owns the making of image files. Never knows which guest uses one. Invariant: half an image is never left behind.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::cache::{Cache, run};

/// What an image file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskForm {
    /// The bytes of the disk, sparse.
    Raw,
    /// A qcow2 that holds everything.
    Qcow2,
    /// A qcow2 that holds what differs from the pristine image.
    Overlay,
}

impl DiskForm {
    /// QEMU's name of the format.
    #[must_use]
    pub fn format(self) -> &'static str {
        match self {
            DiskForm::Raw => "raw",
            DiskForm::Qcow2 | DiskForm::Overlay => "qcow2",
        }
    }
}

/// A disk of a guest under `godwit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecDisk {
    /// Its image.
    pub path: PathBuf,
    /// What that is.
    pub form: DiskForm,
    /// Every host reaches the same image at this path; otherwise it moves with the VM.
    pub shared: bool,
}

impl SpecDisk {
    /// A raw image that every host reaches.
    pub fn shared(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), form: DiskForm::Raw, shared: true }
    }

    /// An image of the VM's own.
    pub fn own(path: impl Into<PathBuf>, form: DiskForm) -> Self {
        Self { path: path.into(), form, shared: false }
    }

    /// Makes a disk of the VM's own that reads as the raw image `base` until it is written to.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn overlay(path: impl Into<PathBuf>, base: &Path) -> Result<Self> {
        let disk = Self::own(path, DiskForm::Overlay);
        from_base(base, &disk.path, disk.form)?;
        Ok(disk)
    }

    /// Makes an empty image of `bytes`, a multiple of 4096, for a disk of the VM's own.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn blank(path: impl Into<PathBuf>, form: DiskForm, bytes: u64) -> Result<Self> {
        let disk = Self::own(path, form);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", form.format(), "--"]).arg(&disk.path);
        whole(&disk.path, create.arg(bytes.to_string()))?;
        Ok(disk)
    }

    /// Fills a raw image with what does not compress and is nowhere else.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn fill(&self) -> Result<()> {
        let file = File::options().write(true).open(&self.path)?;
        let bytes = file.metadata()?.len();
        let mut content = blake3::Hasher::new().update(&bytes.to_le_bytes()).finalize_xof();
        std::io::copy(&mut (&mut content).take(bytes), &mut std::io::BufWriter::new(file))?;
        Ok(())
    }
}

/// Makes an image at `path` that reads as the raw image `base`.
pub(super) fn from_base(base: &Path, path: &Path, form: DiskForm) -> Result<()> {
    match form {
        DiskForm::Raw => {
            let mut copy = Command::new("cp");
            copy.args(["--sparse=always", "--reflink=auto", "--"]).arg(base).arg(path);
            whole(path, &mut copy)
        }
        DiskForm::Qcow2 => {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-q", "-f", "raw", "-O", "qcow2", "--"]);
            whole(path, convert.arg(base).arg(path))
        }
        DiskForm::Overlay => {
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
            whole(path, create.arg(base).arg("--").arg(path))
        }
    }
}

/// The system of the image `base` on a file system of `gib` GiB, of which about `used` bytes hold something.
pub(super) fn larger(cache: &Cache, base: &Path, gib: u64, used: u64) -> Result<PathBuf> {
    let key = base.as_os_str().as_encoded_bytes();
    let recipe: [&[u8]; 4] = [b"1", key, &gib.to_le_bytes(), &used.to_le_bytes()];
    let name = format!("debian{gib}g");
    let dir = cache.get(&name, &recipe, |dir| {
        let image = dir.join("root.img");
        from_base(base, &image, DiskForm::Raw)?;
        File::options().write(true).open(&image)?.set_len(gib << 30)?;
        run(Command::new("e2fsck").args(["-f", "-p"]).arg(&image))?;
        run(Command::new("resize2fs").arg(&image))?;
        let more = used.saturating_sub(std::fs::metadata(&image)?.blocks() * 512);
        let random = dir.join("random");
        let mut bytes = blake3::Hasher::new().update(&gib.to_le_bytes()).finalize_xof();
        std::io::copy(&mut (&mut bytes).take(more), &mut File::create(&random)?)?;
        let write = format!("write {} /var/random", random.display());
        run(Command::new("debugfs").args(["-w", "-R", &write]).arg(&image))?;
        std::fs::remove_file(&random)?;
        Ok(())
    })?;
    Ok(dir.join("root.img"))
}

/// Runs a command that makes `path`; half a disk would boot, and fail later.
fn whole(path: &Path, command: &mut Command) -> Result<()> {
    let made = run(command);
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made.with_context(|| format!("Cannot make {}", path.display())).map(drop)
}
