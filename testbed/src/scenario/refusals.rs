//! What must be refused: each with one clear line that says what to do, and nothing is changed by it.
//!
//! Owns the cases. What "nothing" means is looked at from outside: processes, devices and directories of every host.

mod cases;
mod footprint;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::swarm::{GuestPlan, Swarm, run};
use crate::guest::{Cache, GuestFiles, GuestKind, old_qemu};
use crate::lab::node::CliOutput;
use crate::lab::wan::{LinkParams, WanMode};
use crate::lab::{LabConfig, SiteConfig};
use footprint::Footprint;

/// How long what a refused attempt had begun may take to be gone.
const SETTLE: Duration = Duration::from_secs(60);
/// How long a command may take here.
const COMMAND: Duration = Duration::from_secs(60);
/// Memory of the guests, MiB; the small host lends less.
const MEMORY: u32 = 64;

/// What a refusal has to look like.
struct Expect {
    /// Exit code: 1 refused, 2 wrong usage, 3 the migration ended as *stayed*.
    code: i32,
    /// What the line and its hint say, each somewhere.
    says: &'static [&'static str],
}

/// One attempt, and what is wrong with how it was refused.
struct Judge {
    results: Vec<Value>,
}

impl Judge {
    fn judge(&mut self, name: &str, expect: &Expect, out: &CliOutput, changed: Option<String>) {
        let mut wrong = Vec::new();
        if out.code != expect.code {
            wrong.push(format!("exit code {} in place of {}", out.code, expect.code));
        }
        let said = said(out);
        // The daemon's log goes to the same place; `error:` is the answer.
        let lines: Vec<&str> = said.lines().collect();
        let answers =
            lines.iter().filter(|l| l.starts_with("error: ") || l.starts_with("stayed: "));
        if answers.count() != 1 {
            wrong.push("not one line of cause".to_owned());
        }
        for word in expect.says {
            if !said.contains(word) {
                wrong.push(format!("does not say {word:?}"));
            }
        }
        for bad in ["panicked", "backtrace", "RUST_", "\u{1b}["] {
            if said.contains(bad) {
                wrong.push(format!("shows {bad:?}"));
            }
        }
        wrong.extend(changed.map(|c| format!("changed: {c}")));
        let mark = if wrong.is_empty() { "ok  " } else { "FAIL" };
        println!("{mark} {name}: {}", said.trim().replace('\n', " / "));
        for fault in &wrong {
            println!("     {fault}");
        }
        self.results.push(json!({
            "case": name, "passed": wrong.is_empty(), "said": said.trim(), "wrong": wrong,
        }));
    }

    fn skip(&mut self, name: &str, cause: &str) {
        println!("skip {name}: {cause}");
        self.results.push(json!({"case": name, "skipped": cause}));
    }
}

/// Everything for people that a command printed, progress apart.
fn said(out: &CliOutput) -> String {
    let progress = |line: &&str| line.trim_start().split_once(" %  ").is_none();
    let own: Vec<&str> = out.stderr.lines().chain(out.stdout.lines()).filter(progress).collect();
    own.join("\n")
}

/// The swarm of the scenario and what the cases need.
struct World {
    swarm: Swarm,
    files: GuestFiles,
    old: Result<PathBuf>,
}

/// Runs all cases.
pub fn refusals() -> Result<Value> {
    let cache = Cache::open()?;
    let files = GuestFiles::prepare(GuestKind::Bare, &cache)?;
    let old = old_qemu(&cache);
    let config = LabConfig {
        labid: "refuse".into(),
        sites: vec![
            SiteConfig::new("paris", &["h1", "h3"]),
            SiteConfig::new("tokyo", &["small", "old"]),
        ],
        wan: WanMode::Shaped(LinkParams::new(100, 20)),
    };
    let swarm = Swarm::up(&config, |node| {
        node.arg("--accel").arg("tcg");
        match (node.host().name.as_str(), &old) {
            ("small", _) => drop(node.arg("--memory-limit").arg("32M")),
            ("old", Ok(program)) => drop(node.arg("--qemu").arg(&program.to_string_lossy())),
            _ => {}
        }
    })?;
    let world = World { swarm, files, old };
    let mut judge = Judge { results: Vec::new() };
    let web = world.guest("web", 5, None, None)?;
    cases::specs(&world, &mut judge)?;
    cases::names(&world, &mut judge)?;
    cases::tokens(&world, &mut judge)?;
    cases::daemons(&world, &mut judge)?;
    cases::destinations(&world, &mut judge)?;
    cases::moving(&world, &web, &mut judge)?;
    let verified = run(async { world.swarm.control("h1", &web)?.verify().await })?;
    ensure!(verified.pages_corrupt == 0, "the guest's memory was changed");
    world.swarm.down()?;
    let passed = judge.results.iter().all(|r| r["passed"] != false);
    Ok(json!({
        "scenario": "refusals",
        "passed": passed,
        "pages_verified": verified.pages_verified,
        "pages_corrupt": verified.pages_corrupt,
        "cases": judge.results,
    }))
}

impl World {
    /// A guest on h1 that needs no boot.
    fn guest(
        &self,
        name: &str,
        number: u8,
        machine: Option<&str>,
        cpu: Option<&str>,
    ) -> Result<super::Guest> {
        let plan = GuestPlan {
            machine: machine.map(str::to_owned),
            cpu: cpu.map(str::to_owned),
            ..GuestPlan::new(name, number, MEMORY)
        };
        self.swarm.start_guest("h1", &self.files, &plan)
    }

    /// Runs a command on a host that must be refused, and looks for what it left behind.
    fn refused(
        &self,
        judge: &mut Judge,
        name: &str,
        (host, args): (&str, &[&str]),
        expect: &Expect,
    ) -> Result<()> {
        let before = Footprint::take(&self.swarm)?;
        let out = self.swarm.node(host)?.cli(args, COMMAND)?;
        judge.judge(name, expect, &out, self.changed(&before)?);
        Ok(())
    }

    /// What is different from `before` and stays so.
    fn changed(&self, before: &Footprint) -> Result<Option<String>> {
        let end = Instant::now() + SETTLE;
        loop {
            let changed = before.differs(&Footprint::take(&self.swarm)?);
            if changed.is_none() || Instant::now() > end {
                return Ok(changed);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Writes a specification and gives its path.
    fn spec(&self, name: &str, text: &str) -> Result<String> {
        let path = self.swarm.lab.dir().join(name);
        std::fs::write(&path, text)?;
        Ok(path.to_str().context("path")?.to_owned())
    }
}
