//! Guests that move together, and what may go wrong on the way without harm.
//!
//! Owns the small scenario's steps. Where a guest runs is judged by the events of every QEMU, its memory by its own
//! check; the node's word is compared with that, never taken for it.

pub mod faults;
pub mod off;
pub mod world;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::faults::follow::{Follow, Pace};
use super::faults::world::{REQUESTER, ended};
use super::steps::Steps;
use crate::lab::qemus::double_runs;
use world::{CLUSTER, World, two_sites};

/// How long a move may take.
const MOVE: Duration = Duration::from_secs(90);
/// Bytes per second of a move that shall still be in its transfer when it is hit.
const SLOW: Pace = Pace { link: 3_000_000, disk: 0 };
/// Pages that each guest's workload has at least.
const PAGES: u64 = 4_000;
/// The members and where they start.
const MEMBERS: [(&str, &str); 3] = [("a", "h1"), ("b", "h2"), ("c", "h2")];

/// Runs it.
pub fn small() -> Result<Value> {
    let mut world = World::up(&two_sites("cluster", 20), &[])?;
    world.populate(&MEMBERS)?;
    let mut steps = Steps::default();
    let mut step = |name: &str, world: &mut World, work: fn(&mut World) -> Result<Value>| {
        steps.step(name, || world.settled().and_then(|()| work(world)));
    };
    step("what would happen", &mut world, dry);
    step("all to the other site", &mut world, there);
    step("a member alone, by its own name", &mut world, refused);
    step("aborted", &mut world, aborted);
    step("a source's daemon is killed", &mut world, killed);
    step("back, each to its host", &mut world, back);
    step("one of them alone", &mut world, alone);
    step("a host is drained and is not", &mut world, drained);
    step("most voters are lost, and come back", &mut world, forced);
    step("one leaves, one ends, the rest part", &mut world, parted);
    steps.step("a voter is revoked", || revoked(&mut world));
    let double = double_runs(&world.qemus.seen());
    world.down()?;
    let passed = steps.passed() && double.is_empty();
    let steps = steps.report();
    Ok(json!({ "scenario": "cluster", "passed": passed, "steps": steps, "double_runs": double }))
}

/// Moves members by the node that is asked, to the end.
fn moved(world: &World, to: &str, place: &[(&str, &str)]) -> Result<Value> {
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let follow = Follow::placed(&state, CLUSTER, to, place, Pace::default())?;
    let shown = ended(&world.swarm, &follow, MOVE)?;
    ensure!(shown["phase"] == "moved", "it did not move: {shown}");
    let (before, after) = (shown["epoch_before"].as_u64(), shown["epoch_after"].as_u64());
    ensure!(before.map(|e| e + 1) == after, "not one epoch: {before:?} {after:?}");
    Ok(json!({
        "total_ms": shown["total_ms"],
        "downtime_us": shown["downtime_us"],
        "stop_spread_us": shown["stop_spread_us"],
        "resume_spread_us": shown["resume_spread_us"],
    }))
}

/// Every member runs where it should, by the QEMUs' events and by the record, with whole memory.
fn whole(world: &World, hosts: &[&str]) -> Result<()> {
    let run = world.hosts()?;
    ensure!(run == hosts, "they run on {run:?}, not {hosts:?}");
    let shown = world.cluster("h4")?;
    let named = shown["members"].as_array().context("no members")?;
    let named: Vec<&str> = named.iter().filter_map(|m| m["host"].as_str()).collect();
    ensure!(named == hosts, "the record names {named:?}, not {hosts:?}");
    for guest in &world.guests {
        let v = world.verify(&guest.name)?;
        ensure!(v.pages_corrupt == 0, "{}: {v:?}", guest.name);
        ensure!(v.pages_verified >= PAGES, "{}: only {} pages", guest.name, v.pages_verified);
    }
    Ok(())
}

fn dry(world: &mut World) -> Result<Value> {
    let plan = world.swarm.ask("h5", &["migrate", CLUSTER, "--to", "site:tokyo", "--dry-run"])?;
    ensure!(plan["fits"] == true, "{plan}");
    let to: Vec<&str> = plan["placement"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|p| p["to"].as_str())
        .collect();
    ensure!(to.len() == 3 && to.contains(&"h4") && to.contains(&"h5"), "not spread: {plan}");
    let busy = ["migrate", CLUSTER, "--place", "a=h2", "--to", "h1,h2", "--dry-run"];
    let plan = world.swarm.ask("h1", &busy)?;
    let stays = |at: usize| plan["placement"][at]["to"].is_null();
    ensure!(plan["placement"][0]["to"] == "h2" && stays(1) && stays(2), "{plan}");
    whole(world, &["h1", "h2", "h2"])?;
    Ok(json!({ "to": plan["placement"] }))
}

fn there(world: &mut World) -> Result<Value> {
    let figures = moved(world, "h4,h5", &[("a", "h4"), ("b", "h5")])?;
    let c = world.hosts()?.pop().context("no third")?;
    whole(world, &["h4", "h5", &c])?;
    Ok(figures)
}

fn refused(world: &mut World) -> Result<Value> {
    let out = world.swarm.node("h1")?.cli(&["migrate", "a", "--to", "h1", "--json"], MOVE)?;
    ensure!(out.code == 1 && out.stdout.contains("--place a=HOST"), "{out:?}");
    let out = world.swarm.node("h1")?.cli(&["vm", "show", CLUSTER, "--json"], MOVE)?;
    ensure!(out.code == 1 && out.stdout.contains("is a cluster"), "{out:?}");
    out.json()
}

/// Begins to move back so slowly that it can be hit; waits until pages cross.
fn slowly(world: &World) -> Result<Follow> {
    world.restless(true)?;
    let state = world.swarm.node(REQUESTER)?.state_dir().to_owned();
    let place = [("a", "h1"), ("b", "h2"), ("c", "h2")];
    let follow = Follow::placed(&state, CLUSTER, "", &place, SLOW)?;
    follow.wait(MOVE, |heard| heard.done_ppm > 50_000)?;
    Ok(follow)
}

/// All stayed where they were, by the node's word and by the QEMUs' events.
fn stayed(world: &World, follow: &Follow, hosts: &[String]) -> Result<Value> {
    let shown = ended(&world.swarm, follow, MOVE)?;
    world.restless(false)?;
    ensure!(shown["phase"] == "stayed", "{shown}");
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    whole(world, &hosts)?;
    Ok(json!({ "cause": shown["cause"] }))
}

fn aborted(world: &mut World) -> Result<Value> {
    let hosts = world.hosts()?;
    let follow = slowly(world)?;
    world.swarm.ask("h2", &["abort", &follow.id.to_string()])?;
    stayed(world, &follow, &hosts)
}

fn killed(world: &mut World) -> Result<Value> {
    let hosts = world.hosts()?;
    let follow = slowly(world)?;
    // It runs the second member; the first one's host leads.
    world.swarm.node_mut("h5")?.restart(Duration::from_secs(30))?;
    stayed(world, &follow, &hosts)
}

fn back(world: &mut World) -> Result<Value> {
    let figures = moved(world, "", &MEMBERS)?;
    whole(world, &["h1", "h2", "h2"])?;
    Ok(figures)
}

fn alone(world: &mut World) -> Result<Value> {
    let figures = moved(world, "", &[("c", "h1")])?;
    whole(world, &["h1", "h2", "h1"])?;
    Ok(figures)
}

fn drained(world: &mut World) -> Result<Value> {
    let drained = world.swarm.ask("h4", &["drain"])?;
    ensure!(drained["votes"].as_array().is_some_and(Vec::is_empty), "{drained}");
    let plan = world.swarm.ask("h1", &["migrate", CLUSTER, "--to", "site:tokyo", "--dry-run"])?;
    let to = plan["placement"].as_array().into_iter().flatten();
    ensure!(to.clone().count() == 3 && to.clone().all(|p| p["to"] == "h5"), "{plan}");
    let plan = world.swarm.ask("h1", &["migrate", CLUSTER, "--to", "h4", "--dry-run"])?;
    ensure!(plan["fits"] == false && plan["placement"][0]["refused"] != "", "{plan}");
    let voters = world.voters("h1")?;
    ensure!(!voters.contains(&"h4".to_owned()), "{voters:?}");
    let back = world.swarm.ask("h4", &["drain", "--undo"])?;
    ensure!(back["draining"] == false, "{back}");
    Ok(json!({ "done": drained["done"] }))
}

/// A record is forced only when no majority answers; whoever comes back takes it for what it is.
fn forced(world: &mut World) -> Result<Value> {
    let force = ["cluster", "force", CLUSTER, "--i-am-sure", "--why", "a test"];
    let out = world.swarm.node("h1")?.cli(&force, MOVE)?;
    ensure!(!out.ok() && out.stderr.contains("can decide"), "{out:?}");
    let hosts = world.hosts()?;
    let voters = world.voters("h1")?;
    let [one, two, ..] = voters.as_slice() else { anyhow::bail!("few voters: {voters:?}") };
    for lost in [one, two] {
        // Its guests run on.
        world.swarm.node_mut(lost)?.kill9()?;
    }
    let names = ["h1", "h2", "h3", "h4", "h5"];
    let asked = names.into_iter().find(|n| n != one && n != two).context("all were voters")?;
    let shown = world.swarm.node(asked)?.cli_json(&force, MOVE)?;
    ensure!(shown["voters"] == json!([asked]), "{shown}");
    let cause = shown["cause"].as_str().unwrap_or_default();
    ensure!(cause.starts_with("forced: by ") && cause.ends_with(": a test"), "{cause}");
    for back in [one, two] {
        world.swarm.node_mut(back)?.start_ready(Duration::from_secs(30))?;
    }
    world.settled()?;
    world.swarm.wait("all agree", MOVE, |swarm| {
        let shown = |host: &str| swarm.ask(host, &["cluster", "show", CLUSTER]);
        let told = names.map(shown).into_iter().collect::<Result<Vec<_>>>()?;
        Ok(told.iter().all(|s| s["epoch"] == told[0]["epoch"]))
    })?;
    whole(world, &hosts.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(json!({ "cause": cause, "epoch": shown["epoch"] }))
}

fn parted(world: &mut World) -> Result<Value> {
    let left = world.swarm.ask("h5", &["cluster", "remove", CLUSTER, "c"])?;
    ensure!(left["members"].as_array().is_some_and(|m| m.len() == 2), "{left}");
    let out = world.swarm.node("h3")?.cli_json(&["migrate", "c", "--to", "h5", "--wait"], MOVE)?;
    ensure!(out["phase"] == "moved" && world.runs_on("c").as_deref() == Some("h5"), "{out}");
    world.swarm.ask("h2", &["vm", "stop", "b", "--kill"])?;
    let shown = world.cluster("h3")?;
    ensure!(shown["members"].as_array().is_some_and(|m| m.len() == 1), "{shown}");
    world.swarm.ask("h4", &["cluster", "delete", CLUSTER])?;
    let none = |swarm: &super::Swarm| {
        let all = swarm.ask("h2", &["cluster", "list"])?;
        let vms = swarm.ask("h2", &["vm", "list"])?;
        Ok(all.as_array().is_some_and(Vec::is_empty)
            && vms.as_array().is_some_and(|vms| vms.len() == 2))
    };
    world.swarm.wait("the cluster and b are gone", Duration::from_secs(20), none)?;
    let runs = ["a", "c"].map(|vm| world.runs_on(vm));
    ensure!(runs == [Some("h1".into()), Some("h5".into())], "{runs:?}");
    Ok(json!({ "runs": runs }))
}

/// Its votes go to another host first, and then it is no member any more.
fn revoked(world: &mut World) -> Result<Value> {
    world.swarm.ask("h1", &["cluster", "create", CLUSTER, "--vms", "a,c"])?;
    world.swarm.wait("three voters", MOVE, |_| Ok(world.voters("h1")?.len() >= 3))?;
    let had = world.voters("h1")?;
    let out = had.iter().find(|host| !["h1", "h5"].contains(&host.as_str()));
    let out = out.with_context(|| format!("all voters run a guest: {had:?}"))?.clone();
    let refused = world.swarm.node("h1")?.cli(&["revoke", "h5"], MOVE)?;
    ensure!(!refused.ok() && refused.stderr.contains("VMs run on h5: c"), "{refused:?}");
    world.swarm.ask("h1", &["revoke", &out])?;
    let has = world.voters("h1")?;
    ensure!(has.len() >= 3 && !has.contains(&out), "{out} is revoked, and they vote: {has:?}");
    world.swarm.wait("nobody counts it as a host", MOVE, |swarm| {
        let hosts = swarm.ask("h5", &["hosts"])?;
        let alive = |h: &Value| h["name"] == out.as_str() && h["state"] == "alive";
        Ok(!hosts.as_array().into_iter().flatten().any(alive))
    })?;
    // And it decides without it.
    world.swarm.ask("h5", &["cluster", "delete", CLUSTER])?;
    Ok(json!({ "revoked": out, "voters_before": had, "voters_after": has }))
}
