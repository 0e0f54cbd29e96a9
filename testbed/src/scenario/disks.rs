//! Disks that move with their VM: there and back, refused, hit by faults, and compared before the guest runs on.
//!
//! Owns moves that stand still between the decision and `cont`, where both images must read the same, and the small
//! scenario of a guest without a system of its own. Invariant: images are compared by `qemu-img`, what a guest wrote is
//! checked by the guest past its page cache.

pub mod faults;
mod forms;
mod refused;
pub mod resume;
pub mod roundtrips;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::faults::case::{Case, Fault, Phase};
use super::faults::follow::{Follow, Pace};
use super::faults::world::{self, Cast, REQUESTER, World};
use super::steps::Steps;
use super::swarm::{Swarm, run};
use crate::guest::disk::DiskForm;
use crate::lab::node::Node;
use crate::lab::qemus::{QemuWatch, double_runs};
use crate::lab::{cleanup, images};

/// How long a move may take until it is decided, and until it has ended.
const MOVE: Duration = Duration::from_secs(300);
/// How long a node may take to be ready again.
const READY: Duration = Duration::from_secs(30);
/// Bytes of the file system that is too small for the guest's disks.
const TOO_SMALL: &str = "size=8m";

/// One move whose images were compared.
pub struct Compared {
    /// Every disk at the source read as the same disk at the destination, before the guest ran there.
    pub equal: bool,
    /// `godwit migrations` at the end.
    pub status: Value,
}

/// Moves the world's guest to the other site and compares its images before it runs there.
///
/// # Errors
/// As [`held_move`].
pub fn move_compared(world: &mut World) -> Result<Compared> {
    let (guest, source) = world.guest()?;
    let destination = if source == "h1" { "h2" } else { "h1" };
    world.settled(&guest.name, &source)?;
    world.clear_holds()?;
    held_move(&world.swarm, &world.qemus, &guest.name, (&source, destination))
}

/// Moves a VM from one host to another, and compares its images while both stand still. The nodes must be such as
/// [`world::let_hold`] makes them.
///
/// # Errors
/// If it did not move, or runs elsewhere than it should.
pub fn held_move(
    swarm: &Swarm,
    qemus: &QemuWatch,
    vm: &str,
    (source, destination): (&str, &str),
) -> Result<Compared> {
    let point = world::hold_dir(swarm, destination)?.join("decided");
    let reached = point.with_extension("reached");
    fs::write(&point, "")?;
    let copy = |host| world::copy_on(swarm, qemus, vm, host);
    let state = swarm.node(REQUESTER)?.state_dir().to_owned();
    let follow = Follow::start(&state, vm, destination, Pace::default())?;
    let equal = follow.wait(MOVE, |_| reached.exists()).and_then(|_| {
        let (from, to) = (copy(source)?, copy(destination)?);
        ensure!(!from.runs() && to.ran().is_empty(), "a guest runs: {from:?}, {to:?}");
        let equal = images::equal(from.pid, to.pid)?;
        ensure!(point.exists() && copy(destination)?.ran().is_empty(), "it was not held");
        Ok(equal)
    });
    fs::remove_file(&point)?;
    let status = world::ended(swarm, &follow, MOVE)?;
    ensure!(status["phase"] == "moved", "{}: {}", status["phase"], status["cause"]);
    let equal = equal?;
    fs::remove_file(&reached)?;
    ensure!(copy(destination)?.runs() && !copy(source)?.runs(), "moved, but runs elsewhere");
    Ok(Compared { equal, status })
}

/// The guest's memory and what it wrote to its disks, checked by itself.
pub fn verified(world: &World, vm: &str) -> Result<Value> {
    let mut control = world.control(vm)?;
    let (memory, disks) =
        run(async { Ok((control.verify().await?, control.verify_disks().await?)) })?;
    ensure!(memory.pages_corrupt == 0, "memory: {memory:?}");
    ensure!(disks.pages_corrupt == 0 && disks.pages_verified > 0, "disks: {disks:?}");
    Ok(json!({"pages_verified": memory.pages_verified, "blocks_verified": disks.pages_verified,
        "blocks_written": disks.pages_written}))
}

/// A guest without a system of its own, with a raw disk and a qcow2 that it writes to; one host has no room for them.
fn small_cast() -> Cast {
    Cast {
        disks: vec![(DiskForm::Raw, 24), (DiskForm::Qcow2, 32)],
        disk_churn: vec![("/dev/vda", 12, 200), ("/dev/vdb", 12, 100)],
        dress: small_dress,
        ..Cast::plain()
    }
}

/// Bytes that a node may keep of what moved away: some moves' worth, on a disk that a developer uses for more.
const KEEP: &str = "3G";

/// The node that is asked has a directory for images that a case may put something over.
fn small_dress(node: &mut Node) {
    node.arg("--keep-bytes").arg(KEEP);
    if node.host().name == REQUESTER {
        let dir = small_dir(node).display().to_string();
        node.arg("--image-dir").arg(&dir);
    }
}

fn small_dir(node: &Node) -> PathBuf {
    node.host().work_dir.join("images")
}

type Step = (&'static str, fn(&mut World) -> Result<Value>);

/// Steps of the small scenario, in order; the guest starts on h1.
const SMALL: [Step; 7] = [
    ("there, with writes on the way", there),
    ("and back", there),
    ("firmware's variables, holes, and more room than is used", forms::kept),
    ("a byte is altered on its way to the image", altered),
    ("no room at the destination", no_room),
    ("the destination's node is killed in the transfer", killed),
    ("the source's daemon is killed and starts again", restarted),
];

/// The part of the disks' scenarios that needs no Debian guest: about two minutes.
pub fn small() -> Result<Value> {
    let mut world = World::up("disks", small_cast())?;
    let mut steps = Steps::default();
    for (name, work) in SMALL {
        if !steps.step(name, || work(&mut world)) {
            world.keep_logs(name);
        }
    }
    let double = double_runs(&world.qemus.seen());
    world.down()?;
    let passed = steps.passed() && double.is_empty();
    let steps = steps.report();
    Ok(json!({"scenario": "disks", "passed": passed, "steps": steps, "double_runs": double}))
}

fn there(world: &mut World) -> Result<Value> {
    let (guest, _) = world.guest()?;
    let moved = move_compared(world)?;
    ensure!(moved.equal, "the images differ");
    let seen = verified(world, &guest.name)?;
    let s = moved.status;
    Ok(json!({"guest": seen, "total_ms": s["total_ms"], "downtime_us": s["downtime_us"],
        "disk_bytes": s["disk_bytes"], "disk_wan_bytes": s["disk_wan_bytes"]}))
}

/// A move that must not happen: it stays, with a cause that says `why`, and runs on undisturbed; nothing of it is left.
fn stays(world: &mut World, to: &str, why: &str) -> Result<Value> {
    let (guest, source) = world.guest()?;
    world.settled(&guest.name, &source)?;
    let before = files_of(world, to)?;
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let follow = Follow::start(&state, &guest.name, to, Pace::default())?;
    let status = world.ended(&follow, MOVE)?;
    ensure!(status["phase"] == "stayed", "{}: {}", status["phase"], status["cause"]);
    let cause = status["cause"].as_str().unwrap_or_default();
    ensure!(cause.contains(why), "the cause is {cause:?}");
    let on = world.runs_on(&guest.name);
    ensure!(on.as_deref() == Some(source.as_str()), "stayed, but the guest runs on {on:?}");
    let after = files_of(world, to)?;
    Ok(json!({"cause": cause, "guest": verified(world, &guest.name)?,
        "images_before": before, "images_after": after}))
}

/// Images in the directory of a host.
fn files_of(world: &World, host: &str) -> Result<usize> {
    let node = world.swarm.node(host)?;
    let dir = if host == REQUESTER { small_dir(node) } else { node.state_dir().join("images") };
    Ok(fs::read_dir(dir).map_or(0, Iterator::count))
}

fn other_site(world: &mut World) -> Result<&'static str> {
    Ok(if world.guest()?.1 == "h1" { "h2" } else { "h1" })
}

fn altered(world: &mut World) -> Result<Value> {
    let to = other_site(world)?;
    let fault = world.hold_dir(to)?.join("alter-disk");
    fs::write(&fault, "")?;
    let seen = stays(world, to, "differ from the source");
    fs::remove_file(&fault)?;
    seen
}

fn no_room(world: &mut World) -> Result<Value> {
    let dir = small_dir(world.swarm.node(REQUESTER)?);
    let _mounted = Mounted::tmpfs(&dir, TOO_SMALL)?;
    let seen = stays(world, REQUESTER, "MiB")?;
    ensure!(seen["images_after"] == seen["images_before"], "an image is left: {seen}");
    Ok(seen)
}

/// A file system in memory; unmounted when dropped, else with its lab.
pub(super) struct Mounted(PathBuf);

impl Mounted {
    /// Mounts one over `dir`, which is made.
    pub fn tmpfs(dir: &Path, options: &str) -> Result<Self> {
        cleanup::make_private_dir(dir)?;
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some(options))
            .with_context(|| format!("mounting a tmpfs on {}", dir.display()))?;
        Ok(Self(dir.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What stays mounted is unmounted with the lab.
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn killed(world: &mut World) -> Result<Value> {
    let (guest, _) = world.guest()?;
    let report = Case::new(Fault::DestinationNode, Phase::Transfer).run(world)?;
    ensure!(report["passed"] == true, "{report}");
    Ok(json!({"case": report, "guest": verified(world, &guest.name)?}))
}

fn restarted(world: &mut World) -> Result<Value> {
    let (guest, host) = world.guest()?;
    let pid = world.copy_on(&guest.name, &host)?.pid;
    world.swarm.node_mut(&host)?.kill9()?;
    verified(world, &guest.name).context("while its daemon is gone")?;
    world.swarm.node_mut(&host)?.start_ready(READY)?;
    world.settled(&guest.name, &host)?;
    ensure!(world.copy_on(&guest.name, &host)?.pid == pid, "another QEMU");
    there(world)
}
