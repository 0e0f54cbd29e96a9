//! What happens at a moment. Owns the names; what comes of each is its owner's.

use godwit_protocol::id::{CopyId, MigrationId, VmId};
use godwit_protocol::migrate::Happened;
use godwit_protocol::time::Time;
use godwit_protocol::wire::control::Control;

/// What happens at a moment. Those of a driver name the start of the node's process that they belong to.
#[derive(Debug)]
pub enum Event {
    /// A message arrives: from, to, what.
    Deliver(usize, usize, Box<Control>),
    /// A node starts.
    Restart(usize),
    /// A migration's worker does its next work.
    Work(usize, u64, MigrationId),
    /// A driver tells its core.
    Happened(usize, u64, MigrationId, Box<Happened>),
    /// A source measures.
    Figures(usize, u64, MigrationId),
    /// The last of a stream leaves, once the path is there.
    Stream {
        /// The source.
        at: usize,
        /// Which start of it.
        start: u64,
        /// The migration.
        id: MigrationId,
        /// It is given up then.
        until: Time,
        /// What the guest held when it was stopped.
        content: u64,
    },
    /// All of a stream arrived, with what it says that the guest held.
    Load(usize, u64, MigrationId, CopyId, u64),
    /// A driver notices that a QEMU is gone.
    Gone(usize, u64, CopyId),
    /// Late writes reach the disk ([`super::mutant::Mutant::VoteEarly`]).
    Flush(usize, u64),
    /// A source reads who is named ([`super::mutant::Mutant::CleanRead`]).
    ReadBack(usize, u64, CopyId),
    /// Nothing gets from the one to the other any more.
    Cut(usize, usize),
    /// All cuts end.
    Heal,
    /// A QEMU is killed; whether one that runs.
    Kill(bool),
    /// A node dies, and comes back after so many milliseconds.
    Crash(usize, u64),
    /// A node stands still for so many milliseconds.
    Pause(usize, u64),
    /// A node dies, and what it had on its disk cannot be read any more.
    LoseStore(usize),
    /// Somebody who is no member repeats what a member said: to whom.
    Stranger(usize, Box<Control>),
    /// The VM shall move.
    Ask(u8),
    /// Members of the cluster shall, each to the k-th of the other hosts; how often this is asked again.
    AskCluster(u8, Vec<(VmId, usize)>, u32),
    /// A migration shall be given up.
    Abort(u8),
    /// A VM that is off shall be started; how often this is asked again.
    Start(VmId, u32),
    /// A driver boots a copy that a record names.
    Boot(usize, u64, CopyId),
    /// A NIC of the VM shall be filtered otherwise.
    Rewire(VmId),
    /// A driver connects a copy's NICs as the newest record says.
    Follow(usize, u64, CopyId),
}

impl Event {
    /// The node that has to be awake for it.
    pub(super) fn node(&self) -> Option<usize> {
        match self {
            Self::Deliver(_, i, _)
            | Self::Work(i, ..)
            | Self::Happened(i, ..)
            | Self::Figures(i, ..)
            | Self::Load(i, ..)
            | Self::Gone(i, ..)
            | Self::Boot(i, ..)
            | Self::Follow(i, ..)
            | Self::Stream { at: i, .. } => Some(*i),
            _ => None,
        }
    }

    /// Its number in the trace.
    pub(super) fn kind(&self) -> u8 {
        match self {
            Self::Deliver(..) => 1,
            Self::Restart(_) => 2,
            Self::Work(..) => 3,
            Self::Happened(..) => 4,
            Self::Figures(..) => 5,
            Self::Stream { .. } => 6,
            Self::Load(..) => 7,
            Self::Gone(..) => 8,
            Self::Flush(..) => 9,
            Self::ReadBack(..) => 10,
            Self::Cut(..) => 11,
            Self::Heal => 12,
            Self::Kill(_) => 13,
            Self::Crash(..) => 14,
            Self::Pause(..) => 15,
            Self::LoseStore(_) => 16,
            Self::Stranger(..) => 17,
            Self::Ask(_) => 18,
            Self::AskCluster(..) => 19,
            Self::Abort(_) => 20,
            Self::Start(..) => 21,
            Self::Boot(..) => 22,
            Self::Rewire(_) => 23,
            Self::Follow(..) => 24,
        }
    }
}
