//! godwit's side: a swarm of three nodes, a guest on one, asked to move to the other site.
//!
//! Owns the order of one run. Times are those of the QEMUs' events as the migration's status carries them.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::figures::{self, Run};
use super::sampler::Sampler;
use super::{AWAY, Case, MEMORY_MIB, MOVE, SETTLE, Vm, content};
use crate::guest::wire::Verified;
use crate::guest::{GuestControl, GuestFiles, GuestKind};
use crate::lab::prober::{ProbeConfig, Prober};
use crate::scenario::swarm::{Guest, GuestPlan, Swarm, run as block_on};

/// Datagrams per second of the prober.
const PROBES: u32 = 100;

pub(super) fn run(case: &Case, files: &GuestFiles) -> Result<(Run, Vm)> {
    let swarm = swarm(case, files)?;
    let (plan, guest) = boot(case, files, &swarm)?;
    let station = swarm.station("h3", 1)?;
    let probes =
        ProbeConfig { target: SocketAddr::from((plan.ip(), 7007)), rate_pps: PROBES, size: 64 };
    let prober = Prober::start(Some(station.ns()), &probes)?;
    ensure!(
        prober.wait_unique(u64::from(PROBES), Duration::from_secs(30)),
        "the guest does not answer on its wire"
    );
    std::thread::sleep(SETTLE);
    let (from, to) = if case.back { ("h2", "h1") } else { ("h1", "h2") };
    if case.back {
        swarm.node("h1")?.cli_json(&["migrate", "web", "--to", "h2", "--wait"], MOVE)?;
        std::thread::sleep(AWAY);
    }
    let info = swarm.ask(from, &["vm", "show", "web"])?;
    let vm = Vm {
        machine: info["machine"].as_str().context("machine")?.to_owned(),
        cpu: info["detail"]["cpu"].as_str().context("cpu")?.to_owned(),
        accel: info["accel"].as_str().context("accel")?.to_owned(),
    };
    let qemu = info["pid"].as_u64().context("pid")?;
    let ram_bytes = u64::from(MEMORY_MIB) << 20;
    let content = content::of_qemu(u32::try_from(qemu)?, ram_bytes)?;

    let nodes = swarm.nodes().iter().filter_map(|n| n.pid()).collect();
    let sampler = Sampler::start(&swarm.lab, nodes)?;
    let before = swarm.lab.wan()?.stats()?;
    let requested_us = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as f64;
    swarm.node(from)?.cli_json(&["migrate", "web", "--to", to, "--wait"], MOVE)?;
    let wan = swarm.lab.wan()?.stats()?.since(&before);
    let usage = sampler.finish()?;

    let all = swarm.ask(from, &["migrations"])?;
    let status = newest(&all).context("no migration is known")?;
    ensure!(status["phase"] == "moved", "the guest did not move: {status}");
    let id = status["id"].as_str().context("id")?;
    let with_timeline = swarm.ask(from, &["migrations", "show", id])?;
    let resumed_us = at_us(&with_timeline, "resume:")?;
    prober.wait_unique(prober.snapshot().unique + 100, Duration::from_secs(30));
    let probe = prober.stop(Duration::from_secs(1));
    let verified = block_on(verify(case, swarm.control(to, &guest)?))?;
    drop(station);
    let figures = Run {
        is_peer: false,
        wan_bytes: wan.carried_bytes(),
        total_ms: (resumed_us - requested_us) / 1000.0,
        downtime_ms: (resumed_us - at_us(&with_timeline, "stop:")?) / 1000.0,
        outage_ms: Some(probe.longest_gap_ms),
        cpu_ms: usage.cpu_ms,
        node_rss_anon_peak_bytes: usage.rss_anon_peak_bytes,
        node_rss_anon_above_idle_bytes: usage.rss_anon_growth_bytes,
        link_use: None,
        together: None,
        guest: figures::Guest {
            image: image(files),
            ram_bytes,
            content,
            pages_verified: verified.pages_verified,
            pages_corrupt: verified.pages_corrupt,
        },
        timeline: timeline(&with_timeline),
    };
    keep_logs(case, &swarm)?;
    swarm.down()?;
    Ok((figures, vm))
}

/// The guest at its work on h1.
fn boot(case: &Case, files: &GuestFiles, swarm: &Swarm) -> Result<(GuestPlan, Guest)> {
    let plan =
        GuestPlan { root_shared: case.disk.is_none(), ..GuestPlan::new("web", 5, MEMORY_MIB) };
    let guest = swarm.start_guest("h1", files, &plan)?;
    block_on(async {
        let mut control = swarm.control("h1", &guest)?;
        if let Some((path, mb, rate_kbps)) = case.disk {
            control.disk(path, mb, rate_kbps).await?;
        }
        control.churn(case.churn.0, case.churn.1, false).await
    })?;
    Ok((plan, guest))
}

/// The one that was asked for last.
fn newest(all: &Value) -> Option<&Value> {
    let begun = |m: &&Value| {
        m["timeline"].as_array()?.iter().filter_map(|moment| moment["at_us"].as_u64()).min()
    };
    all.as_array()?.iter().max_by_key(begun)
}

/// The guest's check of its memory and, if it wrote to a disk, of that.
pub(super) async fn verify(case: &Case, mut control: GuestControl) -> Result<Verified> {
    let mut verified = control.verify().await?;
    if case.disk.is_some() {
        let disks = control.verify_disks().await?;
        verified.pages_verified += disks.pages_verified;
        verified.pages_corrupt += disks.pages_corrupt;
    }
    Ok(verified)
}

/// Three nodes; the destination knows the base image if the case says so.
fn swarm(case: &Case, files: &GuestFiles) -> Result<Swarm> {
    let swarm = Swarm::up(&case.lab(), |_| {})?;
    if case.base_known {
        let base = files.base_image.as_ref().context("this guest has no base image")?;
        let base = base.to_str().context("path")?;
        swarm.node("h2")?.cli_json(&["image", "add", base], Duration::from_secs(300))?;
    }
    Ok(swarm)
}

/// Copies the nodes' logs to the current directory, if `GODWIT_BENCH_LOGS` is set.
pub(super) fn keep_logs(case: &Case, swarm: &Swarm) -> Result<()> {
    if std::env::var_os("GODWIT_BENCH_LOGS").is_none() {
        return Ok(());
    }
    for node in swarm.nodes() {
        let to = format!("{}-{}.log", case.name, node.host().name);
        std::fs::copy(node.log_path(), to)?;
    }
    Ok(())
}

/// The pristine image's name, which carries the hash of its recipe.
pub(super) fn image(files: &GuestFiles) -> String {
    let kind = if files.kind == GuestKind::Debian { "debian" } else { "busybox" };
    let dir = files.base_image.as_ref().and_then(|p| p.parent()?.file_name()?.to_str());
    dir.unwrap_or(kind).to_owned()
}

/// When a moment of the timeline was, microseconds since 1970; for `stop:` and `resume:` by QEMU's own event.
pub(super) fn at_us(status: &Value, start: &str) -> Result<f64> {
    let moments = status["timeline"].as_array().context("no timeline")?;
    let found = moments.iter().find(|m| m["what"].as_str().is_some_and(|w| w.starts_with(start)));
    found.and_then(|m| m["at_us"].as_f64()).with_context(|| format!("no {start} in {status}"))
}

/// Milliseconds since the first moment, and what both ends say of it.
fn timeline(status: &Value) -> Vec<(f64, String)> {
    let moments = status["timeline"].as_array().map_or(&[][..], Vec::as_slice);
    let at = |m: &Value| m["at_us"].as_f64().unwrap_or(0.0) / 1000.0;
    let start = moments.iter().map(at).fold(f64::INFINITY, f64::min);
    let line = |m: &Value| {
        let end = if m["host"] == status["from"] { "source" } else { "destination" };
        (at(m) - start, format!("{end}: {}", m["what"].as_str().unwrap_or_default()))
    };
    let mut lines: Vec<(f64, String)> = moments.iter().map(line).collect();
    lines.sort_by(|a, b| a.0.total_cmp(&b.0));
    lines
}
