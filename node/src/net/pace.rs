//! How fast a bulk connection may send, so that it does not fill the path's queue: guests' frames wait in it too,
//! and nobody sends those again.
//!
//! Owns a cap on the kernel's pacing, set from what the kernel measures. Never replaces congestion control:
//! the kernel's decides below the cap. Invariant: a queue that is not this connection's does not hold it down;
//! a cap that does not shorten the queue is lifted.
//!
//! ```text
//!   Free --queue too long--> Draining --no more on its way than fits--> Cruising --short again--> Free
//!    ^                                                                     +--still long--> Shared --later--> Free
//! ```
//!
//! While it starts, bbr sends up to 2.9 times what the path takes, for three round trips after the path is full.
//! Here it is held to little more than twice what was delivered, and to half as soon as packets wait.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Weak;
use std::time::{Duration, Instant};

use socket2::Socket;

/// How often a connection is looked at, with data on its way and without.
const LOOK: Duration = Duration::from_millis(5);
const LOOK_IDLE: Duration = Duration::from_millis(20);
/// Looks in a row at which packets wait, before that is believed.
const LOOKS: u32 = 2;
/// Shortest queue that counts, microseconds: hosts are not exact to less.
const NOISE_US: u64 = 4_000;
/// Rates below this are not worth a cap, bytes per second.
const LEAST: u64 = 1 << 20;
/// What may be sent at the start, in quarters of what is delivered: enough to double in a round trip and a bit.
const START: u64 = 9;
/// Round trips (with the queue) that draining may take.
const DRAINS: u64 = 6;
/// Round trips for which the measured rate is kept. bbr takes a path for full after three of them.
const CRUISES: u64 = 4;
/// How long a shared queue is left alone.
const SHARED_US: u64 = 5_000_000;

/// `TCP_CC_INFO`: what the congestion control tells of itself.
const TCP_CC_INFO: libc::c_int = 26;

/// What the kernel knows of a connection.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    at_us: u64,
    /// Round trip of the last packets, and the shortest that was seen.
    rtt_us: u64,
    min_rtt_us: u64,
    /// Bytes per second that reached the other end.
    delivered: u64,
    /// Bytes on their way.
    in_flight: u64,
    /// Whether its congestion control still looks for the path's rate.
    starting: bool,
    /// Whether there was less to send than the path takes: a queue is somebody else's then.
    idle: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Draining { rate: u64, until_us: u64 },
    Cruising { rate: u64, until_us: u64 },
    Shared { until_us: u64 },
}

/// The rule.
#[derive(Debug)]
struct Pace {
    state: State,
    looks: u32,
}

impl Pace {
    fn new() -> Self {
        Self { state: State::Free, looks: 0 }
    }

    /// The cap from now on, bytes per second; none: no cap.
    fn step(&mut self, s: &Sample) -> Option<u64> {
        let waits_us = s.rtt_us.saturating_sub(s.min_rtt_us);
        let long_us = if s.starting { s.min_rtt_us / 16 } else { s.min_rtt_us * 2 / 5 };
        let long_us = long_us.max(if s.starting { NOISE_US } else { 4 * NOISE_US });
        let long = s.in_flight > 0 && s.min_rtt_us > 0 && waits_us > long_us && !s.idle;
        self.looks = if long { self.looks + 1 } else { 0 };
        if let State::Draining { rate, .. } = &mut self.state {
            // The path has been full since before: this is its own rate.
            *rate = s.delivered.max(*rate);
        }
        match self.state {
            State::Free if self.looks >= LOOKS && s.delivered >= LEAST => {
                let until_us = s.at_us + DRAINS * s.rtt_us;
                self.state = State::Draining { rate: s.delivered, until_us };
            }
            // What is on its way fits the path without its queue: the queue is going.
            State::Draining { rate, .. } if s.in_flight <= fits(rate, s.min_rtt_us) => {
                let until_us = s.at_us + CRUISES * s.min_rtt_us.max(NOISE_US);
                self.state = State::Cruising { rate, until_us };
            }
            // Still there although this connection sends less than the path takes: it is not this one's.
            State::Draining { until_us, .. } | State::Cruising { until_us, .. }
                if s.at_us >= until_us && long =>
            {
                self.state = State::Shared { until_us: s.at_us + SHARED_US };
            }
            State::Draining { until_us, .. }
            | State::Cruising { until_us, .. }
            | State::Shared { until_us }
                if s.at_us >= until_us =>
            {
                self.state = State::Free;
            }
            _ => {}
        }
        match self.state {
            State::Free if s.starting && s.delivered >= LEAST => Some(s.delivered / 4 * START),
            State::Free | State::Shared { .. } => None,
            State::Draining { rate, .. } => Some(rate / 2),
            State::Cruising { rate, .. } => Some(rate / 20 * 19),
        }
    }
}

/// Bytes that a path of this rate holds.
fn fits(rate: u64, rtt_us: u64) -> u64 {
    rate.saturating_mul(rtt_us) / 1_000_000
}

/// Looks after a connection until it is closed.
pub async fn govern(socket: Weak<Socket>) {
    let (began, mut pace, mut set) = (Instant::now(), Pace::new(), None);
    loop {
        let in_flight = {
            let Some(socket) = socket.upgrade() else { return };
            let Ok(mut sample) = sample(&socket) else { return };
            sample.at_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            let cap = pace.step(&sample);
            if cap != set && cap_pacing(&socket, cap).is_ok() {
                set = cap;
            }
            sample.in_flight
        };
        tokio::time::sleep(if in_flight > 0 { LOOK } else { LOOK_IDLE }).await;
    }
}

/// Caps what the kernel sends, bytes per second.
fn cap_pacing(socket: &Socket, cap: Option<u64>) -> io::Result<()> {
    let rate = cap.unwrap_or(u64::MAX);
    let length = size_of::<u64>() as libc::socklen_t;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE);
    // SAFETY: the descriptor is open as long as `socket`, and the kernel reads a `u64` that outlives the call.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const rate).cast(), length)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks the kernel. `struct tcp_info` only ever grows at its end: fields are read where they have always been.
fn sample(socket: &Socket) -> io::Result<Sample> {
    let mut info = [0_u8; 168];
    let length = option(socket, libc::TCP_INFO, &mut info)?;
    let u32_at =
        |at: usize| info[at..].first_chunk().map_or(0, |b| u64::from(u32::from_ne_bytes(*b)));
    let u64_at = |at: usize| info[at..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b));
    if length < info.len() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // `struct tcp_bbr_info`: the gain over the estimated rate, in 256ths, is the fourth number.
    let mut bbr = [0_u8; 20];
    let known = option(socket, TCP_CC_INFO, &mut bbr)? >= bbr.len();
    let gain = bbr[12..].first_chunk().map_or(0, |b| u32::from_ne_bytes(*b));
    Ok(Sample {
        at_us: 0,
        in_flight: u32_at(24) * u32_at(16),
        rtt_us: u32_at(68),
        min_rtt_us: u32_at(148),
        delivered: u64_at(160),
        starting: known && gain > 2 * 256,
        // `tcpi_delivery_rate_app_limited`, the lowest bit.
        idle: info[7] & 1 == 1,
    })
}

/// Reads an option of TCP; gives its length.
fn option(socket: &Socket, option: libc::c_int, bytes: &mut [u8]) -> io::Result<usize> {
    let mut length = bytes.len() as libc::socklen_t;
    let into = bytes.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `length` bytes into a slice of that length; both outlive the call.
    let read = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, into, &raw mut length)
    };
    if read == 0 { Ok(length as usize) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sender like bbr over a path with a queue, a step a millisecond. Sums are of bytes since the start.
    struct Path {
        rate: u64,
        rtt_ms: usize,
        sent: u64,
        /// What of it has left the queue, after each step.
        left: Vec<u64>,
        others_queue: u64,
        /// The most that was delivered, bytes per second, and for how many steps it has not grown.
        best: u64,
        flat: usize,
        longest_ms: u64,
    }

    impl Path {
        fn new(mbit: u64, rtt_ms: usize) -> Self {
            let rate = mbit * 125_000;
            Self {
                rate,
                rtt_ms,
                sent: 0,
                left: vec![0],
                others_queue: 0,
                best: 0,
                flat: 0,
                longest_ms: 0,
            }
        }

        /// What had left the queue so many round trips ago: known to the sender after one.
        fn acknowledged(&self, rtts: usize) -> u64 {
            (self.left.len() - 1).checked_sub(rtts * self.rtt_ms).map_or(0, |at| self.left[at])
        }

        fn delivered(&self) -> u64 {
            (self.acknowledged(1) - self.acknowledged(2)) * 1000 / self.rtt_ms as u64
        }

        /// One millisecond; `other` bytes of somebody else's come, too.
        fn step(&mut self, pace: &mut Pace, other: u64) {
            let (delivered, in_flight) = (self.delivered(), self.sent - self.acknowledged(1));
            self.flat = if delivered * 4 > self.best * 5 { 0 } else { self.flat + 1 };
            if self.flat == 0 {
                self.best = delivered;
            }
            let starting = self.flat < 4 * self.rtt_ms;
            let own_queue = self.sent - self.left.last().unwrap();
            let queue_us = (own_queue + self.others_queue) * 1_000_000 / self.rate;
            self.longest_ms = self.longest_ms.max(queue_us / 1000);
            let cap = pace.step(&Sample {
                at_us: self.left.len() as u64 * 1000,
                // As if it were known at once.
                rtt_us: self.rtt_ms as u64 * 1000 + queue_us,
                min_rtt_us: self.rtt_ms as u64 * 1000,
                delivered,
                in_flight,
                starting,
                idle: false,
            });
            let gain = if starting { 2885 } else { 1000 };
            let wish = (delivered.max(self.best) * gain / 1000).max(200_000);
            let window = fits(self.best * gain / 500, self.rtt_ms as u64 * 1000).max(40_000);
            let send = cap.map_or(wish, |cap| cap.min(wish)) / 1000;
            self.sent += send.min(window.saturating_sub(in_flight));
            self.others_queue += other;
            let own_queue = self.sent - self.left.last().unwrap();
            let all = own_queue + self.others_queue;
            let gone = all.min(self.rate / 1000);
            let own = own_queue * gone / all.max(1);
            self.others_queue -= gone - own;
            self.left.push(self.left.last().unwrap() + own);
        }
    }

    #[test]
    fn a_start_fills_the_path_and_not_its_queue() {
        for (mbit, rtt_ms) in [(100, 80), (500, 40), (20, 200)] {
            let (mut path, mut pace) = (Path::new(mbit, rtt_ms), Pace::new());
            (0..30 * rtt_ms).for_each(|_| path.step(&mut pace, 0));
            let longest_ms = path.longest_ms;
            assert!(longest_ms < rtt_ms as u64 / 2, "{mbit} x {rtt_ms}: {longest_ms}");
            assert!(
                path.delivered() > path.rate * 17 / 20,
                "{mbit} x {rtt_ms}: {}",
                path.delivered()
            );
        }
    }

    #[test]
    fn somebody_elses_queue_is_no_reason_to_go_slow_for_ever() {
        let (mut path, mut pace) = (Path::new(100, 80), Pace::new());
        let mut shared = 0;
        for _ in 0..4000 {
            // It keeps half a megabyte in the queue, whatever else comes.
            let other = 500_000_u64.saturating_sub(path.others_queue);
            path.step(&mut pace, other);
            shared += u32::from(matches!(pace.state, State::Shared { .. }));
        }
        assert!(shared > 1000, "{shared}");
    }

    #[test]
    fn a_cap_is_what_was_delivered() {
        let mut pace = Pace::new();
        let sample = |at_us, rtt_us, delivered, in_flight| Sample {
            at_us,
            rtt_us,
            min_rtt_us: 80_000,
            delivered,
            in_flight,
            starting: true,
            idle: false,
        };
        assert_eq!(pace.step(&sample(0, 80_000, 100_000, 1)), None);
        assert_eq!(pace.step(&sample(5_000, 80_000, 8_000_000, 640_000)), Some(18_000_000));
        let full = sample(10_000, 90_000, 12_000_000, 1_500_000);
        assert_eq!(pace.step(&full), Some(27_000_000), "once is noise");
        assert_eq!(pace.step(&full), Some(6_000_000));
        let drained = sample(90_000, 120_000, 12_000_000, 900_000);
        assert_eq!(pace.step(&drained), Some(11_400_000));
        let calm = sample(500_000, 81_000, 11_400_000, 900_000);
        assert_eq!(pace.step(&calm), Some(25_650_000));
    }
}
