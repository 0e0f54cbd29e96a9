//! On a LAN that is declared trusted frames of a wire that was created travel by VXLAN; those of another, or of one that was
//! created as encrypted, do not.
//!
//! Owns the run. Invariant: how frames travelled is told by the kernel's counters of the host that sends, not by a node.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use godwit_protocol::wire::migrate::Phase;
use serde_json::{Value, json};

use super::{DRAIN, RATE, SOON};
use crate::guest::{Cache, GuestFiles, GuestKind};
use crate::lab::LabConfig;
use crate::lab::ns::ip;
use crate::lab::prober::{ECHO_PORT, ProbeConfig, ProbeReport, Prober, Station};
use crate::scenario::roundtrip::moves::{Moving, Wish};
use crate::scenario::swarm::{Guest, GuestPlan, Swarm, WIRE, trusting};

/// The encrypted wire.
const VAULT: &str = "vault";
/// Answers that show that somebody is reached.
const ANSWERS: u64 = 100;
/// Frames of others that may be among the counted: neighbour discovery of the bridges themselves.
const OTHERS: u64 = 20;

struct World {
    swarm: Swarm,
    guest: Guest,
}

/// The part of `godwit-lab run wires` with a trusted LAN.
pub fn sealed(labid: &str) -> Result<Value> {
    let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
    let swarm = Swarm::up(&LabConfig::demo(labid), trusting)?;
    swarm.ask("h3", &["wire", "create", VAULT, "--encrypt"])?;
    let guest = swarm.start_guest("h1", &files, &GuestPlan::new("web", 5, 192))?;
    let mut world = World { swarm, guest };
    let station = world.swarm.station("h3", 1)?;
    let unheard = world.talk("a wire that nobody created", &station, false)?;
    world.swarm.ask("h1", &["wire", "create", WIRE])?;
    world.listed(WIRE, false)?;
    let open = world.talk("lan", &station, true)?;
    drop(station);
    world.swarm.ask("h1", &["wire", "disconnect", "web", WIRE])?;
    world.swarm.ask("h1", &["wire", "connect", "web", VAULT])?;
    let vault = world.swarm.station_on("h3", VAULT, 2)?;
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

impl World {
    /// Somebody on h3 talks to the guest, which goes to the other site and comes back: nothing is lost, and VXLAN carried
    /// it or did not.
    fn talk(&mut self, what: &str, station: &Station, by_vxlan: bool) -> Result<Value> {
        let target = SocketAddr::from((self.guest.plan.ip(), ECHO_PORT));
        let config = ProbeConfig { target, rate_pps: RATE, size: 64 };
        // Whose way is not there yet, after a start, is not counted.
        let early = Prober::start(Some(station.ns()), &config)?;
        ensure!(early.wait_unique(ANSWERS, SOON), "{what}: the guest is not reached");
        drop(early);
        let before = self.vxlan_frames()?;
        let talk = Prober::start(Some(station.ns()), &config)?;
        for to in ["h2", "h1"] {
            let m = Moving::start(&self.swarm, &Wish::new("h3", "web", to))?.end()?;
            ensure!(m.status.phase == Phase::Moved, "{what}: {}", m.status.cause);
        }
        let back = talk.snapshot().unique + ANSWERS;
        ensure!(talk.wait_unique(back, SOON), "{what}: the guest is not reached any more");
        let report = talk.stop(DRAIN);
        let ProbeReport { sent, lost, reordered, duplicated, .. } = report;
        let frames = self.vxlan_frames()? - before;
        let fits = if by_vxlan { frames >= ANSWERS } else { frames <= OTHERS };
        ensure!(fits, "{what}: {frames} frames of {sent} left by VXLAN");
        ensure!((lost, reordered, duplicated) == (0, 0, 0), "{what}: {report:?}");
        Ok(json!({ "sent": sent, "by_vxlan": frames, "lost": lost, "reordered": reordered }))
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
