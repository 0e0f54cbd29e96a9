//! Ten times there and back with a Debian guest that writes: nothing that it acknowledged may be missing afterwards.
//!
//! Owns the order of steps and what is called passed.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::acked::{self, Acked};
use super::super::faults::world::{Cast, World};
use super::super::swarm::run;
use super::{move_compared, small_dress, verified};
use crate::guest::GuestKind;
use crate::guest::disk::DiskForm;
use crate::lab::images;
use crate::lab::qemus::double_runs;
use crate::lab::wan::LinkParams;

/// Moves: ten there, ten back.
const MOVES: usize = 20;
/// How long a guest may take to power off under an emulated CPU.
const OFF: Duration = Duration::from_secs(120);

/// A Debian guest on a disk of that form, with a second raw disk that it rewrites.
pub(super) fn debian(root: DiskForm, link: LinkParams) -> Cast {
    Cast {
        kind: GuestKind::Debian,
        memory_mib: 512,
        churn: (20, 250),
        root,
        disks: vec![(DiskForm::Raw, 64)],
        full: false,
        disk_churn: vec![("/dev/vdb", 64, 100)],
        link,
        dress: small_dress,
    }
}

/// Has the guest of a world acknowledge writes; their record is in the lab's directory.
pub(super) fn acknowledge(world: &mut World) -> Result<Acked> {
    let (guest, _) = world.guest()?;
    acked::serve(&mut world.control(&guest.name)?)?;
    let target = SocketAddr::from((guest.plan.ip(), acked::PORT));
    let record = world.swarm.lab.dir().join(format!("{}.acked", guest.name));
    Acked::start(world.outside()?, target, &record)
}

/// Powers the guest off and looks at the file system on its first disk.
pub(super) fn off_and_clean(world: &mut World) -> Result<bool> {
    let (guest, host) = world.guest()?;
    let qemu = world.copy_on(&guest.name, &host)?;
    let disks = images::of_qemu(qemu.pid)?;
    run(async { world.control(&guest.name)?.shell("systemctl poweroff --no-block").await })?;
    world
        .swarm
        .wait("the guest is off", OFF, |_| Ok(!world.copy_on(&guest.name, &host)?.alive()))?;
    images::file_system_is_clean(disks.first().context("no disk")?)
}

/// `godwit-lab run disk-roundtrips`: about seven minutes.
pub fn run_all() -> Result<Value> {
    let began = Instant::now();
    let mut world = World::up("dtrips", debian(DiskForm::Qcow2, LinkParams::new(100, 80)))?;
    let done = moves(&mut world);
    if done.is_err() {
        world.keep_logs("disk-roundtrips");
    }
    let double = double_runs(&world.qemus.seen());
    world.down()?;
    let mut report = done?;
    report["passed"] = (report["passed"] == true && double.is_empty()).into();
    report["double_runs"] = json!(double.len());
    report["seconds"] = began.elapsed().as_secs().into();
    Ok(report)
}

fn moves(world: &mut World) -> Result<Value> {
    let (guest, _) = world.guest()?;
    let writer = acknowledge(world)?;
    let (mut figures, mut equal, mut failure) = (Vec::new(), true, None);
    for number in 1..=MOVES {
        let before = writer.acked();
        let moved = move_compared(world).and_then(|moved| {
            equal &= moved.equal;
            ensure!(moved.equal, "the images differ");
            Ok(moved.status)
        });
        let s = match moved {
            Ok(status) => status,
            Err(error) => {
                failure = Some(format!("move {number}: {error:#}"));
                break;
            }
        };
        let line = json!({"to": s["to_name"], "total_ms": s["total_ms"], "bulk_bytes": s["bulk_bytes"],
            "disk_wan_bytes": s["disk_wan_bytes"], "downtime_us_with_compare": s["downtime_us"],
            "acked": writer.acked() - before});
        println!("move {number}: {line}");
        figures.push(line);
    }
    let (kept, longest) = writer.finish(&mut world.control(&guest.name)?)?;
    let checked = verified(world, &guest.name)?;
    let clean = off_and_clean(world)?;
    let passed = failure.is_none() && equal && clean && kept.lost == 0 && kept.acked > 1000;
    Ok(json!({
        "scenario": "disk-roundtrips",
        "passed": passed,
        "failure": failure,
        "moves": figures.len(),
        "acked": kept.acked,
        "acked_lost": kept.lost,
        "longest_without_ack_ms": longest.as_millis() as u64,
        "disk_equal": equal,
        "file_system_clean": clean,
        "guest": checked,
        "link": "100 Mbit/s, 80 ms",
        "each": figures,
    }))
}
