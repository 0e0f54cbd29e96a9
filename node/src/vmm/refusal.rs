//! Why a host does not take a VM, or a VM does not move.
//!
//! Owns the words. Invariant: each is one line that says what to do next.

use std::path::Path;

use thiserror::Error;

use super::image::ImageError;
use super::spec::{Accel, SpecError};

/// Why a host does not take a VM, or a VM does not move. One line each, with the next step.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The spec breaks a rule.
    #[error("{0}")]
    Spec(#[from] SpecError),
    /// A device of this host.
    #[error("the VM has passthrough device {0}, which cannot leave its host; detach it first")]
    Passthrough(String),
    /// A machine type that the QEMU here does not know.
    #[error(
        "QEMU {qemu} on this host does not know machine type {machine}; install a newer QEMU (scripts/setup does)"
    )]
    UnknownMachine {
        /// The machine type.
        machine: String,
        /// QEMU's version.
        qemu: String,
    },
    /// A migration capability or parameter that the QEMU here lacks.
    #[error(
        "QEMU {qemu} on this host has no migration {kind} {name}; install QEMU {needed} or newer (scripts/setup does)"
    )]
    MissingCapability {
        /// `capability` or `parameter`.
        kind: &'static str,
        /// Its name.
        name: &'static str,
        /// QEMU's version.
        qemu: String,
        /// The first version that has all that is needed.
        needed: &'static str,
    },
    /// CPU features that this host lacks.
    #[error(
        "this host cannot give the guest's CPU {cpu} under {accel}: it lacks {features}; choose another host"
    )]
    MissingCpuFeatures {
        /// The CPU model.
        cpu: String,
        /// The accelerator.
        accel: Accel,
        /// The features, as QEMU names them.
        features: String,
    },
    /// A CPU model that QEMU refuses.
    #[error("QEMU refuses CPU {cpu} under {accel}: {reason}")]
    BadCpu {
        /// The CPU model.
        cpu: String,
        /// The accelerator.
        accel: Accel,
        /// QEMU's reason.
        reason: String,
    },
    /// KVM does not work here.
    #[error("the VM runs under kvm and this host cannot: {0}")]
    NoKvm(String),
    /// A file that cannot be read.
    #[error("cannot read {path} on this host: {reason}; copy it there")]
    File {
        /// The file.
        path: String,
        /// Why.
        reason: String,
    },
    /// A file with another content.
    #[error(
        "{0} on this host differs from the one that the VM was started with; copy that one there"
    )]
    FileDiffers(String),
    /// An image that cannot be a disk of a VM.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// A disk's base that is not in the library here.
    #[error(
        "base {name} of {disk} is not in this host's image library: `godwit image add` it there"
    )]
    BaseMissing {
        /// The file's name at the source.
        name: String,
        /// The disk.
        disk: String,
    },
    /// Too little room for the disks.
    #[error(
        "no space: the VM's disks need {need_mib} MiB, {dir} has room for {room_mib} MiB (5 % stay free); free some or choose another --image-dir"
    )]
    Space {
        /// What they need, in MiB.
        need_mib: u64,
        /// What may be written, in MiB.
        room_mib: u64,
        /// Where.
        dir: String,
    },
    /// Too little memory.
    #[error(
        "the VM needs {need_mib} MiB of memory, {free_mib} MiB of this host's limit of {limit_mib} MiB are free"
    )]
    Memory {
        /// Memory that the VM needs, in MiB.
        need_mib: u64,
        /// Memory that is free under the limit, in MiB.
        free_mib: u64,
        /// The limit, in MiB.
        limit_mib: u64,
    },
}

pub(super) fn file_refusal(path: &Path, error: &std::io::Error) -> Refusal {
    Refusal::File { path: path.display().to_string(), reason: error.to_string() }
}
