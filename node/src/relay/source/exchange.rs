//! What the source has said, must say and must keep: the batches that are not yet placed.
//!
//! Owns the stages of every batch and the order of messages; no socket, no thread. Invariant: a
//! batch leaves this state only when the destination says *placed*, so that a new connection can go
//! on from any point.
//!
//! ```text
//! hashed -> offered -> wanted -> literals sent -> placed
//!        \-> pushed (guest stopped, or the link outruns the processor) -> placed
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use godwit_protocol::chunk::{EXTENT_CHUNKS, Sum, extent};
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::{CHUNK_BYTES, LITERAL_BYTES};
use godwit_protocol::wire::bulk::{Coding, Head};

use super::reader::Batch;
use super::session::{Event, Parcel};
use super::shared::Shared;
use super::work::Job;
use super::{PageCounts, SourceProgress};
use crate::relay::RelayError;
use crate::relay::frames::Frame;
use crate::relay::pack::Levels;
use crate::relay::pool::Pool;
use crate::relay::stream::STREAM_LEVEL;

/// Bytes of an id.
const ID_BYTES: usize = 16;
/// Pages of one message at quick levels, bytes.
const QUICK_BYTES: usize = 1 << 20;
/// The same and [`AHEAD_BYTES`] when many sessions share the node, at least.
const LEAST_BYTES: usize = 256 << 10;
/// Highest level while the guest stands still.
const HURRIED_LEVEL: i32 = 3;
/// Messages that are compressed at once.
const PACKING: usize = 2;
/// Compressed bytes that may wait for the link.
const AHEAD_BYTES: usize = 2 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Offered,
    Wanted,
    Pushed,
}

struct Entry {
    stage: Stage,
    sum: Sum,
    disk: bool,
    pages: Vec<u8>,
    zeros: Vec<u8>,
    /// One id per page.
    ids: Bytes,
    /// What a disk's offer names: ids of extents where there are whole ones.
    extents: Option<Bytes>,
    data: Bytes,
}

struct Opaque {
    end: u64,
    frame: Frame,
}

pub(super) struct Exchange {
    shared: Arc<Shared>,
    pool: Arc<Pool<Job>>,
    pub(super) levels: Levels,
    entries: BTreeMap<u32, Entry>,
    wants: VecDeque<u32>,
    packing: usize,
    /// A part of the long stream is being packed: there is one at a time.
    streaming: bool,
    /// Counts connections: each has a stream of its own.
    generation: u32,
    urgent: VecDeque<Frame>,
    bulk: VecDeque<Frame>,
    bulk_bytes: usize,
    opaque: VecDeque<Opaque>,
    hashed: u32,
    placed: u32,
    /// Disks whose image is not in the digest yet.
    unchecked: usize,
    ram_end: Option<u32>,
    stream_end: Option<(u64, [u8; 32])>,
    end: Option<Head>,
    pub(super) progress: SourceProgress,
}

impl Exchange {
    pub(super) fn new(shared: Arc<Shared>, pool: Arc<Pool<Job>>, disks: usize) -> Self {
        Self {
            shared,
            pool,
            levels: Levels::new(),
            entries: BTreeMap::new(),
            wants: VecDeque::new(),
            packing: 0,
            streaming: false,
            generation: 0,
            urgent: VecDeque::new(),
            bulk: VecDeque::new(),
            bulk_bytes: 0,
            opaque: VecDeque::new(),
            hashed: 0,
            placed: 0,
            unchecked: disks,
            ram_end: None,
            stream_end: None,
            end: None,
            progress: SourceProgress::default(),
        }
    }

    /// The level to compress at now.
    fn level(&self) -> i32 {
        let most = if self.hurried() { HURRIED_LEVEL } else { i32::MAX };
        self.levels.choose().min(most)
    }

    fn hurried(&self) -> bool {
        self.shared.hurried.load(Ordering::Relaxed)
    }

    /// Takes what threads found.
    pub(super) fn event(&mut self, event: Event) -> Result<(), RelayError> {
        match event {
            Event::Hashed { batch, sum, sums } => self.hashed(batch, sum, &sums),
            Event::Packed { parcel, level, stream, from, took, coding, payload } => {
                self.levels.packed(level, from, payload.len(), took);
                self.packing -= 1;
                self.streaming &= stream.is_none();
                // What was wanted over a connection that is lost is wanted again already.
                if stream.is_none_or(|stream| stream == self.generation) {
                    self.packed(parcel, coding, payload);
                }
            }
            Event::Opaque { offset, len, held, coding, payload } => {
                let frame = Frame { head: Head::Opaque { offset, held, coding }, payload };
                self.bulk_push(frame.clone());
                self.opaque.push_back(Opaque { end: offset + len as u64, frame });
            }
            Event::RamEnd { seq } => {
                self.ram_end = Some(seq);
                self.urgent.push_back(Head::RamEnd { seq }.into());
            }
            Event::DiskChecked => self.unchecked = self.unchecked.saturating_sub(1),
            Event::StreamEnd { bytes, hash } => self.stream_end = Some((bytes, hash)),
            Event::Failed(cause) => return Err(cause),
        }
        self.close();
        Ok(())
    }

    /// Says the end once everything is hashed.
    fn close(&mut self) {
        let (Some(last), Some((opaque_bytes, opaque))) = (self.ram_end, self.stream_end) else {
            return;
        };
        if self.end.is_none() && self.hashed == last && self.unchecked == 0 {
            let end = Head::End { digest: self.shared.table.digest(), opaque_bytes, opaque };
            self.end = Some(end.clone());
            self.urgent.push_back(end.into());
        }
    }

    fn hashed(&mut self, batch: Batch, sum: Sum, sums: &[ChunkId]) {
        self.hashed += 1;
        self.count(batch.disk, |counts| counts.zero += batch.zeros.len() as u64);
        let (seq, data) = (batch.seq, self.shared.buffers().share(batch.data));
        // What was named may be asked for; in the stop a round trip would be downtime.
        let ask = sum == Sum::Id && !self.shared.pushes();
        let ids = |ids: &mut dyn Iterator<Item = ChunkId>| -> Bytes {
            ids.flat_map(|id| id.0).collect::<Vec<u8>>().into()
        };
        let names = if ask { ids(&mut sums.iter().copied()) } else { Bytes::new() };
        let extents = (ask && batch.disk).then(|| {
            ids(&mut extent::parts(&batch.pages).map(|part| match part {
                extent::Part::Extent(at, _) => {
                    self.shared.key.extent_id(&sums[at..at + EXTENT_CHUNKS])
                }
                extent::Part::Single(at, _) => sums[at],
            }))
        });
        let entry = Entry {
            stage: if ask { Stage::Offered } else { Stage::Pushed },
            sum,
            disk: batch.disk,
            pages: batch.pages.encode(),
            zeros: batch.zeros.encode(),
            ids: names,
            extents,
            data,
        };
        if !ask {
            self.count(batch.disk, |counts| counts.literal += batch.pages.len() as u64);
        }
        self.entries.insert(seq, entry);
        self.say(seq);
    }

    /// Says a batch (again), by its stage.
    fn say(&mut self, seq: u32) {
        let Some(entry) = self.entries.get(&seq) else { return };
        match entry.stage {
            Stage::Offered => {
                let (pages, zeros) = (entry.pages.clone(), entry.zeros.clone());
                let head = Head::Offer { seq, pages, zeros, extents: entry.disk };
                let payload = match &entry.extents {
                    Some(extents) => extents.clone(),
                    None => entry.ids.clone(),
                };
                self.urgent.push_back(Frame { head, payload });
            }
            Stage::Wanted => self.wants.push_back(seq),
            Stage::Pushed => {
                let level = self.level().min(HURRIED_LEVEL);
                let data = entry.data.clone();
                if level == 0 || data.is_empty() {
                    self.packed(Parcel::Push(seq), Coding::Raw, data);
                } else {
                    self.packing += 1;
                    let parcel = Parcel::Push(seq);
                    let job = Job::Pack { parcel, parts: vec![data], level, stream: None };
                    self.pool.put(job, self.hurried());
                }
            }
        }
    }

    fn packed(&mut self, parcel: Parcel, coding: Coding, payload: Bytes) {
        let head = match parcel {
            Parcel::Literals(segments) => Head::Literals { segments, coding },
            Parcel::Push(seq) => {
                let Some(entry) = self.entries.get(&seq) else { return };
                let (pages, zeros) = (entry.pages.clone(), entry.zeros.clone());
                Head::Push { seq, pages, zeros, sum: entry.sum, coding }
            }
        };
        self.bulk_push(Frame { head, payload });
    }

    fn bulk_push(&mut self, frame: Frame) {
        self.bulk_bytes += frame.payload.len();
        self.bulk.push_back(frame);
    }

    /// Takes what the destination says; true: the digests are equal, the end.
    pub(super) fn heard(&mut self, frame: Frame) -> Result<bool, RelayError> {
        match frame.head {
            Head::Want { seq } => self.wanted(seq, &frame.payload)?,
            Head::Split { seq } => self.split(seq, &frame.payload)?,
            Head::Placed { seq } => self.placed(seq),
            Head::OpaqueHave { bytes } => self.opaque_have(bytes),
            Head::Verdict { equal: true } => return Ok(true),
            Head::Verdict { equal: false } => return Err(RelayError::DigestMismatch),
            Head::Failed { cause } => return Err(RelayError::Peer(cause)),
            other => return Err(RelayError::Protocol(format!("unexpected {other:?}"))),
        }
        Ok(false)
    }

    /// Says the ids of the extents that the destination lacks.
    fn split(&mut self, seq: u32, bits: &[u8]) -> Result<(), RelayError> {
        let Some(entry) = self.entries.get(&seq).filter(|e| e.stage == Stage::Offered) else {
            return Ok(());
        };
        let pages = entry.ids.len() / ID_BYTES;
        if bits.len() != pages.div_ceil(8) || entry.extents.is_none() {
            return Err(RelayError::Protocol(
                "a split of another length than the offer".to_owned(),
            ));
        }
        let mut ids = Vec::with_capacity(entry.ids.len());
        for (at, id) in entry.ids.chunks_exact(ID_BYTES).enumerate() {
            if bits[at / 8] >> (at % 8) & 1 == 1 {
                ids.extend_from_slice(id);
            }
        }
        self.urgent.push_back(Frame { head: Head::Ids { seq }, payload: ids.into() });
        Ok(())
    }

    /// Keeps only what was wanted of a batch.
    fn wanted(&mut self, seq: u32, bits: &[u8]) -> Result<(), RelayError> {
        let Some(entry) = self.entries.get_mut(&seq) else { return Ok(()) };
        if entry.stage != Stage::Offered {
            return Ok(());
        }
        let pages = entry.data.len() / CHUNK_BYTES;
        if bits.len() != pages.div_ceil(8) {
            return Err(RelayError::Protocol("a want of another length than the offer".to_owned()));
        }
        let wanted = |i: usize| bits[i / 8] >> (i % 8) & 1 == 1;
        let count = (0..pages).filter(|&i| wanted(i)).count();
        if count < pages {
            let mut kept = Vec::with_capacity(count * CHUNK_BYTES);
            for (i, page) in entry.data.chunks_exact(CHUNK_BYTES).enumerate() {
                if wanted(i) {
                    kept.extend_from_slice(page);
                }
            }
            self.shared.seat.give(entry.data.len() - kept.len());
            entry.data = kept.into();
        }
        entry.stage = Stage::Wanted;
        let disk = entry.disk;
        self.count(disk, |counts| {
            counts.known += (pages - count) as u64;
            counts.literal += count as u64;
        });
        if count > 0 {
            self.wants.push_back(seq);
        }
        Ok(())
    }

    fn placed(&mut self, seq: u32) {
        if let Some(entry) = self.entries.remove(&seq) {
            if entry.stage == Stage::Offered {
                // Placed without a want: everything was known.
                let known = (entry.data.len() / CHUNK_BYTES) as u64;
                self.count(entry.disk, |counts| counts.known += known);
            }
            self.placed += 1;
            self.shared.seat.give(entry.data.len());
        }
    }

    fn opaque_have(&mut self, bytes: u64) {
        while self.opaque.front().is_some_and(|chunk| chunk.end <= bytes) {
            self.opaque.pop_front();
        }
    }

    /// Begins again on a new connection, from what the destination has.
    pub(super) fn resume(&mut self, placed: u32, opaque: u64) {
        self.generation += 1;
        self.urgent.clear();
        self.bulk.clear();
        self.wants.clear();
        self.bulk_bytes = 0;
        while let Some((&seq, _)) = self.entries.first_key_value().filter(|(s, _)| **s <= placed) {
            self.placed(seq);
        }
        self.opaque_have(opaque);
        let left: Vec<u32> = self.entries.keys().copied().collect();
        left.into_iter().for_each(|seq| self.say(seq));
        let frames: Vec<Frame> = self.opaque.iter().map(|chunk| chunk.frame.clone()).collect();
        frames.into_iter().for_each(|frame| self.bulk_push(frame));
        self.urgent.extend(self.ram_end.map(|seq| Head::RamEnd { seq }.into()));
        self.urgent.extend(self.end.clone().map(Frame::from));
    }

    /// Has wanted pages compressed: many at once while the link is busy, few when it would idle.
    pub(super) fn pump(&mut self, line_idle: bool) {
        let ahead = self.shared.seat.part(AHEAD_BYTES, LEAST_BYTES);
        while !self.wants.is_empty() && self.packing < PACKING && self.bulk_bytes < ahead {
            let level = self.level();
            let streams = level == STREAM_LEVEL && self.shared.window.load(Ordering::Relaxed) > 0;
            if streams && self.streaming {
                return;
            }
            let most = if level > HURRIED_LEVEL { LITERAL_BYTES } else { QUICK_BYTES };
            let most = self.shared.seat.part(most, LEAST_BYTES);
            let starving = line_idle && self.packing == 0 && self.bulk.is_empty();
            let (mut bytes, mut segments, mut parts) = (0, Vec::new(), Vec::new());
            let mut disk = false;
            let mut whole = false;
            for &seq in &self.wants {
                let Some(entry) = self.entries.get(&seq) else { continue };
                // Memory and disks go apart: what each costs is shown.
                if bytes > 0 && (bytes + entry.data.len() > most || entry.disk != disk) {
                    whole = true;
                    break;
                }
                disk = entry.disk;
                bytes += entry.data.len();
                segments.push((seq, (entry.data.len() / CHUNK_BYTES) as u32));
                parts.push(entry.data.clone());
            }
            let room = bytes < most && !whole;
            if room && !starving && !self.hurried() && self.ram_end.is_none() {
                return;
            }
            let last = segments.last().map(|segment| segment.0);
            while let Some(seq) = self.wants.pop_front() {
                if Some(seq) == last {
                    break;
                }
            }
            if parts.is_empty() {
                continue;
            }
            self.packing += 1;
            let parcel = Parcel::Literals(segments);
            self.streaming |= streams;
            let stream = streams.then_some(self.generation);
            self.pool.put(Job::Pack { parcel, parts, level, stream }, false);
        }
    }

    /// Whether there is a message to send, or one to be made once the link is idle.
    pub(super) fn is_eager(&self) -> bool {
        !self.urgent.is_empty()
            || !self.bulk.is_empty()
            || (self.packing == 0 && !self.wants.is_empty())
    }

    /// Whether compressed messages are being waited for.
    pub(super) fn is_packing(&self) -> bool {
        self.packing > 0
    }

    /// Adds a small message in front of the pages.
    pub(super) fn soon(&mut self, head: Head) {
        self.urgent.push_back(head.into());
    }

    /// The next message.
    pub(super) fn next(&mut self) -> Option<Frame> {
        let frame = match self.urgent.pop_front() {
            Some(frame) => frame,
            None => {
                let frame = self.bulk.pop_front()?;
                self.bulk_bytes -= frame.payload.len();
                frame
            }
        };
        self.count_wire(&frame);
        Some(frame)
    }

    /// Bytes of the stream for the destination's QEMU.
    pub(super) fn opaque_bytes(&self) -> u64 {
        self.stream_end.map_or(0, |end| end.0)
    }

    /// Counts pages, of all and of disks.
    fn count(&mut self, disk: bool, add: impl Fn(&mut PageCounts)) {
        add(&mut self.progress.pages);
        if disk {
            add(&mut self.progress.disk_blocks);
        }
    }

    /// Counts what leaves for disks; a message is of one kind.
    fn count_wire(&mut self, frame: &Frame) {
        let seq = match &frame.head {
            Head::Offer { seq, .. } | Head::Ids { seq } | Head::Push { seq, .. } => Some(seq),
            Head::Literals { segments, .. } => segments.first().map(|segment| &segment.0),
            _ => None,
        };
        if seq.and_then(|seq| self.entries.get(seq)).is_some_and(|entry| entry.disk) {
            self.progress.disk_wire_bytes += frame.payload.len() as u64;
        }
    }

    /// Brings the figures up to date that others count.
    pub(super) fn refresh(&mut self) {
        let shared = &self.shared;
        let progress = &mut self.progress;
        progress.unplaced_bytes = shared.seat.stored() as u64;
        let whole = self.entries.values().filter(|entry| entry.stage != Stage::Offered);
        progress.literal_bytes = whole.map(|entry| entry.data.len() as u64).sum();
        progress.literal_ppm = (self.levels.ratio() * 1e6) as u64;
        progress.first_pass_nonzero_pages = u64::from(shared.first_nonzero.load(Ordering::Relaxed));
        progress.passes = shared.passes.load(Ordering::Relaxed);
        progress.link_bytes_per_s = self.levels.link();
        progress.path_bytes_per_s = self.levels.path();
        progress.level = self.levels.choose();
        progress.ram_read = self.ram_end.is_some();
        progress.drained = self.placed == shared.batches.load(Ordering::Acquire);
    }
}
