//! The QUIC endpoint for frames: settings that fit datagrams.
//!
//! Owns the transport's settings. No congestion control: like VXLAN, the tunnel does not brake,
//! because the guests' own TCP already reacts to loss, and two brakes in a row only add delay; a
//! fixed window bounds what is in flight.

use std::any::Any;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use quinn::congestion::{Controller, ControllerFactory};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{Connection, Endpoint, EndpointConfig, IdleTimeout, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};

use godwit_protocol::id::HostId;

use super::super::identity::Identity;
use super::super::{NetError, tls};

const ALPN: &[u8] = b"godwit-frames/1";
/// Bytes in flight: 100 ms of 640 Mbit/s.
const WINDOW: u64 = 8 << 20;
/// Datagrams that wait to leave; the oldest are dropped for newer ones.
const SEND_BUFFER: usize = 1 << 20;
const RECEIVE_BUFFER: usize = 4 << 20;
/// The kernel's buffers of the socket.
const SOCKET_BUFFER: usize = 4 << 20;
/// Longer than a cut of 5 s.
const IDLE_MS: u32 = 20_000;
const KEEP_ALIVE: Duration = Duration::from_secs(1);

pub(super) fn endpoint(me: &Identity, listen: SocketAddr) -> Result<Endpoint, NetError> {
    let failed = |e: std::io::Error| NetError::Listen { address: listen, cause: e.to_string() };
    let transport = |e: &dyn std::fmt::Display| NetError::Transport(e.to_string());
    let crypto = QuicServerConfig::try_from(tls::server(me, ALPN)?).map_err(|e| transport(&e))?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(settings());
    // A peer keeps its address; nothing of ours roams.
    server.migration(false);
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))
        .map_err(failed)?;
    // Best effort: an unprivileged process gets what the kernel allows.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.set_nonblocking(true).map_err(failed)?;
    socket.bind(&listen.into()).map_err(failed)?;
    let endpoint = EndpointConfig::new(Arc::new(ResetKey::of(me)));
    let runtime = Arc::new(quinn::TokioRuntime);
    Endpoint::new(endpoint, Some(server), socket.into(), runtime).map_err(failed)
}

pub(super) fn client(me: &Identity, peer: PeerId) -> Result<quinn::ClientConfig, NetError> {
    let crypto = QuicClientConfig::try_from(tls::client(me, peer, ALPN)?)
        .map_err(|e| NetError::Transport(e.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(settings());
    Ok(config)
}

/// The host at the other end of a connection whose handshake is done.
pub(super) fn host(connection: &Connection) -> Option<HostId> {
    let identity = connection.peer_identity()?;
    let certificates = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    tls::host_behind(Some(&certificates))
}

fn settings() -> Arc<TransportConfig> {
    let mut settings = TransportConfig::default();
    settings
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_MS))))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .datagram_receive_buffer_size(Some(RECEIVE_BUFFER))
        .datagram_send_buffer_size(SEND_BUFFER)
        .mtu_discovery_config(Some(quinn::MtuDiscoveryConfig::default()))
        .congestion_controller_factory(Arc::new(Fixed));
    Arc::new(settings)
}

/// A window that never changes.
#[derive(Debug, Clone, Copy)]
struct Fixed;

impl ControllerFactory for Fixed {
    fn build(self: Arc<Self>, _now: Instant, _mtu: u16) -> Box<dyn Controller> {
        Box::new(*self)
    }
}

impl Controller for Fixed {
    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, _long: bool, _lost: u64) {}

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        WINDOW
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(*self)
    }

    fn initial_window(&self) -> u64 {
        WINDOW
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The key of stateless resets, the same after a restart: so a peer learns at once that this node
/// has forgotten a connection, and dials again instead of waiting for it to time out.
struct ResetKey([u8; 32]);

impl ResetKey {
    fn of(me: &Identity) -> Self {
        let secret = me.sign(b"godwit frames reset key 1\0", b"");
        Self(*blake3::hash(&secret).as_bytes())
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], out: &mut [u8]) {
        out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // `blake3::Hash` compares in constant time.
        let expected = blake3::keyed_hash(&self.0, data);
        let given: [u8; 32] = signature.try_into().map_err(|_| CryptoError)?;
        if expected == given { Ok(()) } else { Err(CryptoError) }
    }
}
