//! The timeline of the migrations that this host takes part in, as this host saw them.
//!
//! Owns the moments and their bounds. Never decides anything: it is for people. Invariant: a
//! moment's time is that of the event (QEMU's own where it has one), not that of its recording.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use godwit_protocol::id::{HostId, MigrationId};
use godwit_protocol::limits::TEXT_BYTES;
use godwit_protocol::wire::migrate::{Moment, Phase, Status};

use super::node::{Node, wall_us};

/// Migrations whose moments are kept; the core remembers as many.
const MIGRATIONS: usize = 256;
/// Moments of one migration at one host.
const MOMENTS: usize = 48;

#[derive(Default)]
struct Line {
    moments: Vec<Moment>,
    phase: Option<Phase>,
    held: u64,
    dropped: u64,
}

/// The moments that this host saw.
#[derive(Default)]
pub(super) struct Timelines(Mutex<BTreeMap<MigrationId, Line>>);

impl Timelines {
    /// Takes up what was stored with a status.
    pub fn restore(&self, status: &Status) {
        let mut lines = self.lock();
        let line = lines.entry(status.id).or_default();
        line.moments.clone_from(&status.timeline);
        line.phase = Some(status.phase);
        (line.held, line.dropped) = (status.frames_held, status.frames_dropped);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, id: MigrationId, moment: Moment) {
        let mut lines = self.lock();
        if lines.len() >= MIGRATIONS && !lines.contains_key(&id) {
            let begun = |l: &Line| l.moments.first().map_or(0, |m| m.at_us);
            let oldest = lines.iter().min_by_key(|(_, l)| begun(l)).map(|(id, _)| *id);
            if let Some(oldest) = oldest {
                lines.remove(&oldest);
            }
        }
        let line = lines.entry(id).or_default();
        // The first and the newest moments say most.
        if line.moments.len() >= MOMENTS {
            line.moments.remove(MOMENTS / 2);
        }
        line.moments.push(moment);
    }

    /// Whether `phase` is news.
    fn enters(&self, id: MigrationId, phase: Phase) -> bool {
        self.lock().entry(id).or_default().phase.replace(phase) != Some(phase)
    }

    fn counted(&self, id: MigrationId) -> (u64, u64) {
        self.lock().get(&id).map_or((0, 0), |l| (l.held, l.dropped))
    }

    fn of(&self, id: MigrationId) -> Vec<Moment> {
        self.lock().get(&id).map(|l| l.moments.clone()).unwrap_or_default()
    }
}

impl Node {
    /// Something happened to a migration here just now.
    pub fn moment(&self, id: MigrationId, what: impl Into<String>) {
        self.moment_at(id, wall_us(), what);
    }

    /// Something happened to a migration here at that time, microseconds since 1970.
    pub fn moment_at(&self, id: MigrationId, at_us: u64, what: impl Into<String>) {
        let mut what = what.into();
        what.truncate(what.floor_char_boundary(TEXT_BYTES));
        self.timelines.add(id, Moment { at_us, host: self.me, what });
    }

    /// Frames of a migration's NICs waited here, or were dropped.
    pub fn count_frames(&self, id: MigrationId, held: u64, dropped: u64) {
        let mut lines = self.timelines.lock();
        if let Some(line) = lines.get_mut(&id) {
            line.held += held;
            line.dropped += dropped;
        }
    }

    /// A status of a migration changed: notes the phase that this end has entered.
    pub fn note_phase(&self, status: &Status) {
        let takes_part = status.from == self.me || status.to == Some(self.me);
        if takes_part && self.timelines.enters(status.id, status.phase) {
            self.moment(status.id, entered(status, |host| self.host_name(host)));
        }
    }

    /// The status with the frames and the moments of this host: all of them, or only the first.
    pub fn with_timeline(&self, mut status: Status, all: bool) -> Status {
        let own = self.timelines.of(status.id);
        let (held, dropped) = self.timelines.counted(status.id);
        status.frames_held = status.frames_held.max(held);
        status.frames_dropped = status.frames_dropped.max(dropped);
        join(&mut status.timeline, &own);
        if !all {
            status.timeline.truncate(1);
        }
        status
    }
}

/// Adds moments that are not there yet, in order of time.
pub(super) fn join(timeline: &mut Vec<Moment>, more: &[Moment]) {
    let new: Vec<Moment> = more.iter().filter(|m| !timeline.contains(m)).cloned().collect();
    timeline.extend(new);
    timeline.sort_by_key(|m| m.at_us);
}

fn entered(status: &Status, name: impl Fn(HostId) -> String) -> String {
    let to = || status.to.map_or_else(|| "a host to be found".to_owned(), &name);
    match status.phase {
        Phase::Preparing => format!("asks {} to take it", to()),
        Phase::Transfer => "pages cross".into(),
        Phase::Stopped => "bound: the guest is to stop".into(),
        Phase::Deciding => "loaded: the next epoch is being decided".into(),
        Phase::Starting => match status.epoch_after {
            Some(epoch) => format!("epoch {epoch} is decided for {}", to()),
            None => format!("decided for {}", to()),
        },
        Phase::Releasing => "runs at the destination".into(),
        Phase::Moved => "moved".into(),
        Phase::Stayed => format!("stayed: {}", status.cause),
        Phase::Lost => format!("lost: {}", status.cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(at_us: u64, what: &str) -> Moment {
        Moment { at_us, host: HostId([1; 32]), what: what.into() }
    }

    #[test]
    fn two_ends_become_one_line_without_doubles() {
        let mut ours = vec![moment(1, "a"), moment(5, "c")];
        join(&mut ours, &[moment(5, "c"), moment(3, "b")]);
        let what: Vec<&str> = ours.iter().map(|m| m.what.as_str()).collect();
        assert_eq!(what, ["a", "b", "c"]);
    }

    #[test]
    fn what_is_kept_is_bounded_and_keeps_the_first_and_the_newest() {
        let lines = Timelines::default();
        let id = MigrationId([7; 16]);
        for at in 0..1000 {
            lines.add(id, moment(at, "x"));
        }
        let kept = lines.of(id);
        assert_eq!((kept.len(), kept[0].at_us, kept[MOMENTS - 1].at_us), (MOMENTS, 0, 999));
        for n in 0..=255_u8 {
            let mut id = [9; 16];
            id[0] = n;
            lines.add(MigrationId(id), moment(2000, "y"));
        }
        assert_eq!(lines.lock().len(), MIGRATIONS);
        assert!(lines.of(id).is_empty(), "the oldest goes first");
    }

    #[test]
    fn a_phase_is_noted_once() {
        let lines = Timelines::default();
        let id = MigrationId([7; 16]);
        assert!(lines.enters(id, Phase::Transfer));
        assert!(!lines.enters(id, Phase::Transfer));
        assert!(lines.enters(id, Phase::Stopped));
    }
}
