//! A wire's gateway: what it answers, how it asks, and what may pass by it.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use godwit::link::{DeviceNews, LinkError, Links, Uplink, Where, gateway_mac};
use godwit_protocol::id::Mac;

use crate::world::*;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 5, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 5, 0, 7);
const PORT: u16 = 7777;
const ARP: [u8; 2] = [0x08, 0x06];
const IP: [u8; 2] = [0x08, 0x00];

fn uplink(own: Mac) -> Uplink {
    Uplink { interface: "left".into(), gateway: GATEWAY, prefix: 24, own }
}

/// Of who says it, about whom: 1 asks, 2 answers.
fn arp(operation: u8, to: Mac, from: (Mac, Ipv4Addr), about: (Mac, Ipv4Addr)) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    let who = [&from.0.0[..], &from.1.octets(), &about.0.0, &about.1.octets()].concat();
    [&to.0[..], &from.0.0, &ARP, &head, &who].concat()
}

/// A datagram from the guest, by its gateway.
fn datagram(from: Mac, via: Mac, to: Ipv4Addr) -> Vec<u8> {
    let text = b"hello";
    let udp = [&1000_u16.to_be_bytes()[..], &PORT.to_be_bytes(), &[0, 8 + text.len() as u8, 0, 0]];
    let length = 20 + 8 + text.len() as u16;
    let mut ip = [&[0x45, 0][..], &length.to_be_bytes(), &[0, 1, 0, 0, 64, 17, 0, 0]].concat();
    ip.extend([GUEST.octets(), to.octets()].concat());
    let sum: u32 = ip.chunks(2).map(|b| u32::from(u16::from_be_bytes([b[0], b[1]]))).sum();
    let sum = !((sum >> 16) + (sum & 0xffff)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    [&via.0[..], &from.0, &IP, &ip, &udp.concat(), text].concat()
}

async fn ready(links: &Links, own: Mac) {
    let red = wire("red");
    links.set_uplink(&red, &uplink(own)).await.unwrap();
    for mac in [own, gateway_mac(&red)] {
        links.set_route(&red, &mac, Where::Gateway).await.unwrap();
    }
}

fn hear(guest: &Guest, ethertype: [u8; 2]) -> Vec<u8> {
    loop {
        let frame = guest.receive(SOON).expect("a frame");
        if frame[12..14] == ethertype {
            return frame;
        }
    }
}

fn forward(host: &Host) {
    host.enter();
    std::fs::write("/proc/sys/net/ipv4/conf/left/forwarding", "1").unwrap();
}

fn listening(host: &Host, ip: std::net::IpAddr, wait: Duration) -> UdpSocket {
    host.enter();
    let socket = UdpSocket::bind((ip, PORT)).unwrap();
    socket.set_read_timeout(Some(wait)).unwrap();
    socket
}

#[test]
fn a_gateway_answers_as_itself_and_asks_as_its_host() {
    run(|world| async move {
        // Whole: the veth ends with either namespace.
        let world = world;
        let (red, own) = (wire("red"), Mac([2, 9, 9, 9, 9, 9]));
        let (a, _out) = world.a.links(true);
        a.ensure_wire(&red, false).await.unwrap();
        let guest = Guest::boot(&world.a, &a, &red, mac(1)).await;
        a.set_route(&red, &mac(1), Where::Local).await.unwrap();
        let refused = a.set_uplink(&red, &uplink(own)).await.unwrap_err();
        assert!(matches!(refused, LinkError::NotForwarding(_)), "{refused}");
        forward(&world.a);
        ready(&a, own).await;
        // Again, as after a restart.
        ready(&a, own).await;

        let gateway = gateway_mac(&red);
        let ask = arp(1, BROADCAST, (mac(1), GUEST), (Mac([0; 6]), GATEWAY));
        guest.send_raw(&[0; 10], &ask);
        let answer = arp(2, mac(1), (gateway, GATEWAY), (mac(1), GUEST));
        assert_eq!(hear(&guest, ARP), answer);

        // The kernel knows the guest now: as somebody else it has to ask.
        world.a.enter();
        let host = UdpSocket::bind("0.0.0.0:0").unwrap();
        let other = Ipv4Addr::new(10, 5, 0, 8);
        host.send_to(b"hello", (other, PORT)).unwrap();
        let asked = hear(&guest, ARP);
        let probe = arp(1, BROADCAST, (own, Ipv4Addr::UNSPECIFIED), (Mac([0; 6]), other));
        assert_eq!(asked, probe);
        guest.send_raw(&[0; 10], &arp(2, own, (mac(1), other), (own, Ipv4Addr::UNSPECIFIED)));
        let sent = hear(&guest, IP);
        assert_eq!((&sent[..6], &sent[6..12]), (&mac(1).0[..], &gateway.0[..]));

        a.remove_uplink(&red).await.unwrap();
        assert!(!world.a.devices().iter().any(|d| d.starts_with("gwg-") || d.starts_with("gwu-")));
        a.remove_uplink(&red).await.unwrap();
    });
}

#[test]
fn by_a_gateway_nothing_reaches_its_host_or_another_interface() {
    run(|world| async move {
        let (red, own) = (wire("red"), Mac([2, 9, 9, 9, 9, 9]));
        let (a, _out) = world.a.links(true);
        a.ensure_wire(&red, false).await.unwrap();
        let guest = Guest::boot(&world.a, &a, &red, mac(1)).await;
        forward(&world.a);
        world.a.shell(&["ip", "link", "add", "side", "type", "veth", "peer", "name", "edge"]);
        world.a.shell(&["ip", "addr", "add", "10.88.0.1/24", "dev", "side"]);
        // So that it says nothing by itself.
        world.a.shell(&["ip", "link", "set", "side", "addrgenmode", "none"]);
        world.a.shell(&["ip", "link", "set", "side", "up"]);
        world.a.shell(&["ip", "link", "set", "edge", "up"]);
        world.a.shell(&[
            "ip",
            "neigh",
            "add",
            "10.88.0.2",
            "lladdr",
            "02:00:00:00:00:01",
            "dev",
            "side",
        ]);
        ready(&a, own).await;
        let outside = listening(&world.b, world.b.ip, SOON);
        let host = listening(&world.a, "0.0.0.0".parse().unwrap(), Duration::from_millis(300));
        let gateway = gateway_mac(&red);
        let mine: Ipv4Addr = world.a.ip.to_string().parse().unwrap();
        let theirs: Ipv4Addr = world.b.ip.to_string().parse().unwrap();
        for to in [mine, GATEWAY, Ipv4Addr::new(10, 88, 0, 2), theirs] {
            guest.send_raw(&[0; 10], &datagram(mac(1), gateway, to));
        }
        let mut heard = [0; 64];
        let (length, from) = outside.recv_from(&mut heard).expect("what may go out does");
        assert_eq!((&heard[..length], from.ip()), (&b"hello"[..], GUEST.into()));
        assert!(host.recv_from(&mut heard).is_err(), "the host was reached");
        let devices = world.a.shell(&["cat", "/proc/net/dev"]);
        let side = devices.lines().find(|line| line.trim_start().starts_with("side:")).unwrap();
        let sent = side.split_whitespace().nth(10);
        assert_eq!(sent, Some("0"), "it went out by another interface");
    });
}

/// What becomes of an interface, once the kernel has told of it.
async fn becomes(links: &Links, news: &DeviceNews, seen: impl Fn(&Result<(), LinkError>) -> bool) {
    loop {
        let now = links.leads_out("left").await;
        if seen(&now) {
            return;
        }
        let told = tokio::time::timeout(SOON, news.next()).await;
        told.unwrap_or_else(|_| panic!("no news, and it is {now:?}")).unwrap();
    }
}

#[test]
fn an_interface_that_fails_and_comes_back_is_told_of() {
    run(|world| async move {
        let (a, _out) = world.a.links(true);
        let news = DeviceNews::open().unwrap();
        forward(&world.a);
        let down = |now: &Result<(), LinkError>| matches!(now, Err(LinkError::NotRunning(_)));
        becomes(&a, &news, Result::is_ok).await;
        world.a.shell(&["ip", "link", "set", "left", "down"]);
        becomes(&a, &news, down).await;
        let red = wire("red");
        a.ensure_wire(&red, false).await.unwrap();
        let refused = a.set_uplink(&red, &uplink(mac(9))).await.unwrap_err();
        assert!(matches!(refused, LinkError::NotRunning(_)), "{refused}");
        world.a.shell(&["ip", "link", "set", "left", "up"]);
        becomes(&a, &news, Result::is_ok).await;
        // Its carrier.
        world.b.shell(&["ip", "link", "set", "right", "down"]);
        becomes(&a, &news, down).await;
        world.b.shell(&["ip", "link", "set", "right", "up"]);
        becomes(&a, &news, Result::is_ok).await;
        world.a.shell(&["ip", "link", "del", "left"]);
        becomes(&a, &news, |now| matches!(now, Err(LinkError::NoInterface(_)))).await;
        world.a.shell(&["ip", "link", "add", "left", "type", "veth", "peer", "name", "far"]);
        world.a.shell(&["ip", "link", "set", "far", "up"]);
        world.a.shell(&["ip", "link", "set", "left", "up"]);
        becomes(&a, &news, |now| matches!(now, Err(LinkError::NotForwarding(_)))).await;
        forward(&world.a);
        becomes(&a, &news, Result::is_ok).await;
    });
}
