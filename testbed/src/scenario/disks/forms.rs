//! Disks that a system seldom shows: firmware's variables, holes, a size far above what is used.
//!
//! Owns one VM without a system, which so writes nothing. Judged by `qemu-img` while both ends stand still, then by what the
//! images take up.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::faults::world::World;
use super::held_move;
use crate::guest::disk::{DiskForm, SpecDisk};
use crate::lab::images::{self, DiskImage};
use crate::lab::node::run_with_deadline;

/// SeaBIOS, which comes with QEMU and runs from flash as well.
const CODE: &str = "/usr/share/seabios/bios-256k.bin";
/// Bytes of the firmware's variables.
const VARS: u64 = 64 << 10;
/// Bytes of the disks: raw, qcow2; and of what is used of each.
const SIZES: [u64; 2] = [1 << 30, 20 << 30];
const USED: u64 = 1 << 20;
/// What an image may take up beyond what is used, bytes.
const SLACK: u64 = 1 << 20;
/// How long a command may take.
const SOON: Duration = Duration::from_secs(60);

pub(super) fn kept(world: &mut World) -> Result<Value> {
    let dir = world.swarm.lab.dir().to_owned();
    let at = |name: &str| dir.join(name);
    random(&mut File::create(at("vars.fd"))?, VARS)?;
    let mut raw = File::create(at("holes.img"))?;
    raw.set_len(SIZES[0])?;
    raw.seek(SeekFrom::Start(SIZES[0] / 2))?;
    random(&mut raw, USED)?;
    SpecDisk::blank(at("wide.qcow2"), DiskForm::Qcow2, SIZES[1])?;
    let mut fill = Command::new("qemu-io");
    fill.args(["-f", "qcow2", "-c", "write -P 0x5a 10G 1M"]).arg(at("wide.qcow2"));
    let filled = run_with_deadline(fill, SOON)?;
    ensure!(filled.ok(), "qemu-io: {}", filled.stderr);
    let spec = format!(
        "name = \"forms\"\nmemory = \"64M\"\n\
         [[disk]]\npath = {:?}\nformat = \"raw\"\n[[disk]]\npath = {:?}\nformat = \"qcow2\"\n\
         [nvram]\ncode = {CODE:?}\nvars = {:?}\n",
        at("holes.img"),
        at("wide.qcow2"),
        at("vars.fd"),
    );
    fs::write(at("forms.toml"), spec)?;
    let path = at("forms.toml");
    world.swarm.node("h1")?.cli_json(&["vm", "run", path.to_str().context("path")?], SOON)?;
    let moved = held_move(&world.swarm, &world.qemus, "forms", ("h1", "h2"))?;
    ensure!(moved.equal, "an image reads otherwise");
    let copy = world.copy_on("forms", "h2")?;
    let images = images::of_qemu(copy.pid)?;
    ensure!(images.len() == 3 && copy.runs(), "{images:?}");
    let mut sizes = Vec::new();
    for (image, size) in images.iter().zip([SIZES[0], SIZES[1], VARS]) {
        let (found, taken) = (virtual_size(image)?, fs::metadata(&image.path)?.blocks() * 512);
        ensure!(found == size, "{}: {found} bytes, not {size}", image.id);
        ensure!(taken <= USED + SLACK, "{}: takes up {taken} bytes", image.id);
        sizes.push(json!({"id": image.id, "bytes": found, "taken": taken}));
    }
    world.swarm.ask("h2", &["vm", "stop", "forms", "--kill"])?;
    Ok(json!({ "images": sizes, "disk_wan_bytes": moved.status["disk_wan_bytes"] }))
}

/// Content that neither compresses nor is known anywhere.
fn random(to: &mut File, bytes: u64) -> Result<()> {
    std::io::copy(&mut File::open("/dev/urandom")?.take(bytes), to)?;
    Ok(())
}

fn virtual_size(image: &DiskImage) -> Result<u64> {
    let mut info = Command::new("qemu-img");
    info.args(["info", "-U", "--output=json", "-f", &image.format, "--"]).arg(&image.path);
    let out = run_with_deadline(info, SOON)?;
    let info: Value = serde_json::from_str(&out.stdout).context("what qemu-img says")?;
    info["virtual-size"].as_u64().context("no size")
}
