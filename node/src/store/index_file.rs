//! The index of a file, kept on the disk: after a restart the file need not be read again.
//!
//! Owns `<state>/index/`: one file of mode 0600 for each indexed file, named by its device and inode,
//! so that a renamed file keeps its index. Never believed: an index that is damaged, of another
//! state of the file, or of another swarm's key is as good as none, and the file is read.
//!
//! ```text
//! magic, stamp, counts (64 bytes) | keys and numbers of chunks | the same of extents | keyed hash
//! ```

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use godwit_protocol::chunk::ChunkKey;

use super::images::Stamp;
use super::index::{Index, SourceIndex};

const MAGIC: &[u8; 8] = b"godwitx1";
const HEAD: usize = 8 + 5 * 8 + 2 * 8;
const HASH: usize = 32;
/// Bytes of a key and its number.
const PAIR: u64 = 12;
/// Most bytes of all index files together: twice what the index in memory can need.
const TOTAL_BYTES: u64 = 512 << 20;
/// What is read at a time, bytes.
const BUFFER: usize = 64 << 10;

/// The name of the file for a file with this stamp.
#[must_use]
pub fn name(stamp: &Stamp) -> String {
    format!("{:x}-{:x}.idx", stamp.dev, stamp.ino)
}

fn hasher(key: &ChunkKey) -> blake3::Hasher {
    blake3::Hasher::new_keyed(&blake3::derive_key("godwit 2026 index file", &key.0))
}

fn head(stamp: &Stamp, index: &SourceIndex) -> [u8; HEAD] {
    let mut head = [0_u8; HEAD];
    head[..8].copy_from_slice(MAGIC);
    let counts = [index.chunks.len() as u64, index.extents.len() as u64];
    let stamp = [
        stamp.dev,
        stamp.ino,
        stamp.bytes,
        stamp.mtime_s.cast_unsigned(),
        stamp.mtime_ns.cast_unsigned(),
    ];
    for (place, word) in head[8..].chunks_exact_mut(8).zip(stamp.into_iter().chain(counts)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    head
}

/// Writes the index of a file in that state: under another name first, which is flushed and then
/// renamed.
///
/// # Errors
/// If it cannot be written or the directory is full; an older index of the file may be gone.
pub fn save(dir: &Path, key: &ChunkKey, stamp: &Stamp, index: &SourceIndex) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let path = dir.join(name(stamp));
    let _ = std::fs::remove_file(&path);
    let pairs = (index.chunks.len() + index.extents.len()) as u64;
    let bytes = HEAD as u64 + pairs * PAIR + HASH as u64;
    if total(dir)? + bytes > TOTAL_BYTES {
        return Err(io::Error::other(format!("index files are bounded to {TOTAL_BYTES} bytes")));
    }
    let temporary = path.with_extension("tmp");
    let _ = std::fs::remove_file(&temporary);
    let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
    let written = write(&file, key, &head(stamp, index), index)
        .and_then(|()| std::fs::rename(&temporary, &path))
        .and_then(|()| File::open(dir)?.sync_all());
    written.inspect_err(|_| drop(std::fs::remove_file(&temporary)))
}

fn write(file: &File, key: &ChunkKey, head: &[u8], index: &SourceIndex) -> io::Result<()> {
    let mut out = Hashed { inner: BufWriter::with_capacity(BUFFER, file), hasher: hasher(key) };
    out.put(head)?;
    for part in [&index.chunks, &index.extents] {
        part.keys().iter().try_for_each(|key| out.put(&key.to_le_bytes()))?;
        part.pages().iter().try_for_each(|page| out.put(&page.to_le_bytes()))?;
    }
    let hash = *out.hasher.finalize().as_bytes();
    out.inner.write_all(&hash)?;
    out.inner.flush()?;
    file.sync_all()
}

/// The index of a file in that state, of at most `pages_max` chunks; none: it must be read.
#[must_use]
pub fn load(dir: &Path, key: &ChunkKey, stamp: &Stamp, pages_max: usize) -> Option<SourceIndex> {
    let file = File::open(dir.join(name(stamp))).ok()?;
    let bytes = file.metadata().ok()?.len();
    let mut input = Hashed { inner: BufReader::with_capacity(BUFFER, file), hasher: hasher(key) };
    let mut found = [0_u8; HEAD];
    input.get(&mut found)?;
    let count = |at: usize| {
        let mut word = [0_u8; 8];
        word.copy_from_slice(&found[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let (chunks, extents) = (count(HEAD - 16), count(HEAD - 8));
    // Nothing is allocated for what the file cannot hold.
    let pairs = chunks.checked_add(extents)?;
    let expected = pairs.checked_mul(PAIR)?.checked_add((HEAD + HASH) as u64)?;
    if bytes != expected || bytes > TOTAL_BYTES || chunks > pages_max as u64 {
        return None;
    }
    let chunks = input.index(usize::try_from(chunks).ok()?)?;
    let extents = input.index(usize::try_from(extents).ok()?)?;
    let index = SourceIndex { chunks, extents };
    let hash = input.hasher.finalize();
    let mut told = [0_u8; HASH];
    input.inner.read_exact(&mut told).ok()?;
    // Constant time is not needed, but it is what comparing hashes does.
    (hash == blake3::Hash::from_bytes(told) && found == head(stamp, &index)).then_some(index)
}

/// Removes the index of a file, if there is one.
pub fn remove(dir: &Path, stamp: &Stamp) {
    // What cannot be removed now is swept at the next start.
    let _ = std::fs::remove_file(dir.join(name(stamp)));
}

/// Removes all that is not named.
pub fn sweep(dir: &Path, named: &BTreeSet<String>) {
    for path in files(dir).unwrap_or_default() {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if !named.contains(name)
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "index file not removed");
        }
    }
}

fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}

fn total(dir: &Path) -> io::Result<u64> {
    Ok(files(dir)?.iter().filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum())
}

/// A stream of which everything is hashed.
struct Hashed<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<T: Write> Hashed<T> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.inner.write_all(bytes)
    }
}

impl<T: Read> Hashed<T> {
    fn get(&mut self, bytes: &mut [u8]) -> Option<()> {
        self.inner.read_exact(bytes).ok()?;
        self.hasher.update(bytes);
        Some(())
    }

    fn index(&mut self, len: usize) -> Option<Index> {
        let keys = self.words(len, u64::from_le_bytes)?;
        let pages = self.words(len, u32::from_le_bytes)?;
        Index::from_parts(keys, pages)
    }

    fn words<W, const N: usize>(&mut self, len: usize, word: fn([u8; N]) -> W) -> Option<Vec<W>> {
        let mut words = Vec::with_capacity(len);
        let mut buffer = vec![0_u8; BUFFER];
        while words.len() < len {
            let bytes = ((len - words.len()) * N).min(BUFFER);
            let part = buffer.get_mut(..bytes)?;
            self.get(part)?;
            let (parts, _) = part.as_chunks::<N>();
            words.extend(parts.iter().map(|part| word(*part)));
        }
        Some(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const KEY: ChunkKey = ChunkKey([4; 32]);
    const STAMP: Stamp = Stamp { dev: 1, ino: 0xab, bytes: 3, mtime_s: -4, mtime_ns: 5 };

    fn index(n: u64) -> SourceIndex {
        let pairs = |n: u64| (0..n).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15), i as u32));
        SourceIndex {
            chunks: Index::build(pairs(n).collect()),
            extents: Index::build(pairs(n / 16).collect()),
        }
    }

    fn same(a: &SourceIndex, b: &SourceIndex) -> bool {
        let parts = |i: &SourceIndex| {
            [&i.chunks, &i.extents].map(|i| (i.keys().to_vec(), i.pages().to_vec()))
        };
        parts(a) == parts(b)
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("index");
        for n in [0, 1, 40, 100_000] {
            save(&dir, &KEY, &STAMP, &index(n)).unwrap();
            let loaded = load(&dir, &KEY, &STAMP, 100_000).unwrap();
            assert!(same(&loaded, &index(n)), "{n}");
        }
        let path = dir.join("1-ab.idx");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(files(&dir).unwrap().len(), 1);
        assert!(load(&dir, &KEY, &STAMP, 99_999).is_none(), "no room");
        assert!(load(&dir, &ChunkKey([5; 32]), &STAMP, 100_000).is_none(), "another key");
        let later = Stamp { mtime_ns: 6, ..STAMP };
        assert!(load(&dir, &KEY, &later, 100_000).is_none(), "another state");
        sweep(&dir, &BTreeSet::from([name(&STAMP)]));
        assert_eq!(files(&dir).unwrap().len(), 1);
        remove(&dir, &STAMP);
        assert!(load(&dir, &KEY, &STAMP, 100_000).is_none());
    }

    #[test]
    fn damage_anywhere_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &KEY, &STAMP, &index(40)).unwrap();
        let path = dir.path().join(name(&STAMP));
        let whole = std::fs::read(&path).unwrap();
        let loads = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            load(dir.path(), &KEY, &STAMP, 1000).is_some()
        };
        assert!(loads(&whole));
        for at in 0..whole.len() {
            for bit in [0x01, 0x80] {
                let mut damaged = whole.clone();
                damaged[at] ^= bit;
                assert!(!loads(&damaged), "byte {at}");
            }
            assert!(!loads(&whole[..at]), "cut at {at}");
        }
        assert!(!loads(&[&whole[..], b"x"].concat()));
        // Counts that no memory could hold.
        let mut huge = whole.clone();
        huge[HEAD - 16..HEAD].fill(0xff);
        assert!(!loads(&huge));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(load(dir.path(), &KEY, &STAMP, 1000).is_none(), "not even a file");
    }
}
