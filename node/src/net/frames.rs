//! Frames: encrypted datagrams between members, for the Ethernet frames of virtual wires.
//!
//! Owns a QUIC endpoint of its own (libp2p's has no datagrams) under the node's identity, one
//! connection per peer, opened when the first frame wants to leave and again as soon as it is lost.
//! Never repeats or reorders on purpose, never waits: what cannot leave is dropped and counted.
//! Invariant: a frame is delivered only from a host that is a member at that moment.

pub mod pieces;
mod quic;
mod ways;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{Connection, Endpoint, VarInt};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use godwit_protocol::id::HostId;
use godwit_protocol::limits::MEMBERS;

use super::NetError;
use super::identity::peer_of;
use super::shared::Shared;

pub use pieces::{FRAME_BYTES, Payload};
use ways::Ways;

/// Most inbound frames that wait for the driver.
const INBOUND: usize = 4096;
/// Most frames that wait for a connection to be made.
const WAITING: usize = 256;
/// One attempt at an address.
const CONNECT: Duration = Duration::from_secs(3);
/// Time to tell the peers that this node goes.
const GOODBYE: Duration = Duration::from_millis(500);
/// Pause after an attempt at all addresses failed.
const RETRY: Duration = Duration::from_millis(500);
/// Most handshakes of others under way at once.
const HANDSHAKES: usize = 64;
/// Most requests to dial that wait.
const DIALS: usize = 256;

/// What happened to frames, since the start.
#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    not_sent: AtomicU64,
    not_delivered: AtomicU64,
    incomplete: AtomicU64,
}

/// A reading of the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct FrameCounts {
    /// Frames given to QUIC.
    pub sent: u64,
    /// Frames delivered to the driver.
    pub received: u64,
    /// Frames dropped before they left: no member, no connection, too long, too many waiting.
    pub not_sent: u64,
    /// Frames dropped after they arrived: the driver did not keep up.
    pub not_delivered: u64,
    /// Frames of which a piece was lost.
    pub incomplete: u64,
}

/// Why a frame did not leave. It is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a member, or not any more.
    #[error("{0} is no member of the swarm")]
    NotMember(HostId),
    /// Empty, or longer than [`FRAME_BYTES`].
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// No connection yet, and too many frames wait for it.
    #[error("{0} is not connected and too many frames wait for it")]
    NotConnected(HostId),
}

#[derive(Default)]
struct Peer {
    connections: Ways<Connection>,
    waiting: Vec<(u32, Bytes)>,
    dialling: bool,
    retry_at: Option<Instant>,
}

struct Inner {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    peers: Mutex<HashMap<HostId, Peer>>,
    dials: mpsc::Sender<HostId>,
    deliver: mpsc::Sender<(HostId, u32, Payload)>,
    number: AtomicU16,
    counters: Counters,
}

/// Sends frames to members. Cheap to clone.
#[derive(Clone)]
pub struct Frames(Arc<Inner>);

impl std::fmt::Debug for Frames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frames({:?})", self.counts())
    }
}

type Inbound = mpsc::Receiver<(HostId, u32, Payload)>;

/// Opens the endpoint.
pub(super) fn start(
    shared: Arc<Shared>,
    listen: SocketAddr,
) -> Result<(Frames, Inbound, JoinHandle<()>), NetError> {
    let endpoint = quic::endpoint(&shared.me, listen)?;
    let (deliver, inbound) = mpsc::channel(INBOUND);
    let (dials, dial_requests) = mpsc::channel(DIALS);
    let inner = Inner {
        shared,
        endpoint,
        peers: Mutex::default(),
        dials,
        deliver,
        number: AtomicU16::new(0),
        counters: Counters::default(),
    };
    let frames = Frames(Arc::new(inner));
    let task = tokio::spawn(run(frames.clone(), dial_requests));
    Ok((frames, inbound, task))
}

/// Closes the endpoint when the task that accepts ends.
struct CloseOnDrop(Endpoint);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close(VarInt::from_u32(0), b"");
    }
}

async fn run(frames: Frames, mut dial_requests: mpsc::Receiver<HostId>) {
    let _close = CloseOnDrop(frames.0.endpoint.clone());
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let mut changed = frames.0.shared.changed.subscribe();
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            incoming = frames.0.endpoint.accept() => {
                let Some(incoming) = incoming else { return };
                let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
                    incoming.refuse();
                    continue;
                };
                let frames = frames.clone();
                tasks.spawn(async move {
                    let Ok(connecting) = incoming.accept() else { return };
                    let connected = timeout(CONNECT, connecting).await;
                    drop(permit);
                    if let Ok(Ok(connection)) = connected {
                        frames.serve(connection, None).await;
                    }
                });
            }
            Some(host) = dial_requests.recv() => {
                let frames = frames.clone();
                tasks.spawn(async move { frames.dial(host).await });
            }
            Some(_) = tasks.join_next() => {}
            Ok(()) = changed.changed() => frames.cut_revoked(),
        }
    }
}

impl Frames {
    /// Sends a frame of the wire `tag` to a member and returns at once. Until there is a connection,
    /// up to 256 frames wait; a connection is made on demand.
    ///
    /// # Errors
    /// [`FrameError`]; the frame is dropped and counted.
    pub fn send(&self, to: HostId, tag: u32, frame: &[u8]) -> Result<(), FrameError> {
        let sent = self.try_send(to, tag, frame);
        if sent.is_err() {
            self.0.counters.not_sent.fetch_add(1, Ordering::Relaxed);
        }
        sent
    }

    /// Says something to a member's driver, in the order of the frames sent to it before. It may be lost,
    /// as they may.
    ///
    /// # Errors
    /// [`FrameError`]; nothing was sent. Without a connection it does not wait for one.
    pub fn mark(&self, to: HostId, tag: u32, bytes: &[u8]) -> Result<(), FrameError> {
        let datagram = pieces::marker(tag, bytes).ok_or(FrameError::Length(bytes.len()))?;
        if !self.0.shared.admitted(to) {
            return Err(FrameError::NotMember(to));
        }
        let connection = self.peers().get(&to).and_then(|p| p.connections.used());
        let connection = connection.ok_or(FrameError::NotConnected(to))?;
        connection.send_datagram(datagram).map_err(|_| FrameError::NotConnected(to))
    }

    /// Makes sure that a connection exists or is being made, so that the first frame does not wait.
    ///
    /// # Errors
    /// [`FrameError::NotMember`].
    pub fn prepare(&self, to: HostId) -> Result<(), FrameError> {
        if !self.0.shared.admitted(to) {
            return Err(FrameError::NotMember(to));
        }
        let mut peers = self.peers();
        let peer = peers.entry(to).or_default();
        self.want(to, peer);
        Ok(())
    }

    /// Whether frames to this host leave at once.
    #[must_use]
    pub fn connected(&self, host: HostId) -> bool {
        self.peers().get(&host).is_some_and(|p| p.connections.used().is_some())
    }

    /// What happened to frames so far.
    #[must_use]
    pub fn counts(&self) -> FrameCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.0.counters;
        FrameCounts {
            sent: read(&c.sent),
            received: read(&c.received),
            not_sent: read(&c.not_sent),
            not_delivered: read(&c.not_delivered),
            incomplete: read(&c.incomplete),
        }
    }

    /// Drops what leads to an earlier start of `host`; the next frame connects anew. Without this, frames would go to
    /// a node that was killed and started again, and be ignored there, until the connection's idle time is over.
    pub fn forget(&self, host: HostId) {
        let old = self.peers().get_mut(&host).map(|peer| peer.connections.take());
        for connection in old.into_iter().flatten() {
            connection.close(VarInt::from_u32(0), b"");
        }
    }

    /// Tells every peer that this node goes, so that none sends into the void until it notices.
    pub(super) async fn close(&self) {
        self.0.endpoint.close(VarInt::from_u32(0), b"");
        let _ = timeout(GOODBYE, self.0.endpoint.wait_idle()).await;
    }

    fn try_send(&self, to: HostId, tag: u32, frame: &[u8]) -> Result<(), FrameError> {
        if frame.is_empty() || frame.len() > FRAME_BYTES {
            return Err(FrameError::Length(frame.len()));
        }
        if !self.0.shared.admitted(to) {
            return Err(FrameError::NotMember(to));
        }
        let connection = {
            let mut peers = self.peers();
            match peers.get(&to).and_then(|p| p.connections.used()) {
                Some(connection) => connection,
                None => {
                    let peer = peers.entry(to).or_default();
                    self.want(to, peer);
                    if peer.waiting.len() >= WAITING {
                        return Err(FrameError::NotConnected(to));
                    }
                    peer.waiting.push((tag, Bytes::copy_from_slice(frame)));
                    return Ok(());
                }
            }
        };
        self.transmit(&connection, to, tag, frame)
    }

    fn transmit(
        &self,
        connection: &Connection,
        to: HostId,
        tag: u32,
        frame: &[u8],
    ) -> Result<(), FrameError> {
        let number = self.0.number.fetch_add(1, Ordering::Relaxed);
        let room = connection.max_datagram_size().ok_or(FrameError::NotConnected(to))?;
        let cut = pieces::split(tag, number, frame, room);
        for datagram in cut.ok_or(FrameError::Length(frame.len()))? {
            connection.send_datagram(datagram).map_err(|_| FrameError::NotConnected(to))?;
        }
        self.0.counters.sent.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Asks for a connection unless there is one, or one is being made, or one failed just now.
    fn want(&self, host: HostId, peer: &mut Peer) {
        let paused = peer.retry_at.is_some_and(|at| at > Instant::now());
        if peer.connections.used().is_some() || peer.dialling || paused {
            return;
        }
        peer.dialling = self.0.dials.try_send(host).is_ok();
    }

    async fn dial(&self, host: HostId) {
        match self.connect(host).await {
            Ok(connection) => self.serve(connection, Some(host)).await,
            Err(cause) => {
                tracing::debug!(%host, %cause, "no connection for frames");
                let mut peers = self.peers();
                if let Some(peer) = peers.get_mut(&host) {
                    peer.dialling = false;
                    peer.retry_at = Some(Instant::now() + RETRY);
                    let lost = u64::try_from(peer.waiting.len()).unwrap_or(0);
                    peer.waiting.clear();
                    self.0.counters.not_sent.fetch_add(lost, Ordering::Relaxed);
                }
            }
        }
    }

    async fn connect(&self, host: HostId) -> Result<Connection, String> {
        let member = self.0.shared.member(host).filter(|m| !m.revoked);
        let member = member.ok_or("no member")?;
        let peer = peer_of(host).ok_or("no key")?;
        let config = quic::client(&self.0.shared.me, peer).map_err(|e| e.to_string())?;
        let mut last = "no address is known".to_owned();
        for address in member.frames {
            // The name is not used: the peer's key is what is checked.
            let dialled = self.0.endpoint.connect_with(config.clone(), address, "godwit");
            match dialled.map(|connecting| timeout(CONNECT, connecting)) {
                Ok(connecting) => match connecting.await {
                    Ok(Ok(connection)) => return Ok(connection),
                    Ok(Err(cause)) => last = format!("{address}: {cause}"),
                    Err(_) => last = format!("{address}: timed out"),
                },
                Err(cause) => last = format!("{address}: {cause}"),
            }
        }
        Err(last)
    }

    /// Checks who is there, then delivers what arrives until the connection ends.
    async fn serve(&self, connection: Connection, dialled: Option<HostId>) {
        let host = quic::host(&connection).filter(|host| dialled.is_none_or(|d| d == *host));
        let entered = host.filter(|host| self.enter(*host, &connection));
        let Some(host) = entered else {
            connection.close(VarInt::from_u32(1), b"");
            if let Some(host) = dialled
                && let Some(peer) = self.peers().get_mut(&host)
            {
                peer.dialling = false;
            }
            return;
        };
        let mut joiner = pieces::Joiner::default();
        let counters = &self.0.counters;
        while let Ok(datagram) = connection.read_datagram().await {
            let before = joiner.dropped;
            let whole = joiner.take(datagram, Instant::now());
            counters.incomplete.fetch_add(joiner.dropped - before, Ordering::Relaxed);
            let Some((tag, payload)) = whole else { continue };
            if !self.0.shared.admitted(host) {
                break;
            }
            match self.0.deliver.try_send((host, tag, payload)) {
                Ok(()) => counters.received.fetch_add(1, Ordering::Relaxed),
                Err(_) => counters.not_delivered.fetch_add(1, Ordering::Relaxed),
            };
        }
        connection.close(VarInt::from_u32(0), b"");
        self.gone(host, &connection);
    }

    /// Takes a connection into use; false if its host is no member. What waited goes first, before others can
    /// use it.
    fn enter(&self, host: HostId, connection: &Connection) -> bool {
        let mut peers = self.peers();
        if !self.0.shared.admitted(host) || peers.len() > MEMBERS {
            return false;
        }
        let peer = peers.entry(host).or_default();
        if let Some(other) = peer.connections.add(connection.clone()) {
            other.close(VarInt::from_u32(0), b"");
        }
        peer.dialling = false;
        peer.retry_at = None;
        for (tag, frame) in std::mem::take(&mut peer.waiting) {
            if self.transmit(connection, host, tag, &frame).is_err() {
                self.0.counters.not_sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        true
    }

    /// Forgets a connection that ended, and dials again if the peer still is a member.
    fn gone(&self, host: HostId, connection: &Connection) {
        let mut peers = self.peers();
        let Some(peer) = peers.get_mut(&host) else { return };
        peer.connections.retain(|one| one.stable_id() != connection.stable_id());
        // The lower host dials; the other waits for a frame to send.
        if self.0.shared.admitted(host) && self.0.shared.me.host() < host {
            self.want(host, peer);
        }
    }

    fn cut_revoked(&self) {
        let mut peers = self.peers();
        peers.retain(|host, peer| {
            let stays = self.0.shared.admitted(*host);
            if !stays {
                for connection in peer.connections.take() {
                    connection.close(VarInt::from_u32(1), b"");
                }
            }
            stays
        });
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<HostId, Peer>> {
        self.0.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
