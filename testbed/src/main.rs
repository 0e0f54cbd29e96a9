//! `godwit-lab`: runs the lab, its scenarios and its benchmarks.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use godwit_testbed::bench;
use godwit_testbed::guest::GuestKind;
use godwit_testbed::lab::wan::LinkParams;
use godwit_testbed::lab::{self, Lab, LabConfig};
use godwit_testbed::scenario::{self, demo};
use godwit_testbed::sim::campaign;
use godwit_testbed::sim::explore::{Bounds, Explorer, Flaw, contested};

#[derive(Parser)]
#[command(name = "godwit-lab", version, about = "Lab, scenarios and benchmarks of godwit")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Name the scenarios
    List,
    /// Run one scenario and write its figures
    Run {
        /// Its name
        name: String,
        /// Write the report to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Move two real guests together between two sites while somebody talks to them, and print what happened
    Demo {
        /// Write the report to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
        /// Use the small busybox guest instead of Debian
        #[arg(long)]
        small: bool,
    },
    /// Check the emulated WAN against the kernel's TCP, a UDP echo and its own counters
    WanCheck {
        /// Rate of the link in Mbit/s, each direction
        #[arg(long, default_value_t = 100)]
        mbit: u64,
        /// Round trip of the link in milliseconds
        #[arg(long, default_value_t = 80)]
        rtt_ms: u64,
        /// Write the figures to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Run the production core under seeds: faults, crashes, partitions; and prove that its checkers bite
    Sim {
        /// How many seeds
        #[arg(long, default_value_t = 1000)]
        seeds: u64,
        /// How many hosts a change of a route has to reach
        #[arg(long, default_value_t = 1000)]
        swarm: usize,
        /// Run this seed alone and tell what it saw
        #[arg(long)]
        seed: Option<u64>,
        /// With something wrong on purpose (names are in the report)
        #[arg(long, requires = "seed")]
        mutant: Option<String>,
        /// Tell everything that happens in it
        #[arg(long, requires = "seed")]
        log: bool,
        /// Write the report to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Try every order of events of one decision: three voters, of whom two contest it
    Explore {
        /// How many nodes die and start again, anywhere
        #[arg(long, default_value_t = 1)]
        crashes: u8,
        /// How many timers ring
        #[arg(long, default_value_t = 0)]
        timers: u8,
        /// How many messages come twice
        #[arg(long, default_value_t = 0)]
        doubles: u8,
        /// The search is cut off at so many states (it fails)
        #[arg(long, default_value_t = 100_000_000)]
        most: usize,
        /// Write the report to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Measure something and write the figures
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Build the demo's lab (h1 and h3 in paris, h2 in tokyo) and keep it until Ctrl-C
    Hold {
        /// Id of the lab
        labid: String,
    },
    /// Remove whatever an earlier run of the lab LABID left behind
    Cleanup {
        /// Id of the lab
        labid: String,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// Move a Debian guest's memory, in turns with QEMU alone (about four minutes a case and run)
    Ram {
        /// Write the figures to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
        /// Only this case: idle-known, idle-empty, churn or unshaped
        #[arg(long)]
        case: Option<String>,
        /// Runs of each side and case
        #[arg(long, default_value_t = 1)]
        runs: u32,
    },
    /// Move a Debian guest with its disk, in turns with QEMU alone (about eight minutes a case and run)
    Disk {
        /// Write the figures to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
        /// Only this case: known, empty, back or sparse
        #[arg(long)]
        case: Option<String>,
        /// Runs of each side and case
        #[arg(long, default_value_t = 1)]
        runs: u32,
    },
    /// Move four Debian guests together, in turns with QEMUs alone (about ten minutes a run)
    Cluster {
        /// Write the figures to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
        /// Only this case: churn-known, or small (two small guests)
        #[arg(long)]
        case: Option<String>,
        /// Runs of each side
        #[arg(long, default_value_t = 1)]
        runs: u32,
    },
    /// Frames between two hosts of a site, by VXLAN and encrypted, against a plain veth (about half a minute a run)
    Wire {
        /// Write the figures to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
        /// Runs of each side
        #[arg(long, default_value_t = 3)]
        runs: u32,
    },
    /// Compare transports for one bulk stream over emulated links and a veth (about five minutes)
    Transport {
        /// Write the figures to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints a report, and writes it to a file if one is named.
fn show(report: &serde_json::Value, json: Option<&std::path::Path>) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    println!("{text}");
    let Some(path) = json else { return Ok(()) };
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// What is reported of a run that came to no figures.
fn failed(scenario: &str, error: &anyhow::Error) -> serde_json::Value {
    serde_json::json!({"scenario": scenario, "passed": false, "error": format!("{error:#}")})
}

/// Runs one benchmark.
fn measure(what: Bench) -> anyhow::Result<()> {
    fn options<'a>(
        case: &'a Option<String>,
        runs: u32,
        json: &'a Option<PathBuf>,
    ) -> bench::versus::Options<'a> {
        bench::versus::Options { case: case.as_deref(), runs, json: json.as_deref() }
    }
    match what {
        Bench::Ram { json, case, runs } => bench::ram::run(&options(&case, runs, &json)),
        Bench::Disk { json, case, runs } => bench::disk::run(&options(&case, runs, &json)),
        Bench::Cluster { json, case, runs } => bench::cluster::run(&options(&case, runs, &json)),
        Bench::Wire { json, runs } => show(&bench::wire::run(runs)?, json.as_deref()),
        Bench::Transport { json } => show(&bench::transport::run()?, json.as_deref()),
    }
}

/// Runs one command; false means that it ran and did not pass.
fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::List => {
            for scenario in scenario::ALL {
                println!("{:<16} {}", scenario.name, scenario.about);
            }
            Ok(true)
        }
        Command::Run { name, json } => {
            // A file of an earlier run must not be taken for this one's.
            let report = (scenario::find(&name)?.run)().unwrap_or_else(|e| failed(&name, &e));
            show(&report, json.as_deref())?;
            Ok(report["passed"] == true || report["skipped"].is_string())
        }
        Command::Demo { json, small } => {
            let kind = if small { GuestKind::Busybox } else { GuestKind::Debian };
            let done = demo::demo(&demo::Options { kind, json: json.as_deref() });
            if let Err(error) = &done {
                show(&failed("demo", error), json.as_deref())?;
            }
            done
        }
        Command::WanCheck { mbit, rtt_ms, json } => {
            let value = lab::check::wan_check_of("wancheck", &LinkParams::new(mbit, rtt_ms))?;
            show(&value, json.as_deref())?;
            Ok(value["passed"] == true)
        }
        Command::Sim { seeds, swarm, seed, mutant, log, json } => {
            let report = match seed {
                Some(seed) => campaign::replay(seed, mutant.as_deref(), log)?,
                None => campaign::report(seeds, swarm),
            };
            show(&report, json.as_deref())?;
            Ok(report["passed"] == true)
        }
        Command::Explore { crashes, timers, doubles, most, json } => {
            let bounds = Bounds { crashes, timers, doubles };
            let found = Explorer::new(contested(bounds, Flaw::None), most).run();
            show(&serde_json::to_value(&found)?, json.as_deref())?;
            Ok(found.breach.is_none() && !found.truncated)
        }
        Command::Bench { what } => measure(what).map(|()| true),
        Command::Hold { labid } => {
            let lab = Lab::new(&LabConfig::demo(&labid))?;
            for host in lab.hosts() {
                println!(
                    "{} {} {}: ip netns exec {}",
                    host.name,
                    host.site,
                    host.addr,
                    host.ns.name()
                );
            }
            println!("ready");
            // The signal handler removes the lab and ends the process.
            loop {
                std::thread::park();
            }
        }
        Command::Cleanup { labid } => {
            let swept = lab::cleanup::sweep_unlocked(&labid)?;
            println!("{swept}");
            Ok(true)
        }
    }
}
