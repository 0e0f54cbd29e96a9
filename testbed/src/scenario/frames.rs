//! Frames: numbered datagrams into and out of each member of a cluster, and between the members, while all of them move,
//! stay, and are aborted.
//!
//! Owns the runs. Invariant: what is lost, out of order or doubled is what the senders saw; what a guest's own sockets had
//! no room for is counted apart, by the guest. Datagrams that the WAN's full queue dropped are shown: a tunnel loses what the
//! link under it loses, and a run in which that happened does not pass.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use godwit::api::types::Migration;
use godwit_protocol::wire::migrate::Phase;
use serde_json::{Value, json};

use super::cluster::world::{CLUSTER, two_sites};
use super::faults::world::{REQUESTER, hold_dir, let_hold};
use super::roundtrip::moves::{Moving, Wish};
use super::swarm::{Guest, GuestPlan, Swarm, run};
use crate::guest::wire::UDP_SINK_PORT;
use crate::guest::{Cache, GuestControl, GuestFiles, GuestKind};
use crate::lab::prober::{ECHO_PORT, ProbeConfig, ProbeReport, Prober, Station};

/// Where the members are on each side.
const SIDES: [[(&str, &str); 2]; 2] = [[("a", "h1"), ("b", "h2")], [("a", "h4"), ("b", "h5")]];
/// Which station probes which member: one of the first site both, one beside a destination the first.
const PROBED: [(usize, usize); 3] = [(0, 0), (0, 1), (1, 0)];
/// Datagrams per second of the fast run.
const FAST: u32 = 5000;
/// How long anything may take that is not a move.
const SOON: Duration = Duration::from_secs(60);
/// How long nothing has to come back for the rest to count as lost.
const DRAIN: Duration = Duration::from_secs(10);
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
    /// Datagrams per second of each prober and each member: not more than the guests take while the machine is busy.
    pub rate: u32,
    /// Whether a move follows with many more frames a second.
    pub fast: bool,
}

/// `godwit-lab run frames`.
pub fn full() -> Result<Value> {
    frames(&Plan { labid: "frames", moves: 20, aborted: 20, rate: 500, fast: true })
}

struct World {
    swarm: Swarm,
    guests: Vec<Guest>,
    stations: Vec<Station>,
    probers: Vec<Prober>,
    /// Which of [`SIDES`].
    side: usize,
    log: Vec<Value>,
}

/// What the senders saw.
#[derive(Default)]
struct Seen {
    probers: Vec<ProbeReport>,
    talks: Vec<ProbeReport>,
}

/// Runs it.
pub fn frames(plan: &Plan) -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let swarm = Swarm::up(&two_sites(plan.labid, 80), let_hold)?;
    let mut guests = Vec::new();
    for (at, (name, host)) in SIDES[0].into_iter().enumerate() {
        let guest = swarm.start_guest(host, &files, &GuestPlan::new(name, 5 + at as u8, 192))?;
        run(async { swarm.control(host, &guest)?.churn(8, 250, false).await })?;
        guests.push(guest);
    }
    swarm.ask(REQUESTER, &["cluster", "create", CLUSTER, "--vms", "a,b"])?;
    let stations = vec![swarm.station(REQUESTER, 1)?, swarm.station("h4", 2)?];
    let mut world =
        World { swarm, guests, stations, probers: Vec::new(), side: 0, log: Vec::new() };
    let began = Instant::now();
    let seen = world.probed(plan.rate, |world| {
        (0..plan.moves).try_for_each(|_| world.moves())?;
        (0..plan.aborted).try_for_each(|n| if n % 2 == 0 { world.aborts() } else { world.stays() })
    })?;
    let fast = if plan.fast { world.fast()? } else { json!({}) };
    let guest_dropped = world.dropped()?;
    let held = world.held()?;
    let World { swarm, stations, log, .. } = world;
    let wan = swarm.lab.wan()?.stats()?;
    let in_wan = wan.forward.udp_queue_dropped + wan.backward.udp_queue_dropped;
    drop(stations);
    swarm.down()?;
    let sum =
        |of: fn(&ProbeReport) -> u64| seen.probers.iter().chain(&seen.talks).map(of).sum::<u64>();
    let apart = sum(|r| r.socket_dropped);
    let in_fast = |key: &str| fast[key].as_u64().unwrap_or(0);
    // Of each by itself: what one had no room for is not another's.
    let missed = sum(|r| r.lost.saturating_sub(r.socket_dropped));
    let lost = (missed + in_fast("lost")).saturating_sub(guest_dropped);
    let reordered = sum(|r| r.reordered) + in_fast("reordered");
    let duplicated = sum(|r| r.duplicated) + in_fast("duplicated");
    Ok(json!({
        "scenario": "frames",
        // Without a frame that was held nothing was shown.
        "passed": lost == 0 && reordered == 0 && duplicated == 0 && held > 0,
        "moves": plan.moves,
        "aborted": plan.aborted,
        "sent": sum(|r| r.sent) + in_fast("sent"),
        "lost": lost,
        "reordered": reordered,
        "duplicated": duplicated,
        "held": held,
        "dropped_by_guest_sockets": guest_dropped,
        "dropped_by_senders_sockets": apart,
        "datagrams_dropped_by_wan_queue": in_wan,
        "seconds": began.elapsed().as_secs(),
        "fast": fast,
        "probers": seen.probers,
        "members": seen.talks,
        "runs": log,
    }))
}

impl World {
    /// Does the work while the stations talk to the members, and these to each other.
    fn probed(&mut self, rate: u32, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<Seen> {
        for (station, member) in PROBED {
            let target = SocketAddr::from((self.guests[member].plan.ip(), ECHO_PORT));
            let config = ProbeConfig { target, rate_pps: rate, size: 64 };
            self.probers.push(Prober::start(Some(self.stations[station].ns()), &config)?);
        }
        for prober in &self.probers {
            ensure!(prober.wait_unique(200, SOON), "a guest does not answer on its wire");
        }
        let early = self.probers.iter().map(|p| p.snapshot().reordered).sum::<u64>();
        ensure!(early == 0, "{early} out of order before anything moved: the lab's own fault");
        let other = |at: usize| self.guests[self.guests.len() - 1 - at].plan.ip();
        for at in 0..self.guests.len() {
            let to = other(at);
            run(async { self.control(at)?.talk(to, rate).await })?;
        }
        let done = work(self);
        let seen = self.seen();
        // What went wrong first says why.
        done.and(seen)
    }

    /// Ends the talks: what was seen.
    fn seen(&mut self) -> Result<Seen> {
        let mut seen = Seen::default();
        for at in 0..self.guests.len() {
            seen.talks.push(run(async { self.control(at)?.hush().await })?);
        }
        seen.probers = self.probers.drain(..).map(|p| p.stop(DRAIN)).collect();
        println!("{}", json!([seen.probers, seen.talks]));
        Ok(seen)
    }

    fn control(&self, at: usize) -> Result<GuestControl> {
        self.swarm.control(SIDES[self.side][at].1, &self.guests[at])
    }

    /// What the guests' own sockets had no room for.
    fn dropped(&self) -> Result<u64> {
        let each = |at| Ok(run(async { self.control(at)?.stats(false).await })?.udp_dropped);
        (0..self.guests.len()).map(each).sum()
    }

    /// Frames that were held for the members, by the hosts' own count.
    fn held(&self) -> Result<u64> {
        let all = self.swarm.ask(REQUESTER, &["migrations"])?;
        Ok(all.as_array().into_iter().flatten().filter_map(|m| m["frames_held"].as_u64()).sum())
    }

    /// One move while many frames a second go into a member, which counts them and answers none.
    fn fast(&mut self) -> Result<Value> {
        let target = SocketAddr::from((self.guests[0].plan.ip(), UDP_SINK_PORT));
        let config = ProbeConfig { target, rate_pps: FAST, size: 64 };
        let prober = Prober::start(Some(self.stations[0].ns()), &config)?;
        let end = Instant::now() + SOON;
        // Nobody answers its first one, behind which the others wait for a second.
        while prober.sent() < u64::from(FAST) {
            ensure!(Instant::now() < end, "the prober does not get to its rate");
            std::thread::sleep(Duration::from_millis(10));
        }
        let done = self.moves();
        let sent = prober.stop(Duration::ZERO).sent;
        done?;
        let stats = |world: &Self| run(async { world.control(0)?.stats(false).await });
        let mut seen = stats(self)?;
        let end = Instant::now() + SOON;
        while seen.sink_unique < sent && Instant::now() < end {
            // The guest is behind; its counters are all there is to look at.
            std::thread::sleep(Duration::from_millis(200));
            seen = stats(self)?;
        }
        Ok(json!({
            "sent": sent,
            "lost": sent.saturating_sub(seen.sink_unique),
            "reordered": seen.sink_reordered,
            "duplicated": seen.sink_duplicated,
        }))
    }

    fn wish(&self) -> Wish<'static> {
        Wish { place: &SIDES[1 - self.side], ..Wish::new(REQUESTER, CLUSTER, "") }
    }

    fn note(&mut self, what: &str, m: &Migration) {
        let s = &m.status;
        let figures = json!({
            "what": what, "from": m.from_name, "to": m.to_name, "phase": s.phase, "cause": s.cause,
            "total_ms": s.total_ms, "downtime_ms": s.downtime_us.map(|us| us as f64 / 1000.0),
            "sent_by_then": self.probers.iter().map(Prober::sent).collect::<Vec<_>>(),
        });
        println!("{figures}");
        self.log.push(figures);
    }

    fn moves(&mut self) -> Result<()> {
        let m = Moving::start(&self.swarm, &self.wish())?.end()?;
        self.note("move", &m);
        ensure!(m.status.phase == Phase::Moved, "{:?}: {}", m.status.phase, m.status.cause);
        self.side = 1 - self.side;
        Ok(())
    }

    /// Given up by request, while the guests run.
    fn aborts(&mut self) -> Result<()> {
        let wish = Wish { bandwidth: SLOW, ..self.wish() };
        let moving = Moving::start(&self.swarm, &wish)?;
        let mut id = String::new();
        self.swarm.wait("pages cross", SOON, |s| {
            let all = s.ask(REQUESTER, &["migrations"])?;
            let crosses = |m: &&Value| m["phase"] == "transfer";
            let found = all.as_array().and_then(|all| all.iter().find(crosses)?["id"].as_str());
            id = found.unwrap_or_default().to_owned();
            Ok(!id.is_empty())
        })?;
        self.swarm.ask(REQUESTER, &["abort", &id])?;
        let m = moving.end()?;
        self.note("abort", &m);
        ensure!(m.status.phase == Phase::Stayed, "{:?}: {}", m.status.phase, m.status.cause);
        Ok(())
    }

    /// Decided to stay when the guests stand still: a page of one of them is altered on its way.
    fn stays(&mut self) -> Result<()> {
        let fault = hold_dir(&self.swarm, SIDES[1 - self.side][0].1)?.join("alter-page");
        fs::write(&fault, "")?;
        let ended = Moving::start(&self.swarm, &self.wish())?.end();
        fs::remove_file(&fault)?;
        let m = ended?;
        self.note("stay", &m);
        ensure!(m.status.phase == Phase::Stayed, "{:?}: {}", m.status.phase, m.status.cause);
        Ok(())
    }
}
