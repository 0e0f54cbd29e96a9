//! One migration, seen from each end.
//!
//! Owns when a guest may be stopped, who is bound to which epoch, and what each end does with a
//! decision. Never talks to QEMU or a socket: it answers events with [`Action`]s, performed in
//! order; a [`Action::Persist`] is on disk before the next action is performed.
//!
//! ```text
//!  source                                            destination
//!  Preparing ----------- Prepare ------------------> Checking
//!  Transfer  <---------- Ready --------------------- Receiving
//!     |      ----------- PrepareBallot ------------>    |
//!     |      <---------- BallotReady ---------------    |
//!  Stopping  (bound on disk, then QMP stop)             |
//!  Stopped   ........... last pages, device state ..> Loaded: bound on disk, proposes e+1
//!     |      <---------- decided e+1 --------------->   |
//!  Starting                                          Starting (on disk), cont
//!  Releasing <---------- Running ------------------- Running
//!  Moved     ----------- Released -----------------> over
//! ```
//!
//! A member of a cluster that is switched off goes the same way: its source's QEMU shows its disks and never
//! runs, and in place of `cont` either end is told to let it rest.
//!
//! Invariants (R1, R2, R4): a destination copy gets `cont` only after a decided record names it; a
//! bound end acts only on the decision of `base + 1`, across restarts; *unknown* is resolved by
//! deciding, never by reading.

mod ballot;
pub mod destination;
pub mod lead;
pub mod plan;
pub mod source;

use serde::{Deserialize, Serialize};

use crate::id::{CopyId, Epoch, HostId, MigrationId, VmId};
use crate::wire::migrate::{Body, Options, Seat, Status};
use crate::wire::record::Record;
use crate::wire::wiring::Wiring;

/// Which end of a migration a host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The guest ran here.
    Source,
    /// The guest shall run here.
    Destination,
    /// It leads a cluster's members, and has ordered some to stop.
    Lead,
}

/// Hard state of a bound end: written before the step that binds it, removed when the move is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// The migration.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The cluster whose record decides.
    pub cluster: VmId,
    /// It waits for the decision of the epoch after this one.
    pub base: Epoch,
    /// Which end this host is.
    pub role: Role,
    /// The other end.
    pub peer: HostId,
    /// The node that took the request.
    pub requested_on: HostId,
    /// This end's copy.
    pub copy: CopyId,
    /// Destination: `cont` may have been sent. A QEMU that is gone after this is *lost*.
    pub started: bool,
    /// Lead: the members that move.
    pub team: Vec<Seat>,
}

/// What a migration wants done. Performed in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write this hard state and flush it before anything that follows.
    Persist(Moving),
    /// Remove the hard state of this migration.
    Forget,
    /// Tell the other end.
    Send(HostId, Body),
    /// Tell that host about another migration: a member's, or the cluster's.
    Tell(HostId, MigrationId, VmId, Body),
    /// Run phase 1 for the next epoch with this host as proposer.
    PrepareBallot,
    /// Propose this record (the next epoch).
    Propose(Record),
    /// Drive the next epoch to a decision: adopt what may have been accepted, else *stay*.
    Resolve(String),
    /// Let the driver do this.
    Effect(Effect),
    /// The status changed: show it.
    Report,
}

/// What the driver does to the world for a migration; each is answered by an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Destination: check that this host can take the VM, start a QEMU that waits for it.
    Receive {
        /// The VM's description.
        spec: Vec<u8>,
        /// How its NICs are connected, whatever the description says.
        nics: Vec<Wiring>,
        /// The other end.
        source: HostId,
    },
    /// Before the stop: the NICs of this end's copy are connected like that, by the record of that epoch. Answered with
    /// [`Happened::Rewired`] or [`Happened::TransferFailed`].
    Rewire(Epoch, Vec<Wiring>),
    /// Source: tell what a destination has to know of the VM, or why it cannot move.
    Describe,
    /// Source: what the exchange may take of the path, bytes per second; 0: what the path gives.
    Pace(u64),
    /// Source: let QEMU stream into the relay and dial the destination.
    Transfer {
        /// The other end.
        to: HostId,
        /// What was asked for.
        options: Options,
    },
    /// Source: QMP `stop`, then let the last pages and the device state go.
    Stop,
    /// Source: end the transfer; the guest goes on running.
    CancelTransfer,
    /// `cont` this copy: a decided record names it.
    Cont(CopyId),
    /// A decided record says that this copy is here, and it is switched off or its guest has ended: end its QEMU, if
    /// there is one, and keep its disks and its description. Answered like `cont`.
    Rest(CopyId),
    /// End the QEMU of this copy and free what it holds; it will never run again.
    Discard(CopyId),
    /// Destination: forget what was received; no copy was bound.
    DropReceived,
    /// Destination: the copy's QEMU is gone before `cont`: start it again from the stored device
    /// state and the memory.
    Rebuild(CopyId),
}

/// What the source measures while pages cross; from the driver, a few times a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// QEMU's completed passes over memory.
    pub passes: u64,
    /// Bytes that QEMU still has to send (its estimate).
    pub remaining_bytes: u64,
    /// Bytes accepted from QEMU that are not placed at the destination, as they will cross.
    pub backlog_bytes: u64,
    /// What the path gave lately, bytes per second.
    pub link_bytes_per_s: u64,
    /// Round trip of the path, milliseconds.
    pub rtt_ms: u64,
    /// What the guest dirties, bytes per second.
    pub dirty_bytes_per_s: u64,
    /// Bytes on the wire per guest byte lately, in parts per million.
    pub wire_per_guest_ppm: u64,
    /// Bytes that crossed, both directions.
    pub bulk_bytes: u64,
    /// Non-zero guest memory of the first pass, bytes.
    pub nonzero_bytes: u64,
    /// Guest bytes that are handled (zero, known and literal alike) in the first pass.
    pub first_pass_bytes: u64,
    /// Size of the disks that move, bytes.
    pub disk_bytes: u64,
    /// Of these, bytes that are not copied yet.
    pub disk_left_bytes: u64,
    /// Whether every disk is copied but for what the guest writes just now.
    pub disks_ready: bool,
    /// Bytes that left for disks.
    pub disk_wire_bytes: u64,
    /// What the guest may write at most, bytes per second; 0: as it likes.
    pub disk_throttle_bytes_per_s: u64,
    /// How long it was held to that, milliseconds.
    pub disk_throttled_ms: u64,
    /// Milliseconds since the other end was last heard on the bulk connection.
    pub silent_ms: u64,
    /// Pages: all zero.
    pub zero: u64,
    /// Pages: the destination had them.
    pub known: u64,
    /// Pages: sent.
    pub literal: u64,
}

/// What happened to a migration, as far as its end is told by the driver or the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// A message of the other end.
    Said(HostId, Body),
    /// Lead: a message about this member.
    Member(HostId, VmId, Body),
    /// Source: what a destination has to know.
    Described {
        /// The VM's description.
        spec: Vec<u8>,
        /// Guest memory, bytes.
        ram_bytes: u64,
    },
    /// Destination: a QEMU waits.
    Received,
    /// The copy's NICs are connected as the record of that epoch says.
    Rewired(Epoch),
    /// Destination: this host cannot take the VM. Source: it cannot move.
    Refused(String),
    /// Source: figures.
    Progress(Progress),
    /// Source: the transfer cannot go on. Destination: what was received is of no use.
    TransferFailed(String),
    /// Source: the guest stands still since then (microseconds since 1970).
    Stopped(u64),
    /// Destination: device state loaded, digests equal; a fresh copy id was minted.
    Loaded(CopyId),
    /// `cont` succeeded at that time (microseconds since 1970).
    Running(u64),
    /// A copy's QEMU is gone; one that an earlier migration left may be meant.
    QemuGone {
        /// Which copy's.
        copy: CopyId,
        /// Whether `cont` had been written to it: if not, the guest never ran in it.
        ran: bool,
    },
    /// Destination: the copy waits again, loaded.
    Rebuilt,
    /// Destination: it could not be started again.
    RebuildFailed(String),
    /// A majority has promised; what was found accepted must be adopted.
    BallotReady,
    /// The next epoch is decided.
    Decided(Record),
    /// A host is connected, for the first time or again: it may have been restarted.
    Connected(HostId),
    /// Somebody asked to give up.
    Abort,
    /// The core's timer for this migration rang.
    Timer,
}

/// Times after which a silent step is given up or asked about again, milliseconds.
pub mod wait {
    /// Destination checks and starts a QEMU.
    pub const PREPARE_MS: u64 = 60_000;
    /// Default deadline of the transfer.
    pub const TRANSFER_MS: u64 = 3_600_000;
    /// How long the lead waits for a moment at which little is left, once all may be stopped.
    pub const CALM_MS: u64 = 1_000;
    /// Phase 1 before the stop.
    pub const BALLOT_MS: u64 = 3_000;
    /// From the stop to a decision, before an end drives one.
    pub const DECISION_MS: u64 = 20_000;
    /// How often the lead of a cluster asks each member how it stands.
    pub const LEAD_MS: u64 = 1_000;
    /// A member that was not heard of for so long is not waited for, and one that does not hear of its
    /// lead gives up.
    pub const LED_MS: u64 = 20_000;
    /// How old a member's word may be that it may be stopped.
    pub const FRESH_MS: u64 = 2_000;
    /// From the order to stop, before the lead drives a decision: all members must have stopped.
    pub const STOPPED_MS: u64 = 3_000;
    /// From the order to stop to a decision, before the lead drives one; on top of the planned pause.
    pub const STOP_PHASE_MS: u64 = 10_000;
    /// Between two questions to the other end.
    pub const ASK_MS: u64 = 500;
    /// From the decision to *running*, before the source shows the move as *lost* until it hears better; and from
    /// *running*, before the destination ends the move without the source's *released*.
    pub const RUNNING_MS: u64 = 120_000;
    /// How often a destination that forgot the transfer (its node restarted) is asked again: what it
    /// received need not cross again.
    pub const AGAIN: u32 = 3;
    /// How often starting a lost destination QEMU again may fail before its guest is given up.
    pub const REBUILDS: u32 = 3;
    /// An end that hears nothing of the other while pages cross asks where it stands.
    pub const SILENCE_MS: u64 = 5_000;
    /// Unbound ends give the move up after so long without a word of the other.
    pub const HEARD_MS: u64 = 90_000;
    /// Before *prepare* is said again to a destination that has not answered.
    pub const PREPARE_AGAIN_MS: u64 = 2_000;
    /// How long a prepared ballot counts as a majority that was seen alive.
    pub const BALLOT_FRESH_MS: u64 = 10_000;
    /// The ballot is prepared so long before the work is expected to be done.
    pub const BALLOT_AHEAD_MS: u64 = 2_000;
    /// Before a `cont` that was not answered is asked for again.
    pub const CONT_AGAIN_MS: u64 = 15_000;
}

/// A cause as it may be stored and sent: at most [`crate::limits::TEXT_BYTES`] long.
#[must_use]
pub(crate) fn clip(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(crate::limits::TEXT_BYTES));
    text
}

/// A migration's public face: both ends keep one.
pub trait Migration {
    /// What is known of it.
    fn status(&self) -> &Status;
    /// Takes in what happened; what is to be done is appended to `out`.
    fn handle(&mut self, now: crate::time::Time, happened: Happened, out: &mut Vec<Action>);
    /// When [`Happened::Timer`] is due.
    fn timeout(&self) -> Option<crate::time::Time>;
    /// Whether nothing more will happen and the machine can be dropped.
    fn is_over(&self) -> bool;
}
