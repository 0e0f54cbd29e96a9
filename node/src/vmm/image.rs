//! Disk images through `qemu-img`: what one is, and the making of a copy's own.
//!
//! Owns the tool's bounded runs and what its answers mean. Never writes to an image that exists, and removes only what
//! [`create`] named. Invariant: nobody but this user can read an image that it makes.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use godwit_protocol::id::CopyId;
use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use super::complaint::last_complaint;
use super::disk::{Backing, MAX_BACKING, ResolvedDisk, image_path};
use super::refusal::{Refusal, file_refusal};
use super::reserve::reserve_path;
use super::resolved::{Digest, ResolvedSpec};
use super::spec::{DiskFormat, DiskSpec};

/// Time for one run of `qemu-img`, which reads or writes metadata only.
const DEADLINE: Duration = Duration::from_secs(20);
/// Most output taken, in bytes. A chain of 17 layers needs some 20 KiB.
const MAX_OUTPUT: u64 = 1 << 20;
/// How a qcow2 begins.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Why an image cannot be a disk of a VM. Nothing was changed, but for [`ImageError::Create`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ImageError {
    /// `qemu-img` does not run or does not answer.
    #[error("qemu-img: {0}; install qemu-utils (scripts/setup does)")]
    Tool(String),
    /// It says no.
    #[error("disk {path}: {reason}")]
    Refused {
        /// The image.
        path: String,
        /// The reason, as `qemu-img` gives it.
        reason: String,
    },
    /// Another process has it open.
    #[error("disk {0} is in use by another process; stop that one first")]
    InUse(String),
    /// The user that the node runs as may not.
    #[error("disk {0}: permission denied; give the node's user the right to read and write it")]
    Permission(String),
    /// It is not what the spec says.
    #[error("disk {path} is {found}, the spec says {said}; correct `format`")]
    Format {
        /// The image.
        path: String,
        /// What it is.
        found: String,
        /// What was said.
        said: &'static str,
    },
    /// Something that godwit does not move.
    #[error("disk {path}: {what}; `qemu-img convert` makes an image that can move")]
    Unsupported {
        /// The image or the layer.
        path: String,
        /// What about it.
        what: String,
    },
    /// A new image cannot be made. Nothing of it is left.
    #[error("cannot make {path}: {reason}")]
    Create {
        /// The image.
        path: String,
        /// Why.
        reason: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Layer {
    filename: String,
    format: String,
    virtual_size: u64,
    #[serde(default)]
    actual_size: u64,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    backing_filename_format: Option<String>,
    #[serde(default)]
    full_backing_filename: Option<String>,
    #[serde(default)]
    snapshots: Vec<Value>,
    #[serde(default)]
    format_specific: Value,
}

/// What the image of `disk` is, down its backing chain. Blocking: reads bases whole when `digest` does.
pub(super) fn inspect(id: String, disk: DiskSpec, digest: Digest) -> Result<ResolvedDisk, Refusal> {
    // Opened first: the kernel's words about a missing file or right are clearer than the tool's.
    let opened = OpenOptions::new().read(true).write(!disk.readonly).open(&disk.path);
    let mut file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => ImageError::Permission(name(&disk.path)).into(),
        _ => file_refusal(&disk.path, &error),
    })?;
    if disk.format == DiskFormat::Raw {
        let mut magic = [0; 4];
        let read = file.read_exact(&mut magic);
        if read.is_ok() && magic == QCOW2_MAGIC {
            let (found, said) = ("qcow2".into(), disk.format.name());
            return Err(ImageError::Format { path: name(&disk.path), found, said }.into());
        }
    }
    if !disk.shared && is_open_elsewhere(&file, disk.readonly) {
        return Err(ImageError::InUse(name(&disk.path)).into());
    }
    let layers = chain(&disk)?;
    let top = layers.first().ok_or_else(|| ImageError::Tool("it knows of no image".into()))?;
    let mut backing = Vec::new();
    if !disk.shared {
        check_layers(&disk, &layers)?;
        for layer in &layers[1..] {
            backing.push(base(layer, digest)?);
        }
    }
    let DiskSpec { path, format, shared, readonly, discard } = disk;
    let (size, allocated) = (top.virtual_size, top.actual_size);
    Ok(ResolvedDisk { id, path, format, shared, readonly, discard, size, allocated, backing })
}

/// Whether a QEMU has the image open in a way that this VM's own would refuse. `qemu-img info` finds that for qcow2 only.
fn is_open_elsewhere(file: &File, readonly: bool) -> bool {
    // QEMU's own scheme: who writes holds a read lock on byte 101, who lets nobody else write one on byte 201.
    let bytes: &[libc::off_t] = if readonly { &[101] } else { &[101, 201] };
    bytes.iter().any(|byte| {
        let mut lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: *byte,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: the descriptor is open and `lock` outlives the call, which only asks. What it cannot say QEMU finds out.
        let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
        asked == 0 && lock.l_type != libc::F_UNLCK as libc::c_short
    })
}

/// Asks for the chain. A shared image may be open elsewhere, one that moves may not.
fn chain(disk: &DiskSpec) -> Result<Vec<Layer>, ImageError> {
    let mut args = vec!["info", "--backing-chain", "--output=json", "-f", disk.format.name()];
    if disk.shared {
        args.push("-U");
    }
    let path = name(&disk.path);
    let answer = run(&[&args[..], &["--", path.as_str()]].concat())?;
    let answer = answer.map_err(|reason| match &reason {
        _ if reason.contains("Failed to get") && reason.contains("lock") => {
            ImageError::InUse(path.clone())
        }
        _ if reason.contains("is not in qcow2 format") => {
            let found = "no qcow2".into();
            ImageError::Format { path: path.clone(), found, said: disk.format.name() }
        }
        _ => ImageError::Refused { path: path.clone(), reason },
    })?;
    serde_json::from_slice(&answer).map_err(|error| ImageError::Tool(error.to_string()))
}

fn check_layers(disk: &DiskSpec, layers: &[Layer]) -> Result<(), ImageError> {
    if layers.len() > MAX_BACKING + 1 {
        let what = format!("its backing chain is longer than {MAX_BACKING}");
        return Err(ImageError::Unsupported { path: name(&disk.path), what });
    }
    for (index, layer) in layers.iter().enumerate() {
        let no = |what: String| Err(ImageError::Unsupported { path: layer.filename.clone(), what });
        let data = layer.format_specific.get("data");
        if layer.encrypted {
            return no("it is encrypted".into());
        }
        if data.and_then(|data| data.get("data-file")).is_some() {
            return no("it keeps its data in another file".into());
        }
        if data.and_then(|data| data.get("corrupt")).and_then(Value::as_bool) == Some(true) {
            return no("it is marked corrupt".into());
        }
        if index == 0 && !layer.snapshots.is_empty() {
            return no("it has internal snapshots, which would not move".into());
        }
        if layer.full_backing_filename.is_some() && layer.backing_filename_format.is_none() {
            // Probed, a guest could choose the format of what it wrote itself.
            return no("it does not say the format of its backing file".into());
        }
    }
    Ok(())
}

fn base(layer: &Layer, digest: Digest) -> Result<Backing, Refusal> {
    let path = PathBuf::from(&layer.filename);
    let format = match layer.format.as_str() {
        "raw" => DiskFormat::Raw,
        "qcow2" => DiskFormat::Qcow2,
        other => {
            let what = format!("format {other} is not raw or qcow2");
            return Err(ImageError::Unsupported { path: name(&path), what }.into());
        }
    };
    let bytes = std::fs::metadata(&path).map_err(|error| file_refusal(&path, &error))?.len();
    let blake3 = digest(&path).map_err(|error| file_refusal(&path, &error))?;
    Ok(Backing { path, format, blake3, bytes })
}

/// Makes the empty images of the disks that move, of the same size and form as at the source, for a spec that
/// [`ResolvedSpec::place`] gave. Blocking.
///
/// # Errors
/// [`ImageError::Create`]; those made before are removed again.
pub fn create(spec: &ResolvedSpec) -> Result<(), ImageError> {
    let mut made: Vec<&Path> = Vec::new();
    for disk in spec.moving() {
        match create_one(disk) {
            Ok(()) => made.push(&disk.path),
            Err(error) => {
                for path in made {
                    let _ = std::fs::remove_file(path);
                }
                return Err(error);
            }
        }
    }
    Ok(())
}

fn create_one(disk: &ResolvedDisk) -> Result<(), ImageError> {
    let failed = |reason: String| ImageError::Create { path: name(&disk.path), reason };
    // First the file, so that it is never readable by others and an existing one is never touched.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&disk.path);
    let file = file.map_err(|error| failed(error.to_string()))?;
    let made = match disk.format {
        DiskFormat::Raw => file.set_len(disk.size).map_err(|error| failed(error.to_string())),
        DiskFormat::Qcow2 => create_qcow2(disk),
    };
    let made = made.and_then(|()| file.sync_all().map_err(|error| failed(error.to_string())));
    if made.is_err() {
        let _ = std::fs::remove_file(&disk.path);
    }
    made
}

fn create_qcow2(disk: &ResolvedDisk) -> Result<(), ImageError> {
    let (path, size) = (name(&disk.path), disk.size.to_string());
    let base = disk.backing.first().map(|layer| (name(&layer.path), layer.format.name()));
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if let Some((base, format)) = &base {
        args.extend(["-b", base.as_str(), "-F", format]);
    }
    args.extend(["--", path.as_str(), size.as_str()]);
    run(&args)?.map(drop).map_err(|reason| ImageError::Create { path: path.clone(), reason })
}

/// Removes what a failed copy left in `dir`: the images that [`create`] made for it and the room held for them. What is
/// not there is no error.
///
/// # Errors
/// The first file that cannot be removed; the others are.
pub fn remove(spec: &ResolvedSpec, dir: &Path, copy: CopyId) -> io::Result<()> {
    let mut result = Ok(());
    for disk in spec.moving() {
        let image = image_path(dir, spec.id, copy, disk);
        for path in [reserve_path(&image), image] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => result = Err(error),
                _ => {}
            }
        }
    }
    result
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

/// Runs `qemu-img`: its output, or as the inner error its complaint.
fn run(args: &[&str]) -> Result<Result<Vec<u8>, String>, ImageError> {
    let tool = |error: io::Error| ImageError::Tool(error.to_string());
    let mut command = Command::new("qemu-img");
    // Its complaints are read: they must be in one language.
    command.args(args).env("LC_ALL", "C").stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(tool)?;
    let (sender, receiver) = mpsc::channel();
    let out = child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>);
    let err = child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>);
    for (index, pipe) in [out, err].into_iter().enumerate() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What is not read of an output that is too long ends the tool by SIGPIPE.
            let _ = pipe.map(|pipe| pipe.take(MAX_OUTPUT).read_to_end(&mut bytes));
            let _ = sender.send((index, bytes));
        });
    }
    let mut texts = [Vec::new(), Vec::new()];
    let end = Instant::now() + DEADLINE;
    for _ in 0..texts.len() {
        let left = end.saturating_duration_since(Instant::now());
        let Ok((index, bytes)) = receiver.recv_timeout(left) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(ImageError::Tool(format!("no answer within {DEADLINE:?}")));
        };
        texts[index] = bytes;
    }
    // Both pipes are closed: it is ending.
    let status = child.wait().map_err(tool)?;
    let [out, err] = texts;
    if status.success() {
        return Ok(Ok(out));
    }
    Ok(Err(last_complaint(&String::from_utf8_lossy(&err))))
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
