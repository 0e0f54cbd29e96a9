//! A TCP session with a guest, kept over its moves: numbered lines out, the same lines back.
//!
//! Owns one connection and its thread. Invariant: it never connects again; a session that breaks is reported as broken.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::lab::ns::NetNs;

/// Time between two lines.
const EVERY: Duration = Duration::from_millis(50);
/// Longest silence before the session counts as broken.
const SILENCE: Duration = Duration::from_secs(30);

/// A session that goes on in the background.
pub(super) struct Session {
    stop: Arc<AtomicBool>,
    lines: Arc<AtomicU64>,
    thread: JoinHandle<Result<Duration>>,
}

impl Session {
    /// Connects once from inside `ns`.
    pub fn start(ns: &NetNs, target: SocketAddr) -> Result<Self> {
        let stream = ns.run(|| TcpStream::connect_timeout(&target, SILENCE))?;
        let stream = stream.with_context(|| format!("TCP to {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        let (stop, lines) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ending, count) = (Arc::clone(&stop), Arc::clone(&lines));
        let thread = std::thread::spawn(move || talk(stream, &ending, &count));
        Ok(Self { stop, lines, thread })
    }

    /// Lines that came back so far.
    pub fn lines(&self) -> u64 {
        self.lines.load(Ordering::SeqCst)
    }

    /// Ends it: lines that came back, and the longest a line took.
    pub fn end(self) -> Result<(u64, Duration)> {
        self.stop.store(true, Ordering::SeqCst);
        let longest =
            self.thread.join().map_err(|_| anyhow!("the session's thread panicked"))??;
        Ok((self.lines.load(Ordering::SeqCst), longest))
    }
}

fn talk(stream: TcpStream, stop: &AtomicBool, lines: &AtomicU64) -> Result<Duration> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let mut longest = Duration::ZERO;
    let mut number = 0_u64;
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let (line, began) = (format!("line {number}\n"), Instant::now());
        writer.write_all(line.as_bytes()).context("the session broke")?;
        let mut back = String::new();
        reader.read_line(&mut back).context("the session broke")?;
        ensure!(back == line, "the session gave {back:?} in place of {line:?}");
        longest = longest.max(began.elapsed());
        lines.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(EVERY);
    }
    Ok(longest)
}
