//! CPU time and memory of a side's processes while it moves a guest.
//!
//! Owns a thread that looks at `/proc` every 50 ms. A process belongs to a side by its network namespace, so those that come
//! and go during the move count, too (but for their last 50 ms).

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;

const EVERY: Duration = Duration::from_millis(50);

/// What the processes used.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage {
    /// CPU time of all of them, milliseconds.
    pub cpu_ms: f64,
    /// The largest resident anonymous memory of one watched process, bytes.
    pub rss_anon_peak_bytes: Option<u64>,
    /// The largest growth of one watched process since the start, bytes.
    pub rss_anon_growth_bytes: Option<u64>,
}

#[derive(Default)]
struct Tally {
    /// Clock ticks at the first and the last look.
    ticks: BTreeMap<u32, (u64, u64)>,
    /// Bytes at the first look, and the most.
    anon: BTreeMap<u32, (u64, u64)>,
}

/// A running look at a lab's processes.
pub(super) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Tally>,
}

impl Sampler {
    /// Starts; the memory of the processes in `watched` is followed.
    pub fn start(lab: &Lab, watched: Vec<u32>) -> Result<Self> {
        let mut inside = Vec::new();
        for host in lab.hosts() {
            inside.push(format!("net:[{}]", host.ns.inode()?));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let mut tally = Tally::default();
        tally.look(&inside, &watched, true);
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("sampler".into()).spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                thread::sleep(EVERY);
                tally.look(&inside, &watched, false);
            }
            tally
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the look.
    pub fn finish(self) -> Result<Usage> {
        self.stop.store(true, Ordering::SeqCst);
        let tally = self.thread.join().ok().context("the sampler panicked")?;
        // SAFETY: sysconf has no preconditions.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        let ticks: u64 = tally.ticks.values().map(|(first, last)| last - first).sum();
        Ok(Usage {
            cpu_ms: ticks as f64 * 1000.0 / per_second as f64,
            rss_anon_peak_bytes: tally.anon.values().map(|(_, most)| *most).max(),
            rss_anon_growth_bytes: tally.anon.values().map(|(first, most)| most - first).max(),
        })
    }
}

impl Tally {
    fn look(&mut self, inside: &[String], watched: &[u32], first: bool) {
        let Ok(entries) = fs::read_dir("/proc") else { return };
        let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
        for pid in pids {
            let Ok(ns) = fs::read_link(format!("/proc/{pid}/ns/net")) else { continue };
            if !inside.iter().any(|name| ns.as_os_str() == name.as_str()) {
                continue;
            }
            let Some(ticks) = cpu_ticks(pid) else { continue };
            // What started later counts from zero.
            let entry = self.ticks.entry(pid).or_insert((if first { ticks } else { 0 }, ticks));
            entry.1 = ticks.max(entry.1);
        }
        for pid in watched {
            let Some(bytes) = rss_anon(*pid) else { continue };
            let entry = self.anon.entry(*pid).or_insert((bytes, bytes));
            entry.1 = bytes.max(entry.1);
        }
    }
}

/// User and system time of a process, all its threads, clock ticks.
fn cpu_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(number(11)? + number(12)?)
}

fn rss_anon(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let pid = std::process::id();
        assert!(cpu_ticks(pid).is_some());
        assert!(rss_anon(pid).unwrap() > 1 << 16);
        let inside = fs::read_link("/proc/self/ns/net").unwrap();
        let mut tally = Tally::default();
        tally.look(&[inside.to_str().unwrap().to_owned()], &[pid], true);
        assert!(tally.ticks.contains_key(&pid));
        assert!(tally.anon.contains_key(&pid));
    }
}
