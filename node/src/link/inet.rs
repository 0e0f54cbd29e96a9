//! This host's IPv4 on its devices, over netlink: addresses, and whether a device forwards.
//!
//! Owns the form of the messages; keeps no state and decides nothing.

use std::net::{IpAddr, Ipv4Addr};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    AfSpecInet, AfSpecUnspec, InetDevConf, LinkAttribute, LinkMessage,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};

use super::error::LinkError;
use super::kernel::Kernel;

/// An address of this host.
pub(super) struct Address {
    pub(super) device: u32,
    pub(super) ip: Ipv4Addr,
    pub(super) prefix: u8,
}

impl Address {
    /// Whether the two subnets have an address in common.
    pub(super) fn overlaps(&self, ip: Ipv4Addr, prefix: u8) -> bool {
        let shift = 32 - u32::from(self.prefix.min(prefix).min(32));
        let network = |ip: Ipv4Addr| u64::from(ip.to_bits()) >> shift;
        network(self.ip) == network(ip)
    }
}

impl Kernel {
    /// Makes a pair of devices, down; `address` is the first one's.
    pub(super) async fn add_pair(
        &self,
        name: &str,
        address: [u8; 6],
        other: &str,
    ) -> Result<(), LinkError> {
        let pair: LinkMessageBuilder<LinkVeth> = LinkVeth::new(name, other);
        let message = pair.address(address.to_vec()).build();
        self.add(&format!("make the pair {name} and {other}"), message).await
    }

    /// All IPv4 addresses of the namespace.
    pub(super) async fn addresses(&self) -> Result<Vec<Address>, LinkError> {
        let message = RouteNetlinkMessage::GetAddress(inet());
        let answers = self.ask("list addresses", message, NLM_F_DUMP).await?;
        Ok(answers.into_iter().filter_map(read_address).collect())
    }

    /// Gives a device an address; one that it has is no error.
    pub(super) async fn add_address(
        &self,
        device: u32,
        ip: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), LinkError> {
        let mut message = inet();
        message.header.index = device;
        message.header.prefix_len = prefix;
        let ip = IpAddr::V4(ip);
        message.attributes = vec![AddressAttribute::Address(ip), AddressAttribute::Local(ip)];
        let message = RouteNetlinkMessage::NewAddress(message);
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.order("give a gateway its address", message, flags).await
    }

    /// Lets a device forward, for sources that are behind it only, and answer ARP for its own address only.
    pub(super) async fn route_by(&self, device: u32) -> Result<(), LinkError> {
        // What is 0 here is not touched.
        let mut conf = InetDevConf::default();
        (conf.forwarding, conf.rp_filter, conf.arp_ignore) = (1, 1, 1);
        let inet = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(conf)]);
        let conf = LinkAttribute::AfSpecUnspec(vec![inet]);
        let message = LinkUnspec::new_with_index(device).append_extra_attribute(conf).build();
        self.change("let a gateway forward", message).await
    }
}

/// A message about IPv4 addresses.
fn inet() -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message
}

/// Whether packets that come in by the device are forwarded.
pub(super) fn forwards(message: &LinkMessage) -> bool {
    let specs = message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::AfSpecUnspec(specs) => Some(specs),
        _ => None,
    });
    let inet = specs.flatten().filter_map(|spec| match spec {
        AfSpecUnspec::Inet(inet) => Some(inet),
        _ => None,
    });
    inet.flatten().any(|one| matches!(one, AfSpecInet::DevConf(conf) if conf.forwarding != 0))
}

fn read_address(message: RouteNetlinkMessage) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    let ip = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(ip)) => Some(*ip),
        _ => None,
    })?;
    Some(Address { device: message.header.index, ip, prefix: message.header.prefix_len })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_overlap_or_do_not() {
        let address = |ip: [u8; 4], prefix| Address { device: 1, ip: ip.into(), prefix };
        let one = address([10, 5, 0, 9], 24);
        assert!(one.overlaps([10, 5, 0, 1].into(), 24));
        assert!(one.overlaps([10, 5, 255, 1].into(), 16), "the wider one holds the other");
        assert!(!one.overlaps([10, 5, 1, 1].into(), 24));
        assert!(address([10, 5, 0, 9], 0).overlaps([192, 0, 2, 1].into(), 24));
        assert!(!address([10, 5, 0, 9], 32).overlaps([10, 5, 0, 8].into(), 32));
    }
}
