//! Who is in the swarm and seems alive: SWIM by `foca`, without sockets and clocks.
//!
//! Owns this node's opinion of every other member. Never decides anything: an opinion is a hint for
//! planning and for noticing failures, it cannot move a VM or make a quorum. Never admits anyone:
//! bytes come from peers that the caller has authenticated.
//!
//! Invariants: at most [`MEMBERS`] members are kept; a message counts only if its sender is the
//! peer that brought it; a member that was declared down and is not comes back by itself.
//!
//! ```text
//!              probe and indirect probes unanswered     SUSPECT_MS
//!    alive -------------------------------------> suspect -----> down
//!      ^                                             |             |
//!      +-------- refuted (incarnation + 1) ----------+             |
//!      +-------- told so: comes back as generation + 1 ------------+
//! ```
//!
//! While members are down, some of them are greeted every few seconds, so that two halves that gave
//! each other up find back together when the cut ends.

#[cfg(test)]
mod tests;

use core::num::{NonZeroU8, NonZeroUsize};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use foca::{Codec, Foca, Identity, Notification, PeriodicParams, PostcardCodec, Runtime, Timer};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::id::{HostId, Name};
use crate::limits::{MEMBERS, MEMBERSHIP_BYTES};
use crate::time::Time;

/// How often a member is probed, ms.
const PROBE_MS: u64 = 1000;
/// How long a direct answer may take before others are asked to probe too, ms.
const RTT_MS: u64 = 500;
/// How long a suspect has to refute, ms.
const SUSPECT_MS: u64 = 4000;
/// How long a down member is remembered, ms.
const FORGET_MS: u64 = 3_600_000;
/// How often down members and first contacts are greeted, ms.
const GREET_MS: u64 = 3000;
/// How many of them each time.
const GREETED: usize = 3;

/// A member as it names itself. The higher generation of a host replaces the lower.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The host.
    pub host: HostId,
    /// Grows with each start and each return from the dead.
    pub generation: u64,
    /// Its site; `None` only in a greeting to a host that is not known yet.
    pub site: Option<Name>,
}

impl Identity for Member {
    type Addr = HostId;

    fn renew(&self) -> Option<Self> {
        Some(Self { generation: self.generation.checked_add(1)?, ..self.clone() })
    }

    fn addr(&self) -> HostId {
        self.host
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.generation > adversary.generation
    }
}

/// The opinion on a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It answers.
    Alive,
    /// It did not answer; it may still refute.
    Suspect,
    /// It has been given up, or has left.
    Down,
}

/// What this node thinks of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The host.
    pub host: HostId,
    /// Its site, if known.
    pub site: Option<Name>,
    /// The opinion.
    pub state: State,
}

/// What the caller has to do or may like to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send these bytes (at most [`MEMBERSHIP_BYTES`]). Loss is tolerated.
    Send {
        /// The receiver.
        to: HostId,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A member is alive, for the first time or again.
    Up(HostId),
    /// A member has been given up, or has left.
    Down(HostId),
}

/// Why bytes were not taken. The opinions are as they were.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// Not a membership message.
    #[error("malformed membership message: {0}")]
    Malformed(String),
    /// The message names another sender than the peer that brought it.
    #[error("membership message of {named} brought by {from}")]
    NotTheSender {
        /// Whom the message names.
        named: HostId,
        /// Who brought it.
        from: HostId,
    },
    /// It names more new members than can be kept.
    #[error("more than {MEMBERS} members")]
    TooMany,
}

/// One node's membership.
pub struct Membership {
    foca: Foca<Member, PostcardCodec, StdRng, foca::NoCustomBroadcast>,
    rng: StdRng,
    contacts: BTreeSet<HostId>,
    suspects: BTreeMap<HostId, (u64, foca::Incarnation, Time)>,
    greet_at: Time,
    left: bool,
    io: Io,
}

/// What foca asks of the world: collected here, handed to the caller.
#[derive(Default)]
struct Io {
    now: Time,
    number: u64,
    token: foca::TimerToken,
    timers: BTreeMap<(Time, u64), Timer<Member>>,
    outputs: VecDeque<Output>,
}

impl foca::Runtime<Member> for &mut Io {
    fn notify(&mut self, notification: Notification<'_, Member>) {
        match notification {
            Notification::MemberUp(m) => self.outputs.push_back(Output::Up(m.host)),
            Notification::MemberDown(m) => self.outputs.push_back(Output::Down(m.host)),
            _ => {}
        }
    }

    fn send_to(&mut self, to: Member, data: &[u8]) {
        self.outputs.push_back(Output::Send { to: to.host, bytes: data.to_vec() });
    }

    fn submit_after(&mut self, event: Timer<Member>, after: Duration) {
        let at = self.now.plus_ms(u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        if let Timer::ProbeRandomMember(token) = event {
            self.token = token;
        }
        self.number += 1;
        self.timers.insert((at, self.number), event);
    }
}

fn config() -> foca::Config {
    let three = NonZeroUsize::new(3).unwrap_or(NonZeroUsize::MIN);
    foca::Config {
        probe_period: Duration::from_millis(PROBE_MS),
        probe_rtt: Duration::from_millis(RTT_MS),
        num_indirect_probes: three,
        max_transmissions: NonZeroU8::new(12).unwrap_or(NonZeroU8::MIN),
        suspect_to_down_after: Duration::from_millis(SUSPECT_MS),
        remove_down_after: Some(Duration::from_millis(FORGET_MS)),
        max_packet_size: NonZeroUsize::new(MEMBERSHIP_BYTES).unwrap_or(NonZeroUsize::MIN),
        notify_down_members: true,
        periodic_announce: Some(PeriodicParams {
            frequency: Duration::from_secs(30),
            num_members: NonZeroUsize::MIN,
        }),
        // Greeting the down is done here: foca stops doing so when everyone is down.
        periodic_announce_to_down_members: None,
        periodic_gossip: Some(PeriodicParams {
            frequency: Duration::from_millis(500),
            num_members: three,
        }),
    }
}

impl Membership {
    /// A node that knows nobody yet. `generation` must be higher than in every earlier start of
    /// this host (a counter in its store, or seconds of wall time); `seed` feeds the choice of whom
    /// to probe and should differ between nodes.
    #[must_use]
    pub fn new(me: HostId, site: Name, generation: u64, seed: u64, now: Time) -> Self {
        let identity = Member { host: me, generation, site: Some(site) };
        let mut rng = StdRng::seed_from_u64(seed);
        let probes = StdRng::seed_from_u64(rng.random());
        Self {
            foca: Foca::new(identity, config(), probes, PostcardCodec),
            rng,
            contacts: BTreeSet::new(),
            suspects: BTreeMap::new(),
            greet_at: now.plus_ms(GREET_MS),
            left: false,
            io: Io { now, ..Io::default() },
        }
    }

    /// Greets `host`, and again every few seconds until it is known. Answers bring the members
    /// that it knows.
    pub fn announce(&mut self, now: Time, host: HostId) {
        self.io.now = now;
        if host == self.foca.identity().host || self.left {
            return;
        }
        if self.contacts.len() < MEMBERS {
            self.contacts.insert(host);
        }
        self.greet(host);
    }

    /// Bytes of another node's [`Output::Send`], brought by `from`.
    ///
    /// # Errors
    /// [`MembershipError`]; nothing to do but count it.
    pub fn handle_data(
        &mut self,
        now: Time,
        from: HostId,
        bytes: &[u8],
    ) -> Result<(), MembershipError> {
        self.io.now = now;
        if self.left {
            return Ok(());
        }
        self.check(from, bytes)?;
        self.foca.handle_data(bytes, &mut self.io).map_err(malformed)
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Time) {
        self.io.now = now;
        // Probe timers of one instant have an order of their own; this sort keeps the rest as is.
        let later = self.io.timers.split_off(&(Time(now.0.saturating_add(1)), 0));
        let due = core::mem::replace(&mut self.io.timers, later);
        let mut due: Vec<Timer<Member>> = due.into_values().collect();
        due.sort();
        for timer in due {
            if let Err(error) = self.foca.handle_timer(timer, &mut self.io) {
                tracing::debug!(%error, "membership timer");
            }
        }
        if self.greet_at <= now && !self.left {
            self.greet_at = now.plus_ms(GREET_MS);
            self.end_suspicions(now);
            self.greet_some();
        }
    }

    /// When [`Membership::handle_timeout`] wants to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let timer = self.io.timers.keys().next().map(|(at, _)| *at);
        timer.into_iter().chain((!self.left).then_some(self.greet_at)).min()
    }

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.io.outputs.pop_front()
    }

    /// All members but this node, by host.
    pub fn members(&self) -> impl Iterator<Item = View> {
        let views = self.foca.iter_membership_state().map(|m| View {
            host: m.id().host,
            site: m.id().site.clone(),
            state: match m.state() {
                foca::State::Alive => State::Alive,
                foca::State::Suspect => State::Suspect,
                foca::State::Down => State::Down,
            },
        });
        let mut views: Vec<View> = views.collect();
        views.sort_by_key(|v| v.host);
        views.into_iter()
    }

    /// The opinion on `host`; `None` if it is unknown.
    #[must_use]
    pub fn state(&self, host: HostId) -> Option<State> {
        self.members().find(|v| v.host == host).map(|v| v.state)
    }

    /// Tells some members that this node leaves, and is silent from then on.
    pub fn leave(&mut self, now: Time) {
        self.io.now = now;
        if !core::mem::replace(&mut self.left, true)
            && let Err(error) = self.foca.leave_cluster(&mut self.io)
        {
            tracing::debug!(%error, "leaving");
        }
    }

    /// Refuses what foca would believe: a sender who is not the peer, and an endless crowd.
    fn check(&self, from: HostId, mut bytes: &[u8]) -> Result<(), MembershipError> {
        if bytes.len() > MEMBERSHIP_BYTES {
            return Err(MembershipError::Malformed(format!("{} bytes", bytes.len())));
        }
        let header: foca::Header<Member> =
            PostcardCodec.decode_header(&mut bytes).map_err(malformed)?;
        if header.src.host != from {
            return Err(MembershipError::NotTheSender { named: header.src.host, from });
        }
        let count = bytes.first_chunk().map_or(0, |n| usize::from(u16::from_be_bytes(*n)));
        let known = self.foca.iter_membership_state().len();
        if known + count < MEMBERS {
            return Ok(());
        }
        let mut bytes = bytes.get(2..).unwrap_or_default();
        let mut hosts: BTreeSet<HostId> =
            self.foca.iter_membership_state().map(|m| m.id().host).collect();
        hosts.insert(from);
        for _ in 0..count {
            let member: foca::Member<Member> =
                PostcardCodec.decode_member(&mut bytes).map_err(malformed)?;
            hosts.insert(member.id().host);
        }
        if hosts.len() > MEMBERS { Err(MembershipError::TooMany) } else { Ok(()) }
    }

    /// Foca forgets its own timers when this node comes back as a new generation, and only the node
    /// whose probe failed has one: a suspicion could stay for ever. Here each one ends.
    fn end_suspicions(&mut self, now: Time) {
        let mut suspects = BTreeMap::new();
        for member in self.foca.iter_membership_state() {
            if member.state() != foca::State::Suspect {
                continue;
            }
            let (host, now_is) = (member.id().host, (member.id().generation, member.incarnation()));
            let since = match self.suspects.get(&host) {
                Some((generation, incarnation, since)) if (*generation, *incarnation) == now_is => {
                    *since
                }
                _ => now,
            };
            suspects.insert(host, (now_is.0, now_is.1, since));
            if now.ms_since(since) >= 2 * SUSPECT_MS {
                let (member_id, incarnation) = (member.id().clone(), member.incarnation());
                let token = self.io.token;
                let timer = Timer::ChangeSuspectToDown { member_id, incarnation, token };
                (&mut self.io).submit_after(timer, Duration::ZERO);
            }
        }
        self.suspects = suspects;
    }

    fn greet(&mut self, host: HostId) {
        let to = Member { host, generation: 0, site: None };
        if let Err(error) = self.foca.announce(to, &mut self.io) {
            tracing::debug!(%host, %error, "greeting");
        }
    }

    fn greet_some(&mut self) {
        let (mut down, mut known) = (BTreeSet::new(), BTreeSet::new());
        for member in self.foca.iter_membership_state() {
            known.insert(member.id().host);
            if member.state() == foca::State::Down {
                down.insert(member.id().host);
            }
        }
        let mut hosts: Vec<HostId> = down.into_iter().collect();
        hosts.extend(self.contacts.iter().filter(|h| !known.contains(h)));
        for _ in 0..GREETED.min(hosts.len()) {
            let host = hosts.swap_remove(self.rng.random_range(0..hosts.len()));
            self.greet(host);
        }
    }
}

fn malformed(error: impl core::fmt::Display) -> MembershipError {
    MembershipError::Malformed(error.to_string())
}
