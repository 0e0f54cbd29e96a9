//! The production core under a seeded heap of events in virtual time.
//!
//! Owns hosts that fail (`world`, `node`), the network between them (`net`), their QEMUs and drivers
//! (`qemu`), what is asked of them (`asks`), what goes wrong (`faults`, `seeds`), what must always be
//! true (`check`), what is wrong on purpose (`mutant`), and campaigns over many seeds (`campaign`).
//! Knows `godwit_protocol` alone: no file, socket or clock, and no other randomness than the seed's.
//!
//! ```text
//!   seed -> world: [hosts: Core + disk + clock] <-- net: late, lost, doubled, cut --> ...
//!                     | Effect      ^ Happened            every step
//!                     v             |                        v
//!                   qemu: copies, streams                 check: one file per invariant
//! ```

pub mod asks;
pub mod campaign;
pub mod check;
pub mod event;
pub mod explore;
pub mod faults;
pub mod frames;
pub mod mutant;
mod net;
pub mod node;
mod off;
pub mod qemu;
pub mod seeds;
pub mod swarm;
pub mod trace;
pub mod wiring;
pub mod world;
