//! One copy of a VM as a QEMU process.
//!
//! Owns the process's start, its adoption after a restart of the node, its end, and the copy's directory (0700: sockets,
//! logs, `copy.json`). Never runs a guest by itself: QEMU starts with `-S`, and only [`Qemu::cont`] runs vCPUs.
//! QEMU outlives the node: dropping a [`Qemu`] closes the monitor and leaves the process alone.
//!
//! ```text
//! start: directory -> record without process -> spawn -S -> record with process -> QMP -> Qemu
//! readopt: record -> same boot, same process? -> QMP, memory -> Qemu | Gone
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::id::CopyId;
use thiserror::Error;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::complaint::last_log_line;
use super::memfd::{GuestMemory, MemoryError};
use super::pidfd::{Exit, PidFd, boot_id, start_time};
use super::qmp::{Qmp, QmpError};
use super::record::{CopyRecord, FILE, ProcessRecord};
use super::resolved::ResolvedSpec;
use super::spawn::{StartParams, check_params, spawn};
use super::spec::SpecError;

/// Time for QEMU to come up and greet: large memory and a busy host are slow.
pub const START_DEADLINE: Duration = Duration::from_secs(30);
/// Time for a process to die after SIGKILL (it may have much memory to give back).
const KILL_DEADLINE: Duration = Duration::from_secs(30);

/// Why a QEMU does not start, cannot be adopted, or does not do what it was told.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// The spec breaks a rule.
    #[error("{0}")]
    Spec(#[from] SpecError),
    /// What was passed does not fit the spec.
    #[error("Cannot start QEMU: {0}")]
    BadParams(String),
    /// A file or system call.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// QEMU ended; the last line of its log says why.
    #[error("QEMU {exit}: {log}")]
    Exited {
        /// How.
        exit: Exit,
        /// The last line of its log.
        log: String,
    },
    /// The monitor.
    #[error("{0}")]
    Qmp(#[from] QmpError),
    /// The memory.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// Something that should have happened did not, in time.
    #[error("{what} did not happen within {after:?}")]
    Deadline {
        /// What was awaited.
        what: String,
        /// How long.
        after: Duration,
    },
    /// QEMU reports that a migration failed.
    #[error("QEMU's migration ended as {status}: {reason}")]
    Migration {
        /// QEMU's state: `failed`, `cancelled`.
        status: String,
        /// QEMU's reason.
        reason: String,
    },
    /// The mirror of a disk failed or is not where it should be. The guest is not touched by it.
    #[error("the mirror of {disk}: {reason}")]
    Mirror {
        /// The disk.
        disk: String,
        /// QEMU's reason.
        reason: String,
    },
}

pub(super) fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> ProcessError {
    let action = action.into();
    move |source| ProcessError::Io { action, source }
}

#[derive(Debug)]
struct Inner {
    record: CopyRecord,
    dir: PathBuf,
    qmp: Qmp,
    memory: Arc<GuestMemory>,
    process: Arc<PidFd>,
    recorded: ProcessRecord,
    exit: watch::Receiver<Option<Exit>>,
}

/// A living (or just dead) QEMU that runs one copy. Clones share it.
#[derive(Debug, Clone)]
pub struct Qemu(Arc<Inner>);

/// What became of a copy while the node was not there.
#[derive(Debug)]
pub enum Adoption {
    /// It lives and is managed again.
    Alive(Qemu),
    /// Its QEMU is gone; this is what it was.
    Gone(Box<CopyRecord>),
}

impl Qemu {
    /// Starts a QEMU with `-S`. When this fails nothing of it is left but the directory.
    ///
    /// # Errors
    /// See [`ProcessError`]; in particular [`ProcessError::Exited`] with QEMU's own reason.
    pub async fn start(params: StartParams) -> Result<Self, ProcessError> {
        check_params(&params)?;
        let StartParams { spec, copy, dir, memory, taps, mode, qemu } = params;
        let record = CopyRecord::new(copy, spec, mode);
        let for_spawn = (record.clone(), dir.clone(), memory.clone());
        let spawned = spawn_blocking(move || {
            let (mut record, dir, memory) = for_spawn;
            let (process, recorded) = spawn(&record, &dir, &memory, taps, &qemu)?;
            record.process = Some(recorded.clone());
            let written = record.write(&dir);
            if written.is_err() {
                // It stands before its first instruction; a copy that is not on record must not live.
                let _ = process.signal(libc::SIGKILL);
            }
            written.map_err(io_error("writing copy.json"))?;
            Ok::<_, ProcessError>((record, process, recorded))
        });
        let joined = spawned.await.map_err(|e| io_error("starting QEMU")(io::Error::other(e)))?;
        let (record, process, recorded) = joined?;
        let process = Arc::new(process);
        let exit = watch_process(process.clone());
        match connect(&dir, exit.clone(), START_DEADLINE).await {
            Ok(qmp) => {
                let inner = Inner { record, dir, qmp, memory, process, recorded, exit };
                Ok(Self(Arc::new(inner)))
            }
            Err(error) => {
                let _ = process.signal(libc::SIGKILL);
                let _ = wait_exit(exit, KILL_DEADLINE).await;
                Err(error)
            }
        }
    }

    /// Finds the QEMU of the copy in `dir` after a restart of the node.
    ///
    /// # Errors
    /// When there is no record, or the process lives and its monitor does not answer.
    pub async fn readopt(dir: &Path) -> Result<Adoption, ProcessError> {
        let record =
            CopyRecord::read(dir).map_err(io_error(format!("reading {}", dir.display())))?;
        let Some(recorded) = record.process.clone() else {
            quit_unrecorded(dir).await;
            return Ok(Adoption::Gone(Box::new(record)));
        };
        let Some(process) = open_recorded(&recorded).map_err(io_error("finding QEMU"))? else {
            return Ok(Adoption::Gone(Box::new(record)));
        };
        let exit = watch_process(Arc::clone(&process));
        let qmp = match connect(dir, exit.clone(), START_DEADLINE).await {
            Ok(qmp) => qmp,
            Err(ProcessError::Exited { .. }) => return Ok(Adoption::Gone(Box::new(record))),
            Err(error) => return Err(error),
        };
        let memory = GuestMemory::reopen(recorded.pid, recorded.memory_fd, record.spec.memory)?;
        let (dir, memory) = (dir.to_owned(), Arc::new(memory));
        let inner = Inner { record, dir, qmp, memory, process, recorded, exit };
        Ok(Adoption::Alive(Self(Arc::new(inner))))
    }

    /// The copy.
    #[must_use]
    pub fn copy(&self) -> CopyId {
        self.0.record.copy
    }

    /// The VM.
    #[must_use]
    pub fn spec(&self) -> &ResolvedSpec {
        &self.0.record.spec
    }

    /// Whether it was started to receive a migration.
    #[must_use]
    pub fn was_incoming(&self) -> bool {
        self.0.record.incoming
    }

    /// Whether it was started to show its disks: it takes no `cont`.
    #[must_use]
    pub fn is_still(&self) -> bool {
        self.0.record.still
    }

    /// The copy's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The process's number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.recorded.pid
    }

    /// The guest's memory. It may outlive the process.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.0.memory
    }

    /// The monitor.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.0.qmp
    }

    /// The guest's first serial port, a unix socket that serves one client at a time.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.0.dir.join("console.sock")
    }

    /// The guest's second serial port, if the spec asks for one.
    #[must_use]
    pub fn serial1(&self) -> Option<PathBuf> {
        self.spec().serial1.then(|| self.0.dir.join("serial1.sock"))
    }

    /// A duplicate of QEMU's own descriptor of NIC `index`'s tap; for a node that was restarted.
    ///
    /// # Errors
    /// No such NIC, or the kernel's.
    pub fn tap(&self, index: usize) -> Result<OwnedFd, ProcessError> {
        let no_nic = || ProcessError::BadParams(format!("there is no NIC {index}"));
        let fd = *self.0.recorded.tap_fds.get(index).ok_or_else(no_nic)?;
        self.0.process.duplicate_fd(fd).map_err(io_error("taking the tap from QEMU"))
    }

    /// How the process ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        *self.0.exit.borrow()
    }

    /// Waits for the process's end, for ever: the caller sets the deadline.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.0.exit.clone();
        let ended = exit.wait_for(Option::is_some).await;
        ended.ok().and_then(|exit| *exit).unwrap_or(Exit::Unknown)
    }

    /// Ends the process: QMP `quit`, and SIGKILL if it has not gone within `deadline`.
    ///
    /// # Errors
    /// [`ProcessError::Deadline`] if not even SIGKILL ended it.
    pub async fn quit(&self, deadline: Duration) -> Result<Exit, ProcessError> {
        let polite = async {
            // Whatever it answers, what counts is that it goes.
            let _ = self.0.qmp.quit().await;
            self.exited().await
        };
        match timeout(deadline, polite).await {
            Ok(exit) => Ok(exit),
            Err(_) => self.kill().await,
        }
    }

    /// Ends the process at once.
    ///
    /// # Errors
    /// [`ProcessError::Deadline`] if it does not go.
    pub async fn kill(&self) -> Result<Exit, ProcessError> {
        // An error means that it has gone already.
        let _ = self.0.process.signal(libc::SIGKILL);
        wait_exit(self.0.exit.clone(), KILL_DEADLINE).await
    }

    pub(super) fn gone_error(&self) -> Option<ProcessError> {
        self.exit().map(|exit| ProcessError::Exited { exit, log: last_log_line(&self.0.dir) })
    }
}

/// The directories of copies right below `root`; none when `root` is not there.
///
/// # Errors
/// What reading `root` gives.
pub fn copy_dirs(root: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.join(FILE).is_file() {
            dirs.push(path);
        }
    }
    dirs.sort();
    Ok(dirs)
}

/// Kills the recorded QEMU of `dir`, if it lives, without its monitor; for one that [`Qemu::readopt`] cannot reach.
///
/// # Errors
/// No record, or [`ProcessError::Deadline`].
pub async fn kill_copy(dir: &Path) -> Result<(), ProcessError> {
    let record = CopyRecord::read(dir).map_err(io_error(format!("reading {}", dir.display())))?;
    let Some(recorded) = record.process else { return Ok(()) };
    if let Some(process) = open_recorded(&recorded).map_err(io_error("finding QEMU"))? {
        let _ = process.signal(libc::SIGKILL);
        wait_exit(watch_process(process), KILL_DEADLINE).await?;
    }
    Ok(())
}

fn watch_process(process: Arc<PidFd>) -> watch::Receiver<Option<Exit>> {
    let (sender, receiver) = watch::channel(None);
    // Lives as long as the process, so that a child is always reaped, whoever still holds the `Qemu`.
    tokio::spawn(async move {
        let exit = process.wait().await.unwrap_or(Exit::Unknown);
        sender.send_replace(Some(exit));
    });
    receiver
}

async fn wait_exit(
    mut exit: watch::Receiver<Option<Exit>>,
    deadline: Duration,
) -> Result<Exit, ProcessError> {
    match timeout(deadline, exit.wait_for(Option::is_some)).await {
        Ok(ended) => Ok(ended.ok().and_then(|exit| *exit).unwrap_or(Exit::Unknown)),
        Err(_) => Err(ProcessError::Deadline { what: "the end of QEMU".into(), after: deadline }),
    }
}

async fn connect(
    dir: &Path,
    mut exit: watch::Receiver<Option<Exit>>,
    deadline: Duration,
) -> Result<Qmp, ProcessError> {
    let socket = dir.join("qmp.sock");
    let error = match Qmp::connect(&socket, deadline).await {
        Ok(qmp) => return Ok(qmp),
        Err(error) => error,
    };
    // A monitor that closes is most often a QEMU that ends: its exit says more than the closed socket.
    let lost = matches!(error, QmpError::Disconnected | QmpError::Connect { .. });
    let grace = Duration::from_secs(if lost { 5 } else { 0 });
    match timeout(grace, exit.wait_for(Option::is_some)).await {
        Ok(ended) => {
            let exit = ended.ok().and_then(|exit| *exit).unwrap_or(Exit::Unknown);
            Err(ProcessError::Exited { exit, log: last_log_line(dir) })
        }
        Err(_) => Err(error.into()),
    }
}

/// The recorded process, if it is still the same one.
fn open_recorded(recorded: &ProcessRecord) -> io::Result<Option<Arc<PidFd>>> {
    if recorded.boot_id != boot_id()? {
        return Ok(None);
    }
    let process = match PidFd::open(recorded.pid) {
        Ok(process) => process,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    // After the opening: from here on the number cannot pass to another process unnoticed.
    let same = start_time(recorded.pid) == Some(recorded.start_time);
    Ok(same.then(|| Arc::new(process)))
}

/// The node was killed between spawning and recording: nobody can have run this guest. Ends its QEMU, if there is one.
async fn quit_unrecorded(dir: &Path) {
    let socket = dir.join("qmp.sock");
    let Ok(qmp) = Qmp::connect(&socket, Duration::from_secs(5)).await else { return };
    let _ = qmp.quit().await;
    if timeout(Duration::from_secs(5), qmp.closed()).await.is_err() {
        tracing::warn!(dir = %dir.display(), "an unrecorded QEMU does not end");
    }
}
