//! The demo: a real Debian guest moves from host 1 to host 2 because host 3 was asked, while somebody outside talks to it.
//!
//! Owns the steps and the report. All figures are measured in this run.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::disks;
use super::faults::world::let_hold;
use super::swarm::{Guest, GuestPlan, Swarm, run};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::cleanup::run_dir;
use crate::lab::prober::{ProbeConfig, Prober};
use crate::lab::qemus::QemuWatch;

/// Id of the lab.
const LAB: &str = "demo";
/// MiB that the guest's workload rewrites.
const CHURN_MB: u32 = 20;
/// Thousands of bytes per second that it rewrites.
const CHURN_KBPS: u32 = 250;
/// Datagrams per second of the prober.
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

/// Runs it. False: it ran and the guest did not move, or a promise was broken.
pub fn demo(options: &Options<'_>) -> Result<bool> {
    say("guest image (built once, then cached)");
    let files = GuestFiles::prepare(options.kind, &Cache::open()?)?;
    say("three hosts at two sites, joined by 100 Mbit/s and 80 ms round trip");
    let mut qemus = None;
    let swarm = Swarm::up(&LabConfig::demo(LAB), |node| {
        let watch = qemus.get_or_insert_with(|| QemuWatch::start(&run_dir(LAB).join("qemus")));
        if let Ok(watch) = watch {
            node.arg("--qemu").arg(&watch.program().display().to_string());
        }
        let_hold(node);
    })?;
    let qemus = qemus.context("a lab without hosts")??;
    if let Some(base) = &files.base_image {
        say("the destination knows the guest's base image");
        let base = base.to_str().context("path")?;
        swarm.node("h2")?.cli_json(&["image", "add", base], Duration::from_secs(300))?;
    }
    say("a guest boots on h1");
    let memory = if options.kind == GuestKind::Debian { 512 } else { 256 };
    let plan = GuestPlan::new("web", 5, memory);
    let guest = swarm.start_guest("h1", &files, &plan)?;
    let mut control = swarm.control("h1", &guest)?;
    run(control.churn(CHURN_MB, CHURN_KBPS, false))?;
    let station = swarm.station("h3", 1)?;
    let target = SocketAddr::from((plan.ip(), 7007));
    let probes = ProbeConfig { target, rate_pps: PROBES, size: 64 };
    let prober = Prober::start(Some(station.ns()), &probes)?;
    ensure!(
        prober.wait_unique(u64::from(PROBES) * 2, Duration::from_secs(30)),
        "the guest does not answer on its wire"
    );
    drop(control);

    say("h3 is asked to move it to h2");
    let mut report = watch_move(&swarm, &guest, prober)?;
    if report["disk_bytes"].as_u64().is_some_and(|bytes| bytes > 0) {
        // Comparing takes seconds in which no guest may run: done on the way back, which is in none of the figures.
        say("it moves back, and both images are compared before it runs there");
        let back = disks::held_move(&swarm, &qemus, &guest.name, ("h2", "h1"))?;
        report["disk_equal"] = back.equal.into();
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
        say("the guest noticed nothing but a pause");
    }
    Ok(broken.is_empty())
}

/// The move itself, seen from outside, as the demo's report.
fn watch_move(swarm: &Swarm, guest: &Guest, prober: Prober) -> Result<Value> {
    let before = swarm.lab.wan()?.stats()?;
    let status = migrate_watched(swarm, "h3", "web", "h2")?;
    let wan = swarm.lab.wan()?.stats()?.since(&before);
    prober.wait_unique(prober.snapshot().unique + 200, Duration::from_secs(30));
    let probe = prober.stop(Duration::from_secs(2));

    let verified = run(async {
        let mut control = swarm.control("h2", guest)?;
        control.verify().await
    })?;
    let info = swarm.ask("h2", &["vm", "show", "web"])?;
    Ok(json!({
        "outcome": status["phase"],
        "vm": "web",
        "from": status["from_name"],
        "to": status["to_name"],
        "requested_on": status["requested_on_name"],
        "epoch_before": status["epoch_before"],
        "epoch_after": status["epoch_after"],
        "total_ms": status["total_ms"],
        "downtime_ms": status["downtime_us"].as_u64().map(|us| us as f64 / 1000.0),
        "outage_ms": probe.longest_gap_ms,
        "frames_sent": probe.sent,
        "frames_lost": probe.lost,
        "frames_reordered": probe.reordered,
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
        "guest": {
            "pages_verified": verified.pages_verified,
            "pages_corrupt": verified.pages_corrupt,
        },
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
    check(report["outcome"] == "moved", "the guest moved");
    let names = [&report["from"], &report["to"], &report["requested_on"]];
    check(names[0] != names[1] && names[1] != names[2] && names[0] != names[2], "three hosts");
    let next = number("/epoch_before").map(|e| e + 1.0);
    check(next.is_some() && number("/epoch_after") == next, "one epoch more");
    check(number("/frames_lost").is_some_and(|n| n <= 100.0), "at most 100 frames are lost");
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

/// `godwit migrate --wait`, with its progress shown as the user sees it; then what all nodes know of it.
pub fn migrate_watched(swarm: &Swarm, on: &str, vm: &str, to: &str) -> Result<Value> {
    let node = swarm.node(on)?;
    let program = crate::lab::node::godwit_binary()?;
    let mut command = node.host().ns.command(program);
    command.arg("--state").arg(node.state_dir()).args(["migrate", vm, "--to", to, "--wait"]);
    let status = command.stdin(Stdio::null()).status().context("godwit migrate")?;
    let all = swarm.ask(on, &["migrations"])?;
    let found = all.as_array().and_then(|m| m.last().cloned());
    match found {
        Some(found) => Ok(found),
        None => bail!("godwit migrate ended with {status} and no migration is known"),
    }
}
