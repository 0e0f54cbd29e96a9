//! Routes: which host carries a VM's NICs, at which epoch.

use core::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::id::{CopyId, Epoch, HostId, Mac, Name, VmId};

/// A NIC of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The wire it is connected to.
    pub wire: Name,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// What a route leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A VM, on the host that carries it.
    Vm,
    /// An address on a wire that is no VM's.
    Port,
    /// A cluster, by the host that leads it.
    Cluster,
    /// A wire that was created: it has the wire's name, and nobody reaches it by that.
    Wire,
    /// Such a wire, whose frames always travel encrypted.
    SealedWire,
    /// A wire's way out, on the host that joins it to the outside; its NIC is that host's own address on the wire, not the
    /// gateway's, which is the same at all of them.
    Uplink {
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// How many bits of it name the wire's subnet.
        prefix: u8,
        /// When it was named, by the clock of who did, and after all that it knew of: of two gateways the later counts.
        since: Epoch,
    },
}

impl Kind {
    /// Whether it tells of a wire: nothing is reached by its name.
    #[must_use]
    pub fn is_wire(self) -> bool {
        matches!(self, Self::Wire | Self::SealedWire)
    }
}

/// One entry of the distributed routing table. The higher epoch of the same VM wins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The VM.
    pub vm: VmId,
    /// Its alias.
    pub name: Name,
    /// The host that carries it.
    pub host: HostId,
    /// The copy that runs there.
    pub copy: CopyId,
    /// Since which epoch.
    pub epoch: Epoch,
    /// Its NICs (at most [`crate::limits::NICS`]).
    pub nics: Vec<Nic>,
    /// What it leads to.
    pub kind: Kind,
    /// The VM was removed; kept so that older entries do not come back.
    pub gone: bool,
}

/// What nodes say to each other about routes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// New entries.
    Push(Vec<Route>),
    /// Hash over the sender's whole table; answered with [`Message::Have`] if it differs.
    Digest([u8; 16]),
    /// Everything that the sender holds from `first` to `last`. Answered with what is newer, and a
    /// `Want`. Several of them, without a gap, cover a whole table.
    Have {
        /// First id of the range.
        first: VmId,
        /// Last id of the range, itself included.
        last: VmId,
        /// (VM, epoch), at most [`crate::limits::ROUTES_PER_HAVE`].
        held: Vec<(VmId, Epoch)>,
    },
    /// VMs whose entry the sender lacks or holds at an older epoch.
    Want(Vec<VmId>),
}
