//! The libp2p swarm: listening, dialling, and handing streams to `session` and `joining`.
//!
//! Owns when a peer is dialled: the lower host id at once, the higher a little later; QUIC first,
//! then TCP + TLS; back-off between failures. Never reads a message. Invariant: a stranger can open
//! a stream for a join or for a hello, and has no other protocol to speak.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use libp2p::allow_block_list::{self, BlockedPeers};
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Stream, StreamProtocol, Swarm};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use godwit_protocol::id::HostId;
use godwit_protocol::limits::MEMBERS;

use super::identity::{Identity, host_of, peer_of};
use super::session::{self, Outcome};
use super::shared::Shared;
use super::{NetError, joining};

pub(super) const CONTROL_PROTOCOL: StreamProtocol = StreamProtocol::new("/godwit/control/1");
pub(super) const JOIN_PROTOCOL: StreamProtocol = StreamProtocol::new("/godwit/join/1");

/// QUIC gives a peer up after this long without a packet: a cut of 5 s must not kill it.
const IDLE_MS: u32 = 15_000;
/// QUIC's handshake; then TCP is tried.
const HANDSHAKE: Duration = Duration::from_secs(4);
/// Connections without a stream are closed after this long.
const UNUSED: Duration = Duration::from_secs(10);
/// Opening a stream, including its negotiation.
const OPEN_STREAM: Duration = Duration::from_secs(6);
/// Most hellos of others under way at once.
const HELLOS: usize = 64;
/// Most joins under way at once.
const JOINS: usize = 8;
const TICK: Duration = Duration::from_millis(200);
/// The higher host id leaves the lower this much time to dial.
const YIELD: Duration = Duration::from_millis(1500);
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
const BACKOFF_LAST: Duration = Duration::from_secs(5);
const BACKOFF_MISMATCH: Duration = Duration::from_secs(60);
/// A revoked peer has this long to hear why before its connections are closed.
const LAST_WORDS: Duration = Duration::from_millis(1500);

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
pub(super) struct Behaviour {
    limits: connection_limits::Behaviour,
    blocked: allow_block_list::Behaviour<BlockedPeers>,
    pub streams: libp2p_stream::Behaviour,
}

/// A libp2p node of this identity with QUIC and TCP + TLS + yamux.
pub(super) fn build(me: &Identity) -> Result<Swarm<Behaviour>, NetError> {
    let failed = |e: &dyn std::fmt::Display| NetError::Transport(e.to_string());
    let per_member = u32::try_from(2 * MEMBERS).unwrap_or(u32::MAX);
    let limits = ConnectionLimits::default()
        .with_max_pending_incoming(Some(256))
        .with_max_pending_outgoing(Some(per_member))
        .with_max_established_incoming(Some(per_member))
        .with_max_established_per_peer(Some(4));
    let behaviour = Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        blocked: allow_block_list::Behaviour::default(),
        streams: libp2p_stream::Behaviour::new(),
    };
    let builder = libp2p::SwarmBuilder::with_existing_identity(me.keypair())
        .with_tokio()
        .with_tcp(
            libp2p::tcp::Config::default().nodelay(true),
            libp2p::tls::Config::new,
            libp2p::yamux::Config::default,
        )
        .map_err(|e| failed(&e))?
        .with_quic_config(|mut config| {
            config.max_idle_timeout = IDLE_MS;
            config.keep_alive_interval = Duration::from_secs(1);
            config.handshake_timeout = HANDSHAKE;
            config
        })
        .with_behaviour(|_| behaviour)
        .map_err(|e| failed(&e))?
        .with_swarm_config(|config| config.with_idle_connection_timeout(UNUSED))
        .with_connection_timeout(HANDSHAKE);
    Ok(builder.build())
}

/// The way by which a peer is dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    Quic,
    Tcp,
}

/// libp2p's form of an address.
pub(super) fn multiaddr(address: SocketAddr, via: Via) -> Multiaddr {
    let base = match address.ip() {
        IpAddr::V4(ip) => Multiaddr::empty().with(Protocol::Ip4(ip)),
        IpAddr::V6(ip) => Multiaddr::empty().with(Protocol::Ip6(ip)),
    };
    match via {
        Via::Quic => base.with(Protocol::Udp(address.port())).with(Protocol::QuicV1),
        Via::Tcp => base.with(Protocol::Tcp(address.port())),
    }
}

/// Dials one peer by one way; the result comes as a swarm event.
pub(super) fn dial<'a>(
    swarm: &mut Swarm<Behaviour>,
    peer: PeerId,
    addresses: impl Iterator<Item = &'a SocketAddr>,
    via: Via,
) -> bool {
    let addresses: Vec<_> = addresses.map(|a| multiaddr(*a, via)).collect();
    let options =
        DialOpts::peer_id(peer).condition(PeerCondition::Disconnected).addresses(addresses).build();
    swarm.dial(options).is_ok()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    Dialling(Via),
    Hello,
}

struct Dial {
    stage: Stage,
    next: Instant,
    failures: u32,
}

struct Done {
    host: HostId,
    outcome: Outcome,
    dialled: bool,
}

/// Drives the swarm of a member.
pub(super) struct Runner {
    swarm: Swarm<Behaviour>,
    shared: Arc<Shared>,
    dials: HashMap<HostId, Dial>,
    tasks: JoinSet<Option<Done>>,
    hellos: Arc<Semaphore>,
    joins: Arc<Semaphore>,
    changed: watch::Receiver<u64>,
    block_at: Option<Instant>,
}

impl Runner {
    /// Listens with QUIC and TCP on `listen`; returns once both do.
    pub async fn listen(shared: Arc<Shared>, listen: SocketAddr) -> Result<Self, NetError> {
        let mut swarm = build(&shared.me)?;
        for via in [Via::Quic, Via::Tcp] {
            let failed = |cause: String| NetError::Listen { address: listen, cause };
            swarm.listen_on(multiaddr(listen, via)).map_err(|e| failed(e.to_string()))?;
            let ready = timeout(Duration::from_secs(5), async {
                loop {
                    match swarm.select_next_some().await {
                        SwarmEvent::NewListenAddr { .. } => return Ok(()),
                        SwarmEvent::ListenerClosed { reason: Err(e), .. } => {
                            return Err(e.to_string());
                        }
                        SwarmEvent::ListenerError { error, .. } => return Err(error.to_string()),
                        _ => {}
                    }
                }
            });
            ready.await.map_err(|_| failed("timed out".to_owned()))?.map_err(failed)?;
        }
        let changed = shared.changed.subscribe();
        Ok(Self {
            swarm,
            shared,
            dials: HashMap::new(),
            tasks: JoinSet::new(),
            hellos: Arc::new(Semaphore::new(HELLOS)),
            joins: Arc::new(Semaphore::new(JOINS)),
            changed,
            block_at: Some(Instant::now()),
        })
    }

    /// Runs until it is dropped.
    pub async fn run(mut self) {
        let mut control = self.swarm.behaviour().streams.new_control();
        let (Ok(mut hellos), Ok(mut joins)) =
            (control.accept(CONTROL_PROTOCOL), control.accept(JOIN_PROTOCOL))
        else {
            tracing::error!("the control protocol is registered twice");
            return;
        };
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                Some((peer, stream)) = hellos.next() => self.on_hello(peer, stream),
                Some((peer, stream)) = joins.next() => self.on_join(peer, stream),
                Some(done) = self.tasks.join_next() => match done {
                    Ok(Some(done)) => self.on_done(&done),
                    Ok(None) => {}
                    Err(cause) => tracing::error!(%cause, "a control stream's task failed"),
                },
                Ok(()) = self.changed.changed() => {
                    self.block_at = Some(Instant::now() + LAST_WORDS);
                }
                _ = tick.tick() => self.on_tick(),
            }
        }
    }

    fn on_event<E>(&mut self, event: SwarmEvent<E>) {
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, endpoint, .. } => {
                let Some(host) = host_of(&peer_id) else {
                    let _ = self.swarm.disconnect_peer_id(peer_id);
                    return;
                };
                let dialled = self.dials.get(&host).map(|d| d.stage);
                if endpoint.is_dialer() && matches!(dialled, Some(Stage::Dialling(_))) {
                    self.say_hello(host, peer_id);
                }
            }
            SwarmEvent::OutgoingConnectionError { peer_id: Some(peer), error, .. } => {
                let Some(host) = host_of(&peer) else { return };
                tracing::debug!(%host, %error, "dial failed");
                match self.dials.get(&host).map(|d| d.stage) {
                    Some(Stage::Dialling(Via::Quic)) => self.dial(host, peer, Via::Tcp),
                    Some(Stage::Dialling(Via::Tcp)) => self.failed(host, Duration::ZERO),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn on_hello(&mut self, peer: PeerId, stream: Stream) {
        let Some(host) = host_of(&peer) else { return };
        let Ok(permit) = Arc::clone(&self.hellos).try_acquire_owned() else { return };
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let outcome = session::inbound(shared, host, stream, permit).await;
            Some(Done { host, outcome, dialled: false })
        });
    }

    fn on_join(&mut self, peer: PeerId, stream: Stream) {
        let Some(host) = host_of(&peer) else { return };
        let Ok(permit) = Arc::clone(&self.joins).try_acquire_owned() else { return };
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            joining::serve(shared, host, stream).await;
            drop(permit);
            None
        });
    }

    fn on_done(&mut self, done: &Done) {
        let Done { host, outcome, dialled } = *done;
        let Some(peer) = peer_of(host) else { return };
        let connected = self.shared.connected(host);
        // A version's answer must still leave; everything else that failed is closed for good.
        let keep = connected || matches!(outcome, Outcome::Mismatch | Outcome::Duplicate);
        if !keep {
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let yields = self.shared.me.host() > host;
        let pause = if yields { YIELD } else { Duration::from_millis(20) };
        match outcome {
            Outcome::Ended => self.again(host, pause),
            Outcome::Mismatch => self.failed(host, BACKOFF_MISMATCH),
            Outcome::Duplicate if dialled => self.again(host, YIELD),
            _ if dialled => self.failed(host, pause),
            _ => {}
        }
    }

    fn on_tick(&mut self) {
        if self.block_at.is_some_and(|at| at <= Instant::now()) {
            self.block_at = None;
            self.block_revoked();
        }
        let me = self.shared.me.host();
        let wanted: Vec<HostId> = self.shared.roster(|r| {
            let hosts = r.members().filter(|m| m.contact.is_some()).map(|m| m.certificate.host);
            hosts.filter(|h| *h != me && r.admitted(*h)).collect()
        });
        for host in wanted {
            if self.shared.connected(host) {
                continue;
            }
            let now = Instant::now();
            let first = if me > host { now + YIELD } else { now };
            let dial = self.dials.entry(host).or_insert(Dial {
                stage: Stage::Idle,
                next: first,
                failures: 0,
            });
            if dial.stage != Stage::Idle || dial.next > now {
                continue;
            }
            let Some(peer) = peer_of(host) else { continue };
            if self.swarm.is_connected(&peer) {
                self.say_hello(host, peer);
            } else {
                self.dial(host, peer, Via::Quic);
            }
        }
    }

    fn block_revoked(&mut self) {
        let revoked: Vec<HostId> = self.shared.roster(|r| {
            let hosts = r.members().map(|m| m.certificate.host);
            hosts.filter(|h| !r.admitted(*h)).collect()
        });
        for host in revoked {
            self.dials.remove(&host);
            if let Some(peer) = peer_of(host) {
                self.swarm.behaviour_mut().blocked.block_peer(peer);
            }
        }
    }

    fn dial(&mut self, host: HostId, peer: PeerId, via: Via) {
        let addresses = self.shared.roster(|r| {
            let contact = r.get(host).and_then(|m| m.contact.as_ref());
            contact.map(|c| c.addresses.clone()).unwrap_or_default()
        });
        if dial(&mut self.swarm, peer, addresses.iter(), via) {
            self.stage(host, Stage::Dialling(via));
        } else {
            self.failed(host, Duration::ZERO);
        }
    }

    fn say_hello(&mut self, host: HostId, peer: PeerId) {
        self.stage(host, Stage::Hello);
        let mut control = self.swarm.behaviour().streams.new_control();
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let opened = timeout(OPEN_STREAM, control.open_stream(peer, CONTROL_PROTOCOL)).await;
            let outcome = match opened {
                Ok(Ok(stream)) => session::outbound(shared, host, stream).await,
                _ => Outcome::Failed,
            };
            Some(Done { host, outcome, dialled: true })
        });
    }

    fn stage(&mut self, host: HostId, stage: Stage) {
        if let Some(dial) = self.dials.get_mut(&host) {
            dial.stage = stage;
        }
    }

    /// Dials again after `pause`, as after the first failure.
    fn again(&mut self, host: HostId, pause: Duration) {
        let next = Instant::now() + pause;
        self.dials.insert(host, Dial { stage: Stage::Idle, next, failures: 0 });
    }

    fn failed(&mut self, host: HostId, at_least: Duration) {
        let Some(dial) = self.dials.get_mut(&host) else { return };
        let pause = BACKOFF_FIRST.saturating_mul(1 << dial.failures.min(5)).min(BACKOFF_LAST);
        dial.failures = dial.failures.saturating_add(1);
        dial.stage = Stage::Idle;
        dial.next = Instant::now() + pause.max(at_least);
    }
}
