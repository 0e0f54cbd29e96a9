//! The steps of a migration that QEMU takes part in.
//!
//! Owns capabilities, parameters and the reading of QEMU's states and event times. Never decides when: the driver does.
//!
//! ```text
//! source (plain VM)                            destination (-S, node-owned memory)
//! outgoing_start   active: iterates,           incoming_start   listens
//!                  switchover never acked
//! stop             the gate: completes
//!  (pause_before_switchover:
//!   wait_pre_switchover, finish the mirrors,
//!   migrate_continue)
//! wait_outgoing    postmigrate | paused        wait_incoming    completed, paused
//!                                              cont             RESUME
//! ```

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, timeout_at};

use super::commands::{MigrateInfo, PRE_SWITCHOVER, Status};
use super::events::{Event, EventTime, Events, Missed};
use super::process::{ProcessError, Qemu};
use super::qmp::{COMMAND_DEADLINE, QmpError};

/// How a source sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// Most bytes per second into the socket; 0: as fast as it is read.
    pub max_bandwidth: u64,
    /// The pause that QEMU aims at, in milliseconds. Of no effect with `gate_by_stop`.
    pub downtime_limit_ms: u64,
    /// Withhold the acknowledgement of the switchover: QEMU iterates until the VM is stopped. Off only for a plain
    /// migration that QEMU ends by itself.
    pub gate_by_stop: bool,
    /// Hold once more between the stop and the device state, in QEMU's state `pre-switchover`, until
    /// [`Qemu::migrate_continue`]: the disks are still the source's, and their mirrors can be finished.
    pub pause_before_switchover: bool,
}

impl Default for Outgoing {
    fn default() -> Self {
        Self {
            max_bandwidth: 0,
            downtime_limit_ms: 300,
            gate_by_stop: true,
            pause_before_switchover: false,
        }
    }
}

/// Capabilities that the node never uses, switched off in case an earlier migration left them on.
const NEVER: [&str; 4] = ["xbzrle", "multifd", "postcopy-ram", "auto-converge"];

/// Bytes per second that QEMU is told it has for the switchover: with a limit of 1 ms it looks for dirty pages again only
/// when it has none left to send. A look with pages still unsent can lose later writes to them under TCG: their bits are
/// cleared, but the vCPUs' TLBs are told only if the look found a page that was not known as dirty
/// (`physical_memory_sync_dirty_bitmap` counts new bits alone; seen with 10.0.2, about every second move of a guest that
/// is interrupted while QEMU iterates).
const LOOK_WHEN_DONE: u64 = 1000;

/// How soon QEMU is asked again whether it has left the run state of a migration's end.
const FINISHING: Duration = Duration::from_millis(2);

fn uri(socket: &Path) -> Result<String, ProcessError> {
    socket_path(socket).map(|path| format!("unix:{path}"))
}

/// A unix socket's path as QEMU takes it.
pub(super) fn socket_path(socket: &Path) -> Result<&str, ProcessError> {
    match socket.to_str() {
        Some(path) if path.len() <= 107 => Ok(path),
        _ => Err(ProcessError::BadParams(format!(
            "{} is too long for a unix socket; choose a shorter --state",
            socket.display()
        ))),
    }
}

impl Qemu {
    /// Starts to send the VM into the unix socket at `socket`, where the node listens. The guest goes on running.
    ///
    /// # Errors
    /// QEMU's refusal: a device that cannot move, a migration that runs already.
    pub async fn outgoing_start(&self, socket: &Path, how: Outgoing) -> Result<(), ProcessError> {
        let uri = uri(socket)?;
        let mut capabilities: Vec<(&str, bool)> = NEVER.iter().map(|name| (*name, false)).collect();
        // A VM that came by migration still has the capabilities of a destination.
        capabilities.extend([
            ("events", true),
            ("return-path", true),
            ("x-ignore-shared", false),
            ("switchover-ack", how.gate_by_stop),
            ("pause-before-switchover", how.pause_before_switchover),
        ]);
        let qmp = self.qmp();
        qmp.migrate_set_capabilities(&capabilities).await?;
        let mut parameters =
            json!({ "max-bandwidth": how.max_bandwidth, "downtime-limit": how.downtime_limit_ms });
        if how.gate_by_stop {
            parameters["downtime-limit"] = json!(1);
            parameters["avail-switchover-bandwidth"] = json!(LOOK_WHEN_DONE);
        }
        qmp.migrate_set_parameters(parameters).await?;
        qmp.migrate(&uri).await?;
        Ok(())
    }

    /// Changes the most bytes per second that a running migration writes; 0: as fast as they are read.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn set_max_bandwidth(&self, bytes_per_second: u64) -> Result<(), ProcessError> {
        let parameters = json!({ "max-bandwidth": bytes_per_second });
        Ok(self.qmp().migrate_set_parameters(parameters).await?)
    }

    /// Stops the guest and returns when its vCPUs stood still, by QEMU's STOP event; `None` if it was not running.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn stop(&self) -> Result<Option<EventTime>, ProcessError> {
        let mut events = self.qmp().events();
        self.qmp().stop().await?;
        self.time_of("STOP", false, &mut events).await
    }

    /// Runs the guest, and returns when by QEMU's RESUME event; `None` if it ran already.
    ///
    /// # Errors
    /// See [`ProcessError`]; one of [`super::Mode::Still`] is never run.
    pub async fn cont(&self) -> Result<Option<EventTime>, ProcessError> {
        if self.is_still() {
            return Err(ProcessError::BadParams("the guest is switched off".into()));
        }
        let mut events = self.qmp().events();
        self.qmp().cont().await?;
        self.time_of("RESUME", true, &mut events).await
    }

    /// The time of the event that a finished `stop` or `cont` gave rise to. QEMU emits it before it answers the command,
    /// so it is in the journal by now or there is none. No further command is sent when it is there: right after a
    /// `stop` QEMU may be busy completing the migration and would not answer.
    async fn time_of(
        &self,
        name: &'static str,
        running: bool,
        events: &mut Events,
    ) -> Result<Option<EventTime>, ProcessError> {
        loop {
            match tokio::time::timeout(Duration::ZERO, events.next()).await {
                Ok(Ok(event)) if event.name == name => return Ok(Some(event.at)),
                Ok(Ok(_) | Err(Missed::Lagged(_))) => {}
                Ok(Err(Missed::Closed)) => return Err(QmpError::Disconnected.into()),
                Err(_) => break,
            }
        }
        let status = self.run_state().await?;
        if status.running == running {
            return Ok(None);
        }
        let reason = format!("the VM is {} afterwards", status.status);
        let command = if running { "cont" } else { "stop" };
        Err(QmpError::BadAnswer { command: command.into(), reason }.into())
    }

    /// QEMU's run state.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn run_state(&self) -> Result<Status, ProcessError> {
        Ok(self.qmp().query_status().await?)
    }

    /// QEMU's account of its migration.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn query_migrate(&self) -> Result<MigrateInfo, ProcessError> {
        Ok(self.qmp().query_migrate().await?)
    }

    /// Cancels an outgoing migration; done when [`Qemu::wait_outgoing`] returns. A running guest runs on, a stopped one
    /// stays stopped.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn migrate_cancel(&self) -> Result<(), ProcessError> {
        Ok(self.qmp().migrate_cancel().await?)
    }

    /// Makes a QEMU of [`super::Mode::Incoming`] listen at `socket`. With `ignore_shared` the stream must not carry the
    /// guest's memory: the node has written it already.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn incoming_start(
        &self,
        socket: &Path,
        ignore_shared: bool,
    ) -> Result<(), ProcessError> {
        let uri = uri(socket)?;
        let capabilities =
            [("events", true), ("return-path", true), ("x-ignore-shared", ignore_shared)];
        self.qmp().migrate_set_capabilities(&capabilities).await?;
        self.qmp().migrate_incoming(&uri).await?;
        Ok(())
    }

    /// Waits until the incoming migration is loaded. The guest stands still, in memory and devices complete.
    ///
    /// # Errors
    /// [`ProcessError::Migration`] with QEMU's reason, [`ProcessError::Exited`], or [`ProcessError::Deadline`].
    pub async fn wait_incoming(&self, deadline: Duration) -> Result<(), ProcessError> {
        let info = self.wait_migration("the end of loading", is_end, deadline).await?;
        expect_completed(info)
    }

    /// Waits until the outgoing migration has ended, whichever way (`completed`, `failed` or `cancelled`), and the VM's
    /// run state with it: `cont` is not refused any more.
    ///
    /// # Errors
    /// [`ProcessError::Exited`] or [`ProcessError::Deadline`].
    pub async fn wait_outgoing(&self, deadline: Duration) -> Result<MigrateInfo, ProcessError> {
        let end = Instant::now() + deadline;
        let what = "the end of sending";
        let info = self.wait_migration(what, is_end, deadline).await?;
        // QEMU tells the migration's end before it leaves this state, of which it tells nothing.
        while self.run_state().await?.status == "finish-migrate" {
            if Instant::now() >= end {
                return Err(ProcessError::Deadline { what: what.into(), after: deadline });
            }
            tokio::time::sleep(FINISHING).await;
        }
        Ok(info)
    }

    /// Waits until a stopped source holds before it gives its disks away. A destination that is lost meanwhile shows only
    /// behind [`Qemu::migrate_continue`].
    ///
    /// # Errors
    /// [`ProcessError::Migration`] if it has ended instead, [`ProcessError::Exited`] or [`ProcessError::Deadline`].
    pub async fn wait_pre_switchover(&self, deadline: Duration) -> Result<(), ProcessError> {
        let there = |status: &str| status == PRE_SWITCHOVER || is_end(status);
        let info = self.wait_migration("the hold before the switchover", there, deadline).await?;
        if info.is_before_switchover() { Ok(()) } else { Err(ended(info)) }
    }

    /// Ends the hold of [`Qemu::wait_pre_switchover`]: the disks are given away, the device state is sent. QEMU does not
    /// look whether the mirrors were finished.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub async fn migrate_continue(&self) -> Result<(), ProcessError> {
        Ok(self.qmp().migrate_continue(PRE_SWITCHOVER).await?)
    }

    async fn wait_migration(
        &self,
        what: &str,
        wanted: impl Fn(&str) -> bool,
        deadline: Duration,
    ) -> Result<MigrateInfo, ProcessError> {
        let end = Instant::now() + deadline;
        let mut events = self.qmp().events();
        loop {
            match self.qmp().query_migrate().await {
                Ok(info) if info.status.as_deref().is_some_and(&wanted) => return Ok(info),
                Ok(_) => {}
                Err(error) => return Err(self.or_exit(error).await),
            }
            let changed = events.find(|event: &Event| event.name == "MIGRATION");
            match timeout_at(end, changed).await {
                Ok(Ok(_) | Err(Missed::Lagged(_))) => {}
                Ok(Err(Missed::Closed)) => {
                    return Err(self.or_exit(QmpError::Disconnected).await);
                }
                Err(_) => {
                    return Err(ProcessError::Deadline { what: what.into(), after: deadline });
                }
            }
        }
    }

    /// A lost monitor is most often a QEMU that ends: reports the exit if there is one.
    pub(super) async fn or_exit(&self, error: QmpError) -> ProcessError {
        if matches!(error, QmpError::Disconnected) {
            let _ = tokio::time::timeout(COMMAND_DEADLINE, self.exited()).await;
        }
        self.gone_error().unwrap_or(ProcessError::Qmp(error))
    }
}

fn is_end(status: &str) -> bool {
    matches!(status, "completed" | "failed" | "cancelled")
}

fn expect_completed(info: MigrateInfo) -> Result<(), ProcessError> {
    if info.status.as_deref() == Some("completed") { Ok(()) } else { Err(ended(info)) }
}

fn ended(info: MigrateInfo) -> ProcessError {
    let status = info.status.unwrap_or_default();
    let reason = info.error_desc.unwrap_or_else(|| "QEMU gives no reason".into());
    ProcessError::Migration { status, reason: reason.replace('\n', " ") }
}
