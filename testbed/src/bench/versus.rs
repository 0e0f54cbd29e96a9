//! How fast a guest's memory crosses, against QEMU alone on the same link: cases, turns, limits.
//!
//! Owns the cases and what they promise. Both sides have a fresh lab and a fresh guest in every run and take turns.
//! Invariant: what is compared was counted by the link, by QEMU's events and by the guest's own check.

mod content;
mod figures;
mod ours;
mod peer;
mod report;
mod sampler;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::wan::{LinkParams, WanMode};
use figures::{Run, medians};
use report::{Limit, limits};

/// Guest memory, MiB.
const MEMORY_MIB: u32 = 512;
/// Between *the guest's agent answers* and the request, on both sides.
const SETTLE: Duration = Duration::from_secs(20);
/// Longest move on either side.
const MOVE: Duration = Duration::from_secs(300);
/// Least share of the link that a peer must use while it transfers.
const LINK_USE_MIN: f64 = 0.7;

/// One comparison.
#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    /// The destination knows the pristine base image.
    base_known: bool,
    /// MiB that the guest's workload fills, and thousands of bytes a second that it rewrites.
    churn: (u32, u32),
    /// 100 Mbit/s and 80 ms, or a plain veth.
    shaped: bool,
}

const CASES: [Case; 4] = [
    Case { name: "idle-known", base_known: true, churn: (2, 0), shaped: true },
    Case { name: "idle-empty", base_known: false, churn: (2, 0), shaped: true },
    Case { name: "churn", base_known: false, churn: (16, 1000), shaped: true },
    Case { name: "unshaped", base_known: false, churn: (2, 0), shaped: false },
];

impl Case {
    fn lab(&self) -> LabConfig {
        let wan =
            if self.shaped { WanMode::Shaped(LinkParams::new(100, 80)) } else { WanMode::Unshaped };
        LabConfig { wan, ..LabConfig::demo("benchram") }
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

/// Runs the benchmark and prints a table. A missed limit is a figure (`passed` is false); a run that proves nothing is an error, after
/// the figures were written.
///
/// # Errors
/// If a side cannot be run, or a run was invalid: the peer left the link idle, or a guest did not verify.
pub fn run(options: &Options<'_>) -> Result<()> {
    ensure!((1..=99).contains(&options.runs), "--runs is 1 to 99");
    let wanted: Vec<&Case> =
        CASES.iter().filter(|c| options.case.is_none_or(|name| name == c.name)).collect();
    ensure!(
        !wanted.is_empty(),
        "no case is called {}: there are {}",
        options.case.unwrap_or_default(),
        CASES.map(|c| c.name).join(", ")
    );
    let files = GuestFiles::prepare(GuestKind::Debian, &Cache::open()?)?;
    let mut cases = Vec::new();
    let mut invalid = Vec::new();
    let mut machine = Value::Null;
    for case in wanted {
        let done = compare(case, &files, options.runs)?;
        invalid.extend(done.invalid);
        machine = report::machine(&done.vm)?;
        cases.push(done.json);
    }
    let passed = invalid.is_empty()
        && cases.iter().flat_map(|c| c["limits"].as_array()).flatten().all(|l| l["passed"] == true);
    let all = json!({
        "bench": "ram", "machine": machine, "cases": cases, "passed": passed, "invalid": invalid,
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

struct Compared {
    json: Value,
    invalid: Vec<String>,
    vm: Vm,
}

fn compare(case: &Case, files: &GuestFiles, runs: u32) -> Result<Compared> {
    let mut godwit = Vec::new();
    let mut peers: Vec<(&str, Vec<Run>)> = vec![("cubic", Vec::new()), ("bbr", Vec::new())];
    let mut vm = None;
    for turn in 1..=runs {
        report::say(case.name, &format!("run {turn} of {runs}: godwit"));
        let (run, its_vm) =
            ours::run(case, files).with_context(|| format!("{}: godwit", case.name))?;
        report::say(case.name, &run.line());
        godwit.push(run);
        let its_vm = vm.insert(its_vm);
        for (congestion, runs_of_it) in &mut peers {
            report::say(case.name, &format!("run {turn} of {runs}: QEMU alone, {congestion}"));
            let run = peer::run(case, files, its_vm, congestion)
                .with_context(|| format!("{}: QEMU alone", case.name))?;
            report::say(case.name, &run.line());
            runs_of_it.push(run);
        }
    }
    let vm = vm.context("no run")?;
    // The better of both, by what the case limits; an invalid one is never the better one.
    let judged = |runs: &[Run]| {
        let key = if case.name == "churn" { "downtime_ms" } else { "total_ms" };
        medians(runs)[key].as_f64().unwrap_or(f64::INFINITY)
    };
    peers.sort_by(|a, b| {
        let bad = |runs: &[Run]| !faults(runs).is_empty();
        (bad(&a.1), judged(&a.1))
            .partial_cmp(&(bad(&b.1), judged(&b.1)))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let (congestion, best) = &peers[0];
    let side = |runs: &[Run], tool: Option<String>| -> Result<Value> {
        let mut side = medians(runs);
        if let Some(tool) = tool {
            side["tool"] = tool.into();
        }
        side["runs"] = serde_json::to_value(runs)?;
        Ok(side)
    };
    let ours = side(&godwit, None)?;
    let mut theirs = side(best, Some(peer::tool(case, congestion, best)))?;
    if let Some((other, runs)) = peers.get(1) {
        theirs["worse"] = side(runs, Some(peer::tool(case, other, runs)))?;
    }
    let name = |fault: String| format!("{}: {fault}", case.name);
    let mut invalid: Vec<String> =
        faults(&godwit).into_iter().map(|f| name(format!("godwit: {f}"))).collect();
    invalid
        .extend(faults(best).into_iter().map(|f| name(format!("QEMU alone, {congestion}: {f}"))));
    let limits: Vec<Limit> = limits(case.name, &ours, &theirs);
    let json = json!({
        "case": case.name,
        "godwit": ours,
        "peer": theirs,
        "ratio": report::ratios(&ours, &theirs),
        "limits": limits,
    });
    Ok(Compared { json, invalid, vm })
}

/// Why these runs prove nothing; empty: they do.
fn faults(runs: &[Run]) -> Vec<String> {
    let mut found = Vec::new();
    for run in runs {
        if let Some(share) = run.link_use.filter(|share| *share < LINK_USE_MIN && run.is_peer) {
            found.push(format!("used {:.0} % of the link", share * 100.0));
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
