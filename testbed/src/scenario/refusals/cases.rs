//! The attempts that must be refused, by what is wrong with them.
//!
//! Owns the cases and the words that each must be answered with.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::footprint::Footprint;
use super::{COMMAND, Expect, Judge, World};
use crate::lab::node::{CliOutput, godwit_binary, run_with_deadline};
use crate::scenario::Guest;
use crate::scenario::swarm::run;

/// Exit code 1 and these words.
const fn says(words: &'static [&'static str]) -> Expect {
    Expect { code: 1, says: words }
}

/// Specifications that are wrong by themselves, or ask for what this host cannot give.
pub(super) fn specs(world: &World, judge: &mut Judge) -> Result<()> {
    let good = "name = \"x\"\nmemory = \"64M\"\n";
    let disk = "[[disk]]\npath = \"/dev/null\"\nformat = \"raw\"\n";
    let passthrough = "[[hostdev]]\naddress = \"0000:ff:1f.7\"\n";
    let cases: [(&str, String, &'static [&'static str]); 12] = [
        ("spec is no TOML", "name = = \"x\"".into(), &["spec line 1"]),
        ("spec with an unknown key", format!("{good}colour = \"red\"\n"), &["line 3", "colour"]),
        ("spec without memory", "name = \"x\"\n".into(), &["memory"]),
        ("memory that is no size", "name = \"x\"\nmemory = \"lots\"".into(), &["512M"]),
        ("memory below the least", "name = \"x\"\nmemory = \"1M\"".into(), &["16M to 16T"]),
        ("memory that overflows", format!("name = \"x\"\nmemory = \"{}T\"", u64::MAX), &["memory"]),
        ("no virtual CPU", format!("{good}vcpus = 0\n"), &["vcpus", "1 to 255"]),
        ("a name that is none", good.replace('x', "X y"), &["name"]),
        ("unversioned machine", format!("{good}machine = \"q35\"\n"), &["pc-q35-10.0"]),
        ("disk of no bytes", format!("{good}{disk}"), &["multiple of 4096"]),
        ("passthrough that is not here", format!("{good}{passthrough}"), &["0000:ff:1f.7"]),
        (
            "more than the host lends",
            "name = \"x\"\nmemory = \"8T\"".into(),
            &["8388608 MiB", "limit"],
        ),
    ];
    for (name, text, words) in cases {
        let path = world.spec("bad.toml", &text)?;
        world.refused(judge, name, ("h1", &["vm", "run", &path]), &says(words))?;
    }
    let cpu = world.spec("bad.toml", &format!("{good}cpu = \"Skylake-Server-v4\"\n"))?;
    let expect = says(&["Skylake-Server-v4", "avx512", "choose"]);
    world.refused(judge, "CPU feature that QEMU lacks", ("h1", &["vm", "run", &cpu]), &expect)?;
    let cpu = world.spec("bad.toml", &format!("{good}cpu = \"nonesuch\"\n"))?;
    let expect = says(&["nonesuch"]);
    world.refused(judge, "CPU that is none", ("h1", &["vm", "run", &cpu]), &expect)?;
    let expect = says(&["/nowhere.toml"]);
    world.refused(judge, "no such file", ("h1", &["vm", "run", "/nowhere.toml"]), &expect)?;
    let twin = world.spec("bad.toml", "name = \"web\"\nmemory = \"64M\"")?;
    let expect = says(&["called web already", "another name"]);
    world.refused(judge, "a name that is taken", ("h3", &["vm", "run", &twin]), &expect)?;
    match &world.old {
        Ok(_) => {
            let text = format!("{good}machine = \"pc-q35-10.0\"\n");
            let path = world.spec("bad.toml", &text)?;
            let expect = says(&["does not know machine type pc-q35-10.0", "newer QEMU"]);
            world.refused(judge, "machine too new here", ("old", &["vm", "run", &path]), &expect)
        }
        Err(cause) => {
            judge.skip("machine too new here", &format!("{cause:#}"));
            Ok(())
        }
    }
}

/// Names and ids that are nobody's.
pub(super) fn names(world: &World, judge: &mut Judge) -> Result<()> {
    let id = "00112233445566778899aabbccddeeff";
    let cases: [(&str, &[&str], &'static [&'static str]); 13] = [
        ("unknown host", &["migrate", "web", "--to", "nowhere"], &["nowhere", "godwit hosts"]),
        ("unknown site", &["migrate", "web", "--to", "site:mars"], &["mars", "godwit hosts"]),
        ("a target that is none", &["migrate", "web", "--to", "Not A Host"], &["godwit hosts"]),
        ("unknown VM", &["migrate", "nobody", "--to", "h3"], &["nobody", "godwit vm list"]),
        ("unknown VM shown", &["vm", "show", "nobody"], &["nobody", "godwit vm list"]),
        ("unknown VM stopped", &["vm", "stop", "nobody"], &["nobody", "godwit vm list"]),
        ("VM stopped elsewhere", &["vm", "stop", "web"], &["runs on h1", "ask there"]),
        ("where it is already", &["migrate", "web", "--to", "h1"], &["runs on h1 already"]),
        ("unknown migration", &["migrations", "show", id], &["godwit migrations"]),
        ("no id of a migration", &["migrations", "show", "x"], &["32 hexadecimal"]),
        ("unknown migration aborted", &["abort", id], &["godwit migrations"]),
        ("unknown host revoked", &["revoke", "nowhere"], &["nowhere", "godwit hosts"]),
        ("image that is not there", &["image", "add", "/nowhere.img"], &["/nowhere.img"]),
    ];
    for (name, args, words) in cases {
        world.refused(judge, name, ("h3", args), &says(words))?;
    }
    Ok(())
}

/// Tokens that do not admit.
pub(super) fn tokens(world: &World, judge: &mut Judge) -> Result<()> {
    let node = world.swarm.node("h3")?;
    let token = |ttl: &str| -> Result<String> {
        let token = world.swarm.ask("h1", &["token", "--ttl", ttl])?;
        Ok(token["token"].as_str().context("no token")?.to_owned())
    };
    // A stranger: another state directory on a host of the lab.
    let join = |state: &str, token: &str| -> Result<CliOutput> {
        let mut command = node.host().command(&godwit_binary()?.to_string_lossy());
        command.arg("--state").arg(node.host().work_dir.join(state));
        command.args(["join", token, "--site", "paris", "--name", state]);
        run_with_deadline(command, COMMAND)
    };
    let before = Footprint::take(&world.swarm)?;
    let attempt = |judge: &mut Judge, name: &str, words, out: &CliOutput| -> Result<()> {
        judge.judge(name, &says(words), out, world.changed(&before)?);
        Ok(())
    };
    attempt(judge, "garbage token", &["token"], &join("s1", "not-a-token")?)?;
    let expired = token("1s")?;
    let cut = &expired[..expired.len() - 3];
    attempt(judge, "half a token", &["token"], &join("s2", cut)?)?;
    std::thread::sleep(Duration::from_millis(2100));
    attempt(judge, "expired token", &["expired", "godwit token"], &join("s3", &expired)?)?;
    let good = token("1h")?;
    let first = join("s4", &good)?;
    ensure!(first.ok(), "a good token: {}{}", first.stdout, first.stderr);
    attempt(judge, "used token", &["used", "godwit token"], &join("s5", &good)?)?;
    let fresh = token("1h")?;
    attempt(judge, "a member that joins again", &["already"], &join("s4", &fresh)?)?;
    Ok(())
}

/// Daemons that cannot start or are not there.
pub(super) fn daemons(world: &World, judge: &mut Judge) -> Result<()> {
    let node = world.swarm.node("h1")?;
    let program = godwit_binary()?;
    let state = node.state_dir().to_string_lossy().into_owned();
    let long = format!("{state}/{}", "long/".repeat(24));
    let listen = "127.0.0.1:7999";
    let before = Footprint::take(&world.swarm)?;
    let mut attempt = |name: &str, start: &[&str], args: &[&str], words| -> Result<()> {
        let mut command: Command = match start {
            [first, rest @ ..] => {
                let mut command = node.host().command(first);
                command.args(rest).arg(&program);
                command
            }
            [] => node.host().command(&program.to_string_lossy()),
        };
        command.args(args);
        let out = run_with_deadline(command, COMMAND)?;
        judge.judge(name, &says(words), &out, world.changed(&before)?);
        Ok(())
    };
    let run_there = ["run", "--state", &state, "--listen", listen];
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
    ];
    attempt("no root", &nobody, &run_there, &["needs root", "sudo"])?;
    attempt("second daemon", &[], &run_there, &["another godwit daemon", "--state"])?;
    attempt("no daemon", &[], &["--state", "/nowhere", "vm", "list"], &["godwit run"])?;
    attempt(
        "no swarm",
        &[],
        &["run", "--state", "/run/godwit-lab/refuse/h1/absent"],
        &["godwit init"],
    )?;
    attempt(
        "state path too long",
        &[],
        &["init", "--state", &long, "--site", "paris", "--name", "x"],
        &["too long", "--state"],
    )?;
    let stale = node.host().work_dir.join("stale");
    std::fs::create_dir_all(&stale)?;
    drop(std::os::unix::net::UnixListener::bind(stale.join("api.sock"))?);
    ensure!(UnixStream::connect(stale.join("api.sock")).is_err());
    let stale = stale.to_string_lossy().into_owned();
    attempt("a daemon that is gone", &[], &["--state", &stale, "vm", "list"], &["godwit run"])?;
    let bad = ["run", "--state", &state, "--qemu", "/nowhere/qemu", "--listen", listen];
    attempt("second daemon, bad QEMU", &[], &bad, &["another godwit daemon"])
}

/// Hosts that cannot take the VM.
pub(super) fn destinations(world: &World, judge: &mut Judge) -> Result<()> {
    let stayed = |words| Expect { code: 3, says: words };
    let ask = |to| ["migrate", "web", "--to", to, "--wait"];
    let expect = stayed(&["stayed: web runs on h1", "64 MiB", "32 MiB"]);
    world.refused(judge, "too little memory", ("h3", &ask("small")), &expect)?;
    let names = ["destination's machine type", "destination's capability", "destination's CPU"];
    if let Err(cause) = &world.old {
        names.iter().for_each(|name| judge.skip(name, &format!("{cause:#}")));
        return Ok(());
    }
    let expect = stayed(&["stayed: web runs on h1", "does not know machine type pc-q35-"]);
    world.refused(judge, names[0], ("h3", &ask("old")), &expect)?;
    let machine = Some("pc-q35-7.2");
    let [plain, newer] =
        [("plain", None), ("newer", Some("Nehalem-v1,+sha-ni"))].map(|(n, cpu)| {
            let number = if cpu.is_some() { 6 } else { 7 };
            world.guest(n, number, machine, cpu)
        });
    let args = ["migrate", "plain", "--to", "old", "--wait"];
    let expect = stayed(&["no migration capability switchover-ack", "or newer"]);
    world.refused(judge, names[1], ("h3", &args), &expect)?;
    let args = ["migrate", "newer", "--to", "old", "--wait"];
    let expect = stayed(&["sha-ni", "choose another host"]);
    world.refused(judge, names[2], ("h3", &args), &expect)?;
    let args = ["migrate", "web", "--to", "site:tokyo", "--wait"];
    let expect = stayed(&["64 MiB", "does not know machine type"]);
    world.refused(judge, "no host of a site", ("h3", &args), &expect)?;
    for guest in [plain?, newer?] {
        world.swarm.ask("h1", &["vm", "stop", &guest.name, "--kill"])?;
    }
    Ok(())
}

/// What is refused because of a move that goes on, and because of one that is over.
pub(super) fn moving(world: &World, web: &Guest, judge: &mut Judge) -> Result<()> {
    let swarm = &world.swarm;
    run(async { swarm.control("h1", web)?.churn(24, 100, false).await })?;
    let begin = ["migrate", "web", "--to", "h3", "--bandwidth", "200K"];
    let begun = swarm.ask("h3", &begin)?;
    let id = begun["id"].as_str().context("no id")?.to_owned();
    swarm.wait("pages cross", Duration::from_secs(20), |s| {
        let all: Value = s.ask("h3", &["migrations"])?;
        let of = |m: &&Value| m["id"] == id.as_str();
        Ok(all.as_array().and_then(|a| a.iter().find(of)).is_some_and(|m| m["phase"] == "transfer"))
    })?;
    let before = Footprint::take(swarm)?;
    let mut attempt = |name, host, args: &[&str], words| -> Result<()> {
        let out = swarm.node(host)?.cli(args, COMMAND)?;
        // The copy that waits at the destination is the first attempt's.
        judge.judge(name, &says(words), &out, before.differs(&Footprint::take(swarm)?));
        Ok(())
    };
    let again = ["migrate", "web", "--to", "h3"];
    attempt("a VM that moves already", "h1", &again, &["moving already", "abort"])?;
    attempt("asked on another host", "old", &again, &["moving already", "abort"])?;
    attempt("stopping what moves", "h1", &["vm", "stop", "web"], &["moving", "abort"])?;
    swarm.ask("old", &["abort", &id])?;
    swarm.wait("the move is given up", Duration::from_secs(20), |s| {
        let all = s.ask("h1", &["migrations", "show", &id])?;
        Ok(all["phase"] == "stayed")
    })?;
    let expect = says(&["over", "godwit migrations"]);
    world.refused(judge, "abort of what is over", ("h3", &["abort", &id]), &expect)
}
