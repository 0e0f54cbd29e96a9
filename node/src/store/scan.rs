//! Hashing of a whole source on a few threads.
//!
//! Owns its threads and buffers for the time of one call. Never maps memory: sources are read by
//! copying, because a read fault on a hole of guest memory would allocate it.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::CHUNK_BYTES;

use super::corpus::ReadAt;
use super::index::key_of;

const CHUNK: u64 = CHUNK_BYTES as u64;
/// What a thread takes at a time, bytes.
const SEGMENT: u64 = 16 << 20;
/// What is read at a time, bytes: stays in a second-level cache while it is hashed.
const BUFFER: usize = 256 << 10;

/// The id of a chunk under the swarm's chunk key.
#[must_use]
pub fn chunk_id(key: &[u8; 32], chunk: &[u8]) -> ChunkId {
    let mut id = [0_u8; 16];
    id.copy_from_slice(&blake3::keyed_hash(key, chunk).as_bytes()[..16]);
    ChunkId(id)
}

/// Why a scan ended early.
#[derive(Debug)]
pub enum ScanError {
    /// The source could not be read.
    Io(io::Error),
    /// More non-zero pages than allowed.
    TooMany,
}

/// Threads for one scan: at most half of the cores, so that guests and migrations keep theirs.
#[must_use]
pub fn threads() -> usize {
    (std::thread::available_parallelism().map_or(1, usize::from) / 2).clamp(1, 8)
}

/// Hashes every whole, non-zero chunk of `source`, holes skipped: (half id, page number) pairs.
pub fn scan(
    source: &dyn ReadAt,
    key: &[u8; 32],
    pages_max: usize,
) -> Result<Vec<(u64, u32)>, ScanError> {
    let len = source.len() / CHUNK * CHUNK;
    let segments = len.div_ceil(SEGMENT);
    let threads = threads().min(usize::try_from(segments).unwrap_or(1).max(1));
    let next = AtomicU64::new(0);
    let found = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let all = Mutex::new(Ok(Vec::new()));
    let work = || {
        let mut pairs = Vec::new();
        let mut buffer = vec![0_u8; BUFFER];
        let mut result = Ok(());
        while !stop.load(Relaxed) && result.is_ok() {
            let from = next.fetch_add(1, Relaxed) * SEGMENT;
            if from >= len {
                break;
            }
            let before = pairs.len();
            let to = (from + SEGMENT).min(len);
            result = segment(source, key, from, to, &mut buffer, &mut pairs).map_err(ScanError::Io);
            let grown = (pairs.len() - before) as u64;
            if found.fetch_add(grown, Relaxed) + grown > pages_max as u64 {
                result = Err(ScanError::TooMany);
            }
        }
        if result.is_err() {
            stop.store(true, Relaxed);
        }
        let mut all = all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match (&mut *all, result) {
            (Ok(list), Ok(())) => list.append(&mut pairs),
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
    all.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn segment(
    source: &dyn ReadAt,
    key: &[u8; 32],
    from: u64,
    to: u64,
    buffer: &mut [u8],
    pairs: &mut Vec<(u64, u32)>,
) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let Some(data) = source.next_data(at)? else { break };
        // Data may begin within a chunk that began as a hole.
        let start = (data.start / CHUNK * CHUNK).max(at);
        let end = data.end.div_ceil(CHUNK).saturating_mul(CHUNK).min(to);
        at = start;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(BUFFER).min(buffer.len());
            let part = &mut buffer[..want];
            source.read_exact_at(part, at)?;
            for (chunk, page) in part.chunks_exact(CHUNK_BYTES).zip(at / CHUNK..) {
                if !is_zero(chunk)
                    && let Ok(page) = u32::try_from(page)
                {
                    pairs.push((key_of(&chunk_id(key, chunk)), page));
                }
            }
            at += want as u64;
        }
        at = at.max(end);
    }
    Ok(())
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(chunk: &[u8]) -> bool {
    chunk.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}
