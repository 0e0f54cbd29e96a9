//! What may reach a NIC, in the kernel.
//!
//! Owns one chain of nftables for each tap, on the kernel's way out to it (netdev egress): behind the bridge, and in
//! front of what goes past a plug, too. Decides nothing. Invariants: a tap has its chain before it is on a bridge; a
//! change is one transaction, so that no packet meets half a filter.

use std::io;
use std::net::IpAddr;

use godwit_protocol::id::{Mac, Name};
use godwit_protocol::wire::filter::{Protocol, Rule};

use super::guard::{Guard, TABLE};
use super::nft::{Batch, Expression};
use super::{LinkError, Links, names};

pub(super) const FAMILY_NETDEV: u8 = 5;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// Tags of IEEE 802.1Q and 802.1ad.
const TAGS: [u16; 2] = [0x8100, 0x88a8];
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
const ICMP: u8 = libc::IPPROTO_ICMP as u8;
const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;
/// Neighbour discovery: the types of ICMPv6 from router solicitation to redirect.
const DISCOVERY: (u8, u8) = (133, 137);

impl Links {
    /// Replaces the filter of a NIC that has a tap here.
    ///
    /// # Errors
    /// The kernel's; the filter is as it was.
    pub async fn set_filter(
        &self,
        wire: &Name,
        mac: &Mac,
        rules: &[Rule],
    ) -> Result<(), LinkError> {
        self.filter_device(names::tap(wire, mac), rules, false).await
    }

    /// The VM that had the NIC here is gone: so is its filter, unless another has come.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn forget_tap(&self, wire: &Name, mac: &Mac) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        let name = names::tap(wire, mac);
        if self.kernel.device(&name).await?.is_some() {
            return Ok(());
        }
        if let Some(known) = state.wires.get_mut(wire) {
            known.aside.remove(mac);
        }
        self.forget_filter(name).await
    }

    /// `fresh`: the device is not on a bridge yet, and whatever chain was left of its name goes.
    pub(super) async fn filter_device(
        &self,
        device: String,
        rules: &[Rule],
        fresh: bool,
    ) -> Result<(), LinkError> {
        let (guard, rules) = (self.guard.clone(), rules.to_vec());
        let set = move || guard.filter_nic(&device, &rules, fresh);
        self.blocking("set a NIC's filter (nftables, netdev egress)", set).await
    }

    /// Forgets the filter of a device that is off its bridge.
    pub(super) async fn forget_filter(&self, device: String) -> Result<(), LinkError> {
        let guard = self.guard.clone();
        self.blocking("remove a NIC's filter", move || guard.forget_nic(&device)).await
    }
}

impl Guard {
    fn filter_nic(&self, device: &str, rules: &[Rule], fresh: bool) -> io::Result<()> {
        if !fresh {
            let mut batch = Batch::new();
            batch.flush(FAMILY_NETDEV, TABLE, device);
            add(&mut batch, device, rules);
            match self.commit(&batch.finish()) {
                // Made by a daemon that knew no filters.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                other => return other,
            }
        }
        self.forget_nic(device)?;
        let mut batch = Batch::new();
        batch.table(FAMILY_NETDEV, TABLE, false);
        batch.egress_chain(FAMILY_NETDEV, TABLE, device);
        add(&mut batch, device, rules);
        match self.commit(&batch.finish()) {
            // A kernel without this hook carries NICs without a filter, and no others.
            Err(e) if rules.is_empty() && unknown(&e) => Ok(()),
            other => other,
        }
    }

    /// All filters go, after the last wire.
    pub(super) fn forget_nics(&self) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.delete_table(FAMILY_NETDEV, TABLE);
        match self.commit(&batch.finish()) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) || unknown(&e) => Ok(()),
            other => other,
        }
    }

    fn forget_nic(&self, device: &str) -> io::Result<()> {
        self.lead_back(device)?;
        self.forget_chain(device)
    }

    pub(super) fn forget_chain(&self, chain: &str) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.delete_chain(FAMILY_NETDEV, TABLE, chain);
        match self.commit(&batch.finish()) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) || unknown(&e) => Ok(()),
            other => other,
        }
    }
}

fn unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::EINVAL))
}

fn add(batch: &mut Batch, device: &str, rules: &[Rule]) {
    if rules.is_empty() {
        return;
    }
    let (first, last) = DISCOVERY;
    let discovery = [
        Expression::TransportProtocol(ICMPV6),
        Expression::FirstByte(first, last),
        Expression::Accept,
    ];
    batch.rule(FAMILY_NETDEV, TABLE, device, &discovery);
    // The kernel takes one tag off what comes by the bridge, none off what goes past a plug, and rules do not look behind
    // another. A guest may: Linux skips any number of priority tags.
    let denies = rules.iter().any(|rule| !rule.allow);
    for tag in TAGS.into_iter().filter(|_| denies) {
        let hidden = [Expression::EtherProtocol(tag), Expression::Count, Expression::Drop];
        batch.rule(FAMILY_NETDEV, TABLE, device, &hidden);
    }
    for rule in rules {
        for (family, protocol) in parts(rule) {
            let mut all = vec![Expression::EtherProtocol(family)];
            all.extend(rule.from.map(source));
            all.extend(protocol.map(Expression::TransportProtocol));
            all.extend(rule.port.map(Expression::DestinationPort));
            all.push(Expression::Count);
            all.push(if rule.allow { Expression::Accept } else { Expression::Drop });
            batch.rule(FAMILY_NETDEV, TABLE, device, &all);
        }
    }
}

/// What the kernel has to be asked one by one: versions of IP, and the protocol in each.
fn parts(rule: &Rule) -> impl Iterator<Item = (u16, Option<u8>)> {
    let families = [(IPV4, true), (IPV6, false)];
    let wanted = rule.from.map(|(address, _)| address.is_ipv4());
    let protocol = rule.protocol;
    families.into_iter().filter(move |(_, v4)| wanted.is_none_or(|w| w == *v4)).map(
        move |(family, v4)| {
            let number = match protocol {
                Protocol::Any => None,
                Protocol::Tcp => Some(TCP),
                Protocol::Udp => Some(UDP),
                Protocol::Icmp if v4 => Some(ICMP),
                Protocol::Icmp => Some(ICMPV6),
            };
            (family, number)
        },
    )
}

fn source((address, prefix): (IpAddr, u8)) -> Expression<'static> {
    let (offset, network) = match address {
        IpAddr::V4(a) => (12, a.octets().to_vec()),
        IpAddr::V6(a) => (8, a.octets().to_vec()),
    };
    let bits = usize::from(prefix);
    let mask = (0..network.len()).map(|at| match bits.saturating_sub(at * 8) {
        0 => 0,
        rest @ 1..8 => 0xff << (8 - rest),
        _ => 0xff_u8,
    });
    Expression::SourceIn { offset, mask: mask.collect(), network }
}
