//! The roster: who is a member and who is out for ever, as far as this node knows.
//!
//! Owns the merge rules and the file. Never talks to the network. Invariants: nothing enters that
//! is not signed by someone entitled; revocations only accumulate; merging in any order, any number
//! of times, ends in the same roster.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use godwit_protocol::id::{HostId, Name, SwarmId};
use godwit_protocol::limits::MEMBERS;
use godwit_protocol::wire::codec;

use super::certificate::{
    Certificate, CertificateError, Contact, Revocation, Signed, SignedCertificate,
};
use super::identity::swarm_of;
use super::keys::{SWARM_FILE, StateDir, StateError};

/// Most revocations that are kept.
pub const REVOCATIONS: usize = 4 * MEMBERS;
/// Longest roster file, bytes.
const FILE_BYTES: usize = 16 << 20;
const MAGIC: &[u8; 8] = b"godwitS1";

/// A member as it travels: what the authority says and what the member says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Why it is a member.
    pub certificate: SignedCertificate,
    /// Where it is, once it has said so.
    pub contact: Option<Signed>,
}

/// A member, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// What it was sent as.
    pub record: MemberRecord,
    /// Its certificate.
    pub certificate: Certificate,
    /// Who admitted it, if not the authority.
    pub admitter: Option<HostId>,
    /// Where it is.
    pub contact: Option<Contact>,
}

/// What a merge did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Known already.
    None,
    /// A host that was not known.
    Added,
    /// A known host has a newer certificate or contact.
    Updated,
}

/// The part of the roster that is on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    me: HostId,
    authority: [u8; 32],
    founder: HostId,
    chunk_key: [u8; 32],
    members: Vec<MemberRecord>,
    revocations: Vec<Signed>,
}

/// Members and revocations of one swarm. `Debug` shows no secret.
#[derive(Clone)]
pub struct Roster {
    me: HostId,
    swarm: SwarmId,
    authority: [u8; 32],
    founder: HostId,
    chunk_key: [u8; 32],
    members: BTreeMap<HostId, Member>,
    revocations: BTreeMap<HostId, (Revocation, Signed)>,
}

impl std::fmt::Debug for Roster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Roster({}, {} members)", self.swarm, self.members.len())
    }
}

impl Roster {
    /// A roster without members, for the swarm of `authority`.
    #[must_use]
    pub fn new(me: HostId, authority: [u8; 32], founder: HostId, chunk_key: [u8; 32]) -> Self {
        let (members, revocations) = (BTreeMap::new(), BTreeMap::new());
        let swarm = swarm_of(&authority);
        Self { me, swarm, authority, founder, chunk_key, members, revocations }
    }

    /// Reads the roster of a state directory; `None` if the host is in no swarm.
    ///
    /// # Errors
    /// [`StateError`], also if a signature in the file does not hold.
    pub fn load(state: &StateDir) -> Result<Option<Self>, StateError> {
        let Some(bytes) = state.read(SWARM_FILE, FILE_BYTES)? else { return Ok(None) };
        let damaged = |cause: String| StateError::Damaged {
            path: state.file(SWARM_FILE).display().to_string(),
            cause,
        };
        let short = || damaged("too short".to_owned());
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| damaged("not a roster".to_owned()))?;
        let (sum, body) = rest.split_at_checked(32).ok_or_else(short)?;
        if blake3::hash(body) != *sum {
            return Err(damaged("checksum".to_owned()));
        }
        let stored: Stored =
            codec::decode::<_, FILE_BYTES>(body).map_err(|e| damaged(e.to_string()))?;
        let mut roster = Self::new(stored.me, stored.authority, stored.founder, stored.chunk_key);
        for record in stored.members {
            roster.merge(record).map_err(|e| damaged(e.to_string()))?;
        }
        for signed in stored.revocations {
            roster.revoke(signed).map_err(|e| damaged(e.to_string()))?;
        }
        Ok(Some(roster))
    }

    /// Writes the roster; durable when it returns.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn save(&self, state: &StateDir) -> Result<(), StateError> {
        let stored = Stored {
            me: self.me,
            authority: self.authority,
            founder: self.founder,
            chunk_key: self.chunk_key,
            members: self.members.values().map(|m| m.record.clone()).collect(),
            revocations: self.revocations.values().map(|(_, signed)| signed.clone()).collect(),
        };
        let body = codec::encode(&stored, FILE_BYTES).map_err(|e| StateError::Damaged {
            path: state.file(SWARM_FILE).display().to_string(),
            cause: e.to_string(),
        })?;
        let sum = blake3::hash(&body);
        state.write(SWARM_FILE, &[MAGIC.as_slice(), sum.as_bytes(), &body].concat())
    }

    /// This host.
    #[must_use]
    pub fn me(&self) -> HostId {
        self.me
    }

    /// The swarm.
    #[must_use]
    pub fn swarm(&self) -> SwarmId {
        self.swarm
    }

    /// The authority's public key.
    #[must_use]
    pub fn authority(&self) -> [u8; 32] {
        self.authority
    }

    /// The host that made the swarm; it holds the authority key unless that was moved.
    #[must_use]
    pub fn founder(&self) -> HostId {
        self.founder
    }

    /// The key of chunk ids. A secret of the swarm.
    #[must_use]
    pub fn chunk_key(&self) -> [u8; 32] {
        self.chunk_key
    }

    /// A member, revoked or not.
    #[must_use]
    pub fn get(&self, host: HostId) -> Option<&Member> {
        self.members.get(&host)
    }

    /// Every host that ever was a member, in the order of their ids.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// Whether a host is a member now.
    #[must_use]
    pub fn admitted(&self, host: HostId) -> bool {
        self.members.get(&host).is_some_and(|m| !self.out(host, m.admitter))
    }

    /// Whether a host is out, or was admitted by a host that the authority threw out (whoever takes
    /// an admitting key must not keep what it signed; those hosts join again).
    fn out(&self, host: HostId, admitter: Option<HostId>) -> bool {
        let thrown_out = |by: HostId| self.revocations.get(&by).is_some_and(|(r, _)| !r.left);
        self.revocations.contains_key(&host) || admitter.is_some_and(thrown_out)
    }

    /// Checks a host's own certificate as shown in a hello or a join.
    ///
    /// # Errors
    /// [`CertificateError`]; the roster is not changed.
    pub fn check(
        &self,
        host: HostId,
        certificate: &SignedCertificate,
    ) -> Result<Certificate, CertificateError> {
        let (said, admitter) = certificate.check(self.swarm, &self.authority)?;
        if said.host != host {
            return Err(CertificateError::OtherHost);
        }
        if self.out(host, admitter) {
            return Err(CertificateError::Revoked);
        }
        Ok(said)
    }

    /// Takes in what is new of a member.
    ///
    /// # Errors
    /// [`CertificateError`]; the roster is not changed.
    pub fn merge(&mut self, record: MemberRecord) -> Result<Change, CertificateError> {
        if self.get_same(&record) {
            return Ok(Change::None);
        }
        let (certificate, admitter) = record.certificate.check(self.swarm, &self.authority)?;
        let contact = record.contact.as_ref().map(Signed::check_contact).transpose()?;
        if contact.as_ref().is_some_and(|c| c.host != certificate.host) {
            return Err(CertificateError::OtherHost);
        }
        let host = certificate.host;
        let new = Member { record, certificate, admitter, contact };
        let Some(old) = self.members.get_mut(&host) else {
            if self.members.len() >= MEMBERS {
                return Err(CertificateError::TooMany(MEMBERS));
            }
            self.members.insert(host, new);
            return Ok(Change::Added);
        };
        let age = |m: &Member| (m.certificate.issued_at, m.record.certificate.clone());
        let newer_certificate = age(&new) > age(old);
        let sequence = |m: &Member| m.contact.as_ref().map(|c| c.sequence);
        let newer_contact = sequence(&new) > sequence(old);
        if newer_contact {
            old.contact = new.contact;
            old.record.contact = new.record.contact;
        }
        if newer_certificate {
            old.certificate = new.certificate;
            old.admitter = new.admitter;
            old.record.certificate = new.record.certificate;
        }
        let changed = newer_contact || newer_certificate;
        Ok(if changed { Change::Updated } else { Change::None })
    }

    fn get_same(&self, record: &MemberRecord) -> bool {
        // Cheap test before the signatures: hosts repeat what is known all the time.
        self.members.values().any(|m| m.record == *record)
    }

    /// Takes in a revocation; `Some` names the host if this changed who is out.
    ///
    /// # Errors
    /// [`CertificateError`]; the roster is not changed.
    pub fn revoke(&mut self, signed: Signed) -> Result<Option<HostId>, CertificateError> {
        if self.revocations.values().any(|(_, known)| *known == signed) {
            return Ok(None);
        }
        let said = signed.check_revocation(self.swarm, &self.authority)?;
        let host = said.host;
        if said.left && !self.members.contains_key(&host) {
            // A stranger that "leaves" must not fill the table.
            return Err(CertificateError::OtherHost);
        }
        if self.revocations.len() >= REVOCATIONS && !self.revocations.contains_key(&host) {
            return Err(CertificateError::TooMany(REVOCATIONS));
        }
        match self.revocations.get(&host) {
            // The authority's word counts more than the host's own; otherwise any one will do, the
            // same one everywhere.
            Some((known, by)) if (known.left, by) <= (said.left, &signed) => Ok(None),
            known => {
                let heavier = known.is_none_or(|(old, _)| old.left != said.left);
                self.revocations.insert(host, (said, signed));
                Ok(heavier.then_some(host))
            }
        }
    }

    /// The revocation of a host, as it travels.
    #[must_use]
    pub fn revocation(&self, host: HostId) -> Option<&Signed> {
        self.revocations.get(&host).map(|(_, signed)| signed)
    }

    /// Every revocation, as it travels.
    pub fn revocations(&self) -> impl Iterator<Item = &Signed> {
        self.revocations.values().map(|(_, signed)| signed)
    }

    /// The host of that name among the members of now.
    #[must_use]
    pub fn named(&self, name: &Name) -> Option<HostId> {
        let found = self
            .members
            .values()
            .find(|m| m.certificate.name == *name && self.admitted(m.certificate.host))?;
        Some(found.certificate.host)
    }

    /// Equal digests mean equal rosters.
    #[must_use]
    pub fn digest(&self) -> [u8; 16] {
        let mut hash = blake3::Hasher::new();
        for (host, member) in &self.members {
            let sequence = member.contact.as_ref().map_or(0, |c| c.sequence.saturating_add(1));
            hash.update(&host.0);
            hash.update(blake3::hash(&member.record.certificate.own.signature).as_bytes());
            hash.update(&sequence.to_le_bytes());
        }
        hash.update(b"revoked");
        for (host, (_, signed)) in &self.revocations {
            hash.update(&host.0);
            hash.update(blake3::hash(&signed.signature).as_bytes());
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&hash.finalize().as_bytes()[..16]);
        digest
    }
}

#[cfg(test)]
mod tests {
    use super::super::certificate::tests::certificate;
    use super::super::identity::Identity;
    use super::*;

    struct Swarm {
        root: Identity,
        roster: Roster,
    }

    fn swarm() -> Swarm {
        let root = Identity::generate();
        let roster = Roster::new(root.host(), root.host().0, root.host(), [7; 32]);
        Swarm { root, roster }
    }

    impl Swarm {
        fn record(&self, host: &Identity, admitter: Option<&Identity>) -> MemberRecord {
            let id = self.roster.swarm();
            let signer = admitter.unwrap_or(&self.root);
            let own = certificate(id, host.host(), false);
            let own = Signed::certificate(signer, &own).unwrap();
            let admitter = admitter.map(|by| {
                Signed::certificate(&self.root, &certificate(id, by.host(), true)).unwrap()
            });
            MemberRecord { certificate: SignedCertificate { own, admitter }, contact: None }
        }

        fn revocation(&self, signer: &Identity, host: &Identity, left: bool) -> Signed {
            let said = Revocation { swarm: self.roster.swarm(), host: host.host(), at: 5, left };
            Signed::revocation(signer, &said).unwrap()
        }
    }

    #[test]
    fn revocation_is_final_in_any_order_and_on_disk() {
        let mut s = swarm();
        let host = Identity::generate();
        let (record, out) = (s.record(&host, None), s.revocation(&s.root, &host, false));
        let mut other = s.roster.clone();
        assert_eq!(s.roster.merge(record.clone()), Ok(Change::Added));
        assert!(s.roster.admitted(host.host()));
        assert_eq!(s.roster.revoke(out.clone()), Ok(Some(host.host())));
        assert_eq!(s.roster.merge(record.clone()), Ok(Change::None));
        assert!(!s.roster.admitted(host.host()));
        let check = s.roster.check(host.host(), &record.certificate);
        assert_eq!(check, Err(CertificateError::Revoked));

        assert_eq!(other.revoke(out.clone()), Ok(Some(host.host())));
        assert_eq!(other.revoke(out), Ok(None));
        other.merge(record).unwrap();
        assert!(!other.admitted(host.host()));
        assert_eq!(other.digest(), s.roster.digest());

        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::create(dir.path()).unwrap();
        s.roster.save(&state).unwrap();
        let read = Roster::load(&state).unwrap().unwrap();
        assert_eq!(read.digest(), s.roster.digest());
        assert!(!read.admitted(host.host()));
        assert_eq!(read.chunk_key(), [7; 32]);
        let mut bytes = std::fs::read(state.file(SWARM_FILE)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        state.write(SWARM_FILE, &bytes).unwrap();
        assert!(matches!(Roster::load(&state), Err(StateError::Damaged { .. })));
    }

    #[test]
    fn what_a_revoked_admitter_signed_is_void_but_not_what_one_that_left_signed() {
        let mut s = swarm();
        let (admitter, host) = (Identity::generate(), Identity::generate());
        let (by, record) = (s.record(&admitter, None), s.record(&host, Some(&admitter)));
        s.roster.merge(by).unwrap();
        s.roster.merge(record).unwrap();
        let left = s.revocation(&admitter, &admitter, true);
        assert_eq!(s.roster.revoke(left.clone()), Ok(Some(admitter.host())));
        assert!(!s.roster.admitted(admitter.host()) && s.roster.admitted(host.host()));
        let out = s.revocation(&s.root, &admitter, false);
        assert_eq!(s.roster.revoke(out), Ok(Some(admitter.host())));
        assert!(!s.roster.admitted(host.host()));
        assert_eq!(s.roster.revoke(left), Ok(None));
        assert!(!s.roster.admitted(host.host()));
    }

    #[test]
    fn the_newer_contact_wins_and_only_the_host_writes_it() {
        let mut s = swarm();
        let (host, third) = (Identity::generate(), Identity::generate());
        let mut record = s.record(&host, None);
        let contact = |signer: &Identity, sequence| {
            let addresses = vec!["127.0.0.1:1".parse().unwrap()];
            let (bulk_port, frames_port) = (2, 3);
            let said = Contact { host: host.host(), sequence, addresses, bulk_port, frames_port };
            Some(Signed::contact(signer, &said).unwrap())
        };
        record.contact = contact(&third, 9);
        assert_eq!(s.roster.merge(record.clone()), Err(CertificateError::Signature));
        record.contact = contact(&host, 5);
        assert_eq!(s.roster.merge(record.clone()), Ok(Change::Added));
        record.contact = contact(&host, 4);
        assert_eq!(s.roster.merge(record.clone()), Ok(Change::None));
        record.contact = contact(&host, 6);
        assert_eq!(s.roster.merge(record), Ok(Change::Updated));
        let known = s.roster.get(host.host()).unwrap().contact.clone().unwrap();
        assert_eq!(known.sequence, 6);
    }
}
