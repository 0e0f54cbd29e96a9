//! What is done to a move at a point, with the proof that it was done there: a process is killed, the WAN is cut.
//!
//! Owns the point: the file at which a node stands still while it exists.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::case::Phase;
use crate::lab::qemus::SeenQemu;
use crate::scenario::swarm::Swarm;

/// How long the WAN stays cut.
const CUT: Duration = Duration::from_secs(5);
/// Bytes per second of a move that shall still be in its transfer when it is hit.
pub(crate) const SLOW: u64 = 3_000_000;
/// Share of the work that is done then, parts per million.
pub(crate) const UNDER_WAY_PPM: u32 = 100_000;
/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(30);
/// How long a node may take to be ready again.
pub(crate) const READY: Duration = Duration::from_secs(30);

/// Where a move is hit: at a point that is held, or while it moves on.
pub(crate) struct Point {
    pub(crate) path: PathBuf,
    also: Option<PathBuf>,
    moves_on: bool,
}

impl Point {
    /// In the directory in which a host's node looks for its points. Not held yet.
    pub(crate) fn of(dir: &Path, phase: Phase) -> Self {
        Self { path: dir.join(phase.name()), also: None, moves_on: phase.moves_on() }
    }

    /// Meanwhile another host's node stands still, too: in that directory, at that phase's point.
    pub(crate) fn and(self, dir: &Path, phase: Phase) -> Self {
        Self { also: Some(dir.join(phase.name())), ..self }
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.path].into_iter().chain(&self.also)
    }

    /// The node stands still there from now on, unless the phase is hit by the progress.
    pub(crate) fn hold(&self) -> Result<()> {
        match self.moves_on {
            true => Ok(()),
            false => Ok(self.paths().try_for_each(|path| fs::write(path, ""))?),
        }
    }

    /// The node writes there that it has come to the point.
    pub(crate) fn word(&self) -> PathBuf {
        self.path.with_extension("reached")
    }

    /// Whether all that are to stand still do.
    pub(crate) fn reached(&self) -> bool {
        self.paths().all(|path| path.with_extension("reached").exists())
    }

    /// The node goes on.
    pub(crate) fn release(&self) -> Result<()> {
        self.paths().try_for_each(|path| match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        })
    }

    /// It was held to this moment: what was done so far was done in the phase.
    fn still_held(&self) -> Result<()> {
        let held = self.paths().all(|path| path.exists());
        ensure!(self.moves_on || held, "the point is not held");
        Ok(())
    }
}

/// `kill -9` of a QEMU; `gone` says whether it is.
pub(crate) fn kill_qemu(
    qemu: &SeenQemu,
    point: &Point,
    gone: impl FnMut() -> bool,
) -> Result<Value> {
    let at_us = now_us();
    kill(Pid::from_raw(qemu.pid), Signal::SIGKILL).context("kill -9 of QEMU")?;
    until(GONE, gone).context("QEMU lives on")?;
    point.still_held()?;
    point.release()?;
    Ok(json!({ "at_us": at_us, "killed_pid": qemu.pid, "gone_after": true }))
}

/// `kill -9` of a host's node. It is not started again, and the point is still held.
pub(crate) fn kill_node(swarm: &mut Swarm, host: &str, point: &Point) -> Result<Value> {
    let node = swarm.node_mut(host)?;
    let alive = node.exit_status()?.is_none();
    let pid = node.pid().filter(|_| alive).context("the node did not run")?;
    node.kill9()?;
    ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "the node lives on");
    let at_us = now_us();
    point.still_held()?;
    Ok(json!({ "at_us": at_us, "killed_pid": pid, "gone_after": true }))
}

/// No packet crosses the WAN for [`CUT`].
pub(crate) fn cut_wan(swarm: &Swarm, point: &Point) -> Result<Value> {
    let wan = swarm.lab.wan()?;
    wan.cut()?;
    let (before, at_us) = (wan.stats()?, now_us());
    point.still_held()?;
    point.release()?;
    // The fault's own length.
    std::thread::sleep(CUT);
    let during = wan.stats()?.since(&before);
    wan.restore()?;
    let passed = during.forward.delivered_packets + during.backward.delivered_packets;
    let offered = during.forward.offered_packets + during.backward.offered_packets;
    ensure!(passed == 0 && offered > 0, "the cut let {passed} of {offered} pass");
    Ok(json!({ "at_us": at_us, "packets_offered": offered, "packets_passed": passed }))
}

/// Whether a guest ran at a moment, by the times at which it began and ended to.
pub(crate) fn ran_at(ran: &[(u64, Option<u64>)], at_us: u64) -> bool {
    ran.iter().any(|(from, to)| *from <= at_us && to.is_none_or(|to| to > at_us))
}

pub(crate) fn until(deadline: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + deadline;
    while !done() {
        ensure!(Instant::now() < end, "not within {deadline:?}");
        // What another process does gives no event here; a deadline bounds this.
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

pub(crate) fn now_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| d.as_micros() as u64)
}

/// `more`'s members added to `object`.
pub(crate) fn merge(mut object: Value, more: Value) -> Value {
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}
