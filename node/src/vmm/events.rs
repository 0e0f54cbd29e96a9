//! The journal of one QEMU's events.
//!
//! Owns two bounded rings: lifecycle events ([`is_lifecycle`]) and all others. The reader of the socket never waits for
//! anybody: it appends and wakes. Overflow policy: other events drop the oldest; of `MIGRATION_PASS`, which carries a
//! running count, only the newest is kept; all other lifecycle events are kept to a depth that no honest QEMU reaches,
//! and a reader that would have missed one is told so ([`Missed`]) instead of being left waiting.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

/// Lifecycle events kept for readers that are behind.
const LIFECYCLE_DEPTH: usize = 2048;
/// Other events kept for readers that are behind.
const OTHER_DEPTH: usize = 512;

/// When QEMU emitted an event, by the host's realtime clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventTime {
    /// Microseconds since 1970-01-01 UTC.
    pub micros: i64,
}

/// One event of QEMU's.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Position in this connection's journal, from 1.
    pub seq: u64,
    /// QEMU's name for it, such as `STOP`; unknown names are kept as they are.
    pub name: String,
    /// Its data, `Null` when there is none.
    pub data: Value,
    /// When QEMU emitted it.
    pub at: EventTime,
}

impl Event {
    /// A string field of the event's data.
    #[must_use]
    pub fn str_field(&self, key: &str) -> Option<&str> {
        self.data.get(key).and_then(Value::as_str)
    }
}

/// A reader fell so far behind that a lifecycle event was dropped, or the connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Missed {
    /// Lifecycle events up to this position are lost to the reader.
    #[error("Fell behind QEMU's events: those up to number {0} are lost")]
    Lagged(u64),
    /// QEMU closed the connection; all its events have been read.
    #[error("QEMU closed its QMP connection")]
    Closed,
}

/// Whether an event decides something: these are never dropped silently.
#[must_use]
pub fn is_lifecycle(name: &str) -> bool {
    const NAMES: [&str; 9] = [
        "STOP",
        "RESUME",
        "SHUTDOWN",
        "RESET",
        "POWERDOWN",
        "SUSPEND",
        "MIGRATION",
        "MIGRATION_PASS",
        "GUEST_PANICKED",
    ];
    NAMES.contains(&name)
}

#[derive(Debug, Default)]
struct Rings {
    last_seq: u64,
    lifecycle: VecDeque<Event>,
    other: VecDeque<Event>,
    pass: Option<Event>,
    /// Highest position of a dropped lifecycle event.
    dropped: u64,
}

/// Where events are appended by the socket's reader.
#[derive(Debug)]
pub(super) struct Journal {
    rings: Mutex<Rings>,
    wake: watch::Sender<u64>,
}

impl Journal {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { rings: Mutex::new(Rings::default()), wake: watch::Sender::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        // The rings are consistent after every statement: a panic elsewhere does not spoil them.
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends an event; never waits.
    pub(super) fn push(&self, name: String, data: Value, at: EventTime) {
        let mut rings = self.lock();
        rings.last_seq += 1;
        let seq = rings.last_seq;
        let lifecycle = is_lifecycle(&name);
        let event = Event { seq, name, data, at };
        if event.name == "MIGRATION_PASS" {
            rings.pass = Some(event);
        } else if lifecycle {
            rings.lifecycle.push_back(event);
            if rings.lifecycle.len() > LIFECYCLE_DEPTH
                && let Some(dropped) = rings.lifecycle.pop_front()
            {
                rings.dropped = dropped.seq;
            }
        } else {
            rings.other.push_back(event);
            if rings.other.len() > OTHER_DEPTH {
                rings.other.pop_front();
            }
        }
        drop(rings);
        self.wake.send_replace(seq);
    }

    /// Position of the newest event.
    pub(super) fn position(&self) -> u64 {
        self.lock().last_seq
    }

    fn after(&self, seq: u64) -> Result<Option<Event>, Missed> {
        let rings = self.lock();
        if rings.dropped > seq {
            return Err(Missed::Lagged(rings.dropped));
        }
        let first = |ring: &VecDeque<Event>| {
            let index = ring.partition_point(|event| event.seq <= seq);
            ring.get(index).cloned()
        };
        let pass = rings.pass.clone().filter(|event| event.seq > seq);
        let candidates = [first(&rings.lifecycle), first(&rings.other), pass];
        Ok(candidates.into_iter().flatten().min_by_key(|e| e.seq))
    }
}

/// A reader of the journal from a position on. Dropping it costs nothing; waiting is cancel-safe.
#[derive(Debug)]
pub struct Events {
    journal: Arc<Journal>,
    wake: watch::Receiver<u64>,
    closed: watch::Receiver<bool>,
    seq: u64,
}

impl Events {
    pub(super) fn new(journal: &Arc<Journal>, closed: watch::Receiver<bool>, seq: u64) -> Self {
        Self { journal: journal.clone(), wake: journal.wake.subscribe(), closed, seq }
    }

    /// The next event, waiting for it. The caller sets the deadline.
    ///
    /// # Errors
    /// [`Missed::Lagged`] once (the reader then goes on behind the gap), [`Missed::Closed`] at the end.
    pub async fn next(&mut self) -> Result<Event, Missed> {
        loop {
            // Order matters: whether the connection ended is read before the journal, so that nothing is left behind.
            let closed = *self.closed.borrow_and_update();
            self.wake.borrow_and_update();
            match self.journal.after(self.seq) {
                Ok(Some(event)) => {
                    self.seq = event.seq;
                    return Ok(event);
                }
                Ok(None) => {}
                Err(Missed::Lagged(upto)) => {
                    self.seq = upto;
                    return Err(Missed::Lagged(upto));
                }
                Err(Missed::Closed) => return Err(Missed::Closed),
            }
            if closed {
                return Err(Missed::Closed);
            }
            tokio::select! {
                _ = self.wake.changed() => {}
                changed = self.closed.changed() => if changed.is_err() { return Err(Missed::Closed) },
            }
        }
    }

    /// The next event for which `wanted` holds; others are passed over.
    ///
    /// # Errors
    /// As [`Events::next`].
    pub async fn find(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Event, Missed> {
        loop {
            let event = self.next().await?;
            if wanted(&event) {
                return Ok(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> (Arc<Journal>, watch::Sender<bool>, Events) {
        let journal = Journal::new();
        let (closed, receiver) = watch::channel(false);
        let events = Events::new(&journal, receiver, 0);
        (journal, closed, events)
    }

    const NOW: EventTime = EventTime { micros: 1 };

    #[tokio::test]
    async fn a_flood_of_others_never_costs_a_lifecycle_event() {
        let (journal, _closed, mut events) = journal();
        journal.push("STOP".into(), Value::Null, NOW);
        for _ in 0..10_000 {
            journal.push("VSERPORT_CHANGE".into(), Value::Null, NOW);
            journal.push("MIGRATION_PASS".into(), Value::Null, NOW);
        }
        for pass in 0..10_000u64 {
            journal.push("MIGRATION_PASS".into(), pass.into(), NOW);
        }
        journal.push("RESUME".into(), Value::Null, NOW);
        assert_eq!(events.next().await.unwrap().name, "STOP");
        let last = events.find(|e| e.name == "RESUME").await.unwrap();
        assert_eq!(last.seq, 30_002);
    }

    #[tokio::test]
    async fn who_missed_a_lifecycle_event_is_told_once() {
        let (journal, _closed, mut events) = journal();
        for _ in 0..LIFECYCLE_DEPTH + 1 {
            journal.push("RESET".into(), Value::Null, NOW);
        }
        assert_eq!(events.next().await, Err(Missed::Lagged(1)));
        assert_eq!(events.next().await.unwrap().seq, 2);
    }

    #[tokio::test]
    async fn passes_are_folded() {
        let (journal, _closed, mut events) = journal();
        journal.push("STOP".into(), Value::Null, NOW);
        for pass in 0..100_000u64 {
            journal.push("MIGRATION_PASS".into(), pass.into(), NOW);
        }
        assert_eq!(events.next().await.unwrap().name, "STOP");
        let last = events.next().await.unwrap();
        assert_eq!((last.data, last.seq), (99_999.into(), 100_001));
    }

    #[tokio::test]
    async fn the_end_comes_after_the_last_event() {
        let (journal, closed, mut events) = journal();
        journal.push("SHUTDOWN".into(), Value::Null, NOW);
        closed.send_replace(true);
        assert_eq!(events.next().await.unwrap().name, "SHUTDOWN");
        assert_eq!(events.next().await, Err(Missed::Closed));
    }
}
