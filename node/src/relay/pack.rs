//! Compression of payloads and the choice of level.
//!
//! Owns zstd contexts and the estimate of what each level costs and saves on this very migration.
//! Never trusts a length that came from the network: the caller names the most that it expects.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use godwit_protocol::wire::bulk::Coding;

use super::RelayError;
use super::pool::lock;
use super::stream::STREAM_LEVEL;

/// Levels to choose from; 0 is raw: pages as they are, unasked, with a fast checksum.
const LEVELS: [Estimate; 4] = [
    Estimate { level: 0, seconds: 1.0 / 1e9, ratio: 1.0 },
    Estimate { level: 1, seconds: 1.0 / 450e6, ratio: 0.32 },
    Estimate { level: 3, seconds: 1.0 / 250e6, ratio: 0.30 },
    Estimate { level: STREAM_LEVEL, seconds: 1.0 / 80e6, ratio: 0.25 },
];
/// The link's rate before it was measured, bytes per second.
const LINK_GUESS: f64 = 40e6;
/// The rate of a path without a delay to speak of, until it is measured.
const NEAR_GUESS: f64 = 1e9;
/// What everything but compressing costs a byte that is not sent raw, seconds: named at the source,
/// unpacked, named again and looked up at the destination.
const ASKING: f64 = 2.3e-9;
/// Below this rate nothing goes unasked: asking saves more than anything else, bytes per second.
const RAW_LEAST: f64 = 150e6;
/// A level may turn out so many times slower than it was taken to be.
const SLOWEST: f64 = 4.0;
/// How fast a level that is not used is taken for what it was at first.
const FORGET: f64 = 0.05;
/// How much a new measurement weighs.
const WEIGHT: f64 = 0.3;

/// What a level costs and leaves, per byte of content.
#[derive(Debug, Clone, Copy)]
struct Estimate {
    level: i32,
    seconds: f64,
    ratio: f64,
}

/// Picks the level that makes the slower of processor and link fastest.
#[derive(Debug)]
pub(super) struct Levels {
    levels: [Estimate; 4],
    /// What the path gives, or may.
    path: f64,
    /// What may be sent on it.
    cap: f64,
    measured: bool,
}

impl Levels {
    pub(super) fn new() -> Self {
        Self { levels: LEVELS, path: LINK_GUESS, cap: f64::INFINITY, measured: false }
    }

    /// Says whether the path is near, which counts until something was measured on it.
    pub(super) fn expect(&mut self, near: bool) {
        if !self.measured {
            self.path = if near { NEAR_GUESS } else { LINK_GUESS };
        }
    }

    /// The most bytes per second that may be sent; 0: no limit.
    pub(super) fn hold_to(&mut self, cap: u64) {
        self.cap = if cap == 0 { f64::INFINITY } else { cap as f64 };
    }

    /// Notes what compressing `from` bytes to `to` took.
    pub(super) fn packed(&mut self, level: i32, from: usize, to: usize, took: Duration) {
        let Some(used) = LEVELS.iter().position(|first| first.level == level && level > 0) else {
            return;
        };
        let from = from.max(1) as f64;
        let (entry, first) = (&mut self.levels[used], &LEVELS[used]);
        // A thread that was kept from running says nothing of the level.
        let seconds = (took.as_secs_f64() / from).min(first.seconds * SLOWEST);
        entry.seconds += WEIGHT * (seconds - entry.seconds);
        entry.ratio += WEIGHT * (to as f64 / from - entry.ratio);
        // What is not used is not measured: it comes back into consideration by itself, as good or
        // bad as the content is for the level in use.
        let content = entry.ratio / first.ratio;
        let others = self.levels.iter_mut().zip(&LEVELS).enumerate();
        for (_, (entry, first)) in others.filter(|(at, _)| *at != used).skip(1) {
            entry.seconds += FORGET * (first.seconds - entry.seconds);
            entry.ratio += FORGET * ((first.ratio * content).min(1.0) - entry.ratio);
        }
    }

    /// Notes that `bytes` left in `over`, during `busy` of which the link did not take more.
    /// `waiting` says whether the link waits for the processor and may be believed: a socket's
    /// buffer takes the first bytes at any rate.
    pub(super) fn sent(&mut self, bytes: u64, over: Duration, busy: Duration, waiting: bool) {
        if bytes < 16 << 10 || over.is_zero() {
            return;
        }
        if busy > over.mul_f64(0.6) {
            let measured = bytes as f64 / busy.as_secs_f64();
            self.measured = true;
            self.path += WEIGHT * 2.0 * (measured - self.path);
        } else if waiting && busy < over.mul_f64(0.3) {
            // It can do more than was seen.
            let seen = bytes as f64 / over.as_secs_f64();
            self.path = self.path.max(seen * 4.0).min(1e11);
        }
    }

    /// The path's rate as it was last measured, bytes per second.
    pub(super) fn path(&self) -> f64 {
        self.path
    }

    /// The rate that the link gives this migration, bytes per second. While a cap holds it back nothing
    /// is measured, so a guess that was too high would stay.
    pub(super) fn link(&self) -> f64 {
        self.path.min(self.cap)
    }

    /// What a byte becomes at the level that is used now.
    pub(super) fn ratio(&self) -> f64 {
        let level = self.choose();
        self.levels.iter().find(|entry| entry.level == level).map_or(1.0, |entry| entry.ratio)
    }

    /// The level to use now; 0: raw.
    pub(super) fn choose(&self) -> i32 {
        let asking = |e: &Estimate| if e.level == 0 { 0.0 } else { ASKING };
        let time = |e: &Estimate| (e.seconds + asking(e)).max(e.ratio / self.link());
        let raw = usize::from(self.link() < RAW_LEAST);
        let mut best = &self.levels[raw];
        for entry in &self.levels[raw + 1..] {
            if time(entry) < time(best) {
                best = entry;
            }
        }
        best.level
    }
}

/// Most compressors of a node: more would only wait for processors.
const PACKERS: usize = 4;

/// The compressors of single messages, which all threads of a node share.
#[derive(Default)]
pub(super) struct Packers {
    made: Mutex<Made>,
    freed: Condvar,
}

#[derive(Default)]
struct Made {
    count: usize,
    idle: Vec<Packer>,
}

impl Packers {
    /// Packs `content` at `level`; raw if that saves less than a sixteenth. Waits for no longer than
    /// others take to pack a message.
    pub(super) fn pack(
        &self,
        content: Vec<u8>,
        level: i32,
    ) -> Result<(Coding, Vec<u8>), RelayError> {
        if level == 0 || content.is_empty() {
            return Ok((Coding::Raw, content));
        }
        let mut lent = Lent { packers: self, packer: Some(self.take()?) };
        let packer = lent.packer.as_mut().ok_or(RelayError::Aborted)?;
        packer.pack(content, level)
    }

    fn take(&self) -> Result<Packer, RelayError> {
        let mut made = lock(&self.made);
        loop {
            if let Some(packer) = made.idle.pop() {
                return Ok(packer);
            }
            if made.count < PACKERS {
                let packer = Packer::new()?;
                made.count += 1;
                return Ok(packer);
            }
            made = self.freed.wait(made).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A compressor that comes back whatever becomes of its borrower.
struct Lent<'a> {
    packers: &'a Packers,
    packer: Option<Packer>,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        lock(&self.packers.made).idle.extend(self.packer.take());
        self.packers.freed.notify_one();
    }
}

/// One compressor.
pub(super) struct Packer {
    context: zstd::bulk::Compressor<'static>,
    level: i32,
}

impl Packer {
    pub(super) fn new() -> Result<Self, RelayError> {
        Ok(Self { context: zstd::bulk::Compressor::new(1)?, level: 1 })
    }

    /// Packs `content` at `level`; raw if that saves less than a sixteenth.
    pub(super) fn pack(
        &mut self,
        content: Vec<u8>,
        level: i32,
    ) -> Result<(Coding, Vec<u8>), RelayError> {
        if self.level != level {
            self.context.set_compression_level(level)?;
            self.level = level;
        }
        let packed = self.context.compress(&content)?;
        if packed.len() > content.len() - content.len() / 16 {
            return Ok((Coding::Raw, content));
        }
        Ok((Coding::Zstd(content.len() as u32), packed))
    }
}

/// Decompresses on one thread.
pub(super) struct Unpacker(zstd::bulk::Decompressor<'static>);

impl Unpacker {
    pub(super) fn new() -> Result<Self, RelayError> {
        Ok(Self(zstd::bulk::Decompressor::new()?))
    }

    /// The content of `payload`, which must not be longer than `most` bytes.
    pub(super) fn unpack(
        &mut self,
        coding: Coding,
        payload: bytes::Bytes,
        most: usize,
    ) -> Result<bytes::Bytes, RelayError> {
        let len = match coding {
            Coding::Raw => return Ok(payload),
            Coding::Zstd(len) => len,
            Coding::Stream { .. } => {
                return Err(RelayError::Protocol("a part of a stream out of place".to_owned()));
            }
        };
        let len = len as usize;
        if len > most {
            return Err(RelayError::Protocol(format!("{len} bytes where {most} are the most")));
        }
        let content = self.0.decompress(&payload, len).map_err(|e| {
            RelayError::Protocol(format!("a payload that does not decompress: {e}"))
        })?;
        if content.len() != len {
            return Err(RelayError::Protocol("a payload of another length than said".to_owned()));
        }
        Ok(content.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_follows_the_link() {
        let mut levels = Levels::new();
        assert_eq!(levels.choose(), 3);
        let second = Duration::from_secs(1);
        (0..20).for_each(|_| levels.sent(12_500_000, second, second, true));
        assert_eq!(levels.choose(), STREAM_LEVEL);
        (0..40).for_each(|_| levels.sent(2_000_000_000, second, second, true));
        assert_eq!(levels.choose(), 0);
        levels.hold_to(3_000_000);
        assert_eq!(
            (levels.choose(), levels.link()),
            (STREAM_LEVEL, 3e6),
            "a burst is not the link"
        );
        levels.hold_to(0);
        assert_eq!(levels.choose(), 0);
        // A link that waits for the processor gets less compression.
        let mut levels = Levels::new();
        (0..40).for_each(|_| levels.sent(200_000_000, second, Duration::ZERO, true));
        assert_eq!(levels.choose(), 0);
    }

    #[test]
    fn a_processor_that_is_kept_busy_does_not_make_a_slow_link_go_unasked() {
        let mut levels = Levels::new();
        let second = Duration::from_secs(1);
        (0..20).for_each(|_| levels.sent(12_500_000, second, second, true));
        for level in [1, 3, STREAM_LEVEL] {
            (0..20).for_each(|_| levels.packed(level, 1 << 20, 500_000, second));
        }
        assert!(levels.choose() > 0);
        (0..200).for_each(|_| levels.packed(1, 1 << 20, 300_000, Duration::from_millis(3)));
        assert_eq!(levels.choose(), STREAM_LEVEL, "forgiven");
    }

    #[test]
    fn packing_reads_back_and_is_bounded() {
        let (packers, mut unpacker) = (Packers::default(), Unpacker::new().unwrap());
        let text: Vec<u8> = (0..50_000_u32).map(|i| (i / 100) as u8).collect();
        let (coding, packed) = packers.pack(text.clone(), 3).unwrap();
        assert!(packed.len() < text.len() / 2);
        assert_eq!(unpacker.unpack(coding, packed.clone().into(), 50_000).unwrap(), text);
        assert!(unpacker.unpack(coding, packed.clone().into(), 49_999).is_err());
        assert!(unpacker.unpack(Coding::Zstd(49_999), packed.clone().into(), 50_000).is_err());
        assert!(
            unpacker.unpack(Coding::Zstd(50_000), packed[5..].to_vec().into(), 50_000).is_err()
        );
    }
}
