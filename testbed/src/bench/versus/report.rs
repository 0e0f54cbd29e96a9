//! Limits, ratios, and the table for people.
//!
//! Owns their forms. A figure that is missing passes no limit.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::Vm;

const MB: f64 = 1_000_000.0;

/// One promise and what was measured.
#[derive(Clone, Debug, Serialize)]
pub(in crate::bench) struct Limit {
    /// Which figure.
    pub what: String,
    /// As measured; none: not measured.
    pub value: Option<f64>,
    /// At most this.
    pub limit: f64,
    /// Kept.
    pub passed: bool,
}

/// A line while it runs.
pub(super) fn say(case: &str, line: &str) {
    println!("==> {case}: {line}");
}

fn ratio(ours: &Value, theirs: &Value, key: &str) -> Option<f64> {
    let (ours, theirs) = (ours[key].as_f64()?, theirs[key].as_f64()?);
    // Nothing moves in no time or for no bytes: such a figure is none.
    (ours > 0.0 && theirs > 0.0).then(|| ours / theirs)
}

/// godwit's figure over the peer's, for each that both have.
pub(super) fn ratios(ours: &Value, theirs: &Value) -> Value {
    let keys = ["wan_bytes", "total_ms", "downtime_ms", "outage_ms", "cpu_ms"];
    keys.iter().map(|key| ((*key).to_owned(), json!(ratio(ours, theirs, key)))).collect()
}

/// A promise about a figure.
pub(in crate::bench) fn limit(what: &str, value: Option<f64>, limit: f64) -> Limit {
    Limit { what: what.to_owned(), value, limit, passed: value.is_some_and(|v| v <= limit) }
}

/// A promise about godwit's figure over the peer's.
pub(in crate::bench) fn against(key: &str, ours: &Value, theirs: &Value, most: f64) -> Limit {
    limit(&format!("{key}, x the peer's"), ratio(ours, theirs, key), most)
}

/// What every case promises of a node's memory.
pub(in crate::bench) fn node_memory(ours: &Value) -> Limit {
    let growth = ours["node_rss_anon_above_idle_bytes"].as_f64().map(|b| b / MB);
    limit("node memory above idle, MB", growth, 150.0)
}

/// The machine that was measured on.
pub(super) fn machine(vm: &Vm) -> Result<Value> {
    let read = |path: &str| std::fs::read_to_string(path).with_context(|| path.to_owned());
    let meminfo = read("/proc/meminfo")?;
    let kib = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")?.split_whitespace().next());
    let memory_bytes = kib.and_then(|k| k.parse::<u64>().ok()).map(|k| k << 10);
    let qemu = std::process::Command::new("qemu-system-x86_64").arg("--version").output()?;
    let qemu = String::from_utf8_lossy(&qemu.stdout).lines().next().unwrap_or_default().to_owned();
    Ok(json!({
        "cores": std::thread::available_parallelism()?.get(),
        "memory_bytes": memory_bytes,
        "kernel": read("/proc/sys/kernel/osrelease")?.trim(),
        "qemu": qemu,
        "accel": vm.accel,
        "guest_machine": vm.machine,
        "guest_cpu": vm.cpu,
        "build": if cfg!(debug_assertions) { "dev" } else { "release" },
    }))
}

/// Prints the figures and the limits.
pub(super) fn table(all: &Value) {
    println!(
        "\n{:<12}{:<34}{:>9}{:>10}{:>12}{:>10}{:>10}",
        "case", "side", "WAN MB", "total ms", "downtime ms", "outage ms", "CPU ms"
    );
    let cases = all["cases"].as_array().map_or(&[][..], Vec::as_slice);
    for case in cases {
        let name = case["case"].as_str().unwrap_or_default();
        row(name, "godwit", &case["godwit"]);
        for side in [&case["peer"], &case["peer"]["worse"]] {
            if let Some(tool) = side["tool"].as_str() {
                row(name, tool, side);
            }
        }
    }
    println!();
    for case in cases {
        let name = case["case"].as_str().unwrap_or_default();
        for limit in case["limits"].as_array().map_or(&[][..], Vec::as_slice) {
            println!(
                "{} {name:<12}{:<32}{:>9} (at most {})",
                if limit["passed"] == true { "PASS" } else { "FAIL" },
                limit["what"].as_str().unwrap_or_default(),
                limit["value"].as_f64().map_or("-".to_owned(), |v| format!("{v:.2}")),
                limit["limit"],
            );
        }
    }
    for reason in all["invalid"].as_array().map_or(&[][..], Vec::as_slice) {
        println!("INVALID {}", reason.as_str().unwrap_or_default());
    }
}

fn row(case: &str, name: &str, side: &Value) {
    let cell = |key: &str, per: f64, digits: usize| {
        side[key].as_f64().map_or("-".to_owned(), |v| format!("{:.digits$}", v / per))
    };
    println!(
        "{case:<12}{name:<34}{:>9}{:>10}{:>12}{:>10}{:>10}",
        cell("wan_bytes", MB, 1),
        cell("total_ms", 1.0, 0),
        cell("downtime_ms", 1.0, 0),
        cell("outage_ms", 1.0, 0),
        cell("cpu_ms", 1.0, 0),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_compared_with_a_figure_that_is_missing() {
        let (ours, theirs) = (json!({"wan_bytes": 39}), json!({"wan_bytes": 100, "outage_ms": 1}));
        assert_eq!(ratios(&ours, &theirs)["wan_bytes"], json!(0.39));
        assert_eq!(ratios(&ours, &theirs)["outage_ms"], Value::Null);
        assert!(!against("outage_ms", &ours, &theirs, 9.0).passed);
    }
}
