//! Several guests that cross together, of either side: a cluster that moves in one decision, and as many QEMUs that
//! migrate at the same time with nothing between them.
//!
//! Owns the order of one run of each. Guests are spread over two hosts and go to two others.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use serde_json::Value;

use super::content::{self, Content};
use super::figures::{Guest as GuestFigures, Run, Together};
use super::peer::{self, BOOT, Moved, Process, Setting};
use super::sampler::Sampler;
use super::{Case, MEMORY_MIB, MOVE, SETTLE, Vm, ours};
use crate::guest::disk::DiskForm;
use crate::guest::wire::Verified;
use crate::guest::{GuestControl, GuestFiles};
use crate::lab::prober::{ECHO_PORT, ProbeConfig, Prober, Station};
use crate::lab::{Host, Lab};
use crate::scenario::swarm::{Guest, GuestPlan, Swarm, run as block_on};

/// Datagrams per second to each guest.
const PROBES: u32 = 100;
/// The cluster.
const CLUSTER: &str = "web";
/// The node that is asked.
const ASKED: &str = "h3";
/// Where guests are at first, in turns, and where they go.
const FROM: [&str; 2] = ["h1", "h2"];
const TO: [&str; 2] = ["h4", "h5"];

fn host(of: [&'static str; 2], member: u8) -> &'static str {
    of[usize::from(member) % 2]
}

/// The guests' own checks together.
fn sum(all: &[Verified]) -> (u64, u64) {
    let of = |f: fn(&Verified) -> u64| all.iter().map(f).sum();
    (of(|v| v.pages_verified), of(|v| v.pages_corrupt))
}

fn add(a: Content, b: Content) -> Content {
    Content {
        nonzero_bytes: a.nonzero_bytes + b.nonzero_bytes,
        zstd1_bytes: a.zstd1_bytes + b.zstd1_bytes,
    }
}

/// First to last, milliseconds.
fn spread_ms(at_us: impl Iterator<Item = f64> + Clone) -> f64 {
    let first = at_us.clone().fold(f64::INFINITY, f64::min);
    let last = at_us.fold(f64::NEG_INFINITY, f64::max);
    (last - first) / 1000.0
}

fn last(at_us: impl Iterator<Item = f64>) -> f64 {
    at_us.fold(f64::NEG_INFINITY, f64::max)
}

/// Guests at work, made a cluster.
fn boot(case: &Case, files: &GuestFiles, swarm: &Swarm) -> Result<Vec<Guest>> {
    if case.base_known {
        let base = files.base_image.as_ref().context("this guest has no base image")?;
        let base = base.to_str().context("path")?;
        for to in TO {
            swarm.node(to)?.cli_json(&["image", "add", base], Duration::from_secs(300))?;
        }
    }
    let mut guests = Vec::new();
    for member in 0..case.members {
        let plan = GuestPlan::new(&format!("web{member}"), 5 + member, MEMORY_MIB);
        let plan = GuestPlan { root_shared: true, ..plan };
        let at = host(FROM, member);
        let guest = swarm.start_guest(at, files, &plan)?;
        let (mb, rate_kbps) = case.churn;
        block_on(async { swarm.control(at, &guest)?.churn(mb, rate_kbps, true).await })?;
        guests.push(guest);
    }
    let names: Vec<&str> = guests.iter().map(|g| g.name.as_str()).collect();
    swarm.ask(ASKED, &["cluster", "create", CLUSTER, "--vms", &names.join(",")])?;
    Ok(guests)
}

/// Somebody outside who talks to every guest.
fn talk(station: &Station, guests: &[Guest]) -> Result<Vec<Prober>> {
    let mut probers = Vec::new();
    for guest in guests {
        let target = SocketAddr::from((guest.plan.ip(), ECHO_PORT));
        let probes = ProbeConfig { target, rate_pps: PROBES, size: 64 };
        let prober = Prober::start(Some(station.ns()), &probes)?;
        ensure!(prober.wait_unique(u64::from(PROBES), BOOT), "a guest does not answer");
        probers.push(prober);
    }
    Ok(probers)
}

/// What the guests' memory holds, and the machine that they have.
fn inspect(swarm: &Swarm, guests: &[Guest]) -> Result<(Content, Vm)> {
    let (mut content, mut vm) = (Content::default(), None);
    for (member, guest) in (0..).zip(guests) {
        let info = swarm.ask(host(FROM, member), &["vm", "show", &guest.name])?;
        let pid = u32::try_from(info["pid"].as_u64().context("pid")?)?;
        content = add(content, content::of_qemu(pid, u64::from(MEMORY_MIB) << 20)?);
        vm = Some(Vm {
            machine: info["machine"].as_str().context("machine")?.to_owned(),
            cpu: info["detail"]["cpu"].as_str().context("cpu")?.to_owned(),
            accel: info["accel"].as_str().context("accel")?.to_owned(),
        });
    }
    Ok((content, vm.context("no guests")?))
}

/// Every guest's own check where it is now.
fn verify(case: &Case, swarm: &Swarm, guests: &[Guest]) -> Result<Vec<Verified>> {
    let mut verified = Vec::new();
    for (member, guest) in (0..).zip(guests) {
        let control = swarm.control(host(TO, member), guest)?;
        verified.push(block_on(ours::verify(case, control))?);
    }
    Ok(verified)
}

/// godwit's side.
pub(super) fn ours(case: &Case, files: &GuestFiles) -> Result<(Run, Vm)> {
    let swarm = Swarm::up(&case.lab(), |_| {})?;
    let guests = boot(case, files, &swarm)?;
    let station = swarm.station(ASKED, 1)?;
    let ram_bytes = u64::from(MEMORY_MIB) << 20;
    // Takes seconds of the processors that the guests have: before anybody listens to them.
    let (content, vm) = inspect(&swarm, &guests)?;
    let probers = talk(&station, &guests)?;
    std::thread::sleep(SETTLE);
    let nodes = swarm.nodes().iter().filter_map(|n| n.pid()).collect();
    let sampler = Sampler::start(&swarm.lab, nodes)?;
    let before = swarm.lab.wan()?.stats()?;
    let requested_us = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as f64;
    let place: Vec<String> =
        (0..).zip(&guests).map(|(m, g)| format!("{}={}", g.name, host(TO, m))).collect();
    let args = ["migrate", CLUSTER, "--place", &place.join(","), "--wait"];
    let status = swarm.node(ASKED)?.cli_json(&args, MOVE)?;
    let wan = swarm.lab.wan()?.stats()?.since(&before);
    let usage = sampler.finish()?;
    ensure!(status["phase"] == "moved", "the cluster did not move: {status}");

    let id = status["id"].as_str().context("id")?;
    let shown = swarm.ask(ASKED, &["migrations", "show", id])?;
    let members = shown["member_migrations"].as_array().context("no members")?;
    ensure!(members.len() == guests.len(), "not all members are known: {shown}");
    let times =
        |what: &str| members.iter().map(|m| ours::at_us(m, what)).collect::<Result<Vec<_>>>();
    let (stops, resumes) = (times("stop:")?, times("resume:")?);
    let mut seen = Vec::new();
    for prober in probers {
        prober.wait_unique(prober.snapshot().unique + 100, Duration::from_secs(30));
        seen.push(prober.stop(Duration::from_secs(1)));
    }
    println!("{}", serde_json::json!(seen));
    let verified = verify(case, &swarm, &guests)?;
    drop(station);
    let (pages_verified, pages_corrupt) = sum(&verified);
    let pauses = stops.iter().zip(&resumes).map(|(stop, resume)| resume - stop);
    let figures = Run {
        is_peer: false,
        wan_bytes: wan.carried_bytes(),
        total_ms: (last(resumes.iter().copied()) - requested_us) / 1000.0,
        downtime_ms: last(pauses) / 1000.0,
        outage_ms: Some(seen.iter().map(|p| p.longest_gap_ms).fold(0.0, f64::max)),
        cpu_ms: usage.cpu_ms,
        node_rss_anon_peak_bytes: usage.rss_anon_peak_bytes,
        node_rss_anon_above_idle_bytes: usage.rss_anon_growth_bytes,
        link_use: None,
        guest: GuestFigures {
            image: ours::image(files),
            ram_bytes: ram_bytes * u64::from(case.members),
            content,
            pages_verified,
            pages_corrupt,
        },
        together: Some(Together {
            stop_spread_ms: spread_ms(stops.iter().copied()),
            resume_spread_ms: spread_ms(resumes.iter().copied()),
            frames_lost: Some(seen.iter().map(|p| p.lost).sum()),
            frames_reordered: Some(seen.iter().map(|p| p.reordered).sum()),
        }),
        timeline: timeline(members, requested_us),
    };
    ours::keep_logs(case, &swarm)?;
    swarm.down()?;
    Ok((figures, vm))
}

/// All members' moments in order, milliseconds since the request.
fn timeline(members: &[Value], requested_us: f64) -> Vec<(f64, String)> {
    let mut lines: Vec<(f64, String)> = Vec::new();
    for member in members {
        let name = member["name"].as_str().unwrap_or_default();
        for moment in member["timeline"].as_array().into_iter().flatten() {
            let at = (moment["at_us"].as_f64().unwrap_or(0.0) - requested_us) / 1000.0;
            lines.push((at, format!("{name}: {}", moment["what"].as_str().unwrap_or_default())));
        }
    }
    lines.sort_by(|a, b| a.0.total_cmp(&b.0));
    lines
}

/// The peer's guests at work.
fn start(case: &Case, settings: &[Setting<'_>]) -> Result<Vec<Process>> {
    let mut sources = Vec::new();
    for setting in settings {
        let (from, to) = ends(setting.lab, setting.member)?;
        setting.make_tap(from)?;
        setting.make_tap(to)?;
        let disk = setting.lab.dir().join(format!("web{}.img", setting.member));
        if !setting.files.make_disk(&disk, DiskForm::Raw)? {
            // A guest that needs none has an empty one here.
            std::fs::File::create(&disk)?.set_len(1 << 20)?;
        }
        let source = Process::start(setting, from, disk, false)?;
        block_on(async {
            let mut control = GuestControl::new(source.spec.serial1());
            control.wait_ready(BOOT).await?;
            control.churn(case.churn.0, case.churn.1, true).await
        })?;
        sources.push(source);
    }
    Ok(sources)
}

/// QEMUs alone, all at the same time.
pub(super) fn theirs(case: &Case, files: &GuestFiles, vm: &Vm, congestion: &str) -> Result<Run> {
    let lab = Lab::new(&case.lab())?;
    lab.set_congestion_control(congestion)?;
    let settings: Vec<Setting<'_>> =
        (0..case.members).map(|member| Setting { case, lab: &lab, files, vm, member }).collect();
    let sources = start(case, &settings)?;
    std::thread::sleep(SETTLE);
    let ram_bytes = u64::from(MEMORY_MIB) << 20;
    let mut content = Content::default();
    for source in &sources {
        content = add(content, content::of_qemu(source.child.id(), ram_bytes)?);
    }
    let sampler = Sampler::start(&lab, Vec::new())?;
    let before = lab.wan()?.stats()?;
    let moves = settings.iter().zip(sources).map(|(setting, source)| {
        let to = ends(&lab, setting.member).map(|(_, to)| to);
        async move { peer::migrate(setting, source, to?).await }
    });
    let moved = block_on(try_join_all(moves))?;
    let wan = lab.wan()?.stats()?.since(&before);
    let usage = sampler.finish()?;
    let (moved, targets): (Vec<Moved>, Vec<Process>) = moved.into_iter().unzip();
    let mut verified = Vec::new();
    for target in &targets {
        verified.push(block_on(ours::verify(case, GuestControl::new(target.spec.serial1())))?);
    }
    drop(targets);
    let (pages_verified, pages_corrupt) = sum(&verified);
    let resumes = moved.iter().map(|m| m.resumed_us as f64);
    let stops = moved.iter().map(|m| m.stopped_us as f64);
    let first = |of: fn(&Moved) -> i64| moved.iter().map(of).min().unwrap_or_default() as f64;
    let downtime_ms = last(moved.iter().map(|m| (m.resumed_us - m.stopped_us) as f64)) / 1000.0;
    let end = last(resumes.clone());
    let seconds = (end - first(|m| m.copying_us)) / 1e6;
    let rate = match case.lab().wan {
        crate::lab::wan::WanMode::Shaped(link) => Some(link.rate_bps as f64),
        crate::lab::wan::WanMode::Unshaped => None,
    };
    let sent = wan.forward.carried_bytes.max(wan.backward.carried_bytes) as f64;
    let figures = Run {
        is_peer: true,
        wan_bytes: wan.carried_bytes(),
        total_ms: (end - first(|m| m.requested_us)) / 1000.0,
        downtime_ms,
        // Nobody talks to them: what the guest stood still is the least that anybody would see.
        outage_ms: Some(downtime_ms),
        cpu_ms: usage.cpu_ms,
        node_rss_anon_peak_bytes: None,
        node_rss_anon_above_idle_bytes: None,
        link_use: rate.map(|rate| sent * 8.0 / seconds / rate),
        guest: GuestFigures {
            image: ours::image(files),
            ram_bytes: ram_bytes * u64::from(case.members),
            content,
            pages_verified,
            pages_corrupt,
        },
        together: Some(Together {
            stop_spread_ms: spread_ms(stops),
            resume_spread_ms: spread_ms(resumes),
            frames_lost: None,
            frames_reordered: None,
        }),
        timeline: moved.iter().flat_map(Moved::timeline).collect(),
    };
    lab.teardown()?;
    Ok(figures)
}

fn ends(lab: &Lab, member: u8) -> Result<(&Host, &Host)> {
    Ok((lab.host(host(FROM, member))?, lab.host(host(TO, member))?))
}
