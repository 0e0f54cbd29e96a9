//! What is said on the local socket. Owns the forms of requests, events, answers and errors; does
//! no input or output. A field that people see carries its unit in its name.

mod answers;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use godwit_protocol::id::{MigrationId, Name, VmId};
use serde::{Deserialize, Serialize};

pub use answers::{
    ClusterInfo, Console, Done, Drained, HostInfo, ImageInfo, MemberInfo, Migration, NodeStatus,
    OnWire, Plan, Planned, RouteInfo, Token, UplinkStatus, VmInfo, WireStatus,
};

/// Longest line on the socket, bytes, in either direction.
pub const LINE_BYTES: usize = 4 << 20;
/// Most connections at once; one more is refused with a clear line.
pub const CONNECTIONS: usize = 64;
/// Events that may wait for a slow client, per request; the daemon never waits for more than that.
pub const EVENTS: usize = 64;

/// What the daemon can be asked. One request per connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Start a new VM. Answer: [`VmInfo`].
    VmRun {
        /// The text of the specification.
        spec_toml: String,
        /// Directory that relative paths in it start from.
        spec_dir: PathBuf,
    },
    /// All VMs of this host and those known from routes. Answer: `Vec<`[`VmInfo`]`>`.
    VmList {},
    /// One VM. Answer: [`VmInfo`].
    VmShow {
        /// Name or id.
        vm: String,
    },
    /// Start a VM that is off, on its host. Answer: [`Done`], once it runs.
    VmStart {
        /// Name or id.
        vm: String,
    },
    /// Stop and remove a VM. Answer: [`Done`].
    VmStop {
        /// Name or id.
        vm: String,
        /// End it at once instead of asking the guest to power down.
        kill: bool,
    },
    /// Where the serial console is. Answer: [`Console`].
    VmConsole {
        /// Name or id.
        vm: String,
    },
    /// Move a VM, or a cluster's members together. Events: [`Event::Progress`]. Answer: [`Migration`],
    /// at its start, or with `wait` at its end; with `dry_run` a [`Plan`].
    Migrate {
        /// Name or id of a VM or of a cluster.
        vm: String,
        /// `HOST`, `HOST,HOST`, `site:S` or `auto`; empty: only those in `place` move.
        to: String,
        /// Members that shall go to these hosts, by name or id.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        place: BTreeMap<String, String>,
        /// Only say where each would go, and what would refuse.
        #[serde(default)]
        dry_run: bool,
        /// Answer only when the migration has ended, with progress events until then.
        wait: bool,
        /// Most bytes per second; 0: what the path gives.
        bandwidth_bytes_per_s: u64,
        /// Longest planned pause; 0: the default.
        max_downtime_ms: u64,
        /// Give up if the guest was not stopped by then; 0: the default (one hour).
        deadline_s: u64,
        /// Most bytes per second that are read of each disk; 0: as fast as they are taken.
        disk_bandwidth_bytes_per_s: u64,
        /// The request's id, minted by the client: asked twice, it moves once.
        id: Option<MigrationId>,
    },
    /// Migrations that are known. Answer: `Vec<`[`Migration`]`>`.
    Migrations {
        /// Only this one (an error if it is not known).
        id: Option<MigrationId>,
    },
    /// Give a migration up if its guest has not been stopped yet. Answer: [`Done`].
    Abort {
        /// The migration.
        id: MigrationId,
    },
    /// The routing table. Answer: `Vec<`[`RouteInfo`]`>`.
    Routes {},
    /// Members. Answer: `Vec<`[`HostInfo`]`>`.
    Hosts {},
    /// A one-time token for a new host. Answer: [`Token`].
    Token {
        /// How long it can be redeemed, seconds.
        ttl_s: u64,
    },
    /// Take a member's certificate away, for ever, once it votes no more. Answer: [`Done`].
    Revoke {
        /// Name or id.
        host: String,
        /// At once, whatever runs there and wherever it votes.
        #[serde(default)]
        now: bool,
    },
    /// This host votes no more and takes no VMs, or does again. Answer: [`Drained`].
    Drain {
        /// It does again.
        undo: bool,
    },
    /// Make a cluster of VMs that run, or finish making it. Answer: [`ClusterInfo`].
    ClusterCreate {
        /// Its name.
        cluster: Name,
        /// Names or ids; the host of the first one leads.
        vms: Vec<String>,
        /// The request's id, minted by the client, becomes the cluster's.
        id: Option<VmId>,
    },
    /// All clusters. Answer: `Vec<`[`ClusterInfo`]`>`.
    ClusterList {},
    /// One cluster. Answer: [`ClusterInfo`].
    ClusterShow {
        /// Name or id.
        cluster: String,
    },
    /// Let a VM join. Answer: [`ClusterInfo`].
    ClusterAdd {
        /// Name or id.
        cluster: String,
        /// Name or id.
        vm: String,
    },
    /// Let a member go: it runs on by itself. Answer: [`ClusterInfo`].
    ClusterRemove {
        /// Name or id.
        cluster: String,
        /// Name or id.
        vm: String,
    },
    /// Delete a cluster: its members run on by themselves. Answer: [`Done`].
    ClusterDelete {
        /// Name or id.
        cluster: String,
    },
    /// Write a new record, because a majority of the voters is lost for ever. Answer: [`ClusterInfo`].
    ClusterForce {
        /// Name or id of the cluster, or of a VM that belongs to none.
        cluster: String,
        /// Who wants it, for the record.
        by: String,
        /// Why.
        why: String,
    },
    /// Leave the swarm. Answer: [`Done`].
    Leave {},
    /// Let chunks of a file be used as a source. Answer: [`ImageInfo`].
    ImageAdd {
        /// Absolute path.
        path: PathBuf,
    },
    /// Files whose chunks this host can produce. Answer: `Vec<`[`ImageInfo`]`>`.
    ImageList {},
    /// Forget a file; one that was kept after a move, and made by godwit, is deleted. Answer: [`Done`].
    ImageRemove {
        /// Absolute path.
        path: PathBuf,
    },
    /// What this node is. Answer: [`NodeStatus`].
    Status {},
    /// Connect something that is no VM (a physical port, a test) to a wire of this host: its address
    /// is told to the other hosts, also after a restart. Answer: [`WireStatus`].
    WirePort {
        /// The wire; made if it is not there.
        wire: Name,
        /// The Ethernet address behind the port.
        mac: String,
        /// Forget it instead.
        #[serde(default)]
        remove: bool,
    },
    /// Tell every host of a wire. Answer: [`Done`].
    WireCreate {
        /// The wire.
        wire: Name,
        /// Its frames always travel encrypted between hosts.
        encrypt: bool,
    },
    /// Put a NIC of a VM of this host onto a wire, or take it off. Answer: [`Done`].
    WireConnect {
        /// Name or id.
        vm: String,
        /// The wire.
        wire: Name,
        /// The NIC; none: the only one that it can be.
        mac: Option<String>,
        /// Take it off instead.
        #[serde(default)]
        disconnect: bool,
    },
    /// Join a wire to the outside by an interface of this host, or end that. Answer: [`Done`].
    WireUplink {
        /// The wire.
        wire: Name,
        /// The interface; none: end it.
        interface: Option<String>,
        /// The gateway's address and subnet, `10.5.0.1/24`; none: what it is on other hosts.
        gateway: Option<String>,
        /// Also if hosts that are not reached have another: they are gone for good.
        #[serde(default)]
        replace: bool,
    },
    /// Replace what may reach a NIC of a VM of this host. Answer: [`Done`].
    WireFilter {
        /// Name or id.
        vm: String,
        /// The NIC; none: the only one.
        mac: Option<String>,
        /// The rules, first first; none: everything may.
        rules: Vec<String>,
    },
    /// The wires that are known. Answer: `Vec<`[`WireStatus`]`>`.
    WireInfo {},
}

impl Request {
    /// How long the daemon may take in all; afterwards the handler is dropped and the client told.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        /// A migration's own deadline ends at the stop; what comes after it is bounded by minutes.
        const AFTER_STOP: Duration = Duration::from_secs(15 * 60);
        match self {
            Self::Migrate { wait: true, deadline_s, .. } => {
                let own = if *deadline_s == 0 { 3600 } else { *deadline_s };
                Duration::from_secs(own.min(30 * 24 * 3600)) + AFTER_STOP
            }
            Self::ImageAdd { .. } => Duration::from_secs(3600),
            Self::VmRun { .. }
            | Self::VmStart { .. }
            | Self::VmStop { .. }
            | Self::ClusterCreate { .. }
            | Self::ClusterAdd { .. }
            | Self::Leave {} => Duration::from_secs(180),
            _ => Duration::from_secs(60),
        }
    }
}

/// What the daemon says before its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// How far a migration is.
    Progress(Box<Migration>),
    /// One line for people.
    Note(String),
}

/// One line from the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// More will follow.
    Event {
        /// The event.
        event: Event,
    },
    /// The end: it failed.
    Error(ApiError),
    /// The end: the answer.
    Result {
        /// The answer, as the request's documentation says.
        result: serde_json::Value,
    },
}

/// Why a request was not done, and what to do about it. Shown as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// One line: what went wrong.
    #[serde(rename = "error")]
    pub message: String,
    /// One line: the next step; empty: none is known.
    #[serde(default)]
    pub hint: String,
}

impl ApiError {
    /// An error with a next step.
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }

    /// An error that speaks for itself.
    pub fn plain(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), hint: String::new() }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, " ({})", self.hint) }
    }
}

impl std::error::Error for ApiError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_one_documented_form() {
        let text = r#"{"op":"vm_stop","vm":"web","kill":true}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!(request, Request::VmStop { vm: "web".into(), kill: true });
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        assert_eq!(
            serde_json::from_str::<Request>(r#"{"op":"hosts"}"#).unwrap(),
            Request::Hosts {}
        );
        assert!(serde_json::from_str::<Request>(r#"{"op":"hosts","x":1}"#).is_err());
        assert!(serde_json::from_str::<Request>(r#"{"op":"reboot"}"#).is_err());
    }

    #[test]
    fn every_line_reads_back_as_its_kind() {
        let note = Line::Event { event: Event::Note("n".into()) };
        let error = Line::Error(ApiError::new("e", "h"));
        let result = Line::Result { result: serde_json::Value::Null };
        for (line, kind) in [(note, 0), (error, 1), (result, 2)] {
            let text = serde_json::to_string(&line).unwrap();
            let back: Line = serde_json::from_str(&text).unwrap();
            let seen = match back {
                Line::Event { .. } => 0,
                Line::Error(_) => 1,
                Line::Result { .. } => 2,
            };
            assert_eq!(seen, kind, "{text}");
        }
    }
}
