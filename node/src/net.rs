//! The swarm adapter: who the nodes are and how bytes get from one to another.
//!
//! Owns identity and admission (`keys`, `identity`, `certificate`, `roster`, `token`, `admission`) and
//! three classes of traffic on separate connections, so that none starves another: control (libp2p:
//! `swarm`, `session`), bulk (`bulk`: TLS 1.3 over TCP) and frames (`frames`: QUIC datagrams). Never
//! decides what a message means. Invariant: whoever is no admitted, unrevoked member gets no protocol
//! but the join handshake, on any of the three.
//!
//! With `--listen ADDR:PORT`, control is on PORT (UDP and TCP), bulk on PORT + 1 (TCP), frames on
//! PORT + 2 (UDP).

mod addresses;
pub mod admission;
pub mod bulk;
pub mod certificate;
pub mod frames;
pub mod hello;
pub mod identity;
mod joining;
pub mod keys;
pub mod pace;
pub mod roster;
mod session;
mod shared;
mod swarm;
mod tls;
pub mod token;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use godwit_protocol::id::{HostId, Name, StoreId, SwarmId};
use godwit_protocol::wire::codec::WIRE_VERSION;
use godwit_protocol::wire::control::Control;

pub use admission::{AdmissionError, init, join, mint_token};
pub use bulk::{Bulk, BulkStream};
pub use frames::{Frames, Payload};

use certificate::{CertificateError, Contact, Signed};
use identity::Identity;
use keys::{DAEMON_LOCK, NODE_KEY, StateError, StateLock};
use roster::MemberRecord;
use shared::Shared;

/// Most events that wait for the driver.
const EVENTS: usize = 1024;

/// How a node takes part in its swarm.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// The state directory of a member (`init` or `join` made it).
    pub state: PathBuf,
    /// Where to listen. Port 0 (tests) takes three free ports, not necessarily in a row.
    pub listen: SocketAddr,
    /// What other hosts dial, if it differs; bulk and frames are on the next two ports there too.
    pub advertise: Option<SocketAddr>,
    /// The node's hard state, shown to peers.
    pub store: Option<StoreId>,
    /// The version in the hello: [`WIRE_VERSION`], except in tests.
    pub wire_version: u16,
}

impl NetConfig {
    /// The configuration of a plain member.
    #[must_use]
    pub fn new(state: PathBuf, listen: SocketAddr) -> Self {
        Self { state, listen, advertise: None, store: None, wire_version: WIRE_VERSION }
    }
}

/// What happens in the swarm, for the driver.
#[derive(Debug, Clone, PartialEq)]
pub enum NetEvent {
    /// Messages to and from this host flow now.
    Connected(HostId),
    /// Nothing can be sent to this host for the moment. It is being dialled again.
    Disconnected(HostId),
    /// A message of a member.
    Message {
        /// Who sent it: proven by the connection.
        from: HostId,
        /// The message. Decoded, otherwise unchecked.
        msg: Box<Control>,
    },
    /// Hosts became members, or members have other addresses.
    MembersChanged,
    /// A host is out for ever. It may be this one.
    Revoked(HostId),
    /// A member speaks another version of the wire and is left alone. Once per host and version.
    VersionMismatch {
        /// The member.
        host: HostId,
        /// This program's version.
        ours: u16,
        /// The member's version.
        theirs: u16,
    },
}

/// What this node knows of a member.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct MemberInfo {
    /// Its identity.
    pub host: HostId,
    /// Its short name.
    pub name: Name,
    /// Its site.
    pub site: Name,
    /// This very node.
    pub me: bool,
    /// It may admit others.
    pub admit: bool,
    /// Control addresses; empty until it has run once.
    pub addresses: Vec<SocketAddr>,
    /// Bulk addresses (TCP).
    pub bulk: Vec<SocketAddr>,
    /// Frame addresses (UDP).
    pub frames: Vec<SocketAddr>,
    /// There is a live control stream (always true of this node).
    pub connected: bool,
    /// Last round trip on the control stream, milliseconds.
    pub rtt_ms: Option<f64>,
    /// It is out for ever.
    pub revoked: bool,
    /// Its hard state, while it is connected.
    pub store: Option<StoreId>,
}

/// Why a message was not taken. It was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Not a member, or not any more.
    #[error("{0} is no member of the swarm")]
    NotMember(HostId),
    /// No control stream at the moment.
    #[error("{0} is not connected")]
    NotConnected(HostId),
    /// The peer does not read as fast as we speak.
    #[error("too much waits for {0}")]
    Full(HostId),
    /// Longer than a control message may be.
    #[error("{0}")]
    TooLong(String),
}

/// Why the adapter does not run.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No swarm, or the state directory.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// This host was revoked.
    #[error("this host was revoked; remove its state directory and join again with a new token")]
    Revoked,
    /// A listening socket.
    #[error(
        "cannot listen on {address}: {cause}; choose another --listen ADDR:PORT (three ports in a row are used)"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's answer.
        cause: String,
    },
    /// A listen address without an advertised one that others could dial.
    #[error("no address of this host could be found; give --advertise ADDR:PORT")]
    NoAddress,
    /// The transport could not be built.
    #[error("cannot set up the transport: {0}")]
    Transport(String),
    /// A statement could not be signed or does not hold.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// A running swarm adapter: the handle and what it delivers. All channels are bounded; a driver that
/// does not read slows its peers down, and frames are dropped and counted.
#[derive(Debug)]
pub struct Net {
    /// Sends and asks.
    pub handle: NetHandle,
    /// What happens.
    pub events: mpsc::Receiver<NetEvent>,
    /// Opens bulk connections.
    pub bulk: Bulk,
    /// Bulk connections that members opened.
    pub bulk_inbound: mpsc::Receiver<(HostId, BulkStream)>,
    /// Sends frames.
    pub frames: Frames,
    /// Frames and markers of members: sender, wire tag, content; of one sender in their order.
    pub frames_inbound: mpsc::Receiver<(HostId, u32, Payload)>,
}

impl Net {
    /// Starts the adapter; when it returns, all three ports listen.
    ///
    /// # Errors
    /// [`NetError`]; nothing runs then.
    pub async fn start(config: NetConfig) -> Result<Self, NetError> {
        // Fails only if some provider is installed already, which is as good.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (state, roster) = admission::open(&config.state)?;
        let daemon = state.lock(DAEMON_LOCK, false)?;
        let me = Identity::load(&state, NODE_KEY)?.ok_or(AdmissionError::NoMember)?;
        if !roster.admitted(me.host()) {
            return Err(NetError::Revoked);
        }
        let (events_in, events) = mpsc::channel(EVENTS);
        let instance = u64::from_le_bytes(keys::random()?);
        let facts = (config.wire_version, instance, config.store);
        let shared = Shared::new(me, state, roster, events_in, facts);

        let listen = addresses::with_port(config.listen)?;
        let (bulk, bulk_inbound, bulk_task) = bulk::start(Arc::clone(&shared), listen.bulk)?;
        let (frames, frames_inbound, frames_task) =
            frames::start(Arc::clone(&shared), listen.frames)?;
        let runner = swarm::Runner::listen(Arc::clone(&shared), listen.control).await?;
        announce(&shared, &config, &listen)?;
        shared.save().await?;

        let (stop, stopped) = watch::channel(());
        let mut tasks = vec![tokio::spawn(runner.run()), bulk_task, frames_task];
        tasks.push(tokio::spawn(Arc::clone(&shared).keep_saved()));
        let supervisor =
            tokio::spawn(supervise(tasks, stopped, Arc::clone(&shared), frames.clone(), daemon));
        let running = Running { stop: Some(stop), supervisor: Some(supervisor) };
        let handle = NetHandle { shared, running: Arc::new(tokio::sync::Mutex::new(running)) };
        Ok(Self { handle, events, bulk, bulk_inbound, frames, frames_inbound })
    }
}

/// Says where this node is, in a contact that is newer than any before.
fn announce(
    shared: &Shared,
    config: &NetConfig,
    listen: &addresses::Listen,
) -> Result<(), NetError> {
    let addresses = match config.advertise {
        Some(address) => vec![address],
        None => addresses::reachable(listen.control),
    };
    let first = addresses.first().ok_or(NetError::NoAddress)?;
    // Behind a translated address the three ports keep their distance.
    let moved = |port: u16| {
        let distance = port.wrapping_sub(listen.control.port());
        first.port().wrapping_add(distance)
    };
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
    let me = shared.me.host();
    let member = shared.roster(|r| r.get(me).cloned()).ok_or(NetError::Revoked)?;
    let before = member.contact.map_or(0, |c| c.sequence);
    let contact = Contact {
        host: me,
        sequence: now.max(before.saturating_add(1)),
        bulk_port: moved(listen.bulk.port()),
        frames_port: moved(listen.frames.port()),
        addresses,
    };
    let contact = Some(Signed::contact(&shared.me, &contact)?);
    let record = MemberRecord { certificate: member.record.certificate, contact };
    shared.change(|r| r.merge(record))?;
    Ok(())
}

struct Running {
    stop: Option<watch::Sender<()>>,
    supervisor: Option<JoinHandle<()>>,
}

/// Ends all tasks when told to, or when the last handle is dropped; then frees the directory.
async fn supervise(
    tasks: Vec<JoinHandle<()>>,
    mut stopped: watch::Receiver<()>,
    shared: Arc<Shared>,
    frames: Frames,
    daemon: StateLock,
) {
    let _ = stopped.changed().await;
    frames.close().await;
    for task in tasks {
        task.abort();
        let _ = task.await;
    }
    if let Err(cause) = shared.save().await {
        tracing::error!(%cause, "the member list was not saved at the end");
    }
    drop(daemon);
}

/// The way to the running adapter. Cheap to clone; the adapter ends with the last one.
#[derive(Clone)]
pub struct NetHandle {
    shared: Arc<Shared>,
    running: Arc<tokio::sync::Mutex<Running>>,
}

impl std::fmt::Debug for NetHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NetHandle({})", self.me())
    }
}

impl NetHandle {
    /// This host.
    #[must_use]
    pub fn me(&self) -> HostId {
        self.shared.me.host()
    }

    /// The swarm.
    #[must_use]
    pub fn swarm(&self) -> SwarmId {
        self.shared.roster(roster::Roster::swarm)
    }

    /// The key of chunk ids. A secret of the swarm.
    #[must_use]
    pub fn chunk_key(&self) -> [u8; 32] {
        self.shared.roster(roster::Roster::chunk_key)
    }

    /// Queues a message for a member and returns at once. Not confirmed: the core repeats what
    /// matters. When a queue is half full, messages of the membership protocol are dropped silently
    /// (it lives with loss, and counts on the others getting through); the others fail when it is
    /// full.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn send(&self, to: HostId, msg: Control) -> Result<(), SendError> {
        self.shared.send(to, msg)
    }

    /// Every host that ever was a member, this one included.
    #[must_use]
    pub fn members(&self) -> Vec<MemberInfo> {
        self.shared.members()
    }

    /// What is known of one host.
    #[must_use]
    pub fn member(&self, host: HostId) -> Option<MemberInfo> {
        self.shared.member(host)
    }

    /// Whether a host is a member now.
    #[must_use]
    pub fn admitted(&self, host: HostId) -> bool {
        self.shared.admitted(host)
    }

    /// The last round trip on the control stream, with everything that waits in it.
    #[must_use]
    pub fn rtt(&self, host: HostId) -> Option<Duration> {
        self.shared.rtt(host)
    }

    /// Measures a round trip on the control stream now; `None` if there is no stream or no answer
    /// within `patience`. Goes past messages that wait, as pings do.
    pub async fn probe(&self, host: HostId, patience: Duration) -> Option<Duration> {
        self.shared.probe(host, patience).await
    }

    /// Mints a token, see [`admission::mint_token`].
    ///
    /// # Errors
    /// [`AdmissionError`].
    pub async fn mint_token(&self, life: Duration, admit: bool) -> Result<String, AdmissionError> {
        self.shared.save().await?;
        let state = self.shared.state.file("");
        run_blocking(move || mint_token(&state, life, None, admit)).await
    }

    /// Puts a host out for ever: durable here before this returns, then spread to all. Only where
    /// the authority key is.
    ///
    /// # Errors
    /// [`AdmissionError`]; nothing was changed, unless the state directory failed.
    pub async fn revoke(&self, host: HostId) -> Result<(), AdmissionError> {
        let (state, roster) = (self.shared.state.clone(), self.shared.roster(Clone::clone));
        let signed =
            run_blocking(move || admission::sign_revocation(&state, &roster, host)).await?;
        self.shared.learn(Vec::new(), vec![signed], None).await;
        Ok(self.shared.save().await?)
    }

    /// Leaves the swarm: tells the others, stops the adapter, forgets swarm and key.
    ///
    /// # Errors
    /// [`AdmissionError::LastAuthority`] (nothing was changed) or the state directory's.
    pub async fn leave(&self) -> Result<(), AdmissionError> {
        let roster = self.shared.roster(Clone::clone);
        let signed = admission::sign_leave(&self.shared.state, &roster, &self.shared.me)?;
        self.shared.learn(Vec::new(), vec![signed], None).await;
        // The streams end by themselves once the news is out, since we are no member any more.
        let gone = async {
            while self.members().iter().any(|m| m.connected && !m.me) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(3), gone).await;
        self.shutdown().await;
        Ok(admission::forget(&self.shared.state)?)
    }

    /// Stops everything and frees the ports and the state directory.
    pub async fn shutdown(&self) {
        let mut running = self.running.lock().await;
        running.stop.take();
        if let Some(supervisor) = running.supervisor.take() {
            let _ = supervisor.await;
        }
    }
}

async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AdmissionError> + Send + 'static,
) -> Result<T, AdmissionError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| {
        let (verb, path) = ("finish work on", "the state directory".to_owned());
        let cause = std::io::Error::other(e.to_string());
        Err(StateError::Io { verb, path, cause }.into())
    })
}
