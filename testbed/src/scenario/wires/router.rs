//! A router that is a VM moves as a member of its cluster, with both of its wires.
//!
//! Owns the run: a router on two wires, a guest behind it, and a station in front of it that talks to that guest.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use godwit_protocol::wire::migrate::Phase;
use serde_json::{Value, json};

use super::{DRAIN, RATE, SOON};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::prober::{ECHO_PORT, ProbeConfig, ProbeReport, Prober};
use crate::scenario::roundtrip::moves::{Moving, Wish};
use crate::scenario::swarm::{Guest, GuestPlan, Swarm, WIRE, run};

/// The wire behind the router, and who is on it.
const BEHIND: &str = "dmz";
const SUBNET: &str = "10.8.0.0/24";
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 8, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 8, 0, 2);
/// The two as a cluster.
const CLUSTER: &str = "net";
/// Answers that have to come after the last move.
const ANSWERS: u64 = 100;

/// The part of `godwit-lab run wires` with a router.
pub fn router(labid: &str) -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let swarm = Swarm::up(&LabConfig::demo(labid), |_| {})?;
    let plan = |name, number| GuestPlan::new(name, number, 160);
    let two_wires = GuestPlan { more_wires: vec![BEHIND.to_owned()], ..plan("router", 5) };
    let router = swarm.start_guest("h1", &files, &two_wires)?;
    let behind = swarm.start_guest("h1", &files, &plan("inner", 6))?;
    swarm.ask("h1", &["wire", "disconnect", "inner", WIRE])?;
    swarm.ask("h1", &["wire", "connect", "inner", BEHIND])?;
    let shell = |guest: &Guest, line: &str| {
        run(async {
            swarm.control("h1", guest)?.shell(&line.replace("ip ", "/bin/busybox ip ")).await
        })
    };
    shell(&router, &format!("ip addr add {ROUTER}/24 dev eth1 && ip link set eth1 mtu 1400 up"))?;
    shell(&router, "echo 1 > /proc/sys/net/ipv4/ip_forward")?;
    shell(&behind, &format!("ip addr flush dev eth0 && ip addr add {GUEST}/24 dev eth0"))?;
    shell(&behind, &format!("ip route add default via {ROUTER}"))?;
    swarm.ask("h3", &["cluster", "create", CLUSTER, "--vms", "router,inner"])?;
    let station = swarm.station("h3", 1)?;
    station.ns().batch(&[format!("route add {SUBNET} via {}", router.plan.ip())])?;
    let target = SocketAddr::from((GUEST, ECHO_PORT));
    let prober =
        Prober::start(Some(station.ns()), &ProbeConfig { target, rate_pps: RATE, size: 64 })?;
    ensure!(prober.wait_unique(ANSWERS, SOON), "nobody gets through the router");
    for to in ["h2", "h1"] {
        let m = Moving::start(&swarm, &Wish::new("h3", CLUSTER, to))?.end()?;
        ensure!(m.status.phase == Phase::Moved, "{:?}: {}", m.status.phase, m.status.cause);
    }
    let had = prober.snapshot().unique;
    let end = Instant::now() + SOON;
    while prober.snapshot().unique < had + ANSWERS {
        ensure!(Instant::now() < end, "nobody gets through the router any more");
        std::thread::sleep(Duration::from_millis(50));
    }
    let report = prober.stop(DRAIN);
    let ProbeReport { sent, lost, reordered, duplicated, .. } = report;
    ensure!((lost, reordered, duplicated) == (0, 0, 0), "{report:?}");
    drop(station);
    swarm.down()?;
    Ok(json!({ "moves": 2, "sent": sent, "lost": lost, "reordered": reordered }))
}
