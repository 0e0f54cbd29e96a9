//! Faults at each step of a cluster's cutover: who is killed or cut off, and when.
//!
//! Owns the matrix and the report. What a case does is `case`'s, voters that are split are `split`'s.

mod case;
mod judge;
mod split;

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

use self::case::{Case, Fault};
use super::world::{World, two_sites};
use crate::scenario::faults::case::Phase;

/// The members and where they start: the first one's host leads.
const MEMBERS: [(&str, &str); 2] = [("a", "h1"), ("b", "h2")];

/// The steps, as a member without disks goes through them. Every fault makes sense at each: from [`Phase::Running`] on that
/// of a destination's QEMU ends its guest.
const STEPS: [Phase; 10] = [
    Phase::Transfer,
    Phase::Ballot,
    Phase::Held,
    Phase::Stopped,
    Phase::Loaded,
    Phase::Decided,
    Phase::Tail,
    Phase::Running,
    Phase::Plugged,
    Phase::Turn,
];

/// Each fault at each step; those that may end a guest come last, because the others share theirs.
#[must_use]
fn matrix() -> Vec<Case> {
    let all = |fault| STEPS.map(|phase| Case { fault, phase });
    let mut cases: Vec<Case> = Fault::ALL.into_iter().flat_map(all).collect();
    cases.sort_by_key(Case::may_lose);
    cases
}

/// A few of them, and none that ends a guest.
#[must_use]
pub fn some() -> Vec<String> {
    let cases = [
        Case { fault: Fault::Lead, phase: Phase::Stopped },
        Case { fault: Fault::Destination, phase: Phase::Loaded },
        Case { fault: Fault::DestinationQemu, phase: Phase::Decided },
        Case { fault: Fault::WanCut, phase: Phase::Stopped },
    ];
    cases.iter().map(Case::name).collect()
}

/// `godwit-lab run cluster-faults`. With `GODWIT_LAB_CASE` only the cases whose name contains it.
pub fn full() -> Result<Value> {
    let wanted = std::env::var("GODWIT_LAB_CASE").unwrap_or_default();
    run("cfaults", &|name| name.contains(&wanted))
}

/// The cases whose names are wanted, one after the other: in one swarm as long as all is well, after a failure and after
/// what may have ended a guest in a new one.
///
/// # Errors
/// If the lab cannot be removed.
pub fn run(labid: &str, wanted: &dyn Fn(&str) -> bool) -> Result<Value> {
    let began = Instant::now();
    let mut world: Option<World> = None;
    let mut reports: Vec<Value> = Vec::new();
    let mut skipped: Vec<Value> = Vec::new();
    for case in matrix() {
        let name = case.name();
        if !wanted(&name) {
            skipped.push(json!({"case": name, "cause": "not asked for"}));
            continue;
        }
        println!("==> {name}");
        let report =
            one(labid, &mut world, &case).unwrap_or_else(|e| case.broken(&format!("{e:#}")));
        println!("    {report}");
        let spent = report["passed"] != true || case.may_lose();
        if spent && let Some(world) = world.take() {
            world.swarm.keep_logs(&name, &world.qemus);
            world.down()?;
        }
        reports.push(report);
    }
    if let Some(world) = world {
        world.down()?;
    }
    if wanted(split::NAME) {
        println!("==> {}", split::NAME);
        let report = split::run(labid).unwrap_or_else(|e| split::broken(&format!("{e:#}")));
        println!("    {report}");
        reports.push(report);
    } else {
        skipped.push(json!({"case": split::NAME, "cause": "not asked for"}));
    }
    let sum = |key: &str| reports.iter().filter_map(|r| r[key].as_u64()).sum::<u64>();
    Ok(json!({
        "passed": !reports.is_empty() && reports.iter().all(|r| r["passed"] == true),
        "runs": reports.len(),
        "seconds": began.elapsed().as_secs(),
        "double_runs": sum("double_runs"),
        "split_clusters": sum("split_clusters"),
        "corrupt_pages": sum("pages_corrupt"),
        "lost": reports.iter().filter(|r| r["outcome"] == "lost").count(),
        "skipped": skipped,
        "cases": reports,
    }))
}

fn one(labid: &str, world: &mut Option<World>, case: &Case) -> Result<Value> {
    if world.is_none() {
        // Nothing of a move is kept: the next one would be over before it is hit in its transfer.
        let mut fresh = World::up(&two_sites(labid, 80), &["--keep-bytes", "0"])?;
        fresh.populate(&MEMBERS)?;
        *world = Some(fresh);
    }
    match world {
        Some(world) => {
            for node in world.swarm.nodes() {
                node.forget_kept()?;
            }
            case.run(world)
        }
        None => anyhow::bail!("no world"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_meets_every_step_and_names_are_unique() {
        let names: std::collections::BTreeSet<_> = matrix().iter().map(Case::name).collect();
        assert_eq!((names.len(), matrix().len()), (7 * 10, 7 * 10));
        assert!(some().iter().all(|name| names.contains(name)));
    }
}
