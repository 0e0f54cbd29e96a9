//! How fast a guest's memory crosses, against QEMU alone on the same link.
//!
//! Owns the cases and what they promise. The disk is shared.

use anyhow::Result;
use serde_json::Value;

use super::versus::report::{Limit, against, limit, node_memory};
use super::versus::{Case, Options, chosen, compare, conclude};
use crate::guest::{Cache, GuestFiles, GuestKind};

const IDLE: Case = Case {
    name: "idle-known",
    base_known: true,
    churn: (2, 0),
    disk: None,
    back: false,
    shaped: true,
    members: 1,
    judged_by: "total_ms",
};

const CASES: [Case; 4] = [
    IDLE,
    Case { name: "idle-empty", base_known: false, ..IDLE },
    Case { name: "churn", base_known: false, churn: (16, 1000), judged_by: "downtime_ms", ..IDLE },
    Case { name: "unshaped", base_known: false, shaped: false, ..IDLE },
];

/// Runs the benchmark and prints a table. A missed limit is a figure (`passed` is false).
///
/// # Errors
/// If a side cannot be run, or a run proves nothing.
pub fn run(options: &Options<'_>) -> Result<()> {
    let wanted = chosen(options, &CASES.each_ref().map(|c| c.name))?;
    let files = GuestFiles::prepare(GuestKind::Debian, &Cache::open()?)?;
    let mut all = Vec::new();
    for case in CASES.iter().filter(|case| wanted.contains(&case.name)) {
        all.push((case.name, compare(case, &files, options.runs, |o, t| limits(case.name, o, t))));
    }
    conclude("ram", all, options)
}

/// What the case promises.
fn limits(case: &str, ours: &Value, theirs: &Value) -> Vec<Limit> {
    let mut all = match case {
        "idle-known" => {
            vec![against("wan_bytes", ours, theirs, 0.40), against("total_ms", ours, theirs, 0.55)]
        }
        "idle-empty" => {
            vec![against("wan_bytes", ours, theirs, 0.90), against("total_ms", ours, theirs, 0.95)]
        }
        "churn" => vec![
            limit("downtime_ms", ours["downtime_ms"].as_f64(), 600.0),
            against("downtime_ms", ours, theirs, 1.3),
        ],
        _ => vec![against("total_ms", ours, theirs, 2.0)],
    };
    all.push(node_memory(ours));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_missing_figure_passes_no_limit() {
        let ours =
            json!({"wan_bytes": 39, "total_ms": 50.0, "node_rss_anon_above_idle_bytes": null});
        let theirs = json!({"wan_bytes": 100, "total_ms": 100.0});
        let passed: Vec<bool> =
            limits("idle-known", &ours, &theirs).iter().map(|l| l.passed).collect();
        assert_eq!(passed, [true, true, false]);
    }
}
