//! The guests of the lab: what they are made of, how they are started, and how they are commanded.
//!
//! Three kinds, one control language ([`wire`]), one formula for the content of their workload's pages ([`pattern`]):
//!
//! | kind | what it is | for |
//! |---|---|---|
//! | [`GuestKind::Busybox`] | Linux with everything in its initrd | scenarios: at work in two seconds |
//! | [`GuestKind::Debian`] | a real system on a disk | the demo and the benchmarks |
//! | [`GuestKind::Bare`] | no operating system | KVM on machines whose KVM cannot start Linux |
//!
//! Owns the images (built on demand, once, in a [`Cache`]) and the commands to guests. Never starts a VM and knows nothing of
//! hosts and wires: the lab does that.

mod bare;
mod cache;
mod control;
mod cpio;
mod debian;
pub mod disk;
mod initrd;
mod mpi;
mod oldqemu;
pub mod pattern;
mod spec;
pub mod wire;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use cache::{CACHE_VARIABLE, Cache};
pub use control::GuestControl;
use disk::DiskForm;
pub use oldqemu::old_qemu;
pub use spec::{
    Accel, GuestAddress, QemuNic, QemuSpec, SpecNic, VmSpec, cmdline, qemu_command, vm_spec,
};

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestKind {
    /// Linux with a busybox initrd; 256 MiB are enough.
    Busybox,
    /// Debian with systemd; 512 MiB.
    Debian,
    /// The bare guest; 64 MiB are enough.
    Bare,
}

/// The files that a guest starts from; shared by all guests of the kind, never written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFiles {
    /// Which guest.
    pub kind: GuestKind,
    /// For `-kernel`.
    pub kernel: PathBuf,
    /// For `-initrd`.
    pub initrd: Option<PathBuf>,
    /// The pristine disk image (raw), of which every VM gets a copy.
    pub base_image: Option<PathBuf>,
}

impl GuestFiles {
    /// Finds the guest's files in the cache, or builds them. Building Debian takes about a minute; it blocks.
    ///
    /// # Errors
    /// If a program is missing or a package cannot be fetched; the error says what to do.
    pub fn prepare(kind: GuestKind, cache: &Cache) -> Result<Self> {
        if kind == GuestKind::Bare {
            return Ok(GuestFiles {
                kind,
                kernel: bare::elf(cache)?,
                initrd: None,
                base_image: None,
            });
        }
        let kernel = initrd::kernel(cache)?;
        Ok(GuestFiles {
            kind,
            initrd: Some(initrd::initrd(cache, &kernel)?),
            kernel: kernel.join("vmlinuz"),
            base_image: match kind {
                GuestKind::Debian => Some(debian::image(cache)?),
                GuestKind::Busybox | GuestKind::Bare => None,
            },
        })
    }

    /// Debian with Open MPI and the lab's job ([`GuestKind::Debian`] on another disk). It blocks.
    ///
    /// # Errors
    /// As [`GuestFiles::prepare`].
    pub fn prepare_mpi(cache: &Cache) -> Result<Self> {
        let kernel = initrd::kernel(cache)?;
        Ok(GuestFiles {
            kind: GuestKind::Debian,
            initrd: Some(initrd::initrd(cache, &kernel)?),
            kernel: kernel.join("vmlinuz"),
            base_image: Some(mpi::image(cache)?),
        })
    }

    /// Makes a VM's own writable disk at `path` from the pristine image; false, and nothing is made, for guests without one.
    ///
    /// # Errors
    /// If it cannot be made; then there is no file at `path`.
    pub fn make_disk(&self, path: &Path, form: DiskForm) -> Result<bool> {
        let Some(base) = &self.base_image else {
            return Ok(false);
        };
        disk::from_base(base, path, form)?;
        Ok(true)
    }

    /// The same guest with a pristine image of `gib` GiB, of which about `used` bytes hold something: the system, and a file
    /// of random bytes. Built once; it blocks.
    ///
    /// # Errors
    /// If this guest has no disk, or the image cannot be built.
    pub fn on_larger_disk(&self, cache: &Cache, gib: u64, used: u64) -> Result<Self> {
        let base = self.base_image.as_ref().context("this guest has no disk")?;
        Ok(GuestFiles { base_image: Some(disk::larger(cache, base, gib, used)?), ..self.clone() })
    }
}
