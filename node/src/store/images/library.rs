//! The table of the library, shared by its callers and the thread that indexes.
//!
//! Owns the entries and their way into hard state. Invariant: hard state is changed under the lock
//! of the table, so that both always list the same files; files are read without it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_protocol::id::CopyId;

use super::digests::Digests;
use super::entry::{Entry, Kept, Listed, Saved, Stamp};
use super::{FILES, IMAGES, Image, ImageError, Settings, State};
use crate::store::corpus::Corpus;
use crate::store::hard::{Hard, StoreError};
use crate::store::index_file;
use crate::store::pace::Pace;

const PREFIX: &[u8] = b"image/";
/// Bytes per second that indexing in the background reads at most.
const BACKGROUND: u64 = 200_000_000;
/// Bytes per second at which the memory of a VM that has just moved is written, at first.
const GENTLE: u64 = 50_000_000;
/// A live disk changes all the time: its index may be that old.
const LIVE: Duration = Duration::from_secs(60);
/// How long a file that could not be used and did not change is left alone.
const RETRY: Duration = Duration::from_secs(600);

/// What the lock protects.
#[derive(Default)]
pub struct Table {
    pub entries: BTreeMap<PathBuf, Entry>,
    /// What is to be indexed; bounded by the entries.
    pub queue: VecDeque<PathBuf>,
    /// What is being indexed.
    pub busy: Option<PathBuf>,
    pub stopped: bool,
    /// All files were looked at since the start.
    pub looked: bool,
    pub digests: Digests,
}

impl Table {
    /// What is queued or being read.
    pub fn pending(&self) -> BTreeSet<PathBuf> {
        self.queue.iter().chain(&self.busy).cloned().collect()
    }

    /// How many files are in the list.
    pub fn listed(&self) -> usize {
        self.entries.values().filter(|e| e.listed.is_some()).count()
    }
}

pub struct Library {
    pub hard: Arc<Hard>,
    pub corpus: Arc<Corpus>,
    pub settings: Settings,
    pub pace: Pace,
    /// Of the memory that is being written; freed when somebody waits for it.
    pub gentle: Pace,
    table: Mutex<Table>,
    /// The queue or what is being read has changed.
    pub changed: Condvar,
}

impl Library {
    pub fn open(
        hard: Arc<Hard>,
        corpus: Arc<Corpus>,
        settings: Settings,
    ) -> Result<Self, StoreError> {
        let mut table = Table { digests: Digests::read(&hard)?, ..Table::default() };
        for (key, value) in hard.scan(PREFIX)? {
            let path = PathBuf::from(OsStr::from_bytes(&key[PREFIX.len()..]));
            match Saved::decode(&value) {
                Ok(Saved { listed, stamp, digest }) => {
                    let entry = Entry { stamp, digest, ..Entry::new(Some(listed)) };
                    table.entries.insert(path, entry);
                }
                // The list is a convenience: losing a line of it must not stop a node.
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "image entry unreadable");
                }
            }
        }
        let (pace, gentle) = (Pace::new(BACKGROUND), Pace::new(GENTLE));
        let (table, changed) = (Mutex::new(table), Condvar::new());
        Ok(Self { hard, corpus, settings, pace, gentle, table, changed })
    }

    pub fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn index_dir(&self) -> PathBuf {
        self.settings.state.join("index")
    }

    pub fn stop(&self) {
        self.lock().stopped = true;
        self.pace.stop();
        self.gentle.set_free(true);
        self.changed.notify_all();
    }

    /// Puts a file into the table, or changes why it is there; answers why it was listed before.
    pub fn insert(
        &self,
        path: &Path,
        listed: Option<Listed>,
        copy: Option<CopyId>,
    ) -> Result<Option<Listed>, ImageError> {
        let mut table = self.lock();
        let old = table.entries.get(path);
        let before = old.and_then(|e| e.listed);
        let full = match listed {
            Some(_) => before.is_none() && table.listed() >= IMAGES,
            None => false,
        };
        if full || (old.is_none() && table.entries.len() >= FILES) {
            let files = if full { IMAGES } else { FILES };
            return Err(ImageError::unusable(
                path,
                format!("the library already has {files} files"),
            ));
        }
        if let Some(listed) = listed {
            let (stamp, digest) = old.map_or_else(Default::default, |e| (e.stamp, e.digest));
            self.save(path, &Saved { listed, stamp, digest })?;
        }
        let entry = table.entries.entry(path.to_owned()).or_insert_with(|| Entry::new(None));
        entry.listed = listed.or(entry.listed);
        entry.live.extend(copy);
        Ok(before)
    }

    /// Undoes an [`Library::insert`] that listed a file.
    pub fn put_back(&self, path: &Path, before: Option<Listed>) -> Result<(), ImageError> {
        let mut table = self.lock();
        let Some(entry) = table.entries.get_mut(path) else { return Ok(()) };
        let Some(listed) = before else {
            self.hard.put_many(&[(&key(path), None)])?;
            entry.listed = None;
            self.drop_unused(&mut table, path);
            return Ok(());
        };
        self.save(path, &Saved { listed, stamp: entry.stamp, digest: entry.digest })?;
        entry.listed = Some(listed);
        Ok(())
    }

    /// Writes an entry to hard state. Call it with the table locked.
    pub fn save(&self, path: &Path, saved: &Saved) -> Result<(), StoreError> {
        let value = saved.encode().map_err(|e| StoreError::Refused(format!("image entry: {e}")))?;
        self.hard.put_many(&[(&key(path), Some(&value))])
    }

    pub fn shown(&self, path: &Path) -> Option<Image> {
        self.lock().entries.get(path).map(|entry| entry.shown(path))
    }

    /// Forgets a file that no copy uses; answers whether it was deleted.
    pub fn forget(&self, path: &Path) -> Result<bool, ImageError> {
        let mut table = self.lock();
        let entry = table.entries.get_mut(path);
        let entry = entry.ok_or_else(|| ImageError::Unknown(path.to_owned()))?;
        if !entry.live.is_empty() {
            return Err(ImageError::Live(path.to_owned()));
        }
        self.hard.put_many(&[(&key(path), None)])?;
        let kept = entry.idle_kept();
        entry.listed = None;
        self.drop_unused(&mut table, path);
        drop(table);
        Ok(kept.is_some_and(|kept| delete(path, &kept)))
    }

    pub fn detach(&self, copy: CopyId) {
        let mut table = self.lock();
        let mut left = Vec::new();
        for (path, entry) in &mut table.entries {
            if entry.live.remove(&copy) {
                left.push(path.clone());
            }
        }
        left.iter().for_each(|path| self.drop_unused(&mut table, path));
    }

    /// Ends an entry that is neither listed nor a live disk.
    fn drop_unused(&self, table: &mut Table, path: &Path) {
        let unused = |e: &Entry| e.listed.is_none() && e.live.is_empty();
        if !table.entries.get(path).is_some_and(unused) {
            return;
        }
        if let Some(entry) = table.entries.remove(path) {
            table.queue.retain(|queued| queued != path);
            if let Some(source) = entry.source {
                self.corpus.remove(source);
            }
            if !table.entries.values().any(|e| e.stamp.same_file(&entry.stamp)) {
                index_file::remove(&self.index_dir(), &entry.stamp);
            }
            self.changed.notify_all();
        }
    }

    /// Looks at all files and answers with those to index. Drops those that are gone.
    pub fn look(&self) -> Vec<PathBuf> {
        let paths: Vec<PathBuf> = self.lock().entries.keys().cloned().collect();
        let looked: Vec<_> = paths
            .into_iter()
            .map(|path| {
                let now = std::fs::metadata(&path).map(|m| Stamp::of(&m));
                (path, now)
            })
            .collect();
        let mut table = self.lock();
        table.looked = true;
        let mut stale = Vec::new();
        for (path, now) in looked {
            let Some(entry) = table.entries.get_mut(&path) else { continue };
            match now {
                Ok(now) if !rests(entry, &now) => stale.push(path),
                Ok(_) => {}
                Err(error) => {
                    if let Some(source) = entry.source.take() {
                        self.corpus.remove(source);
                    }
                    entry.chunks = 0;
                    entry.tried = None;
                    entry.state = State::Dropped(error.to_string());
                }
            }
        }
        stale
    }

    /// Queues files for the thread that indexes.
    pub fn queue(&self, paths: impl IntoIterator<Item = PathBuf>) {
        let mut table = self.lock();
        self.enqueue(&mut table, paths);
    }

    /// The same, and all that is queued goes without pace.
    pub fn hurry(&self, paths: impl IntoIterator<Item = PathBuf>) {
        let mut table = self.lock();
        self.enqueue(&mut table, paths);
        // Ended by the thread when nothing is left to do.
        if !table.queue.is_empty() || table.busy.is_some() {
            self.pace.set_free(true);
        }
    }

    fn enqueue(&self, table: &mut Table, paths: impl IntoIterator<Item = PathBuf>) {
        for path in paths {
            let Some(entry) = table.entries.get_mut(&path) else { continue };
            entry.state = State::Indexing;
            if !table.queue.contains(&path) {
                table.queue.push_back(path);
            }
        }
        self.changed.notify_all();
    }

    /// Waits until none of `paths` is queued or being read; answers whether that is so.
    pub fn wait(&self, paths: BTreeSet<PathBuf>, deadline: Instant) -> bool {
        let mut table = self.lock();
        loop {
            if table.stopped {
                return false;
            }
            if table.pending().is_disjoint(&paths) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(table, left);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Whether a file in the state `now` need not be read.
fn rests(entry: &Entry, now: &Stamp) -> bool {
    let age = entry.tried.map(|at| at.elapsed());
    let younger = |than: Duration| age.is_some_and(|age| age < than);
    match entry.state {
        State::Dropped(_) => entry.stamp == *now && younger(RETRY),
        _ => entry.is_fresh(now) || (!entry.live.is_empty() && younger(LIVE)),
    }
}

/// Deletes a kept file, if godwit made it and it is still the same.
pub fn delete(path: &Path, kept: &Kept) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same = path.symlink_metadata().is_ok_and(|m| m.ino() == kept.ino);
    if !kept.owned || !same {
        return false;
    }
    let removed = std::fs::remove_file(path);
    if let Err(error) = &removed {
        tracing::warn!(path = %path.display(), %error, "kept file not deleted");
    }
    removed.is_ok()
}

pub fn key(path: &Path) -> Vec<u8> {
    [PREFIX, path.as_os_str().as_bytes()].concat()
}
