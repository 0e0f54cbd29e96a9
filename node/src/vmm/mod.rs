//! The VM driver: QEMU processes, their monitors, their memory.
//!
//! Owns everything that knows QEMU. Never knows networks, records, peers or stores: the driver brings them together.
//! Invariant: no guest runs unless [`Qemu::cont`] was called for it.
//!
//! ```text
//! spec (TOML) -> resolved (travels) -> args -> process (record, pidfd, memfd)
//!                    ^ probe (what QEMU and KVM can do here)     | qmp (events, commands) -> migration
//! ```

mod args;
pub mod commands;
mod complaint;
pub mod events;
pub mod memfd;
mod migration;
pub mod pidfd;
pub mod probe;
mod process;
pub mod qmp;
mod record;
pub mod resolved;
pub mod selftest;
mod spawn;
pub mod spec;

pub use args::RAM_BLOCK;
pub use events::EventTime;
pub use memfd::GuestMemory;
pub use migration::Outgoing;
pub use pidfd::Exit;
pub use probe::HostCaps;
pub use process::{Adoption, ProcessError, Qemu, copy_dirs, kill_copy};
pub use record::CopyRecord;
pub use resolved::{Refusal, Resolution, ResolvedSpec};
pub use spawn::{Mode, StartParams};
pub use spec::{Accel, AccelChoice, VmSpec};
