//! Scenarios: what a user would do, done with real nodes, guests and links, and looked at from outside.
//!
//! Owns the runs and what they call passed. Invariant: what is judged was seen by the lab (its link, its prober, the
//! guest's own check), not told by a node.

pub mod acked;
pub mod cluster;
pub mod demo;
pub mod disks;
pub mod faults;
pub mod frames;
pub mod kvm;
pub mod mpi;
pub mod refusals;
pub mod roundtrip;
mod steps;
pub mod swarm;
pub mod wires;

use anyhow::{Context, Result};
use serde_json::Value;

pub use swarm::{Guest, Swarm};

/// A scenario: its name, what it shows, and the run. The report has `passed` (true or false) and the figures; a part
/// that this machine cannot do says *skipped: cause*.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Runs it.
    pub run: fn() -> Result<Value>,
}

/// All scenarios.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "cluster",
        about: "three guests move together, there and back, through an abort and a killed daemon (about a minute)",
        run: cluster::small,
    },
    Scenario {
        name: "cluster-off",
        about: "a member that has powered itself off moves with its cluster, and serves again (about two minutes)",
        run: cluster::off::off,
    },
    Scenario {
        name: "mpi",
        about: "a real Open MPI job on four Debian guests goes on while they move to another site and back (about ten minutes)",
        run: mpi::mpi,
    },
    Scenario {
        name: "cluster-faults",
        about: "kill -9 and a cut WAN at each step of a cluster's cutover, and voters that are split (about 25 minutes)",
        run: cluster::faults::full,
    },
    Scenario {
        name: "faults",
        about: "kill -9, a cut WAN and late accepts in every phase of a move (about 20 minutes)",
        run: faults::full,
    },
    Scenario {
        name: "disks",
        about: "a small guest's own disks move with it, or stay when they cannot (about two minutes)",
        run: disks::small,
    },
    Scenario {
        name: "disk-roundtrips",
        about: "twenty moves of a Debian guest with its disks: no acknowledged write is lost (about seven minutes)",
        run: disks::roundtrips::run_all,
    },
    Scenario {
        name: "disk-faults",
        about: "faults and refusals while disks move, under acknowledged writes (about 15 minutes)",
        run: disks::faults::run_all,
    },
    Scenario {
        name: "disk-resume",
        about: "a cut or a killed node at 10, 50 and 90 % of a disk: what crossed is not sent again (about 20 minutes)",
        run: disks::resume::run_all,
    },
    Scenario {
        name: "refusals",
        about: "bad input and hosts that cannot take a VM: one clear line each, nothing changed",
        run: refusals::refusals,
    },
    Scenario {
        name: "roundtrip",
        about: "there and back while somebody talks to the guest: abort, deadline, kill, cut, latency",
        run: roundtrip::roundtrip,
    },
    Scenario {
        name: "frames",
        about: "moves, aborts and stays while numbered frames go in and out: none lost, none out of order",
        run: frames::full,
    },
    Scenario {
        name: "wires",
        about: "a NIC is filtered, disconnected and connected while its guest runs and moves; an encrypted wire on a trusted LAN",
        run: wires::full,
    },
    Scenario {
        name: "kvm",
        about: "the bare guest moves under KVM, where /dev/kvm can run it",
        run: kvm::kvm,
    },
];

/// The scenario called `name`.
pub fn find(name: &str) -> Result<&'static Scenario> {
    ALL.iter().find(|s| s.name == name).with_context(|| {
        format!("no scenario is called {name}: see godwit-lab list for those there are")
    })
}

/// What did not pass of a report's steps or cases; the whole report if that is none of them.
#[must_use]
pub fn failed(report: &Value) -> Vec<&Value> {
    let parts = ["steps", "cases"].iter().filter_map(|parts| report[*parts].as_array()).flatten();
    let failed: Vec<_> = parts.filter(|part| part["passed"] != true).collect();
    if failed.is_empty() { vec![report] } else { failed }
}
