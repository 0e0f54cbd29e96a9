//! TLS 1.3 under the node's identity, for connections outside libp2p.
//!
//! Owns the configurations and the step from a peer's TLS certificate to its host id. Never decides
//! whether the host is a member.

use std::sync::Arc;

use libp2p::PeerId;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme, SupportedCipherSuite};

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
///
/// The same as libp2p's but for one thing: it takes AES-GCM where the dialler offers it. libp2p
/// prefers ChaCha20, which costs five times as much on processors with AES instructions: a fifth of
/// all that a move over a fast link costs.
pub(super) fn server(me: &Identity, alpn: &[u8]) -> Result<rustls::ServerConfig, NetError> {
    let failed = |e: &dyn std::fmt::Display| NetError::Transport(e.to_string());
    let (certificate, key) =
        libp2p_tls::certificate::generate(&me.keypair()).map_err(|e| failed(&e))?;
    let key = aws_lc_rs::sign::any_supported_type(&key).map_err(|e| failed(&e))?;
    let certified = CertifiedKey::new(vec![certificate], key);
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = SUITES.to_vec();
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| failed(&e))?
        .with_client_cert_verifier(Arc::new(AnyKey))
        // Not `with_single_cert`: that refuses libp2p's extension, which is critical.
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.ignore_client_order = true;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// What is taken, best first.
const SUITES: [SupportedCipherSuite; 3] = [
    aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
    aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// Takes every dialler that proves the key in its one certificate, as libp2p's verifier does.
#[derive(Debug)]
struct AnyKey;

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if !more.is_empty() {
            return Err(rustls::Error::General("more than one certificate".into()));
        }
        libp2p_tls::certificate::parse(certificate)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 is needed".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let certificate = libp2p_tls::certificate::parse(certificate)?;
        certificate.verify_signature(signed.scheme, message, signed.signature())?;
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        // What members' certificates are made with comes first.
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
        ]
    }
}

/// The host that proved its key in the handshake.
pub(super) fn host_behind(certificates: Option<&[CertificateDer<'static>]>) -> Option<HostId> {
    let [only] = certificates? else { return None };
    host_of(&libp2p_tls::certificate::parse(only).ok()?.peer_id())
}
