//! The VM driver: QEMU processes, their monitors, their memory.
//!
//! Owns everything that knows QEMU. Never knows networks, records, peers or stores: the driver brings them together.
//! Invariant: no guest runs unless [`Qemu::cont`] was called for it.
//!
//! ```text
//! spec (TOML) -> resolved (travels) -> args -> process (record, pidfd, memfd)
//!                    ^ probe (what QEMU and KVM can do here)     | qmp (events, commands) -> migration, disks
//!                    ^ image (what qemu-img says and makes), reserve (room for it)
//! ```

mod args;
pub mod commands;
mod complaint;
pub mod disk;
pub mod disks;
pub mod events;
pub mod image;
pub mod memfd;
mod migration;
pub mod pidfd;
pub mod probe;
mod process;
pub mod qmp;
pub mod record;
mod refusal;
pub mod reserve;
pub mod resolved;
pub mod selftest;
mod spawn;
pub mod spec;

pub use args::RAM_BLOCK;
pub use disk::{Backing, ResolvedDisk, image_path, is_image_of};
pub use disks::{Mirror, MirrorParams};
pub use events::EventTime;
pub use memfd::GuestMemory;
pub use migration::Outgoing;
pub use pidfd::Exit;
pub use probe::HostCaps;
pub use process::{Adoption, ProcessError, Qemu, copy_dirs, kill_copy};
pub use record::CopyRecord;
pub use refusal::Refusal;
pub use reserve::Reservation;
pub use resolved::{Resolution, ResolvedSpec};
pub use spawn::{Mode, StartParams};
pub use spec::{Accel, AccelChoice, VmSpec};
