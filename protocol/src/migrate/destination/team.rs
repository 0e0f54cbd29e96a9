//! The destination that proposes, and those that tell it that they are loaded.
//!
//! Owns the proposal: one record that names the new copy of every member that moves, made when each of
//! them is loaded and bound. A lone VM's destination is a team of one.

use super::{Action, Body, Cause, CopyId, Destination, HostId, Record, Release, Seat, State};
use crate::wire::migrate::of_member;

/// Whether it is the lead, or another destination, that says this.
pub(super) fn is_team_s(body: &Body, led: bool) -> bool {
    match body {
        Body::PrepareBallot(_) => led,
        Body::LoadedToo(..) => true,
        _ => false,
    }
}

impl Destination {
    pub(super) fn on_team(&mut self, from: HostId, body: Body, out: &mut Vec<Action>) {
        match (body, &self.state) {
            (Body::PrepareBallot(team), State::Receiving(_))
                if self.led.is_some_and(|led| led.host == from)
                    && team.iter().any(|s| s.vm == self.status.vm && s.to == self.me.host) =>
            {
                self.team = team;
                out.push(Action::PrepareBallot);
            }
            (Body::LoadedToo(copy, release), _)
                if release.vm != self.status.vm
                    && self.is_next(&release)
                    && self.team.iter().any(|s| s.vm == release.vm && s.to == from) =>
            {
                self.loaded.insert(release.vm, (copy, release));
                self.propose(out);
            }
            _ => {}
        }
    }

    /// The source, or the lead, says whose destination proposes.
    pub(super) fn on_proposer(&mut self, seat: Seat, out: &mut Vec<Action>) {
        self.proposer = Some(seat);
        if let (State::Loaded { .. }, Some(copy)) = (&self.state, self.copy) {
            self.tell_loaded(copy, out);
        }
    }

    /// The source says that its guest stands still.
    pub(super) fn on_released(&mut self, release: Release, out: &mut Vec<Action>) {
        if release.vm != self.status.vm || !self.is_next(&release) {
            return;
        }
        let new = self.release.replace(release).is_none();
        if let (true, State::Loaded { .. }, Some(copy)) = (new, &self.state, self.copy) {
            self.tell_loaded(copy, out);
        }
    }

    /// Whether it releases what the record places, for the epoch that decides.
    fn is_next(&self, release: &Release) -> bool {
        let placed = self.record.placement_of(release.vm);
        release.epoch == self.record.epoch.next() && placed.is_some_and(|p| p.copy == release.copy)
    }

    /// Loaded: a member tells the lead, and the destination that proposes if it knows it. Whoever lacks the
    /// source's word asks for it first.
    pub(super) fn tell_loaded(&mut self, copy: CopyId, out: &mut Vec<Action>) {
        let Some(release) = self.release else {
            return out.push(Action::Send(self.peer, Body::Where));
        };
        let vm = self.status.vm;
        self.loaded.insert(vm, (copy, release));
        if let Some(led) = self.led {
            if let Some(seat) = self.proposer.filter(|s| s.vm != vm) {
                let id = of_member(led.id, seat.vm);
                out.push(Action::Tell(seat.to, id, seat.vm, Body::LoadedToo(copy, release)));
            }
            out.push(Action::Tell(led.host, led.id, vm, Body::Loaded(copy)));
        }
        self.propose(out);
    }

    /// Proposes the next epoch, once, when all whom it names are loaded.
    pub(super) fn propose(&mut self, out: &mut Vec<Action>) {
        let proposes = self.led.is_none() || !self.team.is_empty();
        let bound = matches!(self.state, State::Loaded { .. });
        let loaded = |s: &Seat| self.loaded.contains_key(&s.vm);
        if proposes && bound && !self.proposed && self.team.iter().all(loaded) {
            self.proposed = true;
            out.push(Action::Propose(self.proposal()));
        }
    }

    /// The next epoch, with the new copies in place of the sources'. An owner that is the only voter
    /// hands that over too.
    fn proposal(&self) -> Record {
        let mut record = self.record.clone();
        record.epoch = record.epoch.next();
        record.cause = Cause::Move(self.loaded.values().map(|(_, release)| *release).collect());
        let own = self.loaded.get(&self.status.vm).map(|(copy, _)| *copy);
        for placed in &mut record.placement {
            let seat = self.team.iter().find(|s| s.vm == placed.vm);
            match (seat, self.loaded.get(&placed.vm)) {
                (Some(seat), Some((copy, _))) => (placed.host, placed.copy) = (seat.to, *copy),
                (None, _) if placed.vm == self.status.vm => {
                    placed.host = self.me.host;
                    placed.copy = own.unwrap_or(placed.copy);
                }
                _ => {}
            }
        }
        let left = |host: HostId| host == self.peer || self.team.iter().any(|s| s.from == host);
        if let [only] = record.voters.as_slice()
            && left(only.host)
        {
            record.voters = vec![self.me];
        }
        record
    }
}
