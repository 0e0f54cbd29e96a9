//! Writes that a guest acknowledged must be there for ever: redis with `appendfsync always`, a writer outside, a checker.
//!
//! Owns the writer's connection and its record on the lab's disk. Invariant: a write is recorded only after the guest said
//! that it is on its disk; one whose answer did not come is neither recorded nor repeated under its number.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::swarm::run;
use crate::guest::GuestControl;
use crate::lab::ns::NetNs;

/// Where redis listens in the guest.
pub const PORT: u16 = 6380;
/// Time between two writes.
const EVERY: Duration = Duration::from_millis(20);
/// An answer that takes longer does not come: the writer connects again.
const ANSWER: Duration = Duration::from_secs(5);
/// How long redis may take to serve, or a moved guest to be reached, again.
const SERVES: Duration = Duration::from_secs(60);
/// Keys that are asked for at once.
const BATCH: usize = 100;
/// Longest line of an answer that is read, bytes.
const LINE_MAX: u64 = 4096;

const START: &str = "mkdir -p /var/lib/acked && systemd-run --quiet --collect --unit=acked \
    redis-server --port 6380 --bind 0.0.0.0 --protected-mode no --save '' \
    --appendonly yes --appendfsync always --dir /var/lib/acked";
const KILL: &str = "systemctl kill -s KILL acked.service && \
    while systemctl is-active --quiet acked.service; do sleep 0.1; done";

/// Starts redis in a Debian guest.
pub fn serve(control: &mut GuestControl) -> Result<()> {
    run(control.shell(START)).map(drop)
}

/// Ends redis without a warning and starts it again: what it answers then it has from its disk.
pub fn serve_again(control: &mut GuestControl) -> Result<()> {
    run(async {
        control.shell(KILL).await.context("killing redis")?;
        control.shell(START).await.map(drop)
    })
}

/// A connection that speaks redis's protocol.
struct Redis {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Redis {
    fn connect(ns: &NetNs, target: SocketAddr) -> Result<Self> {
        let stream = ns.run(|| TcpStream::connect_timeout(&target, ANSWER))??;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(Self { reader: BufReader::new(stream.try_clone()?), writer: stream })
    }

    fn line(&mut self) -> Result<String> {
        use std::io::Read;
        let mut line = String::new();
        (&mut self.reader).take(LINE_MAX).read_line(&mut line)?;
        ensure!(line.ends_with("\r\n"), "cut off after {line:?}");
        Ok(line.trim_end().to_owned())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        self.writer.write_all(command(&["SET", key, value]).as_bytes())?;
        let answer = self.line()?;
        ensure!(answer == "+OK", "SET: {answer}");
        Ok(())
    }

    /// The values of some keys; none: no such key.
    fn get(&mut self, keys: &[String]) -> Result<Vec<Option<String>>> {
        let asked: String = keys.iter().map(|key| command(&["GET", key])).collect();
        self.writer.write_all(asked.as_bytes())?;
        let mut values = Vec::new();
        for _ in keys {
            let head = self.line()?;
            values.push(match head.as_str() {
                "$-1" => None,
                length if length.starts_with('$') => Some(self.line()?),
                other => bail!("GET: {other}"),
            });
        }
        Ok(values)
    }
}

fn command(words: &[&str]) -> String {
    let words: String = words.iter().map(|w| format!("${}\r\n{w}\r\n", w.len())).collect();
    let count = words.matches('$').count();
    format!("*{count}\r\n{words}")
}

fn key(number: u64) -> String {
    format!("k{number}")
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    acked: AtomicU64,
}

/// The writer, in the background.
pub struct Acked {
    ns: NetNs,
    target: SocketAddr,
    record: PathBuf,
    shared: Arc<Shared>,
    thread: JoinHandle<Result<Duration>>,
}

/// What a guest has of what it acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Writes that it acknowledged.
    pub acked: u64,
    /// Of these, those that it has not, or not as written.
    pub lost: u64,
}

impl Acked {
    /// Begins to write from inside `ns`; every acknowledged write is a line of the new file `record`.
    ///
    /// # Errors
    /// If redis does not serve within a minute.
    pub fn start(ns: &NetNs, target: SocketAddr, record: &Path) -> Result<Self> {
        let mut redis = connect_until(ns, target, Instant::now() + SERVES)?;
        let mut file = File::create_new(record)?;
        let shared = Arc::new(Shared::default());
        let (writing, from) = (Arc::clone(&shared), ns.clone());
        let thread = std::thread::Builder::new().name("acked".into()).spawn(move || {
            let (mut number, mut last, mut longest) = (0, Instant::now(), Duration::ZERO);
            while !writing.stop.load(Ordering::SeqCst) {
                number += 1;
                let value = value(number);
                if redis.set(&key(number), &value).is_ok() {
                    writeln!(file, "{number} {value}")?;
                    writing.acked.fetch_add(1, Ordering::SeqCst);
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                    // The rate of the load, not a wait for anything.
                    std::thread::sleep(EVERY);
                } else if let Ok(again) = Redis::connect(&from, target) {
                    redis = again;
                }
            }
            Ok(longest)
        })?;
        Ok(Self { ns: ns.clone(), target, record: record.to_owned(), shared, thread })
    }

    /// Writes acknowledged so far.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.shared.acked.load(Ordering::SeqCst)
    }

    /// Reads back all that was acknowledged until now, while writing goes on.
    ///
    /// # Errors
    /// If redis does not answer: that says nothing about what it has.
    pub fn check(&self) -> Result<Kept> {
        check(&self.ns, self.target, &self.record)
    }

    /// Stops writing, restarts redis hard by `control`, and reads all back. Also the longest time between two
    /// acknowledged writes.
    ///
    /// # Errors
    /// As [`Acked::check`], or if the record could not be kept.
    pub fn finish(self, control: &mut GuestControl) -> Result<(Kept, Duration)> {
        self.shared.stop.store(true, Ordering::SeqCst);
        let longest = self.thread.join().map_err(|_| anyhow!("the writer panicked"))??;
        let before = check(&self.ns, self.target, &self.record)?;
        serve_again(control)?;
        let after = check(&self.ns, self.target, &self.record)?;
        Ok((Kept { acked: after.acked, lost: before.lost.max(after.lost) }, longest))
    }
}

fn connect_until(ns: &NetNs, target: SocketAddr, end: Instant) -> Result<Redis> {
    loop {
        let ready = Redis::connect(ns, target).and_then(|mut redis| {
            // One that still loads its file says so to every command.
            redis.get(&[key(0)]).map(|_| redis)
        });
        match ready {
            Ok(redis) => return Ok(redis),
            Err(error) if Instant::now() > end => return Err(error.context("redis")),
            // It is another machine's service that starts: nothing tells when.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Not compressible, and told by its number alone.
fn value(number: u64) -> String {
    blake3::hash(&number.to_le_bytes()).to_hex().to_string()
}

fn check(ns: &NetNs, target: SocketAddr, record: &Path) -> Result<Kept> {
    let text = std::fs::read_to_string(record)?;
    // A line that is being written has no end yet.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut expected = BTreeMap::new();
    for line in whole.lines() {
        let (number, value) = line.split_once(' ').context("the record")?;
        expected.insert(number.parse::<u64>()?, value.to_owned());
    }
    let end = Instant::now() + SERVES;
    let mut redis = connect_until(ns, target, end)?;
    let mut lost = 0;
    let all: Vec<(&u64, &String)> = expected.iter().collect();
    for batch in all.chunks(BATCH) {
        let keys: Vec<String> = batch.iter().map(|(number, _)| key(**number)).collect();
        let found = loop {
            match redis.get(&keys) {
                Ok(found) => break found,
                // The node that carries the connection may have been killed just now.
                Err(_) if Instant::now() < end => redis = connect_until(ns, target, end)?,
                Err(error) => return Err(error.context("redis, which answered before")),
            }
        };
        lost += batch.iter().zip(&found).filter(|((_, v), f)| f.as_ref() != Some(*v)).count();
    }
    Ok(Kept { acked: expected.len() as u64, lost: lost as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_as_redis_reads_them() {
        assert_eq!(command(&["GET", "k7"]), "*2\r\n$3\r\nGET\r\n$2\r\nk7\r\n");
        assert_eq!(value(1).len(), 64);
        assert_ne!(value(1), value(2));
    }
}
