//! Wires in the kernel: a bridge per wire, a tap per NIC, a VXLAN port towards the trusted LAN and a
//! tunnel port towards everybody else.
//!
//! Owns the kernel devices whose names begin with `gw` in the daemon's network namespace, their FDB
//! entries, and the packet filter `godwit`. Never decides where a MAC is (the driver tells), never
//! carries a frame between hosts (the transport does), never reads guests' traffic except what leaves
//! by a tunnel. Invariant: the kernel is the state; every call can be repeated, and a restarted daemon
//! finds what an earlier run made and goes on with it.
//!
//! ```text
//!   QEMU        QEMU                               learning and unknown-unicast flood: off everywhere
//!    | fd        | fd                              broadcast, multicast: to all active ports
//!  gwt-..      gwt-..     (taps)                   MAC -> port: static, `set_route`
//!    +-----+-----+---- gwh-..   (of a NIC that moves: fd in this process, where its frames wait;
//!          |                     gwa-.., on no bridge: where its broadcasts wait at its new host)
//!          | gwb-..       (bridge, one per wire)
//!    +-----+-----+---- gwu-..   (the wire's way out, on a host that has one: `uplink`)
//!  gwv-..      gwx-..     (isolated from each other: what came by a tunnel never leaves by one)
//!  VXLAN to    fd in this process:
//!  members     frames out -> queue -> driver; frames in <- `inject`
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};

use godwit_protocol::id::{Mac, Name};
use godwit_protocol::limits::TUNNEL_QUEUE_FRAMES;
use godwit_protocol::wire::filter::Rule;
use tokio::sync::{Mutex, mpsc, oneshot};

mod aside;
mod cidr;
mod error;
mod filter;
mod guard;
mod holding;
mod inet;
mod kernel;
mod loose;
mod names;
mod nft;
mod plug;
mod settle;
mod stats;
mod tap;
mod tunnel;
mod uplink;
mod watch;
mod wires;

pub use cidr::{Cidr, CidrError};
pub use error::LinkError;
pub use holding::Hold;
pub use kernel::LinkStats;
pub use plug::Injector;
pub use settle::{TapView, forwarding_settled};
pub use stats::{Counters, NicCounters, WireCounters};
pub use tunnel::{Injected, Outgoing, TunnelCounters, TunnelFrame};
pub use uplink::{Uplink, gateway_mac};
pub use watch::DeviceNews;

use guard::Guard;
use kernel::{Fdb, Kernel, PortFlags};
use tap::Reader;
use tunnel::Tunnel;

/// The MTU of wires unless configured otherwise: an underlay of 1500 less the dearest tunnel, with margin.
pub const DEFAULT_MTU: u16 = 1400;

/// What the adapter has to know about its host.
#[derive(Debug, Clone)]
pub struct Config {
    /// This host's address towards other hosts.
    pub underlay: IpAddr,
    /// Prefixes of LANs that the operator trusts with plain VXLAN (`--trusted-lan`).
    pub trusted_lan: Vec<Cidr>,
    /// MTU of every wire: what a guest may put into one frame, without the Ethernet header. Bytes.
    pub mtu: u16,
}

/// Where frames for a MAC go on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// To the NIC's tap here. Its tap also starts to get broadcasts.
    Local,
    /// By VXLAN to the host with this underlay address.
    Vxlan(IpAddr),
    /// To the queue of tunnel frames.
    Tunnel,
    /// To the NIC's hold device here; broadcasts too, unless they are led there ([`Links::lead_aside`]).
    Hold,
    /// To the wire's way out here ([`Links::set_uplink`]).
    Gateway,
    /// Nowhere: dropped by the bridge.
    None,
}

/// The name of a wire's bridge on this host.
#[must_use]
pub fn bridge_name(wire: &Name) -> String {
    names::bridge(wire)
}

/// One wire as this host carries it.
struct Wire {
    bridge: u32,
    vxlan: Option<u32>,
    tunnel: u32,
    routes: BTreeMap<Mac, Where>,
    /// NICs whose broadcasts do not reach their taps.
    aside: BTreeSet<Mac>,
    flood: BTreeSet<IpAddr>,
}

#[derive(Default)]
struct State {
    wires: BTreeMap<Name, Wire>,
    members: Option<Vec<IpAddr>>,
    guarded: bool,
    /// Wires that have a way out here, and the interface that leads outside.
    uplinks: BTreeMap<Name, String>,
}

/// The network adapter. Calls that change the kernel wait for each other; [`Links::inject`] never waits.
pub struct Links {
    config: Config,
    kernel: Kernel,
    guard: Arc<Guard>,
    state: Mutex<State>,
    tunnels: RwLock<BTreeMap<Name, Arc<Tunnel>>>,
    outgoing: mpsc::Sender<Outgoing>,
}

impl Links {
    /// Opens the kernel in the calling thread's network namespace. The second value is where frames arrive
    /// that leave this host by a tunnel: at most [`TUNNEL_QUEUE_FRAMES`] of them; while it is full, frames
    /// wait in the kernel. Changes nothing yet.
    ///
    /// # Errors
    /// [`LinkError::Privilege`], or the kernel lacks netlink families.
    pub fn start(config: Config) -> Result<(Self, mpsc::Receiver<Outgoing>), LinkError> {
        let kernel = Kernel::open()?;
        let guard = Guard::open().map_err(|e| LinkError::kernel("open a netfilter socket", e))?;
        let (outgoing, frames) = mpsc::channel(TUNNEL_QUEUE_FRAMES);
        let links = Self {
            config,
            kernel,
            guard: Arc::new(guard),
            state: Mutex::default(),
            tunnels: RwLock::default(),
            outgoing,
        };
        Ok((links, frames))
    }

    /// The MTU of every wire, bytes: what the driver gives guests as `host_mtu`.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.config.mtu
    }

    /// Whether frames to the host with this underlay address may go by VXLAN: it and this host are inside
    /// one LAN that was declared trusted. Otherwise they take the tunnel.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let lans = &self.config.trusted_lan;
        lans.iter().any(|lan| lan.contains(self.config.underlay) && lan.contains(peer))
    }

    /// Makes the tap of a NIC and returns its fd, for QEMU. The wire must be set up. The NIC is attached
    /// but gets no frames until [`Links::set_route`] says [`Where::Local`]: an incoming VM waits so. The
    /// device lives as long as its fd or a copy of it; nothing has to be removed. The filter is in force
    /// before the NIC is on the wire.
    ///
    /// # Errors
    /// [`LinkError::TapBusy`] if a VM holds it; [`LinkError::NoWire`].
    pub async fn open_tap(
        &self,
        wire: &Name,
        mac: &Mac,
        filter: &[Rule],
    ) -> Result<OwnedFd, LinkError> {
        let state = self.state.lock().await;
        let bridge = state.wires.get(wire).ok_or_else(|| LinkError::NoWire(wire.clone()))?.bridge;
        let name = names::tap(wire, mac);
        let fd = self.create_tap(&name, Reader::Qemu)?;
        let device = self.kernel.device(&name).await?;
        let index = device.ok_or_else(|| LinkError::NoTap(name.clone()))?.index;
        self.filter_device(name, filter, true).await?;
        self.join(index, wire, mac, bridge).await?;
        Ok(fd)
    }

    /// Whether the NIC's tap exists: a QEMU that outlived an earlier daemon still holds it.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn has_tap(&self, wire: &Name, mac: &Mac) -> Result<bool, LinkError> {
        Ok(self.kernel.device(&names::tap(wire, mac)).await?.is_some())
    }

    fn create_tap(&self, name: &str, reader: Reader) -> Result<OwnedFd, LinkError> {
        tap::create(name, reader).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) if reader == Reader::Qemu => LinkError::TapBusy(name.to_owned()),
            Some(libc::EBUSY) => LinkError::SecondDaemon(name.to_owned()),
            _ => LinkError::kernel(format!("open tap {name}"), e),
        })
    }

    /// Says where frames for a MAC go. The change is one step in the kernel: no frame finds nothing, or
    /// two places, in between. Repeating it heals what somebody else changed.
    ///
    /// # Errors
    /// [`LinkError::NoWire`]; [`LinkError::NoTap`] for `Local` without a tap or `Hold` without its device;
    /// [`LinkError::Untrusted`] for `Vxlan` outside the trusted LAN.
    pub async fn set_route(&self, wire: &Name, mac: &Mac, to: Where) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        let known = state.wires.get_mut(wire).ok_or_else(|| LinkError::NoWire(wire.clone()))?;
        let old = known.routes.get(mac).copied().unwrap_or(Where::None);
        let tap = self.kernel.device(&names::tap(wire, mac)).await?.map(|d| d.index);
        let hold = match (old, to) {
            (_, Where::Hold) | (Where::Hold, _) => {
                self.kernel.device(&names::hold(wire, mac)).await?
            }
            _ => None,
        };
        let hold = hold.map(|d| d.index);
        let uplink = match (old, to) {
            (_, Where::Gateway) | (Where::Gateway, _) => {
                self.kernel.device(&names::uplink(wire)).await?
            }
            _ => None,
        };
        let uplink = uplink.map(|d| d.index);
        let port = match to {
            Where::Local => Some(tap.ok_or_else(|| LinkError::NoTap(names::tap(wire, mac)))?),
            Where::Vxlan(ip) => {
                let vxlan = known.vxlan.filter(|_| self.trusts(ip));
                let vxlan = vxlan.ok_or(LinkError::Untrusted(ip))?;
                self.kernel.fdb_set(vxlan, mac, Fdb::Vxlan(ip)).await?;
                Some(vxlan)
            }
            Where::Tunnel => Some(known.tunnel),
            Where::Hold => Some(hold.ok_or_else(|| LinkError::NoTap(names::hold(wire, mac)))?),
            Where::Gateway => Some(uplink.ok_or_else(|| LinkError::NoTap(names::uplink(wire)))?),
            Where::None => None,
        };
        // Two steps, in place of the one that leads them aside: only on a kernel that cannot do that.
        let aside = to == Where::Hold && known.aside.contains(mac);
        let held = to == Where::Hold && !aside;
        let mut groups = [(hold, held), (tap, to == Where::Local || aside)];
        // The port that gets broadcasts from now on first: rather one twice than one lost.
        groups.sort_by_key(|(_, on)| !on);
        for (index, groups) in groups {
            let Some(index) = index else { continue };
            match self.kernel.port(index, &PortFlags { groups, isolated: false }).await {
                // Gone since it was looked up, with the process that held it.
                Err(e) if e.errno() == Some(libc::ENODEV) => {}
                other => other?,
            }
        }
        match port {
            Some(port) => self.kernel.fdb_set(port, mac, Fdb::Bridge).await?,
            None => {
                let ports = [tap, hold, uplink, known.vxlan, Some(known.tunnel)];
                for port in ports.into_iter().flatten() {
                    self.kernel.fdb_del(port, mac, Fdb::Bridge).await?;
                }
            }
        }
        if let (Where::Vxlan(ip), Some(vxlan), false) =
            (old, known.vxlan, matches!(to, Where::Vxlan(_)))
        {
            self.kernel.fdb_del(vxlan, mac, Fdb::Vxlan(ip)).await?;
        }
        if to == Where::None {
            known.routes.remove(mac);
        } else {
            known.routes.insert(*mac, to);
        }
        Ok(())
    }

    /// Where frames for each MAC of the wire go now, as last set or as found after a restart.
    pub async fn routes(&self, wire: &Name) -> Vec<(Mac, Where)> {
        let state = self.state.lock().await;
        let known = state.wires.get(wire);
        known.map(|w| w.routes.iter().map(|(m, r)| (*m, *r)).collect()).unwrap_or_default()
    }

    /// Names the hosts that get the wire's broadcasts and multicasts by VXLAN (each gets its own copy):
    /// exactly these, whatever was before. Hosts behind the tunnel are the driver's to serve: it sees
    /// each such frame in the queue.
    ///
    /// # Errors
    /// [`LinkError::NoWire`]; [`LinkError::Untrusted`] if one is outside the trusted LAN (nothing changed).
    pub async fn broadcast_set(&self, wire: &Name, peers: &[IpAddr]) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        let known = state.wires.get_mut(wire).ok_or_else(|| LinkError::NoWire(wire.clone()))?;
        if let Some(stranger) = peers.iter().find(|ip| known.vxlan.is_none() || !self.trusts(**ip))
        {
            return Err(LinkError::Untrusted(*stranger));
        }
        let Some(vxlan) = known.vxlan else { return Ok(()) };
        let wanted: BTreeSet<IpAddr> = peers.iter().copied().collect();
        for ip in &wanted {
            self.kernel.flood_add(vxlan, *ip).await?;
            known.flood.insert(*ip);
        }
        let stale: Vec<IpAddr> = known.flood.difference(&wanted).copied().collect();
        for ip in stale {
            self.kernel.fdb_del(vxlan, &Mac([0; 6]), Fdb::Vxlan(ip)).await?;
            known.flood.remove(&ip);
        }
        Ok(())
    }

    /// Names the underlay addresses from which VXLAN is let in: exactly these. Before the first call
    /// after an installation nothing is let in; after a restart what was let in before still is.
    ///
    /// # Errors
    /// The kernel's (nftables).
    pub async fn set_members(&self, members: &[IpAddr]) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        state.members = Some(members.to_vec());
        if state.guarded {
            self.filter(&state).await?;
        }
        Ok(())
    }

    /// Resolves when all that was on its way to the wire's tunnel port is out of the queue of tunnel
    /// frames, and done with; at once, with an error, if there is no such port.
    pub fn fence(&self, wire: &Name) -> oneshot::Receiver<()> {
        let (tell, told) = oneshot::channel();
        let tunnels = self.tunnels.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(tunnel) = tunnels.get(wire) {
            tunnel.fence(tell);
        }
        told
    }

    /// Puts a frame that another host sent onto the wire's bridge. Never waits. The frame goes to local
    /// taps only, never back into a tunnel.
    pub fn inject(&self, wire: &Name, frame: &[u8]) -> Injected {
        let tunnels = self.tunnels.read().unwrap_or_else(PoisonError::into_inner);
        match tunnels.get(wire) {
            Some(tunnel) => tunnel.inject(frame),
            None => Injected::NoWire,
        }
    }
}
