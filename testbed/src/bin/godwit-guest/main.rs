//! The agent inside a guest of the lab: configures its network, echoes, churns memory and verifies it.
//!
//! It owns the guest's workload and is commanded in JSON lines over the second serial port (reachable whatever the network
//! does) and TCP. It never ends by itself. `godwit.ip`, `godwit.mtu` and `godwit.seed` come from the kernel command line.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod disks;
mod net;
mod serve;
mod talk;
mod ticker;
mod workload;

use std::fs;
use std::io::Write;
use std::sync::{Arc, PoisonError};
use std::thread;

use godwit_testbed::guest::wire::{
    CONTROL_PORT, Envelope, MAX_OUTPUT, READY, Reply, Request, Stats, TCP_ECHO_PORT, UDP_ECHO_PORT,
    UDP_SINK_PORT,
};

use disks::Disks;
use talk::Talk;
use ticker::Ticker;
use workload::Workload;

/// What the guest does besides echoing.
struct Agent {
    workload: Workload,
    disks: Disks,
    ticker: Ticker,
    talk: Talk,
}

/// The control channel.
const CONTROL_SERIAL: &str = "/dev/ttyS1";

fn main() {
    if let Err(cause) = start() {
        say(&format!("godwit-guest failed: {cause}"));
        std::process::exit(1);
    }
    loop {
        thread::park();
    }
}

fn start() -> Result<(), String> {
    let cmdline = fs::read_to_string("/proc/cmdline").map_err(|e| format!("/proc/cmdline: {e}"))?;
    let seed = seed(&cmdline)?;
    let workload = Workload::start(seed).map_err(|e| format!("writer: {e}"))?;
    let disks = Disks::start(seed).map_err(|e| format!("disk writer: {e}"))?;
    let ticker = Ticker::start().map_err(|e| format!("ticker: {e}"))?;
    let agent = Agent { workload, disks, ticker, talk: Talk::default() };
    net::loopback_up().map_err(|e| format!("lo: {e}"))?;
    if let Some(address) = net::Address::from_cmdline(&cmdline)? {
        net::configure("eth0", address).map_err(|e| format!("eth0: {e}"))?;
    }
    let sink = serve::udp_sink(UDP_SINK_PORT).map_err(|e| format!("UDP {UDP_SINK_PORT}: {e}"))?;
    let handler: serve::Handler = Arc::new(move |envelope| {
        let mut reply = answer(&agent, envelope);
        if let Some(stats) = &mut reply.stats {
            let seen = sink.lock().unwrap_or_else(PoisonError::into_inner).report(0, 0);
            stats.sink_unique = seen.unique;
            stats.sink_reordered = seen.reordered;
            stats.sink_duplicated = seen.duplicated;
        }
        reply
    });
    serve::udp_echo(UDP_ECHO_PORT).map_err(|e| format!("UDP {UDP_ECHO_PORT}: {e}"))?;
    serve::tcp_echo(TCP_ECHO_PORT).map_err(|e| format!("TCP {TCP_ECHO_PORT}: {e}"))?;
    serve::tcp_control(CONTROL_PORT, Arc::clone(&handler))
        .map_err(|e| format!("TCP {CONTROL_PORT}: {e}"))?;
    if let Err(cause) = serve::serial_control(CONTROL_SERIAL, handler) {
        // A guest without a second serial port is still commanded over TCP.
        say(&format!("{CONTROL_SERIAL}: {cause}"));
    }
    say(READY);
    Ok(())
}

fn answer(agent: &Agent, envelope: Envelope) -> Reply {
    let Agent { workload, disks, ticker, talk } = agent;
    let id = envelope.id;
    let refuse = |cause: String| Reply::refuse(id, cause);
    match envelope.request {
        Request::Ping => Reply::ok(id),
        Request::Churn { mb, rate_kbps, hot_quarter } => {
            let done = workload.churn(mb, rate_kbps, hot_quarter);
            done.map_or_else(refuse, |()| Reply::ok(id))
        }
        Request::Disk { path, mb, rate_kbps } => {
            disks.churn(&path, mb, rate_kbps).map_or_else(refuse, |()| Reply::ok(id))
        }
        Request::VerifyDisks => disks
            .verify()
            .map_or_else(refuse, |seen| Reply { verified: Some(seen), ..Reply::ok(id) }),
        Request::Shell { line } => disks::shell(&line, MAX_OUTPUT)
            .map_or_else(refuse, |said| Reply { output: Some(said), ..Reply::ok(id) }),
        Request::Talk { to, rate_pps } => {
            talk.start(to, rate_pps).map_or_else(refuse, |()| Reply::ok(id))
        }
        Request::Hush => {
            talk.end().map_or_else(refuse, |seen| Reply { talked: Some(seen), ..Reply::ok(id) })
        }
        Request::Stop => {
            workload.stop();
            Reply::ok(id)
        }
        Request::Verify => Reply { verified: Some(workload.verify()), ..Reply::ok(id) },
        Request::Stats { reset } => {
            let counters = workload.counters();
            let gaps = ticker.read(reset);
            Reply {
                stats: Some(Stats {
                    uptime_ms: gaps.uptime_ms,
                    seed: counters.seed,
                    pages: counters.pages,
                    pages_written: counters.pages_written,
                    churning: counters.churning,
                    ticks: gaps.ticks,
                    max_gap_monotonic_ms: gaps.max_monotonic_ms,
                    max_gap_wall_ms: gaps.max_wall_ms,
                    udp_dropped: net::udp_dropped(),
                    ..Stats::default()
                }),
                ..Reply::ok(id)
            }
        }
    }
}

/// `godwit.seed=N` from the command line, else a random one.
fn seed(cmdline: &str) -> Result<u64, String> {
    let set = cmdline.split_whitespace().find_map(|word| word.strip_prefix("godwit.seed="));
    if let Some(text) = set {
        return text.parse().map_err(|_| format!("godwit.seed={text} is not a number"));
    }
    let mut bytes = [0; 8];
    fs::File::open("/dev/urandom")
        .and_then(|mut source| std::io::Read::read_exact(&mut source, &mut bytes))
        .map_err(|e| format!("/dev/urandom: {e}"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// One line on the console; a guest whose console is gone still serves.
fn say(line: &str) {
    if let Ok(mut console) = fs::File::options().write(true).open("/dev/console") {
        let _ = console.write_all(format!("{line}\n").as_bytes());
    }
}
