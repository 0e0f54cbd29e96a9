//! What must hold after every fault.
//!
//! Owns the judgement, on facts alone: each rule that is broken is one line of the report.

use std::time::Duration;

use serde_json::{Value, json};

use super::case::{Case, Fault, Phase};
use super::world::World;
use crate::guest::wire::Verified;
use crate::lab::frames;
use crate::lab::qemus::{SeenQemu, double_runs};

/// A migration ends this long after its request at the latest.
pub const END: Duration = Duration::from_secs(90);
/// QEMUs that are not needed any more are gone this long after the end.
pub const TIDY: Duration = Duration::from_secs(45);
/// Pages that the guest's workload has at least.
const PAGES: u64 = 4_000;

/// What was seen of a case.
#[derive(Debug)]
pub struct Facts {
    /// The VM's name and number.
    pub vm: String,
    /// Last byte of its address.
    pub number: u8,
    /// Where it ran.
    pub source: String,
    /// Where it should go.
    pub destination: String,
    /// From before the request, microseconds since 1970.
    pub started_us: u64,
    /// To after the end.
    pub ended_us: u64,
    /// From the request to its end, milliseconds.
    pub ended_ms: u64,
    /// `godwit migrations` on the node that was asked.
    pub shown: Value,
    /// The guest's own check; none: it runs nowhere.
    pub verified: Option<Verified>,
}

/// The figures, `passed`, and one line for each rule that was broken.
pub fn judge(case: &Case, world: &World, facts: &Facts) -> Value {
    let copies = world.copies(&facts.vm);
    let double = double_runs(&copies);
    let shown = &facts.shown;
    let outcome = facts.shown["phase"].as_str().unwrap_or("unknown").to_owned();
    let cause = facts.shown["cause"].as_str().unwrap_or_default().to_owned();
    let left = world.frames.of(facts.number, facts.started_us, facts.ended_us);
    let order = frames::order(&left);
    let running: Vec<String> =
        copies.iter().filter(|q| q.runs()).filter_map(|q| world.host_of(q)).collect();
    let alive = copies.iter().filter(|q| q.alive()).count();
    let mut failures = double.clone();
    let mut check = |kept: bool, broken: String| {
        if !kept {
            failures.push(broken);
        }
    };
    let expected: Vec<&str> = match outcome.as_str() {
        "moved" => vec![&facts.destination],
        "stayed" => vec![&facts.source],
        _ => vec![],
    };
    check(running == expected, format!("{outcome}, but guests run on {running:?}"));
    check(alive == expected.len(), format!("{outcome}, but {alive} QEMUs are left"));
    check(outcome == "moved" || !cause.is_empty(), format!("{outcome} without a cause"));
    let may_be_lost = case.fault == Fault::DestinationQemu && case.phase == Phase::Running;
    check(outcome != "lost" || may_be_lost, format!("lost: {cause}"));
    let goes_on =
        case.fault == Fault::WanCut && matches!(case.phase, Phase::Transfer | Phase::Disk);
    check(!goes_on || outcome == "moved", "a cut in the transfer ended it".to_owned());
    let (starts, zeros) = (transfers(&copies, world, facts), zero_passes(shown));
    check(
        !goes_on || starts == [1, 1],
        format!("sent {} and received {} times", starts[0], starts[1]),
    );
    check(!goes_on || zeros < 1.5, format!("zero pages crossed {zeros:.1} times"));
    let chunks = ["chunks_zero", "chunks_known", "chunks_literal"].map(|key| shown[key].as_u64());
    let crossed: u64 = chunks.iter().flatten().sum();
    check(outcome != "moved" || crossed > 0, "moved, but what crossed is forgotten".to_owned());
    check(!case.back_first || outcome == "stayed", format!("{outcome}, decided twice?"));
    check(facts.ended_ms <= END.as_millis() as u64, format!("ended after {} ms", facts.ended_ms));
    let interleaved = is_interleaved(facts, &outcome, &order);
    check(!interleaved, format!("frames left from {order:?}"));
    let frames_double = interleaved && double.is_empty();
    check(left.len() >= 10, format!("only {} frames left the guest", left.len()));
    if let Some(v) = &facts.verified {
        check(v.pages_corrupt == 0, format!("{} pages are corrupt", v.pages_corrupt));
        check(v.pages_verified >= PAGES, format!("only {} pages verified", v.pages_verified));
    } else {
        check(outcome == "lost", "the guest's memory was not verified".to_owned());
    }
    json!({
        "passed": failures.is_empty(),
        "failures": failures,
        "outcome": outcome,
        "cause": cause,
        "ended_ms": facts.ended_ms,
        "downtime_ms": downtime_ms(&copies, facts),
        "double_runs": double.len() + usize::from(frames_double),
        "pages_verified": facts.verified.as_ref().map(|v| v.pages_verified),
        "pages_corrupt": facts.verified.as_ref().map(|v| v.pages_corrupt),
        "transfers": starts,
        "zero_passes": zeros,
        "chunks": chunks,
        "frames": left.len(),
        "frames_left_from": order,
        "runs_on": running,
    })
}

/// Whether frames left from hosts in another order than that in which the guest may have run there.
fn is_interleaved(facts: &Facts, outcome: &str, order: &[String]) -> bool {
    let straight = match outcome {
        "moved" | "lost" => vec![facts.source.clone(), facts.destination.clone()],
        _ => vec![facts.source.clone()],
    };
    !straight.starts_with(order) && *order != straight[straight.len() - 1..]
}

/// How often the source's QEMU began to send in this case, and how many QEMUs received.
fn transfers(copies: &[SeenQemu], world: &World, facts: &Facts) -> [usize; 2] {
    let on = |host: &str| {
        let here = |q: &&SeenQemu| world.host_of(q).as_deref() == Some(host);
        copies.iter().filter(here).collect::<Vec<_>>()
    };
    let begun = |(at, name): &&(u64, String)| *at >= facts.started_us && name == "MIGRATION setup";
    let sent = on(&facts.source).into_iter().flat_map(|q| &q.events).filter(begun).count();
    let received = on(&facts.destination).iter().filter(|q| q.seen_us >= facts.started_us).count();
    [sent, received]
}

/// How often the zero pages crossed, which only a new start would send again.
fn zero_passes(shown: &Value) -> f64 {
    let number = |key: &str| shown[key].as_f64().unwrap_or(0.0);
    let zeros = (number("ram_bytes") - number("ram_nonzero_bytes")) / 4096.0;
    if zeros > 0.0 { number("chunks_zero") / zeros } else { f64::INFINITY }
}

/// The longest time in the case in which no copy ran, between two in which one did.
fn downtime_ms(copies: &[SeenQemu], facts: &Facts) -> Option<u64> {
    let mut ran: Vec<(u64, u64)> = copies
        .iter()
        .flat_map(SeenQemu::ran)
        .map(|(from, to)| (from, to.unwrap_or(u64::MAX)))
        .filter(|(_, to)| *to >= facts.started_us)
        .collect();
    ran.sort_unstable();
    ran.windows(2).map(|pair| pair[1].0.saturating_sub(pair[0].1) / 1000).max()
}
