//! The image library: files that the operator named as sources of chunks.
//!
//! Owns the list (in hard state, under `image/`) and each file's place in the corpus. Never owns
//! the files: they may change or go at any time, then they are indexed again or dropped.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_protocol::wire::codec;
use serde::{Deserialize, Serialize};

use super::corpus::{Corpus, SourceId};
use super::hard::{Hard, StoreError};

const PREFIX: &[u8] = b"image/";
/// Longest encoded entry, bytes.
const ENTRY_BYTES: usize = 64;
/// Most files; less than the corpus's sources, so that VMs have room.
pub const IMAGES: usize = 128;

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    mtime_s: i64,
    mtime_ns: i64,
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self { bytes: meta.len(), mtime_s: meta.mtime(), mtime_ns: meta.mtime_nsec() }
    }
}

/// How far a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not read yet, or being read.
    Indexing,
    /// Its chunks can be used.
    Ready,
    /// Not used, with the cause.
    Dropped(String),
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Indexing => f.write_str("indexing"),
            Self::Ready => f.write_str("ready"),
            Self::Dropped(cause) => write!(f, "dropped: {cause}"),
        }
    }
}

/// One file of the library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// Its size when it was last looked at, bytes.
    pub bytes: u64,
    /// How far it is.
    pub state: State,
    /// Distinct non-zero chunks in the index.
    pub chunks: usize,
}

/// Why the library was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not a file that can be used.
    #[error("{path}: {cause}")]
    Unusable {
        /// The path as given.
        path: PathBuf,
        /// Why, and what to do.
        cause: String,
    },
    /// Not in the library.
    #[error("{0} is not in the image library: see godwit image list")]
    Unknown(PathBuf),
    /// The hard state failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

struct Entry {
    stamp: Stamp,
    state: State,
    source: Option<SourceId>,
    chunks: usize,
}

/// The image library of a host.
pub struct Images {
    hard: Arc<Hard>,
    corpus: Arc<Corpus>,
    entries: Mutex<BTreeMap<PathBuf, Entry>>,
    /// One file is indexed at a time. Taken before `entries`, never after.
    busy: Mutex<()>,
}

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Images").finish_non_exhaustive()
    }
}

impl Images {
    /// Reads the list. Nothing is indexed yet: call [`Images::refresh`] in the background.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(hard: Arc<Hard>, corpus: Arc<Corpus>) -> Result<Self, StoreError> {
        let mut entries = BTreeMap::new();
        for (key, value) in hard.scan(PREFIX)? {
            let path = PathBuf::from(OsStr::from_bytes(&key[PREFIX.len()..]));
            match codec::decode::<Stamp, ENTRY_BYTES>(&value) {
                Ok(stamp) => {
                    let entry = Entry { stamp, state: State::Indexing, source: None, chunks: 0 };
                    entries.insert(path, entry);
                }
                // The list is a convenience: losing a line of it must not stop a node.
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "image entry unreadable")
                }
            }
        }
        Ok(Self { hard, corpus, entries: Mutex::new(entries), busy: Mutex::new(()) })
    }

    /// Adds a file (or looks at it again) and indexes it before returning (blocks).
    ///
    /// # Errors
    /// [`ImageError`]; the library is as before.
    pub fn add(&self, path: &Path) -> Result<Image, ImageError> {
        let unusable = |cause: String| ImageError::Unusable { path: path.to_owned(), cause };
        if !path.is_absolute() {
            return Err(unusable("name the file with its absolute path".into()));
        }
        let path = path.canonicalize().map_err(|e| unusable(e.to_string()))?;
        {
            let entries = self.entries();
            if entries.len() >= IMAGES && !entries.contains_key(&path) {
                return Err(unusable(format!("the library already has {IMAGES} files")));
            }
        }
        let _busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let (stamp, source, chunks) = self.index(&path).map_err(unusable)?;
        if let Err(e) = self.keep(&path, stamp) {
            self.corpus.remove(source);
            return Err(e.into());
        }
        let entry = Entry { stamp, state: State::Ready, source: Some(source), chunks };
        let image = image(&path, &entry);
        self.replace(path, entry);
        Ok(image)
    }

    /// Looks at all files (blocks): new and changed ones are indexed, those that cannot be used any
    /// more are dropped from the corpus but stay listed. Call it at the start and when a migration
    /// is prepared; it costs one `stat` for a file that has not changed.
    pub fn refresh(&self) {
        let _busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let paths: Vec<PathBuf> = self.entries().keys().cloned().collect();
        for path in paths {
            let now = std::fs::metadata(&path).map(|m| Stamp::of(&m));
            {
                let mut entries = self.entries();
                let Some(entry) = entries.get_mut(&path) else { continue };
                if entry.state == State::Ready && now.as_ref().ok() == Some(&entry.stamp) {
                    continue;
                }
                // Reads are verified, so a stale index is only slow; but do not advertise it.
                entry.state = State::Indexing;
                entry.chunks = 0;
                if let Some(source) = entry.source.take() {
                    self.corpus.remove(source);
                }
            }
            let entry = match self.index(&path) {
                Ok((stamp, source, chunks)) => {
                    if let Err(error) = self.keep(&path, stamp) {
                        tracing::error!(path = %path.display(), %error, "image list not written");
                    }
                    Entry { stamp, state: State::Ready, source: Some(source), chunks }
                }
                Err(cause) => {
                    tracing::warn!(path = %path.display(), cause, "image not used");
                    let stamp = now.unwrap_or(Stamp { bytes: 0, mtime_s: 0, mtime_ns: 0 });
                    Entry { stamp, state: State::Dropped(cause), source: None, chunks: 0 }
                }
            };
            if self.entries().contains_key(&path) {
                self.replace(path, entry);
            } else if let Some(source) = entry.source {
                self.corpus.remove(source);
            }
        }
    }

    /// Forgets a file.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], [`ImageError::Store`]; the library is as before.
    pub fn remove(&self, path: &Path) -> Result<(), ImageError> {
        // A file that is gone cannot be canonicalised: then the path as given must be the listed one.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if !self.entries().contains_key(&path) {
            return Err(ImageError::Unknown(path));
        }
        self.hard.put_many(&[(&key(&path), None)])?;
        if let Some(source) = self.entries().remove(&path).and_then(|e| e.source) {
            self.corpus.remove(source);
        }
        Ok(())
    }

    /// All files, by path.
    #[must_use]
    pub fn list(&self) -> Vec<Image> {
        self.entries().iter().map(|(path, entry)| image(path, entry)).collect()
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, path: PathBuf, entry: Entry) {
        let old = self.entries().insert(path, entry);
        if let Some(source) = old.and_then(|e| e.source) {
            self.corpus.remove(source);
        }
    }

    fn keep(&self, path: &Path, stamp: Stamp) -> Result<(), StoreError> {
        let value = codec::encode(&stamp, ENTRY_BYTES)
            .map_err(|e| StoreError::Refused(format!("image entry: {e}")))?;
        self.hard.put_many(&[(&key(path), Some(&value))])
    }

    fn index(&self, path: &Path) -> Result<(Stamp, SourceId, usize), String> {
        let file = File::open(path).map_err(|e| e.to_string())?;
        let meta = file.metadata().map_err(|e| e.to_string())?;
        if !meta.is_file() {
            return Err("is no regular file".into());
        }
        let source = self.corpus.add_file(file).map_err(|e| e.to_string())?;
        Ok((Stamp::of(&meta), source, self.corpus.pages_of(source)))
    }
}

fn key(path: &Path) -> Vec<u8> {
    [PREFIX, path.as_os_str().as_bytes()].concat()
}

fn image(path: &Path, entry: &Entry) -> Image {
    Image {
        path: path.to_owned(),
        bytes: entry.stamp.bytes,
        state: entry.state.clone(),
        chunks: entry.chunks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_protocol::limits::CHUNK_BYTES;

    const KEY: [u8; 32] = [3; 32];

    fn library(state: &Path) -> (Images, Arc<Corpus>) {
        let corpus = Arc::new(Corpus::new(KEY, 1000));
        let hard = Arc::new(Hard::open(state).unwrap());
        (Images::open(hard, Arc::clone(&corpus)).unwrap(), corpus)
    }

    #[test]
    fn the_list_survives_and_follows_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let path = dir.path().canonicalize().unwrap().join("base.img");
        let page = |n: u8| [n; CHUNK_BYTES];
        std::fs::write(&path, [page(1), page(2), page(1)].concat()).unwrap();

        let (images, corpus) = library(&state);
        let added = images.add(&path).unwrap();
        assert_eq!((added.chunks, added.bytes, &added.state), (2, 12288, &State::Ready));
        assert_eq!(images.add(&path).unwrap(), added);
        assert_eq!(corpus.size().0, 2);
        drop(images);

        let (images, corpus) = library(&state);
        assert_eq!(images.list()[0].state, State::Indexing);
        images.refresh();
        assert_eq!(images.list(), [added]);
        assert!(corpus.has(&corpus.id_of(&page(2))));

        std::fs::write(&path, [page(9)].concat()).unwrap();
        images.refresh();
        assert_eq!((images.list()[0].chunks, images.list()[0].bytes), (1, 4096));
        assert!(!corpus.has(&corpus.id_of(&page(2))));

        std::fs::remove_file(&path).unwrap();
        images.refresh();
        assert!(matches!(images.list()[0].state, State::Dropped(_)));
        assert_eq!(corpus.size().0, 0);
        images.remove(&path).unwrap();
        assert!(matches!(images.remove(&path), Err(ImageError::Unknown(_))));
        drop(images);
        assert!(library(&state).0.list().is_empty());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (images, _) = library(&dir.path().join("state"));
        for path in [Path::new("relative.img"), Path::new("/nonexistent/x"), dir.path()] {
            assert!(images.add(path).is_err(), "{}", path.display());
        }
        assert!(images.list().is_empty());
    }
}
