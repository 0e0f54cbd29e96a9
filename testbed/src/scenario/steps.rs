//! Steps of a scenario: each is done, timed, shown and kept for the report.
//!
//! Owns their form. A step that fails ends nothing: what comes after it is looked at, too.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

/// What was done so far.
#[derive(Default)]
pub struct Steps(Vec<Value>);

impl Steps {
    /// Does one; whether it passed.
    pub fn step(&mut self, name: &str, work: impl FnOnce() -> Result<Value>) -> bool {
        let began = Instant::now();
        let (passed, figures) = match work() {
            Ok(figures) => (true, figures),
            Err(cause) => (false, json!({"cause": format!("{cause:#}")})),
        };
        let mark = if passed { "ok  " } else { "FAIL" };
        println!("{mark} {name} ({:.1} s): {figures}", began.elapsed().as_secs_f64());
        self.0.push(json!({"step": name, "passed": passed, "figures": figures}));
        passed
    }

    /// Whether all passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.0.iter().all(|step| step["passed"] == true)
    }

    /// For the report.
    #[must_use]
    pub fn report(self) -> Vec<Value> {
        self.0
    }
}
