//! Frames between two hosts of a site: by VXLAN and encrypted, against the hosts' own veth.
//!
//! Owns the runs. A side is one TCP stream and UDP echoes, between stations on a wire or between the hosts themselves.
//! Invariant: all are measured in one lab, in turns.

use std::net::Ipv4Addr;
use std::thread::available_parallelism;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::versus::figures::median;
use crate::lab::check::{TcpRate, tcp_rate, udp_rtt_ms};
use crate::lab::prober::Station;
use crate::lab::{Host, LabConfig};
use crate::scenario::swarm::{Swarm, WIRE, station_ip, trusting};

/// The encrypted wire.
const VAULT: &str = "vault";
/// How long a stream may take to its full rate, and how long that is measured.
const RAMP: Duration = Duration::from_secs(1);
const MEASURE: Duration = Duration::from_secs(4);
/// Echoes of one run, one at a time.
const ECHOES: u64 = 2_000;

/// Measures both ways and the plain one `runs` times in turns. Takes about 20 s a run; needs root.
///
/// # Errors
/// If the lab cannot be built, or nothing gets through.
pub fn run(runs: u32) -> Result<Value> {
    let swarm = Swarm::up(&LabConfig::demo("bwire"), trusting)?;
    swarm.ask("h1", &["wire", "create", VAULT, "--encrypt"])?;
    swarm.ask("h1", &["wire", "create", WIRE])?;
    let ends = |wire, first| -> Result<[Station; 2]> {
        Ok([swarm.station_on("h1", wire, first)?, swarm.station_on("h3", wire, first + 1)?])
    };
    let ways = [("vxlan", ends(WIRE, 1)?), ("encrypted", ends(VAULT, 3)?)];
    let (mut plain, mut all) = (Side::default(), [Side::default(), Side::default()]);
    for _ in 0..runs.max(1) {
        plain.measure(swarm.lab.host("h1")?, swarm.lab.host("h3")?)?;
        for ((at, (name, [a, b])), side) in ways.iter().enumerate().zip(&mut all) {
            let number = 1 + 2 * at as u16;
            let like = swarm.lab.host("h1")?;
            let ends = (host(like, a, station_ip(number)?), host(like, b, station_ip(number + 1)?));
            side.measure(&ends.0, &ends.1).with_context(|| (*name).to_owned())?;
        }
    }
    let report = |(name, side): (&str, &Side)| {
        let (ours, theirs) = (side.report(), plain.report());
        let ratio = |key: &str| Some(ours[key].as_f64()? / theirs[key].as_f64()?);
        let added = ours["rtt_us"].as_f64().zip(theirs["rtt_us"].as_f64()).map(|(a, b)| a - b);
        let ratio = json!({ "mbit_s": ratio("mbit_s"), "added_rtt_us": added });
        let mut peer = theirs;
        peer["tool"] = "plain veth".into();
        json!({ "case": name, "godwit": ours, "peer": peer, "ratio": ratio })
    };
    let cases: Vec<_> = ways.iter().map(|w| w.0).zip(&all).map(report).collect();
    drop(ways);
    swarm.down()?;
    let machine = json!({"cores": available_parallelism().map_or(0, std::num::NonZero::get)});
    Ok(json!({ "bench": "wire", "machine": machine, "cases": cases }))
}

/// A station as the measuring functions want it.
fn host(like: &Host, station: &Station, addr: Ipv4Addr) -> Host {
    Host { addr, ns: station.ns().clone(), ..like.clone() }
}

#[derive(Default)]
struct Side {
    rates: Vec<f64>,
    rtts_us: Vec<f64>,
}

impl Side {
    fn measure(&mut self, a: &Host, b: &Host) -> Result<()> {
        let TcpRate { mbit_s, .. } = tcp_rate(a, b, "cubic", RAMP, MEASURE)?;
        self.rates.push(mbit_s);
        self.rtts_us.push(udp_rtt_ms(a, b, ECHOES)? * 1e3);
        Ok(())
    }

    fn report(&self) -> Value {
        let (mbit_s, rtt_us) = (median(self.rates.clone()), median(self.rtts_us.clone()));
        json!({ "mbit_s": mbit_s, "rtt_us": rtt_us, "runs": { "mbit_s": self.rates, "rtt_us": self.rtts_us } })
    }
}
