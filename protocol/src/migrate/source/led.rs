//! A source whose VM moves as a member of a cluster.
//!
//! Owns what is said between it and the lead. The lead says when to stop, and has no other power: an
//! unbound member may give up at any time, and a bound one acts on the decision, like any source.

use super::{Action, Body, Effect, Led, Options, Record, Source, State, wait};
use crate::id::{CopyId, HostId};
use crate::time::Time;
use crate::wire::migrate::{Figures, Seat, Stand, Status, of_member};

/// What a lead asks of a member's source.
#[derive(Debug, Clone)]
pub struct Ordered {
    /// How it starts out.
    pub status: Status,
    /// The decided record of the cluster.
    pub record: Record,
    /// This host's copy.
    pub copy: CopyId,
    /// What was asked for.
    pub options: Options,
    /// Hosts to try, best first; at least one.
    pub candidates: Vec<HostId>,
    /// The cluster's migration.
    pub led: Led,
}

/// Whether it is a lead that says this.
pub(super) fn is_lead_s(body: &Body) -> bool {
    matches!(
        body,
        Body::Order { .. } | Body::How { .. } | Body::Stop(..) | Body::Cancel(_) | Body::NoLead
    )
}

impl Source {
    /// Starts as a member of a cluster: first the driver has to describe the VM.
    pub fn ordered(now: Time, ordered: Ordered, out: &mut Vec<Action>) -> Self {
        let Ordered { status, record, copy, options, mut candidates, led } = ordered;
        candidates.reverse();
        out.push(Action::Effect(Effect::Describe));
        Self {
            options,
            candidates,
            state: State::Describing { until: now.plus_ms(wait::PREPARE_MS) },
            led: Some((led, now)),
            ..Self::new(now, status, record, copy)
        }
    }

    pub(super) fn on_described(
        &mut self,
        now: Time,
        spec: Vec<u8>,
        ram_bytes: u64,
        out: &mut Vec<Action>,
    ) {
        if matches!(self.state, State::Describing { .. }) {
            self.spec = spec;
            self.status.ram_bytes = ram_bytes;
            self.ask_next(now, out);
        }
    }

    pub(super) fn on_lead(&mut self, now: Time, from: HostId, body: Body, out: &mut Vec<Action>) {
        let member = self.status.cluster != self.status.vm;
        let leads = self.record.placement.first().is_some_and(|p| p.host == from);
        if member && leads && matches!(body, Body::How { .. }) {
            // Taken up after a restart, it hears again whom it belongs to: the lead, and nobody else.
            let id = of_member(self.status.id, self.status.vm);
            self.led.get_or_insert((Led { id, host: from }, now));
        }
        let Some((led, heard)) = self.led.as_mut() else { return };
        if led.host != from {
            return;
        }
        *heard = now;
        match body {
            Body::How { share_bytes_per_s } => {
                self.share(share_bytes_per_s, out);
                self.tell_lead(out);
            }
            // Bound to another epoch than the others it would wait for a decision that nobody drives.
            Body::Stop(_, base)
                if matches!(self.state, State::Transfer { .. })
                    && (base != self.record.epoch || self.rebase.is_pending()) => {}
            Body::Stop(proposer, _) if matches!(self.state, State::Transfer { .. }) => {
                self.stop(now, out);
                self.tell_proposer(proposer, out);
            }
            // Said again because it was not heard to have stopped.
            Body::Stop(proposer, _) => {
                self.tell_proposer(proposer, out);
                self.tell_lead(out);
            }
            Body::Order { .. } => self.tell_lead(out),
            Body::Cancel(cause) => self.on_no_lead(cause, out),
            Body::NoLead => {
                self.on_no_lead("the lead of the cluster's migration forgot it".into(), out);
            }
            _ => {}
        }
    }

    fn on_no_lead(&mut self, cause: String, out: &mut Vec<Action>) {
        match self.state {
            State::Describing { .. } | State::Preparing { .. } | State::Transfer { .. } => {
                self.give_up(cause, out);
            }
            State::Stopped { .. } => out.push(Action::Resolve(cause)),
            State::Starting { .. } | State::Resuming { .. } | State::Over => {}
        }
    }

    fn tell_proposer(&self, proposer: Seat, out: &mut Vec<Action>) {
        if matches!(self.state, State::Stopped { .. }) {
            out.push(Action::Send(self.peer, Body::Proposer(proposer)));
        }
    }

    fn share(&mut self, share: u64, out: &mut Vec<Action>) {
        // What differs by a few per cent is not worth the word.
        let same = self.share_bytes_per_s.abs_diff(share) <= share / 16;
        if matches!(self.state, State::Transfer { .. }) && !same {
            self.share_bytes_per_s = share;
            out.push(Action::Effect(Effect::Pace(share)));
        }
    }

    /// Tells the lead how this member stands.
    pub(super) fn tell_lead(&self, out: &mut Vec<Action>) {
        let Some((led, _)) = self.led else { return };
        let stand = Stand {
            status: self.status.clone(),
            figures: matches!(self.state, State::Transfer { .. }).then(|| self.figures()),
            stopped_us: self.stopped_us,
            resumed_us: self.resumed_us,
        };
        let body = Body::Stand(Box::new(stand));
        out.push(Action::Tell(led.host, led.id, self.status.vm, body));
    }

    fn figures(&self) -> Figures {
        let p = &self.last;
        let wire = |bytes: u64| {
            let bytes = u128::from(bytes) * u128::from(p.wire_per_guest_ppm) / 1_000_000;
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        let first = self.status.ram_bytes.saturating_sub(p.first_pass_bytes);
        let ram = if p.passes == 0 { first } else { p.remaining_bytes };
        Figures {
            converged: self.is_converged(),
            near: self.is_near(),
            left_bytes: p.backlog_bytes.saturating_add(wire(ram.saturating_add(p.disk_left_bytes))),
            dirty_bytes_per_s: wire(p.dirty_bytes_per_s),
            link_bytes_per_s: p.link_bytes_per_s,
        }
    }

    /// When an unbound member gives up because it does not hear of its lead.
    pub(super) fn left_at(&self) -> Option<Time> {
        let unbound = matches!(
            self.state,
            State::Describing { .. } | State::Preparing { .. } | State::Transfer { .. }
        );
        self.led.filter(|_| unbound).map(|(_, heard)| heard.plus_ms(wait::LED_MS))
    }

    pub(super) fn is_left(&self, now: Time) -> bool {
        self.left_at().is_some_and(|at| now >= at)
    }
}
