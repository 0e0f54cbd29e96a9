//! Hashing of a whole source on a few threads.
//!
//! Owns its threads and buffers for the time of one call. Never maps memory: sources are read by
//! copying, because a read fault on a hole of guest memory would allocate it. A source is read once:
//! ids of chunks, ids of extents and the digest of the whole come of the same pass.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len};
use blake3::hazmat::{merge_subtrees_non_root, merge_subtrees_root};
use godwit_protocol::chunk::{ChunkKey, EXTENT_CHUNKS};
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::CHUNK_BYTES;

use super::index::key_of;
use super::pace::Pace;
use super::source::ReadAt;

/// Bytes of an extent.
pub const EXTENT_BYTES: usize = EXTENT_CHUNKS * CHUNK_BYTES;
const EXTENT: u64 = EXTENT_BYTES as u64;
/// What a thread takes at a time, bytes: a power of two, so that it is a subtree of the digest.
const SEGMENT: u64 = 16 << 20;
/// What is read at a time, bytes: stays in a second-level cache while it is hashed.
const BUFFER: usize = 256 << 10;

/// Why a scan ended early.
#[derive(Debug)]
pub enum ScanError {
    /// The source could not be read, or became shorter.
    Io(io::Error),
    /// More non-zero pages than allowed.
    TooMany,
    /// The pace said to stop.
    Stopped,
}

impl From<io::Error> for ScanError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What a scan found.
#[derive(Debug, Default)]
pub struct Scan {
    /// Of every whole, non-zero chunk: half its id, and its number.
    pub chunks: Vec<(u64, u32)>,
    /// Of every whole extent that is not all zero: half its id, and its number.
    pub extents: Vec<(u64, u32)>,
    /// Plain BLAKE3 of all bytes, if asked for.
    pub digest: Option<[u8; 32]>,
}

/// Threads for one scan: at most half of the cores, so that guests and migrations keep theirs.
#[must_use]
pub fn threads() -> usize {
    (std::thread::available_parallelism().map_or(1, usize::from) / 2).clamp(1, 8)
}

/// Reads and hashes `source`, holes skipped (they still count for the digest).
pub fn scan(
    source: &dyn ReadAt,
    key: &ChunkKey,
    pages_max: usize,
    pace: &Pace,
    digest: bool,
) -> Result<Scan, ScanError> {
    let ids = Some(Ids { key, zero: key.zero_id() });
    run(&Job { source, ids, len: source.len(), pace, digest }, pages_max)
}

/// Plain BLAKE3 of all bytes of `source`.
pub fn digest(source: &dyn ReadAt, pace: &Pace) -> Result<[u8; 32], ScanError> {
    let found = run(&Job { source, ids: None, len: source.len(), pace, digest: true }, 0)?;
    found.digest.ok_or(ScanError::Stopped)
}

fn run(job: &Job<'_>, pages_max: usize) -> Result<Scan, ScanError> {
    let len = job.len;
    let segments = len.div_ceil(SEGMENT);
    let threads = threads().min(usize::try_from(segments).unwrap_or(1).max(1));
    let next = AtomicU64::new(0);
    let found = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let all = Mutex::new(Ok(Part::default()));
    let work = || {
        let mut part = Part::default();
        let mut buffer = vec![0_u8; BUFFER];
        let mut result = Ok(());
        while !stop.load(Relaxed) && result.is_ok() {
            let from = next.fetch_add(1, Relaxed) * SEGMENT;
            if from >= len {
                break;
            }
            let before = part.chunks.len();
            result = job.segment(from, &mut buffer, &mut part);
            let grown = (part.chunks.len() - before) as u64;
            if found.fetch_add(grown, Relaxed) + grown > pages_max as u64 {
                result = Err(ScanError::TooMany);
            }
        }
        if result.is_err() {
            stop.store(true, Relaxed);
        }
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *all, result) {
            (Ok(list), Ok(())) => list.append(part),
            (Ok(_), Err(e)) => *all = Err(e),
            (Err(_), _) => {}
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let all = all.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    Ok(Scan {
        digest: job.digest.then(|| all.digest(len)),
        chunks: all.chunks,
        extents: all.extents,
    })
}

/// What one thread has found.
#[derive(Default)]
struct Part {
    chunks: Vec<(u64, u32)>,
    extents: Vec<(u64, u32)>,
    /// Digests of segments as subtrees, by the number of the segment.
    trees: Vec<(u64, ChainingValue)>,
    /// The digest of a source that is a single segment.
    root: Option<[u8; 32]>,
}

impl Part {
    fn append(&mut self, mut other: Self) {
        self.chunks.append(&mut other.chunks);
        self.extents.append(&mut other.extents);
        self.trees.append(&mut other.trees);
        self.root = self.root.or(other.root);
    }

    /// The digest of a source of `len` bytes, of which every segment was hashed.
    fn digest(&self, len: u64) -> [u8; 32] {
        let mut trees = self.trees.clone();
        trees.sort_unstable_by_key(|(segment, _)| *segment);
        match (self.root, trees.len()) {
            (Some(root), _) => root,
            (None, 0..2) => *blake3::hash(&[]).as_bytes(),
            (None, _) => {
                let (left, right) = halves(&trees, len);
                *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()
            }
        }
    }
}

/// The two subtrees of `trees`, of which there are at least two, over `len` bytes.
fn halves(trees: &[(u64, ChainingValue)], len: u64) -> (ChainingValue, ChainingValue) {
    let left_len = left_subtree_len(len);
    let at = usize::try_from(left_len / SEGMENT).unwrap_or(usize::MAX).clamp(1, trees.len() - 1);
    let (left, right) = trees.split_at(at);
    (subtree(left, left_len), subtree(right, len - left_len))
}

fn subtree(trees: &[(u64, ChainingValue)], len: u64) -> ChainingValue {
    match trees {
        [] => ChainingValue::default(),
        [(_, one)] => *one,
        _ => {
            let (left, right) = halves(trees, len);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

/// What ids are made with.
struct Ids<'a> {
    key: &'a ChunkKey,
    zero: ChunkId,
}

struct Job<'a> {
    source: &'a dyn ReadAt,
    /// None: only the digest is wanted.
    ids: Option<Ids<'a>>,
    len: u64,
    pace: &'a Pace,
    digest: bool,
}

impl Job<'_> {
    fn segment(&self, from: u64, buffer: &mut [u8], out: &mut Part) -> Result<(), ScanError> {
        let to = (from + SEGMENT).min(self.len);
        let mut hasher = self.digest.then(blake3::Hasher::new);
        if let Some(hasher) = &mut hasher {
            hasher.set_input_offset(from);
        }
        let mut at = from;
        while at < to {
            // Data may begin within an extent that began as a hole.
            let (start, end) = match self.source.next_data(at)? {
                Some(data) if data.start < to => {
                    let end = data.end.div_ceil(EXTENT).saturating_mul(EXTENT).min(to);
                    ((data.start / EXTENT * EXTENT).max(at), end)
                }
                _ => (to, to),
            };
            if let Some(hasher) = &mut hasher {
                self.zeros(hasher, start - at)?;
            }
            at = start;
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(BUFFER).min(buffer.len());
                let part = &mut buffer[..want];
                self.pace.take(want)?;
                self.source.read_exact_at(part, at)?;
                if let Some(hasher) = &mut hasher {
                    hasher.update(part);
                }
                if let Some(ids) = &self.ids {
                    ids.of(part, at, out);
                }
                at += want as u64;
            }
        }
        match hasher {
            Some(hasher) if self.len <= SEGMENT => out.root = Some(*hasher.finalize().as_bytes()),
            Some(hasher) => out.trees.push((from / SEGMENT, hasher.finalize_non_root())),
            None => {}
        }
        Ok(())
    }

    /// A hole's part of the digest.
    fn zeros(&self, hasher: &mut blake3::Hasher, mut bytes: u64) -> Result<(), ScanError> {
        static ZEROS: [u8; EXTENT_BYTES] = [0; EXTENT_BYTES];
        while bytes > 0 {
            let part = usize::try_from(bytes).unwrap_or(ZEROS.len()).min(ZEROS.len());
            self.pace.take(part)?;
            hasher.update(&ZEROS[..part]);
            bytes -= part as u64;
        }
        Ok(())
    }
}

impl Ids<'_> {
    /// Ids of what begins at `at`, a multiple of an extent.
    fn of(&self, part: &[u8], at: u64, out: &mut Part) {
        for (extent, number) in part.chunks(EXTENT_BYTES).zip(at / EXTENT..) {
            let mut ids = [self.zero; EXTENT_CHUNKS];
            let mut data = false;
            let pages = number * EXTENT_CHUNKS as u64..;
            for ((chunk, page), id) in extent.chunks_exact(CHUNK_BYTES).zip(pages).zip(&mut ids) {
                if is_zero(chunk) {
                    continue;
                }
                data = true;
                *id = self.key.id(chunk);
                if let Ok(page) = u32::try_from(page) {
                    out.chunks.push((key_of(id), page));
                }
            }
            if data
                && extent.len() == EXTENT_BYTES
                && let Ok(number) = u32::try_from(number)
            {
                out.extents.push((key_of(&self.key.extent_id(&ids)), number));
            }
        }
    }
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(chunk: &[u8]) -> bool {
    chunk.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const KEY: ChunkKey = ChunkKey([7; 32]);
    const CHUNK: u64 = CHUNK_BYTES as u64;

    fn scanned(file: &File) -> Scan {
        scan(file, &KEY, 1 << 20, &Pace::free(), true).unwrap()
    }

    #[test]
    fn the_digest_is_that_of_all_bytes() {
        let segment = SEGMENT;
        for len in [
            0,
            1,
            4096,
            CHUNK + 17,
            segment - 1,
            segment,
            segment + 1,
            2 * segment,
            3 * segment + 5,
            5 * segment + EXTENT,
        ] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            for at in (0..len).step_by(7 << 20) {
                let bytes = at.to_le_bytes();
                let fits = usize::try_from((len - at).min(8)).unwrap();
                file.write_all_at(&bytes[..fits], at).unwrap();
            }
            let mut hasher = blake3::Hasher::new();
            let mut whole = vec![0; usize::try_from(len).unwrap()];
            FileExt::read_exact_at(&file, &mut whole, 0).unwrap();
            hasher.update(&whole);
            assert_eq!(scanned(&file).digest, Some(*hasher.finalize().as_bytes()), "{len} bytes");
        }
    }

    #[test]
    fn extents_are_whole_aligned_and_not_all_zero() {
        let file = tempfile::tempfile().unwrap();
        // Extent 0: data at its end; 1: a hole; 2: written zeros; 3: data; then a cut one.
        file.write_all_at(&[1; 4096], EXTENT - CHUNK).unwrap();
        file.write_all_at(&[0; EXTENT_BYTES], 2 * EXTENT).unwrap();
        file.write_all_at(&[2; EXTENT_BYTES], 3 * EXTENT).unwrap();
        file.write_all_at(&[3; EXTENT_BYTES - 1], 4 * EXTENT).unwrap();
        let mut found = scanned(&file);
        found.extents.sort_by_key(|(_, number)| *number);
        let mut first = [KEY.zero_id(); EXTENT_CHUNKS];
        first[15] = KEY.id(&[1; 4096]);
        let third = [KEY.id(&[2; 4096]); EXTENT_CHUNKS];
        let of = |ids: &[ChunkId]| key_of(&KEY.extent_id(ids));
        assert_eq!(found.extents, [(of(&first), 0), (of(&third), 3)]);
        assert_eq!(found.chunks.len(), 1 + 16 + 15);
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_and_nothing_more() {
        struct Shrinking(File);
        impl ReadAt for Shrinking {
            fn len(&self) -> u64 {
                ReadAt::len(&self.0)
            }
            fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
                if offset >= 1 << 20 {
                    self.0.set_len(1 << 20)?;
                }
                FileExt::read_exact_at(&self.0, buffer, offset)
            }
            fn next_data(&self, offset: u64) -> io::Result<Option<std::ops::Range<u64>>> {
                self.0.next_data(offset)
            }
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; 3 << 20], 0).unwrap();
        let source = Shrinking(file);
        let result = scan(&source, &KEY, 1000, &Pace::free(), true);
        let Err(ScanError::Io(error)) = result else { panic!("{result:?}") };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_stopped_pace_ends_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        let pace = Pace::free();
        pace.stop();
        let result = scan(&file, &KEY, 1000, &pace, true);
        assert!(matches!(result, Err(ScanError::Stopped)));
    }
}
