//! What kernel devices are called. Owns the derivation of device names, VNIs and aliases from wires and
//! MACs; touches nothing. Invariant: the same wire and MAC give the same name in every run of the
//! daemon, so what an earlier run left is found again and never made twice.

use std::net::IpAddr;

use godwit_protocol::id::{CopyId, Mac, Name, VmId};

/// All devices of this program begin with this; nothing else on a host is ever removed.
pub(super) const PREFIX: &str = "gw";
const BRIDGE: &str = "gwb-";
const TAP: &str = "gwt-";
const VXLAN: &str = "gwv-";
const TUNNEL: &str = "gwx-";
const HOLD: &str = "gwh-";
const ASIDE: &str = "gwa-";
const UPLINK: &str = "gwu-";
const GATEWAY: &str = "gwg-";
/// Ports of our bridges begin with these (the filter on frames to the host itself matches them).
pub(super) const PORT_PREFIXES: [&str; 4] = [TAP, VXLAN, TUNNEL, UPLINK];

/// 40 bits of hash behind a four letter prefix: 14 of the 15 bytes a device name may have.
fn short(prefix: &str, parts: &[&[u8]]) -> String {
    let mut name = String::from(prefix);
    for byte in &digest(parts)[..5] {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}

fn digest(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("godwit link device names v1");
    for part in parts {
        hasher.update(&[u8::try_from(part.len()).unwrap_or(u8::MAX)]);
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

pub(super) fn bridge(wire: &Name) -> String {
    short(BRIDGE, &[b"bridge", wire.as_str().as_bytes()])
}

pub(super) fn vxlan(wire: &Name) -> String {
    short(VXLAN, &[b"vxlan", wire.as_str().as_bytes()])
}

pub(super) fn tunnel(wire: &Name) -> String {
    short(TUNNEL, &[b"tunnel", wire.as_str().as_bytes()])
}

/// The tap of a NIC.
pub(super) fn tap(wire: &Name, mac: &Mac) -> String {
    short(TAP, &[b"tap", wire.as_str().as_bytes(), &mac.0])
}

/// The tap of a NIC that is on no wire.
pub(super) fn loose(vm: VmId, mac: &Mac) -> String {
    short(TAP, &[b"loose", &vm.0, &mac.0])
}

/// Where the NIC's frames wait while it moves.
pub(super) fn hold(wire: &Name, mac: &Mac) -> String {
    short(HOLD, &[b"hold", wire.as_str().as_bytes(), &mac.0])
}

/// Where broadcasts for a NIC wait that comes with this copy.
pub(super) fn aside(wire: &Name, mac: &Mac, copy: CopyId) -> String {
    short(ASIDE, &[b"aside", wire.as_str().as_bytes(), &mac.0, &copy.0])
}

/// The bridge's end of the pair that leads out of the wire.
pub(super) fn uplink(wire: &Name) -> String {
    short(UPLINK, &[b"uplink", wire.as_str().as_bytes()])
}

/// Its other end, which has the gateway's address.
pub(super) fn gateway(wire: &Name) -> String {
    short(GATEWAY, &[b"gateway", wire.as_str().as_bytes()])
}

/// The gateway's MAC, the same on every host.
pub(super) fn gateway_mac(wire: &Name) -> Mac {
    let d = digest(&[b"gateway address", wire.as_str().as_bytes()]);
    Mac([0x02, d[0], d[1], d[2], d[3], d[4]])
}

/// The wire's VXLAN network identifier: 24 bits, never 0.
pub(super) fn vni(wire: &Name) -> u32 {
    let d = digest(&[b"vni", wire.as_str().as_bytes()]);
    u32::from_be_bytes([0, d[0], d[1], d[2]]).max(1)
}

/// The bridge's own address, fixed so that it does not change with its ports.
pub(super) fn bridge_address(wire: &Name, underlay: &str) -> [u8; 6] {
    let d = digest(&[b"address", wire.as_str().as_bytes(), underlay.as_bytes()]);
    [0x02, d[0], d[1], d[2], d[3], d[4]]
}

/// What a device's alias says, so that `ip link` explains itself and a restart can read it back.
pub(super) fn alias(wire: &Name, mac: Option<&Mac>) -> String {
    match mac {
        Some(mac) => format!("godwit {wire} {}", mac.colons()),
        None => format!("godwit {wire}"),
    }
}

/// The alias of a VXLAN device, which belongs to one underlay address.
pub(super) fn alias_via(wire: &Name, underlay: IpAddr) -> String {
    format!("godwit {wire} via {underlay}")
}

/// Reads back an alias; `None` for anything else.
pub(super) fn read_alias(alias: &str) -> Option<(Name, Option<Mac>)> {
    let mut words = alias.split(' ');
    if words.next() != Some("godwit") {
        return None;
    }
    let wire = words.next()?.parse().ok()?;
    let mac = match words.next() {
        Some("via") => words.next().and_then(|ip| ip.parse::<IpAddr>().ok()).map(|_| None)?,
        Some(text) => Some(text.replace(':', "").parse().ok()?),
        None => None,
    };
    words.next().is_none().then_some((wire, mac))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ() {
        let (a, b): (Name, Name) = ("a".repeat(63).parse().unwrap(), "b".parse().unwrap());
        let mac = Mac([1; 6]);
        let all = [bridge(&a), vxlan(&a), tunnel(&a), tap(&a, &mac), bridge(&b), tap(&b, &mac)];
        assert!(all.iter().all(|n| n.len() <= 15 && n.starts_with(PREFIX)), "{all:?}");
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
        assert!((1..1 << 24).contains(&vni(&a)));
    }

    #[test]
    fn aliases_read_back() {
        let wire: Name = "red-1".parse().unwrap();
        let mac = Mac([0x52, 0x54, 0, 1, 2, 0xff]);
        assert_eq!(read_alias(&alias(&wire, Some(&mac))), Some((wire.clone(), Some(mac))));
        assert_eq!(read_alias(&alias(&wire, None)), Some((wire.clone(), None)));
        let via = alias_via(&wire, "fd00::1".parse().unwrap());
        assert_eq!(read_alias(&via), Some((wire, None)));
        for other in ["", "godwit", "other red", "godwit red 52:54", "godwit red 525400010203 x"] {
            assert_eq!(read_alias(other), None, "{other}");
        }
    }
}
