//! What must hold after every fault: all members moved or all stayed, none runs twice, memory is whole.
//!
//! Owns the judgement, on facts alone: each rule that is broken is one line of the report.

use std::time::Duration;

use serde_json::{Value, json};

use super::case::Case;
use crate::guest::wire::Verified;
use crate::lab::frames;
use crate::lab::qemus::double_runs;
use crate::scenario::cluster::world::World;
use crate::scenario::faults::world::REQUESTER;

/// A migration ends this long after its request at the latest.
pub const END: Duration = Duration::from_secs(120);
/// QEMUs that are not needed any more are gone this long after the end.
pub const TIDY: Duration = Duration::from_secs(20);
/// Pages that each guest's workload has at least.
const PAGES: u64 = 4_000;

/// What was seen of a case; members in order.
#[derive(Debug)]
pub struct Facts {
    /// Where each ran.
    pub from: Vec<String>,
    /// Where each should go.
    pub to: Vec<String>,
    /// From before the request, microseconds since 1970.
    pub started_us: u64,
    /// To after the end.
    pub ended_us: u64,
    /// From the request to its end, milliseconds.
    pub ended_ms: u64,
    /// `godwit migrations` on the node that was asked.
    pub shown: Value,
    /// Where each runs now, by its QEMU's events.
    pub runs_on: Vec<Option<String>>,
    /// Each guest's own check; none: it runs nowhere.
    pub verified: Vec<Option<Verified>>,
}

/// The figures, `passed`, and one line for each rule that was broken.
pub fn judge(case: &Case, world: &World, facts: &Facts) -> Value {
    let outcome = facts.shown["phase"].as_str().unwrap_or("unknown").to_owned();
    let moved = outcome != "stayed";
    let mut failures = Vec::new();
    let mut check = |kept: bool, broken: String| {
        if !kept {
            failures.push(broken);
        }
    };
    check(
        matches!(outcome.as_str(), "moved" | "stayed") || (outcome == "lost" && case.may_lose()),
        format!("ended as {outcome}"),
    );
    check(facts.ended_ms <= END.as_millis() as u64, format!("ended after {} ms", facts.ended_ms));
    let (mut double, mut corrupt, mut verified) = (0, 0, 0);
    let mut sides = Vec::new();
    for (at, guest) in world.guests.iter().enumerate() {
        let vm = &guest.name;
        let copies = world.copies(vm);
        let twice = double_runs(&copies);
        double += twice.len();
        twice.into_iter().for_each(|line| check(false, line));
        let (from, to) = (&facts.from[at], &facts.to[at]);
        let left = world.frames.of(guest.plan.number, facts.started_us, facts.ended_us);
        let order = frames::order(&left);
        let straight = if moved { vec![from.clone(), to.clone()] } else { vec![from.clone()] };
        let fits = straight.starts_with(&order) || order == straight[straight.len() - 1..];
        check(fits, format!("{vm}: frames left from {order:?}"));
        double += usize::from(!fits);
        check(left.len() >= 10, format!("{vm}: only {} frames left it", left.len()));
        let Some(host) = &facts.runs_on[at] else {
            // Its QEMU was killed when it had run: before or after that was told.
            check(moved && case.may_lose(), format!("{vm} runs nowhere"));
            continue;
        };
        sides.push(host == to);
        check(host == if moved { to } else { from }, format!("{vm} runs on {host}: {outcome}"));
        let alive = copies.iter().filter(|q| q.alive()).count();
        check(alive == 1, format!("{vm}: {alive} QEMUs live"));
        let Some(v) = &facts.verified[at] else { continue };
        (corrupt, verified) = (corrupt + v.pages_corrupt, verified + v.pages_verified);
        check(v.pages_corrupt == 0, format!("{vm}: {} pages are corrupt", v.pages_corrupt));
        check(v.pages_verified >= PAGES, format!("{vm}: only {} pages", v.pages_verified));
    }
    let split = sides.iter().any(|side| *side != sides[0]);
    check(!split, "some members moved and some stayed".to_owned());
    let named = named(world);
    let expected = if moved { &facts.to } else { &facts.from };
    check(&named == expected, format!("the record names {named:?}"));
    json!({
        "passed": failures.is_empty(),
        "failures": failures,
        "outcome": outcome,
        "cause": facts.shown["cause"],
        "ended_ms": facts.ended_ms,
        "downtime_us": facts.shown["downtime_us"],
        "stop_spread_us": facts.shown["stop_spread_us"],
        "double_runs": double,
        "split_clusters": usize::from(split),
        "pages_verified": verified,
        "pages_corrupt": corrupt,
        "runs_on": facts.runs_on,
    })
}

/// The hosts that the newest record names, as the node that was asked knows it.
fn named(world: &World) -> Vec<String> {
    let shown = world.cluster(REQUESTER).unwrap_or_default();
    let members = shown["members"].as_array().into_iter().flatten();
    members.filter_map(|m| m["host"].as_str().map(Into::into)).collect()
}
