//! One direction of a link as pure arithmetic: when does a packet that arrives now leave at the far end, if at all?
//!
//! Owns rate, delay, jitter, loss and queue length. Never reads a clock and never touches a packet's bytes.
//! Invariant: deliveries are in arrival order, and departures are spaced by exactly length / rate while there is a
//! queue, so the average rate is exact.
//!
//! ```text
//! arrival -> [queue, tail drop at queue_ms] -> serialised at rate -> lost? -> delay + jitter -> delivery
//! ```

use serde::{Deserialize, Serialize};

/// What one direction of a link is like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkParams {
    /// Bits of IP packets per second, each direction; 0 = not limited.
    pub rate_bps: u64,
    /// One-way delay in microseconds.
    pub delay_us: u64,
    /// A uniform extra of 0..=jitter microseconds per packet; packets are never reordered by it.
    pub jitter_us: u64,
    /// Probability that a packet is lost after it used its share of the rate (0.0 to 1.0).
    pub loss: f64,
    /// Longest time that a packet may wait for its turn, in milliseconds; what would wait longer is dropped.
    pub queue_ms: u64,
    /// Seed of the random draws (each direction derives its own).
    pub seed: u64,
}

impl LinkParams {
    /// A link of `mbit` Mbit/s and `rtt_ms` round trip: no loss, no jitter, 100 ms of queue.
    pub fn new(mbit: u64, rtt_ms: u64) -> Self {
        Self {
            rate_bps: mbit * 1_000_000,
            delay_us: rtt_ms * 500,
            jitter_us: 0,
            loss: 0.0,
            queue_ms: 100,
            seed: 1,
        }
    }
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It comes out at this time, in nanoseconds of the caller's clock.
    Deliver(u64),
    /// The queue is full.
    QueueFull,
    /// It was drawn to be lost; it has used its share of the rate.
    Lost,
}

/// The state of one direction; times are nanoseconds of any monotonic clock.
#[derive(Debug)]
pub struct Shaper {
    params: LinkParams,
    random: u64,
    busy_until: u64,
    last_delivery: u64,
}

impl Shaper {
    /// A fresh direction; `lane` tells the two directions' random draws apart.
    pub fn new(params: LinkParams, lane: u64) -> Self {
        let random = params.seed ^ lane.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self { params, random, busy_until: 0, last_delivery: 0 }
    }

    /// Its present parameters.
    pub fn params(&self) -> &LinkParams {
        &self.params
    }

    /// Changes parameters; packets already accepted keep their times. The random sequence goes on (the seed is ignored).
    pub fn set(&mut self, change: impl FnOnce(&mut LinkParams)) {
        change(&mut self.params);
    }

    /// Forgets what is queued (the caller dropped it).
    pub fn reset(&mut self, now: u64) {
        self.busy_until = now;
        self.last_delivery = now;
    }

    /// A packet of `len` bytes arrives at `now`.
    pub fn offer(&mut self, now: u64, len: usize) -> Verdict {
        let start = self.busy_until.max(now);
        if start - now > self.params.queue_ms.saturating_mul(1_000_000) {
            return Verdict::QueueFull;
        }
        let bits = len as u64 * 8 * 1_000_000_000;
        self.busy_until = start + bits.checked_div(self.params.rate_bps).unwrap_or(0);
        if self.params.loss > 0.0 && self.unit() < self.params.loss {
            return Verdict::Lost;
        }
        let jitter = match self.params.jitter_us {
            0 => 0,
            jitter_us => self.next() % (jitter_us * 1000 + 1),
        };
        let at = self.busy_until + self.params.delay_us * 1000 + jitter;
        self.last_delivery = at.max(self.last_delivery);
        Verdict::Deliver(self.last_delivery)
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spacing_is_length_over_rate() {
        let mut shaper = Shaper::new(LinkParams::new(100, 80), 0);
        // 1500 bytes at 100 Mbit/s: 120 us each, delivered 40 ms after they left.
        for n in 1..=500 {
            assert_eq!(shaper.offer(0, 1500), Verdict::Deliver(n * 120_000 + 40_000_000));
        }
    }

    #[test]
    fn queue_drops_its_tail_and_only_that() {
        let mut shaper = Shaper::new(LinkParams::new(100, 0), 0);
        let taken = (0..2000).filter(|_| shaper.offer(0, 1500) != Verdict::QueueFull).count();
        // 100 ms at 120 us each, and the one whose turn is exactly then.
        assert_eq!(taken, 834);
        assert_ne!(shaper.offer(200_000, 1500), Verdict::QueueFull);
    }

    #[test]
    fn jitter_keeps_order_and_bounds() {
        let mut params = LinkParams::new(0, 10);
        params.jitter_us = 3000;
        let mut shaper = Shaper::new(params, 1);
        let mut last = 0;
        for now in (0..1_000_000_000).step_by(100_000) {
            let Verdict::Deliver(at) = shaper.offer(now, 100) else { panic!("dropped") };
            assert!(at >= last && at >= now + 5_000_000 && at <= now + 8_000_000);
            last = at;
        }
    }

    #[test]
    fn loss_is_seeded_and_near_its_rate() {
        let run = |seed, lane| {
            let mut params = LinkParams::new(0, 0);
            (params.loss, params.seed) = (0.01, seed);
            let mut shaper = Shaper::new(params, lane);
            (0..100_000u64).filter(|n| shaper.offer(*n, 100) == Verdict::Lost).collect::<Vec<_>>()
        };
        let lost = run(7, 0);
        assert!((880..1120).contains(&lost.len()), "{}", lost.len());
        assert_eq!(lost, run(7, 0));
        assert_ne!(lost, run(8, 0));
        assert_ne!(lost, run(7, 1));
    }
}
