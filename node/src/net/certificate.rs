//! Certificates, contacts and revocations: signed statements and who may make them.
//!
//! Owns their forms and the one way to check each. Never stores them. Invariant: a value of type
//! [`Certificate`], [`Contact`] or [`Revocation`] that came from `check` was signed by someone
//! entitled to sign it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use godwit_protocol::id::{HostId, Name, SwarmId};
use godwit_protocol::wire::codec;

use super::identity::{Identity, verify};

/// Version of the certificate's form.
pub const CERTIFICATE_VERSION: u16 = 1;
/// Longest signed body, bytes.
pub const BODY_BYTES: usize = 1024;
/// Most addresses that a host advertises.
pub const ADDRESSES: usize = 8;

const CERTIFICATE_DOMAIN: &[u8] = b"godwit certificate 1\0";
const CONTACT_DOMAIN: &[u8] = b"godwit contact 1\0";
const REVOCATION_DOMAIN: &[u8] = b"godwit revocation 1\0";

/// A body and the signature over it. Says nothing until it is checked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Signed {
    /// The encoded statement.
    pub body: Vec<u8>,
    /// 64 bytes of Ed25519.
    pub signature: Vec<u8>,
}

/// What makes a host a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// [`CERTIFICATE_VERSION`].
    pub version: u16,
    /// The swarm.
    pub swarm: SwarmId,
    /// The member's public key.
    pub host: HostId,
    /// A short name for people; unique when it was issued.
    pub name: Name,
    /// Where the host stands.
    pub site: Name,
    /// May admit others (but cannot pass this right on).
    pub admit: bool,
    /// Seconds since 1970 by the issuer's clock.
    pub issued_at: u64,
}

/// A certificate as it travels: signed by the authority, or by a host whose own certificate (signed
/// by the authority, with the right to admit) comes along. The chain is never longer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SignedCertificate {
    /// The member's certificate.
    pub own: Signed,
    /// The admitting host's certificate, if the authority did not sign itself.
    pub admitter: Option<Signed>,
}

/// Where a member can be reached; signed by the member, so it changes without a new certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contact {
    /// The member.
    pub host: HostId,
    /// Milliseconds since 1970 by the member's clock; the higher one replaces the lower.
    pub sequence: u64,
    /// Control: QUIC (UDP) and TCP on the same port. At most [`ADDRESSES`].
    pub addresses: Vec<SocketAddr>,
    /// TCP port of bulk connections on the same addresses.
    pub bulk_port: u16,
    /// UDP port of frames on the same addresses.
    pub frames_port: u16,
}

/// A host is out, for ever: by the authority's word, or by its own (it left).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// The swarm.
    pub swarm: SwarmId,
    /// Who is out.
    pub host: HostId,
    /// Seconds since 1970 by the signer's clock.
    pub at: u64,
    /// Said by the host itself.
    pub left: bool,
}

/// Why a statement does not count. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not the form of this version.
    #[error("malformed: {0}")]
    Malformed(String),
    /// Another version of the form.
    #[error("certificate version {0}, this program reads {CERTIFICATE_VERSION}")]
    Version(u16),
    /// A member of some other swarm.
    #[error("of swarm {0}, not of ours")]
    OtherSwarm(SwarmId),
    /// Nobody entitled signed it.
    #[error("not signed by this swarm's authority or by a member that may admit")]
    Signature,
    /// The certificate of one host, shown by another.
    #[error("shown by a host that it does not belong to")]
    OtherHost,
    /// The host is revoked, or the host that admitted it is.
    #[error("revoked")]
    Revoked,
    /// The swarm has more members than a node keeps track of.
    #[error("more than {0} members")]
    TooMany(usize),
}

impl Signed {
    /// Signs a certificate with the authority's or an admitting host's key.
    ///
    /// # Errors
    /// [`CertificateError::Malformed`] if the body does not fit.
    pub fn certificate(signer: &Identity, body: &Certificate) -> Result<Self, CertificateError> {
        Self::make(signer, CERTIFICATE_DOMAIN, body)
    }

    /// Signs a contact with the member's own key.
    ///
    /// # Errors
    /// [`CertificateError::Malformed`] if the body does not fit.
    pub fn contact(signer: &Identity, body: &Contact) -> Result<Self, CertificateError> {
        Self::make(signer, CONTACT_DOMAIN, body)
    }

    /// Signs a revocation with the authority's key, or with the leaving host's own.
    ///
    /// # Errors
    /// [`CertificateError::Malformed`] if the body does not fit.
    pub fn revocation(signer: &Identity, body: &Revocation) -> Result<Self, CertificateError> {
        Self::make(signer, REVOCATION_DOMAIN, body)
    }

    fn make<T: Serialize>(
        signer: &Identity,
        domain: &[u8],
        body: &T,
    ) -> Result<Self, CertificateError> {
        let body = codec::encode(body, BODY_BYTES).map_err(malformed)?;
        let signature = signer.sign(domain, &body);
        Ok(Self { body, signature })
    }

    /// Checks that this is a contact, signed by the host that it speaks of.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn check_contact(&self) -> Result<Contact, CertificateError> {
        let contact: Contact = codec::decode::<_, BODY_BYTES>(&self.body).map_err(malformed)?;
        if contact.addresses.len() > ADDRESSES {
            return Err(CertificateError::Malformed(format!("more than {ADDRESSES} addresses")));
        }
        if !verify(&contact.host.0, CONTACT_DOMAIN, &self.body, &self.signature) {
            return Err(CertificateError::Signature);
        }
        Ok(contact)
    }

    /// Checks that this is a revocation in the swarm of `authority`, signed by it or, if the host
    /// left, by the host.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn check_revocation(
        &self,
        swarm: SwarmId,
        authority: &[u8; 32],
    ) -> Result<Revocation, CertificateError> {
        let said: Revocation = codec::decode::<_, BODY_BYTES>(&self.body).map_err(malformed)?;
        if said.swarm != swarm {
            return Err(CertificateError::OtherSwarm(said.swarm));
        }
        let signer = if said.left { &said.host.0 } else { authority };
        if !verify(signer, REVOCATION_DOMAIN, &self.body, &self.signature) {
            return Err(CertificateError::Signature);
        }
        Ok(said)
    }

    fn check_certificate(
        &self,
        swarm: SwarmId,
        signer: &[u8; 32],
    ) -> Result<Certificate, CertificateError> {
        let said: Certificate = codec::decode::<_, BODY_BYTES>(&self.body).map_err(malformed)?;
        if said.version != CERTIFICATE_VERSION {
            return Err(CertificateError::Version(said.version));
        }
        if said.swarm != swarm {
            return Err(CertificateError::OtherSwarm(said.swarm));
        }
        if !verify(signer, CERTIFICATE_DOMAIN, &self.body, &self.signature) {
            return Err(CertificateError::Signature);
        }
        Ok(said)
    }
}

impl SignedCertificate {
    /// Checks the chain up to `authority`; the second value is the host that admitted the member, if
    /// the authority did not sign itself. Revocations are the roster's to look up.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn check(
        &self,
        swarm: SwarmId,
        authority: &[u8; 32],
    ) -> Result<(Certificate, Option<HostId>), CertificateError> {
        let Some(admitter) = &self.admitter else {
            return Ok((self.own.check_certificate(swarm, authority)?, None));
        };
        let by = admitter.check_certificate(swarm, authority)?;
        let own = self.own.check_certificate(swarm, &by.host.0)?;
        // The right to admit comes from the authority alone.
        if !by.admit || own.admit {
            return Err(CertificateError::Signature);
        }
        Ok((own, Some(by.host)))
    }
}

fn malformed(error: codec::CodecError) -> CertificateError {
    CertificateError::Malformed(error.to_string())
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::identity::swarm_of;
    use super::*;

    pub(crate) fn certificate(swarm: SwarmId, host: HostId, admit: bool) -> Certificate {
        let name: Name = "a".parse().unwrap();
        let (version, issued_at) = (CERTIFICATE_VERSION, 1);
        Certificate { version, swarm, host, name: name.clone(), site: name, admit, issued_at }
    }

    #[test]
    fn the_chain_has_one_link_and_the_right_to_admit() {
        let (root, admitter, host) =
            (Identity::generate(), Identity::generate(), Identity::generate());
        let (swarm, key) = (swarm_of(&root.host().0), root.host().0);
        for may_admit in [true, false] {
            let by = certificate(swarm, admitter.host(), may_admit);
            let by = Signed::certificate(&root, &by).unwrap();
            for passes_on in [true, false] {
                let own = certificate(swarm, host.host(), passes_on);
                let own = Signed::certificate(&admitter, &own).unwrap();
                let alone = SignedCertificate { own: own.clone(), admitter: None };
                assert_eq!(alone.check(swarm, &key), Err(CertificateError::Signature));
                let chain = SignedCertificate { own, admitter: Some(by.clone()) };
                assert_eq!(chain.check(swarm, &key).is_ok(), may_admit && !passes_on);
            }
        }
    }

    #[test]
    fn only_the_authority_or_the_host_itself_revokes() {
        let (root, host, third) =
            (Identity::generate(), Identity::generate(), Identity::generate());
        let swarm = swarm_of(&root.host().0);
        for (signer, left, counts) in [
            (&root, false, true),
            (&host, true, true),
            (&host, false, false),
            (&root, true, false),
            (&third, true, false),
            (&third, false, false),
        ] {
            let said = Revocation { swarm, host: host.host(), at: 1, left };
            let signed = Signed::revocation(signer, &said).unwrap();
            assert_eq!(signed.check_revocation(swarm, &root.host().0).is_ok(), counts);
        }
    }

    proptest::proptest! {
        #[test]
        fn garbage_is_refused_without_panic(
            body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            signature in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80),
        ) {
            let root = Identity::generate();
            let swarm = swarm_of(&root.host().0);
            let signed = Signed { body, signature };
            assert!(signed.check_contact().is_err());
            assert!(signed.check_revocation(swarm, &root.host().0).is_err());
            let chain = SignedCertificate { own: signed.clone(), admitter: Some(signed) };
            assert!(chain.check(swarm, &root.host().0).is_err());
        }

        #[test]
        fn a_flipped_bit_is_noticed(at in 0_usize..2000) {
            let root = Identity::generate();
            let swarm = swarm_of(&root.host().0);
            let mut own = Signed::certificate(&root, &certificate(swarm, root.host(), true)).unwrap();
            let bit = at % (8 * (own.body.len() + own.signature.len()));
            let (byte, mask) = (bit / 8, 1 << (bit % 8));
            if byte < own.body.len() {
                own.body[byte] ^= mask;
            } else {
                let byte = byte - own.body.len();
                own.signature[byte] ^= mask;
            }
            assert!(SignedCertificate { own, admitter: None }.check(swarm, &root.host().0).is_err());
        }
    }
}
