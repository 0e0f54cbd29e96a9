//! Who has this address? Numbered questions of ARP and of neighbour discovery, as frames of a station, and their answers.
//!
//! Owns a packet socket and a thread. Never asks the station's kernel, which would repeat a question and keep an answer.
//! Invariant: each question has a sender's address of its own, to which it is answered, so that an answer tells its number.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::prober::count;
use super::prober::{Counter, ProbeReport, Station};

/// Between two questions of a kind.
const PERIOD: Duration = Duration::from_millis(40);
/// Receive buffer, bytes: what was held is answered at once.
const BUFFER: libc::c_int = 16 << 20;
/// How long one look for a frame may take, microseconds.
const LOOK_US: libc::suseconds_t = 5_000;
const ARP: [u8; 2] = [0x08, 0x06];
const RARP: [u8; 2] = [0x80, 0x35];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// Ethernet and IP over ARP, and its two operations.
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ASKS: [u8; 2] = [0, 1];
const ANSWERS: [u8; 2] = [0, 2];
const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Who asks: the number follows.
const FROM: [u8; 2] = [10, 200];

/// Whom to ask for, and as whom.
#[derive(Clone, Copy)]
struct Asked {
    own: [u8; 6],
    mac: [u8; 6],
    ip: Ipv4Addr,
}

/// What was answered.
#[derive(Clone, Debug, Serialize)]
pub struct Answered {
    /// To ARP.
    pub arp: ProbeReport,
    /// To neighbour discovery.
    pub discovery: ProbeReport,
    /// Announcements of the guest (RARP).
    pub announced: u64,
}

#[derive(Default)]
struct Seen {
    sent: u64,
    arp: Counter,
    discovery: Counter,
    announced: u64,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    silent: AtomicBool,
    stop: AtomicBool,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks over and over. Dropping it ends that.
pub struct Asker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Asker {
    /// Begins to ask from a station for the guest of this number and address.
    pub fn start(station: &Station, guest: u8, ip: Ipv4Addr) -> Result<Self> {
        let (socket, own) = station.ns().run(open)?.context("a packet socket of a station")?;
        let asked = Asked { own, mac: [0x52, 0x54, 0, 9, 0, guest], ip };
        let shared = Arc::<Shared>::default();
        let sharing = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("asker".to_owned());
        let thread = Some(thread.spawn(move || ask(&socket, asked, &sharing))?);
        Ok(Self { shared, thread })
    }

    /// Waits until so many questions of each kind have been answered.
    pub fn wait(&self, answers: u64, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let (arp, discovery) = {
                let seen = self.shared.seen();
                (seen.arp.unique(), seen.discovery.unique())
            };
            if arp.min(discovery) >= answers {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{arp} answers of ARP, {discovery} of discovery");
            std::thread::sleep(PERIOD);
        }
    }

    /// How often the guest has been announced so far.
    #[must_use]
    pub fn announced(&self) -> u64 {
        self.shared.seen().announced
    }

    /// Asks no more, takes what still comes in this time, and tells.
    #[must_use]
    pub fn stop(self, drain: Duration) -> Answered {
        self.shared.silent.store(true, Ordering::SeqCst);
        // All answered does not end it: a second answer may follow.
        std::thread::sleep(drain);
        let seen = self.shared.seen();
        let report = |counter: &Counter| counter.report(seen.sent, 0);
        Answered {
            arp: report(&seen.arp),
            discovery: report(&seen.discovery),
            announced: seen.announced,
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ask(socket: &OwnedFd, asked: Asked, shared: &Shared) {
    let began = Instant::now();
    let (mut due, mut number) = (began, 0_u16);
    let mut frame = [0; 2048];
    while !shared.stop.load(Ordering::SeqCst) {
        if !shared.silent.load(Ordering::SeqCst) && Instant::now() >= due && number < u16::MAX {
            due += PERIOD;
            let both = [asked.arp(number), asked.solicitation(number)];
            if both.iter().all(|frame| send(socket, frame)) {
                number += 1;
                shared.seen().sent = number.into();
            }
        }
        if let Some(frame) = receive(socket, &mut frame) {
            let now = began.elapsed().as_nanos() as u64;
            asked.take(frame, now, &mut shared.seen());
        }
    }
}

impl Asked {
    fn arp(&self, number: u16) -> Vec<u8> {
        let number = number.to_be_bytes();
        let head = [&[0xff; 6][..], &self.own, &ARP, &ARP_HEAD, &ASKS].concat();
        [&head[..], &self.own, &FROM, &number, &[0; 6], &self.ip.octets()].concat()
    }

    fn solicitation(&self, number: u16) -> Vec<u8> {
        let target = link_local(self.mac).octets();
        let [.., a, b, c] = target;
        let [n, m] = number.to_be_bytes();
        let from = Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, n, m]).octets();
        let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c];
        let mut said =
            [&[SOLICITATION, 0, 0, 0, 0, 0, 0, 0][..], &target, &[1, 1], &self.own].concat();
        let length = said.len() as u8;
        let sum =
            checksum(&[&from[..], &group, &[0, 0, 0, length, 0, 0, 0, ICMPV6], &said].concat());
        said[2..4].copy_from_slice(&sum.to_be_bytes());
        let to = [0x33, 0x33, 0xff, a, b, c];
        let head = [&to[..], &self.own, &IPV6, &[0x60, 0, 0, 0, 0, length, ICMPV6, 255]].concat();
        [&head[..], &from, &group, &said].concat()
    }

    fn take(&self, frame: &[u8], now_ns: u64, seen: &mut Seen) {
        let Some((head, body)) = frame.split_at_checked(14) else { return };
        if head[6..12] != self.mac {
            return;
        }
        let number = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
        let count = |counter: &mut Counter, number: Option<u16>| {
            let mut numbered = [0; count::HEADER];
            count::encode(&mut numbered, number.unwrap_or_default().into(), now_ns);
            counter.receive(&numbered, now_ns);
        };
        if head[12..] == RARP {
            seen.announced += 1;
        } else if head[12..] == ARP
            && body.get(6..8) == Some(&ANSWERS)
            && body.get(24..26) == Some(&FROM)
        {
            count(&mut seen.arp, number(26));
        } else if head[12..] == IPV6
            && body.get(40) == Some(&ADVERTISEMENT)
            && body.get(32) == Some(&2)
        {
            count(&mut seen.discovery, number(38));
        }
    }
}

/// The address that an interface gives itself (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A packet socket on the station's interface, and the address of that.
fn open() -> io::Result<(OwnedFd, [u8; 6])> {
    let check = |rc: libc::c_int| if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) };
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: plain system calls; every pointer is to a living value of the size that is passed.
    unsafe {
        let fd = check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0))?;
        let socket = OwnedFd::from_raw_fd(fd);
        let time = libc::timeval { tv_sec: 0, tv_usec: LOOK_US };
        let size = size_of_val(&time) as libc::socklen_t;
        let option = (&raw const time).cast();
        check(libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, option, size))?;
        let (bytes, size) = (BUFFER, size_of::<libc::c_int>() as libc::socklen_t);
        let option = (&raw const bytes).cast();
        check(libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, option, size))?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = libc::if_nametoindex(c"eth0".as_ptr()) as libc::c_int;
        let mut size = size_of_val(&address) as libc::socklen_t;
        check(libc::bind(fd, (&raw const address).cast(), size))?;
        check(libc::getsockname(fd, (&raw mut address).cast(), &raw mut size))?;
        let [a, b, c, d, e, f, ..] = address.sll_addr;
        Ok((socket, [a, b, c, d, e, f]))
    }
}

fn send(socket: &OwnedFd, frame: &[u8]) -> bool {
    // SAFETY: the pointer and length are of one living slice; the fd is open.
    unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) >= 0 }
}

fn receive<'a>(socket: &OwnedFd, room: &'a mut [u8]) -> Option<&'a [u8]> {
    // SAFETY: the pointer and length are of one living slice; the fd is open.
    let length = unsafe { libc::recv(socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
    room.get(..usize::try_from(length).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked = Asked {
        own: [2, 0, 0, 0, 0, 1],
        mac: [0x52, 0x54, 0, 9, 0, 5],
        ip: Ipv4Addr::new(10, 9, 0, 5),
    };

    #[test]
    fn a_solicitation_is_whole_and_for_the_guest() {
        assert_eq!(link_local(ASKED.mac).to_string(), "fe80::5054:ff:fe09:5");
        let frame = ASKED.solicitation(0x0102);
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 9, 0, 5]);
        let (addresses, said) = (&frame[22..54], &frame[54..]);
        let whole = [addresses, &[0, 0, 0, said.len() as u8, 0, 0, 0, ICMPV6], said].concat();
        assert_eq!(checksum(&whole), 0);
        assert_eq!(ASKED.arp(1).len(), 42);
    }

    #[test]
    fn an_answer_tells_the_number_of_its_question() {
        let mut seen = Seen::default();
        let head = |kind: [u8; 2]| [&ASKED.own[..], &ASKED.mac, &kind].concat();
        let asker = [10, 200, 0, 7];
        let arp =
            [&ARP_HEAD[..], &ANSWERS, &ASKED.mac, &[10, 9, 0, 5], &ASKED.own, &asker].concat();
        let mut discovery = [&[0x60, 0, 0, 0, 0, 32, ICMPV6, 255][..], &[0; 32]].concat();
        (discovery[32], discovery[39]) = (2, 7);
        discovery.push(ADVERTISEMENT);
        for (kind, body) in [(ARP, arp), (IPV6, discovery), (RARP, vec![0; 28])] {
            ASKED.take(&[head(kind), body].concat(), 1, &mut seen);
        }
        let rows = |counter: &Counter| counter.report(8, 0).missing;
        assert_eq!((rows(&seen.arp), rows(&seen.discovery)), (vec![(0, 6)], vec![(0, 6)]));
        assert_eq!((seen.arp.unique(), seen.discovery.unique(), seen.announced), (1, 1, 1));
    }
}
