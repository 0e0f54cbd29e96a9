//! What the parts of `net` share: the roster in memory, the links to peers, the way to the driver.
//!
//! Owns the decisions "is this host a member now" and "which of two streams to a peer stays".
//! Invariant: every change of the roster goes through [`Shared::learn`] or [`Shared::change`], which
//! wake everything that may have to cut a connection.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};

use godwit_protocol::id::{HostId, StoreId};
use godwit_protocol::wire::control::Control;

use super::certificate::{CertificateError, Signed};
use super::hello::{BATCH, FRAME_BYTES, Frame, Hello, message};
use super::identity::Identity;
use super::keys::{StateDir, StateError};
use super::roster::{Change, MemberRecord, Roster};
use super::{MemberInfo, NetEvent, SendError};

/// Most messages that wait for one peer.
const QUEUE_MESSAGES: usize = 1024;
/// Most bytes that wait for one peer.
const QUEUE_BYTES: usize = 16 << 20;
/// Most frames of `net` itself (answers to pings, roster news) that wait for one peer.
const QUEUE_INTERNAL: usize = 64;
/// Two streams to a peer that began within this time of each other collided.
const COLLISION: Duration = Duration::from_secs(3);

/// The live control stream to a peer, as the rest of the node sees it.
pub(super) struct Link {
    pub id: u64,
    pub instance: u64,
    pub since: Instant,
    pub initiator: HostId,
    pub store: Option<StoreId>,
    pub queue: mpsc::Sender<Vec<u8>>,
    pub internal: mpsc::Sender<Vec<u8>>,
    pub waiting_bytes: Arc<AtomicUsize>,
    pub rtt_us: Arc<AtomicU64>,
    pub answered: Arc<Notify>,
    pub stop: Arc<Notify>,
}

/// The other ends of a [`Link`], for the task that drives the stream.
pub(super) struct LinkEnds {
    pub id: u64,
    pub since: Instant,
    pub queue: mpsc::Receiver<Vec<u8>>,
    pub internal: mpsc::Receiver<Vec<u8>>,
    pub answers: mpsc::Sender<Vec<u8>>,
    pub waiting_bytes: Arc<AtomicUsize>,
    pub rtt_us: Arc<AtomicU64>,
    pub answered: Arc<Notify>,
    pub stop: Arc<Notify>,
}

struct Known {
    roster: Roster,
    digest: [u8; 16],
}

pub(super) struct Shared {
    pub me: Identity,
    pub state: StateDir,
    pub version: u16,
    pub instance: u64,
    pub store: Option<StoreId>,
    pub events: mpsc::Sender<NetEvent>,
    /// Counts changes of the roster; whoever holds connections watches it.
    pub changed: watch::Sender<u64>,
    /// Messages of the membership protocol that were dropped because a queue was half full.
    pub membership_dropped: AtomicU64,
    known: Mutex<Known>,
    links: Mutex<HashMap<HostId, Link>>,
    mismatches: Mutex<HashSet<(HostId, u16)>>,
    next_link: AtomicU64,
    dirty: Notify,
    saving: tokio::sync::Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics between two changes that belong together; a poisoned lock is still sound.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new(
        me: Identity,
        state: StateDir,
        roster: Roster,
        events: mpsc::Sender<NetEvent>,
        (version, instance, store): (u16, u64, Option<StoreId>),
    ) -> Arc<Self> {
        let digest = roster.digest();
        Arc::new(Self {
            me,
            state,
            version,
            instance,
            store,
            events,
            changed: watch::channel(0).0,
            membership_dropped: AtomicU64::new(0),
            known: Mutex::new(Known { roster, digest }),
            links: Mutex::new(HashMap::new()),
            mismatches: Mutex::new(HashSet::new()),
            next_link: AtomicU64::new(1),
            dirty: Notify::new(),
            saving: tokio::sync::Mutex::new(()),
        })
    }

    /// Reads the roster. Short: the lock is held.
    pub fn roster<T>(&self, read: impl FnOnce(&Roster) -> T) -> T {
        read(&lock(&self.known).roster)
    }

    pub fn admitted(&self, host: HostId) -> bool {
        self.roster(|r| r.admitted(host))
    }

    pub fn digest(&self) -> [u8; 16] {
        lock(&self.known).digest
    }

    pub fn hello(&self) -> Option<Hello> {
        let (swarm, member) = self.roster(|r| Some((r.swarm(), r.get(r.me())?.record.clone())))?;
        Some(Hello { swarm, instance: self.instance, member, store: self.store })
    }

    /// Whether the speaker of a hello is who its connection says, and a member.
    pub fn check_hello(&self, host: HostId, hello: &Hello) -> Result<(), CertificateError> {
        self.roster(|r| r.check(host, &hello.member.certificate)).map(|_| ())
    }

    /// Changes the roster, wakes everyone who watches it, and has it saved soon.
    pub fn change<T>(&self, change: impl FnOnce(&mut Roster) -> T) -> T {
        let result = {
            let mut known = lock(&self.known);
            let result = change(&mut known.roster);
            known.digest = known.roster.digest();
            result
        };
        self.changed.send_modify(|count| *count += 1);
        self.dirty.notify_one();
        result
    }

    /// Takes in what another node said of the roster, passes on what was new, tells the driver.
    pub async fn learn(
        &self,
        members: Vec<MemberRecord>,
        revocations: Vec<Signed>,
        from: Option<HostId>,
    ) {
        let (mut fresh, mut out) = ((Vec::new(), Vec::new()), Vec::new());
        for record in members {
            let merged = lock(&self.known).roster.merge(record.clone());
            match merged {
                Ok(Change::None) => continue,
                Ok(_) => fresh.0.push(record),
                Err(cause) => tracing::debug!(%cause, "a member record was not taken"),
            }
            tokio::task::yield_now().await;
        }
        for signed in revocations {
            let merged = lock(&self.known).roster.revoke(signed.clone());
            match merged {
                Ok(host) => {
                    if let Some(host) = host {
                        out.push(host);
                        fresh.1.push(signed);
                    }
                }
                Err(cause) => tracing::debug!(%cause, "a revocation was not taken"),
            }
        }
        if fresh.0.is_empty() && fresh.1.is_empty() {
            return;
        }
        let members_changed = !fresh.0.is_empty();
        self.spread(fresh.0, fresh.1, from);
        self.change(|_| ());
        // Who is out stays out, also if this process dies right after it said so.
        if !out.is_empty()
            && let Err(cause) = self.save().await
        {
            tracing::error!(%cause, "a revocation was not saved; trying again with the next change");
        }
        if members_changed {
            self.emit(NetEvent::MembersChanged).await;
        }
        for host in out {
            tracing::warn!(%host, "revoked: it is no member of the swarm any more");
            self.emit(NetEvent::Revoked(host)).await;
        }
    }

    /// Tells all peers but `except` what is new. Who misses it hears of it by the next digest.
    pub fn spread(
        &self,
        members: Vec<MemberRecord>,
        revocations: Vec<Signed>,
        except: Option<HostId>,
    ) {
        let frames = roster_frames(&members, &revocations);
        for (host, link) in lock(&self.links).iter().filter(|(h, _)| Some(**h) != except) {
            for frame in &frames {
                if link.internal.try_send(frame.clone()).is_err() {
                    tracing::debug!(%host, "roster news dropped; the digest will bring it");
                }
            }
        }
    }

    /// The whole roster as frames, for a peer whose digest differs.
    pub fn roster_as_frames(&self) -> Vec<Vec<u8>> {
        let (members, revocations) = self.roster(|r| {
            let members: Vec<_> = r.members().map(|m| m.record.clone()).collect();
            (members, r.revocations().cloned().collect::<Vec<_>>())
        });
        roster_frames(&members, &revocations)
    }

    /// Who is out, as frames.
    pub fn revocations_as_frames(&self) -> Vec<Vec<u8>> {
        let revocations: Vec<_> = self.roster(|r| r.revocations().cloned().collect());
        roster_frames(&[], &revocations)
    }

    /// Makes the roster durable.
    pub async fn save(&self) -> Result<(), StateError> {
        let _one_at_a_time = self.saving.lock().await;
        let (roster, state) = (self.roster(Clone::clone), self.state.clone());
        let saved = tokio::task::spawn_blocking(move || roster.save(&state)).await;
        saved.unwrap_or_else(|e| {
            let cause = std::io::Error::other(e.to_string());
            Err(StateError::Io { verb: "write", path: "the roster".to_owned(), cause })
        })
    }

    /// Saves the roster whenever it changed. Runs until it is dropped.
    pub async fn keep_saved(self: Arc<Self>) {
        loop {
            self.dirty.notified().await;
            if let Err(cause) = self.save().await {
                tracing::error!(%cause, "the member list was not saved; trying again with the next change");
            }
        }
    }

    pub async fn emit(&self, event: NetEvent) {
        // Closed only when the driver is gone.
        let _ = self.events.send(event).await;
    }

    /// True the first time that this host showed this version.
    pub fn first_mismatch(&self, host: HostId, theirs: u16) -> bool {
        lock(&self.mismatches).insert((host, theirs))
    }

    pub fn connected(&self, host: HostId) -> bool {
        lock(&self.links).contains_key(&host)
    }

    /// Whether a stream that `initiator` began may replace the one that exists. Both ends come to
    /// the same answer: of two that collided the lower host's stays, otherwise the newer.
    pub fn may_replace(&self, host: HostId, instance: u64, initiator: HostId) -> bool {
        lock(&self.links).get(&host).is_none_or(|old| {
            let collided = old.instance == instance && old.since.elapsed() < COLLISION;
            !collided || initiator <= old.initiator
        })
    }

    /// Registers a stream whose hellos are done. The second value: the peer was not connected before
    /// (or restarted), so the driver is told.
    pub fn register(&self, host: HostId, hello: &Hello, initiator: HostId) -> (LinkEnds, bool) {
        let (queue, queue_out) = mpsc::channel(QUEUE_MESSAGES);
        let (internal, internal_out) = mpsc::channel(QUEUE_INTERNAL);
        let id = self.next_link.fetch_add(1, Ordering::Relaxed);
        let (waiting_bytes, rtt_us) = (Arc::default(), Arc::new(AtomicU64::new(u64::MAX)));
        let (stop, answered) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (instance, store, since) = (hello.instance, hello.store, Instant::now());
        let ends = LinkEnds {
            id,
            since,
            queue: queue_out,
            internal: internal_out,
            answers: internal.clone(),
            waiting_bytes: Arc::clone(&waiting_bytes),
            rtt_us: Arc::clone(&rtt_us),
            answered: Arc::clone(&answered),
            stop: Arc::clone(&stop),
        };
        let link = Link {
            id,
            instance,
            since,
            initiator,
            store,
            queue,
            internal,
            waiting_bytes,
            rtt_us,
            answered,
            stop,
        };
        let old = lock(&self.links).insert(host, link);
        let news = old.as_ref().is_none_or(|old| old.instance != instance);
        if let Some(old) = old {
            old.stop.notify_one();
        }
        (ends, news)
    }

    /// Removes the stream if it was not replaced. True if the peer is not connected any more.
    pub fn unregister(&self, host: HostId, id: u64) -> bool {
        let mut links = lock(&self.links);
        let mine = links.get(&host).is_some_and(|link| link.id == id);
        if mine {
            links.remove(&host);
        }
        mine
    }

    pub fn send(&self, to: HostId, msg: Control) -> Result<(), SendError> {
        let droppable = matches!(msg, Control::Membership(_));
        let bytes = message(&Frame::Control(Box::new(msg)), FRAME_BYTES)
            .map_err(|e| SendError::TooLong(e.to_string()))?;
        if !self.admitted(to) {
            return Err(SendError::NotMember(to));
        }
        let links = lock(&self.links);
        let link = links.get(&to).ok_or(SendError::NotConnected(to))?;
        let half_full = link.queue.capacity() < QUEUE_MESSAGES / 2;
        let waiting = link.waiting_bytes.load(Ordering::Relaxed);
        if droppable && (half_full || waiting > QUEUE_BYTES / 2) {
            self.membership_dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        if waiting.saturating_add(bytes.len()) > QUEUE_BYTES {
            return Err(SendError::Full(to));
        }
        let len = bytes.len();
        link.waiting_bytes.fetch_add(len, Ordering::Relaxed);
        link.queue.try_send(bytes).map_err(|error| {
            link.waiting_bytes.fetch_sub(len, Ordering::Relaxed);
            match error {
                mpsc::error::TrySendError::Full(_) => SendError::Full(to),
                mpsc::error::TrySendError::Closed(_) => SendError::NotConnected(to),
            }
        })
    }

    pub fn rtt(&self, host: HostId) -> Option<Duration> {
        let us = lock(&self.links).get(&host)?.rtt_us.load(Ordering::Relaxed);
        (us != u64::MAX).then(|| Duration::from_micros(us))
    }

    /// Sends a ping now and waits for an answer.
    pub async fn probe(&self, host: HostId, patience: Duration) -> Option<Duration> {
        let digest = self.digest();
        let answered = {
            let links = lock(&self.links);
            let link = links.get(&host)?;
            let number = u64::try_from(link.since.elapsed().as_micros()).unwrap_or(u64::MAX);
            let ping = message(&Frame::Ping { number, digest }, FRAME_BYTES).ok()?;
            let answered = Arc::clone(&link.answered).notified_owned();
            link.internal.try_send(ping).ok()?;
            answered
        };
        tokio::time::timeout(patience, answered).await.ok()?;
        self.rtt(host)
    }

    pub fn member(&self, host: HostId) -> Option<MemberInfo> {
        let (member, admitted) = self.roster(|r| Some((r.get(host)?.clone(), r.admitted(host))))?;
        let (connected, store) = {
            let links = lock(&self.links);
            let link = links.get(&host);
            (link.is_some(), link.and_then(|l| l.store))
        };
        let me = host == self.me.host();
        let on_port = |port: fn(&super::certificate::Contact) -> u16| {
            let contact = member.contact.as_ref();
            contact.map_or_else(Vec::new, |c| {
                c.addresses.iter().map(|a| (a.ip(), port(c)).into()).collect()
            })
        };
        Some(MemberInfo {
            host,
            me,
            admit: member.certificate.admit,
            addresses: member.contact.as_ref().map(|c| c.addresses.clone()).unwrap_or_default(),
            bulk: on_port(|c| c.bulk_port),
            frames: on_port(|c| c.frames_port),
            connected: connected || me,
            rtt_ms: self.rtt(host).map(|d| d.as_secs_f64() * 1000.0),
            revoked: !admitted,
            store: if me { self.store } else { store },
            name: member.certificate.name,
            site: member.certificate.site,
        })
    }

    pub fn members(&self) -> Vec<MemberInfo> {
        let hosts: Vec<_> = self.roster(|r| r.members().map(|m| m.certificate.host).collect());
        hosts.into_iter().filter_map(|host| self.member(host)).collect()
    }
}

fn roster_frames(members: &[MemberRecord], revocations: &[Signed]) -> Vec<Vec<u8>> {
    // Members first: a host's own leave counts only where its certificate is known.
    let members = members.chunks(BATCH).map(|m| (m.to_vec(), Vec::new()));
    let revocations = revocations.chunks(BATCH).map(|r| (Vec::new(), r.to_vec()));
    members
        .chain(revocations)
        .filter_map(|(members, revocations)| {
            message(&Frame::Roster { members, revocations }, FRAME_BYTES).ok()
        })
        .collect()
}
