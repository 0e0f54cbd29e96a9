//! A cut link, or a node that was killed, after 10, 50 and 90 % of a disk of 2 GB: what crossed before stays.
//!
//! Owns the moves and the judgement. Hosts keep nothing of earlier moves, so that every move starts from nothing; what
//! crosses twice is what a disturbed move has more on the link than an undisturbed one. The disk is full, and its guest never
//! touches it: what a guest has read of its disk is in its memory, too, and it is chance which of the two crosses. A source
//! that was killed ends its move: it is asked for again, and both tries count.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::faults::follow::{Follow, Pace};
use super::super::faults::world::{Cast, REQUESTER, World};
use super::other_site;
use crate::guest::disk::DiskForm;
use crate::lab::node::Node;
use crate::lab::wan::LinkParams;

/// Size of the disk, MiB.
const DISK_MIB: u32 = 2048;
/// Percent of the disk's bytes that have crossed when it is hit.
const AT: [u64; 3] = [10, 50, 90];
/// Most that may cross twice, of what had crossed before.
const TWICE_MAX: f64 = 0.05;
/// How long the WAN is cut.
const CUT: Duration = Duration::from_secs(5);
/// How long a move may take.
const MOVE: Duration = Duration::from_secs(300);
/// How long a node may take to be ready again.
const READY: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug)]
enum Hit {
    Nothing,
    Cut,
    KillDestination,
    KillSource,
}

fn forgetful(node: &mut Node) {
    node.arg("--keep-bytes").arg("0");
}

/// `godwit-lab run disk-resume`: about twenty minutes.
pub fn run_all() -> Result<Value> {
    let cast = Cast {
        churn: (16, 0),
        disks: vec![(DiskForm::Raw, DISK_MIB)],
        full: true,
        link: LinkParams::new(200, 40),
        dress: forgetful,
        ..Cast::plain()
    };
    let mut world = World::up("dresume", cast)?;
    let done = moves(&mut world);
    if done.is_err() {
        world.keep_logs("disk-resume");
    }
    world.down()?;
    done
}

fn moves(world: &mut World) -> Result<Value> {
    let (plain, plain_disk) = one(world, Hit::Nothing, 0)?;
    println!("undisturbed: {plain} bytes, {plain_disk} of the disk");
    let mut steps = Vec::new();
    for hit in [Hit::Cut, Hit::KillDestination, Hit::KillSource] {
        for percent in AT {
            let before = plain_disk * percent / 100;
            let (bytes, disk) = one(world, hit, before)?;
            let twice = bytes.saturating_sub(plain);
            let share = twice as f64 / before as f64;
            let step = json!({"hit": format!("{hit:?}"), "percent": percent, "bytes_before": before,
                "wan_bytes": bytes, "disk_wan_bytes": disk, "wan_bytes_undisturbed": plain,
                "sent_again": twice, "share": share, "passed": share <= TWICE_MAX});
            println!("{step}");
            steps.push(step);
        }
    }
    let passed = steps.iter().all(|step| step["passed"] == true);
    Ok(json!({"scenario": "disk-resume", "passed": passed, "steps": steps}))
}

/// One move to the other site, hit when `at` bytes have crossed; bytes on the link, and of these the disk's own.
fn one(world: &mut World, hit: Hit, at: u64) -> Result<(u64, u64)> {
    let (guest, source) = world.guest()?;
    let to = other_site(world)?;
    world.settled(&guest.name, &source)?;
    let wan = |world: &World| world.swarm.lab.wan().and_then(|wan| wan.stats());
    let before = wan(world)?;
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let follow = Follow::start(&state, &guest.name, to, Pace::default())?;
    if !matches!(hit, Hit::Nothing) {
        let crossed = |world: &World| Ok(wan(world)?.since(&before).carried_bytes() >= at);
        world.swarm.wait("as much has crossed", MOVE, |_| crossed(world))?;
    }
    match hit {
        Hit::Nothing => {}
        Hit::Cut => {
            world.swarm.lab.wan()?.cut()?;
            // The fault's own length.
            std::thread::sleep(CUT);
            world.swarm.lab.wan()?.restore()?;
        }
        Hit::KillDestination => world.swarm.node_mut(to)?.restart(READY)?,
        Hit::KillSource => world.swarm.node_mut(&source)?.restart(READY)?,
    }
    let mut status = world.ended(&follow, MOVE)?;
    if matches!(hit, Hit::KillSource) {
        ensure!(status["phase"] == "stayed", "{hit:?}: {status}");
        world.settled(&guest.name, &source)?;
        status = world.ended(&Follow::start(&state, &guest.name, to, Pace::default())?, MOVE)?;
    }
    ensure!(status["phase"] == "moved", "{hit:?}: {status}");
    let bytes = wan(world)?.since(&before).carried_bytes();
    // What is kept although nothing should be would make the next move cheap.
    let kept = fs::read_dir(world.swarm.node(&source)?.state_dir().join("kept"));
    ensure!(kept.map_or(0, Iterator::count) == 0, "{source} keeps content");
    Ok((bytes, status["disk_wan_bytes"].as_u64().unwrap_or(0)))
}
