//! Filters and connections of NICs against the real kernel.

use std::net::UdpSocket;

use godwit::link::TapView;
use godwit_protocol::id::{Mac, VmId};
use godwit_protocol::wire::filter::Rule;

use super::*;

const TCP: u8 = 6;
const UDP: u8 = 17;
const VM: VmId = VmId([9; 16]);

fn rules(text: &[&str]) -> Vec<Rule> {
    text.iter().map(|rule| rule.parse().unwrap()).collect()
}

/// A datagram from 10.0.0.`from` to a port, with a text.
fn packet(to: Mac, protocol: u8, from: u8, port: u16, text: &str) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, from, 10, 0, 0, 200];
    let length = (20 + 20 + text.len()) as u16;
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    let [a, b] = (!sum(&ip)).to_be_bytes();
    (ip[10], ip[11]) = (a, b);
    let mut transport = [0; 20];
    transport[2..4].copy_from_slice(&port.to_be_bytes());
    transport[4..6].copy_from_slice(&(length - 20).to_be_bytes());
    [&to.0[..], &mac(9).0, &[8, 0], &ip, &transport, text.as_bytes()].concat()
}

/// The texts of such datagrams that wait for a guest.
fn texts(guest: &Guest) -> Vec<String> {
    let all = std::iter::from_fn(|| guest.receive(Duration::ZERO));
    let ours = all.filter(|f| f.get(12..14) == Some(&[8, 0]));
    ours.map(|f| String::from_utf8_lossy(&f[54..]).into_owned()).collect()
}

#[test]
fn the_first_rule_that_fits_decides_and_arp_always_passes() {
    run(|world| async move {
        let lan = lan(world).await;
        let red = wire("red");
        let near = Guest::boot(&lan.world.a, &lan.a, &red, mac(3)).await;
        lan.world.a.enter();
        let filter = rules(&[
            "allow tcp 22 from 10.0.0.0/28",
            "deny tcp 22",
            "deny udp",
            "deny any from 10.0.0.77",
        ]);
        lan.a.set_filter(&red, &mac(1), &filter).await.unwrap();
        let send = |protocol, from, port, text| {
            near.send_raw(&[0; 10], &packet(mac(1), protocol, from, port, text));
        };
        send(TCP, 5, 22, "ssh from near");
        send(TCP, 50, 22, "ssh from far");
        send(TCP, 50, 80, "http");
        send(UDP, 5, 53, "dns");
        send(TCP, 77, 80, "from whom nothing comes");
        near.send(mac(1), "no ip");
        assert_eq!(
            lan.one.receive(SOON).map(|f| f[54..].to_vec()),
            Some(b"ssh from near".to_vec())
        );
        assert_eq!(texts(&lan.one), ["http"]);
        near.send(mac(1), "no ip again");
        assert_eq!(lan.one.hear().as_deref(), Some("no ip again"));
        // What goes past a plug meets the filter, too.
        let view = TapView::new(lan.one.fd.try_clone().unwrap());
        let mut past = lan.a.injector(&red, &mac(1), view).await.unwrap();
        assert!(past.send(&packet(mac(1), TCP, 50, 80, "held")));
        past.send(&packet(mac(1), UDP, 50, 80, "held and denied"));
        assert_eq!(texts(&lan.one), ["held"]);
        lan.a.set_filter(&red, &mac(1), &[]).await.unwrap();
        send(UDP, 5, 53, "dns at last");
        assert_eq!(texts(&lan.one), ["dns at last"]);
    });
}

#[test]
fn a_nic_gets_onto_a_wire_behind_its_filter_and_off_it() {
    run(|world| async move {
        let lan = lan(world).await;
        let (red, blue) = (wire("red"), wire("blue"));
        lan.world.a.enter();
        lan.a.ensure_wire(&blue, false).await.unwrap();
        let near = Guest::boot(&lan.world.a, &lan.a, &red, mac(3)).await;
        let fd = lan.a.open_loose_tap(VM, &mac(5)).await.unwrap();
        let guest = Guest { mac: mac(5), fd };
        guest.silence();
        let filter = rules(&["deny udp"]);
        for _ in 0..2 {
            lan.a.attach(&red, &mac(5), VM, &filter).await.unwrap();
        }
        near.send(mac(5), "no route yet");
        lan.a.set_route(&red, &mac(5), Where::Local).await.unwrap();
        near.send_raw(&[0; 10], &packet(mac(5), UDP, 5, 53, "denied"));
        near.send_raw(&[0; 10], &packet(mac(5), TCP, 5, 53, "allowed"));
        assert_eq!(texts(&guest), ["allowed"]);
        lan.a.set_route(&red, &mac(5), Where::None).await.unwrap();
        for _ in 0..2 {
            lan.a.detach(&red, &mac(5), VM).await.unwrap();
        }
        near.send(mac(5), "gone");
        near.send(BROADCAST, "gone, too");
        guest.silence();
        lan.a.attach(&blue, &mac(5), VM, &[]).await.unwrap();
        lan.a.set_route(&blue, &mac(5), Where::Local).await.unwrap();
        near.send(BROADCAST, "not on this wire");
        guest.silence();
        let tables = lan.world.a.shell(&["nft", "list", "table", "netdev", "godwit"]);
        assert!(!tables.contains("udp"), "{tables}");
    });
}

/// Priority tags of IEEE 802.1Q and 802.1ad, and a tag of VLAN 5.
const Q: [u8; 4] = [0x81, 0, 0xe0, 0];
const AD: [u8; 4] = [0x88, 0xa8, 0, 0];
const VLAN: [u8; 4] = [0x81, 0, 0, 5];

fn tagged(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    [&frame[..12], &tags.concat(), &frame[12..]].concat()
}

/// What has been sent to a guest until now.
fn reached(guest: &Guest, near: &Guest) -> Vec<Vec<u8>> {
    near.send(guest.mac, END);
    let next = || guest.receive(SOON).unwrap();
    std::iter::from_fn(|| Some(next()).filter(|f| text(f).as_deref() != Some(END))).collect()
}

const END: &str = "that is all";

/// Linux in the place of a guest: its tap gets what reaches the guest's.
struct Linux {
    nic: Guest,
    dns: UdpSocket,
}

impl Linux {
    async fn boot(lan: &Lan) -> Self {
        let host = &lan.world.b;
        let before = host.devices();
        let nic = Guest { mac: mac(1), fd: lan.b.open_loose_tap(VM, &mac(1)).await.unwrap() };
        let device = host.devices().into_iter().find(|d| !before.contains(d)).unwrap();
        host.shell(&["ip", "addr", "add", "10.0.0.200/24", "dev", &device]);
        host.shell(&["ip", "link", "set", &device, "address", &mac(1).colons(), "up"]);
        let dns = UdpSocket::bind("10.0.0.200:53").unwrap();
        dns.set_read_timeout(Some(SOON)).unwrap();
        Self { nic, dns }
    }

    /// The texts of the datagrams that it takes from these frames.
    fn takes(&self, frames: &[Vec<u8>]) -> Vec<String> {
        for frame in frames.iter().chain([&packet(mac(1), UDP, 5, 53, END)]) {
            self.nic.send_raw(&[0; 10], frame);
        }
        let next = || {
            let mut bytes = [0; 100];
            let length = self.dns.recv(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes[12..length]).into_owned()
        };
        std::iter::from_fn(|| Some(next()).filter(|text| text != END)).collect()
    }
}

#[test]
fn tags_carry_nothing_past_a_filter() {
    run(|world| async move {
        let lan = lan(world).await;
        let (red, one) = (wire("red"), &lan.one);
        let near = Guest::boot(&lan.world.a, &lan.a, &red, mac(3)).await;
        let linux = Linux::boot(&lan).await;
        lan.world.a.enter();
        let view = TapView::new(one.fd.try_clone().unwrap());
        let mut past = lan.a.injector(&red, &one.mac, view).await.unwrap();
        let ways = [&[][..], &[Q], &[AD], &[Q, Q], &[AD, Q], &[Q, AD], &[AD, AD], &[Q, Q, Q]];
        // By the bridge, and past a plug.
        let names: Vec<_> =
            ways.iter().map(|w| [format!("{w:x?}"), format!("{w:x?} held")]).collect();
        let (all, names) = (names.concat(), &names);
        let seen = [&names[0][..], &names[1][..1], &names[2][..1]].concat();
        for (filter, expected) in [
            (&[][..], &all),
            (&["deny any"], &vec![]),
            (&["deny udp 53"], &vec![]),
            (&["deny tcp"], &seen),
            (&["allow udp"], &all),
        ] {
            lan.a.set_filter(&red, &one.mac, &rules(filter)).await.unwrap();
            for (tags, [by_bridge, held]) in ways.iter().zip(names) {
                let datagram = |text| tagged(&packet(one.mac, UDP, 5, 53, text), tags);
                near.send_raw(&[0; 10], &datagram(by_bridge));
                past.send(&datagram(held));
            }
            assert_eq!(linux.takes(&reached(one, &near)), *expected, "{filter:?}");
        }
        // One tag hides nothing on a bridge: rules look behind it, ARP passes.
        let arp = [&one.mac.0[..], &near.mac.0, &[8, 6], &[0; 28]].concat();
        let vlan = tagged(&packet(one.mac, UDP, 5, 54, "in a VLAN"), &[VLAN]);
        let sent = [arp.clone(), tagged(&arp, &[Q]), tagged(&arp, &[VLAN]), vlan];
        for (filter, pass) in [("deny any", 3), ("deny udp 54", 3), ("deny udp 53", 4)] {
            lan.a.set_filter(&red, &one.mac, &rules(&[filter])).await.unwrap();
            sent.iter().for_each(|frame| near.send_raw(&[0; 10], frame));
            assert_eq!(reached(one, &near), sent[..pass], "{filter}");
        }
    });
}
