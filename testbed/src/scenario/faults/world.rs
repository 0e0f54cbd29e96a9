//! The swarm that faults are done to, with the eyes that look at it from outside.
//!
//! Owns three hosts (h1 and h2 at two sites, h3 that is asked), one guest at a time, and the watches of QEMUs and taps.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::follow::Follow;
use crate::guest::disk::{DiskForm, SpecDisk};
use crate::guest::{Cache, GuestControl, GuestFiles, GuestKind};
use crate::lab::frames::FrameWatch;
use crate::lab::node::Node;
use crate::lab::ns::NetNs;
use crate::lab::prober::{ProbeConfig, Prober, Station};
use crate::lab::qemus::{QemuWatch, SeenQemu};
use crate::lab::wan::{LinkParams, WanMode};
use crate::lab::{LabConfig, cleanup};
use crate::scenario::swarm::{Guest, GuestPlan, Swarm, run};

/// The node that is asked to move the VM.
pub const REQUESTER: &str = "h3";
/// How long the swarm may take to be whole again after a fault.
const SETTLE: Duration = Duration::from_secs(60);
/// How long after that the guest may take to be reached from the other hosts.
const ECHO: Duration = Duration::from_secs(60);
/// Thousands of bytes per second that a guest rewrites whose move shall not come to its end over a slow link.
pub const RESTLESS_KBPS: u32 = 16_000;
/// Datagrams per second that the guest echoes: each makes it send a frame.
const PROBES: u32 = 50;

/// What the guest of a world is and does.
#[derive(Clone)]
pub struct Cast {
    /// Which guest.
    pub kind: GuestKind,
    /// MiB of its memory.
    pub memory_mib: u32,
    /// MiB of its memory that it rewrites, and thousands of bytes of it per second.
    pub churn: (u32, u32),
    /// Form of the disk that it starts from, if it does.
    pub root: DiskForm,
    /// Further disks of its own and their MiB.
    pub disks: Vec<(DiskForm, u32)>,
    /// Whether these are full from the start.
    pub full: bool,
    /// What it rewrites on its disks: path in the guest, MiB, thousands of bytes per second.
    pub disk_churn: Vec<(&'static str, u32, u32)>,
    /// The links between the sites.
    pub link: LinkParams,
    /// More arguments of a node, by its host.
    pub dress: fn(&mut Node),
}

impl Cast {
    /// The busybox guest without disks, between sites 80 ms apart.
    #[must_use]
    pub fn plain() -> Self {
        Self {
            kind: GuestKind::Busybox,
            memory_mib: 256,
            churn: (16, 1000),
            root: DiskForm::Raw,
            disks: Vec::new(),
            full: false,
            disk_churn: Vec::new(),
            link: LinkParams::new(100, 80),
            dress: |_| {},
        }
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
    /// What the guest starts from.
    pub files: GuestFiles,
    cast: Cast,
    guest: Option<Guest>,
    guests: u8,
    talk: Option<Talk>,
}

/// Somebody outside who talks to the guest. The prober goes before its namespace.
struct Talk {
    prober: Prober,
    station: Station,
}

impl World {
    /// Builds the lab and the swarm; no guest yet.
    pub fn up(labid: &str, cast: Cast) -> Result<Self> {
        let files = GuestFiles::prepare(cast.kind, &Cache::open()?)?;
        let dir = cleanup::run_dir(labid);
        let mut qemus = None;
        let wan = WanMode::Shaped(cast.link.clone());
        let swarm = Swarm::up(&LabConfig { wan, ..LabConfig::demo(labid) }, |node| {
            // The lab's directory is there now, which it was not before.
            let watch = qemus.get_or_insert_with(|| QemuWatch::start(&dir.join("qemus")));
            if let Ok(watch) = watch {
                node.arg("--qemu").arg(&watch.program().display().to_string());
            }
            let_hold(node);
            (cast.dress)(node);
        })?;
        let qemus = qemus.context("a lab without hosts")??;
        let frames = FrameWatch::start(swarm.lab.hosts())?;
        Ok(Self { swarm, qemus, frames, files, cast, guest: None, guests: 0, talk: None })
    }

    /// The guest: the one that lives, else a new one on h1; and the host that it runs on.
    pub fn guest(&mut self) -> Result<(Guest, String)> {
        if let Some(guest) = &self.guest
            && let Some(host) = self.runs_on(&guest.name)
        {
            return Ok((guest.clone(), host));
        }
        self.talk = None;
        self.guests += 1;
        let plan = self.plan()?;
        let guest = self.swarm.start_guest("h1", &self.files, &plan)?;
        run(async {
            let mut control = self.swarm.control("h1", &guest)?;
            for (path, mb, rate_kbps) in &self.cast.disk_churn {
                control.disk(path, *mb, *rate_kbps).await?;
            }
            control.churn(self.cast.churn.0, self.cast.churn.1, false).await
        })?;
        self.guest = Some(guest.clone());
        let station = self.swarm.station(REQUESTER, 1)?;
        let target = std::net::SocketAddr::from((plan.ip(), crate::lab::prober::ECHO_PORT));
        let probes = ProbeConfig { target, rate_pps: PROBES, size: 64 };
        let prober = Prober::start(Some(station.ns()), &probes)?;
        ensure!(prober.wait_unique(20, Duration::from_secs(30)), "the guest does not echo");
        self.talk = Some(Talk { prober, station });
        Ok((guest, "h1".to_owned()))
    }

    fn plan(&self) -> Result<GuestPlan> {
        let name = format!("vm{}", self.guests);
        let mut plan = GuestPlan::new(&name, self.guests, self.cast.memory_mib);
        plan.root = self.cast.root;
        for (at, (form, mib)) in self.cast.disks.iter().enumerate() {
            let path = self.swarm.lab.dir().join(format!("{name}-{at}.{}", form.format()));
            let disk = SpecDisk::blank(path, *form, u64::from(*mib) << 20)?;
            if self.cast.full {
                disk.fill()?;
            }
            plan.disks.push(disk);
        }
        Ok(plan)
    }

    /// The namespace of somebody on the guest's wire, once there is a guest.
    pub fn outside(&self) -> Result<&NetNs> {
        self.talk.as_ref().map(|talk| talk.station.ns()).context("nobody talks to a guest yet")
    }

    /// All QEMUs of a VM, oldest first.
    pub fn copies(&self, vm: &str) -> Vec<SeenQemu> {
        let mut seen = self.qemus.seen();
        seen.retain(|qemu| qemu.vm == vm);
        seen
    }

    /// The newest QEMU of a VM on a host.
    pub fn copy_on(&self, vm: &str, host: &str) -> Result<SeenQemu> {
        copy_on(&self.swarm, &self.qemus, vm, host)
    }

    /// What is shown of a migration where it was asked for, once that is an end.
    pub fn ended(&self, follow: &Follow, limit: Duration) -> Result<Value> {
        ended(&self.swarm, follow, limit)
    }

    /// How a move that has ended is shown once both ends have told of it: what crossed is the source's to tell.
    pub fn told(&self, follow: &Follow, limit: Duration) -> Result<Value> {
        let mut shown = Value::Null;
        // If the word does not come, what is shown says so.
        let _ = self.swarm.wait("the source's figures", limit, |_| {
            shown = self.ended(follow, limit)?;
            Ok(shown["phase"] != "moved" || shown["chunks_zero"].as_u64() > Some(0))
        });
        Ok(shown)
    }

    /// The host whose QEMU runs the VM's guest now, by its events.
    pub fn runs_on(&self, vm: &str) -> Option<String> {
        let copy = self.copies(vm).into_iter().find(SeenQemu::runs)?;
        self.host_of(&copy)
    }

    /// The host whose node started this QEMU.
    pub fn host_of(&self, qemu: &SeenQemu) -> Option<String> {
        host_of(&self.swarm, qemu)
    }

    /// The guest rewrites its memory faster than a slow link carries, or as its cast says again.
    pub fn restless(&self, vm: &str, restless: bool) -> Result<()> {
        let (mib, usual) = self.cast.churn;
        let rate = if restless { RESTLESS_KBPS } else { usual };
        run(async { self.control(vm)?.churn(mib, rate, false).await })
    }

    /// The guest's control channel, wherever it runs.
    pub fn control(&self, vm: &str) -> Result<GuestControl> {
        let copy = self.copies(vm).into_iter().find(SeenQemu::runs).context("it runs nowhere")?;
        let path = copy.dir.join("serial1.sock");
        Ok(GuestControl::new(path).with_deadline(Duration::from_secs(60)))
    }

    /// Waits until all nodes see each other and the VM has its three voters and does not move.
    pub fn settled(&self, vm: &str, host: &str) -> Result<()> {
        self.swarm.wait("the swarm is whole again", SETTLE, |swarm| {
            for node in swarm.nodes() {
                let hosts = swarm.ask(&node.host().name, &["hosts"])?;
                let alive = |h: &Value| h["state"] == "alive";
                if !hosts.as_array().is_some_and(|h| h.len() == 3 && h.iter().all(alive)) {
                    return Ok(false);
                }
            }
            let info = swarm.ask(host, &["vm", "show", vm])?;
            Ok(info["detail"]["voters"].as_array().is_some_and(|v| v.len() >= 3))
        })?;
        let Some(Talk { prober, .. }) = &self.talk else { return Ok(()) };
        let echoed = prober.snapshot().unique;
        ensure!(prober.wait_unique(echoed + 20, ECHO), "the guest does not echo any more");
        Ok(())
    }

    /// Where a host's node looks for points to stand still at.
    pub fn hold_dir(&self, host: &str) -> Result<PathBuf> {
        hold_dir(&self.swarm, host)
    }

    /// Removes every point and every word of one.
    pub fn clear_holds(&self) -> Result<()> {
        for host in self.swarm.lab.hosts() {
            for file in fs::read_dir(self.hold_dir(&host.name)?)? {
                fs::remove_file(file?.path())?;
            }
        }
        Ok(())
    }

    /// Copies what may be of use after a failure, see [`Swarm::keep_logs`].
    pub fn keep_logs(&self, case: &str) {
        self.swarm.keep_logs(case, &self.qemus);
    }

    /// Ends everything.
    pub fn down(mut self) -> Result<()> {
        self.talk = None;
        self.swarm.down()
    }
}

/// Lets a node stand still where a file says so.
pub fn let_hold(node: &mut Node) {
    let hold = node.host().work_dir.join("hold");
    // If this fails, no point is ever reached, which whoever waits for one notices.
    let _ = cleanup::make_private_dir(&hold);
    node.env("GODWIT_LAB_HOLD", &hold.display().to_string());
}

/// Where a host's node looks for points to stand still at.
pub fn hold_dir(swarm: &Swarm, host: &str) -> Result<PathBuf> {
    Ok(swarm.lab.host(host)?.work_dir.join("hold"))
}

/// The newest QEMU of a VM on a host.
pub fn copy_on(swarm: &Swarm, qemus: &QemuWatch, vm: &str, host: &str) -> Result<SeenQemu> {
    let mut copies = qemus.seen();
    copies.retain(|qemu| qemu.vm == vm && host_of(swarm, qemu).as_deref() == Some(host));
    copies.pop().with_context(|| format!("{host} has no QEMU of {vm}"))
}

/// The host whose node started this QEMU.
pub fn host_of(swarm: &Swarm, qemu: &SeenQemu) -> Option<String> {
    let on = swarm.lab.hosts().iter().find(|host| qemu.on(&host.state_dir));
    on.map(|host| host.name.clone())
}

/// What is shown of a migration where it was asked for, once that is an end.
pub fn ended(swarm: &Swarm, follow: &Follow, limit: Duration) -> Result<Value> {
    let id = follow.id.to_string();
    let mut shown = Value::Null;
    let ended = swarm.wait("the migration ends", limit, |swarm| {
        let all = swarm.ask(REQUESTER, &["migrations"])?;
        let found = all.as_array().and_then(|all| all.iter().find(|m| m["id"] == id.as_str()));
        shown = found.cloned().unwrap_or(Value::Null);
        Ok(["moved", "stayed", "lost"].iter().any(|end| shown["phase"] == *end))
    });
    ended.with_context(|| format!("shown at {REQUESTER}: {shown}"))?;
    Ok(shown)
}
