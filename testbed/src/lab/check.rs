//! Checks of the emulated WAN itself: a figure measured over a wrong WAN is worth nothing.
//!
//! Owns the measuring sockets. Never judges by the emulator's own counters alone: rates come from the kernel's TCP,
//! delays from a UDP echo. Invariant: `passed` is true only if every part was measured and within its bound.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wan::{LinkParams, LinkStats, WanMode};
use super::{Host, Lab, LabConfig, SiteConfig};

/// How long nothing comes for no more to come.
const SILENCE: Duration = Duration::from_secs(2);
/// Bytes of TCP payload in a full packet: MTU less IPv4 header, TCP header and time stamps.
const TCP_PAYLOAD: f64 = 1448.0;
/// IPv4 and UDP header, in bytes.
const UDP_OVERHEAD: u64 = 28;

/// What one TCP stream reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TcpRate {
    /// Congestion control used.
    pub congestion: String,
    /// Mbit/s of payload at the receiver, after the ramp.
    pub mbit_s: f64,
    /// Mbit/s of payload at the receiver from the first byte on, ramp included.
    pub mbit_s_with_ramp: f64,
    /// Seconds at the start that `mbit_s` leaves out.
    pub ramp_s: f64,
    /// Seconds that `mbit_s` was measured over.
    pub measured_s: f64,
}

/// Sends one TCP stream from `from` to `to` for `ramp + measure`, with the named congestion control, and reports what
/// arrived. Fails when the kernel has no such congestion control or nothing arrives for 10 s.
pub fn tcp_rate(
    from: &Host,
    to: &Host,
    congestion: &str,
    ramp: Duration,
    measure: Duration,
) -> Result<TcpRate> {
    let listener = to.ns.run(|| TcpListener::bind((to.addr, 0)))??;
    let address = listener.local_addr()?;
    let mut sender = from.ns.run(|| connect(address, congestion))??;
    let (mut receiver, _) = listener.accept()?;
    let timeout = Some(Duration::from_secs(10));
    receiver.set_read_timeout(timeout)?;
    sender.set_write_timeout(timeout)?;
    thread::scope(|scope| {
        scope.spawn(move || {
            let block = vec![0x5a; 256 << 10];
            // Ends when the receiver has seen enough and closes.
            while sender.write_all(&block).is_ok() {}
        });
        let result = receive_rate(&mut receiver, ramp, measure);
        // Unread data makes this a reset, which is what the sender waits for.
        let _ = receiver.shutdown(std::net::Shutdown::Both);
        drop(receiver);
        let (with_ramp, after_ramp, measured) = result?;
        Ok(TcpRate {
            congestion: congestion.to_owned(),
            mbit_s: after_ramp,
            mbit_s_with_ramp: with_ramp,
            ramp_s: ramp.as_secs_f64(),
            measured_s: measured,
        })
    })
}

/// (Mbit/s with ramp, Mbit/s after it, seconds measured after it).
fn receive_rate(
    receiver: &mut TcpStream,
    ramp: Duration,
    measure: Duration,
) -> Result<(f64, f64, f64)> {
    let mut block = vec![0; 256 << 10];
    let (mut total, mut ramp_bytes) = (0u64, 0u64);
    let first = receiver.read(&mut block).context("nothing arrived")? as u64;
    let start = Instant::now();
    let mut ramp_end = None;
    total += first;
    loop {
        let got = receiver.read(&mut block).context("the stream stalled")?;
        if got == 0 {
            bail!("the sender ended early");
        }
        total += got as u64;
        let elapsed = start.elapsed();
        if elapsed >= ramp && ramp_end.is_none() {
            (ramp_end, ramp_bytes) = (Some(elapsed), total);
        }
        if let Some(ramp_end) = ramp_end
            && elapsed >= ramp_end + measure
        {
            let mbit_s = |bytes: u64, seconds: f64| bytes as f64 * 8.0 / seconds / 1e6;
            let measured = (elapsed - ramp_end).as_secs_f64();
            return Ok((
                mbit_s(total, elapsed.as_secs_f64()),
                mbit_s(total - ramp_bytes, measured),
                measured,
            ));
        }
    }
}

fn connect(address: SocketAddr, congestion: &str) -> Result<TcpStream> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_tcp_congestion(congestion.as_bytes()).with_context(|| {
        format!("no congestion control {congestion}: modprobe tcp_{congestion}")
    })?;
    socket
        .connect_timeout(&address.into(), Duration::from_secs(5))
        .with_context(|| format!("connecting to {address}"))?;
    Ok(socket.into())
}

/// cubic and bbr in turn: what was measured, and why the others were not (a kernel need not have both). Fails when
/// neither was measured.
pub fn tcp_rate_check(
    from: &Host,
    to: &Host,
    ramp: Duration,
    measure: Duration,
) -> Result<(Vec<TcpRate>, Vec<String>)> {
    let (mut rates, mut missing) = (Vec::new(), Vec::new());
    for congestion in ["cubic", "bbr"] {
        match tcp_rate(from, to, congestion, ramp, measure) {
            Ok(rate) => rates.push(rate),
            Err(error) => missing.push(format!("{congestion}: {error:#}")),
        }
    }
    if rates.is_empty() {
        bail!("no TCP stream was measured: {}", missing.join("; "));
    }
    Ok((rates, missing))
}

/// Largest payload rate of a link: what TCP can reach at best, in Mbit/s.
pub fn payload_mbit_s(params: &LinkParams) -> f64 {
    params.rate_bps as f64 / 1e6 * TCP_PAYLOAD / super::wan::MTU as f64
}

/// A pair of UDP sockets, one in each host, connected to each other.
fn udp_pair(a: &Host, b: &Host) -> Result<(UdpSocket, UdpSocket)> {
    let left = a.ns.run(|| UdpSocket::bind((a.addr, 0)))??;
    let right = b.ns.run(|| UdpSocket::bind((b.addr, 0)))??;
    left.connect(right.local_addr()?)?;
    right.connect(left.local_addr()?)?;
    for socket in [&left, &right] {
        socket.set_read_timeout(Some(SILENCE))?;
        let bytes: libc::c_int = 16 << 20;
        // SAFETY: one int that outlives the call. Root may exceed the limit; the result shows in the counts.
        unsafe {
            let len = size_of::<libc::c_int>() as libc::socklen_t;
            let value = (&raw const bytes).cast();
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                value,
                len,
            );
        }
    }
    Ok((left, right))
}

/// Median round trip of `rounds` UDP echoes, one at a time, in milliseconds.
pub fn udp_rtt_ms(a: &Host, b: &Host, rounds: u64) -> Result<f64> {
    let (left, right) = udp_pair(a, b)?;
    let (mut times, echo) = (Vec::new(), &right);
    thread::scope(|scope| -> Result<()> {
        scope.spawn(move || {
            let mut datagram = [0; 64];
            // Ends with the first silence, or when it is shut down.
            while let Ok(len @ 1..) = echo.recv(&mut datagram) {
                let _ = echo.send(&datagram[..len]);
            }
        });
        for round in 0..rounds {
            let start = Instant::now();
            left.send(&round.to_le_bytes())?;
            let mut answer = [0; 64];
            let len = left.recv(&mut answer).context("no echo")?;
            if answer[..len] != round.to_le_bytes() {
                bail!("an echo of something else");
            }
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        // Whoever waits in it reads nothing, at once.
        let _ = socket2::SockRef::from(echo).shutdown(std::net::Shutdown::Both);
        Ok(())
    })?;
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().context("no rounds")
}

/// Sends `count` datagrams of `size` payload bytes, paced to `mbit_s`; gives how many arrived.
fn udp_blast(a: &Host, b: &Host, count: u64, size: usize, mbit_s: f64) -> Result<u64> {
    let (left, right) = udp_pair(a, b)?;
    thread::scope(|scope| {
        let arrived = scope.spawn(move || {
            let mut datagram = [0; 2048];
            let mut arrived = 0;
            // The first datagram takes one delay, the end is a silence.
            while arrived < count && right.recv(&mut datagram).is_ok() {
                arrived += 1;
            }
            arrived
        });
        let start = Instant::now();
        let gap = (size as f64 + UDP_OVERHEAD as f64) * 8.0 / (mbit_s * 1e6);
        let payload = vec![0xa5; size];
        for number in 0..count {
            let due = Duration::from_secs_f64(gap * number as f64);
            // Bursts of a millisecond are fine: the queue is longer.
            let ahead = due.saturating_sub(start.elapsed());
            if ahead > Duration::from_millis(1) {
                thread::sleep(ahead);
            }
            left.send(&payload)?;
        }
        arrived.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))
    })
}

/// Waits until nothing more moves on the WAN (at most 3 s), so that counters can be compared.
fn settle(lab: &Lab) -> Result<LinkStats> {
    let mut before = lab.wan()?.stats()?;
    for _ in 0..15 {
        thread::sleep(Duration::from_millis(200));
        let now = lab.wan()?.stats()?;
        let moved = now.since(&before);
        if moved.forward.delivered_packets + moved.backward.delivered_packets == 0 {
            return Ok(now);
        }
        before = now;
    }
    Ok(before)
}

/// Checks a fresh lab of two sites at 100 Mbit/s and 80 ms: rate against the kernel's TCP, delay, loss, cut,
/// counters. Takes about 30 s; the value has `passed` and every figure.
pub fn wan_check() -> Result<Value> {
    wan_check_of("wancheck", &LinkParams::new(100, 80))
}

/// As [`wan_check`], in a lab of this id with a link of these parameters (at least 50 Mbit/s, no loss).
pub fn wan_check_of(labid: &str, params: &LinkParams) -> Result<Value> {
    let lab = pair_lab(labid, WanMode::Shaped(params.clone()))?;
    let value = check_lab(&lab, params, Duration::from_secs(3), Duration::from_secs(8))?;
    lab.teardown()?;
    Ok(value)
}

/// A lab for checks: host `a` in `paris`, host `b` in `tokyo`.
pub fn pair_lab(labid: &str, wan: WanMode) -> Result<Lab> {
    let sites = vec![SiteConfig::new("paris", &["a"]), SiteConfig::new("tokyo", &["b"])];
    Lab::new(&LabConfig { labid: labid.to_owned(), sites, wan })
}

/// The parts of [`wan_check`] on a quiet lab whose hosts `a` and `b` are joined by a link of these parameters.
pub fn check_lab(
    lab: &Lab,
    params: &LinkParams,
    ramp: Duration,
    measure: Duration,
) -> Result<Value> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let delay = check_delay(a, b, params)?;
    let counters = check_counters(lab, a, b)?;
    let loss = check_loss(lab, a, b)?;
    let cut = check_cut(lab, a, b)?;
    let rate = check_rate(lab, a, b, params, ramp, measure)?;
    let parts = [&delay, &counters, &loss, &cut, &rate];
    let passed = parts.iter().all(|part| part["passed"] == true);
    Ok(json!({
        "scenario": "wan", "passed": passed, "params": params,
        "delay": delay, "counters": counters, "loss": loss, "cut": cut, "rate": rate,
    }))
}

/// One part of [`wan_check`].
pub fn check_delay(a: &Host, b: &Host, params: &LinkParams) -> Result<Value> {
    let nominal = params.delay_us as f64 * 2.0 / 1e3;
    let measured = udp_rtt_ms(a, b, 20)?;
    // The serialisation of a 64-byte packet is far below the bound.
    let passed = (measured - nominal).abs() <= 1.0;
    Ok(
        json!({"passed": passed, "nominal_rtt_ms": nominal, "median_rtt_ms": measured, "bound_ms": 1.0}),
    )
}

/// One part of [`wan_check`].
pub fn check_counters(lab: &Lab, a: &Host, b: &Host) -> Result<Value> {
    let (count, size) = (2000, 1000);
    let before = settle(lab)?;
    let arrived = udp_blast(a, b, count, size, 50.0)?;
    let moved = settle(lab)?.since(&before);
    let bytes = count * (size as u64 + UDP_OVERHEAD);
    let passed = arrived == count
        && (moved.forward.carried_packets, moved.forward.carried_bytes) == (count, bytes)
        && (moved.forward.delivered_packets, moved.forward.delivered_bytes) == (count, bytes)
        && moved.backward.carried_packets == 0;
    Ok(
        json!({"passed": passed, "sent_packets": count, "sent_bytes": bytes, "arrived_packets": arrived, "counted": moved}),
    )
}

/// One part of [`wan_check`].
pub fn check_loss(lab: &Lab, a: &Host, b: &Host) -> Result<Value> {
    let (count, loss) = (20_000u64, 0.01);
    lab.wan()?.set_loss(loss);
    let before = settle(lab)?;
    let arrived = udp_blast(a, b, count, 200, 40.0)?;
    let moved = settle(lab)?.since(&before);
    lab.wan()?.set_loss(0.0);
    let lost = count - arrived;
    // Five standard deviations of the binomial distribution: 70 around 200.
    let expected = count as f64 * loss;
    let bound = 5.0 * (expected * (1.0 - loss)).sqrt();
    let passed = (lost as f64 - expected).abs() <= bound && moved.forward.lost == lost;
    Ok(
        json!({"passed": passed, "sent": count, "lost": lost, "counted_lost": moved.forward.lost, "expected": expected, "bound": bound}),
    )
}

/// One part of [`wan_check`].
pub fn check_cut(lab: &Lab, a: &Host, b: &Host) -> Result<Value> {
    lab.wan()?.cut()?;
    let during = udp_blast(a, b, 500, 200, 10.0)? + udp_blast(b, a, 500, 200, 10.0)?;
    lab.wan()?.restore()?;
    let after = udp_blast(a, b, 500, 200, 10.0)?;
    Ok(
        json!({"passed": during == 0 && after == 500, "arrived_during": during, "arrived_after": after, "sent_after": 500}),
    )
}

/// One part of [`wan_check`].
pub fn check_rate(
    lab: &Lab,
    a: &Host,
    b: &Host,
    params: &LinkParams,
    ramp: Duration,
    measure: Duration,
) -> Result<Value> {
    let before = lab.wan()?.stats()?;
    let (rates, missing) = tcp_rate_check(a, b, ramp, measure)?;
    let moved = lab.wan()?.stats()?.since(&before);
    let best = rates.iter().map(|rate| rate.mbit_s).fold(0.0, f64::max);
    let possible = payload_mbit_s(params);
    let cpu_ms = (moved.forward.cpu_us + moved.backward.cpu_us) / 1000;
    Ok(json!({
        "passed": best >= 0.95 * possible, "best_mbit_s": best, "payload_limit_mbit_s": possible,
        "share": best / possible, "streams": rates, "not_measured": missing, "note": "mbit_s leaves out the first ramp_s seconds",
        "emulator_cpu_ms": cpu_ms, "queue_dropped": moved.forward.queue_dropped,
    }))
}
