//! What the QEMU and the processor of this host can do, found by asking and trying.
//!
//! Owns [`HostCaps`]: QEMU's version, machine types, migration capabilities and parameters, whether KVM works, and which CPU models
//! it can give. Never assumes from a version number or from `/dev/kvm` alone. Starts short-lived QEMUs with `-S` that
//! die with the node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};
use std::os::fd::AsRawFd;
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::complaint::last_complaint;
use super::qmp::{Qmp, QmpError};
use super::refusal::Refusal;
use super::resolved::{BASELINE_CPU, ResolvedSpec};
use super::selftest;
use super::spec::{Accel, AccelChoice};

/// Migration capabilities that a move needs; the youngest, switchover-ack, came with QEMU 8.1.
const CAPABILITIES: [&str; 5] =
    ["events", "return-path", "x-ignore-shared", "pause-before-switchover", "switchover-ack"];
/// Migration parameters that a move needs, beside those that every QEMU has: it came with QEMU 8.2.
const PARAMETERS: [&str; 1] = ["avail-switchover-bandwidth"];
/// The first QEMU that has all of them.
const ALL_SINCE: &str = "8.2";
/// Time for one probing QEMU.
const DEADLINE: Duration = Duration::from_secs(20);

/// Why this host's QEMU cannot be probed.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// It does not run.
    #[error("cannot run {qemu}: {reason}; install QEMU (scripts/setup does)")]
    NotRunning {
        /// The path tried.
        qemu: String,
        /// Why.
        reason: String,
    },
    /// Its monitor does not answer as QEMU's does.
    #[error("{qemu} does not answer: {source}")]
    Qmp {
        /// The path tried.
        qemu: String,
        /// What happened.
        source: QmpError,
    },
}

/// Whether KVM runs guests here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kvm {
    /// A trial guest with the baseline CPU ran.
    Works,
    /// It did not, and why. Small guests that ask for less may still run with `accel = "kvm"`.
    Limited(String),
    /// There is no usable `/dev/kvm`.
    Absent(String),
}

/// Memory that this host lends to guests, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBudget {
    /// The limit for all guests.
    pub limit: u64,
    /// What guests have already, reservations included.
    pub used: u64,
}

type CpuAnswers = BTreeMap<(Accel, String, String), Result<(), Refusal>>;

/// What this host can do. Serialisable for display; clones share what was asked of QEMU about CPU models.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostCaps {
    /// The QEMU that was asked.
    pub qemu: PathBuf,
    /// Its version: major, minor, micro.
    pub version: [u32; 3],
    /// Its package, such as `Debian 1:10.0.2+ds-2`.
    pub package: String,
    /// Its versioned q35 machine types, oldest first.
    pub machines: Vec<String>,
    /// Its migration capabilities.
    pub capabilities: Vec<String>,
    /// Its migration parameters.
    pub parameters: Vec<String>,
    /// Whether KVM runs guests.
    pub kvm: Kvm,
    #[serde(skip)]
    cpus: Arc<Mutex<CpuAnswers>>,
}

impl HostCaps {
    /// Asks the QEMU at `qemu` and tries KVM. Takes about half a second.
    ///
    /// # Errors
    /// When QEMU does not run or does not answer. A QEMU that lacks something is no error here: see
    /// [`HostCaps::check_migration`].
    pub async fn probe(qemu: &Path) -> Result<Self, ProbeError> {
        let probe = Probe::start(qemu, &["-machine", "none"]).await?;
        let ask = |source| ProbeError::Qmp { qemu: qemu.display().to_string(), source };
        let names = probe.qmp.query_machines().await.map_err(ask)?;
        let mut machines: Vec<String> = names.into_iter().map(|m| m.name).collect();
        machines.retain(|name| machine_version(name).is_some());
        machines.sort_by_key(|name| machine_version(name));
        let capabilities = probe.qmp.query_migrate_capabilities().await.map_err(ask)?;
        let parameters = probe.qmp.query_migrate_parameters().await.map_err(ask)?;
        let mut caps = Self {
            qemu: qemu.to_owned(),
            version: probe.qmp.version(),
            package: probe.qmp.package().to_owned(),
            machines,
            capabilities,
            parameters,
            kvm: Kvm::Absent("not tried".into()),
            cpus: Arc::default(),
        };
        drop(probe);
        caps.kvm = caps.try_kvm().await;
        Ok(caps)
    }

    /// QEMU's version as text.
    #[must_use]
    pub fn version_text(&self) -> String {
        let [major, minor, micro] = self.version;
        format!("{major}.{minor}.{micro}")
    }

    /// The newest versioned q35.
    ///
    /// # Errors
    /// When this QEMU has none.
    pub fn newest_machine(&self) -> Result<&str, Refusal> {
        let none =
            || Refusal::UnknownMachine { machine: "pc-q35-*".into(), qemu: self.version_text() };
        self.machines.last().map(String::as_str).ok_or_else(none)
    }

    /// Whether this QEMU can take part in a move.
    ///
    /// # Errors
    /// [`Refusal::MissingCapability`], by name.
    pub fn check_migration(&self) -> Result<(), Refusal> {
        let lacks = |have: &[String], need: &[&'static str]| {
            need.iter().copied().find(|name| !have.iter().any(|have| have == name))
        };
        let missing = lacks(&self.capabilities, &CAPABILITIES).map(|name| ("capability", name));
        let missing = missing
            .or_else(|| lacks(&self.parameters, &PARAMETERS).map(|name| ("parameter", name)));
        let Some((kind, name)) = missing else { return Ok(()) };
        let (qemu, needed) = (self.version_text(), ALL_SINCE);
        Err(Refusal::MissingCapability { kind, name, qemu, needed })
    }

    /// The accelerator for a spec's wish: KVM where a trial showed that it works.
    ///
    /// # Errors
    /// [`Refusal::NoKvm`] when KVM is demanded and there is none.
    pub fn choose_accel(&self, wish: AccelChoice) -> Result<Accel, Refusal> {
        match (wish, &self.kvm) {
            (AccelChoice::Kvm, Kvm::Absent(reason)) => Err(Refusal::NoKvm(reason.clone())),
            (AccelChoice::Kvm, _) | (AccelChoice::Auto, Kvm::Works) => Ok(Accel::Kvm),
            (AccelChoice::Tcg | AccelChoice::Auto, _) => Ok(Accel::Tcg),
        }
    }

    /// Whether a destination here takes the VM: machine type, memory, accelerator, CPU, files, capabilities.
    ///
    /// # Errors
    /// The first reason why not.
    pub async fn check_accepts(
        &self,
        spec: &ResolvedSpec,
        budget: MemoryBudget,
    ) -> Result<(), Refusal> {
        spec.check_movable()?;
        // What the VM wants first: it may be changed more easily than the QEMU of a host.
        self.check_runs(spec, budget).await?;
        self.check_migration()
    }

    /// Whether this host can start the VM: machine type, memory, accelerator, CPU, files.
    ///
    /// # Errors
    /// The first reason why not.
    pub async fn check_runs(
        &self,
        spec: &ResolvedSpec,
        budget: MemoryBudget,
    ) -> Result<(), Refusal> {
        spec.check()?;
        if !self.machines.contains(&spec.machine) {
            let machine = spec.machine.clone();
            return Err(Refusal::UnknownMachine { machine, qemu: self.version_text() });
        }
        let free = budget.limit.saturating_sub(budget.used);
        if spec.memory > free {
            let [need_mib, free_mib, limit_mib] =
                [spec.memory, free, budget.limit].map(|b| b >> 20);
            return Err(Refusal::Memory { need_mib, free_mib, limit_mib });
        }
        if let (Accel::Kvm, Kvm::Absent(reason)) = (spec.accel, &self.kvm) {
            return Err(Refusal::NoKvm(reason.clone()));
        }
        self.check_cpu(spec.accel, &spec.machine, &spec.cpu).await?;
        let files = spec.clone();
        let checked = spawn_blocking(move || files.check_files()).await;
        checked.unwrap_or_else(|error| {
            Err(Refusal::File { path: "the VM's files".into(), reason: error.to_string() })
        })
    }

    /// Whether this host gives a guest every feature of a CPU model. Asked of QEMU once, then remembered.
    ///
    /// # Errors
    /// [`Refusal::MissingCpuFeatures`] with QEMU's names, or [`Refusal::BadCpu`].
    pub async fn check_cpu(&self, accel: Accel, machine: &str, cpu: &str) -> Result<(), Refusal> {
        let key = (accel, machine.to_owned(), cpu.to_owned());
        // Held while asking, so that two migrations that begin at once ask once.
        let mut cpus = self.cpus.lock().await;
        if let Some(known) = cpus.get(&key) {
            return known.clone();
        }
        let answer = self.ask_cpu(accel, machine, cpu).await;
        if cpus.len() >= 64 {
            cpus.clear();
        }
        cpus.insert(key, answer.clone());
        answer
    }

    async fn ask_cpu(&self, accel: Accel, machine: &str, cpu: &str) -> Result<(), Refusal> {
        let bad = |reason: String| Refusal::BadCpu { cpu: cpu.into(), accel, reason };
        let machine = format!("{machine},accel={accel}");
        let args = ["-machine", machine.as_str(), "-cpu", cpu, "-m", "16M"];
        let probe = Probe::start(&self.qemu, &args).await.map_err(|error| match error {
            ProbeError::NotRunning { reason, .. } => bad(reason),
            ProbeError::Qmp { source, .. } => bad(source.to_string()),
        })?;
        let missing = probe.qmp.cpu_unavailable_features().await;
        let missing = missing.map_err(|error| bad(error.to_string()))?;
        if missing.is_empty() {
            return Ok(());
        }
        let features = missing.join(", ");
        Err(Refusal::MissingCpuFeatures { cpu: cpu.into(), accel, features })
    }

    /// Tries KVM: does it give the baseline CPU, which every VM asks for by default, and run what a kernel does with it?
    async fn try_kvm(&self) -> Kvm {
        let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        if let Err(error) = opened {
            return Kvm::Absent(format!("/dev/kvm: {error}"));
        }
        let Ok(machine) = self.newest_machine() else {
            return Kvm::Absent("QEMU has no q35 machine".into());
        };
        match self.check_cpu(Accel::Kvm, machine, BASELINE_CPU).await {
            Ok(()) => {}
            Err(Refusal::BadCpu { reason, .. }) => return Kvm::Absent(reason),
            Err(Refusal::MissingCpuFeatures { features, .. }) => {
                return Kvm::Limited(format!("KVM does not give {BASELINE_CPU} its {features}"));
            }
            Err(refusal) => return Kvm::Limited(refusal.to_string()),
        }
        match selftest::run(&self.qemu, Accel::Kvm, machine, BASELINE_CPU).await {
            Ok(()) => Kvm::Works,
            Err(failure) => Kvm::Limited(failure.to_string()),
        }
    }
}

/// The version in `pc-q35-X.Y[.Z]`.
fn machine_version(name: &str) -> Option<Vec<u32>> {
    let version = name.strip_prefix("pc-q35-")?;
    version.split('.').map(|part| part.parse().ok()).collect()
}

/// A short-lived QEMU that stands at its first instruction. Dropping it kills it.
pub(super) struct Probe {
    pub qmp: Qmp,
    pub child: Child,
}

impl Probe {
    pub async fn start(qemu: &Path, args: &[&str]) -> Result<Self, ProbeError> {
        let name = || qemu.display().to_string();
        let not_running = |reason: String| ProbeError::NotRunning { qemu: name(), reason };
        let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = pair.map_err(|error| not_running(error.to_string()))?;
        let fd = theirs.as_raw_fd();
        let mut command = Command::new(qemu);
        command.args(args).args(["-S", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.arg("-chardev").arg(format!("socket,id=qmp,fd={fd}"));
        command.args(["-mon", "chardev=qmp,mode=control"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.kill_on_drop(true);
        let prepare = move || {
            // SAFETY: both are async-signal-safe and touch the child alone: it keeps its end of the pair, and dies with
            // the thread that started it.
            let failed = unsafe {
                libc::fcntl(fd, libc::F_SETFD, 0) < 0
                    || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0
            };
            if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: `prepare` runs between fork and exec, makes only async-signal-safe calls and allocates nothing.
        unsafe { command.pre_exec(prepare) };
        let mut child = command.spawn().map_err(|error| not_running(error.to_string()))?;
        drop(theirs);
        let stream = std::os::unix::net::UnixStream::from(ours);
        let prepared = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
        let stream = prepared.map_err(|error| not_running(error.to_string()))?;
        match Qmp::over(stream, DEADLINE).await {
            Ok(qmp) => Ok(Self { qmp, child }),
            Err(QmpError::Disconnected) => Err(not_running(last_words(&mut child).await)),
            Err(source) => Err(ProbeError::Qmp { qemu: name(), source }),
        }
    }
}

/// Why a QEMU ended, from what it wrote.
async fn last_words(child: &mut Child) -> String {
    let Some(stderr) = child.stderr.take() else { return String::new() };
    let mut bytes = Vec::new();
    let mut bounded = stderr.take(64 << 10);
    let _ = timeout(DEADLINE, bounded.read_to_end(&mut bytes)).await;
    last_complaint(&String::from_utf8_lossy(&bytes))
}
