//! What every QEMU of the lab did, seen from outside the nodes.
//!
//! Owns a wrapper that nodes run in QEMU's place: it adds a second monitor whose events go to a file, and becomes QEMU.
//! Owns one thread that notes when each process ended. Never talks to a node. Invariant: an event is in the file before
//! QEMU answers the command that caused it, so nothing that a guest did while running is missed.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use super::cleanup;

/// How often the thread looks for new processes.
const LOOK: Duration = Duration::from_millis(10);

/// Becomes QEMU; only one that gets a VM's `-uuid` is watched. `%DIR%` is replaced.
const WRAPPER: &str = r#"#!/bin/bash
# Made by the lab: QEMU with a second monitor, whose events go to a file.
name=
guest=
last=
for arg in "$@"; do
  [ "$last" = -name ] && name=$arg
  [ "$arg" = -uuid ] && guest=1
  last=$arg
done
# One sector of an image of this name cannot be read; the guest itself does not touch it.
if [[ "$*" == */unreadable.img* ]]; then
  args=()
  for arg in "$@"; do
    if [[ "$arg" == *'"driver":"file"'* && "$arg" == */unreadable.img* ]]; then
      path=${arg#*\"filename\":\"} && path=${path%%\"*}
      node=${arg#*\"node-name\":\"} && node=${node%%\"*}
      arg='{"driver":"blkdebug","node-name":"'$node'","image":{"driver":"file","filename":"'$path'"},'
      arg+='"inject-error":[{"event":"none","iotype":"read","errno":5,"sector":16384,"once":false}]}'
    fi
    args+=("$arg")
  done
  set -- "${args[@]}"
fi
[ "$guest" ] || exec qemu-system-x86_64 "$@"
base=%DIR%/$$-$EPOCHREALTIME
mkfifo -m 600 "$base.in" || exit 1
exec {fd}<>"$base.in"
echo '{"execute":"qmp_capabilities"}' >&$fd
printf '%s\n%s\nend\n' "$PWD" "$name" >"$base.who"
exec qemu-system-x86_64 "$@" -mon chardev=lab,mode=control \
  -chardev "file,id=lab,path=$base.events,append=on,input-path=$base.in"
"#;

/// One QEMU that a node started for a guest.
#[derive(Clone, Debug, PartialEq)]
pub struct SeenQemu {
    /// Its process.
    pub pid: i32,
    /// The VM's name.
    pub vm: String,
    /// The copy's directory.
    pub dir: PathBuf,
    /// When it was first seen, microseconds since 1970.
    pub seen_us: u64,
    /// When its process was seen to have ended.
    pub ended_us: Option<u64>,
    /// Its monitor's events with their own times, some with their status: `MIGRATION active`.
    pub events: Vec<(u64, String)>,
}

impl SeenQemu {
    /// Whether the process lives.
    #[must_use]
    pub fn alive(&self) -> bool {
        self.ended_us.is_none()
    }

    /// Whether it is in the state directory of that host.
    #[must_use]
    pub fn on(&self, state_dir: &Path) -> bool {
        self.dir.starts_with(state_dir)
    }

    /// When its guest ran: from each RESUME to the next STOP or the process's end; none: still.
    #[must_use]
    pub fn ran(&self) -> Vec<(u64, Option<u64>)> {
        let mut intervals: Vec<(u64, Option<u64>)> = Vec::new();
        for (at, name) in &self.events {
            let open = intervals.last_mut().filter(|(_, end)| end.is_none());
            match (name.as_str(), open) {
                ("RESUME", None) => intervals.push((*at, None)),
                ("STOP" | "SHUTDOWN", Some((_, end))) => *end = Some(*at),
                _ => {}
            }
        }
        if let Some((_, end @ None)) = intervals.last_mut() {
            *end = self.ended_us;
        }
        intervals
    }

    /// Whether its guest runs now.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.alive() && self.ran().last().is_some_and(|(_, end)| end.is_none())
    }
}

/// Pairs of times at which two different processes ran the same VM: (first, second, microseconds both ran, if it ended).
#[must_use]
pub fn double_runs(seen: &[SeenQemu]) -> Vec<String> {
    let mut found = Vec::new();
    for (i, one) in seen.iter().enumerate() {
        for other in seen.iter().skip(i + 1).filter(|other| other.vm == one.vm) {
            for (a, a_end) in one.ran() {
                for (b, b_end) in other.ran() {
                    let before = |end: Option<u64>, start: u64| end.is_some_and(|end| end <= start);
                    if !before(a_end, b) && !before(b_end, a) {
                        found.push(format!(
                            "{}: process {} ran {a}..{a_end:?} and process {} ran {b}..{b_end:?}",
                            one.vm, one.pid, other.pid
                        ));
                    }
                }
            }
        }
    }
    found
}

struct Entry {
    qemu: SeenQemu,
    events: PathBuf,
    process: Option<OwnedFd>,
}

#[derive(Default)]
struct Shared {
    entries: Mutex<Vec<Entry>>,
    stop: AtomicBool,
}

impl Shared {
    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches all QEMUs that are started by its wrapper. Dropping it ends the watching, not the QEMUs.
pub struct QemuWatch {
    program: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl QemuWatch {
    /// Makes the wrapper in the new directory `dir` (0700) and begins to watch.
    pub fn start(dir: &Path) -> Result<Self> {
        cleanup::make_private_dir(dir)?;
        let program = dir.join("qemu");
        fs::write(&program, WRAPPER.replace("%DIR%", dir.to_str().context("path")?))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700))?;
        let shared = Arc::new(Shared::default());
        let (watching, dir) = (Arc::clone(&shared), dir.to_owned());
        let thread =
            std::thread::Builder::new().name("qemu-watch".to_owned()).spawn(move || {
                while !watching.stop.load(Ordering::SeqCst) {
                    find_new(&dir, &watching);
                    note_ends(&watching);
                }
            })?;
        Ok(Self { program, shared, thread: Some(thread) })
    }

    /// What nodes run as QEMU (`--qemu`).
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Everything seen so far, oldest first.
    #[must_use]
    pub fn seen(&self) -> Vec<SeenQemu> {
        let mut entries = self.shared.entries();
        for entry in entries.iter_mut() {
            entry.qemu.events = read_events(&entry.events);
        }
        entries.iter().map(|entry| entry.qemu.clone()).collect()
    }
}

impl Drop for QemuWatch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

fn find_new(dir: &Path, shared: &Shared) {
    let Ok(files) = fs::read_dir(dir) else { return };
    let mut fresh: Vec<PathBuf> = files.flatten().map(|file| file.path()).collect();
    fresh.retain(|path| path.extension().is_some_and(|ext| ext == "who"));
    fresh.sort();
    for who in fresh {
        let events = who.with_extension("events");
        if shared.entries().iter().any(|entry| entry.events == events) {
            continue;
        }
        if let Some(qemu) = read_who(&who) {
            let process = cleanup::pidfd(qemu.pid);
            let ended_us = process.is_none().then(now_us);
            let qemu = SeenQemu { ended_us, ..qemu };
            shared.entries().push(Entry { qemu, events, process });
        }
    }
}

/// None while the wrapper is still writing it.
fn read_who(path: &Path) -> Option<SeenQemu> {
    let text = fs::read_to_string(path).ok()?;
    let lines: Vec<&str> = text.lines().collect();
    let [dir, name, "end"] = lines.as_slice() else { return None };
    let vm = name.strip_prefix("guest=")?.split(',').next()?.to_owned();
    let pid = path.file_name()?.to_str()?.split('-').next()?.parse().ok()?;
    let dir = PathBuf::from(dir);
    Some(SeenQemu { pid, vm, dir, seen_us: now_us(), ended_us: None, events: Vec::new() })
}

/// Waits [`LOOK`] at most.
fn note_ends(shared: &Shared) {
    let living: Vec<(i32, OwnedFd)> = shared
        .entries()
        .iter()
        .filter_map(|entry| Some((entry.qemu.pid, entry.process.as_ref()?.try_clone().ok()?)))
        .collect();
    let mut polled: Vec<PollFd<'_>> =
        living.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
    if polled.is_empty() {
        std::thread::sleep(LOOK);
    } else if poll(&mut polled, timeout).unwrap_or(0) == 0 {
        return;
    }
    let ended: Vec<i32> = polled
        .iter()
        .zip(&living)
        .filter(|(fd, _)| fd.any() == Some(true))
        .map(|(_, (pid, _))| *pid)
        .collect();
    for entry in shared.entries().iter_mut().filter(|entry| ended.contains(&entry.qemu.pid)) {
        if entry.process.take().is_some() {
            entry.qemu.ended_us = Some(now_us());
        }
    }
}

fn read_events(path: &Path) -> Vec<(u64, String)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let event = |line: &str| {
        let value: Value = serde_json::from_str(line).ok()?;
        let mut name = value["event"].as_str()?.to_owned();
        if let Some(status) = value["data"]["status"].as_str() {
            name = format!("{name} {status}");
        }
        let at = &value["timestamp"];
        Some((at["seconds"].as_u64()? * 1_000_000 + at["microseconds"].as_u64()?, name))
    };
    text.lines().filter_map(event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu(pid: i32, ended_us: Option<u64>, events: &[(u64, &str)]) -> SeenQemu {
        SeenQemu {
            pid,
            vm: "web".to_owned(),
            dir: PathBuf::from("/x"),
            seen_us: 0,
            ended_us,
            events: events.iter().map(|(at, name)| (*at, (*name).to_owned())).collect(),
        }
    }

    #[test]
    fn a_clean_move_is_no_double_run_and_an_overlap_is() {
        let source = qemu(1, Some(50), &[(10, "RESUME"), (20, "STOP")]);
        let destination = qemu(2, None, &[(20, "RESUME")]);
        assert!(double_runs(&[source.clone(), destination.clone()]).is_empty());
        let early = qemu(2, None, &[(19, "RESUME")]);
        assert_eq!(double_runs(&[source, early]).len(), 1);
        let killed = qemu(1, Some(20), &[(10, "RESUME")]);
        assert!(double_runs(&[killed.clone(), destination.clone()]).is_empty());
        let lives = SeenQemu { ended_us: None, ..killed };
        assert_eq!(double_runs(&[lives.clone(), destination]).len(), 1);
        assert!(lives.runs() && !qemu(3, None, &[(1, "RESUME"), (2, "STOP")]).runs());
    }
}
