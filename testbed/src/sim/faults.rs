//! What goes wrong: how often by chance, and what is planned for a moment.
//!
//! Owns the choice of faults. Half of them are aimed: they wait for a guest to be stopped and strike
//! while it stands still.

use rand::RngExt;
use rand::rngs::StdRng;

use super::event::Event;
use super::world::World;

/// What goes wrong by chance.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Messages that are lost.
    pub loss: f64,
    /// Messages that come twice, and that come very late.
    pub double: f64,
    /// Chance of a crash at each step.
    pub crash: f64,
    /// Chance that a destination refuses, that a load or a first rebuild fails.
    pub fail: f64,
    /// How much later than others a message may be.
    pub delay_ms: u64,
    /// How much later it is between sites.
    pub wan_ms: u64,
    /// Chance that a stranger repeats a message.
    pub strangers: f64,
    /// Whether clocks are wrong.
    pub drift: bool,
    /// Chance that a fault waits for a guest to be stopped.
    pub ambush: f64,
}

impl Faults {
    /// Nothing but what every network has.
    #[must_use]
    pub fn quiet() -> Self {
        Self { delay_ms: 20, ..Self::default() }
    }

    /// Whatever the seed says.
    pub fn random(rng: &mut StdRng) -> Self {
        let mut sometimes =
            |p: f64, most: f64| if rng.random_bool(p) { rng.random_range(0.0..most) } else { 0.0 };
        Self {
            loss: sometimes(0.6, 0.3),
            double: sometimes(0.6, 0.2),
            crash: sometimes(0.5, 0.02),
            fail: sometimes(0.3, 0.3),
            delay_ms: 2 + sometimes(0.9, 150.0) as u64,
            wan_ms: sometimes(0.5, 80.0) as u64,
            strangers: sometimes(0.3, 0.1),
            drift: rng.random_bool(0.5),
            ambush: 0.9,
        }
    }

    /// A bad network, and now and then a crash.
    #[must_use]
    pub fn stormy() -> Self {
        Self { loss: 0.1, double: 0.1, crash: 0.004, delay_ms: 200, ..Self::default() }
    }

    /// Little goes wrong before a guest is stopped, and then something does.
    #[must_use]
    pub fn aimed(self) -> Self {
        let (loss, fail) = (self.loss / 8.0, self.fail / 8.0);
        Self { loss, fail, crash: 0.0, ambush: 1.0, ..self }
    }
}

impl World {
    /// What else happens while migration `n` does, from `start` on.
    pub fn plan(&mut self, rng: &mut StdRng, n: u8, start: u64) {
        let nodes = self.nodes.len();
        let mut soon = || start + rng.random_range(0..3000);
        let (abort, kill, kill_running, pause) = (soon(), soon(), soon(), soon());
        let cuts: Vec<_> = (0..2).map(|_| (soon(), soon() - start)).collect();
        if rng.random_bool(0.15) {
            self.at(abort, Event::Abort(n));
        }
        if rng.random_bool(0.25) {
            self.at(kill, Event::Kill(false));
        }
        if rng.random_bool(0.04) {
            self.at(kill_running, Event::Kill(true));
        }
        if rng.random_bool(0.2) {
            let ms = rng.random_range(10..12_000);
            self.at(pause, Event::Pause(rng.random_range(0..nodes), ms));
        }
        let vms = self.vms.len() as u64;
        if vms > 0 && rng.random_bool(0.3) {
            let vm = self.vms[rng.random_range(0..vms) as usize];
            self.at(start + rng.random_range(0..3000), Event::Rewire(vm));
        }
        for (at, long) in cuts {
            if rng.random_bool(0.3) {
                let (x, both) = (rng.random_range(0..nodes), rng.random_bool(0.6));
                self.partition(at, x, true, both, 3 * long * long / 1000);
            }
        }
    }

    /// Cuts a node off, at a moment and for a time.
    fn partition(&mut self, at: u64, x: usize, out: bool, inward: bool, for_ms: u64) {
        for y in (0..self.nodes.len()).filter(|y| *y != x) {
            if out {
                self.at(at, Event::Cut(x, y));
            }
            if inward {
                self.at(at, Event::Cut(y, x));
            }
        }
        self.at(at + for_ms, Event::Heal);
    }

    /// A guest was stopped: what waited for that strikes, at some moment of the cutover.
    pub(super) fn ambush(&mut self) {
        if !self.chance(self.faults.ambush) {
            return;
        }
        let reach = [30, 150, 1000][self.below(3) as usize] + 2 * self.faults.wan_ms;
        let (at, x) = (self.below(reach), self.below(self.nodes.len() as u64) as usize);
        match self.below(10) {
            0..=3 => {
                let away = [30, 1000, 25_000][self.below(3) as usize];
                let ms = 20 + self.below(away);
                self.at(at, Event::Crash(x, ms));
            }
            4..=6 => {
                let long = self.below(25_000);
                let (out, inward) =
                    [(true, true), (true, false), (false, true)][self.below(3) as usize];
                self.partition(at, x, out, inward, long);
            }
            7 => {
                let ms = 10 + self.below(25_000);
                self.at(at, Event::Pause(x, ms));
            }
            8 => self.at(at, Event::Kill(false)),
            _ => {
                // One direction between two hosts, for long.
                let y = self.below(self.nodes.len() as u64) as usize;
                self.at(at, Event::Cut(x, y));
                self.at(at + 20_000, Event::Heal);
            }
        }
    }
}
