//! Filters and connections of NICs against the real kernel.

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
            lan.one.receive(Duration::from_secs(2)).map(|f| f[54..].to_vec()),
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
