//! What is said on the local socket. Owns the forms of requests, events, answers and errors; does
//! no input or output. A field that people see carries its unit in its name.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use godwit_protocol::id::{CopyId, Epoch, HostId, MigrationId, Name, StoreId, SwarmId, VmId};
use godwit_protocol::wire::migrate::Status;
use godwit_protocol::wire::route::Nic;
use serde::{Deserialize, Serialize};

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
    /// Move a VM. Events: [`Event::Progress`]. Answer: [`Migration`], at its start, or with `wait`
    /// at its end.
    Migrate {
        /// Name or id.
        vm: String,
        /// `HOST`, `site:S` or `auto`.
        to: String,
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
    /// Take a member's certificate away, for ever. Answer: [`Done`].
    Revoke {
        /// Name or id.
        host: String,
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
    /// The wires of this host. Answer: `Vec<`[`WireStatus`]`>`.
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
            Self::VmRun { .. } | Self::VmStop { .. } | Self::Leave {} => Duration::from_secs(180),
            _ => Duration::from_secs(60),
        }
    }
}

/// The parsed form of `--to`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// A host by name or id.
    Host(String),
    /// Any host of a site.
    Site(Name),
    /// Any other host.
    Auto,
}

impl std::str::FromStr for To {
    type Err = ApiError;
    fn from_str(text: &str) -> Result<Self, ApiError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let hint = "write --to HOST, --to site:SITE or --to auto";
        let name = |name: &str| {
            name.parse::<Name>().map_err(|e| ApiError::new(format!("{name:?}: {e}"), hint))
        };
        match text.strip_prefix("site:") {
            Some(site) => Ok(Self::Site(name(site)?)),
            None if text.parse::<HostId>().is_ok() => Ok(Self::Host(text.to_owned())),
            None => Ok(Self::Host(name(text)?.into())),
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

/// Nothing more to say than that it was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// One line for people.
    pub done: String,
}

/// A one-line token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// What the new host types after `godwit join`.
    pub token: String,
    /// Until then, seconds since 1970.
    pub expires_s: u64,
}

/// A serial console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// Path of the unix socket.
    pub socket: PathBuf,
}

/// One VM as this node knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its alias.
    pub name: Name,
    /// Its id.
    pub vm: VmId,
    /// `running`, `paused`, `moving`, `elsewhere` or `gone`.
    pub state: String,
    /// The name of the host that runs it.
    pub host: String,
    /// The copy that runs.
    pub copy: Option<CopyId>,
    /// The epoch of its newest known record.
    pub epoch: Epoch,
    /// Guest memory, bytes; 0: not known here.
    pub memory_bytes: u64,
    /// `kvm` or `tcg`; empty: not known here.
    pub accel: String,
    /// The machine type of its QEMU; empty: not known here.
    pub machine: String,
    /// Process id of its QEMU on this host.
    pub pid: Option<u32>,
    /// Its NICs.
    pub nics: Vec<Nic>,
    /// More that the VM driver can tell (free form).
    #[serde(default)]
    pub detail: BTreeMap<String, serde_json::Value>,
}

/// One member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its name.
    pub name: String,
    /// Its id.
    pub host: HostId,
    /// Its site.
    pub site: String,
    /// `alive`, `suspect`, `down`, `unknown` or `revoked`.
    pub state: String,
    /// Whether it is this node.
    pub here: bool,
    /// Where it can be reached.
    pub addresses: Vec<String>,
    /// VMs that run there; none: not known.
    pub vms: Option<u32>,
    /// Guest memory still to give, bytes; none: not known.
    pub memory_free_bytes: Option<u64>,
    /// Round trip of a control message there and back, measured now, microseconds; none: this node, or no answer.
    pub rtt_us: Option<u64>,
}

/// One entry of the routing table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteInfo {
    /// The VM's alias.
    pub name: Name,
    /// The VM.
    pub vm: VmId,
    /// The name of the host that carries it.
    pub host: String,
    /// That host.
    pub host_id: HostId,
    /// Since which epoch.
    pub epoch: Epoch,
    /// Its NICs.
    pub nics: Vec<Nic>,
    /// How frames get there: `local`, `vxlan`, `tunnel` or `none`.
    pub via: String,
}

/// One file whose chunks may be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Where it is.
    pub path: PathBuf,
    /// `image` (named by the operator), `disk` (of a VM on this host), `kept-disk` or `kept-memory` (of
    /// a VM that moved away or was received in vain).
    pub kind: String,
    /// Its length, bytes.
    pub bytes: u64,
    /// What it takes on the disk, bytes.
    pub allocated_bytes: u64,
    /// `ready`, `indexing` or `dropped: cause`.
    pub state: String,
    /// Distinct non-zero chunks that it can produce.
    pub chunks: u64,
    /// Whose it was, of what is kept.
    pub vm: Option<VmId>,
    /// Until when it is kept, seconds since 1970.
    pub expires_s: Option<u64>,
}

/// One wire on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireStatus {
    /// Its name.
    pub wire: Name,
    /// The bridge.
    pub bridge: String,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Counters by name.
    pub counters: BTreeMap<String, u64>,
}

/// What this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its id.
    pub host: HostId,
    /// Its site.
    pub site: String,
    /// Its swarm.
    pub swarm: SwarmId,
    /// Its hard state.
    pub store: StoreId,
    /// The program's version.
    pub version: String,
    /// The version of the wire messages.
    pub wire_version: u16,
    /// VMs that run here.
    pub vms: u32,
    /// More that the driver can tell (free form).
    #[serde(default)]
    pub detail: BTreeMap<String, serde_json::Value>,
}

/// One migration, with the names of its hosts: what progress and results show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// What the two ends know.
    #[serde(flatten)]
    pub status: Status,
    /// The name of the source.
    pub from_name: String,
    /// The name of the destination, once one is chosen.
    pub to_name: Option<String>,
    /// The name of the node that took the request.
    pub requested_on_name: String,
}

impl Migration {
    /// Adds the hosts' names to a status.
    pub fn new(status: Status, name: impl Fn(HostId) -> String) -> Self {
        Self {
            from_name: name(status.from),
            to_name: status.to.map(&name),
            requested_on_name: name(status.requested_on),
            status,
        }
    }

    /// The name of a host of this migration; its first digits if it is none of them.
    #[must_use]
    pub fn host_name(&self, host: HostId) -> String {
        if host == self.status.from {
            self.from_name.clone()
        } else if Some(host) == self.status.to {
            self.to_name.clone().unwrap_or_default()
        } else if host == self.status.requested_on {
            self.requested_on_name.clone()
        } else {
            host.to_string().chars().take(8).collect()
        }
    }
}

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
