//! Voters at three sites, split by a partition: the smaller side decides nothing, stops nothing and starts nothing.
//!
//! Owns that case. Both members and the lead are on the smaller side, which has the most to lose by waiting.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::qemus::double_runs;
use crate::lab::wan::{LinkParams, WanMode};
use crate::lab::{LabConfig, SiteConfig};
use crate::scenario::Swarm;
use crate::scenario::cluster::world::{CLUSTER, World};

/// Its name in the report.
pub const NAME: &str = "voters split, three sites";
/// How long anything may take that is refused in the end.
const REFUSED: Duration = Duration::from_secs(60);
/// How long all may take to agree again.
const HEALED: Duration = Duration::from_secs(60);

/// The report of a case that could not be finished.
pub fn broken(error: &str) -> Value {
    json!({ "case": NAME, "passed": false, "failures": [error] })
}

/// Runs it in a lab of its own.
pub fn run(labid: &str) -> Result<Value> {
    let sites = vec![
        SiteConfig::new("paris", &["h1", "h2"]),
        SiteConfig::new("tokyo", &["h3", "h4"]),
        SiteConfig::new("lima", &["h5"]),
    ];
    let wan = WanMode::Shaped(LinkParams::new(100, 40));
    let mut world = World::up(&LabConfig { labid: labid.to_owned(), sites, wan }, &[])?;
    world.populate(&[("a", "h1"), ("b", "h2")])?;
    let five = |_: &Swarm| Ok(world.voters("h1")?.len() == 5);
    world.swarm.wait("five voters at three sites", HEALED, five)?;
    let before = epoch(&world.swarm, "h1")?;
    let qemus = world.qemus.seen().len();
    let wan = world.swarm.lab.wan()?;
    for far in ["tokyo", "lima"] {
        wan.link("paris", far)?.cut()?;
    }
    let refused = during(&world)?;
    let stood = world.qemus.seen();
    let stopped: Vec<_> =
        stood.iter().filter(|q| q.ran().iter().any(|(_, to)| to.is_some())).collect();
    ensure!(stopped.is_empty(), "a guest was stopped: {stopped:?}");
    let far = ["h3", "h4", "h5"].map(|host| epoch(&world.swarm, host).ok());
    ensure!(far.iter().flatten().all(|e| *e == before), "the others decided: {far:?}");
    ensure!(epoch(&world.swarm, "h1")? == before, "the smaller side decided");
    for far in ["tokyo", "lima"] {
        world.swarm.lab.wan()?.link("paris", far)?.restore()?;
    }
    world.swarm.wait("all agree again", HEALED, |swarm| {
        let shown = |host: &str| swarm.ask(host, &["cluster", "show", CLUSTER]);
        let first = shown("h1")?;
        let same = ["h2", "h3", "h4", "h5"].map(shown).into_iter().collect::<Result<Vec<_>>>()?;
        Ok(same.iter().all(|s| s["epoch"] == first["epoch"] && s["members"] == first["members"]))
    })?;
    // What was begun without a majority may be decided with any later decree, or never: asked again, it is decided.
    world.swarm.wait("b has left", HEALED, |swarm| {
        let out = swarm.node("h2")?.cli(&["cluster", "remove", CLUSTER, "b"], REFUSED)?;
        Ok(out.ok() || out.stderr.contains("is no member"))
    })?;
    // Asked again while connections come back.
    world.swarm.wait("all are members again", HEALED, |swarm| {
        swarm.ask("h5", &["cluster", "create", CLUSTER, "--vms", "a,b"]).map(|_| true)
    })?;
    world.settled()?;
    let state = ["migrate", CLUSTER, "--to", "site:tokyo", "--wait"];
    let moved = world.swarm.node("h5")?.cli_json(&state, Duration::from_secs(120))?;
    let hosts = world.hosts()?;
    ensure!(moved["phase"] == "moved" && hosts.iter().all(|h| h == "h3" || h == "h4"), "{moved}");
    let mut corrupt = 0;
    for vm in ["a", "b"] {
        corrupt += world.verify(vm)?.pages_corrupt;
    }
    let double = double_runs(&world.qemus.seen());
    world.down()?;
    Ok(json!({
        "case": NAME,
        "passed": double.is_empty() && corrupt == 0,
        "failures": double,
        "outcome": "stayed",
        "refused": refused,
        "qemus_before": qemus,
        "epoch": before,
        "double_runs": double.len(),
        "split_clusters": 0,
        "pages_corrupt": corrupt,
    }))
}

/// What each side is asked for while they cannot reach each other, and what it says.
fn during(world: &World) -> Result<Value> {
    let lines = |host: &str, args: &[&str]| -> Result<String> {
        let out = world.swarm.node(host)?.cli(args, REFUSED)?;
        ensure!(!out.ok(), "{args:?} on {host} was done: {}", out.stdout);
        Ok(format!("{}{}", out.stdout, out.stderr).trim().to_owned())
    };
    // Both ends are here: only a majority is missing.
    let moves = ["migrate", CLUSTER, "--place", "b=h1", "--deadline", "8s", "--wait"];
    let stayed = world.swarm.node("h1")?.cli_json(&moves, REFUSED);
    let stayed = match stayed {
        Ok(shown) => shown,
        Err(_) => newest(&world.swarm, "h1")?,
    };
    ensure!(stayed["phase"] == "stayed", "{stayed}");
    let started = world.qemus.seen().into_iter().filter(|q| q.vm == "b" && !q.ran().is_empty());
    ensure!(started.count() == 1, "a second copy of b ran");
    let left = lines("h2", &["cluster", "remove", CLUSTER, "b"])?;
    // Three of five voters answer there, so there is nothing to force; and they run nothing of it.
    let forced = lines("h4", &["cluster", "force", CLUSTER, "--i-am-sure"])?;
    ensure!(forced.contains("can decide"), "{forced}");
    let taken = lines("h5", &["migrate", CLUSTER, "--to", "h3"])?;
    Ok(json!({ "moved": stayed["cause"], "left": left, "forced": forced, "taken": taken }))
}

fn newest(swarm: &Swarm, host: &str) -> Result<Value> {
    let all = swarm.ask(host, &["migrations"])?;
    all.as_array().and_then(|all| all.last().cloned()).context("no migration is known")
}

fn epoch(swarm: &Swarm, host: &str) -> Result<u64> {
    let shown = swarm.ask(host, &["cluster", "show", CLUSTER])?;
    shown["epoch"].as_u64().context("no epoch")
}
