//! Bulk connections: TLS 1.3 over TCP, under the node's identity, for chunks and device state.
//!
//! Owns the sockets' settings and who may connect. Never looks at the bytes. Invariant: a bulk
//! connection exists only between members; it is cut as soon as either is revoked.
//!
//! TCP because the kernel's bbr holds a lossy long path where QUIC's cubic does not
//! (`docs/transport.md`); it is chosen per socket, so the host's default does not matter.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::ServerName;
use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use godwit_protocol::id::HostId;
use godwit_protocol::limits::{CLUSTER_VMS, NICS};

use super::identity::peer_of;
use super::shared::Shared;
use super::{NetError, pace, tls};

const ALPN: &[u8] = b"godwit-bulk/1";
/// The acceptor's word that the dialler was recognised as a member.
const ADMITTED: u8 = 1;
/// Handshake and admission.
const CONNECT: Duration = Duration::from_secs(8);
/// Most handshakes of others under way at once.
const HANDSHAKES: usize = 32;
/// Most inbound connections that wait for the driver.
const INBOUND: usize = 16;
/// Most bulk connections with one host: those of the largest cluster, one for each VM and one for each of its NICs.
const PER_HOST: usize = CLUSTER_VMS * (1 + NICS);
/// Unacknowledged data kills the connection after this long: longer than a cut of 5 s with the
/// kernel's retransmissions backing off over it.
const USER_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes that wait unsent in the kernel: enough to keep a path busy, little enough that a change of
/// mind (stop phase) takes effect soon.
const UNSENT_BYTES: u32 = 256 << 10;

/// Why there is no bulk connection.
#[derive(Debug, thiserror::Error)]
pub enum BulkError {
    /// Not a member, or not any more.
    #[error("{0} is no member of the swarm")]
    NotMember(HostId),
    /// The member has not said where it is.
    #[error("no bulk address of {0} is known; has its daemon run?")]
    NoAddress(HostId),
    /// None of its addresses answered as that host.
    #[error("no bulk connection to {host} at {address}: {cause}")]
    Unreachable {
        /// The host.
        host: HostId,
        /// The last address tried.
        address: SocketAddr,
        /// What happened there.
        cause: io::Error,
    },
    /// The connection could not be set up locally.
    #[error(transparent)]
    Local(#[from] NetError),
}

/// Opens bulk connections to members. Cheap to clone.
#[derive(Clone)]
pub struct Bulk {
    shared: Arc<Shared>,
    open: Arc<Open>,
}

impl std::fmt::Debug for Bulk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bulk")
    }
}

/// A second handle on each connection's socket, so that it can be cut from outside.
#[derive(Default)]
struct Open(Mutex<HashMap<HostId, Vec<Weak<Socket>>>>);

impl Open {
    fn add(&self, host: HostId, socket: &Arc<Socket>) -> bool {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_host = open.entry(host).or_default();
        of_host.retain(|one| one.strong_count() > 0);
        let room = of_host.len() < PER_HOST;
        if room {
            of_host.push(Arc::downgrade(socket));
        }
        room
    }

    fn cut(&self, admitted: impl Fn(HostId) -> bool) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|host, sockets| {
            if admitted(*host) {
                sockets.retain(|one| one.strong_count() > 0);
                return !sockets.is_empty();
            }
            for socket in sockets.iter().filter_map(Weak::upgrade) {
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
            false
        });
    }
}

/// A bulk connection with a member: bytes both ways, encrypted, in order.
#[derive(Debug)]
pub struct BulkStream {
    host: HostId,
    stream: TlsStream<TcpStream>,
    cutter: Arc<Socket>,
}

impl BulkStream {
    /// The member at the other end: proven by the handshake.
    #[must_use]
    pub fn peer(&self) -> HostId {
        self.host
    }

    /// The other end's address.
    ///
    /// # Errors
    /// The system's, if the connection is gone.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        self.stream.get_ref().0.peer_addr()
    }

    /// The congestion control of the socket, as the kernel names it.
    #[must_use]
    pub fn congestion(&self) -> String {
        let name = self.cutter.tcp_congestion().unwrap_or_default();
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        String::from_utf8_lossy(&name[..end]).into_owned()
    }
}

impl AsyncRead for BulkStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for BulkStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

type Inbound = mpsc::Receiver<(HostId, BulkStream)>;

/// Listens for bulk connections.
pub(super) fn start(
    shared: Arc<Shared>,
    listen: SocketAddr,
) -> Result<(Bulk, Inbound, JoinHandle<()>), NetError> {
    let failed = |e: io::Error| NetError::Listen { address: listen, cause: e.to_string() };
    let socket = if listen.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.map_err(failed)?;
    socket.set_reuseaddr(true).map_err(failed)?;
    socket.bind(listen).map_err(failed)?;
    let listener = socket.listen(128).map_err(failed)?;
    let acceptor = TlsAcceptor::from(Arc::new(tls::server(&shared.me, ALPN)?));
    let (deliver, inbound) = mpsc::channel(INBOUND);
    let bulk = Bulk { shared, open: Arc::default() };
    let task = tokio::spawn(accept(bulk.clone(), listener, acceptor, deliver));
    Ok((bulk, inbound, task))
}

async fn accept(
    bulk: Bulk,
    listener: TcpListener,
    acceptor: TlsAcceptor,
    deliver: mpsc::Sender<(HostId, BulkStream)>,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    let mut changed = bulk.shared.changed.subscribe();
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let tcp = match accepted {
                    Ok((tcp, _)) => tcp,
                    Err(cause) => {
                        tracing::warn!(%cause, "a bulk connection could not be accepted");
                        // Out of descriptors, most likely: do not spin on it.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                };
                let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
                let (bulk, acceptor, deliver) = (bulk.clone(), acceptor.clone(), deliver.clone());
                tasks.spawn(async move {
                    match timeout(CONNECT, bulk.welcome(acceptor, tcp)).await {
                        Ok(Ok(stream)) => {
                            drop(slot);
                            let _ = timeout(CONNECT, deliver.send((stream.host, stream))).await;
                        }
                        Ok(Err(cause)) => tracing::debug!(%cause, "a bulk connection was closed"),
                        Err(_) => tracing::debug!("a bulk handshake took too long"),
                    }
                });
            }
            Some(_) = tasks.join_next() => {}
            Ok(()) = changed.changed() => bulk.open.cut(|host| bulk.shared.admitted(host)),
        }
    }
}

impl Bulk {
    /// Connects to a member, trying its addresses in turn, within 8 s each.
    ///
    /// # Errors
    /// [`BulkError`].
    pub async fn connect(&self, host: HostId) -> Result<BulkStream, BulkError> {
        let member = self.shared.member(host).filter(|m| !m.revoked);
        let addresses = member.ok_or(BulkError::NotMember(host))?.bulk;
        let mut last = BulkError::NoAddress(host);
        for address in addresses {
            match self.connect_to(host, address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Connects to a member at one address.
    ///
    /// # Errors
    /// [`BulkError`].
    pub async fn connect_to(
        &self,
        host: HostId,
        address: SocketAddr,
    ) -> Result<BulkStream, BulkError> {
        if !self.shared.admitted(host) {
            return Err(BulkError::NotMember(host));
        }
        let peer = peer_of(host).ok_or(BulkError::NotMember(host))?;
        let config = tls::client(&self.shared.me, peer, ALPN)?;
        let tried = timeout(CONNECT, async {
            let tcp = TcpStream::connect(address).await?;
            let cutter = prepare(&tcp)?;
            let name = ServerName::IpAddress(address.ip().into());
            let mut stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
            let mut word = [0];
            stream.read_exact(&mut word).await?;
            if word[0] != ADMITTED {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            Ok(BulkStream { host, stream: stream.into(), cutter })
        });
        let tried = tried.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = tried.map_err(|cause| BulkError::Unreachable { host, address, cause })?;
        self.enter(stream).map_err(|cause| BulkError::Unreachable { host, address, cause })
    }

    async fn welcome(&self, acceptor: TlsAcceptor, tcp: TcpStream) -> io::Result<BulkStream> {
        let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
        let cutter = prepare(&tcp)?;
        let mut stream = acceptor.accept(tcp).await?;
        let host = tls::host_behind(stream.get_ref().1.peer_certificates())
            .filter(|host| self.shared.admitted(*host))
            .ok_or_else(refused)?;
        stream.write_all(&[ADMITTED]).await?;
        stream.flush().await?;
        self.enter(BulkStream { host, stream: stream.into(), cutter })
    }

    fn enter(&self, stream: BulkStream) -> io::Result<BulkStream> {
        if !self.open.add(stream.host, &stream.cutter) {
            return Err(io::Error::other("too many bulk connections with this host"));
        }
        // Revoked between the check and the registration: nobody else would cut it.
        if !self.shared.admitted(stream.host) {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        tokio::spawn(pace::govern(Arc::downgrade(&stream.cutter)));
        Ok(stream)
    }
}

/// Sets what a bulk socket needs; what the kernel does not have is left at its default.
fn prepare(tcp: &TcpStream) -> io::Result<Arc<Socket>> {
    let socket = SockRef::from(tcp);
    socket.set_tcp_nodelay(true)?;
    let alive = TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(3))
        .with_retries(5);
    socket.set_tcp_keepalive(&alive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.set_tcp_notsent_lowat(UNSENT_BYTES)?;
    if let Err(cause) = socket.set_tcp_congestion(b"bbr") {
        tracing::debug!(%cause, "bbr is not available; the host's default congestion control is used");
    }
    Ok(Arc::new(Socket::from(tcp.as_fd().try_clone_to_owned()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_cluster_gets_its_connections_and_nobody_gets_any_number() {
        let socket = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = Arc::new(socket.unwrap());
        let (open, host) = (Open::default(), HostId([1; 32]));
        assert!((0..CLUSTER_VMS * (1 + NICS)).all(|_| open.add(host, &socket)));
        assert!(!open.add(host, &socket) && open.add(HostId([2; 32]), &socket));
        drop(socket);
        let other = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        assert!(open.add(host, &Arc::new(other.unwrap())));
    }
}
