//! A VM as it is started: everything that must be the same at both ends of a move.
//!
//! Owns [`ResolvedSpec`], its encoding for the way to a destination, and what a destination makes of it ([`ResolvedSpec::place`]). Never starts
//! anything. Invariant: what [`ResolvedSpec::decode`] returns keeps the bounds of a spec, whoever sent it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use godwit_protocol::id::{CopyId, Mac, Name, VmId};
use godwit_protocol::limits::{NICS, RULES};
use godwit_protocol::wire::filter::Rule;
use serde::{Deserialize, Serialize};

use super::disk::{Backing, NVRAM, ResolvedDisk, image_path};
use super::image;
use super::refusal::{Refusal, file_refusal};
use super::spec::{
    Accel, DiskFormat, DiskSpec, HostdevSpec, MAX_DISKS, MAX_HOSTDEVS, SpecError, VmSpec,
    check_boot, check_count, check_cpu, check_hostdev, check_machine, check_memory, check_mtu,
    check_name, check_path, check_vcpus, is_unicast, parse_mac, value_error,
};

/// The CPU model of a VM whose spec names none: about x86-64-v2 (SSE4.2, POPCNT), which KVM on every Intel or AMD host of
/// the last decade and TCG both give in full, so that a VM can move between any two of them.
pub const BASELINE_CPU: &str = "Nehalem-v1";

/// Longest encoded spec, in bytes.
pub const MAX_ENCODED: usize = 128 << 10;

/// A file that both ends must have with the same content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    /// Absolute path.
    pub path: PathBuf,
    /// BLAKE3 of its content.
    pub blake3: [u8; 32],
}

impl FileRef {
    /// Hashes the file at `path`. Reads it all: not for an async thread.
    ///
    /// # Errors
    /// What reading it gives.
    pub fn hash(path: &Path) -> std::io::Result<Self> {
        let mut file = File::open(path)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
        }
        Ok(Self { path: path.to_owned(), blake3: *hasher.finalize().as_bytes() })
    }
}

/// A network card with its address settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedNic {
    /// The wire that it is connected to, if any.
    pub wire: Option<Name>,
    /// Its address.
    pub mac: Mac,
    /// Largest packet in bytes that the guest is told to use. Part of the device: the same at both ends.
    pub mtu: u16,
    /// What may reach it: the first rule that fits decides. It is in force before the NIC is on a wire.
    #[serde(default)]
    pub filter: Vec<Rule>,
}

/// A VM with everything settled, as it travels to a destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedSpec {
    /// The VM.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Virtual CPUs.
    pub vcpus: u16,
    /// Versioned machine type.
    pub machine: String,
    /// CPU model as QEMU writes it.
    pub cpu: String,
    /// Accelerator: a running guest cannot change it.
    pub accel: Accel,
    /// Kernel image.
    pub kernel: Option<FileRef>,
    /// Initial ramdisk.
    pub initrd: Option<FileRef>,
    /// Kernel command line.
    pub cmdline: String,
    /// Whether there is a second serial port.
    pub serial1: bool,
    /// Firmware in flash. Its variables are the last of `disks` then.
    #[serde(default)]
    pub firmware: Option<FileRef>,
    /// Disks, in the guest's order, [`NVRAM`] last.
    pub disks: Vec<ResolvedDisk>,
    /// Network cards.
    pub nics: Vec<ResolvedNic>,
    /// Passthrough devices.
    pub hostdevs: Vec<HostdevSpec>,
}

/// What the node settles when a spec leaves it open.
#[derive(Debug, Clone)]
pub struct Resolution {
    /// The VM's new id.
    pub id: VmId,
    /// Machine type for a spec without one.
    pub machine: String,
    /// Accelerator, chosen for the spec's wish.
    pub accel: Accel,
    /// Packet size of a NIC without one, in bytes.
    pub mtu: u16,
    /// Addresses for NICs without one, one per NIC of the spec.
    pub macs: Vec<Mac>,
}

impl ResolvedSpec {
    /// Settles a spec. Reads the kernel, the initrd and the disks' bases to hash them, and asks `qemu-img` about the
    /// disks: not for an async thread.
    ///
    /// # Errors
    /// What breaks a rule, a file that cannot be read, an image that cannot be a disk.
    pub fn resolve(spec: &VmSpec, with: Resolution) -> Result<Self, Refusal> {
        Self::resolve_with(spec, with, &|path| Ok(FileRef::hash(path)?.blake3))
    }

    /// As [`ResolvedSpec::resolve`], with the caller's way to the BLAKE3 of a base, which may remember it.
    ///
    /// # Errors
    /// As [`ResolvedSpec::resolve`].
    pub fn resolve_with(spec: &VmSpec, with: Resolution, digest: Digest) -> Result<Self, Refusal> {
        spec.check()?;
        let hash = |path: &Option<PathBuf>| path.as_deref().map(hash_file).transpose();
        let mut nics = Vec::new();
        for (index, nic) in spec.nic.iter().enumerate() {
            let given = nic.mac.as_deref().map(parse_mac).transpose()?;
            let missing = || value_error("nic.mac", "none was generated");
            let mac = given.or_else(|| with.macs.get(index).copied()).ok_or_else(missing)?;
            let wire = nic.wire.as_ref().map(|wire| check_name("nic.wire", wire)).transpose()?;
            let (mtu, filter) = (nic.mtu.unwrap_or(with.mtu), nic.filter.clone());
            nics.push(ResolvedNic { wire, mac, mtu, filter });
        }
        let resolved = Self {
            id: with.id,
            name: check_name("name", &spec.name)?,
            memory: spec.memory_bytes()?,
            vcpus: spec.vcpus,
            machine: spec.machine.clone().unwrap_or(with.machine),
            cpu: spec.cpu.clone().unwrap_or_else(|| BASELINE_CPU.into()),
            accel: with.accel,
            kernel: hash(&spec.kernel)?,
            initrd: hash(&spec.initrd)?,
            cmdline: spec.cmdline.clone(),
            serial1: spec.serial1,
            firmware: hash(&spec.nvram.as_ref().map(|nvram| nvram.code.clone()))?,
            disks: resolve_disks(spec, digest)?,
            nics,
            hostdevs: spec.hostdev.clone(),
        };
        resolved.check()?;
        Ok(resolved)
    }

    /// Checks every bound; for a spec that came from elsewhere.
    ///
    /// # Errors
    /// The first thing that breaks a rule.
    pub fn check(&self) -> Result<(), SpecError> {
        check_memory(self.memory)?;
        check_vcpus(self.vcpus)?;
        check_machine(&self.machine)?;
        check_cpu(&self.cpu)?;
        check_boot(self.kernel.is_some(), self.initrd.is_some(), &self.cmdline)?;
        for (key, file) in [("kernel", &self.kernel), ("initrd", &self.initrd)] {
            file.as_ref().map_or(Ok(()), |file| check_path(key, &file.path))?;
        }
        self.check_disks()?;
        check_count("nic", self.nics.len(), NICS)?;
        check_count("nic.filter", self.nics.iter().map(|nic| nic.filter.len()).sum(), RULES)?;
        for (index, nic) in self.nics.iter().enumerate() {
            check_mtu(nic.mtu)?;
            if !is_unicast(nic.mac) {
                return Err(value_error("nic.mac", "is not a unicast address"));
            }
            if self.nics[..index].iter().any(|other| other.mac == nic.mac) {
                return Err(value_error("nic.mac", "two NICs have the same address"));
            }
        }
        check_count("hostdev", self.hostdevs.len(), MAX_HOSTDEVS)?;
        self.hostdevs.iter().try_for_each(check_hostdev)
    }

    fn check_disks(&self) -> Result<(), SpecError> {
        if let Some(firmware) = &self.firmware {
            check_path("nvram.code", &firmware.path)?;
        }
        let disks = match (&self.firmware, self.disks.split_last()) {
            (None, _) => &self.disks[..],
            (Some(_), Some((nvram, disks))) => {
                nvram.check(disks.len(), true)?;
                let plain = (nvram.shared, nvram.readonly, nvram.format);
                if plain != (false, false, DiskFormat::Raw) {
                    return Err(value_error("nvram.vars", "must be a raw image of this VM alone"));
                }
                disks
            }
            (Some(_), None) => return Err(value_error("nvram.vars", "is missing")),
        };
        check_count("disk", disks.len(), MAX_DISKS)?;
        disks.iter().enumerate().try_for_each(|(index, disk)| disk.check(index, false))
    }

    /// The disks that move with the VM.
    pub fn moving(&self) -> impl Iterator<Item = &ResolvedDisk> {
        self.disks.iter().filter(|disk| disk.moves())
    }

    /// The same VM as copy `copy` on a host that keeps its images in `dir`: disks that move have their own image there
    /// (not made yet: [`super::image::create`]), on bases that `find_base` finds by their content.
    ///
    /// # Errors
    /// [`Refusal::BaseMissing`], or a path that is too long.
    pub fn place(
        &self,
        dir: &Path,
        copy: CopyId,
        find_base: impl Fn(&Backing) -> Option<PathBuf>,
    ) -> Result<Self, Refusal> {
        let mut placed = self.clone();
        for disk in placed.disks.iter_mut().filter(|disk| disk.moves()) {
            disk.path = image_path(dir, self.id, copy, disk);
            for layer in &mut disk.backing {
                layer.path = find_base(layer).ok_or_else(|| {
                    let name = layer.path.file_name().unwrap_or_default().display().to_string();
                    Refusal::BaseMissing { name, disk: disk.id.clone() }
                })?;
            }
        }
        placed.check()?;
        Ok(placed)
    }

    /// Whether the VM can leave its host at all.
    ///
    /// # Errors
    /// The device that holds it.
    pub fn check_movable(&self) -> Result<(), Refusal> {
        if let Some(device) = self.hostdevs.first() {
            return Err(Refusal::Passthrough(device.address.clone()));
        }
        Ok(())
    }

    /// Whether the kernel, the initrd and the firmware are here with the same content, and the shared disks are. Reads
    /// the files: not for an async thread.
    ///
    /// # Errors
    /// The first file that is missing or differs.
    pub fn check_files(&self) -> Result<(), Refusal> {
        for file in self.kernel.iter().chain(&self.initrd).chain(&self.firmware) {
            if hash_file(&file.path)? != *file {
                return Err(Refusal::FileDiffers(file.path.display().to_string()));
            }
        }
        for disk in self.disks.iter().filter(|disk| !disk.moves()) {
            let opened = File::options().read(true).write(!disk.readonly).open(&disk.path);
            opened.map_err(|error| file_refusal(&disk.path, &error))?;
        }
        Ok(())
    }

    /// The form that travels to a destination.
    ///
    /// # Errors
    /// When it is longer than [`MAX_ENCODED`].
    pub fn encode(&self) -> Result<Vec<u8>, SpecError> {
        let encoded = bincode::serde::encode_to_vec(self, bincode::config::standard());
        match encoded {
            Ok(bytes) if bytes.len() <= MAX_ENCODED => Ok(bytes),
            _ => Err(value_error("spec", "is too long to be sent")),
        }
    }

    /// Reads the form that travels, and checks every bound.
    ///
    /// # Errors
    /// When it is not one, or breaks a rule.
    pub fn decode(bytes: &[u8]) -> Result<Self, SpecError> {
        let config = bincode::config::standard().with_limit::<MAX_ENCODED>();
        let (spec, used): (Self, usize) = bincode::serde::decode_from_slice(bytes, config)
            .map_err(|error| value_error("spec", format!("is not understood: {error}")))?;
        if used != bytes.len() {
            return Err(value_error("spec", "is followed by something else"));
        }
        spec.check()?;
        Ok(spec)
    }
}

/// A way to the BLAKE3 of a whole file.
pub type Digest<'a> = &'a dyn Fn(&Path) -> std::io::Result<[u8; 32]>;

fn resolve_disks(spec: &VmSpec, digest: Digest) -> Result<Vec<ResolvedDisk>, Refusal> {
    let numbered = spec.disk.iter().enumerate();
    let mut disks: Vec<_> =
        numbered.map(|(index, disk)| (format!("disk{index}"), disk.clone())).collect();
    if let Some(nvram) = &spec.nvram {
        let (path, format) = (nvram.vars.clone(), DiskFormat::Raw);
        let vars = DiskSpec { path, format, shared: false, readonly: false, discard: false };
        disks.push((NVRAM.into(), vars));
    }
    disks.into_iter().map(|(id, disk)| image::inspect(id, disk, digest)).collect()
}

fn hash_file(path: &Path) -> Result<FileRef, Refusal> {
    FileRef::hash(path).map_err(|error| file_refusal(path, &error))
}

#[cfg(test)]
#[path = "resolved_tests.rs"]
mod tests;
