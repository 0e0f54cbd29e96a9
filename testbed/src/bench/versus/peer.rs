//! The peer: QEMU alone moves the same guest over the same link.
//!
//! Owns both QEMUs of one run, which run in the hosts' namespaces as godwit's do. Shaped: multifd over two connections with zstd at its default
//! level; unshaped: plain pre-copy. In both cases no cap on the bandwidth, and 300 ms of downtime allowed.

use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use godwit::vmm::qmp::Qmp;
use serde_json::{Value, json};

use super::figures::{Guest, Run};
use super::sampler::Sampler;
use super::{Case, MEMORY_MIB, MOVE, SETTLE, Vm, content, ours};
use crate::guest::disk::DiskForm;
use crate::guest::{Accel, GuestControl, GuestFiles, QemuNic, QemuSpec, qemu_command};
use crate::lab::wan::LinkStats;
use crate::lab::{Host, Lab, ns};
use crate::scenario::swarm::{GuestPlan, MTU, run as block_on};

/// Where the destination listens.
const PORT: u16 = 4444;
const TAP: &str = "peer0";
const COMMAND: Duration = Duration::from_secs(10);
const BOOT: Duration = Duration::from_secs(180);
/// Pause that QEMU may plan with, milliseconds.
const DOWNTIME_LIMIT_MS: u64 = 300;

/// The peer's name in the report.
pub(super) fn tool(case: &Case, congestion: &str, runs: &[Run]) -> String {
    let version =
        runs.first().and_then(|run| run.timeline.first()).map_or("qemu", |t| t.1.as_str());
    let how = if case.shaped { "multifd x2 zstd" } else { "plain pre-copy" };
    format!("{version} {how}, {congestion}")
}

/// A QEMU of the peer; killed when dropped.
struct Process {
    child: Child,
    spec: QemuSpec,
}

impl Process {
    fn start(lab: &Lab, host: &Host, files: &GuestFiles, vm: &Vm, incoming: bool) -> Result<Self> {
        let plan = GuestPlan::new("web", 5, MEMORY_MIB);
        let accel = if vm.accel == "kvm" { Accel::Kvm } else { Accel::Tcg };
        let mut spec = QemuSpec::new(host.work_dir.clone(), MEMORY_MIB, accel);
        spec.machine.clone_from(&vm.machine);
        spec.cpu.clone_from(&vm.cpu);
        spec.disk = Some(disk(lab));
        spec.nics.push(QemuNic { tap: TAP.into(), mac: plan.mac() });
        spec.address =
            Some(crate::guest::GuestAddress { ip: plan.ip(), prefix: 24, mtu: Some(MTU) });
        spec.incoming = incoming;
        let wanted = qemu_command(files, &spec)?;
        let mut command = host.command("qemu-system-x86_64");
        command.args(wanted.get_args()).stdin(std::process::Stdio::null());
        let child = ns::spawn(command).context("qemu-system-x86_64")?;
        Ok(Self { child, spec })
    }

    /// Its monitor, once it listens.
    async fn monitor(&mut self) -> Result<Qmp> {
        let end = Instant::now() + COMMAND;
        loop {
            match Qmp::connect(&self.spec.qmp(), COMMAND).await {
                Ok(qmp) => return Ok(qmp),
                Err(error) if Instant::now() > end => return Err(error.into()),
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("QEMU ended with {status}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn disk(lab: &Lab) -> PathBuf {
    lab.dir().join("web.img")
}

pub(super) fn run(case: &Case, files: &GuestFiles, vm: &Vm, congestion: &str) -> Result<Run> {
    let lab = Lab::new(&case.lab())?;
    lab.set_congestion_control(congestion)?;
    let (source_host, target_host) = (lab.host("h1")?.clone(), lab.host("h2")?.clone());
    for host in [&source_host, &target_host] {
        host.ns.batch(&[format!("tuntap add {TAP} mode tap"), format!("link set {TAP} up")])?;
    }
    files.make_disk(&disk(&lab), DiskForm::Raw)?;
    let source = Process::start(&lab, &source_host, files, vm, false)?;
    let serial = source.spec.serial1();
    block_on(async {
        let mut control = GuestControl::new(&serial).with_deadline(Duration::from_secs(60));
        control.wait_ready(BOOT).await?;
        control.churn(case.churn.0, case.churn.1, false).await
    })?;
    std::thread::sleep(SETTLE);
    let ram_bytes = u64::from(MEMORY_MIB) << 20;
    let content = content::of_qemu(source.child.id(), ram_bytes)?;

    let sampler = Sampler::start(&lab, Vec::new())?;
    let start = || Process::start(&lab, &target_host, files, vm, true);
    let (moved, target) = block_on(migrate(case, &lab, source, start, &target_host))?;
    let usage = sampler.finish()?;
    let verified = block_on(async {
        let control = GuestControl::new(target.spec.serial1());
        control.with_deadline(Duration::from_secs(60)).verify().await
    })?;
    drop(target);
    let figures = Run {
        is_peer: true,
        wan_bytes: moved.wan.carried_bytes(),
        total_ms: moved.ms(moved.resumed_us),
        downtime_ms: (moved.resumed_us - moved.stopped_us) as f64 / 1000.0,
        outage_ms: None,
        cpu_ms: usage.cpu_ms,
        node_rss_anon_peak_bytes: None,
        node_rss_anon_above_idle_bytes: None,
        link_use: moved.link_use(case),
        guest: Guest {
            image: ours::image(files),
            ram_bytes,
            content,
            pages_verified: verified.pages_verified,
            pages_corrupt: verified.pages_corrupt,
        },
        timeline: moved.timeline(),
    };
    lab.teardown()?;
    Ok(figures)
}

/// One move, times in microseconds since 1970.
struct Moved {
    version: String,
    requested_us: i64,
    migrate_us: i64,
    stopped_us: i64,
    resumed_us: i64,
    wan: LinkStats,
    /// Bytes on the link, source to destination, from `migrate` to RESUME.
    transferred_bytes: u64,
    account: Value,
}

impl Moved {
    fn ms(&self, at_us: i64) -> f64 {
        (at_us - self.requested_us) as f64 / 1000.0
    }

    fn link_use(&self, case: &Case) -> Option<f64> {
        let crate::lab::wan::WanMode::Shaped(link) = case.lab().wan else { return None };
        let seconds = (self.resumed_us - self.migrate_us) as f64 / 1e6;
        Some(self.transferred_bytes as f64 * 8.0 / seconds / link.rate_bps as f64)
    }

    fn timeline(&self) -> Vec<(f64, String)> {
        vec![
            (0.0, self.version.clone()),
            (self.ms(self.migrate_us), "migrate".into()),
            (self.ms(self.stopped_us), "STOP".into()),
            (self.ms(self.resumed_us), "RESUME".into()),
            (self.ms(self.resumed_us), format!("its own account: {}", self.account)),
        ]
    }
}

fn now_us() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?)
}

async fn migrate(
    case: &Case,
    lab: &Lab,
    mut source: Process,
    start: impl FnOnce() -> Result<Process>,
    target_host: &Host,
) -> Result<(Moved, Process)> {
    let from = source.monitor().await?;
    let before = lab.wan()?.stats()?;
    let requested_us = now_us()?;
    let mut target = start()?;
    let to = target.monitor().await?;
    for qmp in [&from, &to] {
        configure(case, qmp).await?;
    }
    let uri = format!("tcp:{}:{PORT}", target_host.addr);
    to.execute("migrate-incoming", json!({ "uri": uri }), COMMAND).await?;
    let transfer = lab.wan()?.stats()?;
    let migrate_us = now_us()?;
    from.execute("migrate", json!({ "uri": uri }), COMMAND).await?;
    let resumed_us = tokio::time::timeout(MOVE, time_of(&to, "RESUME")).await;
    let resumed_us = match resumed_us {
        Ok(at) => at?,
        Err(_) => bail!("QEMU did not finish: {}", account(&from).await?),
    };
    let transferred = lab.wan()?.stats()?.since(&transfer);
    let stopped_us = tokio::time::timeout(COMMAND, time_of(&from, "STOP")).await??;
    let account = completed(&from).await?;
    let wan = lab.wan()?.stats()?.since(&before);
    let [major, minor, micro] = from.version();
    let moved = Moved {
        version: format!("qemu {major}.{minor}.{micro}"),
        requested_us,
        migrate_us,
        stopped_us,
        resumed_us,
        wan,
        transferred_bytes: transferred.forward.carried_bytes,
        account,
    };
    Ok((moved, target))
}

/// The same at both ends.
async fn configure(case: &Case, qmp: &Qmp) -> Result<()> {
    let on = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = [on("events", true), on("multifd", case.shaped)];
    let mut parameters = json!({ "max-bandwidth": 0, "downtime-limit": DOWNTIME_LIMIT_MS });
    if case.shaped {
        parameters["multifd-channels"] = 2.into();
        parameters["multifd-compression"] = "zstd".into();
    }
    let capabilities = json!({ "capabilities": capabilities });
    qmp.execute("migrate-set-capabilities", capabilities, COMMAND).await?;
    qmp.execute("migrate-set-parameters", parameters, COMMAND).await?;
    Ok(())
}

/// When QEMU emitted the event, waiting for it.
async fn time_of(qmp: &Qmp, name: &str) -> Result<i64> {
    let event = qmp.events_after(0).find(|event| event.name == name).await;
    Ok(event.with_context(|| format!("waiting for {name}"))?.at.micros)
}

async fn account(qmp: &Qmp) -> Result<Value> {
    Ok(qmp.execute("query-migrate", Value::Null, COMMAND).await?)
}

/// The source's account, once it has noticed the end.
async fn completed(qmp: &Qmp) -> Result<Value> {
    let end = Instant::now() + COMMAND;
    loop {
        let account = account(qmp).await?;
        match account["status"].as_str() {
            Some("completed") => return Ok(account),
            Some("failed" | "cancelled") | None => bail!("the source failed: {account}"),
            Some(_) => {}
        }
        ensure!(Instant::now() < end, "the source does not end: {account}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
