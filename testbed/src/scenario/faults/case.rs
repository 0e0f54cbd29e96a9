//! One case: a fresh move, brought to its phase, hit there, and looked at afterwards.
//!
//! Owns the order of steps and the proof that the fault landed. What must hold afterwards is `super::checks`.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::act::{self, Point, READY, SLOW, UNDER_WAY_PPM, merge, now_us, ran_at, until};
use super::checks::{self, Facts};
use super::follow::{Follow, Pace};
use super::world::{REQUESTER, World};
use crate::guest::GuestControl;
use crate::lab::qemus::SeenQemu;
use crate::scenario::swarm::run;

/// Bytes per second that are read of each disk in a move that shall still copy them when it is hit.
const SLOW_DISK: u64 = 50_000_000;
/// Share of the work that is done when the WAN is cut, after which none of it may cross again, parts per million.
const HALF_WAY_PPM: u32 = 500_000;
/// How long a move may take to its phase.
const REACH: Duration = Duration::from_secs(60);
/// How long a source that came back may take to be decided for while the destination stands still.
const BACK: Duration = Duration::from_secs(40);
/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of the QEMU that receives.
    DestinationQemu,
    /// `kill -9` of its node, which is started again.
    DestinationNode,
    /// `kill -9` of the source's node, which is started again.
    SourceNode,
    /// `kill -9` of the node that took the request, which is started again.
    RequestingNode,
    /// No packet crosses the WAN for [`CUT`].
    WanCut,
    /// What asks the voters to accept leaves the proposer so much later, and twice.
    LateAccept {
        /// How much later.
        ms: u64,
    },
}

/// When.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Disks are copied, memory does not cross yet, the guest runs at the source. Of VMs with disks that move.
    Disk,
    /// The guest stands still, the last of its disks is under way. Of VMs with disks that move.
    Mirrored,
    /// Pages cross, the guest runs at the source.
    Transfer,
    /// A majority of the voters has promised the next epoch, which only the proposer knows; the guests run at their
    /// sources. Of a cluster.
    Ballot,
    /// Frames for the guest wait at the source, which is bound; the guest still runs there.
    Held,
    /// The guest stands still; the destination has all, and is not bound.
    Stopped,
    /// The destination is bound; nothing is proposed.
    Loaded,
    /// Decided for the destination; its guest does not run.
    Decided,
    /// As decided; of what was held for the guest nothing has left the source. Of a cluster.
    Tail,
    /// Its guest runs; the source has not heard of it.
    Running,
    /// Its guest runs and takes what was held; what comes now waits behind the plug. Of a cluster.
    Plugged,
    /// Guests run, and a host that sends to them has not turned. Of a cluster.
    Turn,
}

impl Phase {
    /// All that a VM without disks goes through, in order.
    pub const ALL: [Self; 5] =
        [Self::Transfer, Self::Stopped, Self::Loaded, Self::Decided, Self::Running];

    /// Whether pages or blocks cross while the guest runs: it is hit there by the progress, not at a point.
    pub(crate) fn moves_on(self) -> bool {
        matches!(self, Self::Transfer | Self::Disk)
    }

    /// Whether it is the source that stands still.
    pub(crate) fn at_source(self) -> bool {
        matches!(self, Self::Mirrored | Self::Held | Self::Tail)
    }

    /// Its name; of one that does not move on also the point at which a node stands still.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Mirrored => "mirrored",
            Self::Transfer => "transfer",
            Self::Ballot => "ballot",
            Self::Held => "held",
            Self::Stopped => "stopped",
            Self::Loaded => "loaded",
            Self::Decided => "decided",
            Self::Tail => "tail",
            Self::Running => "running",
            Self::Plugged => "plugged",
            Self::Turn => "turn",
        }
    }
}

/// One case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// What is done.
    pub fault: Fault,
    /// When.
    pub phase: Phase,
    /// A killed node is ready again before the destination goes on.
    pub back_first: bool,
}

/// A case under way.
struct Scene {
    vm: String,
    number: u8,
    source: String,
    destination: String,
    follow: Follow,
    started: Instant,
    started_us: u64,
    point: Point,
}

impl Case {
    /// The destination goes on as soon as the fault was done.
    #[must_use]
    pub fn new(fault: Fault, phase: Phase) -> Self {
        Self { fault, phase, back_first: false }
    }

    fn fault_name(&self) -> String {
        match self.fault {
            Fault::DestinationQemu => "kill destination QEMU".into(),
            Fault::DestinationNode => "kill destination node".into(),
            Fault::SourceNode => "kill source node".into(),
            Fault::RequestingNode => "kill requesting node".into(),
            Fault::WanCut => "cut WAN 5 s".into(),
            Fault::LateAccept { ms } => format!("accept {ms} ms late and twice"),
        }
    }

    /// Unique in the matrix.
    #[must_use]
    pub fn name(&self) -> String {
        let back = if self.back_first { ", back before the destination goes on" } else { "" };
        format!("{} / {}{back}", self.fault_name(), self.phase.name())
    }

    fn says(&self) -> Value {
        json!({ "case": self.name(), "fault": self.fault_name(), "phase": self.phase.name() })
    }

    /// The report of a case that could not be finished.
    pub fn broken(&self, error: &str) -> Value {
        merge(self.says(), json!({ "passed": false, "failures": [error] }))
    }

    /// Runs it. An error: the lab, not the product, failed, or the fault did not land.
    pub fn run(&self, world: &mut World) -> Result<Value> {
        let (guest, source) = world.guest()?;
        let destination = if source == "h1" { "h2" } else { "h1" }.to_owned();
        world.settled(&guest.name, &source)?;
        world.clear_holds()?;
        let held = if self.phase.at_source() { &source } else { &destination };
        let hold = world.hold_dir(held)?;
        let mut point = Point::of(&hold, self.phase);
        if let Fault::LateAccept { ms } = self.fault {
            point.path = hold.join("late-accept");
            fs::write(&point.path, ms.to_string())?;
        } else {
            point.hold()?;
        }
        let pace = match self.phase {
            Phase::Transfer => Pace { link: SLOW, disk: 0 },
            Phase::Disk => Pace { link: 0, disk: SLOW_DISK },
            _ => Pace::default(),
        };
        // What the destination still has from an earlier move makes this one short.
        let endless = self.phase == Phase::Transfer;
        if endless {
            world.restless(&guest.name, true)?;
        }
        let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
        let started_us = now_us();
        let follow = Follow::start(&state, &guest.name, &destination, pace)?;
        let scene = Scene {
            vm: guest.name.clone(),
            number: guest.plan.number,
            source,
            destination,
            follow,
            started: Instant::now(),
            started_us,
            point,
        };
        let landed = match self.fault {
            Fault::LateAccept { .. } => self.late(&scene)?,
            _ => self.strike(world, &scene)?,
        };
        if endless {
            world.restless(&guest.name, false)?;
        }
        let facts = self.facts(world, &scene)?;
        world.clear_holds()?;
        let judged = checks::judge(self, world, &facts);
        let report = json!({
            "landed": landed,
            "from": scene.source,
            "to": scene.destination,
        });
        Ok(merge(merge(self.says(), report), judged))
    }

    /// Brings the move to its phase and does the fault there. Answers with the proof.
    fn strike(&self, world: &mut World, scene: &Scene) -> Result<Value> {
        let reached = scene.point.word();
        let done = match (self.fault, self.phase) {
            (Fault::WanCut, Phase::Transfer) => HALF_WAY_PPM,
            _ => UNDER_WAY_PPM,
        };
        let heard = match self.phase {
            Phase::Transfer | Phase::Disk => scene.follow.wait(REACH, |heard| {
                heard.phase == Some(godwit_protocol::wire::migrate::Phase::Transfer)
                    && heard.done_ppm > done
            })?,
            _ => scene.follow.wait(REACH, |_| reached.exists()).context("the point")?,
        };
        let before = self.seen_phase(world, scene)?;
        let struck = self.act(world, scene)?;
        self.was_phase(world, scene, struck["at_us"].as_u64().context("no time")?)?;
        Ok(json!({
            "point_reached": (!self.phase.moves_on()).then(|| self.phase.name()),
            "phase_shown": heard.phase,
            "done_ppm": heard.done_ppm,
            "guests": before,
            "struck": struck,
        }))
    }

    /// Where the guest runs and stands, by the QEMUs' events; an error if that is not this phase.
    fn seen_phase(&self, world: &World, scene: &Scene) -> Result<Value> {
        let (source, destination) = (world.copy_on(&scene.vm, &scene.source)?, {
            world.copy_on(&scene.vm, &scene.destination)?
        });
        let ran = !destination.ran().is_empty();
        let fits = match self.phase {
            Phase::Transfer | Phase::Disk | Phase::Ballot | Phase::Held => source.runs() && !ran,
            Phase::Mirrored | Phase::Stopped | Phase::Loaded | Phase::Decided | Phase::Tail => {
                !source.runs() && !ran
            }
            Phase::Running | Phase::Plugged | Phase::Turn => !source.runs() && destination.runs(),
        };
        ensure!(
            fits && source.alive() && destination.alive(),
            "not the phase: source {source:?}, destination {destination:?}"
        );
        Ok(json!({ "source_runs": source.runs(), "destination_ran": ran }))
    }

    /// As [`Case::seen_phase`], of the moment at which the fault was done: from the events' own times.
    fn was_phase(&self, world: &World, scene: &Scene, at_us: u64) -> Result<()> {
        let copies = world.copies(&scene.vm);
        let on = |host: &str| {
            let here = |q: &&SeenQemu| world.host_of(q).as_deref() == Some(host);
            copies.iter().filter(here).flat_map(SeenQemu::ran).collect::<Vec<_>>()
        };
        let (source, destination) = (on(&scene.source), on(&scene.destination));
        let covers = |ran: &[(u64, Option<u64>)]| ran_at(ran, at_us);
        let ran = destination.iter().any(|(from, _)| (scene.started_us..=at_us).contains(from));
        let fits = match self.phase {
            Phase::Transfer | Phase::Disk | Phase::Ballot | Phase::Held => covers(&source) && !ran,
            Phase::Mirrored | Phase::Stopped | Phase::Loaded | Phase::Decided | Phase::Tail => {
                !covers(&source) && !ran
            }
            Phase::Running | Phase::Plugged | Phase::Turn => !covers(&source) && ran,
        };
        // The source's QEMU is told to send memory once the disks are copied.
        let memory = |(at, name): &(u64, String)| {
            (scene.started_us..at_us).contains(at) && name == "MIGRATION setup"
        };
        let sender = world.copy_on(&scene.vm, &scene.source)?;
        let early = self.phase != Phase::Disk || !sender.events.iter().any(memory);
        ensure!(early, "memory crossed already at {at_us}");
        ensure!(fits, "at {at_us} it was not the phase: {source:?}, {destination:?}");
        Ok(())
    }

    fn act(&self, world: &mut World, scene: &Scene) -> Result<Value> {
        match self.fault {
            Fault::DestinationQemu => {
                let qemu = world.copy_on(&scene.vm, &scene.destination)?;
                let here = |q: &SeenQemu| q.pid == qemu.pid && !q.alive();
                act::kill_qemu(&qemu, &scene.point, || world.copies(&scene.vm).iter().any(here))
            }
            Fault::DestinationNode => self.kill_node(world, scene, &scene.destination),
            Fault::SourceNode => self.kill_node(world, scene, &scene.source),
            Fault::RequestingNode => self.kill_node(world, scene, REQUESTER),
            Fault::WanCut => act::cut_wan(&world.swarm, &scene.point),
            Fault::LateAccept { .. } => bail!("not done to a point"),
        }
    }

    fn kill_node(&self, world: &mut World, scene: &Scene, host: &str) -> Result<Value> {
        let done = act::kill_node(&mut world.swarm, host, &scene.point)?;
        if self.back_first {
            world.swarm.node_mut(host)?.start_ready(READY)?;
            // It may decide with the other voter while the destination stands still; the destination's word comes later.
            let decided = || world.copy_on(&scene.vm, &scene.source).is_ok_and(|q| q.runs());
            until(BACK, decided).context("the source did not run again")?;
            scene.point.release()?;
        } else {
            // Gone before a node that starts again could see it.
            scene.point.release()?;
            world.swarm.node_mut(host)?.start_ready(READY)?;
        }
        Ok(done)
    }

    /// Nothing to strike: the proposer's node does it. Shown by its word of each message.
    fn late(&self, scene: &Scene) -> Result<Value> {
        let word = scene.point.word();
        let sent = || fs::metadata(&word).map_or(0, |m| m.len());
        until(Duration::from_secs(85), || sent() >= 2).context("no accept left late")?;
        Ok(json!({ "late_accepts_sent": sent() }))
    }

    /// Waits for the end as shown where it was asked for, then for what must come true soon after.
    fn facts(&self, world: &World, scene: &Scene) -> Result<Facts> {
        let left = checks::END.saturating_sub(scene.started.elapsed());
        let shown = world.ended(&scene.follow, left)?;
        let ended_ms = scene.started.elapsed().as_millis() as u64;
        let lost = shown["phase"] == "lost";
        // The superseded copy goes soon after the end is known.
        let _ = until(checks::TIDY, || {
            let copies = world.copies(&scene.vm);
            copies.iter().filter(|q| q.alive()).count() == usize::from(!lost)
        });
        let shown = if lost { shown } else { world.told(&scene.follow, checks::TIDY)? };
        let verified = match world.control(&scene.vm) {
            Ok(control) => Some(verify(control)?),
            Err(_) => None,
        };
        Ok(Facts {
            vm: scene.vm.clone(),
            number: scene.number,
            source: scene.source.clone(),
            destination: scene.destination.clone(),
            started_us: scene.started_us,
            ended_us: now_us(),
            ended_ms,
            shown,
            verified,
        })
    }
}

fn verify(mut control: GuestControl) -> Result<crate::guest::wire::Verified> {
    run(async {
        control.wait_ready(Duration::from_secs(30)).await?;
        control.verify().await
    })
}
