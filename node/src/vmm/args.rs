//! QEMU's command line for one copy of a VM.
//!
//! Owns what the guest's machine is made of. A pure function of the resolved spec, the descriptors and the mode, so both
//! ends of a move build the same machine. No guest ever runs by starting QEMU: every start is `-S`.

use std::os::fd::RawFd;
use std::path::Path;

use godwit_protocol::id::VmId;
use serde_json::{Value, json};

use super::resolved::{ResolvedNic, ResolvedSpec};
use super::spec::{Accel, DiskFormat, DiskSpec};

/// The id of the memory block, in QEMU's stream too.
pub const RAM_BLOCK: &str = "pc.ram";

/// Descriptors that QEMU inherits.
#[derive(Debug, Clone)]
pub(super) struct Inherited {
    pub memory: RawFd,
    pub qmp: RawFd,
    pub taps: Vec<RawFd>,
}

/// The arguments behind QEMU's path. Socket paths are relative: QEMU runs in the copy's directory.
pub(super) fn build(spec: &ResolvedSpec, fds: &Inherited, incoming: bool) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
    add("-name", format!("guest={},debug-threads=on", spec.name));
    add("-uuid", uuid(spec.id));
    add("-machine", machine(spec));
    add("-cpu", format!("{},enforce", spec.cpu));
    add("-smp", format!("{0},sockets=1,cores={0},threads=1", spec.vcpus));
    add("-m", format!("{}M", spec.memory >> 20));
    add(
        "-object",
        format!(
            "memory-backend-file,id={RAM_BLOCK},share=on,size={},mem-path=/proc/self/fd/{}",
            spec.memory, fds.memory
        ),
    );
    add("-display", "none".into());
    add("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fds.qmp));
    add("-mon", "chardev=qmp,mode=control".into());
    serial_ports(spec, &mut add);
    for (index, disk) in spec.disks.iter().enumerate() {
        disk_args(index, disk, &mut add);
    }
    for ((index, nic), fd) in spec.nics.iter().enumerate().zip(&fds.taps) {
        nic_args(index, nic, *fd, &mut add);
    }
    for device in &spec.hostdevs {
        add("-device", json!({ "driver": "vfio-pci", "host": device.address }).to_string());
    }
    boot(spec, &mut add);
    if incoming {
        add("-incoming", "defer".into());
    }
    args.extend(["-nodefaults", "-no-user-config", "-S"].map(String::from));
    args
}

/// The id as QEMU and the guest's DMI table show it.
fn uuid(id: VmId) -> String {
    let hex = id.to_string();
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    parts.join("-")
}

fn machine(spec: &ResolvedSpec) -> String {
    // No emulated USB, mouse port or SMBus: every device less is state less to move.
    let base = format!("{},memory-backend={RAM_BLOCK},usb=off,vmport=off,smbus=off", spec.machine);
    match spec.accel {
        Accel::Kvm => format!("{base},accel=kvm"),
        Accel::Tcg => format!("{base},accel=tcg"),
    }
}

fn serial_ports(spec: &ResolvedSpec, add: &mut impl FnMut(&str, String)) {
    let socket = "server=on,wait=off";
    add(
        "-chardev",
        format!("socket,id=serial0,path=console.sock,{socket},logfile=console.log,logappend=on"),
    );
    add("-device", "isa-serial,id=com0,chardev=serial0,index=0".into());
    if spec.serial1 {
        add("-chardev", format!("socket,id=serial1,path=serial1.sock,{socket}"));
        add("-device", "isa-serial,id=com1,chardev=serial1,index=1".into());
    }
}

fn disk_args(index: usize, disk: &DiskSpec, add: &mut impl FnMut(&str, String)) {
    // Image locks are demanded, not taken if convenient: they are what keeps two QEMUs from one image. The page cache is
    // dropped by QEMU when a moved image is activated (its default).
    let file = json!({
        "driver": "file",
        "node-name": format!("disk{index}-file"),
        "filename": disk.path.to_str().unwrap_or_default(),
        "locking": "on",
        "read-only": disk.readonly,
    });
    let driver = match disk.format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    };
    let image = json!({
        "driver": driver,
        "node-name": format!("disk{index}"),
        "file": format!("disk{index}-file"),
        "read-only": disk.readonly,
    });
    add("-blockdev", file.to_string());
    add("-blockdev", image.to_string());
    let device = json!({
        "driver": "virtio-blk-pci",
        "id": format!("blk{index}"),
        "drive": format!("disk{index}"),
        // A kernel given with `-kernel` boots from index 0.
        "bootindex": index + 1,
    });
    add("-device", device.to_string());
}

fn nic_args(index: usize, nic: &ResolvedNic, fd: RawFd, add: &mut impl FnMut(&str, String)) {
    // vhost stays off: QEMU must be the one that reads the tap, for the cutover to know what it has read.
    add("-netdev", format!("tap,id=net{index},fd={fd},vhost=off"));
    let device: Value = json!({
        "driver": "virtio-net-pci",
        "id": format!("nic{index}"),
        "netdev": format!("net{index}"),
        "mac": nic.mac.colons(),
        "host_mtu": nic.mtu,
        // No option ROM: nothing boots from the network, and a ROM is one more block to move.
        "romfile": "",
    });
    add("-device", device.to_string());
}

fn boot(spec: &ResolvedSpec, add: &mut impl FnMut(&str, String)) {
    let text = |path: &Path| path.to_str().unwrap_or_default().to_owned();
    if let Some(kernel) = &spec.kernel {
        add("-kernel", text(&kernel.path));
        add("-append", spec.cmdline.clone());
    }
    if let Some(initrd) = &spec.initrd {
        add("-initrd", text(&initrd.path));
    }
}
