//! How fast a cluster crosses, and how much of a pause its members have, against as many QEMUs that migrate at once.
//!
//! Owns the case and what it promises. Disks are shared: memory crosses.

use anyhow::Result;
use serde_json::Value;

use super::versus::report::{Limit, against, limit, node_memory};
use super::versus::{Case, Options, chosen, compare, conclude};
use crate::guest::{Cache, GuestFiles, GuestKind};

const KNOWN: Case = Case {
    name: "churn-known",
    base_known: true,
    churn: (64, 1000),
    disk: None,
    back: false,
    shaped: true,
    members: 4,
    judged_by: "total_ms",
};

/// Two busybox guests, for a quick look on a busy machine: without a base image there is less to be known.
const SMALL: Case =
    Case { name: "small", base_known: false, churn: (16, 500), members: 2, ..KNOWN };

/// Runs the benchmark and prints a table. A missed limit is a figure (`passed` is false).
///
/// # Errors
/// If a side cannot be run, or a run proves nothing.
pub fn run(options: &Options<'_>) -> Result<()> {
    // The small one is no benchmark: it runs only when it is named.
    let case = if options.case == Some(SMALL.name) { &SMALL } else { &KNOWN };
    chosen(options, &[case.name])?;
    let kind = if case.base_known { GuestKind::Debian } else { GuestKind::Busybox };
    let files = GuestFiles::prepare(kind, &Cache::open()?)?;
    let done = compare(case, &files, options.runs, limits);
    conclude("cluster", vec![(case.name, done)], options)
}

/// What is promised.
fn limits(ours: &Value, theirs: &Value) -> Vec<Limit> {
    let own = |key: &str, most: f64| limit(key, ours[key].as_f64(), most);
    vec![
        own("outage_ms", 700.0),
        own("stop_spread_ms", 180.0),
        own("resume_spread_ms", 180.0),
        own("frames_lost", 0.0),
        own("frames_reordered", 0.0),
        against("wan_bytes", ours, theirs, 0.58),
        against("total_ms", ours, theirs, 0.60),
        node_memory(ours),
    ]
}
