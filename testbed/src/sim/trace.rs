//! What happened: a hash over all of it, and counts of what the report names.
//!
//! Owns no decision. Invariant: whatever could differ between two runs of a seed goes into the hash.

use godwit_protocol::core::Command;
use godwit_protocol::time::Time;
use godwit_protocol::wire::record::{Cause, Record};
use xxhash_rust::xxh3::Xxh3;

/// A hash over everything that happened.
#[derive(Clone, Default)]
pub struct Trace {
    hasher: Xxh3,
}

impl Trace {
    /// Something happened then, there.
    pub fn moment(&mut self, at: Time, kind: u8, node: usize) {
        self.hasher.update(&at.0.to_le_bytes());
        self.hasher.update(&[kind, node as u8]);
    }

    /// A core commanded.
    pub fn command(&mut self, node: usize, command: &Command) {
        let kind = match command {
            Command::Persist(..) => 1,
            Command::Send(..) => 2,
            Command::Effect { .. } => 3,
            Command::Decided(_) => 4,
            Command::Undecided(..) => 5,
            Command::Status(_) => 6,
            Command::Route(_) => 7,
            Command::Member(..) => 8,
            Command::Boot(..) => 9,
            Command::Removed(..) => 10,
        };
        self.hasher.update(&[kind, node as u8]);
    }

    /// A message as it is on the wire.
    pub fn message(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// The hash so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hasher.digest()
    }
}

/// How often what the report names happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Records that moved copies.
    pub committed: u64,
    /// Moves that were given up.
    pub aborted: u64,
    /// Epochs that a bound end drove to a decision because it did not know.
    pub unknown_resolved: u64,
    /// Directions that were cut.
    pub partitions: u64,
    /// Nodes that died.
    pub crashes: u64,
    /// Writes that were cut short by that, and stores that were lost.
    pub torn_writes: u64,
    /// Nodes that stood still for a time.
    pub pauses: u64,
    /// Words of strangers.
    pub strangers: u64,
    /// Moves that went on from a record by which NICs were connected otherwise.
    pub rebased: u64,
    /// Guests that were lost with their only copy.
    pub lost: u64,
    /// Faults while members of a cluster stood still; in a sum over seeds: seeds that had some.
    pub cutover_faults: u64,
}

impl Coverage {
    /// Adds what another seed saw.
    pub fn add(&mut self, other: &Self) {
        self.committed += other.committed;
        self.aborted += other.aborted;
        self.unknown_resolved += other.unknown_resolved;
        self.partitions += other.partitions;
        self.crashes += other.crashes;
        self.torn_writes += other.torn_writes;
        self.pauses += other.pauses;
        self.strangers += other.strangers;
        self.rebased += other.rebased;
        self.lost += other.lost;
        self.cutover_faults += u64::from(other.cutover_faults > 0);
    }

    /// A record was decided.
    pub fn decided(&mut self, record: &Record) {
        match record.cause {
            Cause::Move(_) => self.committed += 1,
            Cause::Stay(_) => self.aborted += 1,
            _ => {}
        }
    }
}
