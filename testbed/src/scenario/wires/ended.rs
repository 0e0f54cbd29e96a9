//! A guest whose QEMU ends while its NICs are made ready to leave: nothing of that is left.
//!
//! Owns the run.

use anyhow::{Context, Result, ensure};
use godwit_protocol::wire::migrate::Phase;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::SOON;
use crate::guest::disk::{DiskForm, SpecDisk};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::ns::ip;
use crate::scenario::faults::world::{hold_dir, let_hold};
use crate::scenario::roundtrip::moves::{Moving, Wish};
use crate::scenario::swarm::{GuestPlan, Swarm};

/// Where the node stands still: it has a hold device, and nobody knows of it.
const POINT: &str = "leaving";
/// Bytes of its disk.
const DISK: u64 = 16 << 20;

/// The part of `godwit-lab run wires` in which a QEMU ends.
pub fn ended(labid: &str) -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let swarm = Swarm::up(&LabConfig::demo(labid), let_hold)?;
    let mut plan = GuestPlan::new("web", 5, 160);
    // With it the transfer fails before it has begun.
    plan.disks = vec![SpecDisk::blank(swarm.lab.dir().join("web.img"), DiskForm::Raw, DISK)?];
    swarm.start_guest("h1", &files, &plan)?;
    let qemu = swarm.ask("h1", &["vm", "show", "web"])?["pid"].as_i64().context("no QEMU")?;
    let point = hold_dir(&swarm, "h1")?.join(POINT);
    std::fs::write(&point, b"")?;
    let moving = Moving::start(&swarm, &Wish::new("h3", "web", "h2"))?;
    let reached = point.with_extension("reached");
    swarm.wait("its NIC is made ready", SOON, |_| Ok(reached.exists()))?;
    ensure!(holds(&swarm)?, "there is no hold device at the point");
    kill(Pid::from_raw(qemu.try_into()?), Signal::SIGKILL)?;
    swarm.wait("the node knows that its QEMU ended", SOON, |swarm| {
        Ok(swarm.ask("h1", &["vm", "show", "web"])?["pid"].is_null())
    })?;
    std::fs::remove_file(&point)?;
    let end = moving.end()?.status;
    ensure!(end.phase == Phase::Lost, "{:?}: {}", end.phase, end.cause);
    swarm.wait("no hold device is left", SOON, |swarm| Ok(!holds(swarm)?))?;
    swarm.down()?;
    Ok(json!({ "cause": end.cause }))
}

/// Whether h1 has a hold device.
fn holds(swarm: &Swarm) -> Result<bool> {
    Ok(ip(&["-n", swarm.lab.host("h1")?.ns.name(), "-br", "link"])?.contains("gwh-"))
}
