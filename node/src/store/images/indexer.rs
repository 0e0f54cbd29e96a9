//! The thread that indexes: one file at a time, at low priority and at a pace.
//!
//! Owns the thread and the way from a file to its index: loaded if there is one of this state of the
//! file, else made by reading it. Never promises: the files change under it.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::State;
use super::entry::{self, Saved, Stamp};
use super::kept::wall_s;
use super::library::Library;
use crate::store::corpus::{CorpusError, SourceId};
use crate::store::index_file;

/// How often what is kept is looked through.
const PRUNE: Duration = Duration::from_secs(60);
/// The thread's and its helpers' place behind everything else: guests, migrations, votes.
const NICE: i32 = 10;

/// Starts it; it ends after [`Library::stop`].
pub fn spawn(library: Arc<Library>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("godwit-index".into()).spawn(move || run(&library))
}

enum Work {
    Index(PathBuf),
    Sweep,
    Prune,
    Stop,
}

fn run(library: &Library) {
    // SAFETY: plain system calls on numbers; threads that this one starts inherit the value.
    let lowered =
        unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid().cast_unsigned(), NICE) };
    if lowered != 0 {
        tracing::debug!("indexing goes on at ordinary priority");
    }
    let mut pruned = Instant::now();
    let mut swept = false;
    library.prune(wall_s());
    loop {
        match next(library, pruned + PRUNE, swept) {
            Work::Index(path) => {
                index(library, &path);
                library.lock().busy = None;
                library.changed.notify_all();
            }
            Work::Sweep => {
                swept = true;
                sweep(library);
            }
            Work::Prune => {
                pruned = Instant::now();
                library.prune(wall_s());
            }
            Work::Stop => return,
        }
    }
}

fn next(library: &Library, prune: Instant, swept: bool) -> Work {
    let mut table = library.lock();
    loop {
        if table.stopped {
            return Work::Stop;
        }
        let left = prune.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Work::Prune;
        }
        if let Some(path) = table.queue.pop_front() {
            table.busy = Some(path.clone());
            return Work::Index(path);
        }
        library.pace.set_free(false);
        if table.looked && !swept {
            return Work::Sweep;
        }
        let waited = library.changed.wait_timeout(table, left);
        table = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Removes the index files of files that are in the library no more.
fn sweep(library: &Library) {
    let named: BTreeSet<String> =
        library.lock().entries.values().map(|e| index_file::name(&e.stamp)).collect();
    index_file::sweep(&library.index_dir(), &named);
}

/// What reading a file gave.
struct Indexed {
    stamp: Stamp,
    source: SourceId,
    chunks: usize,
    digest: Option<[u8; 32]>,
}

/// How the library knew a file before it is read.
struct Known {
    stamp: Stamp,
    source: Option<SourceId>,
    digest: Option<[u8; 32]>,
    wants_digest: bool,
}

fn index(library: &Library, path: &Path) {
    let known = match library.lock().entries.get(path) {
        Some(e) => Known {
            stamp: e.stamp,
            source: e.source,
            digest: e.digest,
            wants_digest: e.wants_digest(),
        },
        None => return,
    };
    let indexed = match indexed(library, path, &known) {
        Err(CorpusError::Stopped) => return,
        other => other,
    };
    let mut table = library.lock();
    let Some(entry) = table.entries.get_mut(path) else {
        // Removed meanwhile, and with it the source that it had.
        if let Ok(new) = indexed {
            library.corpus.remove(new.source);
            index_file::remove(&library.index_dir(), &new.stamp);
        }
        return;
    };
    let old = entry.source;
    entry.tried = Some(Instant::now());
    match indexed {
        Ok(new) => {
            if !known.stamp.same_file(&new.stamp) {
                index_file::remove(&library.index_dir(), &known.stamp);
            }
            (entry.stamp, entry.digest) = (new.stamp, new.digest);
            (entry.source, entry.chunks) = (Some(new.source), new.chunks);
            entry.state = State::Ready;
        }
        Err(cause) => {
            tracing::warn!(path = %path.display(), %cause, "image not used");
            entry.stamp = std::fs::metadata(path).map(|m| Stamp::of(&m)).unwrap_or_default();
            (entry.source, entry.chunks, entry.digest) = (None, 0, None);
            entry.state = State::Dropped(cause.to_string());
        }
    }
    if let Some(old) = old
        && entry.source != Some(old)
    {
        library.corpus.remove(old);
    }
    if let Some(listed) = entry.listed
        && let Err(error) =
            library.save(path, &Saved { listed, stamp: entry.stamp, digest: entry.digest })
    {
        tracing::error!(path = %path.display(), %error, "image list not written");
    }
}

/// Indexes a file under the source that it has, if it is still the same file, else a new one.
fn indexed(library: &Library, path: &Path, known: &Known) -> Result<Indexed, CorpusError> {
    let stamp = entry::settled(path)?;
    let file = open(path)?;
    let same = known.source.filter(|_| known.stamp.same_file(&stamp));
    let source = match same {
        Some(source) => source,
        None => library.corpus.add_memory(Arc::new(file.try_clone()?))?,
    };
    let made = fill(library, &file, source, stamp, known);
    if made.is_err() && same.is_none() {
        library.corpus.remove(source);
    }
    made
}

fn fill(
    library: &Library,
    file: &File,
    source: SourceId,
    stamp: Stamp,
    known: &Known,
) -> Result<Indexed, CorpusError> {
    let (corpus, dir) = (&library.corpus, library.index_dir());
    let digest = known.digest.filter(|_| known.stamp == stamp);
    let room = corpus.room(corpus.pages_of(source));
    if (digest.is_some() || !known.wants_digest)
        && let Some(index) = index_file::load(&dir, corpus.key(), &stamp, room)
    {
        let chunks = corpus.install(source, Arc::new(index))?;
        return Ok(Indexed { stamp, source, chunks, digest });
    }
    let (index, digest) = corpus.index_of(source, &library.pace, known.wants_digest)?;
    let chunks = corpus.install(source, Arc::clone(&index))?;
    // Reads are verified, so the index of a file that changed meanwhile serves; but it is no index
    // and no digest of the state that the file is in: the next look reads it again.
    let unchanged = Stamp::of(&file.metadata()?) == stamp;
    if unchanged && let Err(error) = index_file::save(&dir, corpus.key(), &stamp, &index) {
        tracing::warn!(%error, "index not written: it will be made again after a restart");
    }
    Ok(Indexed { stamp, source, chunks, digest: digest.filter(|_| unchanged) })
}

/// Opens a file that was a regular one a moment ago, and does not wait if it is no more.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}
