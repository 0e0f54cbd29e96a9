//! Which host a guest's frames left from, and when: a packet socket per host, on the taps alone.
//!
//! Owns the sockets and a thread for each. Never talks to a node. Invariant: what is counted came out of a guest (the
//! kernel received it from a tap); what goes into a guest is not.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

use super::Host;

/// Every guest of the lab has an address that begins with these.
const PREFIX: [u8; 5] = [0x52, 0x54, 0x00, 0x09, 0x00];
/// Taps are called so.
const TAP: &[u8] = b"gwt-";
/// Receive buffer, bytes.
const BUFFER: libc::c_int = 8 << 20;

/// One frame that left a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// When the kernel got it from the tap, microseconds since 1970.
    pub at_us: u64,
    /// On which host.
    pub host: String,
}

#[derive(Default)]
struct Shared {
    /// By the last byte of the guest's address.
    frames: Mutex<BTreeMap<u8, Vec<Left>>>,
    stop: AtomicBool,
}

impl Shared {
    fn frames(&self) -> MutexGuard<'_, BTreeMap<u8, Vec<Left>>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches the taps of some hosts. Dropping it ends the watching.
pub struct FrameWatch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl FrameWatch {
    /// Begins to watch all present and future taps of these hosts. Needs root.
    pub fn start(hosts: &[Host]) -> Result<Self> {
        let mut watch = Self { shared: Arc::default(), threads: Vec::new() };
        for host in hosts {
            let socket = host.ns.run(open)?.with_context(|| format!("taps of {}", host.name))?;
            let (shared, name) = (Arc::clone(&watch.shared), host.name.clone());
            let thread = std::thread::Builder::new().name(format!("taps-{name}"));
            watch.threads.push(thread.spawn(move || collect(&socket, &name, &shared))?);
        }
        Ok(watch)
    }

    /// The frames of the guest with this number that left in this time (microseconds since 1970), in their order.
    #[must_use]
    pub fn of(&self, guest: u8, from_us: u64, to_us: u64) -> Vec<Left> {
        let frames = self.shared.frames();
        let all = frames.get(&guest).map(Vec::as_slice).unwrap_or_default();
        let mut found: Vec<Left> =
            all.iter().filter(|f| (from_us..=to_us).contains(&f.at_us)).cloned().collect();
        found.sort_by_key(|frame| frame.at_us);
        found
    }
}

impl Drop for FrameWatch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The hosts in the order in which frames left them, neighbours joined.
#[must_use]
pub fn order(frames: &[Left]) -> Vec<String> {
    let mut hosts: Vec<String> = frames.iter().map(|frame| frame.host.clone()).collect();
    hosts.dedup();
    hosts
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A packet socket of the calling thread's namespace that takes the guests' frames alone.
fn open() -> io::Result<OwnedFd> {
    let [a, b, c, d, e] = PREFIX.map(u32::from);
    let step = |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let (load, equal) = (libc::BPF_LD | libc::BPF_ABS, libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    let mut filter = [
        step(load | libc::BPF_W, 0, 6),
        step(equal, 3, (a << 24) | (b << 16) | (c << 8) | d),
        step(load | libc::BPF_B, 0, 10),
        step(equal, 1, e),
        step(libc::BPF_RET | libc::BPF_K, 0, 64),
        step(libc::BPF_RET | libc::BPF_K, 0, 0),
    ];
    let program =
        libc::sock_fprog { len: filter.len() as libc::c_ushort, filter: filter.as_mut_ptr() };
    let time = libc::timeval { tv_sec: 0, tv_usec: 100_000 };
    // SAFETY: plain system calls; every pointer is to a living value of the size that is passed.
    unsafe {
        // Protocol 0: nothing is received before the filter is there.
        let fd = check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0))?;
        let socket = OwnedFd::from_raw_fd(fd);
        option(fd, libc::SO_ATTACH_FILTER, &program)?;
        option(fd, libc::SO_TIMESTAMPNS, &(1 as libc::c_int))?;
        option(fd, libc::SO_RCVBUFFORCE, &BUFFER)?;
        option(fd, libc::SO_RCVTIMEO, &time)?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        let size = size_of_val(&address) as libc::socklen_t;
        check(libc::bind(fd, (&raw const address).cast(), size))?;
        Ok(socket)
    }
}

/// # Safety
/// `value` is of the type that the option takes.
unsafe fn option<T>(fd: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointer and the size are of one living value.
    check(unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, name, std::ptr::from_ref(value).cast(), size)
    })
    .map(drop)
}

fn collect(socket: &OwnedFd, host: &str, shared: &Shared) {
    let mut taps: BTreeMap<libc::c_int, bool> = BTreeMap::new();
    while !shared.stop.load(Ordering::SeqCst) {
        // A timeout lets the thread see that it should end.
        let Ok((frame, device, outgoing, at_us)) = receive(socket) else { continue };
        let tap = *taps.entry(device).or_insert_with(|| is_tap(socket, device));
        if tap && !outgoing {
            let left = Left { at_us, host: host.to_owned() };
            shared.frames().entry(frame[11]).or_default().push(left);
        }
    }
}

/// The first bytes of a frame, its device, whether the kernel sends it, and the kernel's time of it.
fn receive(socket: &OwnedFd) -> io::Result<([u8; 12], libc::c_int, bool, u64)> {
    let mut frame = [0_u8; 12];
    let mut control = [0_u64; 8];
    // SAFETY: msghdr is plain data; all pointers in it outlive the call; the control buffer is aligned for cmsghdr.
    unsafe {
        let mut from: libc::sockaddr_ll = std::mem::zeroed();
        let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of_val(&from) as _;
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let length = libc::recvmsg(socket.as_raw_fd(), &mut message, 0);
        if length < frame.len() as isize {
            return Err(io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&message);
        if header.is_null() || (*header).cmsg_type != libc::SCM_TIMESTAMPNS {
            return Err(io::Error::other("no time"));
        }
        let time = libc::CMSG_DATA(header).cast::<libc::timespec>().read_unaligned();
        let at_us = time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000;
        let outgoing = from.sll_pkttype == libc::PACKET_OUTGOING;
        Ok((frame, from.sll_ifindex, outgoing, at_us))
    }
}

fn is_tap(socket: &OwnedFd, device: libc::c_int) -> bool {
    // SAFETY: ifreq is plain data; the kernel writes its name within it.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_ifru.ifru_ifindex = device;
        let done = libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFNAME as _, &mut request);
        done == 0 && TAP.iter().zip(request.ifr_name).all(|(a, b)| *a == b as u8)
    }
}
