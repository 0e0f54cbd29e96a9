//! The QMP commands that the node uses, typed.
//!
//! Owns names, arguments and the shape of answers. Fields that a QEMU leaves out are `None`; fields it adds are ignored.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::qmp::{COMMAND_DEADLINE, Qmp, QmpError};

/// QEMU's run state.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether vCPUs run.
    pub running: bool,
    /// QEMU's name for the state: `running`, `paused`, `prelaunch`, `inmigrate`, `postmigrate`, ...
    pub status: String,
}

/// What `query-migrate` says. Every field may be absent.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrateInfo {
    /// `none`, `setup`, `active`, `device`, `completed`, `failed`, `cancelled`, ...
    pub status: Option<String>,
    /// Milliseconds since the start.
    pub total_time: Option<u64>,
    /// Milliseconds of pause, at the end.
    pub downtime: Option<u64>,
    /// Milliseconds of setup.
    pub setup_time: Option<u64>,
    /// Memory figures.
    pub ram: Option<RamInfo>,
    /// Why it failed.
    pub error_desc: Option<String>,
}

impl MigrateInfo {
    /// Whether QEMU holds between the stop and the device state.
    #[must_use]
    pub fn is_before_switchover(&self) -> bool {
        self.status.as_deref() == Some(PRE_SWITCHOVER)
    }
}

/// QEMU's name for that hold.
pub(super) const PRE_SWITCHOVER: &str = "pre-switchover";

/// Memory figures of a migration. Sizes in bytes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamInfo {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes left.
    pub remaining: u64,
    /// Guest memory.
    pub total: u64,
    /// Zero pages.
    pub duplicate: u64,
    /// Pages sent in full.
    pub normal: u64,
    /// Pages dirtied per second.
    pub dirty_pages_rate: u64,
    /// Rounds of dirty logging.
    pub dirty_sync_count: u64,
    /// Bytes of a page.
    pub page_size: u64,
    /// Throughput in Mbit/s.
    pub mbps: f64,
}

/// A machine type.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MachineInfo {
    /// Its name.
    pub name: String,
}

#[derive(Debug, Deserialize)]
struct CapabilityInfo {
    capability: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct CpuInfo {
    qom_path: String,
}

/// A CPU model.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuDefinition {
    /// Its name.
    pub name: String,
    /// Features that the accelerator cannot give it here; `None` when QEMU cannot tell.
    pub unavailable_features: Option<Vec<String>>,
}

impl Qmp {
    /// Runs a command within [`COMMAND_DEADLINE`] and reads its answer as `T`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments, COMMAND_DEADLINE).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::BadAnswer {
            command: command.into(),
            reason: error.to_string(),
        })
    }

    async fn order(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.execute(command, arguments, COMMAND_DEADLINE).await.map(drop)
    }

    /// `query-status`.
    ///
    /// # Errors
    /// See [`QmpError`]; so for all that follow.
    pub async fn query_status(&self) -> Result<Status, QmpError> {
        self.query("query-status", Value::Null).await
    }

    /// `stop`: QEMU answers when all vCPUs stand and its disks are flushed.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.order("stop", Value::Null).await
    }

    /// `cont`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.order("cont", Value::Null).await
    }

    /// `quit`: QEMU answers and exits.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn quit(&self) -> Result<(), QmpError> {
        self.order("quit", Value::Null).await
    }

    /// `system_powerdown`: presses the guest's power button.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.order("system_powerdown", Value::Null).await
    }

    /// `migrate-set-capabilities`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_set_capabilities(&self, list: &[(&str, bool)]) -> Result<(), QmpError> {
        let item = |&(name, state): &(&str, bool)| json!({ "capability": name, "state": state });
        let list: Vec<Value> = list.iter().map(item).collect();
        self.order("migrate-set-capabilities", json!({ "capabilities": list })).await
    }

    /// `migrate-set-parameters` with an object of parameters.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_set_parameters(&self, parameters: Value) -> Result<(), QmpError> {
        self.order("migrate-set-parameters", parameters).await
    }

    /// `migrate` to a URI.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate", json!({ "uri": uri })).await
    }

    /// `migrate-incoming`: listens at a URI. From QEMU 9.1 on a load error is kept for `query-migrate` instead of ending QEMU.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        let mut arguments = json!({ "uri": uri });
        if self.version() >= [9, 1, 0] {
            arguments["exit-on-error"] = false.into();
        }
        self.order("migrate-incoming", arguments).await
    }

    /// `migrate_cancel`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.order("migrate_cancel", Value::Null).await
    }

    /// `migrate-continue` from the state that it is expected to be in.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_continue(&self, state: &str) -> Result<(), QmpError> {
        self.order("migrate-continue", json!({ "state": state })).await
    }

    /// `query-migrate`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_migrate(&self) -> Result<MigrateInfo, QmpError> {
        self.query("query-migrate", Value::Null).await
    }

    /// `announce-self`: QEMU broadcasts the guest's addresses `rounds` times, first after `initial_ms`, then in steps of
    /// `step_ms` more up to `max_ms`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn announce_self(
        &self,
        initial_ms: u32,
        max_ms: u32,
        rounds: u32,
        step_ms: u32,
    ) -> Result<(), QmpError> {
        let arguments =
            json!({ "initial": initial_ms, "max": max_ms, "rounds": rounds, "step": step_ms });
        self.order("announce-self", arguments).await
    }

    /// `query-machines`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_machines(&self) -> Result<Vec<MachineInfo>, QmpError> {
        self.query("query-machines", Value::Null).await
    }

    /// The names of `query-migrate-capabilities`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_migrate_capabilities(&self) -> Result<Vec<String>, QmpError> {
        let list: Vec<CapabilityInfo> =
            self.query("query-migrate-capabilities", Value::Null).await?;
        Ok(list.into_iter().map(|item| item.capability).collect())
    }

    /// The names of the parameters that `query-migrate-parameters` shows.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_migrate_parameters(&self) -> Result<Vec<String>, QmpError> {
        let all: serde_json::Map<String, Value> =
            self.query("query-migrate-parameters", Value::Null).await?;
        Ok(all.into_iter().map(|(name, _)| name).collect())
    }

    /// `query-cpu-definitions`: what each model lacks under this QEMU's accelerator.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_cpu_definitions(&self) -> Result<Vec<CpuDefinition>, QmpError> {
        self.query("query-cpu-definitions", Value::Null).await
    }

    /// The features that this QEMU's first vCPU was asked for and does not have, with its model's modifications counted
    /// in (which `query-cpu-definitions` cannot do).
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn cpu_unavailable_features(&self) -> Result<Vec<String>, QmpError> {
        let cpus: Vec<CpuInfo> = self.query("query-cpus-fast", Value::Null).await?;
        let cpu = cpus.first().ok_or_else(|| QmpError::BadAnswer {
            command: "query-cpus-fast".into(),
            reason: "no CPU".into(),
        })?;
        let arguments = json!({ "path": cpu.qom_path, "property": "unavailable-features" });
        self.query("qom-get", arguments).await
    }
}
