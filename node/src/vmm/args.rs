//! QEMU's command line for one copy of a VM.
//!
//! Owns what the guest's machine is made of. A pure function of the resolved spec, the descriptors and the mode, so both
//! ends of a move build the same machine. No guest ever runs by starting QEMU: every start is `-S`.

use std::os::fd::RawFd;
use std::path::Path;

use godwit_protocol::id::VmId;
use serde_json::{Value, json};

use super::disk::{NVRAM, ResolvedDisk};
use super::resolved::{FileRef, ResolvedNic, ResolvedSpec};
use super::spec::{Accel, DiskFormat};

/// The id of the memory block, in QEMU's stream too.
pub const RAM_BLOCK: &str = "pc.ram";

/// The block node of the firmware's code.
const FIRMWARE: &str = "firmware";

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
    if let Some(code) = &spec.firmware {
        firmware(code, &mut add);
    }
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
    let mut base =
        format!("{},memory-backend={RAM_BLOCK},usb=off,vmport=off,smbus=off", spec.machine);
    if spec.firmware.is_some() {
        base += &format!(",pflash0={FIRMWARE},pflash1={NVRAM}");
    }
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

/// The id of the device that shows a disk to the guest.
pub(super) fn device(disk: &str) -> String {
    format!("{disk}-dev")
}

fn disk_args(index: usize, disk: &ResolvedDisk, add: &mut impl FnMut(&str, String)) {
    // Named explicitly, the lowest first: what a qcow2 says about its backing file counts at neither end.
    let mut below = Value::Null;
    for (depth, layer) in disk.backing.iter().enumerate().rev() {
        let name = format!("{}-backing{}", disk.id, depth + 1);
        let file = file_node(&name, &layer.path);
        let image = image_node(&name, layer.format, Some(&below));
        for mut node in [local(file), image] {
            node["read-only"] = true.into();
            add("-blockdev", node.to_string());
        }
        below = name.into();
    }
    let mut file = file_node(&disk.id, &disk.path);
    if !disk.readonly {
        // Demanded, not taken if convenient: locks are what keeps two QEMUs from one image.
        file["locking"] = "on".into();
    }
    if disk.moves() {
        file = local(file);
    }
    // A shared image's chain is QEMU's to find, as it is the same on every host.
    let image = image_node(&disk.id, disk.format, disk.moves().then_some(&below));
    for mut node in [file, image] {
        node["read-only"] = disk.readonly.into();
        node["discard"] = if disk.discard { "unmap" } else { "ignore" }.into();
        node["detect-zeroes"] = "off".into();
        add("-blockdev", node.to_string());
    }
    if disk.id == NVRAM {
        return;
    }
    let device = json!({
        "driver": "virtio-blk-pci",
        "id": device(&disk.id),
        "drive": disk.id,
        // A kernel given with `-kernel` boots from index 0.
        "bootindex": index + 1,
    });
    add("-device", device.to_string());
}

fn file_node(name: &str, path: &Path) -> Value {
    json!({
        "driver": "file",
        "node-name": format!("{name}-file"),
        "filename": path.to_str().unwrap_or_default(),
    })
}

/// A file that no other host writes. Otherwise QEMU forgets in `cont`, so within the pause, what the page cache has of a
/// file: a shared one may have been written elsewhere since it was opened.
fn local(mut file: Value) -> Value {
    file["drop-cache"] = false.into();
    file
}

fn image_node(name: &str, format: DiskFormat, below: Option<&Value>) -> Value {
    let file = format!("{name}-file");
    let mut node = json!({ "driver": format.name(), "node-name": name, "file": file });
    if let (DiskFormat::Qcow2, Some(below)) = (format, below) {
        node["backing"] = below.clone();
    }
    node
}

/// The firmware's own flash; its variables are a disk.
fn firmware(firmware: &FileRef, add: &mut impl FnMut(&str, String)) {
    let image = image_node(FIRMWARE, DiskFormat::Raw, None);
    for mut node in [local(file_node(FIRMWARE, &firmware.path)), image] {
        node["read-only"] = true.into();
        add("-blockdev", node.to_string());
    }
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
