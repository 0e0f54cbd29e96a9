//! Disks through the monitor: exports, mirrors, throttles.
//!
//! Owns the names of jobs (`mirror-disk0`) and target nodes (`mirror-disk0-target`), so that a daemon finds what the last
//! one left. Never decides when a mirror is finished: the driver does. Invariant: after [`Qemu::mirror_abort`] neither
//! job nor target is left, whatever the far end of the target does.
//!
//! ```text
//! mirror_start -> running -> ready -> mirror_finish -> (nothing left, no error)
//!                    |         |
//!                    +---------+--> concluded with an error -> mirror_abort -> (nothing left)
//! ```
//!
//! While a mirror's target does not answer, QEMU's `stop` waits for what it was sent (with the guest standing), and so
//! does the removal of the target. A `yank` of the target ends both at once, unless the socket to it is full and its
//! other end still open: a server that gives up must close its end, not only shut it down.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout, timeout_at};

use super::args::device;
use super::disk::{NVRAM, ResolvedDisk};
use super::events::{Event, Events, Missed};
use super::migration::socket_path;
use super::process::{ProcessError, Qemu};
use super::qmp::{COMMAND_DEADLINE, QmpError};

/// Most bytes of a mirror in flight: what `stop` has to wait for.
const IN_FLIGHT_BYTES: u64 = 4 << 20;
/// Up to this size of a disk its mirror tracks writes in blocks of 4 KiB, above in QEMU's 64 KiB: a bit a block.
const FINE_BYTES: u64 = 256 << 30;
/// A waiting reader of events looks again after this time: jobs' events are not kept for who is behind.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How a disk is mirrored.
#[derive(Debug, Clone, Copy)]
pub struct MirrorParams<'a> {
    /// The disk's id.
    pub disk: &'a str,
    /// The unix socket of the NBD server that it goes to.
    pub socket: &'a Path,
    /// The export there, of the disk's size.
    pub export: &'a str,
    /// Most bytes per second; 0: as fast as they are taken.
    pub speed: u64,
    /// Only the disk's own layer; the far side has the layers under it.
    pub top_only: bool,
}

/// How far a mirror is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The disk's id.
    pub disk: String,
    /// Bytes done.
    pub offset: u64,
    /// Bytes to do in all; grows with the guest's writes.
    pub len: u64,
    /// Whether the target has everything but what the guest writes just now.
    pub ready: bool,
    /// QEMU's state of the job: `running`, `ready`, `standby`, `concluded`, ...
    pub status: String,
    /// Why it failed, in QEMU's words.
    pub error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct JobInfo {
    device: String,
    #[serde(rename = "type")]
    kind: String,
    len: u64,
    offset: u64,
    #[serde(default)]
    ready: bool,
    status: String,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct NodeInfo {
    #[serde(default)]
    node_name: String,
}

#[derive(Debug, Deserialize)]
struct ExportInfo {
    id: String,
}

#[derive(Debug, Deserialize)]
struct DeviceStats {
    #[serde(default)]
    qdev: String,
    stats: DeviceCounters,
}

#[derive(Debug, Deserialize)]
struct DeviceCounters {
    wr_bytes: u64,
}

fn job(disk: &str) -> String {
    format!("mirror-{disk}")
}

fn target(disk: &str) -> String {
    format!("mirror-{disk}-target")
}

fn failed(disk: &str, reason: impl Into<String>) -> ProcessError {
    ProcessError::Mirror { disk: disk.into(), reason: reason.into() }
}

impl Qemu {
    async fn order(&self, command: &str, arguments: Value) -> Result<(), ProcessError> {
        let answer = self.qmp().execute(command, arguments, COMMAND_DEADLINE).await;
        answer.map(drop).map_err(ProcessError::Qmp)
    }

    /// Starts QEMU's NBD server at a unix socket. One that runs already is replaced; its exports go with it.
    ///
    /// # Errors
    /// See [`ProcessError`]; so for all that follow.
    pub async fn nbd_serve(&self, socket: &Path) -> Result<(), ProcessError> {
        let address = json!({ "type": "unix", "data": { "path": socket_path(socket)? } });
        let start = || self.order("nbd-server-start", json!({ "addr": address }));
        match start().await {
            // It does not say why in a form to rely on; if not for a server that runs, the second try says it.
            Err(ProcessError::Qmp(QmpError::Refused { .. })) => {
                self.nbd_stop().await?;
                start().await
            }
            done => done,
        }
    }

    /// Exports block node `node` (a disk's id) as `name` on the NBD server, which also tells what is in its own layer.
    ///
    /// # Errors
    /// No server, no such node, or the name is taken.
    pub async fn nbd_export(
        &self,
        node: &str,
        name: &str,
        writable: bool,
    ) -> Result<(), ProcessError> {
        let arguments = json!({
            "type": "nbd", "id": name, "node-name": node, "name": name, "writable": writable,
            "allocation-depth": true,
        });
        self.order("block-export-add", arguments).await
    }

    /// Takes an export back and returns when its clients are cut off. One that is not there is no error.
    ///
    /// # Errors
    /// [`ProcessError::Deadline`] when QEMU does not let go of it.
    pub async fn nbd_unexport(&self, name: &str) -> Result<(), ProcessError> {
        let wait = Wait::new(format!("the end of export {name}"), COMMAND_DEADLINE);
        let arguments = json!({ "id": name, "mode": "hard" });
        let mut events = self.qmp().events();
        match self.order("block-export-del", arguments).await {
            // It is not there, or is going: the list says.
            Ok(()) | Err(ProcessError::Qmp(QmpError::Refused { .. })) => {}
            Err(error) => return Err(error),
        }
        loop {
            let exports: Vec<ExportInfo> =
                self.qmp().query("query-block-exports", Value::Null).await?;
            if exports.iter().all(|export| export.id != name) {
                return Ok(());
            }
            let gone = |event: &Event| event.name == "BLOCK_EXPORT_DELETED";
            self.next_look(&mut events, gone, &wait).await?;
        }
    }

    /// Stops the NBD server; its exports go with it. No error if there is none.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn nbd_stop(&self) -> Result<(), ProcessError> {
        match self.order("nbd-server-stop", Value::Null).await {
            Err(ProcessError::Qmp(QmpError::Refused { .. })) => Ok(()),
            done => done,
        }
    }

    /// Starts to mirror a disk into an NBD export. The guest goes on; its writes follow in the background.
    ///
    /// # Errors
    /// QEMU's refusal; nothing is left behind then. What fails later shows in [`Qemu::mirror_status`].
    pub async fn mirror_start(&self, params: MirrorParams<'_>) -> Result<(), ProcessError> {
        let disk = self.disk(params.disk)?;
        let node = json!({
            "driver": "nbd",
            "node-name": target(&disk.id),
            "server": { "type": "unix", "path": socket_path(params.socket)? },
            "export": params.export,
            // No waiting for a server to come back: QEMU's main loop, and with it the guest's own
            // disk, would stand still meanwhile, and a node that starts again begins anew.
            "reconnect-delay": 0,
        });
        let mut mirror = json!({
            "job-id": job(&disk.id),
            "device": disk.id,
            "target": target(&disk.id),
            "sync": if params.top_only { "top" } else { "full" },
            "speed": params.speed,
            "buf-size": IN_FLIGHT_BYTES,
            "copy-mode": "background",
            "on-source-error": "report",
            "on-target-error": "report",
            // A job that ended must wait to be asked how.
            "auto-dismiss": false,
        });
        if disk.size <= FINE_BYTES {
            mirror["granularity"] = json!(4096);
        }
        self.order("blockdev-add", node).await?;
        let started = self.order("blockdev-mirror", mirror).await;
        if started.is_err() {
            let _ = self.remove_target(&disk.id).await;
        }
        started
    }

    fn disk(&self, id: &str) -> Result<&ResolvedDisk, ProcessError> {
        let unknown = || ProcessError::BadParams(format!("the VM has no disk {id}"));
        self.spec().disks.iter().find(|disk| disk.id == id).ok_or_else(unknown)
    }

    /// All mirrors, those of an earlier daemon too.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn mirror_status(&self) -> Result<Vec<Mirror>, ProcessError> {
        let jobs: Vec<JobInfo> = self.qmp().query("query-block-jobs", Value::Null).await?;
        let mirrors = jobs.into_iter().filter(|job| job.kind == "mirror").filter_map(|job| {
            let disk = job.device.strip_prefix("mirror-")?.to_owned();
            let JobInfo { offset, len, ready, status, error, .. } = job;
            Some(Mirror { disk, offset, len, ready, status, error })
        });
        Ok(mirrors.collect())
    }

    async fn mirror(&self, disk: &str) -> Result<Option<Mirror>, ProcessError> {
        Ok(self.mirror_status().await?.into_iter().find(|mirror| mirror.disk == disk))
    }

    /// Waits until all mirrors are ready.
    ///
    /// # Errors
    /// [`ProcessError::Mirror`] for the first that fails, [`ProcessError::Deadline`].
    pub async fn mirror_wait_ready(&self, deadline: Duration) -> Result<(), ProcessError> {
        let wait = Wait::new("the mirrors of the disks", deadline);
        let mut events = self.qmp().events();
        loop {
            let mirrors = self.mirror_status().await?;
            if let Some(mirror) = mirrors.iter().find(|mirror| mirror.status == "concluded") {
                return Err(self.why(mirror).await);
            }
            if mirrors.iter().all(|mirror| mirror.ready) {
                return Ok(());
            }
            self.next_look(&mut events, is_job_event, &wait).await?;
        }
    }

    /// Changes the most bytes per second of a mirror; 0: as fast as they are taken.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn mirror_speed(&self, disk: &str, speed: u64) -> Result<(), ProcessError> {
        let arguments = json!({ "device": job(disk), "speed": speed });
        self.order("block-job-set-speed", arguments).await
    }

    /// Ends a ready mirror of a stopped guest: when this returns the target has every byte, flushed, and job and target
    /// node are gone. A mirror that is not there counts as finished.
    ///
    /// # Errors
    /// [`ProcessError::Mirror`] if it is not ready or fails at its end, [`ProcessError::Deadline`]; it is left for
    /// [`Qemu::mirror_abort`] then.
    pub async fn mirror_finish(&self, disk: &str, deadline: Duration) -> Result<(), ProcessError> {
        let wait = Wait::new(format!("the end of the mirror of {disk}"), deadline);
        let mut events = self.qmp().events();
        let mut asked = false;
        while let Some(mirror) = self.mirror(disk).await? {
            if mirror.status == "concluded" {
                if mirror.error.is_some() {
                    return Err(self.why(&mirror).await);
                }
                self.dismiss(disk).await?;
                break;
            }
            if !asked {
                // Cancelled before it is ready it would end without having copied all.
                if !mirror.ready {
                    return Err(failed(disk, "it has not copied everything yet"));
                }
                let arguments = json!({ "device": job(disk), "force": false });
                match self.order("block-job-cancel", arguments).await {
                    // It ended by itself meanwhile: the next look says how.
                    Ok(()) | Err(ProcessError::Qmp(QmpError::Refused { .. })) => asked = true,
                    Err(error) => return Err(error),
                }
                continue;
            }
            self.next_look(&mut events, is_job_event, &wait).await?;
        }
        self.remove_target(disk).await
    }

    /// Gives a mirror up, in whatever state it is, and removes what is left of it; also of one of an earlier daemon. No
    /// error if there is none.
    ///
    /// # Errors
    /// [`ProcessError::Deadline`] when QEMU does not let go of it.
    pub async fn mirror_abort(&self, disk: &str) -> Result<(), ProcessError> {
        self.yank(disk).await?;
        let wait = Wait::new(format!("the end of the mirror of {disk}"), COMMAND_DEADLINE);
        let mut events = self.qmp().events();
        while let Some(mirror) = self.mirror(disk).await? {
            if mirror.status == "concluded" {
                self.dismiss(disk).await?;
                break;
            }
            let arguments = json!({ "device": job(disk), "force": true });
            match self.order("block-job-cancel", arguments).await {
                Ok(()) | Err(ProcessError::Qmp(QmpError::Refused { .. })) => {}
                Err(error) => return Err(error),
            }
            self.next_look(&mut events, is_job_event, &wait).await?;
        }
        self.remove_target(disk).await
    }

    /// Cuts a mirror off from its target at once, out of band: it fails, and nothing waits for it any more, not even a
    /// `stop` under way, if the server has closed its end or reads. No error if there is none.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn yank(&self, disk: &str) -> Result<(), ProcessError> {
        let instance = json!({ "type": "block-node", "node-name": target(disk) });
        let arguments = json!({ "instances": [instance] });
        match self.qmp().execute_oob("yank", arguments, COMMAND_DEADLINE).await {
            Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn dismiss(&self, disk: &str) -> Result<(), ProcessError> {
        self.order("job-dismiss", json!({ "id": job(disk) })).await
    }

    async fn remove_target(&self, disk: &str) -> Result<(), ProcessError> {
        let arguments = json!({ "flat": true });
        let nodes: Vec<NodeInfo> = self.qmp().query("query-named-block-nodes", arguments).await?;
        if nodes.iter().all(|node| node.node_name != target(disk)) {
            return Ok(());
        }
        self.order("blockdev-del", json!({ "node-name": target(disk) })).await
    }

    /// Why a concluded mirror failed: QEMU's words, and on which side it was if that is known.
    async fn why(&self, mirror: &Mirror) -> ProcessError {
        let reason = mirror.error.as_deref().unwrap_or("it ended before its time");
        let (mut events, name) = (self.qmp().events_after(0), job(&mirror.disk));
        let mut side = "";
        // What is in the journal by now; nothing is waited for.
        loop {
            match timeout(Duration::ZERO, events.next()).await {
                Ok(Ok(event)) if event.name == "BLOCK_JOB_ERROR" => {
                    if event.str_field("device") == Some(&name) {
                        let read = event.str_field("operation") == Some("read");
                        side = if read { "reading it: " } else { "writing to its target: " };
                    }
                }
                Ok(Ok(_) | Err(Missed::Lagged(_))) => {}
                Ok(Err(Missed::Closed)) | Err(_) => break,
            }
        }
        failed(&mirror.disk, format!("{side}{reason}"))
    }

    /// Limits the bytes per second that the guest may write to a disk; `None` lifts it. The firmware's variables have no
    /// such limit.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn throttle_disk(
        &self,
        disk: &str,
        bytes_per_second: Option<u64>,
    ) -> Result<(), ProcessError> {
        if self.disk(disk)?.id == NVRAM {
            return Ok(());
        }
        let arguments = json!({
            // The device behind the PCI one: it is that which has the disk.
            "id": format!("/machine/peripheral/{}/virtio-backend", device(disk)),
            "bps": 0, "bps_rd": 0, "bps_wr": bytes_per_second.unwrap_or(0),
            "iops": 0, "iops_rd": 0, "iops_wr": 0,
        });
        self.order("block_set_io_throttle", arguments).await
    }

    /// Bytes that the guest has written to each disk since its QEMU started, by the disk's id. Without the firmware's
    /// variables, which QEMU does not count.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn write_stats(&self) -> Result<Vec<(String, u64)>, ProcessError> {
        let stats: Vec<DeviceStats> = self.qmp().query("query-blockstats", Value::Null).await?;
        let disks = self.spec().disks.iter().filter_map(|disk| {
            // By the device: above a disk's own node stands the mirror's filter while one runs.
            let path = format!("/{}/", device(&disk.id));
            let counters = &stats.iter().find(|stats| stats.qdev.contains(&path))?.stats;
            Some((disk.id.clone(), counters.wr_bytes))
        });
        Ok(disks.collect())
    }

    /// Waits for the next event that is `wanted`, but not for long: the caller looks again.
    async fn next_look(
        &self,
        events: &mut Events,
        wanted: impl Fn(&Event) -> bool,
        wait: &Wait,
    ) -> Result<(), ProcessError> {
        let look = wait.end.min(Instant::now() + LOOK_AGAIN);
        match timeout_at(look, events.find(wanted)).await {
            Ok(Ok(_) | Err(Missed::Lagged(_))) => Ok(()),
            Ok(Err(Missed::Closed)) => Err(self.or_exit(QmpError::Disconnected).await),
            Err(_) if Instant::now() < wait.end => Ok(()),
            Err(_) => Err(ProcessError::Deadline { what: wait.what.clone(), after: wait.after }),
        }
    }
}

/// What is waited for, and until when.
struct Wait {
    what: String,
    after: Duration,
    end: Instant,
}

impl Wait {
    fn new(what: impl Into<String>, after: Duration) -> Self {
        Self { what: what.into(), after, end: Instant::now() + after }
    }
}

fn is_job_event(event: &Event) -> bool {
    event.name == "JOB_STATUS_CHANGE" || event.name.starts_with("BLOCK_JOB_")
}
