//! A wire's way out of the swarm: the gateway's address on this host, and what may pass by it.
//!
//! Owns the pair of devices that joins a wire's bridge to this host's routing, and the rules on them. Never decides where a
//! packet goes beyond the wire (the host's routing table does) and translates no address: whatever goes out by one host may
//! come back by another. Invariants: the rules stand before the devices do; the wire reaches nothing of the host but ICMP,
//! and nothing beyond it but by the interface that was named.
//!
//! The gateway has one IP address and one MAC, on every host that has the wire's uplink: a guest that moves finds the gateway
//! that it knows. So the answer to an ARP request of a gateway would end at the gateway next to who answers, not at the one
//! that asked. Each asks under a MAC of its own (`own`), and names no IP address, so that nobody remembers that MAC
//! as the gateway's: a probe as in RFC 5227, 1.1.
//!
//! ```text
//!   gwb-.. (bridge)             this host's routing
//!     |                              |        |
//!   gwu-.. ----------------------- gwg-..    the interface that was named
//!   frames to the gateway's MAC    gateway's address, forwarding on
//!   and to `own`
//! ```

use std::io;
use std::net::Ipv4Addr;

use godwit_protocol::id::{Mac, Name};

use super::filter::FAMILY_NETDEV;
use super::guard::{FAMILY_INET, Guard, INPUT, TABLE};
use super::kernel::PortFlags;
use super::nft::{Batch, Expression};
use super::{LinkError, Links, names};

/// The table of what may pass by gateways; the other one is made anew with each change of members.
const PASSES: &str = "godwit-uplinks";
/// The hook of packets that this host forwards.
const FORWARD: u32 = 2;
const ARP: u16 = 0x0806;
const ARP_ASKS: u16 = 1;
/// Where an ARP packet names its sender: MAC, then IP address.
const ARP_SENDER: u32 = 8;
const ICMP: u8 = libc::IPPROTO_ICMP as u8;
/// As netfilter calls it.
const IPV4: u8 = 2;
/// The gateway's port: it hears guests' ARP requests.
const PORT: PortFlags = PortFlags { groups: true, isolated: false };

/// A wire's way out on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// The interface of this host that leads outside.
    pub interface: String,
    /// The gateway's address, the same on every host.
    pub gateway: Ipv4Addr,
    /// How many bits of it name the wire's subnet.
    pub prefix: u8,
    /// This host's own MAC on the wire.
    pub own: Mac,
}

/// The MAC of a wire's gateway, the same on every host.
#[must_use]
pub fn gateway_mac(wire: &Name) -> Mac {
    names::gateway_mac(wire)
}

impl Links {
    /// Makes the wire's way out, or heals it. The wire must be set up. Frames come to it when its two MACs are routed to
    /// [`super::Where::Gateway`].
    ///
    /// # Errors
    /// As [`Links::leads_out`]; [`LinkError::SubnetTaken`], [`LinkError::OtherGateway`], [`LinkError::NoWire`], or the kernel's.
    pub async fn set_uplink(&self, wire: &Name, uplink: &Uplink) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        let bridge = state.wires.get(wire).ok_or_else(|| LinkError::NoWire(wire.clone()))?.bridge;
        let (name, port) = (names::gateway(wire), names::uplink(wire));
        self.check_uplink(&name, uplink).await?;
        state.uplinks.insert(wire.clone(), uplink.interface.clone());
        self.pass(&state.uplinks).await?;
        if self.kernel.device(&name).await?.is_none() {
            let mac = names::gateway_mac(wire).0;
            self.kernel.add_pair(&name, mac, &port).await?;
        }
        let (device, port) = (self.index(&name).await?, self.index(&port).await?);
        let alias = names::alias(wire, None);
        let mtu = self.config.mtu;
        self.kernel.dress(device, &alias, mtu, None, None).await?;
        self.kernel.dress(port, &alias, mtu, None, Some(bridge)).await?;
        self.kernel.port(port, &PORT).await?;
        self.kernel.route_by(device).await?;
        let (guard, own) = (self.guard.clone(), uplink.own);
        let ask = move || guard.ask_as(&name, own);
        self.blocking("set a gateway's rules (nftables, netdev egress)", ask).await?;
        self.kernel.up(device).await?;
        self.kernel.up(port).await?;
        self.kernel.add_address(device, uplink.gateway, uplink.prefix).await
    }

    /// What an earlier run let pass, and nothing else, passes until each is set again: after a restart, ahead of the first
    /// [`Links::set_uplink`].
    ///
    /// # Errors
    /// The kernel's.
    pub async fn expect_uplinks(&self, known: Vec<(Name, String)>) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        state.uplinks.extend(known);
        self.pass(&state.uplinks).await
    }

    /// Takes the wire's way out away; one that is not there is no error.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn remove_uplink(&self, wire: &Name) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        let name = names::gateway(wire);
        // Its other end and its address go with it.
        if let Some(device) = self.kernel.device(&name).await? {
            self.kernel.delete(device.index).await?;
        }
        // Kernels from 6.16 on keep rules for a device that may come again.
        for chain in [answers(&name), name] {
            self.forget_filter(chain).await?;
        }
        state.uplinks.remove(wire);
        self.pass(&state.uplinks).await
    }

    /// Whether packets get out and in by an interface of this host, as far as it can tell.
    ///
    /// # Errors
    /// [`LinkError::NoInterface`], [`LinkError::NotRunning`], [`LinkError::NotForwarding`], or the kernel's.
    pub async fn leads_out(&self, interface: &str) -> Result<(), LinkError> {
        let ours = interface.starts_with(names::PREFIX) || interface == "lo";
        let device = self.kernel.device(interface).await?;
        // Rules go by the name, of which a device may have more than one.
        let device = device.filter(|device| !ours && device.name == *interface);
        let device = device.ok_or_else(|| LinkError::NoInterface(interface.to_owned()))?;
        match (device.runs, device.forwards) {
            (false, _) => Err(LinkError::NotRunning(interface.to_owned())),
            (true, false) => Err(LinkError::NotForwarding(interface.to_owned())),
            (true, true) => Ok(()),
        }
    }

    /// Refuses what would not work, or would take somebody's packets away.
    async fn check_uplink(&self, gateway: &str, uplink: &Uplink) -> Result<(), LinkError> {
        self.leads_out(&uplink.interface).await?;
        let here = self.kernel.device(gateway).await?.map(|d| d.index);
        let (ip, prefix) = (uplink.gateway, uplink.prefix);
        for other in self.kernel.addresses().await? {
            let same = Some(other.device) == here;
            if same && (other.ip, other.prefix) != (ip, prefix) {
                return Err(LinkError::OtherGateway(other.ip, other.prefix));
            }
            if !same && other.overlaps(ip, prefix) {
                return Err(LinkError::SubnetTaken(other.ip, other.prefix));
            }
        }
        Ok(())
    }

    async fn pass(
        &self,
        uplinks: &std::collections::BTreeMap<Name, String>,
    ) -> Result<(), LinkError> {
        let pairs = uplinks.iter().map(|(wire, to)| (names::gateway(wire), to.clone()));
        let (guard, pairs) = (self.guard.clone(), pairs.collect::<Vec<_>>());
        self.blocking("set what may pass by gateways (nftables)", move || guard.pass(&pairs)).await
    }
}

/// The chain that takes the answers to what a gateway asked.
fn answers(gateway: &str) -> String {
    format!("{gateway}-own")
}

impl Guard {
    /// Of each gateway and the interface that leads outside: nothing else passes by the gateway.
    pub(super) fn pass(&self, uplinks: &[(String, String)]) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.table(FAMILY_INET, PASSES, false);
        batch.delete_table(FAMILY_INET, PASSES);
        if !uplinks.is_empty() {
            batch.table(FAMILY_INET, PASSES, false);
            batch.chain(FAMILY_INET, PASSES, "input", INPUT);
            batch.chain(FAMILY_INET, PASSES, "forward", FORWARD);
        }
        for (gateway, interface) in uplinks {
            let drop = |first, second| [first, second, Expression::Count, Expression::Drop];
            let (from, to) = (Expression::InputNamed(gateway), Expression::OutputNamed(gateway));
            let out = drop(from, Expression::OutputNotNamed(interface));
            let back = drop(to, Expression::InputNotNamed(interface));
            batch.rule(FAMILY_INET, PASSES, "forward", &out);
            batch.rule(FAMILY_INET, PASSES, "forward", &back);
            let host = Expression::TransportProtocolNot(ICMP);
            let host = drop(Expression::InputNamed(gateway), host);
            batch.rule(FAMILY_INET, PASSES, "input", &host);
            for (chain, way) in [
                ("forward", Expression::InputNamed(gateway)),
                ("forward", Expression::OutputNamed(gateway)),
                ("input", Expression::InputNamed(gateway)),
            ] {
                let other = drop(way, Expression::NetworkProtocolNot(IPV4));
                batch.rule(FAMILY_INET, PASSES, chain, &other);
            }
        }
        self.commit(&batch.finish())
    }

    /// What a gateway asks by ARP it asks as `own`, and takes the answers.
    fn ask_as(&self, device: &str, own: Mac) -> io::Result<()> {
        let answers = answers(device);
        let mut batch = Batch::new();
        batch.table(FAMILY_NETDEV, TABLE, false);
        // Made, if it is not there, so that it can be replaced.
        batch.egress_chain(FAMILY_NETDEV, TABLE, device);
        batch.ingress_chain(FAMILY_NETDEV, TABLE, &answers, device);
        batch.flush(FAMILY_NETDEV, TABLE, device);
        batch.flush(FAMILY_NETDEV, TABLE, &answers);
        let nobody = [0; 4];
        let ask = [
            Expression::EtherProtocol(ARP),
            Expression::ArpOperation(ARP_ASKS),
            Expression::SetEther(6, &own.0),
            Expression::SetNetwork(ARP_SENDER, &own.0),
            Expression::SetNetwork(ARP_SENDER + 6, &nobody),
        ];
        batch.rule(FAMILY_NETDEV, TABLE, device, &ask);
        let to_own = Expression::EtherDestination(own.0);
        let take = [Expression::EtherProtocol(ARP), to_own, Expression::ToHost];
        batch.rule(FAMILY_NETDEV, TABLE, &answers, &take);
        self.commit(&batch.finish())
    }
}
