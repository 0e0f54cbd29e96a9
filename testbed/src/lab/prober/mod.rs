//! The prober: numbered UDP datagrams from outside the guests, echoed by a guest, counted here.
//!
//! Owns its sockets, threads and, when attached to a wire, a namespace with one veth into the wire's bridge. Never
//! trusts the guest: only what came back through its own socket counts. Invariant: what its own socket dropped is
//! counted apart ([`ProbeReport::socket_dropped`]), so a loss is never the prober's without being shown.

pub mod count;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

pub use count::{Counter, ProbeReport};

use super::ns::NetNs;
use super::{Host, Lab};

/// UDP port of the guests' echo.
pub const ECHO_PORT: u16 = 7007;
/// Receive buffer asked for, in bytes.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Largest datagram, in bytes of UDP payload.
const SIZE_MAX: usize = 1472;

/// What to send.
#[derive(Clone, Debug)]
pub struct ProbeConfig {
    /// Where the echo is; a group or a broadcast address is answered by whoever hears it.
    pub target: SocketAddr,
    /// Datagrams per second, 1 to 100,000.
    pub rate_pps: u32,
    /// Bytes of UDP payload, 20 to 1472.
    pub size: usize,
}

struct Shared {
    stop_sending: AtomicBool,
    stop_receiving: AtomicBool,
    sent: AtomicU64,
    send_failed: AtomicU64,
    socket_dropped: AtomicU32,
    start_ns: AtomicU64,
    counter: Mutex<Counter>,
    clock: Instant,
}

impl Shared {
    fn counter(&self) -> MutexGuard<'_, Counter> {
        self.counter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    fn report(&self) -> ProbeReport {
        let sent = self.sent.load(Ordering::SeqCst);
        ProbeReport {
            send_failed: self.send_failed.load(Ordering::SeqCst),
            socket_dropped: u64::from(self.socket_dropped.load(Ordering::SeqCst)),
            ..self.counter().report(sent, self.start_ns.load(Ordering::SeqCst))
        }
    }
}

/// A running prober. Dropping it stops it.
pub struct Prober {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Prober {
    /// Starts sending from a socket in `ns` (none: this process's own namespace).
    pub fn start(ns: Option<&NetNs>, config: &ProbeConfig) -> Result<Self> {
        if !(count::HEADER..=SIZE_MAX).contains(&config.size)
            || !(1..=100_000).contains(&config.rate_pps)
        {
            bail!(
                "a prober sends {} to {SIZE_MAX} bytes, 1 to 100000 times a second",
                count::HEADER
            );
        }
        let socket = match ns {
            Some(ns) => ns.run(|| socket(config.target))??,
            None => socket(config.target)?,
        };
        let shared = Arc::new(Shared {
            stop_sending: AtomicBool::new(false),
            stop_receiving: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            send_failed: AtomicU64::new(0),
            socket_dropped: AtomicU32::new(0),
            start_ns: AtomicU64::new(0),
            counter: Mutex::new(Counter::default()),
            clock: Instant::now(),
        });
        let receiving = (shared.clone(), socket.try_clone()?);
        let sending = (shared.clone(), config.clone());
        let threads = vec![
            thread::Builder::new()
                .name("probe-recv".to_owned())
                .spawn(move || receive(&receiving.0, &receiving.1))?,
            thread::Builder::new()
                .name("probe-send".to_owned())
                .spawn(move || send(&sending.0, &socket, &sending.1))?,
        ];
        Ok(Self { shared, threads })
    }

    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    /// The counts so far; datagrams under way count as lost.
    pub fn snapshot(&self) -> ProbeReport {
        self.shared.report()
    }

    /// Waits until `count` different datagrams have come back; false at the deadline.
    pub fn wait_unique(&self, count: u64, deadline: Duration) -> bool {
        let end = Instant::now() + deadline;
        while self.shared.counter().unique() < count {
            if Instant::now() > end {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Stops sending, waits for what is under way until nothing has come back for `drain`, and reports.
    pub fn stop(mut self, drain: Duration) -> ProbeReport {
        self.shared.stop_sending.store(true, Ordering::SeqCst);
        if let Some(sender) = self.threads.pop() {
            let _ = sender.join();
        }
        let sent = self.shared.sent.load(Ordering::SeqCst);
        let (mut back, mut end) = (self.shared.counter().unique(), Instant::now() + drain);
        while back < sent && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
            let now = self.shared.counter().unique();
            if now > back {
                (back, end) = (now, Instant::now() + drain);
            }
        }
        self.end();
        self.shared.report()
    }

    fn end(&mut self) {
        self.shared.stop_sending.store(true, Ordering::SeqCst);
        self.shared.stop_receiving.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.end();
    }
}

fn socket(target: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr =
        if target.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    receive_buffer(&socket)?;
    // The kernel tells with each datagram how many it had to drop before it.
    set_option(&socket, libc::SO_RXQ_OVFL, 1).context("SO_RXQ_OVFL")?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    if is_group(target) {
        // Answers come from somebody's own address.
        socket.set_broadcast(true)?;
    } else {
        socket.connect(target).with_context(|| format!("no route to {target}"))?;
    }
    Ok(socket)
}

/// Gives a socket room for what comes while nobody reads.
pub fn receive_buffer(socket: &UdpSocket) -> Result<()> {
    let bytes = RECEIVE_BUFFER as libc::c_int;
    // Beyond the administrator's limit only with CAP_NET_ADMIN; without it the limit is what there is.
    if set_option(socket, libc::SO_RCVBUFFORCE, bytes).is_err() {
        set_option(socket, libc::SO_RCVBUF, bytes).context("SO_RCVBUF")?;
    }
    Ok(())
}

/// Subnets of the lab's wires are 24 bits long.
fn is_group(target: SocketAddr) -> bool {
    let broadcast = matches!(target.ip(), IpAddr::V4(ip) if ip.octets()[3] == 255);
    broadcast || target.ip().is_multicast()
}

fn set_option(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) -> std::io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option value is one int that outlives the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            len,
        )
    };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// How long the first datagram is alone on the way, nanoseconds.
const ALONE_NS: u64 = 1_000_000_000;

/// Sends at fixed times from the start, so that lateness does not add up; after a long stall it does not catch up with
/// more than 10 ms worth at once. The first one is alone until it is back: what waits in the kernel for a neighbour's address
/// leaves as a burst, which a datagram that another processor sends overtakes.
fn send(shared: &Shared, socket: &UdpSocket, config: &ProbeConfig) {
    let mut datagram = vec![0; config.size];
    let period = 1_000_000_000 / u64::from(config.rate_pps);
    let mut due = shared.now();
    shared.start_ns.store(due, Ordering::SeqCst);
    let alone = due + ALONE_NS;
    let mut sequence = 0;
    while !shared.stop_sending.load(Ordering::Relaxed) {
        let now = shared.now();
        if sequence == 1 && now < alone && shared.counter().unique() == 0 {
            due = now + 1_000_000;
        }
        if now < due {
            thread::sleep(Duration::from_nanos((due - now).min(50_000_000)));
            continue;
        }
        due = (due + period).max(now.saturating_sub(10_000_000));
        count::encode(&mut datagram, sequence, shared.now());
        let done = match is_group(config.target) {
            true => socket.send_to(&datagram, config.target),
            false => socket.send(&datagram),
        };
        match done {
            Ok(_) => {
                sequence += 1;
                shared.sent.store(sequence, Ordering::SeqCst);
            }
            // For example an ICMP error of an earlier datagram, or a full queue: this one was not sent.
            Err(_) => drop(shared.send_failed.fetch_add(1, Ordering::SeqCst)),
        }
    }
}

fn receive(shared: &Shared, socket: &UdpSocket) {
    let mut datagram = [0u8; 2048];
    while !shared.stop_receiving.load(Ordering::Relaxed) {
        match receive_one(socket, &mut datagram) {
            Ok((len, dropped)) => {
                let now = shared.now();
                if let Some(dropped) = dropped {
                    shared.socket_dropped.store(dropped, Ordering::SeqCst);
                }
                shared.counter().receive(&datagram[..len], now);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            // A pending ICMP error (port unreachable while the guest boots) is not a datagram.
            Err(_) => {}
        }
    }
}

/// One datagram and, when the kernel says so, the number of datagrams dropped at this socket since it was made.
fn receive_one(socket: &UdpSocket, datagram: &mut [u8]) -> std::io::Result<(usize, Option<u32>)> {
    let mut part = libc::iovec { iov_base: datagram.as_mut_ptr().cast(), iov_len: datagram.len() };
    let mut control = [0u64; 8];
    // SAFETY: msghdr is plain data; all pointers in it outlive the call; the control buffer is aligned for cmsghdr.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let len = libc::recvmsg(socket.as_raw_fd(), &mut message, 0);
        if len < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&message);
        let ours = !header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SO_RXQ_OVFL;
        let dropped = ours.then(|| libc::CMSG_DATA(header).cast::<u32>().read_unaligned());
        Ok((len as usize, dropped))
    }
}

/// A station on a wire: a namespace of its own with one veth into the wire's bridge. Removed with the lab or on drop.
pub struct Station {
    ns: NetNs,
}

impl Station {
    /// Attaches to `bridge` in the host: own MAC (`02:..` if the caller wants it locally administered), own address
    /// in the wire's subnet, MTU in bytes. `number` is the station's own in this lab, 0 to 9999.
    pub fn attach(
        lab: &Lab,
        host: &Host,
        bridge: &str,
        number: u16,
        link: &StationLink,
    ) -> Result<Self> {
        let ns = lab.extra_ns(&format!("probe{number}"))?;
        let station = Self { ns };
        let port = format!("probe{number}");
        let StationLink { mac, addr, prefix_len, mtu } = link;
        station.ns.batch(&[
            format!("link add eth0 address {mac} mtu {mtu} type veth peer name {port} mtu {mtu} netns {}", host.ns.name()),
            format!("addr add {addr}/{prefix_len} dev eth0"),
        ])?;
        host.ns.batch(&[format!("link set {port} master {bridge} up")])?;
        station.ns.batch(&["link set eth0 up".to_owned()])?;
        Ok(station)
    }

    /// Its namespace, for [`Prober::start`] or any other command.
    pub fn ns(&self) -> &NetNs {
        &self.ns
    }
}

/// How a [`Station`] appears on its wire.
#[derive(Clone, Debug)]
pub struct StationLink {
    /// MAC address, `02:00:00:00:00:01`.
    pub mac: String,
    /// IPv4 address.
    pub addr: Ipv4Addr,
    /// Length of the subnet's prefix, in bits.
    pub prefix_len: u8,
    /// MTU, in bytes.
    pub mtu: u16,
}

impl Drop for Station {
    fn drop(&mut self) {
        // Deleting one end deletes both; the name goes with the lab in any case.
        let _ = self.ns.batch(&["link del eth0".to_owned()]);
        let _ = self.ns.delete();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Datagrams of the control run.
    const SENT: u64 = 400;

    /// An echo with known faults, for numbers below [`SENT`]: every 10th dropped, every 25th (+1) sent twice, every 50th
    /// (+3) held back until its successor has gone.
    fn bad_echo(socket: &UdpSocket) {
        let mut datagram = [0; 2048];
        let mut held: Option<(Vec<u8>, SocketAddr)> = None;
        while let Ok((len, from)) = socket.recv_from(&mut datagram) {
            let bytes = &datagram[..len];
            let (sequence, _) = count::decode(bytes).unwrap();
            if sequence >= SENT || sequence % 10 == 0 {
                continue;
            }
            if sequence % 50 == 3 {
                held = Some((bytes.to_vec(), from));
                continue;
            }
            for _ in 0..if sequence % 25 == 1 { 2 } else { 1 } {
                socket.send_to(bytes, from).unwrap();
            }
            if let Some((late, to)) = held.take() {
                socket.send_to(&late, to).unwrap();
            }
        }
    }

    /// The socket of an echo, which ends some seconds after the last datagram.
    fn echo() -> UdpSocket {
        let echo = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        receive_buffer(&echo).unwrap();
        echo.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        echo
    }

    #[test]
    fn a_known_dropper_is_counted_exactly() {
        let echo = echo();
        let target = echo.local_addr().unwrap();
        let dropper = thread::spawn(move || bad_echo(&echo));
        let config = ProbeConfig { target, rate_pps: 1000, size: 100 };
        let prober = Prober::start(None, &config).unwrap();
        // 40 of 400 are dropped.
        assert!(prober.wait_unique(360, Duration::from_secs(60)), "{:?}", prober.snapshot());
        let report = prober.stop(Duration::from_millis(50));
        assert!(report.sent >= SENT);
        assert_eq!(report.unique, 360);
        assert_eq!(report.lost, report.sent - 360);
        // 1, 26, 51, ...: 16 of them, none a multiple of 10; 3, 53, ..: 8.
        assert_eq!((report.duplicated, report.reordered), (16, 8));
        assert_eq!(report.received, 376);
        assert_eq!((report.foreign, report.socket_dropped), (0, 0));
        dropper.join().unwrap();
    }

    #[test]
    fn an_outage_shows_as_the_longest_gap() {
        let echo = echo();
        let target = echo.local_addr().unwrap();
        let server = thread::spawn(move || {
            let mut datagram = [0; 2048];
            while let Ok((len, from)) = echo.recv_from(&mut datagram) {
                let (sequence, _) = count::decode(&datagram[..len]).unwrap();
                // 500 a second: silence for 300 ms.
                if !(100..250).contains(&sequence) {
                    echo.send_to(&datagram[..len], from).unwrap();
                }
            }
        });
        let began = Instant::now();
        let prober = Prober::start(None, &ProbeConfig { target, rate_pps: 500, size: 20 }).unwrap();
        assert!(prober.wait_unique(200, Duration::from_secs(60)));
        let report = prober.stop(Duration::from_millis(50));
        let all_ms = began.elapsed().as_secs_f64() * 1e3;
        // A machine that is busy makes it longer.
        assert!((290.0..all_ms - 150.0).contains(&report.longest_gap_ms), "{report:?}");
        assert!((150.0..all_ms - 290.0).contains(&report.longest_gap_at_ms), "{report:?}");
        server.join().unwrap();
    }
}
