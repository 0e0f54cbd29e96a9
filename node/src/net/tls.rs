//! TLS 1.3 under the node's identity, for connections outside libp2p.
//!
//! Owns the configurations and the step from a peer's TLS certificate to its host id. Never decides
//! whether the host is a member.

use libp2p::PeerId;
use rustls::pki_types::CertificateDer;

use godwit_protocol::id::HostId;

use super::NetError;
use super::identity::{Identity, host_of};

/// For a connection to the host `peer` and no other.
pub(super) fn client(
    me: &Identity,
    peer: PeerId,
    alpn: &[u8],
) -> Result<rustls::ClientConfig, NetError> {
    let mut config = libp2p_tls::make_client_config(&me.keypair(), Some(peer))
        .map_err(|e| NetError::Transport(e.to_string()))?;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// For connections from anyone who shows a key; who it is has to be checked afterwards.
pub(super) fn server(me: &Identity, alpn: &[u8]) -> Result<rustls::ServerConfig, NetError> {
    let mut config = libp2p_tls::make_server_config(&me.keypair())
        .map_err(|e| NetError::Transport(e.to_string()))?;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// The host that proved its key in the handshake.
pub(super) fn host_behind(certificates: Option<&[CertificateDer<'static>]>) -> Option<HostId> {
    let [only] = certificates? else { return None };
    host_of(&libp2p_tls::certificate::parse(only).ok()?.peer_id())
}
