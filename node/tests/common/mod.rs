//! What the tests of the VM driver share: a VM of firmware alone, and the end of what a failed test leaves.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use godwit::vmm::{Accel, GuestMemory, Mode, Resolution, ResolvedSpec, StartParams, copy_dirs};
use godwit_protocol::id::{CopyId, Mac, VmId};

pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";
pub const SOON: Duration = Duration::from_secs(20);

pub fn resolution() -> Resolution {
    Resolution {
        id: VmId([9; 16]),
        machine: "pc-q35-8.1".into(),
        accel: Accel::Tcg,
        mtu: 1400,
        macs: vec![Mac([0x52, 0x54, 0, 0, 0, 1])],
    }
}

pub fn resolve(text: &str) -> ResolvedSpec {
    ResolvedSpec::resolve(&text.parse().unwrap(), resolution()).unwrap()
}

pub fn params(spec: ResolvedSpec, dir: &Path, mode: Mode) -> StartParams {
    StartParams {
        copy: CopyId([dir.as_os_str().len() as u8; 16]),
        memory: Arc::new(GuestMemory::create(spec.memory).unwrap()),
        spec,
        dir: dir.to_owned(),
        taps: Vec::new(),
        mode,
        qemu: PathBuf::from(QEMU),
    }
}

/// Kills what a failed test leaves behind.
pub struct Cleanup(pub tempfile::TempDir);

impl Cleanup {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("gwvmm").tempdir().unwrap())
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        for dir in copy_dirs(self.0.path()).unwrap_or_default() {
            let record = std::fs::read(dir.join("copy.json")).unwrap_or_default();
            let record: serde_json::Value = serde_json::from_slice(&record).unwrap_or_default();
            let Some(pid) = record.pointer("/process/pid").and_then(|p| p.as_i64()) else {
                continue;
            };
            let own = std::fs::read_to_string(format!("/proc/{pid}/environ"));
            let cwd = std::fs::read_link(format!("/proc/{pid}/cwd"));
            if own.is_ok() && cwd.is_ok_and(|cwd| cwd == dir) {
                let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}
