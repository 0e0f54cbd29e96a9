//! Cleaning up: by name alone, so that a second run can remove what a killed one left.
//!
//! Owns the lab's run directory, its lock, and the rule by which a process belongs to a lab. Never touches anything
//! that carries another lab's id. Invariant: after [`sweep`] has returned `Ok`, no process, namespace, device or file
//! of that lab exists (a lab makes no device outside its namespaces).

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::ns::{MARK, NETNS_DIR, NetNs};

/// Directory of all labs' files and locks.
const RUN_DIR: &str = "/run/godwit-lab";
/// How long processes may take to be gone after SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(15);

/// What a lab has in the world at this moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Processes inside its namespaces or with its mark in their environment (this one and its ancestors not counted).
    pub pids: BTreeSet<i32>,
    /// Names of its namespaces.
    pub namespaces: Vec<String>,
    /// Its directory, when it exists.
    pub dir: Option<PathBuf>,
}

impl Leftovers {
    /// True: nothing is left.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dirs = usize::from(self.dir.is_some());
        write!(
            f,
            "{} processes, {} namespaces, {dirs} directories",
            self.pids.len(),
            self.namespaces.len()
        )
    }
}

/// The lab's own directory (0700 when it exists): `/run/godwit-lab/<labid>`.
pub fn run_dir(labid: &str) -> PathBuf {
    Path::new(RUN_DIR).join(labid)
}

/// An id is 1 to 8 characters of a-z and 0-9: it becomes part of names that have little room.
pub fn check_labid(labid: &str) -> Result<()> {
    let good = (1..=8).contains(&labid.len())
        && labid.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if !good {
        bail!("lab id {labid:?}: use 1 to 8 characters of a-z and 0-9");
    }
    Ok(())
}

/// Makes a directory that only root reads; its parent must exist.
pub fn make_private_dir(path: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(path);
    made.with_context(|| format!("making {}", path.display()))
}

/// The right to use a lab id; given back, and its file removed, on drop. The kernel gives it back when the process dies.
#[derive(Debug)]
pub struct LabLock {
    _file: File,
    path: PathBuf,
}

impl LabLock {
    /// Takes the lock at once or fails, naming the id.
    pub fn take(labid: &str) -> Result<Self> {
        check_labid(labid)?;
        make_private_dir(Path::new(RUN_DIR))?;
        let path = lock_path(labid);
        // A holder that ends removes the file: then what we locked is no longer what the name means, so look again.
        for _ in 0..100 {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)?;
            // SAFETY: flock on a descriptor that we own.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
                bail!("the lab {labid} is in use by another process: end it, or use another id");
            }
            let ours = file.metadata()?.ino();
            if fs::metadata(&path).is_ok_and(|named| named.ino() == ours) {
                return Ok(Self { _file: file, path });
            }
        }
        bail!("the lock {} keeps changing", path.display())
    }
}

impl Drop for LabLock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the lock's file when the process that holds it is about to exit without running Drop.
pub(super) fn forget_lock(labid: &str) {
    let _ = fs::remove_file(lock_path(labid));
}

fn lock_path(labid: &str) -> PathBuf {
    Path::new(RUN_DIR).join(format!("{labid}.lock"))
}

/// Finds what the lab has in the world, without changing anything.
pub fn leftovers(labid: &str) -> Result<Leftovers> {
    check_labid(labid)?;
    let prefix = format!("gw-{labid}-");
    let mut found = Leftovers::default();
    if let Ok(names) = fs::read_dir(NETNS_DIR) {
        for entry in names {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) {
                found.namespaces.push(name);
            }
        }
    }
    found.namespaces.sort();
    // A name whose mount is gone is a plain file; its inode is then no namespace's, which is harmless here.
    let inodes: BTreeSet<u64> =
        found.namespaces.iter().filter_map(|name| NetNs::named(name).inode().ok()).collect();
    found.pids = pids_of(labid, &inodes)?;
    found.dir = Some(run_dir(labid)).filter(|dir| dir.exists());
    Ok(found)
}

fn pids_of(labid: &str, inodes: &BTreeSet<u64>) -> Result<BTreeSet<i32>> {
    let mark = format!("{MARK}={labid}");
    let family = own_line();
    let mut pids = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("reading /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if family.contains(&pid) {
            continue;
        }
        // A process that ended meanwhile, and a zombie, have neither; they are gone for our purpose.
        let inside = fs::metadata(entry.path().join("ns/net"))
            .is_ok_and(|meta| inodes.contains(&meta.ino()));
        let marked = || {
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
        };
        if inside || marked() {
            pids.insert(pid);
        }
    }
    Ok(pids)
}

/// This process and its ancestors: never to be killed, even if started from a shell inside a lab.
fn own_line() -> BTreeSet<i32> {
    let mut line = BTreeSet::new();
    let mut pid = nix::unistd::getpid().as_raw();
    while pid > 0 && line.insert(pid) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses may contain anything; the parent is the second field after it.
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        pid = parent.and_then(|field| field.parse().ok()).unwrap_or(0);
    }
    line
}

/// Removes everything of the lab and says what there was. The caller holds the [`LabLock`].
pub fn sweep(labid: &str) -> Result<Leftovers> {
    let first = leftovers(labid)?;
    let deadline = Instant::now() + KILL_DEADLINE;
    let mut now = first.clone();
    // What is found may fork before it dies: look again until there is nothing.
    while !now.pids.is_empty() {
        if Instant::now() > deadline {
            bail!("lab {labid}: processes {:?} do not end on SIGKILL", now.pids);
        }
        kill_and_wait(&now.pids, deadline);
        now = leftovers(labid)?;
    }
    for name in &now.namespaces {
        if let Err(error) = NetNs::named(name).delete() {
            // A crash between making the file and mounting the namespace on it leaves a plain file.
            let path = Path::new(NETNS_DIR).join(name);
            fs::remove_file(&path)
                .with_context(|| format!("{error:#}; removing {}", path.display()))?;
        }
    }
    if let Some(dir) = &now.dir {
        unmount_below(dir);
        fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    let left = leftovers(labid)?;
    if !left.is_empty() {
        bail!("lab {labid}: still there after cleaning: {left:?}");
    }
    Ok(first)
}

/// What is mounted in the lab's directory hides what is to be removed.
fn unmount_below(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for path in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(path).starts_with(dir) {
            // What stays mounted is told by the removal that fails.
            let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// [`sweep`] under the lock; refuses while the lab is running.
pub fn sweep_unlocked(labid: &str) -> Result<Leftovers> {
    let _lock = LabLock::take(labid)?;
    sweep(labid)
}

/// SIGKILL to all, then waits for each end (not for its parent to reap it) until the deadline.
fn kill_and_wait(pids: &BTreeSet<i32>, deadline: Instant) {
    let handles: Vec<OwnedFd> = pids.iter().filter_map(|pid| pidfd(*pid)).collect();
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    for handle in handles {
        wait_readable(&handle, deadline);
    }
}

/// A descriptor that becomes readable when the process ends; none if it has gone already.
pub(super) fn pidfd(pid: i32) -> Option<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a fresh descriptor or -1.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Waits until the descriptor is readable; false at the deadline.
pub(super) fn wait_readable(fd: &OwnedFd, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now()).as_millis().min(60_000) as i32;
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which outlives the call.
    unsafe { libc::poll(&mut poll, 1, left) > 0 }
}
