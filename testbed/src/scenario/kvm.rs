//! The bare guest moves under KVM.
//!
//! Owns the run and the question whether this machine's KVM can run the guest at all, which is put to QEMU alone: where it
//! cannot, the answer is *skipped* with the cause; where it can, `godwit` must be able to move it.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::demo::migrate_watched;
use super::swarm::{GuestPlan, Swarm, run};
use crate::guest::{Accel, Cache, GuestControl, GuestFiles, GuestKind, QemuSpec, qemu_command};
use crate::lab::{LabConfig, ns};

/// How long the guest may take to answer under QEMU alone; it boots in milliseconds.
const TRIAL: Duration = Duration::from_secs(10);
/// MiB that it rewrites.
const CHURN_MB: u32 = 24;
/// Thousands of bytes a second that it rewrites.
const CHURN_KBPS: u32 = 1000;
/// Memory, MiB.
const MEMORY: u32 = 64;

/// Runs it.
pub fn kvm() -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Bare, &Cache::open()?)?;
    if let Err(cause) = runs_alone(&files) {
        let cause = format!("{cause:#}");
        println!("skipped: {cause}");
        return Ok(json!({"scenario": "kvm", "passed": false, "skipped": cause}));
    }
    let swarm = Swarm::up(&LabConfig::demo("kvm"), |_| {})?;
    let plan = GuestPlan {
        accel: Some(Accel::Kvm),
        cpu: Some(Accel::Kvm.default_cpu().to_owned()),
        ..GuestPlan::new("bare", 5, MEMORY)
    };
    let guest = swarm.start_guest("h1", &files, &plan)?;
    run(async { swarm.control("h1", &guest)?.churn(CHURN_MB, CHURN_KBPS, false).await })?;
    let there = move_and_verify(&swarm, &guest, ["h3", "h1", "h2"])?;
    let back = move_and_verify(&swarm, &guest, ["h2", "h2", "h1"])?;
    swarm.down()?;
    let good = |m: &Value| {
        m["outcome"] == "moved"
            && m["accel"] == "kvm"
            && m["guest"]["pages_corrupt"] == 0
            && m["guest"]["pages_verified"].as_u64() >= Some(u64::from(CHURN_MB) * 256)
            && m["console_goes_on"] == true
    };
    let passed = good(&there) && good(&back);
    Ok(json!({"scenario": "kvm", "passed": passed, "moves": [there, back]}))
}

/// Starts the guest under QEMU alone and waits for its answer.
fn runs_alone(files: &GuestFiles) -> Result<()> {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
    let dir = tempfile::tempdir()?;
    let spec = QemuSpec::new(dir.path(), MEMORY, Accel::Kvm);
    let mut command = qemu_command(files, &spec)?;
    let log = std::fs::File::create(dir.path().join("qemu.log"))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let mut child = ns::spawn(command).context("QEMU")?;
    let answered = run(async {
        let mut control = GuestControl::new(spec.serial1());
        control.wait_ready(TRIAL).await?;
        control.churn(1, 0, false).await?;
        let verified = control.verify().await?;
        ensure!(verified.pages_corrupt == 0, "its memory does not verify under QEMU alone");
        Ok(())
    });
    child.kill()?;
    child.wait()?;
    let said = std::fs::read_to_string(dir.path().join("qemu.log")).unwrap_or_default();
    let last = said.lines().next_back().unwrap_or("QEMU said nothing").to_owned();
    answered.with_context(|| format!("KVM does not run the bare guest here ({last})"))
}

/// One move, asked for on `on`, with the guest's own word on its memory afterwards.
fn move_and_verify(
    swarm: &Swarm,
    guest: &super::Guest,
    [on, from, to]: [&str; 3],
) -> Result<Value> {
    let status = migrate_watched(swarm, on, &[&guest.name, "--to", to])?;
    let info = swarm.ask(to, &["vm", "show", &guest.name])?;
    let console = info["detail"]["console"].as_str().context("the VM is not there")?.to_owned();
    let console = std::path::Path::new(&console).with_file_name("console.log");
    let before = std::fs::metadata(&console).map_or(0, |m| m.len());
    let verified = run(async {
        let mut control = swarm.control(to, guest)?;
        control.verify().await
    })?;
    // Once a second the guest writes a line to its console.
    let goes_on = swarm.wait("the console goes on", Duration::from_secs(10), |_| {
        Ok(std::fs::metadata(&console).is_ok_and(|m| m.len() > before))
    });
    Ok(json!({
        "outcome": status["phase"],
        "from": from,
        "to": status["to_name"],
        "total_ms": status["total_ms"],
        "downtime_ms": status["downtime_us"].as_u64().map(|us| us as f64 / 1000.0),
        "ram_nonzero_bytes": status["ram_nonzero_bytes"],
        "bulk_bytes": status["bulk_bytes"],
        "accel": info["accel"],
        "console_goes_on": goes_on.is_ok(),
        "guest": {
            "pages_verified": verified.pages_verified,
            "pages_corrupt": verified.pages_corrupt,
        },
    }))
}
