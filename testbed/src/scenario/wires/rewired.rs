//! A NIC that is connected otherwise while its guest moves, or is off.
//!
//! Owns those parts of the run. Invariant: what is asked for counts where the guest runs afterwards, from its first
//! instruction on.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::{ECHO_PORT, QUIET, SOON, World};
use crate::guest::wire::UDP_SINK_PORT;
use crate::scenario::roundtrip::moves::{Moving, Wish};
use crate::scenario::swarm::{Swarm, WIRE, run};

/// Bytes per second that a move may take so that there is time to ask for something else.
const SLOW: u64 = 4 << 20;
/// Switches the guest off once that is acknowledged.
const END: &str = "(sleep 1; poweroff -f) >/dev/null 2>&1 </dev/null &";

impl World {
    /// A filter that is made, and a NIC that is taken off its wire, while the guest moves. Says how many datagrams were
    /// sent in vain meanwhile.
    pub(super) fn on_the_way(&mut self) -> Result<u64> {
        let denied = self.prober(UDP_SINK_PORT)?;
        let moving = self.slowly("h2")?;
        self.ask(&["wire", "filter", "web", &format!("deny udp {UDP_SINK_PORT}")])?;
        ensure!(!moving.is_over(), "the move was over before the filter was made");
        let reached = self.settled()?;
        self.arrives(moving, "h2")?;
        ensure!(self.sunk()? == reached, "denied on the way, and it got through");
        let denied = denied.stop(QUIET);
        ensure!(denied.sent > 100 && self.sunk()? == reached, "denied, and it got through");

        let moving = self.slowly("h1")?;
        self.ask(&["wire", "disconnect", "web", WIRE])?;
        ensure!(!moving.is_over(), "the move was over before the NIC was taken off its wire");
        self.arrives(moving, "h1")?;
        let cut = self.heard(QUIET)?;
        ensure!(cut.unique == 0, "{} answers of a guest on no wire", cut.unique);
        self.ask(&["wire", "connect", "web", WIRE])?;
        let talk = self.prober(ECHO_PORT)?;
        ensure!(talk.wait_unique(20, SOON), "a NIC that was connected again is not reached");
        drop(talk);
        Ok(denied.sent)
    }

    /// A move that goes on for some seconds, in its transfer.
    fn slowly(&self, to: &'static str) -> Result<Moving> {
        let wish = Wish { bandwidth: SLOW, ..Wish::new("h3", "web", to) };
        let moving = Moving::start(&self.swarm, &wish)?;
        self.swarm.wait("its pages cross", SOON, |swarm| {
            let moves = swarm.ask("h3", &["migrations"])?;
            let crosses = |m: &serde_json::Value| m["phase"] == "transfer";
            Ok(moves.as_array().is_some_and(|all| all.iter().any(crosses)))
        })?;
        Ok(moving)
    }

    /// What the guest has taken, once it takes no more.
    fn settled(&self) -> Result<u64> {
        let (end, mut last) = (Instant::now() + SOON, self.sunk()?);
        loop {
            std::thread::sleep(QUIET);
            let now = self.sunk()?;
            if now == last {
                return Ok(now);
            }
            ensure!(Instant::now() < end, "what is denied gets through");
            last = now;
        }
    }

    /// Off, its filter is made stricter; started again, the guest is never reached but behind that.
    pub(super) fn switched_off(&mut self) -> Result<()> {
        run(async { self.swarm.control(self.host, &self.guest)?.shell(END).await })?;
        let host = self.host;
        let off = |s: &Swarm| Ok(s.ask(host, &["vm", "show", "web"])?["state"] == "off");
        self.swarm.wait("it is off", SOON, off)?;
        let deny = format!("deny udp {UDP_SINK_PORT}");
        self.ask(&["wire", "filter", "web", &deny, &format!("deny udp {ECHO_PORT}")])?;
        self.ask(&["vm", "start", "web"])?;
        run(async { self.swarm.control(self.host, &self.guest)?.wait_ready(SOON).await })?;
        let cut = self.heard(QUIET)?;
        ensure!(
            cut.unique == 0,
            "{} answers past a filter that was made while it was off",
            cut.unique
        );
        self.ask(&["wire", "filter", "web", &deny])?;
        let talk = self.prober(ECHO_PORT)?;
        ensure!(
            talk.wait_unique(20, SOON),
            "it is not reached though nothing denies that any more"
        );
        drop(talk);
        Ok(())
    }
}
