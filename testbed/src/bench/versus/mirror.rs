//! The peer's way with a disk: blockdev-mirror into the destination QEMU's NBD server, as libvirt does.
//!
//! Owns the mirror of one move and the order of the end: the mirror is taken away between the stop and the switchover, the
//! server before the guest runs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit::vmm::qmp::Qmp;
use serde_json::{Value, json};

use super::peer::{COMMAND, time_of};
use crate::lab::Host;

/// Where the destination's NBD server listens.
const PORT: u16 = 10_809;
const JOB: &str = "mirror0";

/// An empty image of the size of another.
pub(super) fn blank_like(old: &Path, new: &Path) -> Result<()> {
    let bytes = std::fs::metadata(old)?.len();
    std::fs::File::create(new)?.set_len(bytes).context("the destination's image")
}

/// A mirror that is ready: it writes what the guest writes.
pub(super) struct Mirroring<'a> {
    from: &'a Qmp,
    to: &'a Qmp,
}

impl<'a> Mirroring<'a> {
    /// Serves the destination's disk, mirrors the source's into it and waits until all is copied.
    pub async fn until_ready(
        from: &'a Qmp,
        to: &'a Qmp,
        target_host: &Host,
        limit: Duration,
    ) -> Result<Self> {
        let address = json!({"host": target_host.addr.to_string(), "port": PORT.to_string()});
        let listen = json!({"addr": {"type": "inet", "data": address}});
        to.execute("nbd-server-start", listen, COMMAND).await?;
        let export = json!({"type": "nbd", "id": "disk0", "node-name": "disk0", "name": "disk0", "writable": true});
        to.execute("block-export-add", export, COMMAND).await?;
        let mut server = address;
        server["type"] = "inet".into();
        let node =
            json!({"driver": "nbd", "node-name": "target", "server": server, "export": "disk0"});
        from.execute("blockdev-add", node, COMMAND).await?;
        let mirror = json!({"job-id": JOB, "device": "disk0", "target": "target", "sync": "full",
            "copy-mode": "background"});
        from.execute("blockdev-mirror", mirror, COMMAND).await?;
        let ready = tokio::time::timeout(limit, time_of(from, "BLOCK_JOB_READY")).await;
        if ready.is_err() {
            let jobs = from.execute("query-block-jobs", Value::Null, COMMAND).await?;
            bail!("the mirror is not ready: {jobs}");
        }
        Ok(Self { from, to })
    }

    /// The memory is nearly there: ends the mirror at the stop, and has the destination's guest run.
    pub async fn hand_over(self) -> Result<()> {
        migration_is(self.from, "pre-switchover").await?;
        self.from.execute("block-job-cancel", json!({"device": JOB}), COMMAND).await?;
        let mut events = self.from.events_after(0);
        let event = events.find(|event| event.name == "BLOCK_JOB_COMPLETED").await;
        let event = event.context("waiting for the mirror's end")?;
        ensure!(event.data["error"].is_null(), "the mirror failed: {}", event.data);
        let go_on = json!({"state": "pre-switchover"});
        self.from.execute("migrate-continue", go_on, COMMAND).await?;
        migration_is(self.to, "completed").await?;
        self.to.execute("nbd-server-stop", Value::Null, COMMAND).await?;
        self.to.execute("cont", Value::Null, COMMAND).await?;
        Ok(())
    }
}

async fn migration_is(qmp: &Qmp, status: &str) -> Result<()> {
    let mut events = qmp.events_after(0);
    let found = events.find(|event| {
        event.name == "MIGRATION" && [status, "failed"].iter().any(|s| event.data["status"] == *s)
    });
    let found = found.await.with_context(|| format!("waiting for {status}"))?;
    ensure!(found.data["status"] == status, "the migration is {}", found.data["status"]);
    Ok(())
}
