//! Wires: a NIC is filtered, disconnected and connected while its guest runs, moves, and its daemon restarts.
//!
//! Owns the run. Invariant: what the filter denies is sent all the time, also across moves, and the guest counts what
//! reached it: not one may, until the filter is taken away.

mod ended;
mod rewired;
mod router;
mod sealed;
mod uplink;

pub use ended::ended;
pub use router::router;
pub use sealed::sealed;
pub use uplink::uplink;

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use godwit_protocol::wire::migrate::Phase;
use serde_json::{Value, json};

use super::roundtrip::moves::{Moving, Wish};
use super::swarm::{Guest, GuestPlan, Swarm, WIRE, run};
use crate::guest::wire::UDP_SINK_PORT;
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::prober::{ECHO_PORT, ProbeConfig, ProbeReport, Prober, Station};

/// Datagrams per second.
const RATE: u32 = 200;
/// How long anything may take that is not a move.
const SOON: Duration = Duration::from_secs(60);
/// How long nothing has to come for a guest to count as cut off: a prober sends one datagram, and after a second without
/// an answer the others.
const QUIET: Duration = Duration::from_millis(1_800);
/// How long nothing has to come back for the rest to count as lost.
const DRAIN: Duration = Duration::from_secs(10);

struct World {
    swarm: Swarm,
    guest: Guest,
    station: Station,
    host: &'static str,
}

/// `godwit-lab run wires`.
pub fn full() -> Result<Value> {
    let mut report = wires("wires")?;
    report["trusted_lan"] = sealed("wires")?;
    report["uplink"] = uplink("wires")?;
    report["router"] = router("wires")?;
    report["ended"] = ended("wires")?;
    Ok(report)
}

/// The part between two sites that trust nobody.
pub fn wires(labid: &str) -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let swarm = Swarm::up(&LabConfig::demo(labid), |_| {})?;
    let guest = swarm.start_guest("h1", &files, &GuestPlan::new("web", 5, 192))?;
    let station = swarm.station("h3", 1)?;
    let mut world = World { swarm, guest, station, host: "h1" };
    world.ask(&[
        "wire",
        "filter",
        "web",
        "allow udp 7010 from 192.0.2.0/24",
        &format!("deny udp {UDP_SINK_PORT}"),
    ])?;
    let denied = world.prober(UDP_SINK_PORT)?;
    let talk = world.prober(ECHO_PORT)?;
    ensure!(talk.wait_unique(50, SOON), "what the filter allows does not get through");
    world.moves("h2")?;
    world.moves("h1")?;
    let talk = talk.stop(DRAIN);
    ensure!((talk.lost, talk.reordered) == (0, 0), "what is allowed was lost: {talk:?}");
    world.restarts()?;
    world.disconnects()?;
    ensure!(world.sunk()? == 0, "what was denied got through before it was off");
    world.switched_off()?;
    let denied = denied.stop(QUIET);
    let reached = world.sunk()?;
    ensure!(
        denied.sent > 100 && reached == 0,
        "{reached} of {} were denied and got through",
        denied.sent
    );
    world.ask(&["wire", "filter", "web"])?;
    let freed = world.prober(UDP_SINK_PORT)?;
    let end = Instant::now() + SOON;
    while world.sunk()? == 0 {
        ensure!(Instant::now() < end, "without a filter nothing gets through");
        sleep(Duration::from_millis(100));
    }
    drop(freed);
    let on_the_way = world.on_the_way()?;
    let World { swarm, station, .. } = world;
    drop(station);
    swarm.down()?;
    Ok(json!({
        "scenario": "wires",
        "passed": true,
        "moves": 6,
        "denied_sent": denied.sent,
        "denied_reached": reached,
        "denied_on_the_way": on_the_way,
        "allowed_sent": talk.sent,
        "allowed_lost": talk.lost,
    }))
}

impl World {
    /// Asked of a host that never has the guest.
    fn ask(&self, args: &[&str]) -> Result<Value> {
        self.swarm.ask("h3", args)
    }

    fn prober(&self, port: u16) -> Result<Prober> {
        let target = SocketAddr::from((self.guest.plan.ip(), port));
        Prober::start(Some(self.station.ns()), &ProbeConfig { target, rate_pps: RATE, size: 64 })
    }

    /// Datagrams that came to the port which the filter denies.
    fn sunk(&self) -> Result<u64> {
        let stats = run(async { self.swarm.control(self.host, &self.guest)?.stats(false).await })?;
        Ok(stats.sink_unique)
    }

    fn moves(&mut self, to: &'static str) -> Result<()> {
        let moving = Moving::start(&self.swarm, &Wish::new("h3", "web", to))?;
        self.arrives(moving, to)
    }

    fn arrives(&mut self, moving: Moving, to: &'static str) -> Result<()> {
        let m = moving.end()?;
        ensure!(m.status.phase == Phase::Moved, "{:?}: {}", m.status.phase, m.status.cause);
        self.host = to;
        // Where it was asked for it may be over before the last word is said where the guest runs.
        self.swarm.wait("the move is over there, too", SOON, |swarm| {
            let moves = swarm.ask(to, &["migrations"])?;
            let over = |m: &Value| m["phase"] == "moved" || m["phase"] == "stayed";
            Ok(moves.as_array().is_some_and(|all| all.iter().all(over)))
        })
    }

    /// The daemon goes and comes; guest and filter stay.
    fn restarts(&mut self) -> Result<()> {
        let node = self.swarm.node_mut(self.host)?;
        node.restart(SOON)?;
        let host = self.host;
        self.swarm.wait("the restarted host is known again", SOON, |s| {
            let hosts = s.ask("h3", &["hosts"])?;
            let alive = |h: &Value| h["name"] == host && h["state"] == "alive";
            Ok(hosts.as_array().is_some_and(|all| all.iter().any(alive)))
        })
    }

    /// Off the wire nobody reaches the guest; back on it everybody does, on the other host, too.
    fn disconnects(&mut self) -> Result<()> {
        self.ask(&["wire", "disconnect", "web", WIRE])?;
        let cut = self.heard(QUIET)?;
        ensure!(cut.unique == 0, "{} answers of a guest that is on no wire", cut.unique);
        self.moves("h2")?;
        let cut = self.heard(QUIET)?;
        ensure!(cut.unique == 0, "{} answers of a guest that moved on no wire", cut.unique);
        self.ask(&["wire", "connect", "web", WIRE])?;
        let talk = self.prober(ECHO_PORT)?;
        ensure!(talk.wait_unique(20, SOON), "a NIC that was connected again is not reached");
        drop(talk);
        self.moves("h1")
    }

    /// What the guest answers in some time.
    fn heard(&self, time: Duration) -> Result<ProbeReport> {
        let talk = self.prober(ECHO_PORT)?;
        sleep(time);
        Ok(talk.stop(QUIET))
    }
}
