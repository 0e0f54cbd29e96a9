//! Tokens: the one line that a new host types, and the issuer's memory of it.
//!
//! Owns the text form and the token file. Invariant: the secret itself is never stored, and a token
//! is marked as used on disk before the certificate that it buys leaves this node. The host that
//! used it may ask again (its answer may have been lost) and gets the same host admitted; nobody
//! else does.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use godwit_protocol::id::{HostId, SwarmId};
use godwit_protocol::wire::codec;

use super::certificate::ADDRESSES;
use super::identity::{from_hex, to_hex};
use super::keys::{StateDir, StateError, TOKENS_FILE, TOKENS_LOCK};

const PREFIX: &str = "gw1:";
const TOKEN_BYTES: usize = 1024;
const FILE_BYTES: usize = 1 << 20;
/// Most tokens that an issuer remembers; the oldest go first.
const TOKENS: usize = 1024;
/// Seconds for which a token is remembered after it ran out, so that the answer stays precise.
const REMEMBER_SECONDS: u64 = 7 * 86_400;

/// What a token says.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The swarm to join.
    pub swarm: SwarmId,
    /// The only host that redeems it.
    pub issuer: HostId,
    /// Where the issuer is (control port).
    pub addresses: Vec<SocketAddr>,
    /// The one-time secret.
    pub secret: [u8; 32],
    /// Seconds since 1970 by the issuer's clock.
    pub expires_at: u64,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token(swarm {}, issuer {:?})", self.swarm, self.issuer)
    }
}

/// Why a token buys nothing. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum TokenError {
    /// Not a token, or not all of it.
    #[error("this is no token: it starts with gw1: and is one line; copy it again in full")]
    Malformed,
    /// Too late.
    #[error("the token has expired; ask for a new one with `godwit token`")]
    Expired,
    /// Another host was admitted with it.
    #[error("the token was used already; ask for a new one with `godwit token`")]
    Used,
    /// The issuer did not mint it.
    #[error("the issuer does not know this token; ask for a new one with `godwit token`")]
    Unknown,
}

impl Token {
    /// The one line.
    ///
    /// # Errors
    /// [`TokenError::Malformed`] if there are too many addresses to fit.
    pub fn to_text(&self) -> Result<String, TokenError> {
        let mut bytes = codec::encode(self, TOKEN_BYTES).map_err(|_| TokenError::Malformed)?;
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(&sum.as_bytes()[..4]);
        Ok(format!("{PREFIX}{}", to_hex(&bytes)))
    }

    /// Reads the line.
    ///
    /// # Errors
    /// [`TokenError::Malformed`].
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Malformed)?;
        if digits.len() > 2 * TOKEN_BYTES {
            return Err(TokenError::Malformed);
        }
        let bytes = from_hex(digits).ok_or(TokenError::Malformed)?;
        let at = bytes.len().checked_sub(4).ok_or(TokenError::Malformed)?;
        let (body, sum) = bytes.split_at(at);
        if blake3::hash(body).as_bytes()[..4] != *sum {
            return Err(TokenError::Malformed);
        }
        let token: Self =
            codec::decode::<_, TOKEN_BYTES>(body).map_err(|_| TokenError::Malformed)?;
        let bounded = (1..=ADDRESSES).contains(&token.addresses.len());
        if bounded { Ok(token) } else { Err(TokenError::Malformed) }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Minted {
    hash: [u8; 32],
    expires_at: u64,
    admit: bool,
    used_by: Option<HostId>,
}

fn load(state: &StateDir) -> Result<Vec<Minted>, StateError> {
    let Some(bytes) = state.read(TOKENS_FILE, FILE_BYTES)? else { return Ok(Vec::new()) };
    codec::decode::<_, FILE_BYTES>(&bytes).map_err(|e| StateError::Damaged {
        path: state.file(TOKENS_FILE).display().to_string(),
        cause: e.to_string(),
    })
}

fn save(state: &StateDir, tokens: &Vec<Minted>) -> Result<(), StateError> {
    let bytes = codec::encode(tokens, FILE_BYTES).map_err(|e| StateError::Damaged {
        path: state.file(TOKENS_FILE).display().to_string(),
        cause: e.to_string(),
    })?;
    state.write(TOKENS_FILE, &bytes)
}

/// Remembers a token that is about to be handed out. `admit`: the new member may admit others.
/// Times are seconds since 1970. Works beside a running daemon.
///
/// # Errors
/// [`StateError`]; the token was not remembered.
pub fn remember(state: &StateDir, token: &Token, admit: bool, now: u64) -> Result<(), StateError> {
    let _lock = state.lock(TOKENS_LOCK, true)?;
    let mut tokens = load(state)?;
    tokens.retain(|t| t.expires_at.saturating_add(REMEMBER_SECONDS) > now);
    let excess = (tokens.len() + 1).saturating_sub(TOKENS);
    tokens.drain(..excess);
    let hash = *blake3::hash(&token.secret).as_bytes();
    tokens.push(Minted { hash, expires_at: token.expires_at, admit, used_by: None });
    save(state, &tokens)
}

/// Marks the token of `secret` as used by `host`, durably. Returns whether the new member may admit.
///
/// # Errors
/// The outer error: the file. The inner one: why the token buys nothing.
pub fn redeem(
    state: &StateDir,
    secret: &[u8; 32],
    host: HostId,
    now: u64,
) -> Result<Result<bool, TokenError>, StateError> {
    let _lock = state.lock(TOKENS_LOCK, true)?;
    let mut tokens = load(state)?;
    // Comparing hashes: how long it takes says nothing about the secret.
    let hash = *blake3::hash(secret).as_bytes();
    let Some(token) = tokens.iter_mut().find(|t| t.hash == hash) else {
        return Ok(Err(TokenError::Unknown));
    };
    if token.used_by.is_some_and(|by| by != host) {
        return Ok(Err(TokenError::Used));
    }
    if token.expires_at <= now {
        return Ok(Err(TokenError::Expired));
    }
    let admit = token.admit;
    if token.used_by.is_none() {
        token.used_by = Some(host);
        save(state, &tokens)?;
    }
    Ok(Ok(admit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(expires_at: u64) -> Token {
        Token {
            swarm: SwarmId([1; 16]),
            issuer: HostId([2; 32]),
            addresses: vec!["192.0.2.1:7000".parse().unwrap(), "[::1]:9".parse().unwrap()],
            secret: [3; 32],
            expires_at,
        }
    }

    #[test]
    fn the_line_reads_back_and_a_cut_line_does_not() {
        let line = token(9).to_text().unwrap();
        assert_eq!(Token::parse(&format!(" {line}\n")), Ok(token(9)));
        for cut in 0..line.len() {
            assert_eq!(Token::parse(&line[..cut]), Err(TokenError::Malformed));
        }
    }

    #[test]
    fn a_token_is_used_once_and_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::create(dir.path()).unwrap();
        let (a, b) = (HostId([7; 32]), HostId([8; 32]));
        remember(&state, &token(100), true, 10).unwrap();
        assert_eq!(redeem(&state, &[4; 32], a, 20).unwrap(), Err(TokenError::Unknown));
        assert_eq!(redeem(&state, &[3; 32], a, 100).unwrap(), Err(TokenError::Expired));
        assert_eq!(redeem(&state, &[3; 32], a, 20).unwrap(), Ok(true));
        assert_eq!(redeem(&state, &[3; 32], b, 20).unwrap(), Err(TokenError::Used));
        assert_eq!(redeem(&state, &[3; 32], a, 30).unwrap(), Ok(true));
    }

    proptest::proptest! {
        #[test]
        fn garbage_is_no_token(text in "(gw1:)?[0-9a-f]{0,400}|\\PC{0,80}") {
            assert_eq!(Token::parse(&text), Err(TokenError::Malformed));
        }
    }
}
