//! The image library: files whose chunks this host can produce.
//!
//! Owns the list (in hard state, under `image/`), each file's place in the corpus, the thread that
//! indexes, and the files that godwit made and keeps for a time. Never owns the operator's files:
//! they may change or go at any time, then they are indexed again or dropped, and nothing here
//! deletes or writes them.
//! Invariant: only a file that was kept as owned is ever deleted, and only while it is still the
//! file that was given.

mod digests;
mod entry;
mod indexer;
mod kept;
mod library;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use godwit_protocol::id::{CopyId, VmId};

use self::entry::Listed;
pub use self::entry::Stamp;
use self::library::Library;
use super::corpus::Corpus;
use super::hard::{Hard, StoreError};
use super::source::ReadAt;

/// Most files that are in the list.
pub const IMAGES: usize = 128;
/// Most files with the disks of live VMs; less than the corpus's sources, so that memory has room.
pub const FILES: usize = 192;
/// How long a file that the operator adds may take.
const ADD: Duration = Duration::from_secs(55 * 60);

/// What a file is to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The operator named it.
    Image,
    /// The disk of a VM that is on this host.
    Disk,
    /// The disk of a VM that moved away, or that was received in vain.
    KeptDisk,
    /// The memory of such a VM.
    KeptMemory,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Image => "image",
            Self::Disk => "disk",
            Self::KeptDisk => "kept-disk",
            Self::KeptMemory => "kept-memory",
        })
    }
}

/// How far a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not read yet, or being read again: an older index serves meanwhile.
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
    /// What it is to this host.
    pub kind: Kind,
    /// Its length, bytes; that of its last index if it is gone.
    pub bytes: u64,
    /// What it takes on the disk, bytes.
    pub allocated: u64,
    /// How far it is.
    pub state: State,
    /// Distinct non-zero chunks in the index.
    pub chunks: usize,
    /// Whose it was, of what is kept.
    pub vm: Option<VmId>,
    /// Until when it is kept, seconds since 1970.
    pub expires_s: Option<u64>,
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
    /// In use.
    #[error("{0} is a disk of a VM on this host: it stays in the library while the VM is here")]
    Live(PathBuf),
    /// The hard state failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ImageError {
    fn unusable(path: &Path, cause: impl std::fmt::Display) -> Self {
        Self::Unusable { path: path.to_owned(), cause: cause.to_string() }
    }
}

/// How the library is kept.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The state directory: `index/` and `kept/` are made in it.
    pub state: PathBuf,
    /// How long is kept what moved away.
    pub keep: Duration,
    /// How much of it, bytes on the disk; 0: nothing of what moved away.
    pub keep_bytes: u64,
    /// Bytes that may still be written where a path lies.
    pub room: fn(&Path) -> std::io::Result<u64>,
}

impl Settings {
    /// What is kept unless the operator says otherwise: 20 GiB for a day.
    #[must_use]
    pub fn new(state: PathBuf, room: fn(&Path) -> std::io::Result<u64>) -> Self {
        Self { state, keep: Duration::from_secs(24 * 3600), keep_bytes: 20 << 30, room }
    }
}

/// On what terms a file is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// Whose content it is.
    pub vm: VmId,
    /// Whether godwit made the file: then it gets mode 0600, and is deleted with its entry.
    pub owned: bool,
    /// Received by a move that did not end here: it waits for the next try for an hour, whatever the
    /// [`Settings`] say.
    pub in_vain: bool,
}

/// The image library of a host. Everything here may block for some file operations, and what is
/// said to block does so for longer.
pub struct Images {
    library: Arc<Library>,
    indexer: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Images").finish_non_exhaustive()
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        self.library.stop();
        if let Some(indexer) = self.indexer.take() {
            // It ends after the buffer that it reads; a panic of it was printed.
            let _ = indexer.join();
        }
    }
}

impl Images {
    /// Reads the list and starts the thread that indexes. Nothing is indexed yet: call
    /// [`Images::refresh`] when the disks of live VMs are attached.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(
        hard: Arc<Hard>,
        corpus: Arc<Corpus>,
        settings: Settings,
    ) -> Result<Self, StoreError> {
        let library = Arc::new(Library::open(hard, corpus, settings)?);
        library.sweep_kept();
        let indexer = indexer::spawn(Arc::clone(&library))
            .map_err(|e| StoreError::Failed(format!("no thread to index with: {e}")))?;
        Ok(Self { library, indexer: Some(indexer) })
    }

    /// Adds a file (or looks at it again) and indexes it before returning (blocks, without pace).
    /// What was kept becomes the operator's: it expires no more.
    ///
    /// # Errors
    /// [`ImageError`]; the library is as before.
    pub fn add(&self, path: &Path) -> Result<Image, ImageError> {
        let path = file(path)?;
        let library = &self.library;
        let before = library.insert(&path, Some(Listed::Image), None)?;
        library.hurry([path.clone()]);
        let done = library.wait([path.clone()].into(), Instant::now() + ADD);
        let image = library.shown(&path).ok_or_else(|| ImageError::Unknown(path.clone()))?;
        let cause = match image.state {
            State::Dropped(ref cause) => cause.clone(),
            State::Indexing if !done => "reading it takes too long".into(),
            _ => return Ok(image),
        };
        library.put_back(&path, before)?;
        Err(ImageError::unusable(&path, cause))
    }

    /// Forgets a file, and deletes it if it was kept as owned: answers whether it was.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], [`ImageError::Live`], [`ImageError::Store`]; the library is as before.
    pub fn remove(&self, path: &Path) -> Result<bool, ImageError> {
        // A file that is gone cannot be canonicalised: then the path as given must be the listed one.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        self.library.forget(&path)
    }

    /// All files, by path.
    #[must_use]
    pub fn list(&self) -> Vec<Image> {
        self.library.lock().entries.iter().map(|(path, entry)| entry.shown(path)).collect()
    }

    /// Says that a file is a disk of a copy on this host: it is indexed in the background, and
    /// stays in the library until [`Images::detach_disks`]. Not kept across restarts: who finds the
    /// living copies says it again.
    ///
    /// # Errors
    /// [`ImageError`]; the library is as before.
    pub fn attach_disk(&self, path: &Path, copy: CopyId) -> Result<(), ImageError> {
        let path = file(path)?;
        self.library.insert(&path, None, Some(copy))?;
        self.library.queue([path]);
        Ok(())
    }

    /// Says that a copy's disks are of no use to it any more. Do so before they are renamed or kept.
    pub fn detach_disks(&self, copy: CopyId) {
        self.library.detach(copy);
    }

    /// Keeps a file as a source for the time and within the bound of the [`Settings`]; older ones
    /// make room. An owned one is deleted at once if it is not kept (the bound is 0, or less than the
    /// file), which is answered with none. In vain, it takes the place of what earlier tries left of
    /// the same disk, unless that is more.
    ///
    /// # Errors
    /// [`ImageError`]; the file and the library are as before.
    pub fn keep(&self, path: &Path, kind: Kind, keep: Keep) -> Result<Option<Image>, ImageError> {
        self.library.keep(&file(path)?, kind, keep, kept::wall_s())
    }

    /// Writes memory to a file of its own and keeps it: holes and pages of zeros stay holes
    /// (blocks). None: it is not kept, as with [`Images::keep`], or there is no room for it.
    ///
    /// # Errors
    /// [`ImageError`]; nothing was kept.
    pub fn keep_memory(
        &self,
        memory: &dyn ReadAt,
        vm: VmId,
        copy: CopyId,
        in_vain: bool,
    ) -> Result<Option<Image>, ImageError> {
        self.library.keep_memory(memory, vm, copy, in_vain)
    }

    /// Somebody waits for memory that is being written: it goes without pace.
    pub fn hurry_memory(&self) {
        self.library.gentle.set_free(true);
    }

    /// Ends what was kept for the next try of a move of this VM: one has ended here.
    pub fn end_in_vain(&self, vm: VmId) {
        self.library.end_in_vain(vm, |_, _| true);
    }

    /// Bytes that [`Images::give_up`] could free where `dir` lies.
    #[must_use]
    pub fn spare_bytes(&self, dir: &Path) -> u64 {
        self.library.spare_bytes(dir)
    }

    /// Frees `bytes` where `dir` lies of what is only kept, the oldest first, that of the VM `last` after
    /// all else. False: there is not as much, and nothing was deleted.
    #[must_use]
    pub fn give_up(&self, dir: &Path, bytes: u64, last: VmId) -> bool {
        self.library.give_up(dir, bytes, last)
    }

    /// Ends the keeping of what is older than its time at `now_s` (seconds since 1970), or over the
    /// bound, the oldest first; answers how many. Called from within once a minute.
    pub fn prune(&self, now_s: u64) -> usize {
        self.library.prune(now_s)
    }

    /// Looks at all files: new and changed ones are indexed in the background, those that cannot be
    /// used any more are dropped from the corpus but stay listed. One `stat` for each file.
    pub fn refresh(&self) {
        let stale = self.library.look();
        self.library.queue(stale);
    }

    /// The same for a migration that is being prepared: what is to be indexed is, without pace.
    /// See [`Images::wait_indexed`].
    pub fn hurry(&self) {
        let stale = self.library.look();
        self.library.hurry(stale);
    }

    /// Waits until everything is indexed that is queued now (blocks); answers whether it is.
    #[must_use]
    pub fn wait_indexed(&self, deadline: Instant) -> bool {
        let pending = self.library.lock().pending();
        self.library.wait(pending, deadline)
    }

    /// A file with this content (plain BLAKE3 of all `bytes` of it): one that the operator named, or
    /// one that [`Images::digest_of`] was asked about. Its content was hashed when it was in the
    /// state that it is in now.
    #[must_use]
    pub fn find(&self, digest: &[u8; 32], bytes: u64) -> Option<PathBuf> {
        self.library.find(digest, bytes)
    }

    /// Plain BLAKE3 of a whole file (blocks; remembered, across restarts, while the file's stamp is
    /// the same). From then on [`Images::find`] finds it.
    ///
    /// # Errors
    /// [`ImageError::Unusable`]: no such file, or it changed meanwhile.
    pub fn digest_of(&self, path: &Path) -> Result<[u8; 32], ImageError> {
        self.library.digest_of(&file(path)?)
    }
}

/// The one path of a regular file.
fn file(path: &Path) -> Result<PathBuf, ImageError> {
    if !path.is_absolute() {
        return Err(ImageError::unusable(path, "name the file with its absolute path"));
    }
    let unusable = |e: std::io::Error| ImageError::unusable(path, e);
    let real = path.canonicalize().map_err(unusable)?;
    if real.metadata().map_err(unusable)?.is_file() {
        return Ok(real);
    }
    Err(ImageError::unusable(path, "is no regular file"))
}
