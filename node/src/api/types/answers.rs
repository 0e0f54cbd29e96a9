//! Answers: what the daemon tells of VMs, clusters, hosts and migrations.

use std::collections::BTreeMap;
use std::path::PathBuf;

use godwit_protocol::id::{CopyId, Epoch, HostId, Mac, Name, StoreId, SwarmId, VmId};
use godwit_protocol::wire::migrate::{MemberStatus, Status};
use godwit_protocol::wire::route::Nic;
use serde::{Deserialize, Serialize};

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

/// Somebody on a wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnWire {
    /// The VM's name, or the port's.
    pub name: Name,
    /// Its address.
    pub mac: Mac,
    /// The host that carries it.
    pub host: String,
}

/// A wire's way out on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkStatus {
    /// The interface that leads outside.
    pub interface: String,
    /// The gateway that was named for it, `10.5.0.1/24`.
    pub gateway: String,
    /// Why it is not in use; none: it is.
    pub down: Option<String>,
}

/// One wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireStatus {
    /// Its name.
    pub wire: Name,
    /// Whether this host always encrypts its frames; else not inside a trusted LAN.
    pub encrypted: bool,
    /// Whether this host carries it.
    pub here: bool,
    /// Who is on it, anywhere.
    pub nics: Vec<OnWire>,
    /// The gateway that leads outside, `10.5.0.1/24`, if a host has an uplink.
    pub gateway: Option<String>,
    /// This host's way out of it.
    pub uplink: Option<UplinkStatus>,
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

/// One cluster as its newest known record says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Its name.
    pub name: Name,
    /// Its id.
    pub cluster: VmId,
    /// The epoch of that record.
    pub epoch: Epoch,
    /// The name of the host that leads: the first member's.
    pub lead: String,
    /// The names of the hosts that decide the next epoch.
    pub voters: Vec<String>,
    /// What brought that record about, in words.
    pub cause: String,
    /// Its members, in order.
    pub members: Vec<MemberInfo>,
}

/// One member of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberInfo {
    /// Its alias.
    pub name: Name,
    /// Its id.
    pub vm: VmId,
    /// The name of its host.
    pub host: String,
    /// The copy that may run there.
    pub copy: CopyId,
    /// It is switched off.
    pub off: bool,
}

/// Where a migration would take each VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The VM or the cluster.
    pub name: Name,
    /// Who would move, and where to.
    pub placement: Vec<Planned>,
    /// Nothing refuses.
    pub fits: bool,
}

/// One VM of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// The VM.
    pub vm: VmId,
    /// Its alias.
    pub name: Name,
    /// The name of its host.
    pub from: String,
    /// The name of the host that it would go to; none: it stays.
    pub to: Option<String>,
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// What would refuse, in one line; empty: nothing.
    pub refused: String,
}

/// A host that votes no more and takes no VMs, or does again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// One line for people.
    pub done: String,
    /// Whether it is drained.
    pub draining: bool,
    /// The names of VMs and clusters that it still votes on.
    pub votes: Vec<Name>,
    /// The names of the VMs that run on it.
    pub vms: Vec<Name>,
}

/// One migration, with the names of its hosts: what progress and results show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// What the two ends know.
    #[serde(flatten)]
    pub status: Status,
    /// The name of the source; of a cluster those of its members' sources, joined by commas.
    pub from_name: String,
    /// The name of the destination, once one is chosen; of a cluster likewise.
    pub to_name: Option<String>,
    /// The name of the node that took the request.
    pub requested_on_name: String,
    /// The names of all hosts that take part.
    #[serde(default)]
    pub hosts: BTreeMap<HostId, String>,
}

impl Migration {
    /// Adds the hosts' names to a status.
    pub fn new(status: Status, name: impl Fn(HostId) -> String) -> Self {
        let members = &status.members;
        let from = |m: &MemberStatus| Some(name(m.from));
        let to = |m: &MemberStatus| m.to.map(&name);
        let own = [Some(status.from), status.to, Some(status.requested_on)];
        let theirs = members.iter().flat_map(|m| [Some(m.from), m.to]);
        let hosts = own.into_iter().chain(theirs).flatten();
        Self {
            from_name: joined(members.iter().map(from)).unwrap_or_else(|| name(status.from)),
            to_name: joined(members.iter().map(to)).or_else(|| status.to.map(&name)),
            requested_on_name: name(status.requested_on),
            hosts: hosts.map(|host| (host, name(host))).collect(),
            status,
        }
    }

    /// The name of a host of this migration; its first digits if it is none of them.
    #[must_use]
    pub fn host_name(&self, host: HostId) -> String {
        let known = self.hosts.get(&host).cloned();
        known.unwrap_or_else(|| host.to_string().chars().take(8).collect())
    }
}

/// Each name once, in order; none: there are none, or not all are known.
fn joined(names: impl Iterator<Item = Option<String>>) -> Option<String> {
    let mut all: Vec<String> = Vec::new();
    for name in names {
        let name = name?;
        if !all.contains(&name) {
            all.push(name);
        }
    }
    (!all.is_empty()).then(|| all.join(","))
}
