//! Faults: what is killed, cut or delayed in each phase of a move, and what must hold afterwards.
//!
//! Owns the matrix and the report. Invariant: what is judged was seen from outside the nodes (the events of every QEMU,
//! the taps, the guest's own check); of the nodes' words only the shown outcome is, and it must agree.

pub(super) mod act;
pub(super) mod case;
mod checks;
pub(super) mod follow;
pub(super) mod world;

use anyhow::Result;
use serde_json::{Value, json};

pub use case::{Case, Fault, Phase};
use world::{Cast, World};

/// The whole matrix.
#[must_use]
pub fn matrix() -> Vec<Case> {
    let mut cases = Vec::new();
    for phase in Phase::ALL {
        let faults = [
            Fault::WanCut,
            Fault::RequestingNode,
            Fault::SourceNode,
            Fault::DestinationNode,
            Fault::DestinationQemu,
        ];
        cases.extend(faults.map(|fault| Case::new(fault, phase)));
    }
    // A source node that comes back while the destination still stands at the point asks the voters first.
    cases.push(Case { back_first: true, ..Case::new(Fault::SourceNode, Phase::Stopped) });
    cases.push(Case { back_first: true, ..Case::new(Fault::SourceNode, Phase::Loaded) });
    // Later than the proposal, earlier than any end gives up waiting; then later than that.
    cases.push(Case::new(Fault::LateAccept { ms: 8_000 }, Phase::Loaded));
    cases.push(Case::new(Fault::LateAccept { ms: 25_000 }, Phase::Loaded));
    // The one that may end the VM comes last: the others share a guest.
    let ends = |case: &Case| case.fault == Fault::DestinationQemu && case.phase == Phase::Running;
    cases.sort_by_key(ends);
    cases
}

/// Each fault once.
#[must_use]
pub fn once_each() -> Vec<Case> {
    vec![
        Case::new(Fault::WanCut, Phase::Transfer),
        Case::new(Fault::RequestingNode, Phase::Transfer),
        Case::new(Fault::SourceNode, Phase::Stopped),
        Case::new(Fault::DestinationNode, Phase::Loaded),
        Case::new(Fault::DestinationQemu, Phase::Decided),
        Case::new(Fault::LateAccept { ms: 3_000 }, Phase::Loaded),
    ]
}

/// `godwit-lab run faults`. With `GODWIT_LAB_CASE` only the cases whose name contains it.
pub fn full() -> Result<Value> {
    let wanted = std::env::var("GODWIT_LAB_CASE").unwrap_or_default();
    let (cases, left): (Vec<_>, Vec<_>) =
        matrix().into_iter().partition(|case| case.name().contains(&wanted));
    let skipped = left.iter().map(|case| json!({"case": case.name(), "cause": "not asked for"}));
    run("faults", &cases, skipped.collect())
}

/// Runs the cases one after the other, in one swarm as long as all is well; after a failure in a new one.
pub fn run(labid: &str, cases: &[Case], skipped: Vec<Value>) -> Result<Value> {
    let mut world: Option<World> = None;
    let mut reports: Vec<Value> = Vec::new();
    for case in cases {
        println!("==> {}", case.name());
        let outcome = one(labid, &mut world, case);
        let report = outcome.unwrap_or_else(|error| case.broken(&format!("{error:#}")));
        println!("    {report}");
        if report["passed"] != true
            && let Some(world) = world.take()
        {
            world.keep_logs(&case.name());
            world.down()?;
        }
        reports.push(report);
    }
    if let Some(world) = world {
        world.down()?;
    }
    let sum = |key: &str| reports.iter().filter_map(|r| r[key].as_u64()).sum::<u64>();
    let lost = reports.iter().filter(|r| r["outcome"] == "lost").count();
    Ok(json!({
        "passed": !reports.is_empty() && reports.iter().all(|r| r["passed"] == true),
        "runs": reports.len(),
        "double_runs": sum("double_runs"),
        "corrupt_pages": sum("pages_corrupt"),
        "lost": lost,
        "skipped": skipped,
        "cases": reports,
    }))
}

fn one(labid: &str, world: &mut Option<World>, case: &Case) -> Result<Value> {
    let ready = match world.take() {
        Some(ready) => ready,
        None => World::up(labid, Cast::plain())?,
    };
    case.run(world.insert(ready))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_meets_every_phase_and_names_are_unique() {
        let cases = matrix();
        assert_eq!(cases.len(), 5 * 5 + 4);
        let names: std::collections::BTreeSet<_> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), cases.len());
    }
}
