//! The images that a QEMU has open, and whether two of them read the same.
//!
//! Owns what is read of a QEMU's command line and the comparing by `qemu-img`. Never asks a node or a monitor, never writes.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::node::run_with_deadline;

/// How long two images may take to be compared.
const COMPARE: Duration = Duration::from_secs(50);

/// A disk of a QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskImage {
    /// Its node's name, such as `disk0`.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// The guest's disks, by the command line of the QEMU `pid`, in order.
pub fn of_qemu(pid: i32) -> Result<Vec<DiskImage>> {
    let path = format!("/proc/{pid}/cmdline");
    let line = std::fs::read(&path).context(path)?;
    let args: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let after = |pair: &[std::borrow::Cow<'_, str>]| match pair {
        [option, value] if option == "-blockdev" => serde_json::from_str::<Value>(value).ok(),
        _ => None,
    };
    let nodes: Vec<Value> = args.windows(2).filter_map(after).collect();
    let file_of = |id: &str| {
        let name = format!("{id}-file");
        nodes.iter().find(|n| n["node-name"] == name.as_str())?["filename"].as_str()
    };
    let mut found = Vec::new();
    for node in nodes.iter().filter(|n| n["driver"] == "raw" || n["driver"] == "qcow2") {
        let id = node["node-name"].as_str().unwrap_or_default();
        let number = id.strip_prefix("disk").unwrap_or_default();
        if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let path = file_of(id).with_context(|| format!("{id} has no file"))?;
        let format = node["driver"].as_str().unwrap_or_default();
        found.push(DiskImage { id: id.to_owned(), path: path.into(), format: format.to_owned() });
    }
    Ok(found)
}

/// Whether every disk of one QEMU reads as the same disk of another. Neither guest may run; locks are not asked for.
pub fn equal(one: i32, other: i32) -> Result<bool> {
    let (one, other) = (of_qemu(one)?, of_qemu(other)?);
    ensure!(one.len() == other.len() && !one.is_empty(), "{one:?} and {other:?}");
    for (a, b) in one.iter().zip(&other) {
        ensure!(a.id == b.id && a.path != b.path, "{a:?} and {b:?}");
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-q", "-U", "-f", &a.format, "-F", &b.format, "--"]);
        let out = run_with_deadline(
            {
                compare.arg(&a.path).arg(&b.path);
                compare
            },
            COMPARE,
        )?;
        match out.code {
            0 => {}
            1 => return Ok(false),
            _ => bail!("qemu-img compare of {}: {}", a.id, out.stderr.trim()),
        }
    }
    Ok(true)
}

/// Has `e2fsck -fn` look at the file system that is the whole of an image, which nobody has open.
pub fn file_system_is_clean(image: &DiskImage) -> Result<bool> {
    let raw = tempfile::NamedTempFile::new_in(image.path.parent().context("a directory")?)?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-q", "-f", &image.format, "-O", "raw", "--"]);
    convert.arg(&image.path).arg(raw.path());
    let out = run_with_deadline(convert, COMPARE)?;
    ensure!(out.ok(), "qemu-img convert: {}", out.stderr.trim());
    let mut fsck = Command::new("e2fsck");
    fsck.args(["-f", "-n"]).arg(raw.path());
    let out = run_with_deadline(fsck, COMPARE)?;
    if !out.ok() {
        println!("e2fsck: {}{}", out.stdout, out.stderr);
    }
    Ok(out.ok())
}
