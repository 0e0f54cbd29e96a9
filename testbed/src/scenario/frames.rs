//! Frames: numbered datagrams into and out of a guest from two sites, while it moves, stays, and is aborted.
//!
//! Owns the runs. Invariant: what is lost, out of order or doubled is what the probers outside saw; what the guest's own
//! sockets had no room for is counted apart, by the guest, and so are datagrams that the WAN's full queue dropped: a
//! tunnel loses what the link under it loses.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit::api::types::Migration;
use godwit_protocol::wire::migrate::Phase;
use serde_json::{Value, json};

use super::faults::world::{hold_dir, let_hold};
use super::roundtrip::moves::{Moving, Wish};
use super::swarm::{Guest, GuestPlan, Swarm, run};
use crate::guest::wire::{Stats, UDP_SINK_PORT};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::prober::{ECHO_PORT, ProbeConfig, ProbeReport, Prober, Station};

/// Datagrams per second of each prober, and of the one of the fast run.
const PROBES: u32 = 500;
const FAST: u32 = 5000;
/// How long anything may take that is not a move.
const SOON: Duration = Duration::from_secs(60);
/// How long what is under way may take at the end.
const DRAIN: Duration = Duration::from_secs(3);
/// Bytes per second of a move that is aborted before the stop.
const SLOW: u64 = 1_000_000;

/// How much of it.
pub struct Plan {
    /// Id of the lab.
    pub labid: &'static str,
    /// Moves there and back.
    pub moves: u32,
    /// Moves that end where they began: every other one after the guest was stopped.
    pub aborted: u32,
    /// Whether a move follows with many more frames a second.
    pub fast: bool,
}

/// `godwit-lab run frames`.
pub fn full() -> Result<Value> {
    frames(&Plan { labid: "frames", moves: 20, aborted: 20, fast: true })
}

struct World {
    swarm: Swarm,
    guest: Guest,
    stations: Vec<Station>,
    probers: Vec<Prober>,
    host: &'static str,
    log: Vec<Value>,
}

/// Runs it.
pub fn frames(plan: &Plan) -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let swarm = Swarm::up(&LabConfig::demo(plan.labid), let_hold)?;
    let guest = swarm.start_guest("h1", &files, &GuestPlan::new("web", 5, 192))?;
    run(async { swarm.control("h1", &guest)?.churn(8, 250, false).await })?;
    let stations = vec![swarm.station("h3", 1)?, swarm.station("h2", 2)?];
    let mut world =
        World { swarm, guest, stations, probers: Vec::new(), host: "h1", log: Vec::new() };
    let began = Instant::now();
    let reports = world.probed(&[0, 1], PROBES, |world| {
        (0..plan.moves).try_for_each(|_| world.moves())?;
        (0..plan.aborted).try_for_each(|n| if n % 2 == 0 { world.aborts() } else { world.stays() })
    })?;
    let fast = if plan.fast { world.fast()? } else { json!({}) };
    let guest_dropped = world.stats()?.udp_dropped;
    let World { swarm, stations, log, .. } = world;
    let wan = swarm.lab.wan()?.stats()?;
    let in_wan = wan.forward.udp_queue_dropped + wan.backward.udp_queue_dropped;
    drop(stations);
    swarm.down()?;
    let sum = |of: fn(&ProbeReport) -> u64| reports.iter().map(of).sum::<u64>();
    let apart = guest_dropped + sum(|r| r.socket_dropped);
    let in_fast = |key: &str| fast[key].as_u64().unwrap_or(0);
    let lost = (sum(|r| r.lost) + in_fast("lost")).saturating_sub(apart);
    let reordered = sum(|r| r.reordered) + in_fast("reordered");
    let duplicated = sum(|r| r.duplicated) + in_fast("duplicated");
    Ok(json!({
        "scenario": "frames",
        "passed": lost <= in_wan && reordered == 0 && duplicated == 0,
        "moves": plan.moves,
        "aborted": plan.aborted,
        "sent": sum(|r| r.sent) + in_fast("sent"),
        "lost": lost,
        "reordered": reordered,
        "duplicated": duplicated,
        "dropped_by_guest_sockets": guest_dropped,
        "dropped_by_prober_sockets": apart - guest_dropped,
        "datagrams_dropped_by_wan_queue": in_wan,
        "seconds": began.elapsed().as_secs(),
        "fast": fast,
        "probers": reports,
        "runs": log,
    }))
}

impl World {
    /// Does the work while probers talk to the guest from these stations.
    fn probed(
        &mut self,
        from: &[usize],
        rate_pps: u32,
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<Vec<ProbeReport>> {
        let target = SocketAddr::from((self.guest.plan.ip(), ECHO_PORT));
        let config = ProbeConfig { target, rate_pps, size: 64 };
        let station = |at: &usize| self.stations.get(*at).context("no such station");
        let start = |at| Prober::start(Some(station(at)?.ns()), &config);
        self.probers = from.iter().map(start).collect::<Result<Vec<_>>>()?;
        for prober in &self.probers {
            ensure!(prober.wait_unique(200, SOON), "the guest does not answer on its wire");
        }
        let early = self.probers.iter().map(|p| p.snapshot().reordered).sum::<u64>();
        ensure!(early == 0, "{early} out of order before anything moved: the lab's own fault");
        let done = work(self);
        let reports: Vec<ProbeReport> = self.probers.drain(..).map(|p| p.stop(DRAIN)).collect();
        println!("{}", json!(reports));
        done.map(|()| reports)
    }

    fn stats(&self) -> Result<Stats> {
        run(async { self.swarm.control(self.host, &self.guest)?.stats(false).await })
    }

    /// One move while many frames a second go into the guest, which counts them and answers none.
    fn fast(&mut self) -> Result<Value> {
        let target = SocketAddr::from((self.guest.plan.ip(), UDP_SINK_PORT));
        let config = ProbeConfig { target, rate_pps: FAST, size: 64 };
        let station = self.stations.first().context("no station")?;
        let prober = Prober::start(Some(station.ns()), &config)?;
        let end = Instant::now() + SOON;
        // Nobody answers its first one, behind which the others wait for a second.
        while prober.sent() < u64::from(FAST) {
            ensure!(Instant::now() < end, "the prober does not get to its rate");
            std::thread::sleep(Duration::from_millis(10));
        }
        let done = self.moves();
        let sent = prober.stop(Duration::ZERO).sent;
        done?;
        let mut seen = self.stats()?;
        let end = Instant::now() + SOON;
        while seen.sink_unique < sent && Instant::now() < end {
            // The guest is behind; its counters are all there is to look at.
            std::thread::sleep(Duration::from_millis(200));
            seen = self.stats()?;
        }
        Ok(json!({
            "sent": sent,
            "lost": sent.saturating_sub(seen.sink_unique),
            "reordered": seen.sink_reordered,
            "duplicated": seen.sink_duplicated,
        }))
    }

    fn far(&self) -> &'static str {
        if self.host == "h1" { "h2" } else { "h1" }
    }

    fn note(&mut self, what: &str, m: &Migration) {
        let s = &m.status;
        let figures = json!({
            "what": what, "from": m.from_name, "to": m.to_name, "phase": s.phase, "cause": s.cause,
            "total_ms": s.total_ms, "downtime_ms": s.downtime_us.map(|us| us as f64 / 1000.0),
            "sent_by_then": self.probers.iter().map(Prober::sent).collect::<Vec<_>>(),
            "held": s.frames_held, "dropped": s.frames_dropped,
        });
        println!("{figures}");
        self.log.push(figures);
    }

    fn moves(&mut self) -> Result<()> {
        let far = self.far();
        let m = Moving::start(&self.swarm, &Wish::new("h3", "web", far))?.end()?;
        self.note("move", &m);
        ensure!(m.status.phase == Phase::Moved, "{:?}: {}", m.status.phase, m.status.cause);
        self.host = far;
        Ok(())
    }

    /// Given up by request, while the guest runs.
    fn aborts(&mut self) -> Result<()> {
        let wish = Wish { bandwidth: SLOW, ..Wish::new("h3", "web", self.far()) };
        let moving = Moving::start(&self.swarm, &wish)?;
        let mut id = String::new();
        self.swarm.wait("pages cross", SOON, |s| {
            let all = s.ask("h3", &["migrations"])?;
            let crosses = |m: &&Value| m["phase"] == "transfer";
            let found = all.as_array().and_then(|all| all.iter().find(crosses)?["id"].as_str());
            id = found.unwrap_or_default().to_owned();
            Ok(!id.is_empty())
        })?;
        self.swarm.ask("h3", &["abort", &id])?;
        let m = moving.end()?;
        self.note("abort", &m);
        ensure!(m.status.phase == Phase::Stayed, "{:?}: {}", m.status.phase, m.status.cause);
        Ok(())
    }

    /// Decided to stay when the guest stands still: a page is altered on its way.
    fn stays(&mut self) -> Result<()> {
        let far = self.far();
        let fault = hold_dir(&self.swarm, far)?.join("alter-page");
        fs::write(&fault, "")?;
        let ended = Moving::start(&self.swarm, &Wish::new("h3", "web", far))?.end();
        fs::remove_file(&fault)?;
        let m = ended?;
        self.note("stay", &m);
        ensure!(m.status.phase == Phase::Stayed, "{:?}: {}", m.status.phase, m.status.cause);
        Ok(())
    }
}
