//! A guest that crosses, against QEMU alone on the same link: the skeleton of `bench ram` and `bench disk`.
//!
//! Owns the turns and the comparing; a bench owns its cases and what they promise. Both sides have a fresh lab and a fresh
//! guest in every run and take turns. Invariant: what is compared was counted by the link, by QEMU's events and by the
//! guest's own check.

mod content;
pub(in crate::bench) mod figures;
mod mirror;
mod ours;
mod peer;
pub(super) mod report;
mod sampler;
mod team;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::guest::GuestFiles;
use crate::lab::wan::{LinkParams, WanMode};
use crate::lab::{Lab, LabConfig, check};
use crate::scenario::cluster::world::two_sites;
use figures::{Run, medians};
use report::Limit;

/// Guest memory, MiB.
const MEMORY_MIB: u32 = 512;
/// Between *the guest's agent answers* and the request, on both sides.
const SETTLE: Duration = Duration::from_secs(20);
/// Between the way there and the way back.
const AWAY: Duration = Duration::from_secs(120);
/// Longest move on either side.
const MOVE: Duration = Duration::from_secs(300);
/// Least of a guest's memory that is not zero when its move begins, bytes.
const NONZERO_MIN: u64 = 180_000_000;
/// How long the link's rate is measured before the first run, after a ramp.
const RATE: Duration = Duration::from_secs(3);
const RAMP: Duration = Duration::from_secs(2);
/// Least share of the link that a peer must use while it transfers.
const LINK_USE_MIN: f64 = 0.7;

/// One comparison.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub name: &'static str,
    /// The destination knows the pristine base image.
    pub base_known: bool,
    /// MiB of memory that the guest's workload fills, and thousands of bytes a second that it rewrites.
    pub churn: (u32, u32),
    /// The guest's disk moves with it, and this file on it is rewritten: path, MiB, thousands of bytes a second.
    pub disk: Option<(&'static str, u32, u32)>,
    /// What is measured is the way back, [`AWAY`] after the way there.
    pub back: bool,
    /// 100 Mbit/s and 80 ms, or a plain veth.
    pub shaped: bool,
    /// So many guests that move together; 1: one alone.
    pub members: u8,
    /// The figure by which the better peer is chosen.
    pub judged_by: &'static str,
}

impl Case {
    fn lab(&self) -> LabConfig {
        let wan =
            if self.shaped { WanMode::Shaped(LinkParams::new(100, 80)) } else { WanMode::Unshaped };
        if self.members > 1 {
            return LabConfig { wan, ..two_sites("benchcl", 80) };
        }
        let labid = if self.disk.is_some() { "benchdsk" } else { "benchram" };
        LabConfig { wan, ..LabConfig::demo(labid) }
    }
}

/// What to measure.
pub struct Options<'a> {
    /// Only this case.
    pub case: Option<&'a str>,
    /// Runs of each side (of the peer: with each congestion control).
    pub runs: u32,
    /// Where the figures go; overwritten.
    pub json: Option<&'a Path>,
}

/// The names that `--case` may choose from, of those in `names`.
pub(super) fn chosen<'a>(options: &Options<'_>, names: &[&'a str]) -> Result<Vec<&'a str>> {
    ensure!((1..=99).contains(&options.runs), "--runs is 1 to 99");
    let wanted: Vec<&str> =
        names.iter().copied().filter(|n| options.case.is_none_or(|name| name == *n)).collect();
    ensure!(
        !wanted.is_empty(),
        "no case is called {}: there are {}",
        options.case.unwrap_or_default(),
        names.join(", ")
    );
    Ok(wanted)
}

/// Prints a table of the cases and writes the figures. A missed limit is a figure (`passed` is false); a run that proves
/// nothing is an error, after the figures were written.
///
/// # Errors
/// If a run failed or was invalid: the peer left the link idle, or a guest did not verify.
pub(super) fn conclude(
    bench: &str,
    all: Vec<(&str, Result<Compared>)>,
    options: &Options<'_>,
) -> Result<()> {
    let mut invalid = Vec::new();
    let mut machine = Value::Null;
    let mut cases = Vec::new();
    for (case, done) in all {
        match done {
            Ok(done) => {
                invalid.extend(done.invalid);
                machine = report::machine(&done.vm)?;
                cases.push(done.json);
            }
            Err(error) => {
                let error = format!("{error:#}");
                invalid.push(format!("{case}: {error}"));
                cases.push(json!({"case": case, "error": error}));
            }
        }
    }
    let passed = invalid.is_empty()
        && cases.iter().flat_map(|c| c["limits"].as_array()).flatten().all(|l| l["passed"] == true);
    let all = json!({
        "bench": bench, "machine": machine, "cases": cases, "passed": passed, "invalid": invalid,
    });
    if let Some(path) = options.json {
        std::fs::write(path, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    report::table(&all);
    ensure!(invalid.is_empty(), "invalid: {}", invalid.join("; "));
    Ok(())
}

/// The machine that a guest has, as the node chose it: the peer gets the same.
#[derive(Clone, Debug)]
struct Vm {
    machine: String,
    cpu: String,
    accel: String,
}

/// A case with all its runs.
pub(super) struct Compared {
    json: Value,
    invalid: Vec<String>,
    vm: Vm,
}

fn one_of_ours(case: &Case, files: &GuestFiles) -> Result<(Run, Vm)> {
    if case.members > 1 { team::ours(case, files) } else { ours::run(case, files) }
}

fn one_of_theirs(case: &Case, files: &GuestFiles, vm: &Vm, congestion: &str) -> Result<Run> {
    match case.members {
        0 | 1 => peer::run(case, files, vm, congestion),
        _ => team::theirs(case, files, vm, congestion),
    }
}

/// godwit and the peer in turns; `limits` are the case's promises on godwit's and the better peer's figures.
pub(super) fn compare(
    case: &Case,
    files: &GuestFiles,
    runs: u32,
    limits: impl Fn(&Value, &Value) -> Vec<Limit>,
) -> Result<Compared> {
    let mut invalid = link_faults(case)?;
    let mut godwit = Vec::new();
    let mut peers: Vec<(&str, Vec<Run>)> = vec![("cubic", Vec::new()), ("bbr", Vec::new())];
    let mut vm = None;
    for turn in 1..=runs {
        report::say(case.name, &format!("run {turn} of {runs}: godwit"));
        let (run, its_vm) =
            one_of_ours(case, files).with_context(|| format!("{}: godwit", case.name))?;
        report::say(case.name, &run.line());
        godwit.push(run);
        let its_vm = vm.insert(its_vm);
        for (congestion, runs_of_it) in &mut peers {
            report::say(case.name, &format!("run {turn} of {runs}: QEMU alone, {congestion}"));
            let run = one_of_theirs(case, files, its_vm, congestion)
                .with_context(|| format!("{}: QEMU alone", case.name))?;
            report::say(case.name, &run.line());
            runs_of_it.push(run);
        }
    }
    let vm = vm.context("no run")?;
    // The better of both, by what the case limits; an invalid one is never the better one.
    let judged = |runs: &[Run]| medians(runs)[case.judged_by].as_f64().unwrap_or(f64::INFINITY);
    peers.sort_by(|a, b| {
        let bad = |runs: &[Run]| !faults(runs).is_empty();
        (bad(&a.1), judged(&a.1))
            .partial_cmp(&(bad(&b.1), judged(&b.1)))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let (congestion, best) = &peers[0];
    let ours = side(&godwit, None)?;
    let mut theirs = side(best, Some(peer::tool(case, congestion, best)))?;
    if let Some((other, runs)) = peers.get(1) {
        theirs["worse"] = side(runs, Some(peer::tool(case, other, runs)))?;
    }
    let name = |fault: String| format!("{}: {fault}", case.name);
    invalid.extend(faults(&godwit).into_iter().map(|f| name(format!("godwit: {f}"))));
    invalid
        .extend(faults(best).into_iter().map(|f| name(format!("QEMU alone, {congestion}: {f}"))));
    let limits = limits(&ours, &theirs);
    let json = json!({
        "case": case.name,
        "godwit": ours,
        "peer": theirs,
        "ratio": report::ratios(&ours, &theirs),
        "limits": limits,
    });
    Ok(Compared { json, invalid, vm })
}

/// godwit alone with two disks, the second one larger: the same figures, `peer` being those with the smaller one.
pub(super) fn compare_disks(
    case: &Case,
    (small, large): (&GuestFiles, &GuestFiles),
    runs: u32,
    limits: impl Fn(&Value, &Value) -> Vec<Limit>,
) -> Result<Compared> {
    let (mut all, mut vm) = ([Vec::new(), Vec::new()], None);
    for turn in 1..=runs {
        for (runs_of_it, files) in all.iter_mut().zip([small, large]) {
            report::say(case.name, &format!("run {turn} of {runs}: {}", ours::image(files)));
            let (run, its_vm) = ours::run(case, files)?;
            report::say(case.name, &run.line());
            runs_of_it.push(run);
            vm = Some(its_vm);
        }
    }
    let invalid: Vec<String> = all.iter().flat_map(|runs| faults(runs)).collect();
    let tool = format!("godwit, {}", ours::image(small));
    let (theirs, ours) = (side(&all[0], Some(tool))?, side(&all[1], None)?);
    let json = json!({
        "case": case.name,
        "ratio": report::ratios(&ours, &theirs),
        "limits": limits(&ours, &theirs),
        "godwit": ours,
        "peer": theirs,
    });
    Ok(Compared { json, invalid, vm: vm.context("no run")? })
}

fn side(runs: &[Run], tool: Option<String>) -> Result<Value> {
    let mut side = medians(runs);
    if let Some(tool) = tool {
        side["tool"] = tool.into();
    }
    side["runs"] = serde_json::to_value(runs)?;
    Ok(side)
}

/// Why the emulated link is none to measure over: the kernel's TCP does not get its rate. A plain veth has none.
fn link_faults(case: &Case) -> Result<Vec<String>> {
    let config = case.lab();
    let WanMode::Shaped(params) = &config.wan else { return Ok(Vec::new()) };
    let lab = Lab::new(&config)?;
    let hosts = lab.hosts();
    let (from, to) = hosts.first().zip(hosts.last()).context("a lab without hosts")?;
    let checked = check::check_rate(&lab, from, to, params, RAMP, RATE)?;
    lab.teardown()?;
    let fault = format!("{}: the link is not what it should be: {checked}", case.name);
    Ok((checked["passed"] != true).then_some(fault).into_iter().collect())
}

/// Why these runs prove nothing; empty: they do.
fn faults(runs: &[Run]) -> Vec<String> {
    let mut found = Vec::new();
    for run in runs {
        if let Some(share) = run.link_use.filter(|share| *share < LINK_USE_MIN && run.is_peer) {
            found.push(format!("used {:.0} % of the link", share * 100.0));
        }
        if run.guest.content.nonzero_bytes < NONZERO_MIN {
            let mb = run.guest.content.nonzero_bytes / 1_000_000;
            found.push(format!("only {mb} MB of the guest's memory were not zero"));
        }
        if run.guest.pages_verified == 0 || run.guest.pages_corrupt > 0 {
            found.push(format!(
                "the guest verified {} pages, {} are corrupt",
                run.guest.pages_verified, run.guest.pages_corrupt
            ));
        }
    }
    found
}
