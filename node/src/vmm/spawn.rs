//! The birth of a QEMU process: its directory, its descriptors, its session.
//!
//! Owns what happens between the decision to start a copy and a process that exists. Never talks to it. Invariant: the
//! copy's record is on disk before the process is made, and no descriptor but the named ones crosses `exec`.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use godwit_protocol::id::CopyId;

use super::args::{self, Inherited};
use super::memfd::GuestMemory;
use super::pidfd::{PidFd, boot_id, start_time};
use super::process::{ProcessError, io_error};
use super::record::{CopyRecord, FILE, ProcessRecord};
use super::resolved::ResolvedSpec;

/// Longest directory path: a unix socket's path has 107 bytes.
const MAX_DIR: usize = 92;

/// What a copy is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// To start the guest from nothing, with [`Qemu::cont`].
    Boot,
    /// To receive a migration, with [`Qemu::incoming_start`].
    Incoming,
    /// To show the disks of a guest that has ended, in the directory of the copy that it ran in. Never run.
    Still,
    /// To start a guest from the disks that it left, in a directory that [`CopyRecord::prepare`] made.
    On,
}

impl Mode {
    /// Whether what describes the copy is there before it is started, and stays if that fails.
    #[must_use]
    pub fn keeps_directory(self) -> bool {
        matches!(self, Self::Still | Self::On)
    }
}

/// What is needed to start a copy.
#[derive(Debug)]
pub struct StartParams {
    /// The VM.
    pub spec: ResolvedSpec,
    /// The copy's id.
    pub copy: CopyId,
    /// The copy's directory; made with mode 0700, must not hold another copy. Described before: [`Mode::keeps_directory`].
    pub dir: PathBuf,
    /// The guest's memory, of the spec's size.
    pub memory: Arc<GuestMemory>,
    /// One open tap per NIC, in the spec's order. They are closed in this process once QEMU has them: keep duplicates.
    pub taps: Vec<OwnedFd>,
    /// What for.
    pub mode: Mode,
    /// The QEMU to run.
    pub qemu: PathBuf,
}

pub(super) fn check_params(params: &StartParams) -> Result<(), ProcessError> {
    params.spec.check()?;
    let bad = |reason: String| Err(ProcessError::BadParams(reason));
    if params.taps.len() != params.spec.nics.len() {
        return bad(format!("{} NICs, {} taps", params.spec.nics.len(), params.taps.len()));
    }
    if params.memory.size() != params.spec.memory {
        return bad("the memory is not of the VM's size".into());
    }
    let dir = params.dir.as_os_str();
    if dir.len() > MAX_DIR || !params.dir.is_absolute() {
        return bad(format!(
            "{} must be absolute and at most {MAX_DIR} bytes long; choose a shorter --state",
            dir.display()
        ));
    }
    if !params.mode.keeps_directory() && params.dir.join(FILE).exists() {
        return bad(format!("{} holds another copy", dir.display()));
    }
    Ok(())
}

/// Spawns QEMU and opens it. Blocking.
pub(super) fn spawn(
    record: &CopyRecord,
    dir: &Path,
    memory: &GuestMemory,
    taps: Vec<OwnedFd>,
    qemu: &Path,
) -> Result<(PidFd, ProcessRecord), ProcessError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(io_error(format!("making {}", dir.display())))?;
    record.write(dir).map_err(io_error("writing copy.json"))?;
    // A QEMU before it, or a start that was cut short, left its own.
    let _ = std::fs::remove_file(dir.join("qmp.sock"));
    // The node makes the monitor's socket, so that it can connect before QEMU is up: no polling for a file.
    let listener = UnixListener::bind(dir.join("qmp.sock")).map_err(io_error("making qmp.sock"))?;
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(dir.join("qemu.log"));
    let log = log.map_err(io_error("making qemu.log"))?;
    let inherited = Inherited {
        memory: memory.raw_fd(),
        qmp: listener.as_raw_fd(),
        taps: taps.iter().map(AsRawFd::as_raw_fd).collect(),
    };
    let mut command = Command::new(qemu);
    command.args(args::build(&record.spec, &inherited, record.incoming)).current_dir(dir);
    let second = log.try_clone().map_err(io_error("making qemu.log"))?;
    command.stdin(Stdio::null()).stdout(log).stderr(second);
    inherit(&mut command, &inherited);
    let child = command.spawn().map_err(io_error(format!("running {}", qemu.display())))?;
    let pid = child.id();
    // As our child it cannot be reaped before we have opened it.
    let process = PidFd::open(pid).map_err(io_error("watching QEMU"))?;
    let recorded = ProcessRecord {
        pid,
        // A zombie already: 0 matches no process, and `connect` reports the end.
        start_time: start_time(pid).unwrap_or(0),
        boot_id: boot_id().map_err(io_error("reading the boot id"))?,
        memory_fd: inherited.memory,
        tap_fds: inherited.taps,
    };
    Ok((process, recorded))
}

/// Makes the child keep the descriptors, in a session of its own.
fn inherit(command: &mut Command, inherited: &Inherited) {
    let mut fds: Vec<RawFd> = vec![inherited.memory, inherited.qmp];
    fds.extend(&inherited.taps);
    let prepare = move || {
        for fd in &fds {
            // SAFETY: async-signal-safe; clears close-on-exec in the child alone.
            if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // A session of its own: no signal meant for the node's terminal or process group reaches it.
        // SAFETY: async-signal-safe, no memory is passed.
        if unsafe { libc::setsid() } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: `prepare` runs between fork and exec and makes only async-signal-safe calls; it allocates nothing.
    unsafe { command.pre_exec(prepare) };
}
