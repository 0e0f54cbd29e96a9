//! What goes wrong with ways out: an interface fails, two hosts name different gateways, a host is gone for good.
//!
//! Owns these parts of the run. The guest is on h2 and h1 has the only uplink when it begins.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{CLIENT, GATEWAY, OUT, SOON, WAYS_IN, shell, way_in};
use crate::lab::ns::{NetNs, ip};
use crate::scenario::swarm::{Guest, Swarm, WIRE};

/// Another gateway than the first.
const OTHER: &str = "10.9.0.253";

/// While an interface does not work the guest gets out by the other site; when it does again, by its own host's.
pub(super) fn interfaces(swarm: &Swarm, guest: &Guest, client: &NetNs) -> Result<()> {
    said(swarm, "h2", &["connect", WIRE, "--uplink", OUT])?;
    let inside = &swarm.lab.host("h2")?.ns;
    let set = |ns: &NetNs, device: &str, to: &str| ns.batch(&[format!("link set {device} {to}")]);
    let again = || {
        way_in(swarm, client, "h2", WAYS_IN[1].1)?;
        inside.sysctl(&format!("ipv4/conf/{OUT}/forwarding"), "1")
    };
    type Step<'a> = &'a dyn Fn() -> Result<()>;
    let cases: [(&str, Step<'_>, Step<'_>, &str); 3] = [
        ("it is down", &|| set(inside, OUT, "down"), &|| set(inside, OUT, "up"), "is down"),
        ("no carrier", &|| set(client, "h2", "down"), &|| set(client, "h2", "up"), "no carrier"),
        ("it is gone", &|| inside.batch(&[format!("link del {OUT}")]), &again, "no interface"),
    ];
    for (what, fails, mends, cause) in cases {
        fails()?;
        swarm.wait(&format!("{what}: h2 says so"), SOON, |swarm| {
            let down = uplink(swarm, "h2")?["down"].as_str().map(str::to_owned);
            Ok(down.is_some_and(|down| down.contains(cause)))
        })?;
        ensure!(!has_gateway(swarm, "h2")?, "{what}: the gateway is still there");
        let ping = format!("/bin/busybox ping -c 1 -W 2 {CLIENT} >/dev/null && echo out");
        swarm.wait(&format!("{what}: the guest gets out by h1"), SOON, |swarm| {
            Ok(shell(swarm, "h2", guest, &ping)?.contains("out"))
        })?;
        mends()?;
        swarm.wait(&format!("{what}, no more: h2 has its way out again"), SOON, |swarm| {
            Ok(uplink(swarm, "h2")?["down"].is_null() && has_gateway(swarm, "h2")?)
        })?;
    }
    Ok(())
}

/// Two hosts that do not hear each other name different gateways: one gives its own up, and everybody knows the other.
pub(super) fn two_words(swarm: &Swarm) -> Result<()> {
    for host in ["h1", "h2"] {
        said(swarm, host, &["disconnect", WIRE, "--uplink"])?;
    }
    swarm.wait("both know that there is no gateway", SOON, |swarm| {
        Ok(["h1", "h2"].iter().all(|host| gateway(swarm, host).is_ok_and(|g| g.is_null())))
    })?;
    swarm.lab.wan()?.cut()?;
    for (host, ip) in [("h1", GATEWAY), ("h2", OTHER)] {
        let given = format!("{ip}/24");
        said(swarm, host, &["connect", WIRE, "--uplink", OUT, "--gateway", &given])?;
    }
    swarm.lab.wan()?.restore()?;
    swarm.wait("one of two gateways is given up", SOON, |swarm| {
        let [one, two] = [uplink(swarm, "h1")?, uplink(swarm, "h2")?];
        let (has, not) = if one["down"].is_null() { (one, two) } else { (two, one) };
        let all = ["h1", "h2", "h3"].iter().map(|host| gateway(swarm, host));
        let all = all.collect::<Result<Vec<_>>>()?;
        Ok(has["down"].is_null()
            && not["down"].as_str().is_some_and(|down| down.starts_with("given up"))
            && has_gateway(swarm, "h1")? != has_gateway(swarm, "h2")?
            && all.iter().all(|known| *known == has["gateway"]))
    })
}

/// The gateway of a host that is not reached can be replaced, on demand; the host gives it up when it is back.
pub(super) fn gone_for_good(swarm: &mut Swarm) -> Result<()> {
    for host in ["h1", "h2"] {
        said(swarm, host, &["disconnect", WIRE, "--uplink"])?;
    }
    let given = [GATEWAY, OTHER].map(|ip| format!("{ip}/24"));
    said(swarm, "h2", &["connect", WIRE, "--uplink", OUT, "--gateway", &given[0]])?;
    swarm.wait("h1 knows the gateway", SOON, |s| Ok(gateway(s, "h1")? == *given[0]))?;
    let other = ["wire", "connect", WIRE, "--uplink", OUT, "--gateway", &given[1]];
    let replace = [&other[..], &["--replace"]].concat();
    let alive = swarm.node("h1")?.cli(&replace, SOON)?;
    ensure!(!alive.ok() && alive.stderr.contains("is 10.9.0.254/24 on h2"), "{alive:?}");
    swarm.node_mut("h2")?.kill9()?;
    swarm.wait("h1 does not reach h2", SOON, |swarm| {
        let away = swarm.node("h1")?.cli(&other, SOON)?;
        ensure!(!away.ok(), "another gateway is named unasked");
        Ok(away.stderr.contains("not reached") && away.stderr.contains("--replace"))
    })?;
    let replaced = swarm.node("h1")?.cli(&replace, SOON)?;
    ensure!(replaced.ok(), "{replaced:?}");
    swarm.node_mut("h2")?.start_ready(SOON)?;
    swarm.wait("h2 gives its gateway up", SOON, |swarm| {
        let down = uplink(swarm, "h2")?["down"].as_str().map(str::to_owned);
        Ok(down.is_some_and(|down| down.starts_with("given up: 10.9.0.253/24"))
            && !has_gateway(swarm, "h2")?
            && gateway(swarm, "h3")? == *given[1])
    })
}

fn said(swarm: &Swarm, host: &str, args: &[&str]) -> Result<()> {
    let done = swarm.node(host)?.cli(&[&["wire"], args].concat(), SOON)?;
    ensure!(done.ok(), "{host}: {args:?}: {done:?}");
    Ok(())
}

/// What a host says of the wire.
fn wire(swarm: &Swarm, host: &str) -> Result<Value> {
    let all = swarm.ask(host, &["wire", "list"])?;
    let found = all.as_array().and_then(|all| all.iter().find(|w| w["wire"] == WIRE));
    Ok(found.cloned().unwrap_or_default())
}

fn uplink(swarm: &Swarm, host: &str) -> Result<Value> {
    let uplink = wire(swarm, host)?["uplink"].clone();
    ensure!(uplink.is_object(), "{host} has no uplink");
    Ok(uplink)
}

fn gateway(swarm: &Swarm, host: &str) -> Result<Value> {
    Ok(wire(swarm, host)?["gateway"].clone())
}

/// Whether a gateway is among the host's addresses.
fn has_gateway(swarm: &Swarm, host: &str) -> Result<bool> {
    let devices = ip(&["-n", swarm.lab.host(host)?.ns.name(), "-br", "addr"])?;
    Ok([GATEWAY, OTHER].iter().any(|ip| devices.contains(ip)))
}
