//! Identities. Owns their forms and how they are shown; mints none (randomness is the adapter's).

use core::fmt;
use core::str::FromStr;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits::NAME_BYTES;

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $len:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        // Bytes on the wire and in the store; hexadecimal digits where people read (JSON, TOML).
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                if to.is_human_readable() { to.collect_str(self) } else { self.0.serialize(to) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                if from.is_human_readable() {
                    String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; $len]>::deserialize(from).map(Self)
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "("))?;
                self.0.iter().take(4).try_for_each(|b| write!(f, "{b:02x}"))?;
                write!(f, ")")
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let mut out = [0_u8; $len];
                if text.len() != 2 * $len || !text.is_ascii() {
                    return Err(IdError::Form { kind: stringify!($name), digits: 2 * $len });
                }
                for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let pair = core::str::from_utf8(pair).unwrap_or("");
                    *byte = u8::from_str_radix(pair, 16)
                        .map_err(|_| IdError::Form { kind: stringify!($name), digits: 2 * $len })?;
                }
                Ok(Self(out))
            }
        }
    };
}

bytes_id!(
    /// A host: its Ed25519 public key. The libp2p `PeerId` is derived from it.
    HostId, 32
);
bytes_id!(
    /// A swarm: the first 16 bytes of the BLAKE3 hash of its authority's public key.
    SwarmId, 16
);
bytes_id!(
    /// A VM. Random; its name is an alias.
    VmId, 16
);
bytes_id!(
    /// One start of a VM from an image, a stream or a checkpoint. Random.
    CopyId, 16
);
bytes_id!(
    /// The hard state of one voter: made when its store is made. Random.
    StoreId, 16
);
bytes_id!(
    /// One migration, and the request for it: a retry carries the same id. Random.
    MigrationId, 16
);
bytes_id!(
    /// A chunk: the first 16 bytes of BLAKE3 of its 4 KiB, keyed with the swarm's chunk key.
    ChunkId, 16
);
bytes_id!(
    /// The Ethernet address of a NIC.
    Mac, 6
);

impl Mac {
    /// The usual form with colons, as the kernel and QEMU write it.
    #[must_use]
    pub fn colons(&self) -> String {
        let b = self.0;
        format!("{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2], b[3], b[4], b[5])
    }
}

/// The number of a record. Epochs of a cluster only grow.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The one epoch that a proposal based on this one can win.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A name: 1 to 63 of `a-z`, `0-9` and `-`, not beginning or ending with `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Name {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        let fits = (1..=NAME_BYTES).contains(&text.len());
        let letters = text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if fits && letters && !text.starts_with('-') && !text.ends_with('-') {
            Ok(Self(text))
        } else {
            Err(IdError::Name)
        }
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl FromStr for Name {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::try_from(text.to_owned())
    }
}

/// Why a text is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not the hexadecimal form.
    #[error("a {kind} is written as {digits} hexadecimal digits")]
    Form {
        /// The kind of identity that was expected.
        kind: &'static str,
        /// How many digits it has.
        digits: usize,
    },
    /// Not a name.
    #[error("a name has 1 to 63 of a-z, 0-9 and '-', and neither begins nor ends with '-'")]
    Name,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back_what_they_show() {
        let id = VmId([0xab; 16]);
        assert_eq!(id.to_string().parse::<VmId>(), Ok(id));
        assert!("ab".parse::<VmId>().is_err());
        assert!("é".repeat(16).parse::<VmId>().is_err());
    }

    #[test]
    fn names_are_bounded() {
        assert!("web-1".parse::<Name>().is_ok());
        for bad in ["", "-a", "a-", "A", "a b", &"a".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }
}
