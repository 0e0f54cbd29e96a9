//! Admission: how a swarm begins, how a host gets in, and how it is put out.
//!
//! Owns the operator's commands (`init`, `mint_token`, `join`, `revoke`, `leave`) and the issuer's
//! side of a join. Never trusts reachability: what counts is a signature. Invariant: a token is
//! marked as used, durably, before the certificate that it buys leaves this node.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use godwit_protocol::id::{HostId, Name, SwarmId};

use super::certificate::{
    CERTIFICATE_VERSION, Certificate, CertificateError, Revocation, Signed, SignedCertificate,
};
use super::identity::{Identity, swarm_of};
use super::keys::{self, AUTHORITY_KEY, NODE_KEY, SWARM_FILE, StateDir, StateError};
use super::roster::{MemberRecord, Roster};
use super::token::{self, Token, TokenError};

/// Longest life of a token.
pub const TOKEN_LIFE_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Most members that a welcome carries; the hello brings the others.
const WELCOME_MEMBERS: usize = 512;

/// Why an operator's command was not carried out. Nothing was changed unless the text says so.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The host is in a swarm already.
    #[error(
        "this host is a member of swarm {0} already; `godwit leave` first, or use another --state"
    )]
    AlreadyMember(SwarmId),
    /// The host is in no swarm.
    #[error(
        "this host is in no swarm; `godwit init --site SITE` makes one, `godwit join TOKEN --site SITE` enters one"
    )]
    NoMember,
    /// The host may not admit.
    #[error("this host may not admit others; run `godwit token` on {0}, which made the swarm")]
    NoAdmission(String),
    /// The host may not revoke.
    #[error(
        "this host does not hold the swarm's authority key; run the command on {0}, which made the swarm"
    )]
    NoAuthority(String),
    /// The only holder of the authority key cannot leave the others without it.
    #[error(
        "this host holds the swarm's authority key: move `authority.key` into another member's state directory first"
    )]
    LastAuthority,
    /// No such host.
    #[error("no member {0}; `godwit hosts` lists them")]
    UnknownHost(HostId),
    /// A host cannot revoke itself.
    #[error("a host does not revoke itself; use `godwit leave`")]
    Myself,
    /// A life of zero or of more than [`TOKEN_LIFE_MAX`].
    #[error("a token lives between one second and 30 days")]
    TokenLife,
    /// Nothing tells others where this node is.
    #[error("no address to put into the token; start the daemon, or give --advertise ADDR:PORT")]
    NoAddress,
    /// A token that buys nothing.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The issuer said no.
    #[error("the issuer refused: {0}")]
    Refused(Refusal),
    /// The issuer could not be reached.
    #[error(
        "cannot reach the token's issuer at {addresses}: {cause}; is its daemon running, and is the port open (UDP or TCP)?"
    )]
    Unreachable {
        /// What was tried.
        addresses: String,
        /// The last failure.
        cause: String,
    },
    /// The issuer's answer does not hold.
    #[error("the issuer's answer does not hold: {0}; ask for a new token")]
    BadWelcome(String),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// A statement could not be signed.
    #[error("cannot sign: {0}")]
    Sign(#[from] CertificateError),
}

/// Why an issuer refuses; travels to the joiner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The token.
    #[error(transparent)]
    Token(TokenError),
    /// The name is taken by another member.
    #[error("the name {0} is taken by another member; choose one with --name")]
    NameTaken(Name),
    /// The key of this host was revoked.
    #[error("this host's key was revoked; remove its state directory to get a new key")]
    Revoked,
    /// Another wire version.
    #[error("the issuer speaks wire version {0}; install the same version of godwit on both")]
    Version(u16),
    /// The issuer lost its right, or cannot write.
    #[error("the issuer cannot admit now: {0}")]
    Issuer(String),
}

/// What a joiner asks.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The joiner's wire version.
    pub version: u16,
    /// The token's secret.
    pub secret: [u8; 32],
    /// The name that the host wants.
    pub name: Name,
    /// Its site.
    pub site: Name,
}

/// What a joiner gets.
#[derive(Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// The new member's certificate.
    pub certificate: SignedCertificate,
    /// The authority's public key; its hash is the swarm's id in the token.
    pub authority: [u8; 32],
    /// Who made the swarm.
    pub founder: HostId,
    /// The key of chunk ids.
    pub chunk_key: [u8; 32],
    /// Members, the issuer first.
    pub members: Vec<MemberRecord>,
    /// Revocations.
    pub revocations: Vec<Signed>,
}

/// The issuer's answer.
#[derive(Clone, Serialize, Deserialize)]
pub enum JoinReply {
    /// Admitted.
    Welcome(Box<Welcome>),
    /// Not admitted.
    Refused(Refusal),
}

/// Makes a swarm with this host as its first member, holding the authority key.
///
/// # Errors
/// [`AdmissionError`]; if the host is in a swarm already, nothing is changed.
pub fn init(state: &Path, site: Name, name: Name) -> Result<SwarmId, AdmissionError> {
    let state = StateDir::create(state)?;
    if let Some(roster) = Roster::load(&state)? {
        return Err(AdmissionError::AlreadyMember(roster.swarm()));
    }
    let me = Identity::load_or_make(&state)?;
    let authority = Identity::generate();
    authority.save(&state, AUTHORITY_KEY)?;
    let key = authority.host().0;
    let swarm = swarm_of(&key);
    let (version, issued_at) = (CERTIFICATE_VERSION, now_seconds());
    let said = Certificate { version, swarm, host: me.host(), name, site, admit: true, issued_at };
    let own = Signed::certificate(&authority, &said)?;
    let mut roster = Roster::new(me.host(), key, me.host(), keys::random()?);
    let certificate = SignedCertificate { own, admitter: None };
    roster.merge(MemberRecord { certificate, contact: None })?;
    roster.save(&state)?;
    Ok(swarm)
}

/// Mints a one-line token, to be redeemed once, at this host, within `life`. `advertise` overrides the
/// addresses that the daemon last announced. `admit`: the new member may admit others (only the
/// holder of the authority key can give that). Works with or without a running daemon.
///
/// # Errors
/// [`AdmissionError`]; no token was made.
pub fn mint_token(
    state: &Path,
    life: Duration,
    advertise: Option<SocketAddr>,
    admit: bool,
) -> Result<String, AdmissionError> {
    let (state, roster) = open(state)?;
    if !(Duration::from_secs(1)..=TOKEN_LIFE_MAX).contains(&life) {
        return Err(AdmissionError::TokenLife);
    }
    let signer = Signer::load(&state, &roster)?;
    if admit && signer.admitter.is_some() {
        return Err(AdmissionError::NoAuthority(founder_name(&roster)));
    }
    let contact = roster.get(roster.me()).and_then(|m| m.contact.as_ref());
    let addresses = match advertise {
        Some(address) => vec![address],
        None => contact.map(|c| c.addresses.clone()).unwrap_or_default(),
    };
    if addresses.is_empty() {
        return Err(AdmissionError::NoAddress);
    }
    let now = now_seconds();
    let (swarm, issuer) = (roster.swarm(), roster.me());
    let expires_at = now.saturating_add(life.as_secs());
    let minted = Token { swarm, issuer, addresses, secret: keys::random()?, expires_at };
    let text = minted.to_text()?;
    token::remember(&state, &minted, admit, now)?;
    Ok(text)
}

/// Enters the swarm of a token. The daemon must not run yet. If the answer is lost on the way, the
/// same call with the same state directory may be repeated.
///
/// # Errors
/// [`AdmissionError`]; the host is in no swarm then (its key stays for the next attempt).
pub async fn join(
    text: &str,
    state: &Path,
    site: Name,
    name: Name,
) -> Result<SwarmId, AdmissionError> {
    let token = Token::parse(text)?;
    let state = StateDir::create(state)?;
    if let Some(roster) = Roster::load(&state)? {
        return Err(AdmissionError::AlreadyMember(roster.swarm()));
    }
    let me = Identity::load_or_make(&state)?;
    let version = godwit_protocol::wire::codec::WIRE_VERSION;
    let request = JoinRequest { version, secret: token.secret, name, site };
    let welcome = match super::joining::ask(&me, &token, &request).await? {
        JoinReply::Welcome(welcome) => *welcome,
        JoinReply::Refused(refusal) => return Err(AdmissionError::Refused(refusal)),
    };
    let roster = enter(&me, &token, welcome)?;
    roster.save(&state)?;
    Ok(token.swarm)
}

/// Checks a welcome against the token: the issuer is believed only as far as the authority signed.
fn enter(me: &Identity, token: &Token, welcome: Welcome) -> Result<Roster, AdmissionError> {
    if swarm_of(&welcome.authority) != token.swarm {
        return Err(AdmissionError::BadWelcome("it is of another swarm".to_owned()));
    }
    let bad = |e: CertificateError| AdmissionError::BadWelcome(e.to_string());
    let mut roster = Roster::new(me.host(), welcome.authority, welcome.founder, welcome.chunk_key);
    roster.check(me.host(), &welcome.certificate).map_err(bad)?;
    let own = MemberRecord { certificate: welcome.certificate, contact: None };
    roster.merge(own).map_err(bad)?;
    for record in welcome.members {
        roster.merge(record).map_err(bad)?;
    }
    for signed in welcome.revocations {
        roster.revoke(signed).map_err(bad)?;
    }
    if !roster.admitted(me.host()) {
        return Err(AdmissionError::BadWelcome("this host is revoked".to_owned()));
    }
    Ok(roster)
}

/// The issuer's side: redeems the token and signs the certificate. The caller saves the roster with
/// the returned record before the reply leaves.
pub(super) fn admit(
    state: &StateDir,
    roster: &Roster,
    host: HostId,
    request: JoinRequest,
) -> Result<(MemberRecord, Box<Welcome>), Refusal> {
    let issuer = |e: &dyn std::fmt::Display| Refusal::Issuer(e.to_string());
    let ours = godwit_protocol::wire::codec::WIRE_VERSION;
    if request.version != ours {
        return Err(Refusal::Version(ours));
    }
    if roster.revocation(host).is_some() {
        return Err(Refusal::Revoked);
    }
    if roster.named(&request.name).is_some_and(|by| by != host) {
        return Err(Refusal::NameTaken(request.name));
    }
    let signer = Signer::load(state, roster).map_err(|e| issuer(&e))?;
    let now = now_seconds();
    let may_admit = token::redeem(state, &request.secret, host, now)
        .map_err(|e| issuer(&e))?
        .map_err(Refusal::Token)?;
    let said = Certificate {
        version: CERTIFICATE_VERSION,
        swarm: roster.swarm(),
        host,
        name: request.name,
        site: request.site,
        admit: may_admit && signer.admitter.is_none(),
        issued_at: now,
    };
    let own = Signed::certificate(&signer.key, &said).map_err(|e| issuer(&e))?;
    let certificate = SignedCertificate { own, admitter: signer.admitter };
    let me = roster.get(roster.me()).into_iter();
    let others = roster
        .members()
        .filter(|m| m.certificate.host != roster.me() && roster.admitted(m.certificate.host));
    let members = me.chain(others).take(WELCOME_MEMBERS).map(|m| m.record.clone()).collect();
    let welcome = Welcome {
        certificate: certificate.clone(),
        authority: roster.authority(),
        founder: roster.founder(),
        chunk_key: roster.chunk_key(),
        members,
        revocations: known_revocations(roster),
    };
    Ok((MemberRecord { certificate, contact: None }, Box::new(welcome)))
}

/// A host that left counts only where its certificate is known, so the welcome leaves it out.
fn known_revocations(roster: &Roster) -> Vec<Signed> {
    let (swarm, key) = (roster.swarm(), roster.authority());
    let by_authority = |s: &&Signed| s.check_revocation(swarm, &key).is_ok_and(|said| !said.left);
    roster.revocations().filter(by_authority).take(WELCOME_MEMBERS).cloned().collect()
}

/// Signs that `host` is out. Only the holder of the authority key can.
///
/// # Errors
/// [`AdmissionError`].
pub(super) fn sign_revocation(
    state: &StateDir,
    roster: &Roster,
    host: HostId,
) -> Result<Signed, AdmissionError> {
    if host == roster.me() {
        return Err(AdmissionError::Myself);
    }
    if roster.get(host).is_none() {
        return Err(AdmissionError::UnknownHost(host));
    }
    let authority = authority(state, roster)?
        .ok_or_else(|| AdmissionError::NoAuthority(founder_name(roster)))?;
    let said = Revocation { swarm: roster.swarm(), host, at: now_seconds(), left: false };
    Ok(Signed::revocation(&authority, &said)?)
}

/// Signs that this host leaves.
///
/// # Errors
/// [`AdmissionError::LastAuthority`] if others would be left without the authority key.
pub(super) fn sign_leave(
    state: &StateDir,
    roster: &Roster,
    me: &Identity,
) -> Result<Signed, AdmissionError> {
    let others = roster
        .members()
        .any(|m| m.certificate.host != me.host() && roster.admitted(m.certificate.host));
    if others && authority(state, roster)?.is_some() {
        return Err(AdmissionError::LastAuthority);
    }
    let said = Revocation { swarm: roster.swarm(), host: me.host(), at: now_seconds(), left: true };
    Ok(Signed::revocation(me, &said)?)
}

/// Forgets the swarm and the key: a revoked key is of no use to anyone.
///
/// # Errors
/// [`StateError`].
pub(super) fn forget(state: &StateDir) -> Result<(), StateError> {
    for name in [SWARM_FILE, keys::TOKENS_FILE, AUTHORITY_KEY, NODE_KEY] {
        state.remove(name)?;
    }
    Ok(())
}

/// Opens the state directory of a member.
///
/// # Errors
/// [`AdmissionError::NoMember`].
pub fn open(state: &Path) -> Result<(StateDir, Roster), AdmissionError> {
    if !state.join(SWARM_FILE).exists() {
        return Err(AdmissionError::NoMember);
    }
    let state = StateDir::create(state)?;
    let roster = Roster::load(&state)?.ok_or(AdmissionError::NoMember)?;
    Ok((state, roster))
}

/// Who signs certificates on this host.
struct Signer {
    key: Identity,
    admitter: Option<Signed>,
}

impl Signer {
    fn load(state: &StateDir, roster: &Roster) -> Result<Self, AdmissionError> {
        if let Some(key) = authority(state, roster)? {
            return Ok(Self { key, admitter: None });
        }
        let me = roster.get(roster.me()).filter(|m| m.certificate.admit && m.admitter.is_none());
        let me = me.ok_or_else(|| AdmissionError::NoAdmission(founder_name(roster)))?;
        let key = Identity::load(state, NODE_KEY)?.ok_or(AdmissionError::NoMember)?;
        Ok(Self { key, admitter: Some(me.record.certificate.own.clone()) })
    }
}

fn authority(state: &StateDir, roster: &Roster) -> Result<Option<Identity>, StateError> {
    let found = Identity::load(state, AUTHORITY_KEY)?;
    Ok(found.filter(|key| key.host().0 == roster.authority()))
}

fn founder_name(roster: &Roster) -> String {
    let founder = roster.founder();
    roster.get(founder).map_or_else(|| founder.to_string(), |m| m.certificate.name.to_string())
}

/// Seconds since 1970 by this host's clock.
pub(super) fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
