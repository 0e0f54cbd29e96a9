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
    /// Its node's name, such as `disk0`; `nvram`: the firmware's variables.
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
        let disk = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        if !disk && id != "nvram" {
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
        if !reads_as(a, b)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether two images read the same.
pub fn reads_as(a: &DiskImage, b: &DiskImage) -> Result<bool> {
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-q", "-U", "-f", &a.format, "-F", &b.format, "--"]);
    compare.arg(&a.path).arg(&b.path);
    let out = run_with_deadline(compare, COMPARE)?;
    match out.code {
        0 => Ok(true),
        1 => Ok(false),
        _ => bail!("qemu-img compare of {}: {}", a.id, out.stderr.trim()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn one_byte_makes_images_differ_and_holes_do_not() {
        let image = |bytes: &[u8], size: u64| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(bytes).unwrap();
            file.as_file().set_len(size).unwrap();
            file
        };
        let of = |file: &tempfile::NamedTempFile| DiskImage {
            id: "disk0".into(),
            path: file.path().into(),
            format: "raw".into(),
        };
        let (holes, zeros) = (image(&[], 1 << 20), image(&[0; 1 << 20], 1 << 20));
        let other = image(&[&[0; 70_000][..], &[1]].concat(), 1 << 20);
        assert!(reads_as(&of(&holes), &of(&zeros)).unwrap());
        assert!(!reads_as(&of(&holes), &of(&other)).unwrap());
        assert!(
            reads_as(&of(&holes), &DiskImage { path: "/nowhere".into(), ..of(&zeros) }).is_err()
        );
    }
}
