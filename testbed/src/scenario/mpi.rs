//! A real Open MPI job over TCP on the wire of four Debian guests, which move as one cluster to another site and back
//! while it runs.
//!
//! Owns the steps and what they call passed. The job checks every block itself (`guest/mpi/ring.c`); where guests run is
//! judged by the events of their QEMUs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::cluster::world::{CLUSTER, World, two_sites};
use super::faults::follow::{Follow, Pace};
use super::faults::world::{REQUESTER, ended};
use super::swarm::run;
use crate::guest::{Cache, GuestFiles};
use crate::lab::qemus::double_runs;

/// The members and where they start: two on each of two hosts.
const MEMBERS: [(&str, &str); 4] = [("m1", "h1"), ("m2", "h1"), ("m3", "h2"), ("m4", "h2")];
/// Where they move.
const THERE: [(&str, &str); 4] = [("m1", "h4"), ("m2", "h4"), ("m3", "h5"), ("m4", "h5")];
/// MiB of each guest.
const MEMORY_MIB: u32 = 224;
/// Messages that must have gone around before the job may end.
const MESSAGES: u64 = 20_000;
/// Between the sites, milliseconds there and back.
const RTT_MS: u64 = 80;
/// How long a move may take under emulated CPUs.
const MOVE: Duration = Duration::from_secs(400);
/// How long the job may take to begin, and to end.
const JOB: Duration = Duration::from_secs(400);
/// What the guests' addresses begin with.
const NET: &str = "10.9.0.1";

/// Runs it.
pub fn mpi() -> Result<Value> {
    let files = GuestFiles::prepare_mpi(&Cache::open()?)?;
    let mut world = World::up(&two_sites("mpi", RTT_MS), &[])?;
    if let Some(base) = &files.base_image {
        let base = base.to_str().context("path")?;
        for host in ["h1", "h2", "h4", "h5"] {
            let node = world.swarm.node(host)?;
            node.cli_json(&["image", "add", base], Duration::from_secs(300))?;
        }
    }
    let done = with_job(&mut world, &files);
    if done.is_err() {
        world.swarm.keep_logs("mpi", &world.qemus);
    }
    world.down()?;
    done
}

fn with_job(world: &mut World, files: &GuestFiles) -> Result<Value> {
    let began = Instant::now();
    println!("==> four guests boot");
    world.populate_with(&MEMBERS, files, MEMORY_MIB)?;
    let job = Job::start(world)?;
    let hosts_before = world.hosts()?;
    let mut moves = Vec::new();
    for to in [&THERE, &MEMBERS] {
        moves.push(moved(world, &job, to)?);
    }
    let hosts_after = world.hosts()?;
    println!("==> the job ends");
    let verdict = job.end(world)?;
    let probes = world.hang_up();
    let lost: u64 = probes.iter().map(|probe| probe.lost).sum();
    let reordered: u64 = probes.iter().map(|probe| probe.reordered).sum();
    let straight = (lost, reordered) == (0, 0);
    let double = double_runs(&world.qemus.seen());
    let during: u64 = moves.iter().filter_map(|m| m["messages"].as_u64()).sum();
    let each = moves.iter().all(|m| m["messages"].as_u64() > Some(0));
    let ok = verdict.errors == 0 && verdict.ranks == MEMBERS.len() as u64;
    let back = hosts_after == hosts_before;
    Ok(json!({
        "scenario": "mpi",
        "passed": ok && each && back && straight && verdict.messages >= MESSAGES && double.is_empty(),
        "ranks": verdict.ranks,
        "hosts_before": hosts_before,
        "hosts_between": moves.first().map(|m| m["hosts"].clone()),
        "hosts_after": hosts_after,
        "moves": moves.len(),
        "messages": verdict.messages,
        "messages_during_moves": during,
        "checksum_ok": ok,
        "frames_lost": lost,
        "frames_reordered": reordered,
        "seconds": began.elapsed().as_secs(),
        "epochs": moves.iter().map(|m| m["epochs"].clone()).collect::<Vec<_>>(),
        "each_move": moves,
        "double_runs": double,
    }))
}

/// Moves all members while the job runs.
fn moved(world: &World, job: &Job, place: &[(&str, &str)]) -> Result<Value> {
    println!("==> they move to {place:?}");
    let before = job.messages(world)?;
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let follow = Follow::placed(&state, CLUSTER, "", place, Pace::default())?;
    let shown = ended(&world.swarm, &follow, MOVE)?;
    let after = job.messages(world)?;
    ensure!(shown["phase"] == "moved", "it did not move: {shown}");
    let hosts = world.hosts()?;
    let wanted: Vec<&str> = place.iter().map(|(_, host)| *host).collect();
    ensure!(hosts == wanted, "they run on {hosts:?}, not {wanted:?}");
    // It goes on where it is now.
    job.reaches(world, after + 100)?;
    Ok(json!({
        "hosts": hosts,
        "messages": after.saturating_sub(before),
        "epochs": [shown["epoch_before"], shown["epoch_after"]],
        "total_ms": shown["total_ms"],
        "downtime_us": shown["downtime_us"],
        "stop_spread_us": shown["stop_spread_us"],
        "resume_spread_us": shown["resume_spread_us"],
    }))
}

/// The job, as its first rank tells of it.
struct Job;

struct Verdict {
    ranks: u64,
    messages: u64,
    errors: u64,
}

impl Job {
    fn shell(world: &World, vm: &str, line: &str) -> Result<String> {
        run(async { world.control(vm)?.shell(line).await })
    }

    fn start(world: &World) -> Result<Self> {
        println!("==> the job begins");
        let addresses: Vec<String> = (1..=MEMBERS.len()).map(|n| format!("{NET}{n}")).collect();
        let names = MEMBERS.iter().zip(&addresses).map(|((name, _), ip)| format!("{ip} {name}"));
        let names = names.collect::<Vec<_>>().join("\\n");
        for (name, _) in MEMBERS {
            let line = format!(
                "hostname {name} && printf '{names}\\n' >>/etc/hosts && systemctl is-active rshd"
            );
            Self::shell(world, name, &line)?;
        }
        let options = "--mca plm_rsh_agent /usr/local/bin/rsh --mca plm_rsh_no_tree_spawn 1 \
            --mca btl tcp,self --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 \
            --mca mpi_yield_when_idle 1";
        let hosts = addresses.join(",");
        let line = format!(
            "export HOME=/root OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; \
             setsid mpirun {options} --host {hosts} -np {} /usr/local/bin/ring /run/mpi.told \
             /run/mpi.stop {MESSAGES} </dev/null >/run/mpi.out 2>&1 &",
            MEMBERS.len()
        );
        Self::shell(world, MEMBERS[0].0, &line)?;
        let job = Self;
        job.reaches(world, 200)?;
        Ok(job)
    }

    /// How many messages went around so far.
    fn messages(&self, world: &World) -> Result<u64> {
        let told = Self::shell(world, MEMBERS[0].0, "cat /run/mpi.told 2>/dev/null || true")?;
        let words: Vec<u64> = told.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        match words.as_slice() {
            [_, messages, 0] => Ok(*messages),
            [_, _, errors] => bail!("{errors} blocks were wrong"),
            _ => Ok(0),
        }
    }

    /// Waits until so many did.
    fn reaches(&self, world: &World, messages: u64) -> Result<()> {
        let end = Instant::now() + JOB;
        while Instant::now() < end {
            if self.messages(world)? >= messages {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        let said = Self::shell(world, MEMBERS[0].0, "tail -c 800 /run/mpi.out")?;
        bail!("the job does not go on: {said}")
    }

    /// Lets it end; its own verdict.
    fn end(&self, world: &World) -> Result<Verdict> {
        Self::shell(world, MEMBERS[0].0, "touch /run/mpi.stop")?;
        let end = Instant::now() + JOB;
        while Instant::now() < end {
            let line = "grep ^verdict: /run/mpi.out || true";
            let said = Self::shell(world, MEMBERS[0].0, line)?;
            let numbers: Vec<u64> =
                said.split_whitespace().filter_map(|w| w.parse().ok()).collect();
            if let [ranks, _, messages, errors] = numbers.as_slice() {
                return Ok(Verdict { ranks: *ranks, messages: *messages, errors: *errors });
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        let said = Self::shell(world, MEMBERS[0].0, "tail -c 800 /run/mpi.out")?;
        bail!("the job does not end: {said}")
    }
}
