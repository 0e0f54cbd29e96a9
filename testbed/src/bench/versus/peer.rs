//! The peer: QEMU alone moves the same guest over the same link.
//!
//! Owns both QEMUs of one run, which run in the hosts' namespaces as godwit's do. Shaped: multifd over two connections with zstd at its default
//! level; unshaped: plain pre-copy. In both cases no cap on the bandwidth, and 300 ms of downtime allowed. A disk that moves is
//! `super::mirror`'s.

use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use godwit::vmm::qmp::Qmp;
use serde_json::{Value, json};

use super::figures::{Guest, Run};
use super::mirror::{self, Mirroring};
use super::sampler::Sampler;
use super::{AWAY, Case, MEMORY_MIB, MOVE, SETTLE, Vm, content, ours};
use crate::guest::disk::DiskForm;
use crate::guest::{Accel, GuestControl, GuestFiles, QemuNic, QemuSpec, qemu_command};
use crate::lab::wan::LinkStats;
use crate::lab::{Host, Lab, cleanup, ns};
use crate::scenario::swarm::{GuestPlan, MTU, run as block_on};

/// Where the destination of the first guest listens, and that of the second behind it.
const PORT: u16 = 4444;
pub(super) const COMMAND: Duration = Duration::from_secs(10);
pub(super) const BOOT: Duration = Duration::from_secs(180);
/// Pause that QEMU may plan with, milliseconds.
const DOWNTIME_LIMIT_MS: u64 = 300;

/// The peer's name in the report.
pub(super) fn tool(case: &Case, congestion: &str, runs: &[Run]) -> String {
    let version =
        runs.first().and_then(|run| run.timeline.first()).map_or("qemu", |t| t.1.as_str());
    let how = if case.shaped { "multifd x2 zstd" } else { "plain pre-copy" };
    let disk = if case.disk.is_some() { "blockdev-mirror + " } else { "" };
    format!("{version} {disk}{how}, {congestion}")
}

/// A QEMU of the peer; killed when dropped.
pub(super) struct Process {
    pub child: Child,
    pub spec: QemuSpec,
}

/// What both ends of a move are started with.
pub(super) struct Setting<'a> {
    pub case: &'a Case,
    pub lab: &'a Lab,
    pub files: &'a GuestFiles,
    pub vm: &'a Vm,
    /// Which guest of several, from 0.
    pub member: u8,
}

impl Setting<'_> {
    fn plan(&self) -> GuestPlan {
        GuestPlan::new(&format!("web{}", self.member), 5 + self.member, MEMORY_MIB)
    }

    fn tap(&self) -> String {
        format!("peer{}", self.member)
    }

    /// Makes the guest's tap on a host.
    pub fn make_tap(&self, host: &Host) -> Result<()> {
        let tap = self.tap();
        host.ns.batch(&[format!("tuntap add {tap} mode tap"), format!("link set {tap} up")])
    }
}

impl Process {
    /// With the disk image `disk`; one that waits for a disk, too, does not run by itself when it has arrived.
    pub fn start(
        setting: &Setting<'_>,
        host: &Host,
        disk: PathBuf,
        incoming: bool,
    ) -> Result<Self> {
        let Setting { case, files, vm, .. } = setting;
        let plan = setting.plan();
        let accel = if vm.accel == "kvm" { Accel::Kvm } else { Accel::Tcg };
        // A directory of its own: on the way back the host has had a QEMU before.
        let which = if incoming { "incoming" } else { "first" };
        let dir = host.work_dir.join(format!("{which}{}", setting.member));
        cleanup::make_private_dir(&dir)?;
        let mut spec = QemuSpec::new(dir, MEMORY_MIB, accel);
        spec.machine.clone_from(&vm.machine);
        spec.cpu.clone_from(&vm.cpu);
        spec.disk = Some(disk);
        spec.nics.push(QemuNic { tap: setting.tap(), mac: plan.mac() });
        spec.address =
            Some(crate::guest::GuestAddress { ip: plan.ip(), prefix: 24, mtu: Some(MTU) });
        spec.incoming = incoming;
        let wanted = qemu_command(files, &spec)?;
        let mut command = host.command("qemu-system-x86_64");
        command.args(wanted.get_args()).stdin(std::process::Stdio::null());
        if incoming && case.disk.is_some() {
            command.arg("-S");
        }
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

pub(super) fn run(case: &Case, files: &GuestFiles, vm: &Vm, congestion: &str) -> Result<Run> {
    let lab = Lab::new(&case.lab())?;
    lab.set_congestion_control(congestion)?;
    let hosts = [lab.host("h1")?.clone(), lab.host("h2")?.clone()];
    let setting = Setting { case, lab: &lab, files, vm, member: 0 };
    for host in &hosts {
        setting.make_tap(host)?;
    }
    let disk = lab.dir().join("web.img");
    files.make_disk(&disk, DiskForm::Raw)?;
    let mut source = Process::start(&setting, &hosts[0], disk, false)?;
    let serial = source.spec.serial1();
    block_on(async {
        let mut control = GuestControl::new(&serial).with_deadline(Duration::from_secs(60));
        control.wait_ready(BOOT).await?;
        if let Some((path, mb, rate_kbps)) = case.disk {
            control.disk(path, mb, rate_kbps).await?;
        }
        control.churn(case.churn.0, case.churn.1, false).await
    })?;
    std::thread::sleep(SETTLE);
    let mut target_host = &hosts[1];
    if case.back {
        (_, source) = block_on(migrate(&setting, source, target_host))?;
        std::thread::sleep(AWAY);
        target_host = &hosts[0];
    }
    let ram_bytes = u64::from(MEMORY_MIB) << 20;
    let content = content::of_qemu(source.child.id(), ram_bytes)?;

    let sampler = Sampler::start(&lab, Vec::new())?;
    let (moved, target) = block_on(migrate(&setting, source, target_host))?;
    let usage = sampler.finish()?;
    let control = GuestControl::new(target.spec.serial1()).with_deadline(Duration::from_secs(60));
    let verified = block_on(ours::verify(case, control))?;
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
        together: None,
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
pub(super) struct Moved {
    pub version: String,
    pub requested_us: i64,
    /// When the first byte of disk or memory could leave.
    pub copying_us: i64,
    migrate_us: i64,
    pub stopped_us: i64,
    pub resumed_us: i64,
    wan: LinkStats,
    /// Bytes on the link, source to destination, from then to RESUME.
    transferred_bytes: u64,
    account: Value,
}

impl Moved {
    fn ms(&self, at_us: i64) -> f64 {
        (at_us - self.requested_us) as f64 / 1000.0
    }

    fn link_use(&self, case: &Case) -> Option<f64> {
        let crate::lab::wan::WanMode::Shaped(link) = case.lab().wan else { return None };
        let seconds = (self.resumed_us - self.copying_us) as f64 / 1e6;
        Some(self.transferred_bytes as f64 * 8.0 / seconds / link.rate_bps as f64)
    }

    pub fn timeline(&self) -> Vec<(f64, String)> {
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

/// Starts a destination and moves a guest there.
pub(super) async fn migrate(
    setting: &Setting<'_>,
    mut source: Process,
    target_host: &Host,
) -> Result<(Moved, Process)> {
    let Setting { case, lab, .. } = *setting;
    let from = source.monitor().await?;
    let mut disk = source.spec.disk.clone().context("no disk")?;
    if case.disk.is_some() {
        let old = source.spec.disk.as_ref().context("no disk")?;
        disk = lab.dir().join(format!("web-{}.img", target_host.name));
        mirror::blank_like(old, &disk)?;
    }
    let before = lab.wan()?.stats()?;
    let requested_us = now_us()?;
    let mut target = Process::start(setting, target_host, disk, true)?;
    let to = target.monitor().await?;
    for qmp in [&from, &to] {
        configure(case, qmp).await?;
    }
    let uri = format!("tcp:{}:{}", target_host.addr, PORT + u16::from(setting.member));
    to.execute("migrate-incoming", json!({ "uri": uri }), COMMAND).await?;
    let transfer = lab.wan()?.stats()?;
    let copying_us = now_us()?;
    let mirroring = match case.disk {
        Some(_) => Some(Mirroring::until_ready(&from, &to, target_host, MOVE).await?),
        None => None,
    };
    let migrate_us = now_us()?;
    from.execute("migrate", json!({ "uri": uri }), COMMAND).await?;
    let ended = tokio::time::timeout(MOVE, async {
        if let Some(mirroring) = mirroring {
            mirroring.hand_over().await?;
        }
        time_of(&to, "RESUME").await
    });
    let resumed_us = match ended.await {
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
        copying_us,
        migrate_us,
        stopped_us,
        resumed_us,
        wan,
        transferred_bytes: transferred
            .forward
            .carried_bytes
            .max(transferred.backward.carried_bytes),
        account,
    };
    Ok((moved, target))
}

/// The same at both ends.
async fn configure(case: &Case, qmp: &Qmp) -> Result<()> {
    let on = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = [
        on("events", true),
        on("multifd", case.shaped),
        on("pause-before-switchover", case.disk.is_some()),
    ];
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
pub(super) async fn time_of(qmp: &Qmp, name: &str) -> Result<i64> {
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
