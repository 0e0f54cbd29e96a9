//! The demo: two real Debian guests move together, from two hosts to two others, because a fifth was asked, while somebody
//! outside talks to both.
//!
//! Owns the steps and the report. All figures are measured in this run.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::cluster::world::two_sites;
use super::disks;
use super::faults::world::let_hold;
use super::swarm::{Guest, GuestPlan, Swarm, run};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::cleanup::run_dir;
use crate::lab::prober::{ECHO_PORT, ProbeConfig, ProbeReport, Prober};
use crate::lab::qemus::QemuWatch;

/// Id of the lab.
const LAB: &str = "demo";
/// The cluster.
const CLUSTER: &str = "web";
/// Its members: name, host, and where each goes.
const MEMBERS: [(&str, &str, &str); 2] = [("app", "h1", "h4"), ("db", "h2", "h5")];
/// The host that is asked.
const ASKED: &str = "h3";
/// MiB that each guest's workload rewrites.
const CHURN_MB: u32 = 20;
/// Thousands of bytes per second that it rewrites.
const CHURN_KBPS: u32 = 125;
/// Datagrams per second to each guest.
const PROBES: u32 = 100;

/// Which guest, and how it is reported.
pub struct Options<'a> {
    /// `Debian` for the demo; the smaller guest for a quick look.
    pub kind: GuestKind,
    /// Where the report goes.
    pub json: Option<&'a Path>,
}

fn say(line: &str) {
    println!("==> {line}");
}

/// Runs it. False: it ran and the guests did not move, or a promise was broken.
pub fn demo(options: &Options<'_>) -> Result<bool> {
    say("guest image (built once, then cached)");
    let files = GuestFiles::prepare(options.kind, &Cache::open()?)?;
    say("five hosts at two sites, joined by 100 Mbit/s and 80 ms round trip");
    let mut qemus = None;
    let swarm = Swarm::up(&two_sites(LAB, 80), |node| {
        let watch = qemus.get_or_insert_with(|| QemuWatch::start(&run_dir(LAB).join("qemus")));
        if let Ok(watch) = watch {
            node.arg("--qemu").arg(&watch.program().display().to_string());
        }
        let_hold(node);
    })?;
    let qemus = qemus.context("a lab without hosts")??;
    if let Some(base) = &files.base_image {
        say("the destinations know the guests' base image");
        let base = base.to_str().context("path")?;
        for (_, _, to) in MEMBERS {
            swarm.node(to)?.cli_json(&["image", "add", base], Duration::from_secs(300))?;
        }
    }
    say("two guests boot, on h1 and on h2; h3 makes them a cluster");
    let guests = boot(&swarm, &files, options.kind)?;
    let station = swarm.station(ASKED, 1)?;
    let mut probers = Vec::new();
    for guest in &guests {
        let target = SocketAddr::from((guest.plan.ip(), ECHO_PORT));
        let probes = ProbeConfig { target, rate_pps: PROBES, size: 64 };
        let prober = Prober::start(Some(station.ns()), &probes)?;
        ensure!(
            prober.wait_unique(u64::from(PROBES) * 2, Duration::from_secs(30)),
            "a guest does not answer on its wire"
        );
        probers.push(prober);
    }

    say("h3 is asked to move them, to h4 and h5");
    let mut report = watch_move(&swarm, &guests, probers)?;
    if report["disk_bytes"].as_u64().is_some_and(|bytes| bytes > 0) {
        // Comparing takes seconds in which no guest may run: done on the way back, which is in none of the figures.
        say("each moves back, and both images are compared before it runs there");
        swarm.ask(ASKED, &["cluster", "delete", CLUSTER])?;
        let mut equal = true;
        for (vm, from, to) in MEMBERS {
            equal &= disks::held_move(&swarm, &qemus, vm, (to, from))?.equal;
        }
        report["disk_equal"] = equal.into();
    }
    drop(station);
    swarm.down()?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    if let Some(path) = options.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    let broken = promises(&report);
    for promise in &broken {
        println!("BROKEN: {promise}");
    }
    if broken.is_empty() {
        say("the guests noticed nothing but a pause");
    }
    Ok(broken.is_empty())
}

/// The members at work, as one cluster.
fn boot(swarm: &Swarm, files: &GuestFiles, kind: GuestKind) -> Result<Vec<Guest>> {
    let memory = if kind == GuestKind::Debian { 512 } else { 256 };
    let mut guests = Vec::new();
    for (number, (vm, host, _)) in (5..).zip(MEMBERS) {
        let guest = swarm.start_guest(host, files, &GuestPlan::new(vm, number, memory))?;
        run(async { swarm.control(host, &guest)?.churn(CHURN_MB, CHURN_KBPS, false).await })?;
        guests.push(guest);
    }
    let vms = MEMBERS.map(|(vm, _, _)| vm).join(",");
    swarm.ask(ASKED, &["cluster", "create", CLUSTER, "--vms", &vms])?;
    Ok(guests)
}

/// The move itself, seen from outside, as the demo's report.
fn watch_move(swarm: &Swarm, guests: &[Guest], probers: Vec<Prober>) -> Result<Value> {
    let before = swarm.lab.wan()?.stats()?;
    let place = MEMBERS.map(|(vm, _, to)| format!("{vm}={to}")).join(",");
    let status = migrate_watched(swarm, ASKED, &[CLUSTER, "--place", &place])?;
    let wan = swarm.lab.wan()?.stats()?.since(&before);
    let mut seen = Vec::new();
    for prober in probers {
        prober.wait_unique(prober.snapshot().unique + 200, Duration::from_secs(30));
        seen.push(prober.stop(Duration::from_secs(2)));
    }
    let sum = |of: fn(&ProbeReport) -> u64| seen.iter().map(of).sum::<u64>();
    let (mut members, mut verified, mut corrupt) = (Vec::new(), 0, 0);
    for (guest, (vm, from, to)) in guests.iter().zip(MEMBERS) {
        let v = run(async { swarm.control(to, guest)?.verify().await })?;
        (verified, corrupt) = (verified + v.pages_verified, corrupt + v.pages_corrupt);
        members.push(json!({
            "vm": vm,
            "from": from,
            "to": to,
            "pages_verified": v.pages_verified,
            "pages_corrupt": v.pages_corrupt,
        }));
    }
    let info = swarm.ask(MEMBERS[0].2, &["vm", "show", MEMBERS[0].0])?;
    let ms = |key: &str| status[key].as_u64().map(|us| us as f64 / 1000.0);
    Ok(json!({
        "outcome": status["phase"],
        "vm": CLUSTER,
        "from": status["from_name"],
        "to": status["to_name"],
        "requested_on": status["requested_on_name"],
        "members": members,
        "epoch_before": status["epoch_before"],
        "epoch_after": status["epoch_after"],
        "total_ms": status["total_ms"],
        "downtime_ms": ms("downtime_us"),
        "stop_spread_ms": ms("stop_spread_us"),
        "resume_spread_ms": ms("resume_spread_us"),
        "outage_ms": seen.iter().map(|p| p.longest_gap_ms).fold(0.0, f64::max),
        "frames_sent": sum(|p| p.sent),
        "frames_lost": sum(|p| p.lost),
        "frames_reordered": sum(|p| p.reordered),
        "ram_bytes": status["ram_bytes"],
        "ram_nonzero_bytes": status["ram_nonzero_bytes"],
        "wan_bytes": wan.carried_bytes(),
        "disk_bytes": status["disk_bytes"],
        "disk_wan_bytes": status["disk_wan_bytes"],
        "chunks": {
            "zero": status["chunks_zero"],
            "known": status["chunks_known"],
            "literal": status["chunks_literal"],
        },
        "guest": { "pages_verified": verified, "pages_corrupt": corrupt },
        "accel": info["accel"],
    }))
}

/// What the demo promises, and this run did not keep.
fn promises(report: &Value) -> Vec<String> {
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64);
    let mut broken = Vec::new();
    let mut check = |kept: bool, promise: &str| {
        if !kept {
            broken.push(promise.to_owned());
        }
    };
    check(report["outcome"] == "moved", "the guests moved");
    let hosts =
        |key: &str| -> Vec<&str> { report[key].as_str().unwrap_or("").split(',').collect() };
    let all = [hosts("from"), hosts("to"), hosts("requested_on")].concat();
    let different: std::collections::BTreeSet<_> = all.iter().collect();
    check(all.len() == 5 && different.len() == 5, "five hosts");
    let next = number("/epoch_before").map(|e| e + 1.0);
    check(next.is_some() && number("/epoch_after") == next, "one epoch more");
    check(number("/frames_lost") == Some(0.0), "no frame is lost");
    check(number("/frames_reordered") == Some(0.0), "no frame is out of order");
    check(number("/guest/pages_verified").is_some_and(|n| n >= 4000.0), "4,000 pages verified");
    check(number("/guest/pages_corrupt") == Some(0.0), "no page is corrupt");
    let wan = number("/wan_bytes").zip(number("/ram_nonzero_bytes"));
    check(
        report["chunks"]["known"] == 0 || wan.is_some_and(|(w, n)| w <= 0.25 * n),
        "no more crosses the WAN than a quarter of the memory",
    );
    check(number("/disk_bytes") == Some(0.0) || report["disk_equal"] == true, "the disk is equal");
    broken
}

/// `godwit migrate ... --wait`, with its progress shown as the user sees it; then what all nodes know of it.
pub fn migrate_watched(swarm: &Swarm, on: &str, what: &[&str]) -> Result<Value> {
    let node = swarm.node(on)?;
    let program = crate::lab::node::godwit_binary()?;
    let mut command = node.host().ns.command(program);
    command.arg("--state").arg(node.state_dir()).arg("migrate").args(what).arg("--wait");
    let status = command.stdin(Stdio::null()).status().context("godwit migrate")?;
    let all = swarm.ask(on, &["migrations"])?;
    let found = all.as_array().and_then(|m| m.last().cloned());
    match found {
        Some(found) => Ok(found),
        None => bail!("godwit migrate ended with {status} and no migration is known"),
    }
}
