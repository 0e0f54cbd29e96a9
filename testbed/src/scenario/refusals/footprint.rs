//! What a swarm has in the world: to be compared before and after something that must change nothing.
//!
//! Owns the comparison. Reads directories, devices and processes; asks a node only where its VM is.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};

use crate::lab::cleanup::leftovers;
use crate::scenario::Swarm;

/// Everything that a refused attempt might leave.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Footprint {
    /// By host and kind: copies' directories, network devices.
    things: BTreeMap<(String, &'static str), BTreeSet<String>>,
    /// QEMUs of the lab.
    qemus: BTreeSet<i32>,
    /// By VM: where it runs, in which epoch, in which state.
    vms: BTreeMap<String, String>,
}

impl Footprint {
    pub fn take(swarm: &Swarm) -> Result<Self> {
        let mut things = BTreeMap::new();
        for node in swarm.nodes() {
            let host = node.host();
            let copies = entries(&node.state_dir().join("vm"));
            things.insert((host.name.clone(), "copies"), copies);
            let links = host.ns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
            let names = links.lines().skip(2).filter_map(|l| Some(l.split_once(':')?.0.trim()));
            things.insert((host.name.clone(), "devices"), names.map(str::to_owned).collect());
        }
        let mut vms = BTreeMap::new();
        let listed = swarm.ask("h1", &["vm", "list"])?;
        for vm in listed.as_array().context("no list")? {
            let text = format!(
                "{} epoch {} copy {} pid {} {}",
                vm["host"], vm["epoch"], vm["copy"], vm["pid"], vm["state"]
            );
            vms.insert(vm["name"].to_string(), text);
        }
        let lab = leftovers(swarm.lab.labid())?;
        Ok(Self { things, qemus: lab.pids.into_iter().filter(|pid| is_qemu(*pid)).collect(), vms })
    }

    /// The first difference, if there is one.
    pub fn differs(&self, later: &Self) -> Option<String> {
        for (key, before) in &self.things {
            let after = later.things.get(key)?;
            if before != after {
                return Some(format!("{} of {}: {before:?}, then {after:?}", key.1, key.0));
            }
        }
        if self.qemus != later.qemus {
            return Some(format!("QEMUs: {:?}, then {:?}", self.qemus, later.qemus));
        }
        (self.vms != later.vms).then(|| format!("VMs: {:?}, then {:?}", self.vms, later.vms))
    }
}

fn entries(dir: &std::path::Path) -> BTreeSet<String> {
    let Ok(found) = std::fs::read_dir(dir) else { return BTreeSet::new() };
    found.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn is_qemu(pid: i32) -> bool {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    comm.starts_with("qemu-system")
}
