//! TUN devices: the two ends of an emulated link, as the kernel sees them.
//!
//! Owns the descriptor. Never sets an offload flag, so the kernel segments and checksums before a packet comes out
//! here. Invariant: each read is one IP packet of at most the MTU.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

use crate::lab::ns::NetNs;

/// MTU of every emulated link, in bytes of IP packet.
pub const MTU: usize = 1500;

/// Packets that the kernel may hold for us between two reads: 200 ms of full-size packets at 1 Gbit/s.
const KERNEL_QUEUE: usize = 20_000;

/// One TUN device in a namespace. It disappears with the descriptor.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Makes the device `name` (at most 15 bytes) in `ns`, up, with [`MTU`].
    pub fn create(ns: &NetNs, name: &str) -> Result<Self> {
        let file = ns
            .run(|| open(name))?
            .with_context(|| format!("making TUN device {name} in {}", ns.name()))?;
        ns.batch(&[format!("link set {name} mtu {MTU} txqueuelen {KERNEL_QUEUE} up")])?;
        Ok(Self { file })
    }

    /// Reads one packet; `WouldBlock` when there is none.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Gives one packet to the kernel on this side.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open(name: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data, all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
