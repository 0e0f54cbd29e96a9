//! How fast a guest crosses with its disk, against QEMU alone on the same link.
//!
//! Owns the cases, the disk that they have and what they promise.

use anyhow::Result;
use serde_json::Value;

use super::versus::report::{Limit, against, limit};
use super::versus::{Case, Options, chosen, compare, compare_disks, conclude};
use crate::guest::{Cache, GuestFiles, GuestKind};

/// Size of the disk, GiB, and of the sparse one.
const DISK_GIB: [u64; 2] = [2, 20];
/// What of either is used before the guest boots, bytes.
const USED: u64 = 500_000_000;

const KNOWN: Case = Case {
    name: "known",
    base_known: true,
    churn: (2, 0),
    disk: Some(("/var/tmp/hot", 8, 1000)),
    back: false,
    shaped: true,
    members: 1,
    judged_by: "total_ms",
};

const CASES: [Case; 4] = [
    KNOWN,
    Case { name: "empty", base_known: false, ..KNOWN },
    Case { name: "back", base_known: false, back: true, ..KNOWN },
    Case { name: "sparse", base_known: false, ..KNOWN },
];

/// Runs the benchmark and prints a table. A missed limit is a figure (`passed` is false).
///
/// # Errors
/// If a side cannot be run, or a run proves nothing.
pub fn run(options: &Options<'_>) -> Result<()> {
    let wanted = chosen(options, &CASES.each_ref().map(|c| c.name))?;
    let cache = Cache::open()?;
    let debian = GuestFiles::prepare(GuestKind::Debian, &cache)?;
    let [small, sparse] = DISK_GIB.map(|gib| debian.on_larger_disk(&cache, gib, USED));
    let (small, sparse) = (small?, sparse?);
    let mut all = Vec::new();
    for case in CASES.iter().filter(|case| wanted.contains(&case.name)) {
        let limits = |ours: &Value, theirs: &Value| limits(case.name, ours, theirs);
        let compared = match case.name {
            "sparse" => compare_disks(case, (&small, &sparse), options.runs, limits),
            _ => compare(case, &small, options.runs, limits),
        };
        all.push((case.name, compared));
    }
    conclude("disk", all, options)
}

/// What the case promises.
fn limits(case: &str, ours: &Value, theirs: &Value) -> Vec<Limit> {
    let against = |key: &str, most: f64| against(key, ours, theirs, most);
    match case {
        "known" => vec![against("wan_bytes", 0.15), against("total_ms", 0.25)],
        "empty" => vec![against("wan_bytes", 0.45), against("total_ms", 0.50)],
        "back" => vec![against("wan_bytes", 0.08)],
        _ => {
            let key = "node_rss_anon_peak_bytes";
            let ratio = ours[key].as_f64().zip(theirs[key].as_f64()).map(|(o, t)| o / t);
            vec![limit("node memory, x that of the 2 GiB disk", ratio, 1.2)]
        }
    }
}
