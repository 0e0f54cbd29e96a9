//! Clients outside the swarm keep their connections while a guest moves from site to site behind the wire's gateway.
//!
//! Owns the run and the outside: a network that h1 and h2 have an interface in, and a client there whose way to the wire is
//! by h1, for good. Invariant: by which host packets leave is told by the kernel's counters, not by a node.

mod trouble;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::{DRAIN, RATE, SOON};
use crate::guest::wire::TCP_ECHO_PORT;
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::ns::{NetNs, ip};
use crate::lab::prober::{ECHO_PORT, ProbeConfig, ProbeReport, Prober};
use crate::scenario::roundtrip::moves::{Moving, Wish};
use crate::scenario::swarm::{Guest, GuestPlan, Swarm, WIRE, run};
use godwit_protocol::wire::migrate::Phase;

/// The interface that leads outside.
const OUT: &str = "out0";
/// The client outside, and what h1 and h2 are called there.
const CLIENT: &str = "198.51.100.1";
const WAYS_IN: [(&str, &str); 2] = [("h1", "198.51.100.11"), ("h2", "198.51.100.12")];
/// The guests' subnet and its gateway.
const SUBNET: &str = "10.9.0.0/24";
const GATEWAY: &str = "10.9.0.254";
/// Bytes of a block of the download, and the pause behind each.
const BLOCK: usize = 16 << 10;
const PAUSE: Duration = Duration::from_millis(30);
/// Bytes that have to come after each move.
const MORE: u64 = 1 << 20;
/// Packets of an answer to the download that have to leave by a host, for it to be the guest's way out.
const PACKETS: u64 = 200;

struct World {
    swarm: Swarm,
    guest: Guest,
    client: NetNs,
    download: Download,
}

/// The part of `godwit-lab run wires` with an outside.
pub fn uplink(labid: &str) -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let swarm = Swarm::up(&LabConfig::demo(labid), |_| {})?;
    let client = outside(&swarm)?;
    connected(&swarm)?;
    let guest = swarm.start_guest("h1", &files, &GuestPlan::new("web", 5, 192))?;
    shell(&swarm, "h1", &guest, &format!("/bin/busybox ip route add default via {GATEWAY}"))?;
    let target = SocketAddr::from((guest.plan.ip(), ECHO_PORT));
    let prober = Prober::start(Some(&client), &ProbeConfig { target, rate_pps: RATE, size: 64 })?;
    ensure!(prober.wait_unique(50, SOON), "the client outside does not reach the guest");
    let download = Download::start(&client, SocketAddr::from((guest.plan.ip(), TCP_ECHO_PORT)))?;
    let mut world = World { swarm, guest, client, download };
    world.flows("before it moves", "h1")?;
    // h2 has an uplink of its own, which no packet comes in by. h3 has none: the gateway of its site is used.
    for (to, out_by) in [("h2", "h2"), ("h3", "h1"), ("h1", "h1")] {
        world.moves(to, out_by)?;
    }
    let probes = prober.stop(DRAIN);
    let ProbeReport { sent, lost, reordered, duplicated, .. } = probes;
    ensure!((lost, reordered, duplicated) == (0, 0, 0), "{probes:?}");
    world.moves("h2", "h2")?;
    world.swarm.node_mut("h2")?.restart(SOON)?;
    world.flows("after a restart", "h2")?;
    let World { mut swarm, guest, client, download } = world;
    let bytes = download.end()?;
    another_way_out(&swarm, &guest)?;
    trouble::interfaces(&swarm, &guest, &client)?;
    trouble::two_words(&swarm)?;
    trouble::gone_for_good(&mut swarm)?;
    client.delete()?;
    swarm.down()?;
    Ok(json!({ "moves": 4, "probes_sent": sent, "probes_lost": lost, "download_bytes": bytes }))
}

/// A network outside, in which the client and the hosts are.
fn outside(swarm: &Swarm) -> Result<NetNs> {
    let ns = swarm.lab.extra_ns("out")?;
    ns.batch(&[
        "link add br0 type bridge".to_owned(),
        format!("addr add {CLIENT}/24 dev br0"),
        "link set br0 up".to_owned(),
    ])?;
    for (host, address) in WAYS_IN {
        way_in(swarm, &ns, host, address)?;
    }
    ns.batch(&[format!("route add {SUBNET} via {}", WAYS_IN[0].1)])?;
    Ok(ns)
}

/// The interface that a host has there.
fn way_in(swarm: &Swarm, ns: &NetNs, host: &str, address: &str) -> Result<()> {
    let inside = &swarm.lab.host(host)?.ns;
    ns.batch(&[
        format!("link add {host} master br0 type veth peer name {OUT} netns {}", inside.name()),
        format!("link set {host} up"),
    ])?;
    inside.batch(&[format!("addr add {address}/24 dev {OUT}"), format!("link set {OUT} up")])
}

/// Both hosts that have an interface outside join the wire to it; what cannot work is refused.
fn connected(swarm: &Swarm) -> Result<()> {
    let ask = |host: &str, more: &[&str]| {
        let args = [&["wire", "connect", WIRE, "--uplink"], more].concat();
        swarm.node(host)?.cli(&args, SOON)
    };
    let refused = |host: &str, more: &[&str], why: &str| -> Result<()> {
        let said = ask(host, more)?;
        ensure!(!said.ok() && said.stderr.contains(why), "not refused for {why:?}: {said:?}");
        Ok(())
    };
    let given = format!("{GATEWAY}/24");
    refused("h1", &[OUT], "no gateway yet")?;
    refused("h1", &["nowhere0", "--gateway", &given], "no interface nowhere0")?;
    refused("h1", &[OUT, "--gateway", &given], "does not forward")?;
    for (host, _) in WAYS_IN {
        swarm.lab.host(host)?.ns.sysctl(&format!("ipv4/conf/{OUT}/forwarding"), "1")?;
    }
    refused("h1", &[OUT, "--gateway", "198.51.100.254/24"], "subnet of its own")?;
    let first = ask("h1", &[OUT, "--gateway", &given])?;
    ensure!(first.ok(), "{first:?}");
    swarm.wait("the gateway is known", SOON, |swarm| {
        let wires = swarm.ask("h2", &["wire", "list"])?;
        let known = |w: &Value| w["wire"] == WIRE && w["gateway"] == *given;
        Ok(wires.as_array().is_some_and(|all| all.iter().any(known)))
    })?;
    refused("h2", &[OUT, "--gateway", "10.9.0.253/24"], "on h1")?;
    let second = ask("h2", &[OUT])?;
    ensure!(second.ok(), "{second:?}");
    Ok(())
}

/// Without an uplink on its host the guest finds the other site's.
fn another_way_out(swarm: &Swarm, guest: &Guest) -> Result<()> {
    let gone = swarm.node("h2")?.cli(&["wire", "disconnect", WIRE, "--uplink"], SOON)?;
    ensure!(gone.ok(), "{gone:?}");
    let devices = ip(&["-n", swarm.lab.host("h2")?.ns.name(), "-br", "addr"])?;
    ensure!(!devices.contains(GATEWAY), "the gateway is still there: {devices}");
    swarm.wait("the guest gets out by the other site", SOON, |swarm| {
        let ping = format!("/bin/busybox ping -c 1 -W 2 {GATEWAY} >/dev/null && echo out");
        Ok(shell(swarm, "h2", guest, &ping).is_ok_and(|said| said.contains("out")))
    })
}

fn shell(swarm: &Swarm, host: &str, guest: &Guest, line: &str) -> Result<String> {
    run(async { swarm.control(host, guest)?.shell(line).await })
}

impl World {
    /// It moves, and leaves by that host's uplink.
    fn moves(&mut self, to: &str, out_by: &str) -> Result<()> {
        let m = Moving::start(&self.swarm, &Wish::new("h3", "web", to))?.end()?;
        ensure!(m.status.phase == Phase::Moved, "{:?}: {}", m.status.phase, m.status.cause);
        self.flows(&format!("on {to}"), out_by)
    }

    /// The download goes on, and what the guest sends leaves by that host.
    fn flows(&self, when: &str, out_by: &str) -> Result<()> {
        let (had, before) = (self.download.bytes(), self.left(out_by)?);
        let end = Instant::now() + SOON;
        while self.download.bytes() < had + MORE {
            ensure!(!self.download.is_over(), "{when}: the client's connection broke");
            ensure!(Instant::now() < end, "{when}: the download stands still");
            sleep(Duration::from_millis(50));
        }
        let left = self.left(out_by)? - before;
        ensure!(left > PACKETS, "{when}: {left} packets left by {out_by} during a megabyte");
        Ok(())
    }

    /// Packets that left the swarm by a host.
    fn left(&self, host: &str) -> Result<u64> {
        let text = ip(&["-n", self.client.name(), "-j", "-s", "link", "show", host])?;
        let devices: Value = serde_json::from_str(&text).context("what ip says")?;
        devices[0]["stats64"]["rx"]["packets"].as_u64().context("no counter")
    }
}

/// A long download over one connection, checked byte by byte. It never connects again.
struct Download {
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    writer: JoinHandle<Result<()>>,
    reader: JoinHandle<Result<()>>,
}

/// What is at that place of the stream.
fn at(place: u64) -> u8 {
    (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

impl Download {
    fn start(ns: &NetNs, target: SocketAddr) -> Result<Self> {
        let mut up = ns.run(|| TcpStream::connect_timeout(&target, SOON))?.context("TCP")?;
        up.set_write_timeout(Some(SOON))?;
        up.set_read_timeout(Some(SOON))?;
        let mut down = up.try_clone()?;
        let (stop, bytes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopping, count) = (Arc::clone(&stop), Arc::clone(&bytes));
        let writer = std::thread::spawn(move || {
            let mut place = 0;
            while !stopping.load(Ordering::SeqCst) {
                let block: Vec<u8> = (place..place + BLOCK as u64).map(at).collect();
                up.write_all(&block).context("the connection broke")?;
                place += BLOCK as u64;
                // Its rate.
                sleep(PAUSE);
            }
            Ok(up.shutdown(std::net::Shutdown::Write)?)
        });
        let reader = std::thread::spawn(move || {
            let (mut place, mut block) = (0, vec![0; BLOCK]);
            while let length @ 1.. = down.read(&mut block).context("the connection broke")? {
                let right =
                    block[..length].iter().zip(place..).all(|(byte, place)| *byte == at(place));
                ensure!(right, "wrong bytes after {place}");
                place += length as u64;
                count.store(place, Ordering::SeqCst);
            }
            Ok(())
        });
        Ok(Self { stop, bytes, writer, reader })
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.writer.is_finished() || self.reader.is_finished()
    }

    /// Everything that was sent came back.
    fn end(self) -> Result<u64> {
        self.stop.store(true, Ordering::SeqCst);
        for thread in [self.writer, self.reader] {
            thread.join().map_err(|_| anyhow!("a thread of the download panicked"))??;
        }
        Ok(self.bytes.load(Ordering::SeqCst))
    }
}
