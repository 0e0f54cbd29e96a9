//! The kernel's side over netlink: devices, bridge ports, FDB entries, statistics.
//!
//! Owns the route netlink socket (of the namespace in which it was opened) and the deadline of each
//! request; keeps no state and decides nothing. Invariant: every change can be asked for again.

use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use godwit_protocol::id::{Mac, Name};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage, State,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVxlan};
use tokio::task::AbortHandle;

use super::error::LinkError;

/// Longest wait for one answer of the kernel, seconds. It answers in microseconds, unless the
/// network lock is held for long (mass removal of devices).
const ANSWER_S: u64 = 5;
/// Most messages of one dump that are kept.
const DUMP: usize = 1 << 20;

type Message = NetlinkMessage<RouteNetlinkMessage>;

/// A device as the kernel shows it.
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: String,
    pub(super) master: Option<u32>,
    /// A bridge forwards to it.
    pub(super) runs: bool,
    /// This host forwards what comes in by it.
    pub(super) forwards: bool,
    pub(super) stats: LinkStats,
}

/// The kernel's counts of one device. `rx` is what came from the guest (or host) behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkStats {
    /// Frames from the guest.
    pub rx_frames: u64,
    /// Bytes from the guest.
    pub rx_bytes: u64,
    /// Frames from the guest that were dropped.
    pub rx_dropped: u64,
    /// Frames towards the guest.
    pub tx_frames: u64,
    /// Bytes towards the guest.
    pub tx_bytes: u64,
    /// Frames towards the guest that did not fit its queue.
    pub tx_dropped: u64,
}

/// Where an FDB entry is kept.
#[derive(Clone, Copy)]
pub(super) enum Fdb {
    /// In the bridge: the MAC is behind this port.
    Bridge,
    /// In the VXLAN device itself: the MAC is behind this underlay address.
    Vxlan(IpAddr),
}

/// An FDB entry that the kernel holds.
pub(super) struct Entry {
    pub(super) port: u32,
    pub(super) mac: Mac,
    /// `Some` for an entry of a VXLAN device.
    pub(super) remote: Option<IpAddr>,
}

/// How a port of one of our bridges behaves. Nothing is ever learned or flooded as unknown unicast.
pub(super) struct PortFlags {
    /// Broadcast and multicast go out here.
    pub(super) groups: bool,
    /// Not to other ports that are isolated too (split horizon between tunnels).
    pub(super) isolated: bool,
}

/// A NIC that is attached but gets no broadcasts yet.
pub(super) const WAITING: PortFlags = PortFlags { groups: false, isolated: false };

pub(super) struct Kernel {
    handle: Handle,
    connection: AbortHandle,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Kernel {
    pub(super) fn open() -> Result<Self, LinkError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|e| LinkError::kernel("open a netlink socket", e))?;
        let connection = tokio::spawn(connection).abort_handle();
        Ok(Self { handle, connection })
    }

    /// Sends one request and collects the answers until the kernel's end mark.
    pub(super) async fn ask(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, LinkError> {
        let mut request: Message = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut handle = self.handle.clone();
        let collect = async {
            let gone = |_| std::io::Error::from(std::io::ErrorKind::BrokenPipe);
            let mut answers = handle.request(request).map_err(gone)?;
            let mut out = Vec::new();
            while let Some(answer) = answers.next().await {
                match answer.payload {
                    NetlinkPayload::Error(e) if e.code.is_some() => return Err(e.to_io()),
                    NetlinkPayload::InnerMessage(inner) if out.len() < DUMP => out.push(inner),
                    _ => {}
                }
            }
            Ok(out)
        };
        match tokio::time::timeout(Duration::from_secs(ANSWER_S), collect).await {
            Ok(answer) => answer.map_err(|e| LinkError::kernel(what, e)),
            Err(_) => Err(LinkError::Late(ANSWER_S, what.to_owned())),
        }
    }

    /// Sends a request for a change and waits until it is made.
    pub(super) async fn order(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), LinkError> {
        self.ask(what, message, NLM_F_ACK | flags).await.map(drop)
    }

    pub(super) async fn change(&self, what: &str, message: LinkMessage) -> Result<(), LinkError> {
        self.order(what, RouteNetlinkMessage::NewLink(message), 0).await
    }

    /// All devices of the namespace.
    pub(super) async fn devices(&self) -> Result<Vec<Device>, LinkError> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.ask("list devices", message, NLM_F_DUMP).await?;
        Ok(answers.into_iter().filter_map(read_device).collect())
    }

    /// The device of that name, if there is one.
    pub(super) async fn device(&self, name: &str) -> Result<Option<Device>, LinkError> {
        let message = LinkUnspec::new_with_name(name).build();
        let message = RouteNetlinkMessage::GetLink(message);
        match self.ask("look up a device", message, 0).await {
            Ok(answers) => Ok(answers.into_iter().find_map(read_device)),
            Err(e) if e.errno() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(super) async fn delete(&self, index: u32) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).build();
        let message = RouteNetlinkMessage::DelLink(message);
        match self.order("remove a device", message, 0).await {
            Err(e) if e.errno() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// Makes a bridge, down: no STP, nothing ages, multicast reaches every port that allows it.
    pub(super) async fn add_bridge(&self, name: &str, address: [u8; 6]) -> Result<(), LinkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(name)
            .address(address.to_vec())
            .ageing_time(0)
            .mcast_snooping(false)
            .build();
        self.add(&format!("make bridge {name}"), message).await
    }

    /// Makes a VXLAN device, down, that learns nothing.
    pub(super) async fn add_vxlan(
        &self,
        name: &str,
        vni: u32,
        port: u16,
        local: IpAddr,
    ) -> Result<(), LinkError> {
        let builder = LinkVxlan::new(name, vni).port(port).learning(false).ttl(64);
        let message = match local {
            IpAddr::V4(ip) => builder.local(ip),
            IpAddr::V6(ip) => builder.local6(ip),
        };
        self.add(&format!("make VXLAN device {name}"), message.build()).await
    }

    pub(super) async fn add(&self, what: &str, message: LinkMessage) -> Result<(), LinkError> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.order(what, RouteNetlinkMessage::NewLink(message), flags).await
    }

    /// Sets what every device of ours has in common. The host takes no IPv6 address on it: a wire is
    /// the guests', the host only carries it.
    pub(super) async fn dress(
        &self,
        index: u32,
        alias: &str,
        mtu: u16,
        queue: Option<u32>,
        master: Option<u32>,
    ) -> Result<(), LinkError> {
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let silent = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])]);
        let message = LinkUnspec::new_with_index(index).append_extra_attribute(silent).build();
        match self.change("keep the host's IPv6 off a wire", message).await {
            // A kernel without IPv6 has nothing to keep off.
            Err(e) if matches!(e.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {}
            other => other?,
        }
        let mut builder = LinkUnspec::new_with_index(index).alias(alias).mtu(u32::from(mtu));
        if let Some(frames) = queue {
            builder = builder.txqueuelen(frames);
        }
        if let Some(master) = master {
            builder = builder.controller(master);
        }
        self.change("set up a device", builder.build()).await
    }

    pub(super) async fn up(&self, index: u32) -> Result<(), LinkError> {
        self.change("bring a device up", LinkUnspec::new_with_index(index).up().build()).await
    }

    /// Takes a device off its bridge, and down.
    pub(super) async fn leave(&self, index: u32) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).nocontroller().alias("").down().build();
        self.change("take a device off its bridge", message).await
    }

    /// Gives a device that is down another name.
    pub(super) async fn rename(&self, index: u32, name: &str) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).name(name).build();
        self.change("rename a device", message).await
    }

    /// Sets how a bridge port behaves.
    pub(super) async fn port(&self, index: u32, flags: &PortFlags) -> Result<(), LinkError> {
        let message = LinkBridgePort::new(index)
            .learning(false)
            .flood(false)
            .mcast_flood(flags.groups)
            .bcast_flood(flags.groups)
            .isolated(flags.isolated)
            .build();
        self.change("set up a bridge port", message).await
    }

    /// Sets or moves an entry in one step: the kernel never has none, or two, in between.
    pub(super) async fn fdb_set(&self, port: u32, mac: &Mac, fdb: Fdb) -> Result<(), LinkError> {
        let message = RouteNetlinkMessage::NewNeighbour(entry(port, mac, fdb));
        self.order("set a forwarding entry", message, NLM_F_CREATE | NLM_F_REPLACE).await
    }

    /// Adds one more destination to the entry that all group frames of a VXLAN device follow.
    pub(super) async fn flood_add(&self, vxlan: u32, peer: IpAddr) -> Result<(), LinkError> {
        let message = entry(vxlan, &Mac([0; 6]), Fdb::Vxlan(peer));
        let message = RouteNetlinkMessage::NewNeighbour(message);
        self.order("add a broadcast destination", message, NLM_F_CREATE | NLM_F_APPEND).await
    }

    /// Removes an entry; one that is not there is no error.
    pub(super) async fn fdb_del(&self, port: u32, mac: &Mac, fdb: Fdb) -> Result<(), LinkError> {
        let message = RouteNetlinkMessage::DelNeighbour(entry(port, mac, fdb));
        match self.order("remove a forwarding entry", message, 0).await {
            Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
            other => other,
        }
    }

    /// All FDB entries of the namespace that were set by hand.
    pub(super) async fn entries(&self) -> Result<Vec<Entry>, LinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        let message = RouteNetlinkMessage::GetNeighbour(message);
        let answers = self.ask("list forwarding entries", message, NLM_F_DUMP).await?;
        Ok(answers.into_iter().filter_map(read_entry).collect())
    }
}

fn entry(port: u32, mac: &Mac, fdb: Fdb) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    match fdb {
        Fdb::Bridge => {
            // NOARP is a static entry; PERMANENT would mean an address of the host itself.
            message.header.state = NeighbourState::Noarp;
            message.header.flags = NeighbourFlags::Controller;
        }
        Fdb::Vxlan(remote) => {
            message.header.state = NeighbourState::Permanent;
            message.header.flags = NeighbourFlags::Own;
            message.attributes.push(NeighbourAttribute::Destination(match remote {
                IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
                IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
            }));
        }
    }
    message
}

fn read_entry(message: RouteNetlinkMessage) -> Option<Entry> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    let mut mac = None;
    let mut remote = None;
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok().map(Mac),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => remote = Some(ip.into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                remote = Some(ip.into())
            }
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                remote = read_address(&bytes);
            }
            _ => {}
        }
    }
    let of_bridge = remote.is_none() && message.header.state == NeighbourState::Noarp;
    (of_bridge || remote.is_some()).then_some(Entry {
        port: message.header.ifindex,
        mac: mac?,
        remote,
    })
}

/// In an AF_BRIDGE message the length alone tells which address it is.
fn read_address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

fn read_device(message: RouteNetlinkMessage) -> Option<Device> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let mut device = Device {
        index: message.header.index,
        name: String::new(),
        alias: String::new(),
        master: None,
        runs: false,
        forwards: super::inet::forwards(&message),
        stats: LinkStats::default(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::IfAlias(alias) => device.alias = alias,
            LinkAttribute::OperState(state) => {
                device.runs = matches!(state, State::Up | State::Unknown);
            }
            LinkAttribute::Controller(master) => device.master = Some(master),
            LinkAttribute::Stats64(s) => {
                device.stats = LinkStats {
                    rx_frames: s.rx_packets,
                    rx_bytes: s.rx_bytes,
                    rx_dropped: s.rx_dropped,
                    tx_frames: s.tx_packets,
                    tx_bytes: s.tx_bytes,
                    tx_dropped: s.tx_dropped,
                };
            }
            _ => {}
        }
    }
    Some(device)
}

/// The wire and NIC that a device of ours belongs to.
pub(super) fn owner(device: &Device) -> Option<(Name, Option<Mac>)> {
    device
        .name
        .starts_with(super::names::PREFIX)
        .then(|| super::names::read_alias(&device.alias))?
}
