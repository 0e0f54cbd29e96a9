//! `godwit-lab`: runs the lab, its scenarios and its benchmarks.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "godwit-lab", version, about = "Lab, scenarios and benchmarks of godwit")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check the emulated WAN against the kernel's TCP, a UDP echo and its own counters
    WanCheck {
        /// Write the figures to this file, too
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Remove whatever an earlier run of the lab LABID left behind
    Cleanup {
        /// Id of the lab
        labid: String,
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

/// Runs one command; false means that it ran and did not pass.
fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::WanCheck { json } => {
            let value = godwit_testbed::lab::check::wan_check()?;
            let text = serde_json::to_string_pretty(&value)?;
            println!("{text}");
            if let Some(path) = json {
                std::fs::write(&path, text)
                    .with_context(|| format!("writing {}", path.display()))?;
            }
            Ok(value["passed"] == true)
        }
        Command::Cleanup { labid } => {
            let swept = godwit_testbed::lab::cleanup::sweep_unlocked(&labid)?;
            println!("{swept}");
            Ok(true)
        }
    }
}
