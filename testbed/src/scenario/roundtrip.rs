//! A guest goes there and back again while somebody talks to it, and what may go wrong on the way without harm.
//!
//! Owns the steps. Double runs are judged by the events of every QEMU, sessions and losses from outside.

pub(super) mod moves;
mod session;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit::api::types::Migration;
use godwit_protocol::wire::migrate::Phase;
use serde_json::{Value, json};

use super::steps::Steps;
use super::swarm::{Guest, GuestPlan, Swarm, run};
use crate::guest::disk::SpecDisk;
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::cleanup::run_dir;
use crate::lab::node::Node;
use crate::lab::prober::{ProbeConfig, Prober};
use crate::lab::qemus::{QemuWatch, double_runs};
use moves::{Moving, Wish};
use session::Session;

/// Id of the lab.
const LAB: &str = "round";
/// How long anything may take that is not a move.
const SOON: Duration = Duration::from_secs(60);
/// How long the WAN is cut.
const CUT: Duration = Duration::from_secs(5);
/// Measurements of the round trip of control messages, before and during.
const RTTS: usize = 20;

struct World {
    swarm: Swarm,
    web: Guest,
    db: Guest,
}

/// Three nodes whose QEMUs are watched. They keep nothing of a move: the next one would be so short
/// that neither a deadline nor a cut could strike within it.
fn watched_swarm() -> Result<(Swarm, QemuWatch)> {
    let mut qemus = None;
    let swarm = Swarm::up(&LabConfig::demo(LAB), |node| {
        let watch = qemus.get_or_insert_with(|| QemuWatch::start(&run_dir(LAB).join("qemus")));
        if let Ok(watch) = watch {
            node.arg("--qemu").arg(&watch.program().display().to_string());
        }
        node.arg("--keep-bytes").arg("0");
    })?;
    Ok((swarm, qemus.context("a lab without hosts")??))
}

/// Runs it.
pub fn roundtrip() -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let (swarm, qemus) = watched_swarm()?;
    let disk = swarm.lab.dir().join("shared.img");
    std::fs::File::create(&disk)?.set_len(16 << 20)?;
    let plan = GuestPlan { disks: vec![SpecDisk::shared(disk)], ..GuestPlan::new("web", 5, 256) };
    let web = swarm.start_guest("h1", &files, &plan)?;
    let db = swarm.start_guest("h2", &files, &GuestPlan::new("db", 6, 192))?;
    run(async { swarm.control("h1", &web)?.churn(16, 250, false).await })?;
    let station = swarm.station("h3", 1)?;
    let target = SocketAddr::from((plan.ip(), 7007));
    let probe = ProbeConfig { target, rate_pps: 100, size: 64 };
    let prober = Prober::start(Some(station.ns()), &probe)?;
    ensure!(prober.wait_unique(100, SOON), "the guest does not answer on its wire");
    let session = Session::start(station.ns(), SocketAddr::from((plan.ip(), 7008)))?;
    let mut world = World { swarm, web, db };
    let mut steps = Steps::default();
    let mut step = |name: &str, world: &mut World, work: fn(&mut World) -> Result<Value>| {
        steps.step(name, || {
            let lines = session.lines();
            world.swarm.nodes().iter().try_for_each(Node::forget_kept)?;
            let figures = work(world)?;
            let more = || Ok(session.lines() > lines + 5);
            world.swarm.wait("the TCP session goes on", SOON, |_| more()).map(|()| figures)
        });
    };
    step("asked on the third host", &mut world, third_host);
    step("to a site, shown by the command line", &mut world, to_site);
    step("to any host", &mut world, to_auto);
    step("two at once in opposite directions", &mut world, opposite);
    step("abort, then again", &mut world, abort);
    step("deadline", &mut world, deadline);
    step("timeline of both ends", &mut world, timeline);
    step("a daemon is killed and starts again", &mut world, killed);
    step("the WAN is cut during the transfer", &mut world, cut);
    step("control latency under a saturating move", &mut world, latency);
    let probe = prober.stop(Duration::from_secs(2));
    let talked = session.end();
    let double = double_runs(&qemus.seen());
    drop(station);
    world.swarm.down()?;
    let passed = steps.passed() && double.is_empty() && talked.is_ok();
    let (tcp_lines, tcp_longest) = talked.as_ref().map_or((0, None), |(n, d)| (*n, Some(*d)));
    Ok(json!({
        "scenario": "roundtrip",
        "passed": passed,
        "steps": steps.report(),
        "double_runs": double,
        "tcp": {
            "lines": tcp_lines,
            "longest_ms": tcp_longest.map(|d| d.as_millis() as u64),
            "broken": talked.err().map(|e| format!("{e:#}")),
        },
        "udp": {"sent": probe.sent, "lost": probe.lost, "reordered": probe.reordered,
            "duplicated": probe.duplicated, "longest_gap_ms": probe.longest_gap_ms},
    }))
}

impl World {
    fn host_of(&self, vm: &str) -> Result<String> {
        let info = self.swarm.ask("h3", &["vm", "show", vm])?;
        Ok(info["host"].as_str().context("no host")?.to_owned())
    }

    fn verify(&self, guest: &Guest) -> Result<u64> {
        let host = self.host_of(&guest.name)?;
        let seen = run(async { self.swarm.control(&host, guest)?.verify().await })?;
        ensure!(
            seen.pages_corrupt == 0,
            "{} pages of {} are corrupt",
            seen.pages_corrupt,
            guest.name
        );
        Ok(seen.pages_verified)
    }

    /// Moves and checks: it ended as *moved*, one epoch later, and the memory is right.
    fn moved(&self, wish: &Wish<'_>) -> Result<Migration> {
        self.check_moved(Moving::start(&self.swarm, wish)?.end()?)
    }

    fn check_moved(&self, m: Migration) -> Result<Migration> {
        let s = &m.status;
        ensure!(s.phase == Phase::Moved, "{:?}: {}", s.phase, s.cause);
        ensure!(s.epoch_after == Some(s.epoch_before.next()), "epochs {:?}", s.epoch_after);
        let guest = if s.name.as_str() == "web" { &self.web } else { &self.db };
        self.verify(guest)?;
        let host = self.host_of(s.name.as_str())?;
        ensure!(Some(&host) == m.to_name.as_ref(), "it runs on {host}");
        Ok(m)
    }

    /// Where `web` is not: the host at the other end of the WAN.
    fn far(&self) -> Result<&'static str> {
        Ok(if self.host_of("web")? == "h2" { "h1" } else { "h2" })
    }
}

fn figures(m: &Migration) -> Value {
    let s = &m.status;
    json!({
        "from": m.from_name, "to": m.to_name, "requested_on": m.requested_on_name,
        "epoch_after": s.epoch_after, "total_ms": s.total_ms,
        "downtime_ms": s.downtime_us.map(|us| us as f64 / 1000.0), "bulk_bytes": s.bulk_bytes,
    })
}

fn third_host(world: &mut World) -> Result<Value> {
    Ok(figures(&world.moved(&Wish::new("h3", "web", "h2"))?))
}

/// By the command line: its lines of progress never shrink.
fn to_site(world: &mut World) -> Result<Value> {
    let args = ["migrate", "web", "--to", "site:paris", "--wait"];
    let out = world.swarm.node("h2")?.cli(&args, SOON)?;
    ensure!(out.ok(), "{}{}", out.stdout, out.stderr);
    let percent = |line: &str| line.trim_start().split_once(" %  ")?.0.parse::<u32>().ok();
    let shares: Vec<u32> = out.stderr.lines().filter_map(percent).collect();
    ensure!(!shares.is_empty() && shares.is_sorted(), "shares {shares:?}");
    let host = world.host_of("web")?;
    ensure!(host != "h2", "it runs on {host}");
    world.verify(&world.web)?;
    Ok(json!({"to": host, "percent": shares}))
}

fn to_auto(world: &mut World) -> Result<Value> {
    let before = world.host_of("web")?;
    let m = world.moved(&Wish::new("h3", "web", "auto"))?;
    ensure!(m.to_name.as_ref() != Some(&before), "it stayed");
    Ok(figures(&m))
}

fn opposite(world: &mut World) -> Result<Value> {
    let far = world.far()?;
    let near = if far == "h2" { "h1" } else { "h2" };
    if world.host_of("db")? != far {
        world.moved(&Wish::new("h3", "db", far))?;
    }
    let one = Moving::start(&world.swarm, &Wish::new("h3", "web", far))?;
    let other = Moving::start(&world.swarm, &Wish::new("h1", "db", near))?;
    let (one, other) = (one.end()?, other.end()?);
    Ok(json!([figures(&world.check_moved(one)?), figures(&world.check_moved(other)?)]))
}

/// The id and phase of the migration of `web` that is under way.
fn under_way(world: &World, phase: &str) -> Result<String> {
    let mut id = None;
    world.swarm.wait("pages cross", SOON, |s| {
        let all = s.ask("h3", &["migrations"])?;
        let of = |m: &&Value| m["name"] == "web" && m["phase"] == phase;
        id = all.as_array().and_then(|a| a.iter().find(of)?["id"].as_str().map(str::to_owned));
        Ok(id.is_some())
    })?;
    id.context("no id")
}

fn abort(world: &mut World) -> Result<Value> {
    let far = world.far()?;
    let info = |w: &World| w.swarm.ask(&w.host_of("web")?, &["vm", "show", "web"]);
    world.swarm.wait("the last move is over", SOON, |_| Ok(info(world)?["state"] == "running"))?;
    let before = info(world)?;
    let wish = Wish { bandwidth: 1_000_000, ..Wish::new("h3", "web", far) };
    let moving = Moving::start(&world.swarm, &wish)?;
    let id = under_way(world, "transfer")?;
    world.swarm.ask("h2", &["abort", &id])?;
    let m = moving.end()?;
    ensure!(m.status.phase == Phase::Stayed, "{:?}: {}", m.status.phase, m.status.cause);
    let after = info(world)?;
    for key in ["host", "copy", "epoch", "pid"] {
        ensure!(before[key] == after[key], "{key}: {}, then {}", before[key], after[key]);
    }
    let again = world.moved(&Wish::new("h3", "web", far))?;
    Ok(json!({"cause": m.status.cause, "again": figures(&again)}))
}

fn deadline(world: &mut World) -> Result<Value> {
    let wish = Wish { bandwidth: 500_000, deadline_s: 3, ..Wish::new("h3", "web", world.far()?) };
    let m = Moving::start(&world.swarm, &wish)?.end()?;
    ensure!(m.status.phase == Phase::Stayed, "{:?}", m.status.phase);
    ensure!(m.status.cause.contains("deadline"), "cause: {}", m.status.cause);
    world.verify(&world.web)?;
    Ok(json!({"cause": m.status.cause, "total_ms": m.status.total_ms}))
}

/// Both ends say what they saw, in an order that makes sense.
fn timeline(world: &mut World) -> Result<Value> {
    let m = world.moved(&Wish::new("h3", "web", world.far()?))?;
    let id = m.status.id.to_string();
    let shown = world.swarm.ask("h3", &["migrations", "show", &id])?;
    let moments = shown["timeline"].as_array().context("no timeline")?;
    let at = |host: &Value, word: &str| -> Result<u64> {
        let is =
            |m: &&Value| m["host"] == *host && m["what"].as_str().is_some_and(|w| w.contains(word));
        let found = moments.iter().find(is).and_then(|m| m["at_us"].as_u64());
        found.with_context(|| format!("no moment {word:?}"))
    };
    let (from, to) = (&shown["from"], &shown["to"]);
    let stop = at(from, "stop: ")?;
    let order = [
        at(to, "QEMU waits")?,
        at(from, "pages cross")?,
        stop,
        at(to, "device state loaded")?,
        at(to, "resume: ")?,
        at(from, "moved")?,
    ];
    ensure!(order.is_sorted(), "order {order:?}");
    ensure!(Some(order[4] - stop) == m.status.downtime_us, "downtime {:?}", m.status.downtime_us);
    Ok(json!({"moments": moments.len()}))
}

fn killed(world: &mut World) -> Result<Value> {
    let host = world.host_of("web")?;
    let before = world.swarm.ask(&host, &["vm", "show", "web"])?;
    world.swarm.node_mut(&host)?.kill9()?;
    // The guest needs no daemon.
    run(async {
        let path = super::swarm::serial1(&before)?;
        crate::guest::GuestControl::new(path).ping().await
    })?;
    world.swarm.node_mut(&host)?.start_ready(SOON)?;
    world.swarm.wait("the VM is managed again", SOON, |s| {
        let after = s.ask(&host, &["vm", "show", "web"])?;
        Ok(after["state"] == "running" && after["pid"] == before["pid"])
    })?;
    let console = world.swarm.ask(&host, &["vm", "show", "web"])?;
    let console = console["detail"]["console"].as_str().context("no console")?.to_owned();
    std::os::unix::net::UnixStream::connect(console).context("its console")?;
    let far = world.far()?;
    world.swarm.wait("the hosts are connected again", SOON, |s| {
        let hosts = s.ask(&host, &["hosts"])?;
        Ok(hosts.as_array().is_some_and(|h| h.iter().all(|h| h["state"] == "alive")))
    })?;
    Ok(figures(&world.moved(&Wish::new("h3", "web", far))?))
}

/// The same way twice: once undisturbed, once with the WAN cut in the middle.
fn cut(world: &mut World) -> Result<Value> {
    let (far, near) = if world.far()? == "h2" { ("h2", "h1") } else { ("h1", "h2") };
    let wan = || world.swarm.lab.wan().and_then(|wan| wan.stats());
    // A fixed rate, so that the cut finds it in the middle.
    let wish = |to| Wish { bandwidth: 3_000_000, ..Wish::new("h3", "web", to) };
    let before = wan()?;
    world.moved(&wish(far))?;
    let plain = wan()?.since(&before).carried_bytes();
    world.moved(&wish(near))?;
    let before = wan()?;
    let moving = Moving::start(&world.swarm, &wish(far))?;
    under_way(world, "transfer")?;
    world.swarm.wait("a quarter has crossed", SOON, |_| {
        Ok(wan()?.since(&before).carried_bytes() > plain / 4)
    })?;
    ensure!(!moving.is_over(), "it ended before the cut");
    world.swarm.lab.wan()?.cut()?;
    std::thread::sleep(CUT);
    let ended = moving.is_over();
    world.swarm.lab.wan()?.restore()?;
    ensure!(!ended, "it ended during the cut: {:?}", moving.end());
    let m = world.check_moved(moving.end()?)?;
    let bytes = wan()?.since(&before).carried_bytes();
    let ratio = bytes as f64 / plain as f64;
    if ratio >= 1.3 {
        bail!("{bytes} bytes with a cut, {plain} without: {ratio:.2} x");
    }
    Ok(
        json!({"wan_bytes": bytes, "wan_bytes_undisturbed": plain, "ratio": ratio, "move": figures(&m)}),
    )
}

/// Round trips of control messages between the two sites, milliseconds, sorted.
fn rtts(world: &World, until: impl Fn(usize) -> bool) -> Result<Vec<f64>> {
    let mut found = Vec::new();
    while !until(found.len()) {
        let hosts = world.swarm.ask("h1", &["hosts"])?;
        let far = hosts.as_array().and_then(|h| h.iter().find(|h| h["name"] == "h2"));
        let us = far.and_then(|h| h["rtt_us"].as_u64()).context("h2 does not answer")?;
        found.push(us as f64 / 1000.0);
    }
    found.sort_by(f64::total_cmp);
    Ok(found)
}

fn latency(world: &mut World) -> Result<Value> {
    let host = world.host_of("web")?;
    run(async { world.swarm.control(&host, &world.web)?.churn(96, 250, false).await })?;
    let idle = rtts(world, |n| n >= RTTS)?;
    let far = world.far()?;
    let moving = Moving::start(&world.swarm, &Wish::new("h3", "web", far))?;
    under_way(world, "transfer")?;
    let busy = rtts(world, |n| moving.is_over() || n >= 200)?;
    let m = world.check_moved(moving.end()?)?;
    let p = |all: &[f64], part: usize| all.get(all.len().saturating_sub(1) * part / 100).copied();
    let (idle95, busy95) = (p(&idle, 95).context("none")?, p(&busy, 95).context("none")?);
    ensure!(busy.len() >= 10, "only {} round trips in the move", busy.len());
    // What the WAN's own queue (100 ms) and two busy processors may add. Behind the bulk's own queue of megabytes it
    // would be seconds.
    ensure!(busy95 <= idle95 + 500.0, "p95 {busy95:.0} ms in the move, {idle95:.0} ms idle");
    Ok(json!({
        "idle_ms": {"p50": p(&idle, 50), "p95": idle95}, "samples": busy.len(),
        "busy_ms": {"p50": p(&busy, 50), "p95": busy95, "max": busy.last()}, "move": figures(&m),
    }))
}
