//! Which file has which content, for backing files: they are found by content, not by path.
//!
//! Owns the digests of files outside the list (in hard state, under `digest/`). Invariant: a digest
//! is given out only while the file's stamp is the one that it was made of.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use godwit_protocol::wire::codec;

use super::ImageError;
use super::entry::{self, Stamp};
use super::library::Library;
use crate::store::hard::{Hard, StoreError};
use crate::store::pace::Pace;
use crate::store::scan;

const PREFIX: &[u8] = b"digest/";
/// Longest encoded entry, bytes.
const ENTRY_BYTES: usize = 96;
/// Most digests that are remembered.
const DIGESTS: usize = 128;

/// By path: the file's stamp and digest.
#[derive(Debug, Default)]
pub struct Digests(BTreeMap<PathBuf, (Stamp, [u8; 32])>);

impl Digests {
    pub fn read(hard: &Hard) -> Result<Self, StoreError> {
        let entries = hard.scan(PREFIX)?.into_iter().filter_map(|(key, value)| {
            let path = PathBuf::from(OsStr::from_bytes(&key[PREFIX.len()..]));
            // One that is unreadable is made again when it is asked for.
            Some((path, codec::decode::<_, ENTRY_BYTES>(&value).ok()?))
        });
        Ok(Self(entries.collect()))
    }
}

fn now(path: &Path) -> Option<Stamp> {
    std::fs::metadata(path).ok().map(|m| Stamp::of(&m))
}

impl Library {
    pub fn find(&self, digest: &[u8; 32], bytes: u64) -> Option<PathBuf> {
        let table = self.lock();
        let listed = table.entries.iter().filter(|(_, e)| e.wants_digest());
        let listed = listed.filter_map(|(path, e)| Some((path, &e.stamp, e.digest.as_ref()?)));
        let asked = table.digests.0.iter().map(|(path, (stamp, digest))| (path, stamp, digest));
        let same = |(_, s, d): &(&PathBuf, &Stamp, &[u8; 32])| *d == digest && s.bytes == bytes;
        let found = listed.chain(asked).filter(same).map(|(path, stamp, _)| (path.clone(), *stamp));
        let found: Vec<_> = found.collect();
        drop(table);
        found.into_iter().find(|(path, stamp)| now(path) == Some(*stamp)).map(|(path, _)| path)
    }

    pub fn digest_of(&self, path: &Path) -> Result<[u8; 32], ImageError> {
        let unusable = |e: std::io::Error| ImageError::unusable(path, e);
        let stamp = entry::settled(path).map_err(unusable)?;
        if let Some(known) = self.known(path, &stamp) {
            return Ok(known);
        }
        let file = File::open(path).map_err(unusable)?;
        let digest = scan::digest(&file, &Pace::free())
            .map_err(|e| ImageError::unusable(path, format!("cannot be read: {e:?}")))?;
        if now(path) != Some(stamp) {
            return Err(ImageError::unusable(path, "changed while it was read"));
        }
        self.remember(path, stamp, digest)?;
        Ok(digest)
    }

    fn known(&self, path: &Path, stamp: &Stamp) -> Option<[u8; 32]> {
        let table = self.lock();
        let listed = table.entries.get(path).and_then(|e| Some((e.stamp, e.digest?)));
        let known = listed.into_iter().chain(table.digests.0.get(path).copied());
        known.into_iter().find(|(of, _)| of == stamp).map(|(_, digest)| digest)
    }

    fn remember(&self, path: &Path, stamp: Stamp, digest: [u8; 32]) -> Result<(), StoreError> {
        let value = codec::encode(&(stamp, digest), ENTRY_BYTES)
            .map_err(|e| StoreError::Refused(format!("digest: {e}")))?;
        let mut table = self.lock();
        let known = &mut table.digests.0;
        // The first that is of no use any more makes room, else the first.
        let useless = known.iter().find(|(path, (stamp, _))| now(path) != Some(*stamp));
        let full = known.len() >= DIGESTS && !known.contains_key(path);
        let out = useless.or_else(|| known.iter().next()).filter(|_| full).map(|(p, _)| p.clone());
        let key = |path: &Path| [PREFIX, path.as_os_str().as_bytes()].concat();
        let mut changes = vec![(key(path), Some(value))];
        changes.extend(out.iter().map(|path| (key(path), None)));
        let changes: Vec<_> = changes.iter().map(|(k, v)| (&k[..], v.as_deref())).collect();
        self.hard.put_many(&changes)?;
        if let Some(out) = out {
            known.remove(&out);
        }
        known.insert(path.to_owned(), (stamp, digest));
        Ok(())
    }
}
