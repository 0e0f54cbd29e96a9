//! What an operator writes about a VM.
//!
//! Owns the TOML form ([`VmSpec`]) and its rules. Never reads the host: what depends on it (machine type, CPU model,
//! addresses) is settled by [`super::resolved`]. Invariant: a parsed spec keeps every bound below.

use std::path::PathBuf;
use std::str::FromStr;

use godwit_protocol::id::{Mac, Name};
use godwit_protocol::limits::{GUEST_MEMORY_BYTES, NICS, RULES};
use godwit_protocol::wire::filter::Rule;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Largest spec file read, in bytes.
pub const MAX_SPEC_BYTES: usize = 64 << 10;
/// Least guest memory, in bytes: firmware and a tiny guest.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Most virtual CPUs.
pub const MAX_VCPUS: u16 = 255;
/// Most disks of a VM.
pub const MAX_DISKS: usize = 16;
/// Most passthrough devices of a VM.
pub const MAX_HOSTDEVS: usize = 8;
/// Longest kernel command line, in bytes (Linux's own limit on x86).
pub const MAX_CMDLINE: usize = 2047;
/// Longest path, in bytes.
pub const MAX_PATH: usize = 1024;
/// Longest machine type or CPU model text, in bytes.
pub const MAX_MODEL: usize = 512;

/// Why a spec is refused. Each is one line that names the key and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecError {
    /// Not TOML, an unknown key, a key of the wrong type, or a missing one.
    #[error("spec line {line}: {message}")]
    Toml {
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value outside its bounds.
    #[error("spec key `{key}`: {message}")]
    Value {
        /// The key.
        key: String,
        /// What it must be.
        message: String,
    },
    /// The file is too large to be a spec.
    #[error("the spec is larger than {MAX_SPEC_BYTES} bytes; is it the right file?")]
    TooLarge,
}

pub(super) fn value_error(key: impl Into<String>, message: impl Into<String>) -> SpecError {
    SpecError::Value { key: key.into(), message: message.into() }
}

/// Which accelerator runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The processor, through KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// The accelerator as an operator asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM where a trial shows that it works, TCG elsewhere.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// TCG.
    Tcg,
}

/// Form of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl DiskFormat {
    /// QEMU's name for it, also the ending of an image's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A disk: `[[disk]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The image, an absolute path.
    pub path: PathBuf,
    /// Its form.
    pub format: DiskFormat,
    /// Whether every host reaches the same image at this path; otherwise it moves with the VM.
    #[serde(default)]
    pub shared: bool,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub readonly: bool,
    /// Whether what the guest discards is given back to the file system.
    #[serde(default = "yes")]
    pub discard: bool,
}

/// Firmware in flash: `[nvram]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvramSpec {
    /// The firmware, a raw image that is never written; the destination needs the same file.
    pub code: PathBuf,
    /// Its variables, a raw image of this VM alone; it moves as a disk does.
    pub vars: PathBuf,
}

/// A network card: `[[nic]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// The wire that it is connected to; absent: none.
    #[serde(default)]
    pub wire: Option<String>,
    /// Its address with colons; absent: generated once.
    #[serde(default)]
    pub mac: Option<String>,
    /// Largest packet in bytes that the guest is told to use; absent: what the node's wires carry.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// What may reach it: rules such as `allow tcp 22 from 10.0.0.0/8`; the first that fits decides.
    #[serde(default)]
    pub filter: Vec<Rule>,
}

/// A PCI device of the host given to the guest: `[[hostdev]]`. Such a VM cannot move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostdevSpec {
    /// PCI address such as `0000:3b:00.0`.
    pub address: String,
}

/// A VM as its operator describes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name: 1 to 63 of `a-z`, `0-9`, `-`.
    pub name: String,
    /// Memory such as `512M` or `4G` (powers of 1024).
    pub memory: String,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub vcpus: u16,
    /// Versioned machine type; absent: the newest `pc-q35-X.Y` of this host's QEMU.
    #[serde(default)]
    pub machine: Option<String>,
    /// CPU model as QEMU writes it; absent: [`super::resolved::BASELINE_CPU`].
    #[serde(default)]
    pub cpu: Option<String>,
    /// Accelerator; absent: `auto`.
    #[serde(default)]
    pub accel: AccelChoice,
    /// Kernel image to start; absent: the first disk is booted.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// Initial ramdisk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// A second serial port, reachable as a unix socket.
    #[serde(default)]
    pub serial1: bool,
    /// Disks, in the order the guest sees.
    #[serde(default)]
    pub disk: Vec<DiskSpec>,
    /// Firmware in flash; absent: QEMU's own BIOS.
    #[serde(default)]
    pub nvram: Option<NvramSpec>,
    /// Network cards, in the order the guest sees.
    #[serde(default)]
    pub nic: Vec<NicSpec>,
    /// Passthrough devices.
    #[serde(default)]
    pub hostdev: Vec<HostdevSpec>,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

impl FromStr for VmSpec {
    type Err = SpecError;

    /// Parses TOML and checks every bound.
    fn from_str(text: &str) -> Result<Self, SpecError> {
        if text.len() > MAX_SPEC_BYTES {
            return Err(SpecError::TooLarge);
        }
        let spec: Self = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let before = text.as_bytes().iter().take(start);
            let line = 1 + before.filter(|byte| **byte == b'\n').count();
            let message = error.message().trim().replace('\n', "; ");
            SpecError::Toml { line, message }
        })?;
        spec.check()?;
        Ok(spec)
    }
}

impl VmSpec {
    /// Guest memory in bytes.
    ///
    /// # Errors
    /// When `memory` is not a size, or out of bounds.
    pub fn memory_bytes(&self) -> Result<u64, SpecError> {
        parse_memory(&self.memory)
    }

    /// Checks every bound that needs no host.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn check(&self) -> Result<(), SpecError> {
        check_name("name", &self.name)?;
        self.memory_bytes()?;
        check_vcpus(self.vcpus)?;
        if let Some(machine) = &self.machine {
            check_machine(machine)?;
        }
        if let Some(cpu) = &self.cpu {
            check_cpu(cpu)?;
        }
        check_boot(self.kernel.is_some(), self.initrd.is_some(), &self.cmdline)?;
        for (key, path) in [("kernel", &self.kernel), ("initrd", &self.initrd)] {
            path.as_ref().map_or(Ok(()), |path| check_path(key, path))?;
        }
        check_count("disk", self.disk.len(), MAX_DISKS)?;
        self.disk.iter().try_for_each(|disk| check_path("disk.path", &disk.path))?;
        if let Some(NvramSpec { code, vars }) = &self.nvram {
            check_path("nvram.code", code)?;
            check_path("nvram.vars", vars)?;
        }
        check_count("nic", self.nic.len(), NICS)?;
        check_count("nic.filter", self.nic.iter().map(|nic| nic.filter.len()).sum(), RULES)?;
        for nic in &self.nic {
            nic.wire.as_ref().map(|wire| check_name("nic.wire", wire)).transpose()?;
            nic.mac.as_deref().map(parse_mac).transpose()?;
            nic.mtu.map_or(Ok(()), check_mtu)?;
        }
        check_count("hostdev", self.hostdev.len(), MAX_HOSTDEVS)?;
        self.hostdev.iter().try_for_each(check_hostdev)
    }
}

pub(super) fn check_name(key: &str, text: &str) -> Result<Name, SpecError> {
    text.parse().map_err(|error| value_error(key, format!("{error}")))
}

/// Parses a memory size with an optional suffix K, M, G or T (powers of 1024).
pub(super) fn parse_memory(text: &str) -> Result<u64, SpecError> {
    let bad =
        || value_error("memory", format!("`{text}` is not a size such as \"512M\" or \"4G\""));
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(bad)?;
    check_memory(bytes)?;
    Ok(bytes)
}

pub(super) fn check_memory(bytes: u64) -> Result<(), SpecError> {
    if !(MIN_MEMORY..=GUEST_MEMORY_BYTES).contains(&bytes) || !bytes.is_multiple_of(1 << 20) {
        let message = "must be a whole number of MiB from 16M to 16T";
        return Err(value_error("memory", message));
    }
    Ok(())
}

pub(super) fn check_vcpus(vcpus: u16) -> Result<(), SpecError> {
    if (1..=MAX_VCPUS).contains(&vcpus) {
        return Ok(());
    }
    Err(value_error("vcpus", format!("must be 1 to {MAX_VCPUS}")))
}

pub(super) fn check_mtu(mtu: u16) -> Result<(), SpecError> {
    if (1280..=9216).contains(&mtu) {
        return Ok(());
    }
    Err(value_error("nic.mtu", "must be 1280 to 9216 bytes"))
}

/// A machine type is a versioned q35, so that both ends of a move build the same machine.
pub(super) fn check_machine(machine: &str) -> Result<(), SpecError> {
    let version = machine.strip_prefix("pc-q35-").unwrap_or("");
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = version.split('.').collect();
    if machine.len() <= MAX_MODEL
        && (2..=3).contains(&parts.len())
        && parts.iter().all(|p| digits(p))
    {
        return Ok(());
    }
    let message = format!("`{machine}` is not a versioned q35 such as \"pc-q35-10.0\"");
    Err(value_error("machine", message))
}

pub(super) fn check_cpu(cpu: &str) -> Result<(), SpecError> {
    let allowed =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b',' | b'+' | b'=');
    if !cpu.is_empty() && cpu.len() <= MAX_MODEL && cpu.bytes().all(allowed) {
        return Ok(());
    }
    Err(value_error(
        "cpu",
        "must be a QEMU CPU model such as \"Nehalem-v1\" or \"Nehalem-v1,+aes\"",
    ))
}

pub(super) fn check_boot(kernel: bool, initrd: bool, cmdline: &str) -> Result<(), SpecError> {
    if !kernel && (initrd || !cmdline.is_empty()) {
        let key = if initrd { "initrd" } else { "cmdline" };
        return Err(value_error(key, "needs `kernel` beside it"));
    }
    if cmdline.len() > MAX_CMDLINE || cmdline.contains(['\0', '\n']) {
        let message = format!("must be one line of at most {MAX_CMDLINE} bytes");
        return Err(value_error("cmdline", message));
    }
    Ok(())
}

pub(super) fn check_path(key: &str, path: &std::path::Path) -> Result<(), SpecError> {
    let text = path.to_str().filter(|text| text.len() <= MAX_PATH);
    // Control characters would garble QEMU's arguments and every log line.
    let clean = text.is_some_and(|text| !text.chars().any(char::is_control));
    if clean && path.is_absolute() {
        return Ok(());
    }
    let message = format!("must be an absolute path of at most {MAX_PATH} bytes of UTF-8");
    Err(value_error(key, message))
}

pub(super) fn check_hostdev(device: &HostdevSpec) -> Result<(), SpecError> {
    let hex =
        |part: &str, len: usize| part.len() == len && part.bytes().all(|b| b.is_ascii_hexdigit());
    let (slot, function) = device.address.split_once('.').unwrap_or(("", ""));
    let mut parts = slot.split(':');
    let mut part = |len| parts.next().is_some_and(|part| hex(part, len));
    if part(4) && part(2) && part(2) && parts.next().is_none() && hex(function, 1) {
        return Ok(());
    }
    let message = format!("`{}` is not a PCI address such as \"0000:3b:00.0\"", device.address);
    Err(value_error("hostdev.address", message))
}

pub(super) fn check_count(key: &str, count: usize, most: usize) -> Result<(), SpecError> {
    if count <= most {
        return Ok(());
    }
    Err(value_error(key, format!("{count} are given, at most {most} are possible")))
}

/// Parses a unicast address such as `52:54:00:12:34:56`.
pub(super) fn parse_mac(text: &str) -> Result<Mac, SpecError> {
    let bad = || {
        let message = format!("`{text}` is not a unicast address such as \"52:54:00:12:34:56\"");
        value_error("nic.mac", message)
    };
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    let mac = Mac(mac);
    if parts.next().is_some() || !is_unicast(mac) { Err(bad()) } else { Ok(mac) }
}

pub(super) fn is_unicast(mac: Mac) -> bool {
    mac.0[0] & 1 == 0 && mac.0 != [0; 6]
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
