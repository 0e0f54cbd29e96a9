//! What source, destination and requester of a migration say to each other.

use serde::{Deserialize, Serialize};

use super::record::{Record, Release};
use crate::id::{CopyId, Epoch, HostId, MigrationId, Name, VmId};

/// Where a migration should end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// This host.
    Host(HostId),
    /// Any host of this site that accepts the VM.
    Site(Name),
    /// Any other host that accepts the VM.
    Auto,
    /// One of these hosts, the first that accepts the VM.
    AnyOf(Vec<HostId>),
}

/// What the requester asks for. Units in names; zero means *no limit* or *the default*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Options {
    /// Most bytes per second on the bulk connection; 0: what the path gives.
    pub bandwidth_bytes_per_s: u64,
    /// Longest planned pause; 0: 300 ms.
    pub max_downtime_ms: u64,
    /// Give up (stay) if the guest was not stopped by then; 0: one hour.
    pub deadline_s: u64,
    /// Most bytes per second that are read of each disk to be copied; 0: as fast as they are taken.
    pub disk_bandwidth_bytes_per_s: u64,
}

/// A member's migration inside a cluster's, and back: the id of one gives the other.
#[must_use]
pub fn of_member(id: MigrationId, vm: VmId) -> MigrationId {
    let mut mixed = id.0;
    mixed.iter_mut().zip(vm.0).for_each(|(a, b)| *a ^= b);
    MigrationId(mixed)
}

/// The cluster's migration that a member's is a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Led {
    /// The cluster's migration.
    pub id: MigrationId,
    /// The host that leads it.
    pub host: HostId,
}

/// One member that moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// The VM.
    pub vm: VmId,
    /// Its source.
    pub from: HostId,
    /// Its destination.
    pub to: HostId,
    /// The copy that moves.
    pub copy: CopyId,
}

/// What the lead needs to know of a member whose pages cross.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Figures {
    /// It may be stopped.
    pub converged: bool,
    /// It will be soon: the ballot may be prepared.
    pub near: bool,
    /// What still has to cross, bytes on the wire.
    pub left_bytes: u64,
    /// What the guest dirties, bytes on the wire per second.
    pub dirty_bytes_per_s: u64,
    /// What its path gave lately, bytes per second.
    pub link_bytes_per_s: u64,
}

/// How a member stands, told by its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stand {
    /// Its own status.
    pub status: Status,
    /// While pages cross.
    pub figures: Option<Figures>,
    /// Wall-clock time of its STOP event, microseconds since 1970.
    pub stopped_us: Option<u64>,
    /// Wall-clock time of its RESUME event, at either end.
    pub resumed_us: Option<u64>,
}

/// The message and what it is about. What a cluster's lead is told carries the cluster's migration and
/// the member's VM; everything else carries the id of the VM's own migration ([`of_member`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The migration.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The epoch of the record that the migration starts from: it can win only the next one.
    pub base: Epoch,
    /// What is said.
    pub body: Body,
}

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// Source to destination: check, reserve, start a QEMU that waits.
    Prepare {
        /// The decided record that the move starts from.
        record: Box<Record>,
        /// The resolved VM description (encoded by the VM driver; opaque to the core).
        spec: Vec<u8>,
        /// What was asked for.
        options: Options,
        /// The node that took the request.
        requested_on: HostId,
        /// The cluster's migration, if it is one.
        led: Option<Led>,
    },
    /// Destination to source: a QEMU waits; open a bulk connection.
    Ready,
    /// Destination to source: cannot take the VM; nothing was changed.
    Refused(String),
    /// Source, or lead, to the destination that proposes: nearly converged, run phase 1 for the next
    /// epoch. With all members that move; none: this VM alone.
    PrepareBallot(Vec<Seat>),
    /// The answer: a majority has promised; stop when you like.
    BallotReady,
    /// Source to destination, lead to source: gave up before the stop; forget the reservation.
    Cancel(String),
    /// Destination to source: gave up before *loaded*; it will never run this copy.
    Failed(String),
    /// Destination to source: device state loaded, digests compared equal, bound from here on.
    Loaded(CopyId),
    /// Destination to source: the copy runs.
    Running {
        /// The copy.
        copy: CopyId,
        /// Wall-clock time of its RESUME event, microseconds since 1970.
        resumed_us: u64,
    },
    /// Destination to source: the copy ran and its QEMU is gone.
    Lost(String),
    /// Asks the other end where it stands (after a restart or a long silence).
    Where,
    /// The answer: nothing is known of this migration.
    Unknown,
    /// Source to destination: the source copy is gone; the move is over.
    Released,
    /// Lead to a member's source: move this VM together with the others.
    Order {
        /// The decided record that the move starts from.
        record: Box<Record>,
        /// Hosts to try, best first.
        to: Vec<HostId>,
        /// What was asked for.
        options: Options,
    },
    /// Lead to a member's source: how does it stand?
    How {
        /// Its share of the path, bytes per second; 0: what the path gives.
        share_bytes_per_s: u64,
    },
    /// The answer, and told whenever it changes.
    Stand(Box<Stand>),
    /// Lead to a member's source: stop the guest, if it starts from the record of that epoch, too. The destination of that
    /// member proposes.
    Stop(Seat, Epoch),
    /// To a member's destination: the destination of that member proposes.
    Proposer(Seat),
    /// Source to destination: the guest stands still. The destination proposes with this word.
    Stopped(Release),
    /// A bound destination to the one that proposes: this member is loaded, too, and was released.
    LoadedToo(CopyId, Release),
    /// To a member: nothing is known of the cluster's migration.
    NoLead,
    /// A cluster's lead to the host of a member that stays: others move.
    Moves,
    /// Source to an unbound destination: NICs are connected otherwise by this decided record, from which the move goes on.
    Rebase(Box<Record>),
    /// The answer: so they are here, by the record of that epoch.
    Rebased(Epoch),
}

/// How a migration ended, or how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Asked for; the destination checks.
    Preparing,
    /// The guest runs at the source while pages cross.
    Transfer,
    /// The guest stands still; the last pages and the device state cross.
    Stopped,
    /// Loaded at the destination; the epoch is being decided.
    Deciding,
    /// Decided for the destination, which has not reported *running* yet.
    Starting,
    /// It runs at the destination; the source is not yet released.
    Releasing,
    /// End: it runs at the destination.
    Moved,
    /// End: it runs at the source.
    Stayed,
    /// End: it ran at the destination and its QEMU is gone.
    Lost,
}

impl Phase {
    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_end(self) -> bool {
        matches!(self, Self::Moved | Self::Stayed | Self::Lost)
    }
}

/// One moment of a migration's timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Wall clock of the host that saw it, microseconds since 1970.
    pub at_us: u64,
    /// The host.
    pub host: HostId,
    /// What happened.
    pub what: String,
}

/// What is known of a member of a cluster that moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// The VM.
    pub vm: VmId,
    /// Its alias.
    pub name: Name,
    /// Source.
    pub from: HostId,
    /// Destination, once one is chosen.
    pub to: Option<HostId>,
    /// How far it is.
    pub phase: Phase,
    /// One line of cause, at its end.
    pub cause: String,
    /// Share of its work that is done, 0 to 1,000,000.
    pub done_ppm: u32,
    /// From STOP to RESUME, microseconds.
    pub downtime_us: Option<u64>,
}

/// What anyone may know of a migration: shown as progress and as the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The migration.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The cluster whose record decides; a lone VM's has its id.
    pub cluster: VmId,
    /// Its alias.
    pub name: Name,
    /// Source.
    pub from: HostId,
    /// Destination, once one is chosen.
    pub to: Option<HostId>,
    /// The node that took the request.
    pub requested_on: HostId,
    /// How far it is.
    pub phase: Phase,
    /// One line of cause, at the end.
    pub cause: String,
    /// The epoch before.
    pub epoch_before: Epoch,
    /// The epoch after, at the end.
    pub epoch_after: Option<Epoch>,
    /// Guest memory, bytes.
    pub ram_bytes: u64,
    /// Guest memory bytes whose page was not zero in the first pass.
    pub ram_nonzero_bytes: u64,
    /// Bytes that crossed on the bulk connection, both directions.
    pub bulk_bytes: u64,
    /// Share of the work that is done, 0 to 1,000,000; never shrinks.
    pub done_ppm: u32,
    /// Milliseconds left at the measured rates; none: unknown.
    pub left_ms: Option<u64>,
    /// What the guest dirties, bytes per second.
    pub dirty_bytes_per_s: u64,
    /// Size of the disks that move, bytes.
    pub disk_bytes: u64,
    /// Bytes that left for the disks: ids and compressed content.
    pub disk_wan_bytes: u64,
    /// What the guest may write to its disks at most, bytes per second, because it wrote faster than
    /// the path takes; 0: as it likes.
    pub disk_throttle_bytes_per_s: u64,
    /// How long it was held to that, milliseconds.
    pub disk_throttled_ms: u64,
    /// Pages by how they crossed: all zero.
    pub chunks_zero: u64,
    /// Pages by how they crossed: the destination had them.
    pub chunks_known: u64,
    /// Pages by how they crossed: sent.
    pub chunks_literal: u64,
    /// From the request to RESUME (at the end) or to now, milliseconds.
    pub total_ms: u64,
    /// From STOP to RESUME, microseconds, from the QEMUs' event times; none: not stopped.
    pub downtime_us: Option<u64>,
    /// A cluster: its members that move.
    pub members: Vec<MemberStatus>,
    /// A cluster: from the first to the last STOP, microseconds, by the hosts' clocks.
    pub stop_spread_us: Option<u64>,
    /// The longest that it may be, microseconds: if not all are stopped by then, a decision is driven. 0: not a cluster, or none
    /// was told to stop.
    pub stop_budget_us: u64,
    /// A cluster: from the first to the last RESUME.
    pub resume_spread_us: Option<u64>,
    /// Frames for the guest that waited at its old host while it moved.
    pub frames_held: u64,
    /// Of these and of those that waited at the new one, frames that were dropped: they did not fit, or
    /// their way was lost.
    pub frames_dropped: u64,
    /// The timeline of both ends.
    pub timeline: Vec<Moment>,
}

impl Status {
    /// Whether this end is the source's alone to tell: it may still try another host, and *stayed* is true only when
    /// the guest runs there again.
    #[must_use]
    pub fn is_for_the_source_to_tell(&self) -> bool {
        self.phase == Phase::Stayed
    }

    /// Whether `known` says more of the same migration: a source that has lost sight of its destination says *lost*, for
    /// lack of news, and who has heard of that knows better.
    #[must_use]
    pub fn is_blind_to(&self, known: &Self) -> bool {
        (self.phase, known.phase) == (Phase::Lost, Phase::Moved)
    }

    /// A migration that starts from `record`, of which nothing is known yet but who and what.
    #[must_use]
    pub fn new(
        id: MigrationId,
        vm: VmId,
        name: Name,
        from: HostId,
        requested_on: HostId,
        record: &Record,
    ) -> Self {
        Self {
            id,
            vm,
            cluster: record.cluster,
            name,
            from,
            to: None,
            requested_on,
            phase: Phase::Preparing,
            cause: String::new(),
            epoch_before: record.epoch,
            epoch_after: None,
            ram_bytes: 0,
            ram_nonzero_bytes: 0,
            bulk_bytes: 0,
            done_ppm: 0,
            left_ms: None,
            dirty_bytes_per_s: 0,
            disk_bytes: 0,
            disk_wan_bytes: 0,
            disk_throttle_bytes_per_s: 0,
            disk_throttled_ms: 0,
            chunks_zero: 0,
            chunks_known: 0,
            chunks_literal: 0,
            total_ms: 0,
            downtime_us: None,
            members: Vec::new(),
            stop_spread_us: None,
            stop_budget_us: 0,
            resume_spread_us: None,
            frames_held: 0,
            frames_dropped: 0,
            timeline: Vec::new(),
        }
    }
}
