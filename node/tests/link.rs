//! Wires between two real network namespaces: what reaches whom, by which way, and what is left behind.
//! Needs root; says so and passes otherwise.

#![allow(clippy::unwrap_used, clippy::expect_used)]
use std::collections::BTreeSet;
use std::time::Duration;

use godwit::link::{Injected, LinkError, Links, Outgoing, Where};
use tokio::sync::mpsc::Receiver;

#[path = "link/cutover.rs"]
mod cutover;
#[path = "link/filter.rs"]
mod filter;
#[path = "link/uplink.rs"]
mod uplink;
#[path = "link/world.rs"]
mod world;
use world::*;

/// Both hosts on the trusted LAN, wire `red` on each, guest 1 on A and guest 2 on B.
struct Lan {
    world: World,
    a: Links,
    b: Links,
    a_out: Receiver<Outgoing>,
    one: Guest,
    two: Guest,
}

async fn lan(world: World) -> Lan {
    let red = wire("red");
    let (a, a_out) = world.a.links(true);
    a.ensure_wire(&red, false).await.unwrap();
    a.set_members(&[world.b.ip]).await.unwrap();
    let one = Guest::boot(&world.a, &a, &red, mac(1)).await;
    let (b, _) = world.b.links(true);
    b.ensure_wire(&red, false).await.unwrap();
    b.set_members(&[world.a.ip]).await.unwrap();
    let two = Guest::boot(&world.b, &b, &red, mac(2)).await;
    for (links, here, there, ip) in [(&a, 1, 2, world.b.ip), (&b, 2, 1, world.a.ip)] {
        links.set_route(&red, &mac(here), Where::Local).await.unwrap();
        links.set_route(&red, &mac(there), Where::Vxlan(ip)).await.unwrap();
        links.broadcast_set(&red, &[ip]).await.unwrap();
    }
    Lan { world, a, b, a_out, one, two }
}

#[test]
fn vxlan_carries_unicast_and_broadcast_and_floods_nothing_unknown() {
    run(|world| async move {
        let mut lan = lan(world).await;
        lan.one.send(mac(2), "hello");
        assert_eq!(lan.two.hear().as_deref(), Some("hello"));
        lan.two.send(mac(1), "and back");
        assert_eq!(lan.one.hear().as_deref(), Some("and back"));
        lan.one.send(BROADCAST, "all");
        assert_eq!(lan.two.hear().as_deref(), Some("all"));
        let out = outgoing(&mut lan.a_out).await.unwrap();
        assert!(out.is_group() && text(&out.frame).as_deref() == Some("all"));

        lan.one.send(mac(9), "to nobody");
        lan.one.send(mac(2), "after nobody");
        assert_eq!(lan.two.hear().as_deref(), Some("after nobody"));
        lan.two.silence();
        nothing_leaves(&mut lan.a_out).await;
    });
}

#[test]
fn routes_flip_and_broadcast_peers_are_replaced() {
    run(|world| async move {
        let mut lan = lan(world).await;
        let red = wire("red");
        lan.a.set_route(&red, &mac(2), Where::Tunnel).await.unwrap();
        lan.one.send(mac(2), "by tunnel");
        let out = outgoing(&mut lan.a_out).await.unwrap();
        assert_eq!((out.destination(), text(&out.frame).as_deref()), (mac(2), Some("by tunnel")));
        lan.two.silence();

        lan.a.set_route(&red, &mac(2), Where::None).await.unwrap();
        lan.one.send(mac(2), "nowhere");
        for _ in 0..2 {
            lan.a.set_route(&red, &mac(2), Where::Vxlan(lan.world.b.ip)).await.unwrap();
        }
        lan.one.send(mac(2), "by vxlan");
        assert_eq!(lan.two.hear().as_deref(), Some("by vxlan"));
        nothing_leaves(&mut lan.a_out).await;

        lan.a.broadcast_set(&red, &[]).await.unwrap();
        lan.one.send(BROADCAST, "only the tunnel");
        assert!(outgoing(&mut lan.a_out).await.is_some());
        lan.two.silence();
        lan.a.broadcast_set(&red, &[lan.world.b.ip]).await.unwrap();
        lan.one.send(BROADCAST, "again");
        assert_eq!(lan.two.hear().as_deref(), Some("again"));
    });
}

#[test]
fn a_nic_that_arrives_gets_nothing_until_it_is_local() {
    run(|world| async move {
        let lan = lan(world).await;
        let red = wire("red");
        let moved = Guest::boot(&lan.world.b, &lan.b, &red, mac(1)).await;
        lan.two.send(mac(1), "still on A");
        assert_eq!(lan.one.hear().as_deref(), Some("still on A"));
        lan.two.send(BROADCAST, "to the running one");
        assert_eq!(lan.one.hear().as_deref(), Some("to the running one"));
        moved.silence();

        lan.b.set_route(&red, &mac(1), Where::Local).await.unwrap();
        lan.a.set_route(&red, &mac(1), Where::Vxlan(lan.world.b.ip)).await.unwrap();
        lan.two.send(mac(1), "now on B");
        assert_eq!(moved.hear().as_deref(), Some("now on B"));
        lan.two.send(BROADCAST, "all on B");
        assert_eq!(moved.hear().as_deref(), Some("all on B"));
        lan.one.silence();
        moved.send(mac(2), "same bridge");
        assert_eq!(lan.two.hear().as_deref(), Some("same bridge"));
    });
}

#[test]
fn vxlan_from_a_stranger_is_dropped() {
    run(|world| async move {
        let lan = lan(world).await;
        lan.b
            .set_members(&["10.77.0.9".parse().unwrap(), "fd00::9".parse().unwrap()])
            .await
            .unwrap();
        lan.one.send(mac(2), "from a stranger");
        lan.two.silence();
        lan.b.set_members(&[lan.world.a.ip]).await.unwrap();
        lan.one.send(mac(2), "from a member");
        assert_eq!(lan.two.hear().as_deref(), Some("from a member"));
        let rules = lan.world.b.shell(&["nft", "list", "ruleset"]);
        assert!(rules.contains("udp dport 14789 ip saddr != @members4"), "{rules}");
    });
}

#[test]
fn a_guest_cannot_reach_the_host_that_carries_it() {
    run(|world| async move {
        let lan = lan(world).await;
        // ARP: who has the host's underlay address? Linux answers for any address on any device.
        let ask = || {
            let who = [
                &[0, 1, 8, 0, 6, 4, 0, 1][..],
                &mac(1).0,
                &[10, 77, 0, 200],
                &[0; 6],
                &[10, 77, 0, 1],
            ];
            let header = [&BROADCAST.0[..], &mac(1).0, &[8, 6]].concat();
            lan.one.send_raw(&[0; 10], &[header, who.concat()].concat());
        };
        ask();
        lan.one.silence();
        // Control: without the filter it does answer, so the silence above means something.
        lan.world.a.shell(&["nft", "delete", "table", "bridge", "godwit"]);
        ask();
        let answer = lan.one.receive(SOON).unwrap();
        assert_eq!(answer[12..14], [8, 6]);
    });
}

#[test]
fn a_tunnel_carries_frames_both_ways_and_never_into_another() {
    run(|world| async move {
        let red = wire("red");
        let (a, mut a_out) = world.a.links(false);
        a.ensure_wire(&red, false).await.unwrap();
        let one = Guest::boot(&world.a, &a, &red, mac(1)).await;
        let (b, mut b_out) = world.b.links(true);
        b.ensure_wire(&red, false).await.unwrap();
        b.broadcast_set(&red, &[world.a.ip]).await.unwrap();
        let two = Guest::boot(&world.b, &b, &red, mac(2)).await;
        for (links, here, there) in [(&a, 1, 2), (&b, 2, 1)] {
            links.set_route(&red, &mac(here), Where::Local).await.unwrap();
            links.set_route(&red, &mac(there), Where::Tunnel).await.unwrap();
        }
        for n in 0..2000 {
            one.send(mac(2), &format!("ping {n}"));
            let out = outgoing(&mut a_out).await.unwrap();
            assert_eq!((&out.wire, out.is_group()), (&red, false));
            assert_eq!(b.inject(&out.wire, &out.frame), Injected::Yes);
            assert_eq!(two.hear(), Some(format!("ping {n}")));
        }
        two.send(mac(1), "pong");
        let out = outgoing(&mut b_out).await.unwrap();
        assert_eq!(a.inject(&red, &out.frame), Injected::Yes);
        assert_eq!(one.hear().as_deref(), Some("pong"));

        // B has both ways: what came by the tunnel reaches its guest, not the VXLAN, nor the tunnel again.
        let before = b.counters().await.unwrap().wires[0].vxlan.unwrap().tx_frames;
        b.inject(&red, &frame(BROADCAST, mac(1), "from afar"));
        assert_eq!(two.hear().as_deref(), Some("from afar"));
        nothing_leaves(&mut b_out).await;
        let counts = b.counters().await.unwrap();
        assert_eq!(counts.wires[0].vxlan.unwrap().tx_frames, before);
        assert_eq!(counts.wires[0].tunnel.in_frames, 2001);
        assert_eq!(counts.nics.len(), 1);
        assert_eq!((counts.nics[0].mac, counts.nics[0].stats.rx_frames), (mac(2), 1));
        assert_eq!(counts.nics[0].stats.tx_frames, 2001);
        assert!(matches!(
            a.set_route(&red, &mac(2), Where::Vxlan(world.b.ip)).await,
            Err(LinkError::Untrusted(_))
        ));
    });
}

#[test]
fn a_restarted_daemon_goes_on_with_what_it_finds() {
    run(|world| async move {
        let Lan { world, a, b, a_out, one, two } = lan(world).await;
        let red = wire("red");
        end((a, a_out)).await;
        one.send(mac(2), "while the daemon is away");
        assert_eq!(two.hear().as_deref(), Some("while the daemon is away"));
        two.send(mac(1), "and in");
        assert_eq!(one.hear().as_deref(), Some("and in"));

        let (a, _a_out) = world.a.links(true);
        a.ensure_wire(&red, false).await.unwrap();
        let routes = a.routes(&red).await;
        assert_eq!(routes, [(mac(1), Where::Local), (mac(2), Where::Vxlan(world.b.ip))]);
        assert!(a.has_tap(&red, &mac(1)).await.unwrap());
        assert!(matches!(a.open_tap(&red, &mac(1), &[]).await, Err(LinkError::TapBusy(_))));
        two.send(BROADCAST, "members stayed let in");
        assert_eq!(one.hear().as_deref(), Some("members stayed let in"));
        a.broadcast_set(&red, &[]).await.unwrap();
        one.send(BROADCAST, "not to B any more");
        two.silence();
        assert_eq!(world.a.devices().len(), 4);
        drop(b);
    });
}

#[test]
fn what_somebody_else_removed_is_healed() {
    run(|world| async {
        let mut lan = lan(world).await;
        let red = wire("red");
        let devices = lan.world.a.devices();
        let named = |prefix: &str| devices.iter().find(|d| d.starts_with(prefix)).unwrap();
        lan.a.set_route(&red, &mac(2), Where::Tunnel).await.unwrap();
        lan.world.a.shell(&["ip", "link", "del", named("gwx-")]);
        tokio::time::timeout(SOON, async {
            while lan.a.inject(&red, &[0; 60]) == Injected::Yes {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        lan.a.ensure_wire(&red, false).await.unwrap();
        lan.one.send(mac(2), "through the new port");
        let out = outgoing(&mut lan.a_out).await.unwrap();
        assert_eq!(text(&out.frame).as_deref(), Some("through the new port"));

        lan.world.a.shell(&["ip", "link", "del", named("gwb-")]);
        lan.a.ensure_wire(&red, false).await.unwrap();
        lan.a.set_route(&red, &mac(1), Where::Local).await.unwrap();
        lan.a.set_route(&red, &mac(2), Where::Vxlan(lan.world.b.ip)).await.unwrap();
        lan.two.send(mac(1), "on the new bridge");
        assert_eq!(lan.one.hear().as_deref(), Some("on the new bridge"));
        lan.one.send(mac(2), "from it");
        assert_eq!(lan.two.hear().as_deref(), Some("from it"));
    });
}

#[test]
fn every_frame_for_the_tunnel_arrives_or_is_counted() {
    run(|world| async {
        let mut lan = lan(world).await;
        lan.a.set_route(&wire("red"), &mac(2), Where::Tunnel).await.unwrap();
        let sent = 12_000;
        for n in 0..sent {
            lan.one.send(mac(2), &n.to_string());
        }
        let (mut received, mut last) = (0, None);
        while let Ok(out) = tokio::time::timeout(Duration::from_secs(2), lan.a_out.recv()).await {
            let Some(Outgoing::Frame(out)) = out else { panic!("{out:?}") };
            let n: u64 = text(&out.frame).unwrap().parse().unwrap();
            assert!(last < Some(n), "{n} after {last:?}");
            (received, last) = (received + 1, Some(n));
        }
        let counts = lan.a.counters().await.unwrap().wires.remove(0);
        assert_eq!(counts.tunnel.out_frames, received);
        assert!(received >= 4096 && counts.tunnel_overflow > 0, "{received} {counts:?}");
        assert_eq!(received + counts.tunnel_overflow, sent);
    });
}

#[test]
fn an_underlay_of_ipv6_works_the_same() {
    run(|world| async move {
        let red = wire("red");
        let (ip_a, ip_b) = (world.a.ip6, world.b.ip6);
        let (a, _a_out) = world.a.links_at(ip_a, "fd77::/64");
        a.ensure_wire(&red, false).await.unwrap();
        let one = Guest::boot(&world.a, &a, &red, mac(1)).await;
        let (b, b_out) = world.b.links_at(ip_b, "fd77::/64");
        b.ensure_wire(&red, false).await.unwrap();
        let two = Guest::boot(&world.b, &b, &red, mac(2)).await;
        for (links, here, there, ip) in [(&a, 1, 2, ip_b), (&b, 2, 1, ip_a)] {
            links.set_route(&red, &mac(here), Where::Local).await.unwrap();
            links.set_route(&red, &mac(there), Where::Vxlan(ip)).await.unwrap();
            links.broadcast_set(&red, &[ip]).await.unwrap();
        }
        one.send(mac(2), "nobody is a member yet");
        two.silence();
        b.set_members(&[ip_a]).await.unwrap();
        one.send(mac(2), &"x".repeat(usize::from(MTU)));
        assert_eq!(two.hear().map(|t| t.len()), Some(usize::from(MTU)));
        end((b, b_out)).await;
        let (b, b_out) = world.b.links_at(ip_b, "fd77::/64");
        b.ensure_wire(&red, false).await.unwrap();
        let (second, _out) = world.b.links_at(ip_b, "fd77::/64");
        assert!(matches!(second.ensure_wire(&red, false).await, Err(LinkError::SecondDaemon(_))));
        assert_eq!(b.routes(&red).await, [(mac(1), Where::Vxlan(ip_a)), (mac(2), Where::Local)]);
        b.broadcast_set(&red, &[]).await.unwrap();
        end((b, b_out)).await;
        // Another underlay address: the old device goes, the new one is made.
        let (b, _b_out) = world.b.links(true);
        b.ensure_wire(&red, false).await.unwrap();
        let device = world.b.devices().into_iter().find(|d| d.starts_with("gwv-")).unwrap();
        let shown = world.b.shell(&["ip", "-d", "link", "show", &device]);
        assert!(shown.contains("local 10.77.0.2"), "{shown}");
    });
}

#[test]
fn cleanup_leaves_nothing_that_no_vm_uses() {
    run(|world| async move {
        let Lan { world, a, one, .. } = lan(world).await;
        let (red, blue) = (wire("red"), wire("blue"));
        world.a.enter();
        a.ensure_wire(&blue, false).await.unwrap();
        assert_eq!(a.cleanup(&BTreeSet::from([blue.clone()])).await.unwrap(), 0);
        assert_eq!(world.a.devices().len(), 7);
        assert_eq!(a.cleanup(&BTreeSet::new()).await.unwrap(), 1);
        assert_eq!(world.a.devices().len(), 4);
        assert_eq!(a.inject(&blue, &[0; 60]), Injected::NoWire);
        // Another run of the daemon removes what this one made.
        end((one, a)).await;
        let (again, _out) = world.a.links(false);
        assert_eq!(again.cleanup(&BTreeSet::new()).await.unwrap(), 1);
        assert_eq!(world.a.devices(), [] as [String; 0]);
        assert_eq!(world.a.shell(&["nft", "list", "ruleset"]), "");
        // And it can begin anew.
        again.ensure_wire(&red, false).await.unwrap();
        assert_eq!(world.a.devices().len(), 2);
    });
}

#[test]
fn frames_longer_than_the_wire_are_dropped_and_large_segments_are_cut() {
    run(|world| async move {
        let mut lan = lan(world).await;
        let red = wire("red");
        let longest = frame(mac(1), mac(3), &"x".repeat(usize::from(MTU)));
        assert_eq!(lan.a.inject(&red, &longest), Injected::Yes);
        assert_eq!(lan.one.hear().map(|t| t.len()), Some(usize::from(MTU)));
        assert_eq!(lan.a.inject(&red, &[longest, vec![0; 5]].concat()), Injected::BadLength);
        assert_eq!(lan.a.inject(&red, &[0; 13]), Injected::BadLength);
        assert_eq!(lan.a.counters().await.unwrap().wires[0].tunnel.bad_length, 2);
        lan.one.send(mac(2), &"y".repeat(usize::from(MTU)));
        assert_eq!(lan.two.hear().map(|t| t.len()), Some(usize::from(MTU)));
        lan.one.send(mac(2), &"y".repeat(usize::from(MTU) + 5));
        lan.two.silence();

        // 8,000 bytes of TCP as virtio-net hands them over: one frame, cut and summed by nobody yet.
        lan.a.set_route(&red, &mac(2), Where::Tunnel).await.unwrap();
        let (header, large) = large_segment(8000, 1340);
        lan.one.send_raw(&header, &large);
        let mut carried = 0;
        while carried < 8000 {
            let out = outgoing(&mut lan.a_out).await.unwrap().frame;
            assert!(out.len() <= 14 + usize::from(MTU), "{} bytes", out.len());
            assert_eq!(sum(&tcp_with_pseudo(&out)), 0xffff, "finished checksum");
            carried += out.len() - 54;
        }
        assert_eq!(carried, 8000);
        nothing_leaves(&mut lan.a_out).await;
    });
}

/// A virtio-net header and a TCP frame whose segmentation and checksum are left to the kernel.
fn large_segment(payload: u16, each: u16) -> ([u8; 10], Vec<u8>) {
    let mut header = [1, 1, 54, 0, 0, 0, 34, 0, 16, 0];
    header[4..6].copy_from_slice(&each.to_le_bytes());
    let mut ip = vec![0x45, 0];
    ip.extend((40 + payload).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let ip_sum = !sum(&ip);
    ip[10..12].copy_from_slice(&ip_sum.to_be_bytes());
    let mut tcp = vec![0x04, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
    let pseudo = [&ip[12..20], &[0, 6], &(20 + payload).to_be_bytes()].concat();
    tcp[16..18].copy_from_slice(&sum(&pseudo).to_be_bytes());
    let body = (0..payload).map(|n| n as u8);
    let ethernet = [&mac(2).0[..], &mac(1).0, &[8, 0]].concat();
    (header, ethernet.into_iter().chain(ip).chain(tcp).chain(body).collect())
}

/// The TCP part of a frame behind its pseudo header: its sum is all ones if the checksum is right.
fn tcp_with_pseudo(frame: &[u8]) -> Vec<u8> {
    let tcp = &frame[34..];
    [&frame[26..34], &[0, 6], &(tcp.len() as u16).to_be_bytes(), tcp].concat()
}

fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut total: u32 = bytes.chunks(2).map(word).sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}
