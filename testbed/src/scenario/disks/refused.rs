//! Moves with disks that must not happen, or not as fast as asked for: each ends with its cause, and the VM runs on.
//!
//! Owns the cases; each starts from a settled world and leaves one.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use super::super::faults::follow::{Follow, Pace};
use super::super::faults::world::{REQUESTER, World};
use super::super::swarm::{GuestPlan, run};
use super::{Mounted, altered, other_site, small_dir, stays};
use crate::guest::disk::{DiskForm, SpecDisk};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::images;

/// How long a move may take.
const MOVE: Duration = Duration::from_secs(240);
/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(60);

type Work = fn(&mut World) -> Result<Value>;

/// All cases.
pub(super) const CASES: [(&str, Work); 7] = [
    ("a byte is altered on its way to the image", altered),
    ("no room at the destination", no_room),
    ("the destination may not write its images", read_only),
    ("an image that is in use", in_use),
    ("a base that the destination does not know", unknown_base),
    ("a sector that the source cannot read", unreadable),
    ("a writer faster than the link", too_fast),
];

fn no_room(world: &mut World) -> Result<Value> {
    let dir = small_dir(world.swarm.node(REQUESTER)?);
    let _mounted = Mounted::tmpfs(&dir, "size=64m")?;
    let seen = stays(world, REQUESTER, "MiB")?;
    ensure!(seen["images_after"] == 0, "an image is left: {seen}");
    Ok(seen)
}

/// Root may write anywhere but on a file system that is read-only.
fn read_only(world: &mut World) -> Result<Value> {
    let dir = small_dir(world.swarm.node(REQUESTER)?);
    let _mounted = Mounted::tmpfs(&dir, "size=2g")?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, &dir, None::<&str>, flags, None::<&str>)?;
    let seen = stays(world, REQUESTER, "ead-only")?;
    ensure!(seen["images_after"] == 0, "an image is left: {seen}");
    Ok(seen)
}

/// The image of the guest that runs, in a spec of a second VM.
fn in_use(world: &mut World) -> Result<Value> {
    let (guest, host) = world.guest()?;
    let disks = images::of_qemu(world.copy_on(&guest.name, &host)?.pid)?;
    let disk = disks.first().context("no disk")?;
    let path = world.swarm.lab.dir().join("twin.toml");
    let spec = format!(
        "name = \"twin\"\nmemory = \"64M\"\n[[disk]]\npath = \"{}\"\nformat = \"{}\"\n",
        disk.path.display(),
        disk.format
    );
    fs::write(&path, spec)?;
    let path = path.to_str().context("path")?;
    let out = world.swarm.node(&host)?.cli(&["vm", "run", path], COMMAND)?;
    ensure!(!out.ok() && out.stderr.contains("in use"), "{}{}", out.stdout, out.stderr);
    Ok(json!({"cause": out.stderr.trim()}))
}

/// A guest of its own on h1, beside the world's; its number on the wire is not the world's.
fn extra(world: &World, name: &str, number: u8, disk: SpecDisk) -> Result<super::super::Guest> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let plan = GuestPlan { disks: vec![disk], ..GuestPlan::new(name, number, 192) };
    world.swarm.start_guest("h1", &files, &plan)
}

fn migrate(world: &World, vm: &str, to: &str, pace: Pace) -> Result<Value> {
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let follow = Follow::start(&state, vm, to, pace)?;
    world.ended(&follow, MOVE)
}

fn unknown_base(world: &mut World) -> Result<Value> {
    let base = world.swarm.lab.dir().join("base.img");
    let mut bytes = blake3::Hasher::new().update(b"base").finalize_xof();
    std::io::copy(&mut std::io::Read::take(&mut bytes, 8 << 20), &mut fs::File::create(&base)?)?;
    let disk = SpecDisk::overlay(world.swarm.lab.dir().join("over.qcow2"), &base)?;
    extra(world, "over", 150, disk)?;
    let status = migrate(world, "over", "h2", Pace::default())?;
    let cause = status["cause"].as_str().unwrap_or_default().to_owned();
    ensure!(status["phase"] == "stayed" && cause.contains("image library"), "{status}");
    let path = base.to_str().context("path")?;
    world.swarm.node("h2")?.cli_json(&["image", "add", path], COMMAND)?;
    let status = migrate(world, "over", "h2", Pace::default())?;
    ensure!(status["phase"] == "moved", "with its base: {status}");
    world.swarm.ask("h2", &["vm", "stop", "over", "--kill"])?;
    Ok(json!({"cause": cause, "disk_wan_bytes_with_base": status["disk_wan_bytes"]}))
}

/// The lab's QEMU fails to read one sector of images whose name says so.
fn unreadable(world: &mut World) -> Result<Value> {
    let path = world.swarm.lab.dir().join("unreadable.img");
    let mut bytes = blake3::Hasher::new().update(b"disk").finalize_xof();
    std::io::copy(&mut std::io::Read::take(&mut bytes, 16 << 20), &mut fs::File::create(&path)?)?;
    let guest = extra(world, "bad", 151, SpecDisk::own(path, DiskForm::Raw))?;
    let status = migrate(world, "bad", "h2", Pace::default())?;
    let cause = status["cause"].as_str().unwrap_or_default();
    ensure!(status["phase"] == "stayed" && !cause.is_empty(), "{status}");
    let qemu = world.copy_on("bad", "h1")?;
    ensure!(qemu.runs(), "it does not run on: {qemu:?}");
    run(async { world.swarm.control("h1", &guest)?.ping().await })?;
    world.swarm.ask("h1", &["vm", "stop", "bad", "--kill"])?;
    Ok(json!({"cause": cause}))
}

/// It writes more than crosses: it is slowed down, which is shown, and the move ends.
fn too_fast(world: &mut World) -> Result<Value> {
    let (guest, source) = world.guest()?;
    let to = other_site(world)?;
    world.settled(&guest.name, &source)?;
    let load = |world: &World, rate_kbps| {
        run(async { world.control(&guest.name)?.disk("/dev/vdb", 64, rate_kbps).await })
    };
    load(world, 12_000)?;
    let status = migrate(world, &guest.name, to, Pace { link: 2_000_000, disk: 0 });
    load(world, 100)?;
    let status = status?;
    ensure!(status["phase"] == "moved", "{status}");
    let held_ms = status["disk_throttled_ms"].as_u64().unwrap_or(0);
    ensure!(held_ms > 0, "nothing shows that it was slowed down: {status}");
    Ok(json!({"disk_throttled_ms": held_ms, "total_ms": status["total_ms"],
        "guest": super::verified(world, &guest.name)?}))
}
