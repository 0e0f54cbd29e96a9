//! One case: a fresh move of the cluster, brought to its step, hit there, and looked at afterwards.
//!
//! Owns the order of steps and the proof that the fault landed: which guests ran at that moment, by the events of their
//! QEMUs. What must hold afterwards is `super::judge`'s.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::judge::{self, Facts};
use crate::lab::qemus::SeenQemu;
use crate::scenario::cluster::world::{CLUSTER, World};
use crate::scenario::faults::act::{
    self, Point, READY, SLOW, UNDER_WAY_PPM, merge, now_us, ran_at, until,
};
use crate::scenario::faults::case::Phase;
use crate::scenario::faults::follow::{Follow, Heard, Pace};
use crate::scenario::faults::world::{REQUESTER, copy_on, ended, hold_dir, host_of};

/// How long a move may take to its step.
const REACH: Duration = Duration::from_secs(90);
/// How long after its end the last frames may come to a step.
const LAST: Duration = Duration::from_secs(2);
/// How often a move is begun that ends before its step is reached.
const TRIES: u32 = 3;
/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of the node that leads and runs the first member; it is started again.
    Lead,
    /// The same of the node that runs the second member.
    Source,
    /// The same of the node that receives the first member and proposes.
    Proposer,
    /// The same of the node that receives the second member.
    Destination,
    /// `kill -9` of the QEMU that receives the second member.
    DestinationQemu,
    /// `kill -9` of the node of a voter, one without a part in the move if there is one.
    Voter,
    /// No packet crosses the WAN for [`CUT`].
    WanCut,
}

impl Fault {
    /// All.
    pub const ALL: [Self; 7] = [
        Self::Lead,
        Self::Source,
        Self::Proposer,
        Self::Destination,
        Self::DestinationQemu,
        Self::Voter,
        Self::WanCut,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Lead => "kill lead",
            Self::Source => "kill source node",
            Self::Proposer => "kill proposing destination node",
            Self::Destination => "kill destination node",
            Self::DestinationQemu => "kill destination QEMU",
            Self::Voter => "kill voter",
            Self::WanCut => "cut WAN 5 s",
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
}

/// A case under way: the members in order, each with its hosts.
struct Scene {
    from: Vec<String>,
    to: Vec<String>,
    /// The member of which one end stands still, and is looked at.
    held: usize,
    voters: Vec<String>,
    follow: Follow,
    started: Instant,
    started_us: u64,
    point: Point,
}

impl Case {
    /// Unique in the matrix.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{} / {}", self.fault.name(), self.phase.name())
    }

    /// Whether the fault ends a guest that nobody else has.
    #[must_use]
    pub fn may_lose(&self) -> bool {
        let runs = matches!(self.phase, Phase::Running | Phase::Plugged | Phase::Turn);
        self.fault == Fault::DestinationQemu && runs
    }

    fn says(&self) -> Value {
        json!({ "case": self.name(), "fault": self.fault.name(), "phase": self.phase.name() })
    }

    /// The report of a case that could not be finished.
    pub fn broken(&self, error: &str) -> Value {
        merge(self.says(), json!({ "passed": false, "failures": [error] }))
    }

    /// Runs it. An error: the lab, not the product, failed, or the fault did not land.
    pub fn run(&self, world: &mut World) -> Result<Value> {
        world.settled()?;
        let mut tries = 1;
        let (scene, heard) = loop {
            let scene = self.begin(world)?;
            let (heard, reached) = self.reach(&scene)?;
            if reached {
                break (scene, heard);
            }
            // A machine that is too busy to stop all in time: they stayed, and nothing was hit.
            ensure!(tries < TRIES, "the step was not reached: {heard:?}");
            tries += 1;
            scene.point.release()?;
            world.settled()?;
        };
        let landed = self.strike(world, &scene, &heard)?;
        if self.phase.moves_on() {
            world.restless(false)?;
        }
        let facts = self.facts(world, &scene)?;
        let judged = judge::judge(self, world, &facts);
        let places =
            json!({ "landed": landed, "from": scene.from, "to": scene.to, "tries": tries });
        Ok(merge(merge(self.says(), places), judged))
    }

    fn begin(&self, world: &World) -> Result<Scene> {
        for host in world.swarm.lab.hosts() {
            for file in std::fs::read_dir(hold_dir(&world.swarm, &host.name)?)? {
                std::fs::remove_file(file?.path())?;
            }
        }
        let from = world.hosts()?;
        let there = from.iter().all(|h| h == "h1" || h == "h2");
        let to: Vec<String> =
            if there { ["h4", "h5"] } else { ["h1", "h2"] }.map(Into::into).into();
        // The ballot is the first member's destination's to prepare.
        let first = self.fault == Fault::Proposer || self.phase == Phase::Ballot;
        let held = usize::from(!first);
        let at = match self.phase {
            // It sends to both members.
            Phase::Turn => REQUESTER,
            phase if phase.at_source() => &from[held],
            _ => &to[held],
        };
        let mut point = Point::of(&hold_dir(&world.swarm, at)?, self.phase);
        if self.phase == Phase::Tail {
            point = point.and(&hold_dir(&world.swarm, &to[held])?, Phase::Decided);
        }
        point.hold()?;
        let voters = world.voters(REQUESTER)?;
        // What the destinations still have from an earlier move makes this one short.
        let link = if self.phase.moves_on() { SLOW } else { 0 };
        if self.phase.moves_on() {
            world.restless(true)?;
        }
        let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
        let names = world.guests.iter().map(|g| g.name.as_str());
        let place: Vec<(&str, &str)> = names.zip(to.iter().map(String::as_str)).collect();
        let started_us = now_us();
        let follow = Follow::placed(&state, CLUSTER, "", &place, Pace { link, disk: 0 })?;
        let started = Instant::now();
        Ok(Scene { from, to, held, voters, follow, started, started_us, point })
    }

    /// Brings the move to its step, if it is not over without.
    fn reach(&self, scene: &Scene) -> Result<(Heard, bool)> {
        let there = |heard: &Heard| match self.phase.moves_on() {
            true => {
                heard.phase == Some(godwit_protocol::wire::migrate::Phase::Transfer)
                    && heard.done_ppm > UNDER_WAY_PPM
                    && !heard.over
            }
            false => scene.point.reached(),
        };
        let heard = scene.follow.wait(REACH, |heard| there(heard) || heard.over);
        let heard = heard.context("the step was not reached")?;
        // Who asked may hear of the end before the last frames are where they go.
        let reached = until(LAST, || there(&heard)).is_ok();
        Ok((heard, reached))
    }

    /// Does the fault. Answers with the proof.
    fn strike(&self, world: &mut World, scene: &Scene, heard: &Heard) -> Result<Value> {
        let struck = self.act(world, scene)?;
        self.was_phase(world, scene, struck["at_us"].as_u64().context("no time")?)?;
        Ok(json!({ "phase_shown": heard.phase, "done_ppm": heard.done_ppm, "struck": struck }))
    }

    /// Where the guests ran at the moment at which the fault was done; an error if that was not this step.
    fn was_phase(&self, world: &World, scene: &Scene, at_us: u64) -> Result<()> {
        let ran = |member: usize, host: &str| {
            let copies = world.copies(&world.guests[member].name);
            let here = |q: &&SeenQemu| host_of(&world.swarm, q).as_deref() == Some(host);
            copies.iter().filter(here).flat_map(SeenQemu::ran).collect::<Vec<_>>()
        };
        let covers = |ran: &[(u64, Option<u64>)]| ran_at(ran, at_us);
        let mut any = false;
        for member in 0..world.guests.len() {
            let source = ran(member, &scene.from[member]);
            let destination = ran(member, &scene.to[member]);
            let began = |(from, _): &(u64, Option<u64>)| (scene.started_us..=at_us).contains(from);
            let arrived = destination.iter().any(began);
            any |= arrived;
            let held = member == scene.held;
            let fits = match self.phase {
                Phase::Transfer | Phase::Disk | Phase::Ballot => covers(&source) && !arrived,
                Phase::Held => (!held || covers(&source)) && !arrived,
                // Nothing is decided before all are loaded.
                Phase::Mirrored | Phase::Stopped | Phase::Loaded => !covers(&source) && !arrived,
                Phase::Decided | Phase::Tail => !covers(&source) && (!held || !arrived),
                Phase::Running | Phase::Plugged => !covers(&source) && (!held || arrived),
                Phase::Turn => !covers(&source),
            };
            ensure!(fits, "at {at_us} it was not the step: {member} {source:?} {destination:?}");
        }
        ensure!(any || self.phase != Phase::Turn, "at {at_us} there was nothing to turn to");
        Ok(())
    }

    fn act(&self, world: &mut World, scene: &Scene) -> Result<Value> {
        match self.fault {
            Fault::Lead => kill_node(world, scene, &scene.from[0]),
            Fault::Source => kill_node(world, scene, &scene.from[1]),
            Fault::Proposer => kill_node(world, scene, &scene.to[0]),
            Fault::Destination => kill_node(world, scene, &scene.to[1]),
            Fault::Voter => {
                let voters = &scene.voters;
                let moves = |host: &&String| scene.from.contains(*host) || scene.to.contains(*host);
                let apart = voters.iter().find(|host| !moves(host));
                let voter = apart.or_else(|| voters.iter().find(|host| **host != scene.from[0]));
                let voter = voter.context("the lead is the only voter")?.clone();
                let done = kill_node(world, scene, &voter)?;
                Ok(merge(done, json!({ "voters": voters, "killed": voter })))
            }
            Fault::DestinationQemu => {
                let vm = world.guests[1].name.clone();
                let qemu = copy_on(&world.swarm, &world.qemus, &vm, &scene.to[1])?;
                let here = |q: &SeenQemu| q.pid == qemu.pid && !q.alive();
                act::kill_qemu(&qemu, &scene.point, || world.copies(&vm).iter().any(here))
            }
            Fault::WanCut => act::cut_wan(&world.swarm, &scene.point),
        }
    }

    /// Waits for the end as shown where it was asked for, then for what must come true soon after.
    fn facts(&self, world: &World, scene: &Scene) -> Result<Facts> {
        let left = judge::END.saturating_sub(scene.started.elapsed());
        let shown = ended(&world.swarm, &scene.follow, left)?;
        let ended_ms = u64::try_from(scene.started.elapsed().as_millis())?;
        let lost = usize::from(shown["phase"] == "lost");
        // Superseded copies go soon after the end is known, and those that may run, run.
        let names: Vec<String> = world.guests.iter().map(|g| g.name.clone()).collect();
        let _ = until(judge::TIDY, || {
            let one = |vm: &String| {
                let copies = world.copies(vm);
                copies.iter().filter(|q| q.alive()).count() == 1
                    && copies.iter().any(SeenQemu::runs)
            };
            names.iter().filter(|vm| one(vm)).count() + lost == names.len()
        });
        let runs_on: Vec<_> = names.iter().map(|vm| world.runs_on(vm)).collect();
        let mut verified = Vec::new();
        for (vm, host) in names.iter().zip(&runs_on) {
            verified.push(match host {
                Some(_) => Some(world.verify(vm)?),
                None => None,
            });
        }
        let (from, to) = (scene.from.clone(), scene.to.clone());
        let (started_us, ended_us) = (scene.started_us, now_us());
        Ok(Facts { from, to, started_us, ended_us, ended_ms, shown, runs_on, verified })
    }
}

fn kill_node(world: &mut World, scene: &Scene, host: &str) -> Result<Value> {
    let done = act::kill_node(&mut world.swarm, host, &scene.point)?;
    // Gone before a node that starts again could see it.
    scene.point.release()?;
    world.swarm.node_mut(host)?.start_ready(READY)?;
    Ok(done)
}
