//! How a guest is started: as a VM of `godwit vm run` (a TOML spec), or by QEMU alone.
//!
//! Owns the two descriptions and keeps them alike: a guest under QEMU alone, the peer of the benchmarks, has the same devices
//! in the same order as under `godwit`. Never starts anything itself.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::disk::SpecDisk;
use super::{GuestFiles, GuestKind};

/// A NIC of a guest under `godwit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecNic {
    /// Name of the wire that it is connected to.
    pub wire: String,
    /// MAC address as `52:54:00:xx:xx:xx`; `None` lets the node choose.
    pub mac: Option<String>,
}

/// The address that the agent gives to the guest's first NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAddress {
    /// IPv4 address.
    pub ip: Ipv4Addr,
    /// Prefix length, 0..=32.
    pub prefix: u8,
    /// MTU in bytes; `None` keeps what the device offers.
    pub mtu: Option<u16>,
}

/// A guest to be run as a VM.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Name of the VM.
    pub name: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Disks in order; the first is the root of guests that start from one.
    pub disks: Vec<SpecDisk>,
    /// NICs in order.
    pub nics: Vec<SpecNic>,
    /// Address of the first NIC.
    pub address: Option<GuestAddress>,
    /// Seed of the workload's pages; `None` lets the guest draw one.
    pub seed: Option<u64>,
    /// Versioned machine type; `None` leaves it to the node.
    pub machine: Option<String>,
    /// CPU model; `None` leaves it to the node.
    pub cpu: Option<String>,
    /// Accelerator; `None` lets the node try KVM first.
    pub accel: Option<Accel>,
}

impl VmSpec {
    /// A VM of one CPU without disk or NIC.
    pub fn new(name: impl Into<String>, memory_mib: u32) -> Self {
        VmSpec {
            name: name.into(),
            memory_mib,
            vcpus: 1,
            disks: Vec::new(),
            nics: Vec::new(),
            address: None,
            seed: None,
            machine: None,
            cpu: None,
            accel: None,
        }
    }
}

/// The TOML text with which `godwit vm run` starts this guest. Its second serial port is the agent's control channel.
///
/// # Errors
/// If a path is not UTF-8, or the guest needs a disk and has none.
pub fn vm_spec(files: &GuestFiles, spec: &VmSpec) -> Result<String> {
    check_disk(files, !spec.disks.is_empty())?;
    let mut top = toml_table(&[
        ("name", Some(quote(&spec.name))),
        ("memory", Some(quote(&format!("{}M", spec.memory_mib)))),
        ("vcpus", Some(spec.vcpus.to_string())),
        ("machine", spec.machine.as_deref().map(quote)),
        ("cpu", spec.cpu.as_deref().map(quote)),
        ("accel", spec.accel.map(|accel| quote(accel.name()))),
        ("kernel", Some(quote(utf8(&files.kernel)?))),
        ("initrd", files.initrd.as_deref().map(utf8).transpose()?.map(quote)),
        ("cmdline", Some(quote(&cmdline(files.kind, spec.address, spec.seed)))),
        ("serial1", Some("true".to_owned())),
    ]);
    for disk in &spec.disks {
        top += "\n[[disk]]\n";
        top += &toml_table(&[
            ("path", Some(quote(utf8(&disk.path)?))),
            ("format", Some(quote(disk.form.format()))),
            ("shared", disk.shared.then(|| "true".to_owned())),
        ]);
    }
    for nic in &spec.nics {
        top += "\n[[nic]]\n";
        top += &toml_table(&[
            ("wire", Some(quote(&nic.wire))),
            ("mac", nic.mac.as_deref().map(quote)),
        ]);
    }
    Ok(top)
}

/// What a guest's kernel is told.
pub fn cmdline(kind: GuestKind, address: Option<GuestAddress>, seed: Option<u64>) -> String {
    let mut words = match kind {
        GuestKind::Busybox => "console=ttyS0 quiet panic=-1 net.ifnames=0".to_owned(),
        GuestKind::Debian => {
            // A getty on the console hangs up the services that write to it.
            "console=ttyS0 quiet panic=-1 net.ifnames=0 root=/dev/vda rw \
             systemd.mask=serial-getty@ttyS0.service"
                .to_owned()
        }
        GuestKind::Bare => "godwit".to_owned(),
    };
    if let Some(GuestAddress { ip, prefix, mtu }) = address {
        words += &format!(" godwit.ip={ip}/{prefix}");
        if let Some(mtu) = mtu {
            words += &format!(" godwit.mtu={mtu}");
        }
    }
    if let Some(seed) = seed {
        words += &format!(" godwit.seed={seed}");
    }
    words
}

/// What executes a guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The CPU's virtualisation.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

impl Accel {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }

    /// A CPU model that works with it on this machine and its like.
    pub fn default_cpu(self) -> &'static str {
        match self {
            Accel::Kvm => "host,-arch-capabilities",
            Accel::Tcg => "max",
        }
    }
}

/// A NIC of a guest under QEMU alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuNic {
    /// Name of an existing tap device.
    pub tap: String,
    /// MAC address as `52:54:00:xx:xx:xx`.
    pub mac: String,
}

/// A guest to be run by QEMU alone.
#[derive(Clone, Debug)]
pub struct QemuSpec {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Accelerator.
    pub accel: Accel,
    /// Machine type, versioned for migration, or `q35`.
    pub machine: String,
    /// CPU model.
    pub cpu: String,
    /// Directory for the sockets `qmp.sock` and `serial1.sock` and the console's log `console.log`.
    pub dir: PathBuf,
    /// The VM's own writable disk (raw).
    pub disk: Option<PathBuf>,
    /// NICs in order.
    pub nics: Vec<QemuNic>,
    /// Address of the first NIC.
    pub address: Option<GuestAddress>,
    /// Seed of the workload's pages.
    pub seed: Option<u64>,
    /// Wait for an incoming migration (`-incoming defer`), and run when it has arrived.
    pub incoming: bool,
}

impl QemuSpec {
    /// A guest of one CPU without disk or NIC under `accel`.
    pub fn new(dir: impl Into<PathBuf>, memory_mib: u32, accel: Accel) -> Self {
        QemuSpec {
            memory_mib,
            vcpus: 1,
            accel,
            machine: "q35".to_owned(),
            cpu: accel.default_cpu().to_owned(),
            dir: dir.into(),
            disk: None,
            nics: Vec::new(),
            address: None,
            seed: None,
            incoming: false,
        }
    }

    /// The socket of QMP.
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// The socket of the second serial port, for [`super::GuestControl`].
    pub fn serial1(&self) -> PathBuf {
        self.dir.join("serial1.sock")
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }
}

/// The command that runs a guest by QEMU alone. Guest memory is one shared memfd.
///
/// # Errors
/// If a path is not UTF-8, or the guest needs a disk and has none.
pub fn qemu_command(files: &GuestFiles, spec: &QemuSpec) -> Result<Command> {
    check_disk(files, spec.disk.is_some())?;
    let mut command = Command::new("qemu-system-x86_64");
    let memory = spec.memory_mib;
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .arg("-machine")
        .arg(format!(
            "{},accel={},memory-backend=pc.ram,usb=off,vmport=off,smbus=off",
            spec.machine,
            spec.accel.name()
        ))
        .args(["-cpu", &spec.cpu, "-smp", &spec.vcpus.to_string()])
        .args(["-m", &format!("{memory}M"), "-object"])
        .arg(format!("memory-backend-memfd,id=pc.ram,size={memory}M,share=on"))
        .arg("-kernel")
        .arg(&files.kernel)
        .args(["-append", &cmdline(files.kind, spec.address, spec.seed)])
        .args(["-serial", &format!("file:{}", utf8(&spec.console())?)])
        .args(["-serial", &format!("unix:{},server=on,wait=off", utf8(&spec.serial1())?)])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", utf8(&spec.qmp())?)]);
    if let Some(initrd) = &files.initrd {
        command.arg("-initrd").arg(initrd);
    }
    if let Some(disk) = &spec.disk {
        let mut drive = OsString::from(
            "driver=raw,node-name=disk0,file.driver=file,file.locking=on,file.filename=",
        );
        drive.push(utf8(disk)?.replace(',', ",,"));
        command.arg("-blockdev").arg(drive);
        command.args(["-device", "virtio-blk-pci,drive=disk0,id=blk0"]);
    }
    for (at, nic) in spec.nics.iter().enumerate() {
        command
            .arg("-netdev")
            .arg(format!("tap,id=net{at},ifname={},script=no,downscript=no", nic.tap));
        command
            .arg("-device")
            .arg(format!("virtio-net-pci,netdev=net{at},id=nic{at},romfile=,mac={}", nic.mac));
    }
    if spec.incoming {
        command.args(["-incoming", "defer"]);
    }
    Ok(command)
}

fn check_disk(files: &GuestFiles, has_one: bool) -> Result<()> {
    ensure!(
        files.base_image.is_none() || has_one,
        "This guest starts from a disk; make one with make_disk"
    );
    Ok(())
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// A TOML basic string.
fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            control if control.is_control() => {
                quoted += &format!("\\u{:04X}", u32::from(control));
            }
            plain => quoted.push(plain),
        }
    }
    quoted.push('"');
    quoted
}

fn toml_table(entries: &[(&str, Option<String>)]) -> String {
    entries
        .iter()
        .filter_map(|(key, value)| Some(format!("{key} = {}\n", value.as_ref()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::disk::DiskForm;

    fn files(kind: GuestKind) -> GuestFiles {
        GuestFiles {
            kind,
            kernel: "/k/vmlinuz".into(),
            initrd: Some("/k/initrd".into()),
            base_image: (kind == GuestKind::Debian).then(|| "/k/root.img".into()),
        }
    }

    #[test]
    fn the_spec_is_what_vm_run_reads() {
        let mut spec = VmSpec::new("web", 512);
        spec.disks.push(SpecDisk::shared("/v/vm.img"));
        spec.disks.push(SpecDisk::own("/v/data.qcow2", DiskForm::Qcow2));
        spec.nics.push(SpecNic { wire: "lan".into(), mac: Some("52:54:00:00:00:01".into()) });
        spec.address =
            Some(GuestAddress { ip: Ipv4Addr::new(10, 9, 0, 5), prefix: 24, mtu: Some(1400) });
        let expected = r#"name = "web"
memory = "512M"
vcpus = 1
kernel = "/k/vmlinuz"
initrd = "/k/initrd"
cmdline = "console=ttyS0 quiet panic=-1 net.ifnames=0 root=/dev/vda rw systemd.mask=serial-getty@ttyS0.service godwit.ip=10.9.0.5/24 godwit.mtu=1400"
serial1 = true

[[disk]]
path = "/v/vm.img"
format = "raw"
shared = true

[[disk]]
path = "/v/data.qcow2"
format = "qcow2"

[[nic]]
wire = "lan"
mac = "52:54:00:00:00:01"
"#;
        assert_eq!(vm_spec(&files(GuestKind::Debian), &spec).unwrap(), expected);
    }

    #[test]
    fn the_node_reads_the_spec() {
        let mut spec = VmSpec::new("bare-1", 64);
        spec.machine = Some("pc-q35-10.0".into());
        spec.cpu = Some(Accel::Kvm.default_cpu().into());
        spec.accel = Some(Accel::Kvm);
        spec.nics.push(SpecNic { wire: "lan".into(), mac: None });
        spec.seed = Some(7);
        let text = vm_spec(&files(GuestKind::Busybox), &spec).unwrap();
        let read: godwit::vmm::VmSpec = text.parse().unwrap();
        assert!(read.serial1);
        assert_eq!(read.accel, godwit::vmm::AccelChoice::Kvm);
        assert_eq!(read.nic.len(), 1);
        assert!(read.cmdline.ends_with("godwit.seed=7"), "{}", read.cmdline);
        spec.disks.push(SpecDisk::shared("/v/vm.img"));
        spec.disks.push(SpecDisk::own("/v/own.img", DiskForm::Raw));
        let text = vm_spec(&files(GuestKind::Debian), &spec).unwrap();
        let read: godwit::vmm::VmSpec = text.parse().unwrap();
        assert!(read.disk[0].shared && !read.disk[1].shared);
    }

    #[test]
    fn a_debian_guest_without_a_disk_is_refused() {
        let files = files(GuestKind::Debian);
        assert!(vm_spec(&files, &VmSpec::new("web", 512)).is_err());
        assert!(qemu_command(&files, &QemuSpec::new("/tmp", 512, Accel::Tcg)).is_err());
    }

    #[test]
    fn strings_are_quoted() {
        assert_eq!(quote("a\"b\\c\n"), r#""a\"b\\c\u000A""#);
    }
}
