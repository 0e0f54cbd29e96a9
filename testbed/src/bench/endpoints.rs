//! The two ends of each transport that `bench transport` compares.
//!
//! Owns their settings: each as good as its library lets it be. Never counts; `transport` does.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{AsyncReadExt as _, AsyncWriteExt as _, StreamExt};
use godwit::net::identity::Identity;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{SwarmEvent, dial_opts::DialOpts};
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm};
use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::ServerName;
use socket2::{SockRef, Socket};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::transport::count;

/// Window of QUIC streams and connections: more than any link here holds.
const WINDOW: u32 = 32 << 20;
const PROTOCOL: StreamProtocol = StreamProtocol::new("/godwit/bench/1");

/// A transport under comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// libp2p-stream over libp2p's QUIC, 32 MiB windows. Its congestion control is cubic.
    Libp2pQuic,
    /// libp2p-stream over TCP + TLS + yamux, the kernel's bbr.
    Libp2pTcp,
    /// A QUIC endpoint of our own with quinn's bbr.
    QuinnBbr,
    /// A QUIC endpoint of our own with cubic.
    QuinnCubic,
    /// TLS 1.3 over TCP, the kernel's bbr.
    TlsBbr,
    /// The same, held back as the node's bulk connections are.
    TlsPaced,
    /// TLS 1.3 over TCP, the kernel's cubic.
    TlsCubic,
}

impl Transport {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Libp2pQuic,
        Self::Libp2pTcp,
        Self::QuinnBbr,
        Self::QuinnCubic,
        Self::TlsBbr,
        Self::TlsPaced,
        Self::TlsCubic,
    ];

    /// Its name in the figures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Libp2pQuic => "libp2p-stream, QUIC (cubic)",
            Self::Libp2pTcp => "libp2p-stream, TCP + TLS + yamux (kernel bbr)",
            Self::QuinnBbr => "own QUIC endpoint (quinn's bbr)",
            Self::QuinnCubic => "own QUIC endpoint (cubic)",
            Self::TlsBbr => "TLS 1.3 over TCP (kernel bbr)",
            Self::TlsPaced => "TLS 1.3 over TCP (kernel bbr, paced)",
            Self::TlsCubic => "TLS 1.3 over TCP (kernel cubic)",
        }
    }
}

/// Accepts one stream at `address`, tells the sender its peer id, and counts what arrives.
pub(super) async fn receive(
    transport: Transport,
    address: SocketAddr,
    ready: SyncSender<PeerId>,
) -> Result<(u64, Duration)> {
    let me = Identity::generate().keypair();
    let peer = me.public().to_peer_id();
    let tls = libp2p_tls::make_server_config(&me)?;
    match transport {
        Transport::Libp2pQuic | Transport::Libp2pTcp => {
            let mut swarm = swarm(&me)?;
            swarm.listen_on(multiaddr(transport, address))?;
            let mut control = swarm.behaviour().new_control();
            let mut streams = control.accept(PROTOCOL).ok().context("registered twice")?;
            loop {
                tokio::select! {
                    event = swarm.select_next_some() => {
                        if matches!(event, SwarmEvent::NewListenAddr { .. }) {
                            ready.send(peer)?;
                        }
                    }
                    Some((_, stream)) = streams.next() => {
                        let drive = async { loop { swarm.select_next_some().await; } };
                        tokio::select! {
                            counted = count_futures(stream) => return counted,
                            () = drive => {}
                        }
                    }
                }
            }
        }
        Transport::QuinnBbr | Transport::QuinnCubic => {
            let crypto = Arc::new(QuicServerConfig::try_from(tls)?);
            let mut config = quinn::ServerConfig::with_crypto(crypto);
            config.transport_config(quic(transport));
            let endpoint = quinn::Endpoint::server(config, address)?;
            ready.send(peer)?;
            let connection = endpoint.accept().await.context("closed")?.await?;
            let (_send, stream) = connection.accept_bi().await?;
            count(stream).await
        }
        Transport::TlsBbr | Transport::TlsPaced | Transport::TlsCubic => {
            let listener = TcpListener::bind(address).await?;
            ready.send(peer)?;
            let (tcp, _) = listener.accept().await?;
            let stream = TlsAcceptor::from(Arc::new(tls)).accept(tcp).await?;
            count(stream).await
        }
    }
}

/// Connects to the receiver and writes until it has had enough.
pub(super) async fn send(transport: Transport, address: SocketAddr, peer: PeerId) -> Result<()> {
    let me = Identity::generate().keypair();
    let tls = libp2p_tls::make_client_config(&me, Some(peer))?;
    match transport {
        Transport::Libp2pQuic | Transport::Libp2pTcp => {
            let mut swarm = swarm(&me)?;
            let addresses = vec![multiaddr(transport, address)];
            swarm.dial(DialOpts::peer_id(peer).addresses(addresses).build())?;
            while !swarm.is_connected(&peer) {
                if let SwarmEvent::OutgoingConnectionError { error, .. } =
                    swarm.select_next_some().await
                {
                    bail!("{error}");
                }
            }
            let mut control = swarm.behaviour().new_control();
            let talk = async {
                let mut stream = control.open_stream(peer, PROTOCOL).await?;
                let block = block();
                loop {
                    stream.write_all(&block).await?;
                }
            };
            let drive = async {
                loop {
                    swarm.select_next_some().await;
                }
            };
            tokio::select! {
                ended = talk => ended,
                () = drive => Ok(()),
            }
        }
        Transport::QuinnBbr | Transport::QuinnCubic => {
            let crypto = Arc::new(QuicClientConfig::try_from(tls)?);
            let mut config = quinn::ClientConfig::new(crypto);
            config.transport_config(quic(transport));
            let endpoint = quinn::Endpoint::client(SocketAddr::from(([0, 0, 0, 0], 0)))?;
            let connection = endpoint.connect_with(config, address, "bench")?.await?;
            let (stream, _receive) = connection.open_bi().await?;
            pour(stream).await
        }
        Transport::TlsBbr | Transport::TlsPaced | Transport::TlsCubic => {
            let tcp = TcpStream::connect(address).await?;
            let name: &[u8] = if transport == Transport::TlsCubic { b"cubic" } else { b"bbr" };
            SockRef::from(&tcp).set_tcp_congestion(name)?;
            SockRef::from(&tcp).set_tcp_nodelay(true)?;
            // Until the stream has ended.
            let socket = Arc::new(Socket::from(tcp.as_fd().try_clone_to_owned()?));
            if transport == Transport::TlsPaced {
                tokio::spawn(godwit::net::pace::govern(Arc::downgrade(&socket)));
            }
            let name = ServerName::IpAddress(address.ip().into());
            pour(TlsConnector::from(Arc::new(tls)).connect(name, tcp).await?).await
        }
    }
}

async fn pour(mut stream: impl AsyncWrite + Unpin) -> Result<()> {
    let block = block();
    loop {
        stream.write_all(&block).await?;
    }
}

/// Payload: no transport here compresses, so its content does not matter.
fn block() -> Vec<u8> {
    (0..256_u32 << 10).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

async fn count_futures(stream: libp2p::Stream) -> Result<(u64, Duration)> {
    // The counter reads tokio's kind of stream: a pipe in memory joins the two.
    let (mut near, far) = tokio::io::duplex(1 << 20);
    let (mut read, _write) = stream.split();
    let pump = async {
        let mut block = vec![0; 256 << 10];
        loop {
            let len = read.read(&mut block).await?;
            if len == 0 {
                return Ok::<(), std::io::Error>(());
            }
            near.write_all(&block[..len]).await?;
        }
    };
    tokio::select! {
        counted = count(far) => counted,
        ended = pump => bail!("the stream ended early: {ended:?}"),
    }
}

fn swarm(me: &libp2p::identity::Keypair) -> Result<Swarm<libp2p_stream::Behaviour>> {
    Ok(libp2p::SwarmBuilder::with_existing_identity(me.clone())
        .with_tokio()
        .with_tcp(
            libp2p::tcp::Config::default().nodelay(true),
            libp2p::tls::Config::new,
            libp2p::yamux::Config::default,
        )?
        .with_quic_config(|mut config| {
            config.max_stream_data = WINDOW;
            config.max_connection_data = WINDOW;
            config
        })
        .with_behaviour(|_| libp2p_stream::Behaviour::new())?
        .with_swarm_config(|c| c.with_idle_connection_timeout(Duration::from_secs(20)))
        .build())
}

fn multiaddr(transport: Transport, address: SocketAddr) -> Multiaddr {
    let base = match address.ip() {
        IpAddr::V4(ip) => Multiaddr::empty().with(Protocol::Ip4(ip)),
        IpAddr::V6(ip) => Multiaddr::empty().with(Protocol::Ip6(ip)),
    };
    if transport == Transport::Libp2pQuic {
        base.with(Protocol::Udp(address.port())).with(Protocol::QuicV1)
    } else {
        base.with(Protocol::Tcp(address.port()))
    }
}

fn quic(transport: Transport) -> Arc<quinn::TransportConfig> {
    let mut config = quinn::TransportConfig::default();
    config
        .stream_receive_window(WINDOW.into())
        .receive_window(WINDOW.into())
        .send_window(u64::from(WINDOW));
    if transport == Transport::QuinnBbr {
        config.congestion_controller_factory(Arc::new(BbrConfig::default()));
    } else {
        config.congestion_controller_factory(Arc::new(CubicConfig::default()));
    }
    Arc::new(config)
}
