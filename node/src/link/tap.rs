//! Opens tap devices. Owns the ioctls; never configures a device beyond making it. Invariant: devices
//! are not persistent, so a tap lives exactly as long as somebody (QEMU, or this node) holds its fd.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// `TUNSETIFF`: `_IOW('T', 202, int)`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// What reads and writes the fd.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// QEMU: frames carry a virtio-net header, so that checksums and large segments stay unfinished
    /// between guests of a host. QEMU asks the fd (`TUNGETIFF`) and negotiates offloads itself.
    Qemu,
    /// This node: bare frames. Without `TUNSETOFFLOAD` the kernel segments and checksums before the
    /// frame gets here, so nothing longer than the MTU arrives.
    Node,
}

/// Creates the tap `name` in the calling thread's network namespace and returns its fd, close-on-exec and
/// non-blocking. `EBUSY`: somebody holds it already.
pub(super) fn create(name: &str, reader: Reader) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let fd = open("/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    let mut bits = libc::IFF_TAP | libc::IFF_NO_PI;
    if reader == Reader::Qemu {
        bits |= libc::IFF_VNET_HDR;
    }
    request.ifr_ifru.ifru_flags = bits as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call; the fd is open.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &mut request) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}
