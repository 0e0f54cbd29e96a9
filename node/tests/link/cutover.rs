//! The steps of a NIC's cutover, each against the real kernel.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use godwit::link::{TapView, forwarding_settled};
use godwit_protocol::id::{CopyId, Mac};

use super::*;

/// Frames that a [`Flood`] may send before it is let on: each queue in between has room for a few times as many.
const PART: u64 = 4000;

/// A guest that sends numbered frames as fast as its tap takes them, from a thread of its own.
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    most: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    fn start(from: &Guest, to: Mac) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let most = Arc::new(AtomicU64::new(PART));
        let guest = Guest { mac: from.mac, fd: from.fd.try_clone().unwrap() };
        let (ending, count, bound) = (Arc::clone(&stop), Arc::clone(&sent), Arc::clone(&most));
        let thread = std::thread::spawn(move || {
            while !ending.load(Ordering::SeqCst) {
                if count.load(Ordering::SeqCst) < bound.load(Ordering::SeqCst) {
                    guest.send(to, &count.fetch_add(1, Ordering::SeqCst).to_string());
                }
                // The pace of sending: softirqs get their turn.
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        Self { stop, sent, most, thread: Some(thread) }
    }

    /// Lets it on, and does something until it has sent a hundred more.
    fn goes_on(&self, mut meanwhile: impl FnMut()) {
        let before = self.sent.load(Ordering::SeqCst);
        self.most.store(before + PART, Ordering::SeqCst);
        while self.sent.load(Ordering::SeqCst) < before + 100 {
            meanwhile();
        }
    }

    /// How many it has sent, all in all.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
        self.sent.load(Ordering::SeqCst)
    }
}

fn number(frame: &[u8]) -> Option<u64> {
    text(frame)?.parse().ok()
}

/// All numbers that wait in the guest's tap.
fn waiting(guest: &Guest) -> Vec<u64> {
    let all = std::iter::from_fn(|| guest.receive(Duration::ZERO));
    all.filter_map(|frame| number(&frame)).collect()
}

#[test]
fn a_guest_gets_each_frame_once_and_in_order_through_hold_plug_and_tail() {
    run(|world| async move {
        let lan = lan(world).await;
        let red = wire("red");
        let moving = mac(77);
        let one = Guest::boot(&lan.world.a, &lan.a, &red, moving).await;
        lan.a.set_route(&red, &moving, Where::Local).await.unwrap();
        let near = Guest::boot(&lan.world.a, &lan.a, &red, mac(3)).await;
        let flood = Flood::start(&near, moving);
        flood.goes_on(std::thread::yield_now);
        lan.world.a.enter();
        let hold = lan.a.open_hold(&red, &moving).await.unwrap();
        lan.a.set_route(&red, &moving, Where::Hold).await.unwrap();
        forwarding_settled().await;
        flood.goes_on(std::thread::yield_now);
        let view = TapView::new(one.fd.try_clone().unwrap());
        assert!(!view.is_empty());
        let mut old = waiting(&one);
        assert!(view.is_empty());
        let mut held = Vec::new();
        hold.drain(|frame| held.push(frame)).unwrap();
        assert!(!old.is_empty() && waiting(&one).is_empty());

        let there = Guest::boot(&lan.world.b, &lan.b, &red, moving).await;
        lan.b.plug(&red, &moving).await.unwrap();
        lan.b.set_route(&red, &moving, Where::Local).await.unwrap();
        lan.a.set_route(&red, &moving, Where::Vxlan(lan.world.b.ip)).await.unwrap();
        forwarding_settled().await;
        flood.goes_on(std::thread::yield_now);
        hold.drain(|frame| held.push(frame)).unwrap();
        lan.world.b.enter();
        let view = TapView::new(there.fd.try_clone().unwrap());
        let mut past = lan.b.injector(&red, &moving, view).await.unwrap();
        assert_eq!(waiting(&there), [] as [u64; 0], "fresh frames wait behind the plug");
        assert!(!held.is_empty() && held.iter().all(|frame| past.send(frame)));
        old.extend(waiting(&there));
        let last = held.iter().filter_map(|f| number(f)).next_back();
        assert_eq!(old.last().copied(), last);
        lan.b.unplug(&red, &moving, None).await.unwrap();
        lan.b.unplug(&red, &moving, None).await.unwrap();
        flood.goes_on(std::thread::yield_now);
        let sent = flood.end();
        while old.last() != Some(&(sent - 1)) {
            old.push(there.hear().expect("the rest").parse().unwrap());
        }
        assert_eq!(old, (0..sent).collect::<Vec<_>>());
        // A tap that never was plugged, and a hold device that is gone, are no error.
        lan.a.unplug(&red, &moving, None).await.unwrap();
        drop(hold);
        lan.a.set_route(&red, &moving, Where::Local).await.unwrap();
        assert!(lan.a.set_route(&red, &moving, Where::Hold).await.is_err());
    });
}

/// More than a tap's queue holds, for a guest that reads slowly.
#[test]
fn what_was_held_goes_into_the_tap_as_fast_as_the_guest_reads() {
    const ALL: u64 = 50_000;
    run(|world| async move {
        let lan = lan(world).await;
        let red = wire("red");
        let slow = Guest::boot(&lan.world.a, &lan.a, &red, mac(79)).await;
        lan.a.plug(&red, &mac(79)).await.unwrap();
        lan.world.a.enter();
        let view = TapView::new(slow.fd.try_clone().unwrap());
        let mut past = lan.a.injector(&red, &mac(79), view).await.unwrap();
        let held: Vec<_> = (0..ALL).map(|n| frame(mac(79), mac(3), &n.to_string())).collect();
        // Nobody reads: what the kernel refuses is counted.
        let lost = past.send_all(&held, tokio::time::Instant::now()).await;
        assert!(lost > 0);
        assert_eq!(lost + waiting(&slow).len(), held.len());

        let reader = std::thread::spawn(move || {
            let mut came = Vec::new();
            while came.last() != Some(&(ALL - 1)) {
                came.push(slow.hear()?.parse().ok()?);
            }
            Some(came)
        });
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        assert_eq!(past.send_all(&held, deadline).await, 0);
        let came = tokio::task::spawn_blocking(|| reader.join().unwrap()).await.unwrap();
        assert_eq!(came, Some((0..ALL).collect::<Vec<u64>>()));
    });
}

/// More than a tap's queue holds waits in the kernel, for a guest that reads slowly, and for one that takes long; then more
/// than may wait there.
#[test]
fn what_waited_behind_a_plug_goes_into_the_tap_as_fast_as_the_guest_reads() {
    run(|world| async move {
        let lan = lan(world).await;
        let red = wire("red");
        let slow = Guest::boot(&lan.world.a, &lan.a, &red, mac(81)).await;
        lan.a.set_route(&red, &mac(81), Where::Local).await.unwrap();
        let rounds = [(30_000, 0, 0, true), (75_000, 400, 50, true), (30_000, 1300, 0, false)];
        for (count, pad, pause_ms, fits) in rounds {
            let before = lan.a.plug(&red, &mac(81)).await.unwrap();
            assert_eq!(before, 0, "only the last has dropped any");
            for n in 0..count {
                lan.one.send(mac(81), &format!("{n:05}{}", "x".repeat(pad)));
            }
            let view = TapView::new(slow.fd.try_clone().unwrap());
            let guest = Guest { mac: slow.mac, fd: slow.fd.try_clone().unwrap() };
            let all = Arc::new(AtomicU64::new(u64::MAX));
            let (expected, end) = (Arc::clone(&all), Instant::now() + 2 * SOON);
            let reader = std::thread::spawn(move || {
                let mut came: Vec<usize> = Vec::new();
                loop {
                    let rests = || {
                        // Slower than one that waits for frames.
                        std::thread::sleep(Duration::from_millis(pause_ms));
                        guest.receive(Duration::from_millis(150))
                    };
                    let Some(frame) = guest.receive(Duration::ZERO).or_else(rests) else {
                        let whole = came.len() as u64 >= expected.load(Ordering::SeqCst);
                        if whole || Instant::now() > end {
                            return came;
                        }
                        continue;
                    };
                    came.extend(text(&frame).and_then(|text| text.get(..5)?.parse::<usize>().ok()));
                    if came.len().is_multiple_of(300) {
                        // Slower than the kernel.
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
            });
            let dropped = lan.a.unplug(&red, &mac(81), Some(view)).await.unwrap();
            all.store(count as u64 - dropped, Ordering::SeqCst);
            let came = tokio::task::spawn_blocking(|| reader.join().unwrap()).await.unwrap();
            assert_eq!(dropped == 0, fits, "{dropped} dropped");
            assert_eq!(came, (0..count - dropped as usize).collect::<Vec<_>>());
        }
    });
}

#[test]
fn what_a_guest_left_in_its_tap_is_taken_as_plain_frames() {
    run(|world| async move {
        let lan = lan(world).await;
        let red = wire("red");
        let slow = Guest::boot(&lan.world.a, &lan.a, &red, mac(78)).await;
        lan.a.set_route(&red, &mac(78), Where::Local).await.unwrap();
        lan.one.send(mac(78), "first");
        lan.one.send(mac(78), "second");
        let view = TapView::new(slow.fd.try_clone().unwrap());
        let mut rest = Vec::new();
        assert_eq!(view.take_rest(|frame| rest.extend(text(&frame))), 0);
        assert_eq!(rest, ["first", "second"]);
        slow.silence();
        // As QEMU opens it: checksums and large segments of local guests are left to whoever takes them.
        // SAFETY: TUNSETOFFLOAD takes a number.
        assert_eq!(unsafe { libc::ioctl(slow.fd.as_raw_fd(), 0x4004_54d0, 3) }, 0);
        let (mut header, mut short) = large_segment(100, 100);
        (header[1], header[4], header[5]) = (0, 0, 0);
        short[..6].copy_from_slice(&mac(78).0);
        lan.one.send_raw(&header, &short);
        let (header, mut large) = large_segment(8000, 1340);
        large[..6].copy_from_slice(&mac(78).0);
        lan.one.send_raw(&header, &large);
        let mut frames = Vec::new();
        assert_eq!(view.take_rest(|frame| frames.push(frame)), 1);
        assert_eq!(frames.len(), 1);
        assert_eq!(sum(&tcp_with_pseudo(&frames[0])), 0xffff, "finished checksum");
    });
}

#[test]
fn broadcasts_go_where_the_guests_frames_go() {
    run(|world| async move {
        let lan = lan(world).await;
        let red = wire("red");
        lan.world.a.enter();
        let hold = lan.a.open_hold(&red, &mac(1)).await.unwrap();
        lan.a.set_route(&red, &mac(1), Where::Hold).await.unwrap();
        lan.two.send(BROADCAST, "while it moves");
        let mut held = Vec::new();
        let end = Instant::now() + SOON;
        while held.is_empty() && Instant::now() < end {
            hold.drain(|frame| held.extend(text(&frame))).unwrap();
            std::thread::yield_now();
        }
        assert_eq!(held, ["while it moves"]);
        lan.one.silence();
        lan.a.set_route(&red, &mac(1), Where::Local).await.unwrap();
        lan.two.send(BROADCAST, "and after");
        assert_eq!(lan.one.hear().as_deref(), Some("and after"));
        hold.drain(|frame| panic!("{frame:02x?}")).unwrap();
    });
}

/// Each goes one way, and those that were led aside come past the plug.
#[test]
fn broadcasts_are_led_aside_and_back_and_none_goes_both_ways() {
    run(|world| async move {
        let lan = lan(world).await;
        let (red, moving) = (wire("red"), mac(77));
        let one = Guest::boot(&lan.world.a, &lan.a, &red, moving).await;
        lan.a.set_route(&red, &moving, Where::Local).await.unwrap();
        let near = Guest::boot(&lan.world.a, &lan.a, &red, mac(3)).await;
        lan.world.a.enter();
        let aside = lan.a.open_aside(&red, &moving, CopyId([1; 16])).await.unwrap();
        let hold = lan.a.open_hold(&red, &moving).await.unwrap();
        let view = TapView::new(one.fd.try_clone().unwrap());
        let mut past = lan.a.injector(&red, &moving, view).await.unwrap();
        let flood = Flood::start(&near, BROADCAST);
        let mut came = Vec::new();
        for to in [&aside, &hold].repeat(10) {
            flood.goes_on(std::thread::yield_now);
            lan.a.lead_aside(&red, &moving, to).await.unwrap();
            lan.a.set_route(&red, &moving, Where::Hold).await.unwrap();
            forwarding_settled().await;
            came.extend(waiting(&one));
            assert_eq!(waiting(&one), [] as [u64; 0], "they are led aside");
            lan.a.plug(&red, &moving).await.unwrap();
            lan.a.set_route(&red, &moving, Where::Local).await.unwrap();
            lan.a.lead_back(&red, &moving).await.unwrap();
            forwarding_settled().await;
            let mut held = Vec::new();
            to.drain(|frame| held.push(frame)).unwrap();
            assert!(!held.is_empty() && held.iter().all(|frame| past.send(frame)));
            lan.a.unplug(&red, &moving, None).await.unwrap();
        }
        let sent = flood.end();
        while came.last() != Some(&(sent - 1)) {
            came.push(one.hear().expect("the rest").parse().unwrap());
        }
        assert_eq!(came, (0..sent).collect::<Vec<_>>());
        drop((aside, hold));
        lan.a.lead_back(&red, &moving).await.unwrap();
    });
}

/// What a kernel sender's marker relies on: after the flip and a grace period, whatever it sends by its
/// own socket arrives behind all that went by VXLAN.
#[test]
fn a_datagram_after_the_flip_never_overtakes_frames_of_the_kernel() {
    run(|world| async move {
        let lan = lan(world).await;
        let red = wire("red");
        lan.world.a.enter();
        let hold = lan.a.open_hold(&red, &mac(1)).await.unwrap();
        lan.a.set_route(&red, &mac(1), Where::Hold).await.unwrap();
        lan.world.a.enter();
        let inbox = std::net::UdpSocket::bind((lan.world.a.ip, 7702)).unwrap();
        lan.world.b.enter();
        let marker = std::net::UdpSocket::bind((lan.world.b.ip, 7702)).unwrap();
        let flood = Flood::start(&lan.two, mac(1));
        let (mut came, mut overtaken) = (0, 0);
        for _ in 0..50 {
            flood.goes_on(|| hold.drain(|_| came += 1).unwrap());
            lan.b.set_route(&red, &mac(1), Where::None).await.unwrap();
            forwarding_settled().await;
            marker.send_to(b"flipped", (lan.world.a.ip, 7702)).unwrap();
            inbox.recv(&mut [0; 16]).unwrap();
            hold.drain(|_| came += 1).unwrap();
            // Long enough for whatever was still queued in the kernel.
            std::thread::sleep(Duration::from_millis(5));
            hold.drain(|_| overtaken += 1).unwrap();
            lan.b.set_route(&red, &mac(1), Where::Vxlan(lan.world.a.ip)).await.unwrap();
        }
        flood.end();
        println!("{came} frames in front of 50 markers, {overtaken} behind");
        // The last one of a round may be on its way yet.
        assert!(came >= 50 * 99 && overtaken == 0, "{came} in front, {overtaken} behind");
    });
}

#[test]
fn a_fence_comes_behind_what_was_in_the_tunnel_port() {
    run(|world| async move {
        let mut lan = lan(world).await;
        let red = wire("red");
        lan.a.set_route(&red, &mac(2), Where::Tunnel).await.unwrap();
        for round in 0..200 {
            for n in 0..3 {
                lan.one.send(mac(2), &format!("{round} {n}"));
            }
            let told = lan.a.fence(&red);
            for n in 0..3 {
                let out = outgoing(&mut lan.a_out).await.unwrap();
                assert_eq!(text(&out.frame), Some(format!("{round} {n}")));
            }
            let fence = tokio::time::timeout(SOON, lan.a_out.recv()).await;
            let Ok(Some(Outgoing::Fence(tell))) = fence else { panic!("{fence:?}") };
            tell.send(()).unwrap();
            told.await.unwrap();
        }
        assert!(lan.a.fence(&wire("blue")).await.is_err());
    });
}
