//! On a LAN that is declared trusted frames of a wire that was created travel by VXLAN; those of another, or of one that was
//! created as encrypted, do not.
//!
//! Either way, and from one to the other, every unicast, broadcast and multicast reaches a guest that moves once and in its
//! order; so do the questions of ARP and neighbour discovery. Where it is now is announced.
//!
//! Owns the run. Invariant: how frames travelled is told by the kernel's counters of the host that sends, not by a node.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_protocol::wire::migrate::Phase;
use serde_json::{Value, json};

use super::{DRAIN, RATE, SOON};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::asker::Asker;
use crate::lab::ns::ip;
use crate::lab::prober::{ECHO_PORT, ProbeConfig, ProbeReport, Prober, Station};
use crate::scenario::roundtrip::moves::{Moving, Wish};
use crate::scenario::swarm::{Guest, GuestPlan, Swarm, WIRE, trusting};

/// The encrypted wire.
const VAULT: &str = "vault";
/// Answers that show that somebody is reached.
const ANSWERS: u64 = 100;
/// Questions that are answered before anything moves.
const EARLY: u64 = 5;
/// The broadcast address of the guests' subnet and the group of all hosts, with datagrams per second.
const GROUPS: [(Ipv4Addr, u32); 2] =
    [(Ipv4Addr::new(10, 9, 0, 255), 100), (Ipv4Addr::new(224, 0, 0, 1), 50)];
/// Where the guest goes: from a site to the other, back to another host of the first one, and home.
const TOUR: [&str; 3] = ["h2", "h4", "h1"];
/// How far behind a guest may be at the end that got many datagrams at once.
const LAG: Duration = Duration::from_secs(15);
/// Frames of others that may be among the counted: neighbour discovery of the bridges themselves.
const OTHERS: u64 = 20;

struct World {
    swarm: Swarm,
    guest: Guest,
}

/// The part of `godwit-lab run wires` with a trusted LAN.
pub fn sealed(labid: &str) -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let mut config = LabConfig::demo(labid);
    config.sites[0].hosts.push("h4".to_owned());
    let swarm = Swarm::up(&config, trusting)?;
    swarm.ask("h3", &["wire", "create", VAULT, "--encrypt"])?;
    let guest = swarm.start_guest("h1", &files, &GuestPlan::new("web", 5, 192))?;
    let mut world = World { swarm, guest };
    let station = world.swarm.station("h3", 1)?;
    led(&station)?;
    let unheard = world.talk("a wire that nobody created", &station, false)?;
    world.swarm.ask("h1", &["wire", "create", WIRE])?;
    world.listed(WIRE, false)?;
    let open = world.talk("lan", &station, true)?;
    drop(station);
    world.swarm.ask("h1", &["wire", "disconnect", "web", WIRE])?;
    world.swarm.ask("h1", &["wire", "connect", "web", VAULT])?;
    let vault = world.swarm.station_on("h3", VAULT, 2)?;
    led(&vault)?;
    let shut = world.talk(VAULT, &vault, false)?;
    world.listed(VAULT, true)?;
    let back = world.swarm.node("h3")?.cli(&["wire", "create", VAULT], SOON)?;
    ensure!(!back.ok() && back.stderr.contains("encrypted"), "{back:?}");
    world.swarm.node_mut("h3")?.restart(SOON)?;
    let again = world.talk("vault, after a restart", &vault, false)?;
    drop(vault);
    world.swarm.down()?;
    Ok(json!({
        "not_created": unheard,
        "open": open,
        "encrypted": shut,
        "encrypted_after_restart": again,
    }))
}

/// Its multicasts go to the wire.
fn led(station: &Station) -> Result<()> {
    station.ns().batch(&["route add 224.0.0.0/4 dev eth0".to_owned()])
}

impl World {
    /// Somebody on h3 talks to the guest, which goes from host to host: nothing is lost, doubled or out of order, and VXLAN
    /// carried it or did not.
    fn talk(&mut self, what: &str, station: &Station, by_vxlan: bool) -> Result<Value> {
        let ip = self.guest.plan.ip();
        let probe = |(ip, rate_pps): (Ipv4Addr, u32)| {
            let target = SocketAddr::from((ip, ECHO_PORT));
            Prober::start(Some(station.ns()), &ProbeConfig { target, rate_pps, size: 64 })
        };
        // Whose way is not there yet, after a start, is not counted.
        let early = probe((ip, RATE))?;
        ensure!(early.wait_unique(ANSWERS, SOON), "{what}: the guest is not reached");
        drop(early);
        let early = Asker::start(station, self.guest.plan.number, ip)?;
        early.wait(EARLY, SOON).context("before anything moved")?;
        drop(early);
        let (frames, held) = (self.vxlan_frames()?, self.held()?);
        let probers =
            [(ip, RATE)].into_iter().chain(GROUPS).map(probe).collect::<Result<Vec<_>>>()?;
        let asker = Asker::start(station, self.guest.plan.number, ip)?;
        for to in TOUR {
            let announced = asker.announced();
            let m = Moving::start(&self.swarm, &Wish::new("h3", "web", to))?.end()?;
            ensure!(m.status.phase == Phase::Moved, "{what}: {}", m.status.cause);
            self.swarm.wait("it is announced", SOON, |_| Ok(asker.announced() > announced))?;
        }
        for prober in &probers {
            let back = prober.snapshot().unique + ANSWERS;
            ensure!(prober.wait_unique(back, SOON), "{what}: the guest is not reached any more");
        }
        let mut seen: Vec<_> = probers.into_iter().map(|prober| prober.stop(LAG)).collect();
        let answered = asker.stop(DRAIN);
        seen.extend([answered.arp, answered.discovery]);
        let (frames, held) = (self.vxlan_frames()? - frames, self.held()? - held);
        let report = json!({
            "held": held, "by_vxlan": frames, "announced": answered.announced, "seen": seen,
        });
        println!("{what}: {report}");
        let fits = if by_vxlan { frames >= ANSWERS } else { frames <= OTHERS };
        ensure!(fits, "{what}: {frames} frames left by VXLAN");
        let right = |r: &ProbeReport| (r.lost, r.reordered, r.duplicated) == (0, 0, 0);
        ensure!(held > 0 && seen.iter().all(right), "{what}: {report}");
        let sent: u64 = seen.iter().map(|r| r.sent).sum();
        Ok(json!({ "sent": sent, "held": held, "by_vxlan": frames, "lost": 0, "duplicated": 0 }))
    }

    /// Frames that were held so far, by the hosts' own count.
    fn held(&self) -> Result<u64> {
        let all = self.swarm.ask("h3", &["migrations"])?;
        Ok(all.as_array().into_iter().flatten().filter_map(|m| m["frames_held"].as_u64()).sum())
    }

    /// Frames that left h3 by VXLAN.
    fn vxlan_frames(&self) -> Result<u64> {
        let ns = self.swarm.lab.host("h3")?.ns.name();
        let text = ip(&["-n", ns, "-j", "-s", "link", "show", "type", "vxlan"])?;
        let devices: Value = serde_json::from_str(&text).context("what ip says")?;
        let sent = |d: &Value| d["stats64"]["tx"]["packets"].as_u64();
        Ok(devices.as_array().into_iter().flatten().filter_map(sent).sum())
    }

    /// Every host knows of the wire, and who is on it.
    fn listed(&self, wire: &str, encrypted: bool) -> Result<()> {
        for host in ["h1", "h2", "h3"] {
            self.swarm.wait("the wire is known", SOON, |swarm| {
                let all = swarm.ask(host, &["wire", "list"])?;
                let found = all.as_array().and_then(|all| all.iter().find(|w| w["wire"] == wire));
                let on = |w: &Value| w["nics"].as_array().is_some_and(|n| n.len() == 2);
                Ok(found.is_some_and(|w| w["encrypted"] == encrypted && on(w)))
            })?;
        }
        Ok(())
    }
}
