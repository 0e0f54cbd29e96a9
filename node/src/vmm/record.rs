//! What the node must know about a copy after it was killed and started again: `copy.json` in the copy's directory.
//!
//! Owns the file's form and its atomic, durable replacement. Invariant: it names a process before that process may run
//! a guest; a copy without a process in it never ran.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use godwit_protocol::id::CopyId;
use serde::{Deserialize, Serialize};

use super::resolved::{ResolvedNic, ResolvedSpec};
use super::spawn::Mode;

/// Name of the file.
pub const FILE: &str = "copy.json";
/// Longest file read, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// Version of the form.
const VERSION: u32 = 1;

/// A living process and what it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Its number.
    pub pid: u32,
    /// Its start, in clock ticks since boot.
    pub start_time: u64,
    /// The host's boot in which it lives.
    pub boot_id: String,
    /// Its descriptor of the guest's memory.
    pub memory_fd: RawFd,
    /// Its descriptors of the taps, one per NIC.
    pub tap_fds: Vec<RawFd>,
}

/// A copy as recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRecord {
    version: u32,
    /// The copy.
    pub copy: CopyId,
    /// The VM.
    pub spec: ResolvedSpec,
    /// Whether it was started to receive a migration.
    pub incoming: bool,
    /// Whether its guest ran: if not, nothing was written to its images that came from elsewhere. A record that does not
    /// say so is of a daemon that did not write it down.
    #[serde(default = "unsaid")]
    pub ran: bool,
    /// Whether it was started to show its disks: its guest must not run.
    #[serde(default)]
    pub still: bool,
    /// The operator wants its VM removed: it has ended, and its record may not say so yet.
    #[serde(default)]
    pub removed: bool,
    /// Its QEMU; absent while it is being started.
    pub process: Option<ProcessRecord>,
}

impl CopyRecord {
    pub(super) fn new(copy: CopyId, spec: ResolvedSpec, mode: Mode) -> Self {
        let (incoming, still) = (mode == Mode::Incoming, mode == Mode::Still);
        let (ran, removed, process) = (!incoming, false, None);
        Self { version: VERSION, copy, spec, incoming, ran, still, removed, process }
    }

    /// Describes a copy that will be started once a record names it ([`Mode::On`]), in a directory of its own. Durable
    /// when it returns. One that is described is left as it is: by now it may have a QEMU.
    ///
    /// # Errors
    /// What making and writing give.
    pub fn prepare(dir: &Path, copy: CopyId, spec: ResolvedSpec) -> io::Result<()> {
        if Self::read(dir).is_ok_and(|record| record.copy == copy) {
            return Ok(());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        Self::new(copy, spec, Mode::On).write(dir)?;
        dir.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
    }

    /// Whether no QEMU of it was ever there, though it is to be booted here.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        self.process.is_none() && !self.incoming && !self.still
    }

    /// Writes the record so that a crash leaves the old or the new one, and it survives a power cut.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        let temporary = dir.join("copy.json.new");
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&temporary, dir.join(FILE))?;
        File::open(dir)?.sync_all()
    }

    /// Reads the record in `dir`.
    ///
    /// # Errors
    /// When there is none, or it is not understood.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let mut text = Vec::new();
        File::open(dir.join(FILE))?.take(MAX_BYTES).read_to_end(&mut text)?;
        let record: Self = serde_json::from_slice(&text)?;
        if record.version != VERSION {
            let reason = format!("copy.json of version {}, known is {VERSION}", record.version);
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        record.spec.check().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(record)
    }
}

/// One change of a record at a time.
static CHANGING: Mutex<()> = Mutex::new(());

fn change(dir: &Path, change: impl FnOnce(&mut CopyRecord)) -> io::Result<()> {
    let _one = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let old = CopyRecord::read(dir)?;
    let mut new = old.clone();
    change(&mut new);
    if new == old { Ok(()) } else { new.write(dir) }
}

fn unsaid() -> bool {
    true
}

/// The guest of the copy in `dir` runs.
///
/// # Errors
/// When there is no record, or it cannot be written: the old one stands.
pub fn ran(dir: &Path) -> io::Result<()> {
    change(dir, |record| record.ran = true)
}

/// The VM of the copy in `dir`, whose guest has ended, is to be removed.
///
/// # Errors
/// When there is no record, or it cannot be written: the old one stands.
pub fn removed(dir: &Path) -> io::Result<()> {
    change(dir, |record| record.removed = true)
}

/// The NICs of the copy in `dir` are these from now on.
///
/// # Errors
/// When there is no record, or it cannot be written: the old one stands.
pub fn rewire(dir: &Path, nics: Vec<ResolvedNic>) -> io::Result<()> {
    change(dir, |record| record.spec.nics = nics)
}
