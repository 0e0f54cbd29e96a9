//! Two hosts in network namespaces of their own, joined by a veth, and what a guest does with its tap.
//!
//! A test runs on one thread and walks between the namespaces: netlink and packet sockets stay with the
//! namespace in which they were opened, only making taps looks at the thread's.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use godwit::link::{Config, Links, Outgoing, TunnelFrame};
use godwit_protocol::id::{Mac, Name};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::{LinkUnspec, LinkVeth};
use tokio::sync::mpsc::Receiver;

pub const MTU: u16 = 1400;
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
pub const BROADCAST: Mac = Mac([0xff; 6]);
/// How long anything that has to happen may take.
pub const SOON: Duration = Duration::from_secs(20);
const VNET: usize = 10;
/// Held while a child lives: until its exec it has every descriptor of this process.
static CHILD: Mutex<()> = Mutex::new(());

pub struct Host {
    space: File,
    pub ip: IpAddr,
    /// Its IPv6 address, for an underlay of that kind.
    pub ip6: IpAddr,
}

pub struct World {
    pub a: Host,
    pub b: Host,
}

/// Runs the test on a runtime of this thread, or says why not.
pub fn run<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        println!("skipped: needs root and /dev/net/tun to make network namespaces and taps");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let world = World::new().await;
        tokio::time::timeout(9 * SOON, test(world)).await.expect("in time");
    });
}

/// Ends a daemon or a guest, with all its descriptors: children of other tests have none of them any more.
pub async fn end<T>(what: T) {
    drop(what);
    tokio::task::yield_now().await;
    drop(CHILD.lock().unwrap_or_else(PoisonError::into_inner));
}

fn new_space() -> File {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    File::open("/proc/thread-self/ns/net").unwrap()
}

impl World {
    async fn new() -> Self {
        let (a, b) = (Host::new(1), Host::new(2));
        a.enter();
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        let task = tokio::spawn(connection);
        handle.link().add(LinkVeth::new("left", "right").build()).execute().await.unwrap();
        let right = LinkUnspec::new_with_name("right").setns_by_fd(b.space.as_raw_fd());
        handle.link().set(right.build()).execute().await.unwrap();
        task.abort();
        a.address("left").await;
        b.address("right").await;
        Self { a, b }
    }
}

impl Host {
    fn new(n: u8) -> Self {
        let ip6 = format!("fd77::{n}").parse().unwrap();
        Self { space: new_space(), ip: [10, 77, 0, n].into(), ip6 }
    }

    pub fn enter(&self) {
        setns(&self.space, CloneFlags::CLONE_NEWNET).unwrap();
    }

    async fn address(&self, device: &str) {
        self.enter();
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        let task = tokio::spawn(connection);
        let found = handle.link().get().match_name(device).execute().try_next().await.unwrap();
        let index = found.unwrap().header.index;
        handle.address().add(index, self.ip, 24).execute().await.unwrap();
        let mut add = handle.address().add(index, self.ip6, 64);
        let now = AddressAttribute::Flags(AddressFlags::Nodad);
        add.message_mut().attributes.push(now);
        add.execute().await.unwrap();
        let up = |name| LinkUnspec::new_with_name(name).up().build();
        handle.link().set(up(device)).execute().await.unwrap();
        handle.link().set(up("lo")).execute().await.unwrap();
        task.abort();
    }

    /// The adapter of this host, which trusts the LAN or not.
    pub fn links(&self, trusted: bool) -> (Links, Receiver<Outgoing>) {
        self.links_at(self.ip, if trusted { "10.77.0.0/24" } else { "192.0.2.0/24" })
    }

    pub fn links_at(&self, underlay: IpAddr, lan: &str) -> (Links, Receiver<Outgoing>) {
        self.enter();
        let trusted_lan = vec![lan.parse().unwrap()];
        Links::start(Config { underlay, trusted_lan, mtu: MTU }).unwrap()
    }

    /// What a tool prints in this namespace.
    pub fn shell(&self, command: &[&str]) -> String {
        self.enter();
        let _alone = CHILD.lock().unwrap_or_else(PoisonError::into_inner);
        let out = std::process::Command::new(command[0]).args(&command[1..]).output().unwrap();
        assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Our devices in this namespace.
    pub fn devices(&self) -> Vec<String> {
        let all = self.shell(&["ip", "-br", "link"]);
        let names = all.lines().filter_map(|l| l.split([' ', '@']).next());
        names.filter(|n| n.starts_with("gw")).map(str::to_owned).collect()
    }
}

/// A guest at its tap.
pub struct Guest {
    pub mac: Mac,
    pub fd: OwnedFd,
}

pub fn wire(name: &str) -> Name {
    name.parse().unwrap()
}

pub fn mac(last: u8) -> Mac {
    Mac([0x52, 0x54, 0, 0, 0, last])
}

pub fn frame(to: Mac, from: Mac, text: &str) -> Vec<u8> {
    [&to.0[..], &from.0, &ETHERTYPE, text.as_bytes()].concat()
}

/// The text of a frame that a guest sent, `None` for any other frame.
pub fn text(frame: &[u8]) -> Option<String> {
    let body = frame.get(14..).filter(|_| frame[12..14] == ETHERTYPE)?;
    Some(String::from_utf8_lossy(body).into_owned())
}

impl Guest {
    pub async fn boot(host: &Host, links: &Links, wire: &Name, mac: Mac) -> Self {
        host.enter();
        Self { mac, fd: links.open_tap(wire, &mac, &[]).await.unwrap() }
    }

    pub fn send(&self, to: Mac, text: &str) {
        self.send_raw(&[0; VNET], &frame(to, self.mac, text));
    }

    pub fn send_raw(&self, header: &[u8; VNET], frame: &[u8]) {
        let bytes = [&header[..], frame].concat();
        assert_eq!(nix::unistd::write(&self.fd, &bytes), Ok(bytes.len()));
    }

    /// The next frame of any kind within the time.
    pub fn receive(&self, wait: Duration) -> Option<Vec<u8>> {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        let wait = PollTimeout::try_from(wait).unwrap();
        if poll(&mut fds, wait).unwrap() == 0 {
            return None;
        }
        let mut bytes = vec![0; 70_000];
        let length = nix::unistd::read(&self.fd, &mut bytes).unwrap();
        Some(bytes[VNET..length].to_vec())
    }

    /// The text of the next frame from a guest.
    pub fn hear(&self) -> Option<String> {
        let end = Instant::now() + SOON;
        while let Some(frame) = self.receive(end.saturating_duration_since(Instant::now())) {
            if let Some(text) = text(&frame) {
                return Some(text);
            }
        }
        None
    }

    /// Nothing at all comes: neither from a guest nor from the host's own stack.
    pub fn silence(&self) {
        if let Some(frame) = self.receive(Duration::from_millis(150)) {
            panic!("{} bytes where none were expected: {frame:02x?}", frame.len());
        }
    }
}

/// The next frame that leaves by the tunnel.
pub async fn outgoing(queue: &mut Receiver<Outgoing>) -> Option<TunnelFrame> {
    let out = tokio::time::timeout(SOON, queue.recv()).await.ok().flatten()?;
    if let Outgoing::Frame(frame) = out { Some(frame) } else { None }
}

/// Nothing leaves by the tunnel.
pub async fn nothing_leaves(queue: &mut Receiver<Outgoing>) {
    if let Ok(Some(out)) = tokio::time::timeout(Duration::from_millis(150), queue.recv()).await {
        panic!("left by the tunnel: {out:02x?}");
    }
}
