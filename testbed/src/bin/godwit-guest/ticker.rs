//! A thread that ticks every 10 ms and remembers the longest time in which it could not: what a pause looks like from inside.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

const TICK: Duration = Duration::from_millis(10);

/// What the ticker has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gaps {
    pub uptime_ms: u64,
    pub ticks: u64,
    pub max_monotonic_ms: u64,
    pub max_wall_ms: u64,
}

/// Handle to the ticking thread.
pub struct Ticker(Arc<Mutex<Gaps>>);

impl Ticker {
    /// Starts ticking.
    pub fn start() -> std::io::Result<Self> {
        let gaps = Arc::new(Mutex::new(Gaps::default()));
        let shared = Arc::clone(&gaps);
        thread::Builder::new().name("ticker".into()).spawn(move || {
            let (mut monotonic, mut wall) = (Instant::now(), SystemTime::now());
            loop {
                thread::sleep(TICK);
                let monotonic_gap = millis(monotonic.elapsed());
                // A wall clock that was set back shows no gap.
                let wall_gap = wall.elapsed().map_or(0, millis);
                (monotonic, wall) = (Instant::now(), SystemTime::now());
                let mut gaps = shared.lock().unwrap_or_else(PoisonError::into_inner);
                gaps.ticks += 1;
                gaps.max_monotonic_ms = gaps.max_monotonic_ms.max(monotonic_gap);
                gaps.max_wall_ms = gaps.max_wall_ms.max(wall_gap);
            }
        })?;
        Ok(Ticker(gaps))
    }

    /// What was seen so far; `reset` starts the longest gaps again from zero.
    pub fn read(&self, reset: bool) -> Gaps {
        let mut gaps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = Gaps { uptime_ms: uptime_ms(), ..*gaps };
        if reset {
            gaps.max_monotonic_ms = 0;
            gaps.max_wall_ms = 0;
        }
        seen
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn uptime_ms() -> u64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 =
        text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    (seconds * 1000.0) as u64
}
