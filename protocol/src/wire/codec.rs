//! The one place where bytes become messages: bincode with a hard size limit.
//!
//! Owns the encoding. Everything that is stored or sent goes through here, so the format can be
//! replaced in this file alone.

use serde::{Serialize, de::DeserializeOwned};

/// Version of the wire messages. Neighbours with another version are refused in the hello.
pub const WIRE_VERSION: u16 = 7;

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// More bytes than the limit; nothing was decoded.
    #[error("message of {len} bytes is over the limit of {limit}")]
    TooLong {
        /// Bytes received.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Not a message of the expected type.
    #[error("malformed message: {0}")]
    Malformed(String),
}

/// Encodes `value`; fails if the result would be longer than `limit` bytes.
///
/// # Errors
/// [`CodecError::TooLong`] if it does not fit, [`CodecError::Malformed`] if it cannot be encoded.
pub fn encode<T: Serialize>(value: &T, limit: usize) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, bincode::config::standard())
        .map_err(|e| CodecError::Malformed(e.to_string()))?;
    if bytes.len() > limit {
        return Err(CodecError::TooLong { len: bytes.len(), limit });
    }
    Ok(bytes)
}

/// Decodes a whole message of at most `LIMIT` bytes; trailing bytes are an error.
///
/// # Errors
/// [`CodecError`]; nothing was changed.
pub fn decode<T: DeserializeOwned, const LIMIT: usize>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > LIMIT {
        return Err(CodecError::TooLong { len: bytes.len(), limit: LIMIT });
    }
    let config = bincode::config::standard().with_limit::<LIMIT>();
    let (value, used) = bincode::serde::decode_from_slice(bytes, config)
        .map_err(|e| CodecError::Malformed(e.to_string()))?;
    if used != bytes.len() {
        return Err(CodecError::Malformed(format!("{} trailing bytes", bytes.len() - used)));
    }
    Ok(value)
}
