//! Who a node is: an Ed25519 key. Owns the mapping between `HostId` and libp2p's `PeerId`.
//!
//! Never decides who may do what; that is `admission`'s.

use libp2p::PeerId;
use libp2p::identity::{Keypair, PublicKey, ed25519};

use godwit_protocol::id::{HostId, SwarmId};

use super::keys::{self, StateDir, StateError};

/// A key pair that signs: a node's or an authority's.
#[derive(Clone)]
pub struct Identity {
    pair: ed25519::Keypair,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.host())
    }
}

impl Identity {
    /// A new random key.
    #[must_use]
    pub fn generate() -> Self {
        Self { pair: ed25519::Keypair::generate() }
    }

    /// The public key.
    #[must_use]
    pub fn host(&self) -> HostId {
        HostId(self.pair.public().to_bytes())
    }

    /// libp2p's form of the same key.
    #[must_use]
    pub fn keypair(&self) -> Keypair {
        Keypair::from(self.pair.clone())
    }

    /// Signs `domain` followed by `body`. Domains end in a zero byte, so no two overlap.
    #[must_use]
    pub fn sign(&self, domain: &[u8], body: &[u8]) -> Vec<u8> {
        self.pair.sign(&[domain, body].concat())
    }

    /// Reads a key file; `None` if there is none.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn load(state: &StateDir, name: &str) -> Result<Option<Self>, StateError> {
        let Some(text) = state.read(name, 256)? else { return Ok(None) };
        let damaged = |cause: &str| StateError::Damaged {
            path: state.file(name).display().to_string(),
            cause: cause.to_owned(),
        };
        let text = std::str::from_utf8(&text).map_err(|_| damaged("not text"))?;
        let mut bytes =
            from_hex(text.trim()).ok_or_else(|| damaged("not 128 hexadecimal digits"))?;
        let pair = ed25519::Keypair::try_from_bytes(&mut bytes)
            .map_err(|_| damaged("not an Ed25519 key pair"))?;
        Ok(Some(Self { pair }))
    }

    /// Writes the key file (0600).
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn save(&self, state: &StateDir, name: &str) -> Result<(), StateError> {
        state.write(name, format!("{}\n", to_hex(&self.pair.to_bytes())).as_bytes())
    }

    /// Reads the node's key or makes it.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn load_or_make(state: &StateDir) -> Result<Self, StateError> {
        if let Some(found) = Self::load(state, keys::NODE_KEY)? {
            return Ok(found);
        }
        let made = Self::generate();
        made.save(state, keys::NODE_KEY)?;
        Ok(made)
    }
}

/// Whether `signature` over `domain` and `body` was made by the key `signer`.
#[must_use]
pub fn verify(signer: &[u8; 32], domain: &[u8], body: &[u8], signature: &[u8]) -> bool {
    ed25519::PublicKey::try_from_bytes(signer)
        .is_ok_and(|key| key.verify(&[domain, body].concat(), signature))
}

/// The swarm that an authority's public key stands for.
#[must_use]
pub fn swarm_of(authority: &[u8; 32]) -> SwarmId {
    let mut id = [0_u8; 16];
    id.copy_from_slice(&blake3::hash(authority).as_bytes()[..16]);
    SwarmId(id)
}

/// libp2p's name of a host; `None` if the bytes are no Ed25519 public key.
#[must_use]
pub fn peer_of(host: HostId) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(&host.0).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

/// The host behind libp2p's name; `None` if its key is not Ed25519.
#[must_use]
pub fn host_of(peer: &PeerId) -> Option<HostId> {
    let bytes = peer.to_bytes();
    // An identity multihash: code 0, length, then the public key itself (Ed25519 keys are short).
    let key = bytes.strip_prefix(&[0_u8])?.get(1..)?;
    let key = PublicKey::try_decode_protobuf(key).ok()?.try_into_ed25519().ok()?;
    Some(HostId(key.to_bytes()))
}

/// Lower-case hexadecimal digits.
pub(super) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes of hexadecimal digits; `None` if there is anything else in `text`.
pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_and_its_peer_name_each_other() {
        let me = Identity::generate();
        let peer = peer_of(me.host()).unwrap();
        assert_eq!(peer, me.keypair().public().to_peer_id());
        assert_eq!(host_of(&peer), Some(me.host()));
        assert_eq!(host_of(&PeerId::random()), None);
    }

    #[test]
    fn a_signature_is_bound_to_its_domain() {
        let me = Identity::generate();
        let signature = me.sign(b"a\0", b"body");
        assert!(verify(&me.host().0, b"a\0", b"body", &signature));
        assert!(!verify(&me.host().0, b"b\0", b"body", &signature));
        assert!(!verify(&Identity::generate().host().0, b"a\0", b"body", &signature));
    }
}
