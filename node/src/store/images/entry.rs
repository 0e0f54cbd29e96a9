//! What is known of one file of the library, and how that is kept in hard state.
//!
//! Owns the form of an entry; old forms still decode.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use godwit_protocol::id::{CopyId, VmId};
use godwit_protocol::wire::codec::{self, CodecError};
use serde::{Deserialize, Serialize};

use super::{Image, Kind, State};
use crate::store::corpus::SourceId;

/// Longest encoded entry, bytes.
const ENTRY_BYTES: usize = 192;
/// Begins what is no entry of the first form: that begins with a number, and none begins so.
const SECOND_FORM: u8 = 255;
/// Coarsest step of a file system's time.
const MTIME_STEP: Duration = Duration::from_millis(20);

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stamp {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
    /// Length, bytes.
    pub bytes: u64,
    /// Time of the last change, seconds since 1970.
    pub mtime_s: i64,
    /// And nanoseconds.
    pub mtime_ns: i64,
}

impl Stamp {
    /// The stamp of a file in this state.
    #[must_use]
    pub fn of(meta: &Metadata) -> Self {
        Self {
            dev: meta.dev(),
            ino: meta.ino(),
            bytes: meta.len(),
            mtime_s: meta.mtime(),
            mtime_ns: meta.mtime_nsec(),
        }
    }

    /// Whether both are of one file, in whatever state.
    #[must_use]
    pub fn same_file(&self, other: &Self) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }
}

/// The stamp of a file that is about to be read: any later write will change it.
///
/// # Errors
/// If there is no such file or it is no regular one.
pub fn settled(path: &Path) -> io::Result<Stamp> {
    let look = || {
        let meta = std::fs::metadata(path)?;
        if meta.is_file() { Ok(meta) } else { Err(io::Error::other("is no regular file")) }
    };
    let meta = look()?;
    // The kernel's clock for files goes in steps: a write within the same step leaves no trace.
    let age = meta.modified().ok().and_then(|m| SystemTime::now().duration_since(m).ok());
    if age.is_some_and(|age| age >= MTIME_STEP) {
        return Ok(Stamp::of(&meta));
    }
    std::thread::sleep(MTIME_STEP);
    Ok(Stamp::of(&look()?))
}

/// Why a kept file is here, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Whose content it is.
    pub vm: VmId,
    /// Whether the file is deleted with its entry.
    pub owned: bool,
    /// The inode that was given: a file that took its place is not ours to delete.
    pub ino: u64,
    /// Bytes that it takes on the disk.
    pub allocated: u64,
    /// When, seconds since 1970.
    pub kept_at_s: u64,
    /// Until when, seconds since 1970.
    pub expires_s: u64,
}

/// Why a file is in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Listed {
    /// The operator named it.
    Image,
    /// A disk that is of use no more.
    KeptDisk(Kept),
    /// Memory that is of use no more.
    KeptMemory(Kept),
    /// A disk of a move that did not end here, for the next try.
    DiskInVain(Kept),
    /// Such memory.
    MemoryInVain(Kept),
}

impl Listed {
    /// The terms, of what is kept.
    pub fn kept(&self) -> Option<&Kept> {
        match self {
            Self::Image => None,
            Self::KeptDisk(kept)
            | Self::KeptMemory(kept)
            | Self::DiskInVain(kept)
            | Self::MemoryInVain(kept) => Some(kept),
        }
    }

    /// Whether it waits for the next try of a move.
    pub fn in_vain(&self) -> bool {
        matches!(self, Self::DiskInVain(_) | Self::MemoryInVain(_))
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Image => Kind::Image,
            Self::KeptDisk(_) | Self::DiskInVain(_) => Kind::KeptDisk,
            Self::KeptMemory(_) | Self::MemoryInVain(_) => Kind::KeptMemory,
        }
    }
}

/// What is in hard state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub listed: Listed,
    /// What the digest is of.
    pub stamp: Stamp,
    pub digest: Option<[u8; 32]>,
}

/// The first form: files that the operator named, nothing else.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
struct First {
    bytes: u64,
    mtime_s: i64,
    mtime_ns: i64,
}

impl Saved {
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        let mut bytes = vec![SECOND_FORM];
        bytes.extend(codec::encode(self, ENTRY_BYTES)?);
        Ok(bytes)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        if let Some((&SECOND_FORM, rest)) = bytes.split_first() {
            return codec::decode::<_, ENTRY_BYTES>(rest);
        }
        let First { bytes, mtime_s, mtime_ns } = codec::decode::<_, ENTRY_BYTES>(bytes)?;
        let stamp = Stamp { bytes, mtime_s, mtime_ns, ..Stamp::default() };
        Ok(Self { listed: Listed::Image, stamp, digest: None })
    }
}

/// One file.
#[derive(Debug)]
pub struct Entry {
    /// Why it stays in the list; none: only while copies use it.
    pub listed: Option<Listed>,
    /// The copies whose disk it is.
    pub live: BTreeSet<CopyId>,
    /// What was indexed, and what the digest is of.
    pub stamp: Stamp,
    pub digest: Option<[u8; 32]>,
    pub state: State,
    pub source: Option<SourceId>,
    pub chunks: usize,
    /// When it was read last, or was tried to.
    pub tried: Option<Instant>,
}

impl Entry {
    pub fn new(listed: Option<Listed>) -> Self {
        Self {
            listed,
            live: BTreeSet::new(),
            stamp: Stamp::default(),
            digest: None,
            state: State::Indexing,
            source: None,
            chunks: 0,
            tried: None,
        }
    }

    pub fn kind(&self) -> Kind {
        match &self.listed {
            _ if !self.live.is_empty() => Kind::Disk,
            listed => listed.as_ref().map_or(Kind::Image, Listed::kind),
        }
    }

    /// Whether a digest of all its bytes is of use: others may ask for the file by it.
    pub fn wants_digest(&self) -> bool {
        self.listed == Some(Listed::Image) && self.live.is_empty()
    }

    /// Whether the index is of this state of the file.
    pub fn is_fresh(&self, now: &Stamp) -> bool {
        let digest = !self.wants_digest() || self.digest.is_some();
        self.source.is_some() && self.stamp == *now && digest
    }

    /// The terms, of what is kept and not in use.
    pub fn idle_kept(&self) -> Option<Kept> {
        self.listed.as_ref().and_then(Listed::kept).filter(|_| self.live.is_empty()).copied()
    }

    /// Whether it waits for the next try of a move.
    pub fn in_vain(&self) -> bool {
        self.listed.as_ref().is_some_and(Listed::in_vain)
    }

    pub fn shown(&self, path: &Path) -> Image {
        let meta = std::fs::metadata(path).ok();
        let kept = self.listed.as_ref().and_then(Listed::kept);
        Image {
            path: PathBuf::from(path),
            kind: self.kind(),
            bytes: meta.as_ref().map_or(self.stamp.bytes, Metadata::len),
            allocated: meta.map_or(0, |m| m.blocks() * 512),
            state: self.state.clone(),
            chunks: self.chunks,
            vm: kept.map(|k| k.vm),
            expires_s: kept.map(|k| k.expires_s),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_decode() {
        let first = First { bytes: u64::MAX, mtime_s: -1, mtime_ns: 7 };
        let saved = Saved::decode(&codec::encode(&first, ENTRY_BYTES).unwrap()).unwrap();
        let stamp = Stamp { bytes: u64::MAX, mtime_s: -1, mtime_ns: 7, ..Stamp::default() };
        assert_eq!(saved, Saved { listed: Listed::Image, stamp, digest: None });
        let most = u64::MAX;
        let kept = Kept {
            vm: VmId([9; 16]),
            owned: true,
            ino: most,
            allocated: most,
            kept_at_s: most,
            expires_s: most,
        };
        let stamp = Stamp { dev: most, ino: most, bytes: most, mtime_s: -1, mtime_ns: i64::MIN };
        let largest = Saved { listed: Listed::MemoryInVain(kept), stamp, digest: Some([1; 32]) };
        let bytes = largest.encode().unwrap();
        assert_eq!(Saved::decode(&bytes).unwrap(), largest);
        for cut in 0..bytes.len() {
            assert!(Saved::decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }
}
