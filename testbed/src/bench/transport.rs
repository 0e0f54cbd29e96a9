//! `bench transport`: which transport carries one bulk stream best, over the emulated WAN and a veth.
//!
//! Owns the two ends of each transport and the comparison. Never measures through the node: each
//! transport stands alone, with the node's kind of keys. Invariant: what is counted are payload bytes
//! that the receiver read, from its first byte on; a transport that fails is reported, not left out.

use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::endpoints::{self, Transport};
use crate::lab::check::pair_lab;
use crate::lab::wan::{LinkParams, WanMode};
use crate::lab::{Host, Lab};

/// A stream ends after this many payload bytes.
pub const BYTES_MAX: u64 = 80 << 20;
/// ... or after this long.
pub const TIME_MAX: Duration = Duration::from_secs(12);
/// Setting up both ends.
const SETUP: Duration = Duration::from_secs(20);
const PORT: u16 = 7400;

/// What one transport reached on one link.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// The transport.
    pub transport: &'static str,
    /// Payload bytes that the receiver read.
    pub bytes: u64,
    /// Seconds from the first byte to the last.
    pub seconds: f64,
    /// Payload in Mbit/s, the ramp included.
    pub mbit_s: f64,
    /// Packets that the WAN's full queue dropped, this stream's own.
    pub queue_dropped: u64,
    /// Why there is no figure.
    pub failed: Option<String>,
}

/// Measures every transport over every link and gives the figures; takes about five minutes. Needs
/// root.
///
/// # Errors
/// If a lab cannot be built.
pub fn run() -> Result<Value> {
    let lossy = |mut link: LinkParams, loss: f64| {
        link.loss = loss;
        WanMode::Shaped(link)
    };
    let links = [
        ("100 Mbit/s x 80 ms", WanMode::Shaped(LinkParams::new(100, 80))),
        ("100 Mbit/s x 80 ms, 0.1 % loss", lossy(LinkParams::new(100, 80), 0.001)),
        ("500 Mbit/s x 40 ms", WanMode::Shaped(LinkParams::new(500, 40))),
        ("500 Mbit/s x 40 ms, 0.1 % loss", lossy(LinkParams::new(500, 40), 0.001)),
        ("veth", WanMode::Unshaped),
    ];
    let mut cases = Vec::new();
    for (name, mode) in links {
        let lab = pair_lab("btrans", mode)?;
        // libp2p's TCP sockets take the route's congestion control; the others choose for themselves.
        lab.set_congestion_control("bbr")?;
        let mut figures = Vec::new();
        for transport in Transport::ALL {
            let figure = measure(&lab, transport)?;
            eprintln!("{name}: {}: {:.1} Mbit/s", figure.transport, figure.mbit_s);
            figures.push(figure);
        }
        lab.teardown()?;
        cases.push(json!({"case": name, "transports": figures}));
    }
    let machine = json!({"cores": thread::available_parallelism().map_or(0, |n| n.get())});
    Ok(json!({
        "bench": "transport", "machine": machine,
        "bytes_max": BYTES_MAX, "seconds_max": TIME_MAX.as_secs(), "cases": cases,
    }))
}

fn measure(lab: &Lab, transport: Transport) -> Result<Figure> {
    let (from, to) = (lab.host("a")?, lab.host("b")?);
    let before = lab.wan()?.stats()?;
    let address = SocketAddr::new(IpAddr::V4(to.addr), PORT);
    let (ready, is_ready) = mpsc::sync_channel(1);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let received = thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            inside(to, async move { endpoints::receive(transport, address, ready).await })
        });
        let server = is_ready.recv_timeout(SETUP).context("the receiver did not start");
        if let Ok(server) = server {
            scope.spawn(move || {
                // Ends when the receiver has seen enough; its own error then is no failure.
                let _ = inside(from, async move {
                    tokio::select! {
                        sent = endpoints::send(transport, address, server) => sent,
                        _ = stopped => Ok(()),
                    }
                });
            });
        }
        let received = receiver.join();
        drop(stop);
        received.map_err(|_| anyhow!("the receiver panicked"))?
    });
    let transport = transport.name();
    let queue_dropped = lab.wan()?.stats()?.since(&before).forward.queue_dropped;
    Ok(match received {
        Ok((bytes, time)) => {
            let seconds = time.as_secs_f64();
            let mbit_s = bytes as f64 * 8.0 / 1e6 / seconds.max(1e-9);
            Figure { transport, bytes, seconds, mbit_s, queue_dropped, failed: None }
        }
        Err(cause) => {
            let failed = Some(format!("{cause:#}"));
            Figure { transport, bytes: 0, seconds: 0.0, mbit_s: 0.0, queue_dropped, failed }
        }
    })
}

/// Runs an end in a host's namespace, with all its tasks on one thread of that namespace.
fn inside<T: Send>(host: &Host, end: impl Future<Output = Result<T>> + Send) -> Result<T> {
    host.ns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            tokio::time::timeout(SETUP + TIME_MAX, end).await.context("took too long")?
        })
    })?
}

/// Counts what arrives on a stream until it is enough.
pub(super) async fn count(mut stream: impl AsyncRead + Unpin) -> Result<(u64, Duration)> {
    let mut block = vec![0; 256 << 10];
    let mut bytes = stream.read(&mut block).await.context("no first byte")? as u64;
    let start = Instant::now();
    while bytes < BYTES_MAX {
        let Some(left) = TIME_MAX.checked_sub(start.elapsed()) else { break };
        match tokio::time::timeout(left, stream.read(&mut block)).await {
            Ok(Ok(read)) if read > 0 => bytes += read as u64,
            Ok(Ok(_)) | Err(_) => break,
            Ok(Err(cause)) => return Err(cause).context(format!("after {bytes} bytes")),
        }
    }
    anyhow::ensure!(bytes > 0, "the stream ended before its first byte");
    Ok((bytes, start.elapsed()))
}
