//! A cluster of which one member is switched off: its disks move with the others, and nobody runs it.
//!
//! Owns the scenario's guests and steps. Its images are compared by `qemu-img`, and that no QEMU ran it is judged by
//! their events.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_protocol::wire::migrate::Phase;
use serde_json::{Value, json};

use super::world::{CLUSTER, World};
use super::{MOVE, SLOW, moved};
use crate::guest::disk::{DiskForm, SpecDisk};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::images::{self, DiskImage};
use crate::lab::node::godwit_binary;
use crate::lab::qemus::double_runs;
use crate::lab::wan::{LinkParams, WanMode};
use crate::lab::{LabConfig, SiteConfig};
use crate::scenario::faults::follow::{Follow, Pace};
use crate::scenario::faults::world::{REQUESTER, copy_on, ended, hold_dir};
use crate::scenario::steps::Steps;
use crate::scenario::swarm::{GuestPlan, Swarm, run};

/// How long until a guest is off, and everyone knows.
const OFF: Duration = Duration::from_secs(90);
/// What a guest leaves on its first disk.
const LEFT: &str = "written before the end";
/// Ends a guest a moment later: who says so is answered.
const END: &str = "(sleep 1; poweroff -f) >/dev/null 2>&1 </dev/null &";
/// The member that is switched off, and its disks: forms and MiB. Random bytes, so that a move takes time.
const MEMBER: &str = "b";
const DISKS: [(DiskForm, u64); 2] = [(DiskForm::Raw, 24), (DiskForm::Qcow2, 32)];

fn config() -> LabConfig {
    LabConfig {
        labid: "cloff".to_owned(),
        sites: vec![
            SiteConfig::new("paris", &["h1", "h2", "h3"]),
            SiteConfig::new("tokyo", &["h4"]),
        ],
        wan: WanMode::Shaped(LinkParams::new(100, 20)),
    }
}

/// Runs it.
pub fn off() -> Result<Value> {
    let mut world = World::up(&config(), &[])?;
    populate(&mut world)?;
    let mut steps = Steps::default();
    let mut step = |name: &str, work: fn(&mut World) -> Result<Value>| {
        steps.step(name, || work(&mut world));
    };
    step("one ends by itself", powered_off);
    step("all to the other site", there);
    step("it alone, aborted", aborted);
    step("its new host dies bound, with its QEMU", died);
    step("the daemon that has it is killed and starts again", restarted);
    step("it alone, back", back);
    step("started again, its daemon killed between decree and boot", started);
    step("it moves live", live);
    step("stopped without a majority, its disks serve again", on_again);
    let double = double_runs(&world.qemus.seen());
    world.down()?;
    let passed = steps.passed() && double.is_empty();
    let steps = steps.report();
    Ok(
        json!({ "scenario": "cluster-off", "passed": passed, "steps": steps, "double_runs": double }),
    )
}

fn plan(world: &World, name: &str, number: u8) -> GuestPlan {
    let path = |at: usize| world.swarm.lab.dir().join(format!("{name}-{at}.img"));
    let disk = |(at, (form, _)): (usize, &(DiskForm, u64))| SpecDisk::own(path(at), *form);
    let disks =
        if name == MEMBER { DISKS.iter().enumerate().map(disk).collect() } else { Vec::new() };
    GuestPlan { disks, ..GuestPlan::new(name, number, 128) }
}

/// Two guests on two hosts, as one cluster; the second has disks.
fn populate(world: &mut World) -> Result<()> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    for (name, host, number) in [("a", "h1", 11), (MEMBER, "h2", 12)] {
        let plan = plan(world, name, number);
        for (disk, (form, mib)) in plan.disks.iter().zip(DISKS) {
            SpecDisk::blank(&disk.path, form, mib << 20)?;
        }
        let guest = world.swarm.start_guest(host, &files, &plan)?;
        world.guests.push(guest);
    }
    world.swarm.ask(REQUESTER, &["cluster", "create", CLUSTER, "--vms", "a,b"])?;
    Ok(())
}

/// Where the record says that the member is, if it is off.
fn off_at(swarm: &Swarm) -> Result<Option<String>> {
    let shown = swarm.ask(REQUESTER, &["cluster", "show", CLUSTER])?;
    let members = shown["members"].as_array().context("no members")?;
    let member = members.iter().find(|m| m["name"] == MEMBER).context("it is no member")?;
    Ok(member["host"].as_str().filter(|_| member["off"] == true).map(ToOwned::to_owned))
}

/// Its images as the host that has it shows them.
fn disks(world: &World, host: &str) -> Result<Vec<DiskImage>> {
    images_in(world, host, "off")
}

fn images_in(world: &World, host: &str, state: &str) -> Result<Vec<DiskImage>> {
    let shown = world.swarm.ask(host, &["vm", "show", MEMBER])?;
    ensure!(shown["state"] == state && shown["host"] == host, "{shown}");
    let disks = shown["detail"]["disks"].as_array().context("no disks are shown")?;
    ensure!(disks.len() == DISKS.len(), "{disks:?}");
    let image = |(disk, (form, _)): (&Value, (DiskForm, u64))| {
        let (id, path) = (disk["id"].as_str()?, disk["path"].as_str()?);
        Some(DiskImage { id: id.into(), path: path.into(), format: form.format().into() })
    };
    disks.iter().zip(DISKS).map(|pair| image(pair).context("no path")).collect()
}

/// It is off on that host by everyone's word, no QEMU of it is there, and its disks read as those that its guest left.
fn rests(world: &World, host: &str, left: &[DiskImage]) -> Result<Vec<DiskImage>> {
    world.swarm.wait("the record says where it is", OFF, |swarm| {
        Ok(off_at(swarm)?.as_deref() == Some(host))
    })?;
    world.swarm.wait("its QEMUs have ended", OFF, |_| {
        Ok(world.copies(MEMBER).iter().all(|qemu| !qemu.alive()))
    })?;
    let ran = world.copies(MEMBER).iter().filter(|qemu| !qemu.ran().is_empty()).count();
    ensure!(ran == 1, "its guest ran in {ran} QEMUs");
    world.swarm.wait("its host shows its disks", OFF, |_| Ok(disks(world, host).is_ok()))?;
    let here = disks(world, host)?;
    for (old, new) in left.iter().zip(&here) {
        ensure!(old.path == new.path || images::reads_as(old, new)?, "{old:?} and {new:?} differ");
    }
    Ok(here)
}

/// What a move left of its images: an operator's own has another name, one that was received is kept.
fn left_of(images: &[DiskImage]) -> Result<Vec<DiskImage>> {
    let left = |image: &DiskImage| {
        let (dir, name) = (image.path.parent()?, image.path.file_name()?.to_str()?.to_owned());
        let files = std::fs::read_dir(dir).ok()?.filter_map(Result::ok).map(|f| f.path());
        let is = |path: &PathBuf| {
            let other = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            other == name || other.starts_with(&format!("{name}.moved-"))
        };
        Some(DiskImage { path: files.filter(is).last()?, ..image.clone() })
    };
    images.iter().map(|image| left(image).with_context(|| format!("{image:?} is gone"))).collect()
}

fn powered_off(world: &mut World) -> Result<Value> {
    let fill = "dd if=/dev/urandom of=/dev/vda bs=1M count=20 && dd if=/dev/urandom of=/dev/vdb bs=1M count=20";
    let mark = format!("printf '{LEFT}' | dd of=/dev/vda conv=notrunc && sync");
    run(async {
        let mut control = world.control(MEMBER)?;
        control.shell(fill).await?;
        control.shell(&mark).await?;
        control.shell(END).await
    })?;
    world.swarm.wait("the record says that it is off", OFF, |s| Ok(off_at(s)?.is_some()))?;
    let here = rests(world, "h2", &[])?;
    let out = world.swarm.node("h2")?.cli(&["vm", "console", MEMBER, "--json"], MOVE)?;
    ensure!(!out.ok(), "{out:?}");
    Ok(json!({ "disks": here.len() }))
}

fn there(world: &mut World) -> Result<Value> {
    let before = disks(world, "h2")?;
    let plan = world.swarm.ask("h4", &["migrate", CLUSTER, "--to", "h4", "--dry-run"])?;
    ensure!(plan["fits"] == true && plan["placement"][1]["to"] == "h4", "{plan}");
    let figures = moved(world, "h4", &[])?;
    // Nobody waits for that where it was asked for.
    world.swarm.wait("its old images are set aside", OFF, |_| {
        let left = left_of(&before)?;
        Ok(left.iter().zip(&before).all(|(old, was)| old.path != was.path))
    })?;
    let left = left_of(&before)?;
    rests(world, "h4", &left)?;
    ensure!(world.runs_on("a").as_deref() == Some("h4"), "a runs on {:?}", world.runs_on("a"));
    Ok(figures)
}

fn aborted(world: &mut World) -> Result<Value> {
    let before = disks(world, "h4")?;
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let follow = Follow::placed(&state, CLUSTER, "", &[(MEMBER, "h1")], SLOW)?;
    follow.wait(MOVE, |heard| heard.done_ppm > 50_000)?;
    // Asked again at once, while its host has not come to the end of the first: that is not the end of the second.
    let rest = hold_dir(&world.swarm, "h4")?.join("rest");
    std::fs::write(&rest, b"")?;
    world.swarm.ask("h2", &["abort", &follow.id.to_string()])?;
    let shown = ended(&world.swarm, &follow, MOVE)?;
    ensure!(shown["phase"] == "stayed", "{shown}");
    let again = Follow::placed(&state, CLUSTER, "", &[(MEMBER, "h1")], SLOW)?;
    again.wait(MOVE, |heard| heard.phase == Some(Phase::Transfer) || heard.over)?;
    std::fs::remove_file(&rest)?;
    again.wait(MOVE, |heard| heard.done_ppm > 50_000 || heard.over)?;
    let aborted = world.swarm.ask("h2", &["abort", &again.id.to_string()]);
    let shown = ended(&world.swarm, &again, MOVE)?;
    ensure!(aborted.is_ok(), "{aborted:?}: {shown}");
    ensure!(shown["cause"] == "aborted on request", "{shown}");
    ensure!(rests(world, "h4", &before)? == before, "other images");
    Ok(json!({ "cause": shown["cause"] }))
}

/// A destination that was bound comes back without its QEMU: what it had received is listed, not left lying about.
fn died(world: &mut World) -> Result<Value> {
    let before = disks(world, "h4")?;
    let loaded = hold_dir(&world.swarm, "h1")?.join("loaded");
    std::fs::write(&loaded, b"")?;
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let follow = Follow::placed(&state, CLUSTER, "", &[(MEMBER, "h1")], Pace::default())?;
    world
        .swarm
        .wait("its new host is bound", OFF, |_| Ok(loaded.with_extension("reached").exists()))?;
    world.swarm.node_mut("h1")?.kill9()?;
    let copy = copy_on(&world.swarm, &world.qemus, MEMBER, "h1")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(copy.pid), nix::sys::signal::SIGKILL)?;
    std::fs::remove_file(&loaded)?;
    let shown = ended(&world.swarm, &follow, MOVE)?;
    ensure!(shown["phase"] == "stayed", "{shown}");
    world.swarm.node_mut("h1")?.start_ready(Duration::from_secs(30))?;
    let images = world.swarm.node("h1")?.state_dir().join("images");
    world.swarm.wait("what it received is listed", OFF, |swarm| {
        let listed = swarm.ask("h1", &["image", "list"])?;
        let listed = listed.as_array().context("no list")?;
        let is = |path: &PathBuf| listed.iter().any(|i| i["path"].as_str() == path.to_str());
        let files: Vec<_> = std::fs::read_dir(&images)?.filter_map(Result::ok).collect();
        Ok(!copy.dir.exists() && files.iter().all(|f| is(&f.path())))
    })?;
    ensure!(rests(world, "h4", &before)? == before, "other images");
    Ok(json!({ "cause": shown["cause"] }))
}

fn restarted(world: &mut World) -> Result<Value> {
    let before = disks(world, "h4")?;
    world.swarm.node_mut("h4")?.restart(Duration::from_secs(30))?;
    world.swarm.wait("it is known again", OFF, |_| Ok(disks(world, "h4").is_ok()))?;
    ensure!(rests(world, "h4", &before)? == before, "other images");
    Ok(json!({}))
}

fn back(world: &mut World) -> Result<Value> {
    let before = disks(world, "h4")?;
    let figures = moved(world, "", &[(MEMBER, "h2")])?;
    rests(world, "h2", &left_of(&before)?)?;
    Ok(figures)
}

/// The guest that runs now has what the first one wrote.
fn reads(world: &World) -> Result<String> {
    let read = format!("head -c {} /dev/vda", LEFT.len());
    let read = run(async {
        let mut control = world.control(MEMBER)?;
        control.wait_ready(OFF).await?;
        control.shell(&read).await
    })?;
    ensure!(read.trim() == LEFT, "it reads {read:?}");
    Ok(read)
}

/// `vm start`, asked of another host; the daemon that shall boot it is killed before it does.
fn started(world: &mut World) -> Result<Value> {
    let named = hold_dir(&world.swarm, "h2")?.join("named");
    std::fs::write(&named, b"")?;
    let mut ask = Command::new(godwit_binary()?);
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let ask = ask.arg("--state").arg(state).args(["vm", "start", MEMBER]);
    let mut asked = ask.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    world
        .swarm
        .wait("its record names it", OFF, |_| Ok(named.with_extension("reached").exists()))?;
    world.swarm.node_mut("h2")?.kill9()?;
    let ran = |world: &World| world.copies(MEMBER).iter().filter(|q| !q.ran().is_empty()).count();
    ensure!(ran(world) == 1, "it was booted before it was killed");
    std::fs::remove_file(&named)?;
    world.swarm.node_mut("h2")?.start_ready(Duration::from_secs(30))?;
    world.swarm.wait("it runs", OFF, |_| Ok(world.runs_on(MEMBER).as_deref() == Some("h2")))?;
    ensure!(asked.wait()?.success(), "who asked was not told that it runs");
    let read = reads(world)?;
    ensure!(ran(world) == 2, "its guest ran in {} QEMUs", ran(world));
    let again = world.swarm.ask("h1", &["vm", "start", MEMBER])?;
    ensure!(again["done"].as_str().is_some_and(|d| d.contains("runs already on h2")), "{again}");
    Ok(json!({ "read": read }))
}

fn live(world: &mut World) -> Result<Value> {
    let before = images_in(world, "h2", "running")?;
    let figures = moved(world, "", &[(MEMBER, "h1")])?;
    ensure!(world.runs_on(MEMBER).as_deref() == Some("h1"), "{:?}", world.runs_on(MEMBER));
    reads(world)?;
    // They were made by godwit, for the copy before: kept as content, not left as an operator's own.
    world.swarm.wait("its old images are kept", OFF, |swarm| {
        let kept = swarm.ask("h2", &["image", "list"])?;
        let kept = kept.as_array().context("no list")?.iter().filter(|i| i["kind"] == "kept-disk");
        Ok(kept.count() >= DISKS.len() && before.iter().all(|disk| !disk.path.exists()))
    })?;
    Ok(figures)
}

/// It ends while most voters are away, which is said, and goes when they are back, though its daemon was restarted.
fn on_again(world: &mut World) -> Result<Value> {
    let here = images_in(world, "h1", "running")?;
    let voters = world.cluster("h1")?["voters"].clone();
    let away = |v: &Value| v.as_str().filter(|v| *v != "h1").map(ToOwned::to_owned);
    let away: Vec<String> = voters.as_array().into_iter().flatten().filter_map(away).collect();
    for host in &away {
        world.swarm.node_mut(host)?.kill9()?;
    }
    let out = world.swarm.node("h1")?.cli(&["vm", "stop", MEMBER, "--kill"], MOVE)?;
    ensure!(!out.ok() && out.stderr.contains("no majority of its voters"), "{out:?}");
    ensure!(images_in(world, "h1", "removing")? == here, "what it had is not shown");
    world.swarm.node_mut("h1")?.restart(Duration::from_secs(30))?;
    for host in &away {
        world.swarm.node_mut(host)?.start_ready(Duration::from_secs(30))?;
    }
    world.swarm.wait("it is removed", OFF, |swarm| {
        let vms = swarm.ask("h1", &["vm", "list"])?;
        Ok(vms.as_array().is_some_and(|vms| vms.iter().all(|vm| vm["name"] != MEMBER)))
    })?;
    let own = here.iter().zip(DISKS).map(|(disk, (form, _))| SpecDisk::own(&disk.path, form));
    let plan = GuestPlan { disks: own.collect(), ..plan(world, MEMBER, 12) };
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    world.swarm.start_guest("h1", &files, &plan)?;
    let read = reads(world)?;
    // It belongs to no cluster now: off and on again all the same.
    run(async { world.control(MEMBER)?.shell(END).await })?;
    world.swarm.wait("it is off", OFF, |_| Ok(disks(world, "h1").is_ok()))?;
    world.swarm.ask("h4", &["vm", "start", MEMBER])?;
    ensure!(reads(world)? == read && world.runs_on(MEMBER).as_deref() == Some("h1"), "elsewhere");
    Ok(json!({ "read": read, "said": out.stderr.trim() }))
}
