//! The swarm in which clusters move, with the eyes that look at it from outside.
//!
//! Owns the hosts (h1, h2 and h3 in paris, h4 and h5 in tokyo), the guests of one cluster at a time, and the watches of
//! QEMUs and taps. h3 runs no guest: it is asked.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guest::disk::DiskForm;
use crate::guest::wire::Verified;
use crate::guest::{Cache, GuestControl, GuestFiles, GuestKind};
use crate::lab::frames::FrameWatch;
use crate::lab::prober::{ECHO_PORT, ProbeConfig, Prober, Station};
use crate::lab::qemus::{QemuWatch, SeenQemu};
use crate::lab::wan::{LinkParams, WanMode};
use crate::lab::{LabConfig, SiteConfig, cleanup};
use crate::scenario::faults::world::{REQUESTER, RESTLESS_KBPS, host_of, let_hold};
use crate::scenario::swarm::{Guest, GuestPlan, Swarm, WIRE, run};

/// The cluster.
pub const CLUSTER: &str = "web";
/// How long the swarm may take to be whole again after a fault.
const SETTLE: Duration = Duration::from_secs(60);
/// How long after that each guest may take to be reached.
const ECHO: Duration = Duration::from_secs(15);
/// Datagrams per second that each guest echoes.
const PROBES: u32 = 50;
/// MiB of each guest, and of it what is rewritten, at thousands of bytes per second.
const MEMORY_MIB: u32 = 192;
const CHURN: (u32, u32) = (16, 300);
/// The station's address on the wire.
const STATION_MAC: &str = "02:00:00:00:00:01";

/// Two sites, so far apart.
#[must_use]
pub fn two_sites(labid: &str, rtt_ms: u64) -> LabConfig {
    LabConfig {
        labid: labid.to_owned(),
        sites: vec![
            SiteConfig::new("paris", &["h1", "h2", "h3"]),
            SiteConfig::new("tokyo", &["h4", "h5"]),
        ],
        wan: WanMode::Shaped(LinkParams::new(100, rtt_ms)),
    }
}

/// See the module.
pub struct World {
    /// The nodes.
    pub swarm: Swarm,
    /// Every QEMU.
    pub qemus: QemuWatch,
    /// Every frame of a guest.
    pub frames: FrameWatch,
    /// The members, in order.
    pub guests: Vec<Guest>,
    probers: Vec<Prober>,
    station: Option<Station>,
}

impl World {
    /// Builds the lab and the swarm, whose nodes get these arguments; no guest yet.
    pub fn up(config: &LabConfig, args: &[&str]) -> Result<Self> {
        let dir = cleanup::run_dir(&config.labid);
        let mut qemus = None;
        let swarm = Swarm::up(config, |node| {
            let watch = qemus.get_or_insert_with(|| QemuWatch::start(&dir.join("qemus")));
            if let Ok(watch) = watch {
                node.arg("--qemu").arg(&watch.program().display().to_string());
            }
            for arg in args {
                node.arg(arg);
            }
            let_hold(node);
        })?;
        let qemus = qemus.context("a lab without hosts")??;
        let frames = FrameWatch::start(swarm.lab.hosts())?;
        Ok(Self { swarm, qemus, frames, guests: Vec::new(), probers: Vec::new(), station: None })
    }

    /// Guests at work on these hosts, as one cluster that [`REQUESTER`] was asked to make.
    pub fn populate(&mut self, members: &[(&str, &str)]) -> Result<()> {
        let files = GuestFiles::prepare(GuestKind::Busybox, &Cache::open()?)?;
        self.populate_with(members, &files, MEMORY_MIB)?;
        self.restless(false)
    }

    /// The guests rewrite their memory, so fast that a slow link does not carry it or as usual.
    pub fn restless(&self, restless: bool) -> Result<()> {
        let rate = if restless { RESTLESS_KBPS } else { CHURN.1 };
        for guest in &self.guests {
            run(async { self.control(&guest.name)?.churn(CHURN.0, rate, false).await })?;
        }
        Ok(())
    }

    /// The same with guests of another kind and size, which do nothing yet. A disk is an overlay of the guest's own.
    pub fn populate_with(
        &mut self,
        members: &[(&str, &str)],
        files: &GuestFiles,
        memory_mib: u32,
    ) -> Result<()> {
        for (at, (name, host)) in members.iter().enumerate() {
            let plan = GuestPlan {
                root: DiskForm::Overlay,
                ..GuestPlan::new(name, 11 + at as u8, memory_mib)
            };
            self.guests.push(self.swarm.start_guest(host, files, &plan)?);
        }
        let names: Vec<&str> = members.iter().map(|(name, _)| *name).collect();
        self.swarm.ask(REQUESTER, &["cluster", "create", CLUSTER, "--vms", &names.join(",")])?;
        let station = self.swarm.station(REQUESTER, 1)?;
        for guest in &self.guests {
            let target = SocketAddr::from((guest.plan.ip(), ECHO_PORT));
            let probes = ProbeConfig { target, rate_pps: PROBES, size: 64 };
            let prober = Prober::start(Some(station.ns()), &probes)?;
            ensure!(prober.wait_unique(20, Duration::from_secs(30)), "a guest does not echo");
            self.probers.push(prober);
        }
        self.station = Some(station);
        Ok(())
    }

    /// The host whose QEMU runs that guest now, by its events.
    pub fn runs_on(&self, vm: &str) -> Option<String> {
        let copy = self.copies(vm).into_iter().find(SeenQemu::runs)?;
        host_of(&self.swarm, &copy)
    }

    /// All QEMUs of a VM, oldest first.
    pub fn copies(&self, vm: &str) -> Vec<SeenQemu> {
        let mut seen = self.qemus.seen();
        seen.retain(|qemu| qemu.vm == vm);
        seen
    }

    /// Where each member runs, in order; an error if one runs nowhere.
    pub fn hosts(&self) -> Result<Vec<String>> {
        let host =
            |g: &Guest| self.runs_on(&g.name).with_context(|| format!("{} runs nowhere", g.name));
        self.guests.iter().map(host).collect()
    }

    /// The control channel of a guest, wherever it runs now.
    pub fn control(&self, vm: &str) -> Result<GuestControl> {
        let copy = self.copies(vm).into_iter().find(SeenQemu::runs).context("it runs nowhere")?;
        let control = GuestControl::new(copy.dir.join("serial1.sock"));
        Ok(control.with_deadline(Duration::from_secs(60)))
    }

    /// A guest's own check of all its pages.
    pub fn verify(&self, vm: &str) -> Result<Verified> {
        let mut control = self.control(vm)?;
        run(async {
            control.wait_ready(Duration::from_secs(30)).await?;
            control.verify().await
        })
    }

    /// The cluster as `godwit cluster show` tells it on a host.
    pub fn cluster(&self, on: &str) -> Result<Value> {
        self.swarm.ask(on, &["cluster", "show", CLUSTER])
    }

    /// The hosts that vote on the cluster, as they are shown on a host.
    pub fn voters(&self, on: &str) -> Result<Vec<String>> {
        let shown = self.cluster(on)?;
        let names = shown["voters"].as_array().context("no voters")?.iter();
        Ok(names.filter_map(|name| name.as_str().map(Into::into)).collect())
    }

    /// Waits until all nodes see each other, the cluster has three voters, and every guest is reached.
    pub fn settled(&self) -> Result<()> {
        let nodes = self.swarm.nodes().len();
        if self.station.is_some() {
            // What a node that was restarted does not carry any more.
            self.swarm.ask(REQUESTER, &["wire", "port", WIRE, "--mac", STATION_MAC])?;
        }
        self.swarm.wait("the swarm is whole again", SETTLE, |swarm| {
            for node in swarm.nodes() {
                let hosts = swarm.ask(&node.host().name, &["hosts"])?;
                let alive = |h: &Value| h["state"] == "alive";
                if !hosts.as_array().is_some_and(|h| h.len() == nodes && h.iter().all(alive)) {
                    return Ok(false);
                }
            }
            Ok(self.voters(REQUESTER)?.len() >= 3)
        })?;
        for (guest, prober) in self.guests.iter().zip(&self.probers) {
            let echoed = prober.snapshot().unique;
            ensure!(prober.wait_unique(echoed + 10, ECHO), "{} does not echo any more", guest.name);
        }
        Ok(())
    }

    /// Ends the talk with the guests: what each prober saw.
    pub fn hang_up(&mut self) -> Vec<crate::lab::prober::ProbeReport> {
        let reports = self.probers.drain(..).map(|p| p.stop(Duration::from_secs(1))).collect();
        self.station = None;
        reports
    }

    /// Ends everything.
    pub fn down(mut self) -> Result<()> {
        self.hang_up();
        self.swarm.down()
    }
}
