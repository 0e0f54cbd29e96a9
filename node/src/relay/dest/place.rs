//! Placing: contents into the guest's memory, and the digest of what is really there.
//!
//! Owns the order claim -> write -> read back -> hash, under the lock of the page's region. Never
//! writes for a batch that a younger one has overtaken. Invariant: the table's entry of a page is
//! the hash of what was read back after the last write.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use godwit_protocol::chunk::layout::Layout;
use godwit_protocol::chunk::pages::Runs;
use godwit_protocol::chunk::{ChunkKey, Sum};
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::{BATCH_PAGES, BATCH_ZEROS, BULK_MESSAGE_BYTES, CHUNK_BYTES};
use godwit_protocol::wire::bulk::{Coding, Head};

use super::state::{Known, State};
use crate::relay::RelayError;
use crate::relay::corpus::Corpus;
use crate::relay::frames::Frame;
use crate::relay::pack::Unpacker;
use crate::relay::pool::lock;
use crate::relay::sink::PageSink;
use crate::relay::table::{Table, parts};

/// Pages that are written and read back at a time.
const BACK_PAGES: usize = 64;

/// What the threads share.
pub(super) struct Placer {
    pub(super) sink: Arc<dyn PageSink>,
    pub(super) corpus: Arc<dyn Corpus>,
    pub(super) key: ChunkKey,
    zero: ChunkId,
    pub(super) table: Table,
    pub(super) state: Mutex<State>,
    pub(super) placed: AtomicU64,
    pub(super) known: AtomicU64,
    pub(super) stale_copies: AtomicU64,
    pub(super) altered: AtomicU64,
}

/// One thread's buffers.
pub(super) struct Worker {
    pub(super) placer: Arc<Placer>,
    unpacker: Unpacker,
    back: Vec<u8>,
}

impl Placer {
    pub(super) fn new(
        sink: Arc<dyn PageSink>,
        corpus: Arc<dyn Corpus>,
        key: ChunkKey,
        layout: Layout,
    ) -> Self {
        let zero = key.zero_id();
        Self {
            sink,
            corpus,
            zero,
            table: Table::new(layout, zero),
            key,
            state: Mutex::default(),
            placed: AtomicU64::new(0),
            known: AtomicU64::new(0),
            stale_copies: AtomicU64::new(0),
            altered: AtomicU64::new(0),
        }
    }

    /// Notes contents that were placed, for this session and for the others of this host.
    pub(super) fn learn(&self, contents: &[(u32, ChunkId)]) {
        if !contents.is_empty() {
            lock(&self.state).learn(contents);
            self.corpus.learn(contents);
        }
    }
}

impl Worker {
    pub(super) fn new(placer: Arc<Placer>) -> Result<Self, RelayError> {
        Ok(Self { placer, unpacker: Unpacker::new()?, back: vec![0; BACK_PAGES * CHUNK_BYTES] })
    }

    /// Does what a message asks; answers what to say.
    pub(super) fn run(&mut self, frame: Frame) -> Result<Vec<Frame>, RelayError> {
        match frame.head {
            Head::Offer { seq, pages, zeros, extents } => {
                let (pages, zeros) = self.lists(&pages, &zeros)?;
                self.offer(seq, &pages, &zeros, extents, &frame.payload)
            }
            Head::Ids { seq } => self.ids(seq, &frame.payload),
            Head::Push { seq, pages, zeros, sum, coding } => {
                let content = self.unpacker.unpack(coding, frame.payload, BULK_MESSAGE_BYTES)?;
                let (pages, zeros) = self.lists(&pages, &zeros)?;
                self.push(seq, &pages, &zeros, sum, &content)
            }
            Head::Literals { segments, coding } => self.literals(&segments, coding, frame.payload),
            other => Err(RelayError::Protocol(format!("unexpected {other:?}"))),
        }
    }

    fn lists(&self, pages: &[u8], zeros: &[u8]) -> Result<(Runs, Runs), RelayError> {
        let limit = self.placer.table.pages();
        let pages = Runs::decode(pages, limit, BATCH_PAGES as u32)?;
        Ok((pages, Runs::decode(zeros, limit, BATCH_ZEROS as u32)?))
    }

    pub(super) fn claim(&self, seq: u32, list: &Runs) {
        for &(first, count) in list.runs() {
            for (region, slot, _, count) in parts(first, count) {
                let mut locked = self.placer.table.lock(region);
                let entries = locked.region();
                (slot..slot + count as usize).for_each(|slot| {
                    entries.claim(slot, seq);
                });
            }
        }
    }

    pub(super) fn zeros(&self, seq: u32, list: &Runs) -> Result<(), RelayError> {
        let placer = &self.placer;
        for &(first, count) in list.runs() {
            for (region, slot, first, count) in parts(first, count) {
                let mut locked = placer.table.lock(region);
                let entries = locked.region();
                let mut at = 0;
                while at < count {
                    let changes = |i: &u32| {
                        let slot = slot + *i as usize;
                        entries.batch(slot) == seq && entries.sum(slot) != placer.zero
                    };
                    let run = (at..count).take_while(changes).count() as u32;
                    if run > 0 {
                        placer.sink.zero(first + at, run).map_err(RelayError::Memory)?;
                        (at..at + run).for_each(|i| entries.set(slot + i as usize, placer.zero));
                    }
                    at += run.max(1);
                }
            }
        }
        placer.placed.fetch_add(list.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Writes consecutive pages for a batch, reads them back and enters their hashes; calls
    /// `each` with the place in `content`, the page and the hash of what is there now.
    pub(super) fn put(
        &mut self,
        seq: u32,
        how: Sum,
        first: u32,
        content: &[u8],
        mut each: impl FnMut(usize, u32, ChunkId),
    ) -> Result<(), RelayError> {
        let placer = Arc::clone(&self.placer);
        let count = (content.len() / CHUNK_BYTES) as u32;
        for (region, slot, page, count) in parts(first, count) {
            let start = (page - first) as usize;
            let part = &content[start * CHUNK_BYTES..(start + count as usize) * CHUNK_BYTES];
            let mut locked = placer.table.lock(region);
            let entries = locked.region();
            let mut at = 0;
            while at < count as usize {
                let mine = |i: usize| i < count as usize && entries.batch(slot + i) == seq;
                let run = (at..).take_while(|&i| mine(i)).take(BACK_PAGES).count();
                if run > 0 {
                    let bytes = at * CHUNK_BYTES..(at + run) * CHUNK_BYTES;
                    let back = &mut self.back[..run * CHUNK_BYTES];
                    let from = page + at as u32;
                    placer.sink.write(from, &part[bytes]).map_err(RelayError::Memory)?;
                    placer.sink.read(from, back).map_err(RelayError::Memory)?;
                    for (i, there) in back.chunks_exact(CHUNK_BYTES).enumerate() {
                        let sum = placer.key.sum(how, there);
                        entries.set(slot + at + i, sum);
                        each(start + at + i, from + i as u32, sum);
                    }
                }
                at += run.max(1);
            }
        }
        placer.placed.fetch_add(u64::from(count), Ordering::Relaxed);
        Ok(())
    }

    fn push(
        &mut self,
        seq: u32,
        pages: &Runs,
        zeros: &Runs,
        sum: Sum,
        content: &[u8],
    ) -> Result<Vec<Frame>, RelayError> {
        if content.len() != pages.len() * CHUNK_BYTES {
            return Err(RelayError::Protocol("a push of another length than said".to_owned()));
        }
        match lock(&self.placer.state).begin(seq) {
            Known::New => {}
            Known::Placed => return Ok(vec![Head::Placed { seq }.into()]),
            _ => return Ok(Vec::new()),
        }
        self.claim(seq, pages);
        self.claim(seq, zeros);
        self.zeros(seq, zeros)?;
        let (mut learnt, mut at) = (Vec::with_capacity(pages.len()), 0);
        for &(first, count) in pages.runs() {
            let bytes = at..at + count as usize * CHUNK_BYTES;
            at = bytes.end;
            self.put(seq, sum, first, &content[bytes], |_, page, sum| learnt.push((page, sum)))?;
        }
        if sum != Sum::Id {
            learnt.clear();
        }
        self.placer.learn(&learnt);
        lock(&self.placer.state).finish(seq);
        Ok(vec![Head::Placed { seq }.into()])
    }

    fn literals(
        &mut self,
        segments: &[(u32, u32)],
        coding: Coding,
        payload: Bytes,
    ) -> Result<Vec<Frame>, RelayError> {
        let content = self.unpacker.unpack(coding, payload, BULK_MESSAGE_BYTES)?;
        let said: u64 = segments.iter().map(|&(_, count)| u64::from(count)).sum();
        if said * CHUNK_BYTES as u64 != content.len() as u64 {
            return Err(RelayError::Protocol("literals of another length than said".to_owned()));
        }
        let (mut rest, mut answers) = (&content[..], Vec::new());
        for &(seq, count) in segments {
            let (mine, later) = rest.split_at(count as usize * CHUNK_BYTES);
            rest = later;
            self.segment(seq, mine, &mut answers)?;
        }
        Ok(answers)
    }

    fn segment(
        &mut self,
        seq: u32,
        content: &[u8],
        answers: &mut Vec<Frame>,
    ) -> Result<(), RelayError> {
        let placer = Arc::clone(&self.placer);
        let wanted = {
            let mut state = lock(&placer.state);
            if let Some(expected) = state.expected(seq)
                && expected != content.len() / CHUNK_BYTES
            {
                return Err(RelayError::Protocol("literals that were not wanted".to_owned()));
            }
            let Some(wanted) = state.take(seq) else { return Ok(()) };
            wanted
        };
        let mut learnt = Vec::with_capacity(wanted.len());
        let mut at = 0;
        while at < wanted.len() {
            let first = wanted[at].0;
            let run = wanted[at..].iter().zip(first..).take_while(|(w, page)| w.0 == *page).count();
            let bytes = &content[at * CHUNK_BYTES..(at + run) * CHUNK_BYTES];
            self.put(seq, Sum::Id, first, bytes, |i, page, sum| {
                self_check(&placer, page, sum, &wanted[at + i].1, &mut learnt);
            })?;
            at += run;
        }
        let mut settled = vec![(seq, wanted.len())];
        for ((_, id), page) in wanted.iter().zip(content.chunks_exact(CHUNK_BYTES)) {
            // Known before nobody waits for it any more: whoever comes between finds it.
            placer.learn(&learnt);
            learnt.clear();
            let waiters = lock(&placer.state).waiters(id);
            for (seq, at) in waiters {
                self.put(seq, Sum::Id, at, page, |_, page, sum| {
                    self_check(&placer, page, sum, id, &mut Vec::new());
                })?;
                settled.push((seq, 1));
            }
        }
        let mut state = lock(&placer.state);
        for (seq, count) in settled {
            if state.settle(seq, count) {
                answers.push(Head::Placed { seq }.into());
            }
        }
        Ok(())
    }
}

/// Notes a content that reads back as announced, or counts one that does not.
pub(super) fn self_check(
    placer: &Placer,
    page: u32,
    sum: ChunkId,
    id: &ChunkId,
    learnt: &mut Vec<(u32, ChunkId)>,
) {
    if sum == *id {
        learnt.push((page, sum));
    } else {
        placer.altered.fetch_add(1, Ordering::Relaxed);
        tracing::error!(page, "a page reads back otherwise than announced");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::corpus::EmptyCorpus;
    use crate::relay::sink::FileSink;

    fn runs(pages: &[u32]) -> Vec<u8> {
        let mut list = Runs::default();
        pages.iter().for_each(|&page| list.push(page));
        list.encode()
    }

    fn said(frames: &[Frame]) -> Vec<Head> {
        frames.iter().map(|frame| frame.head.clone()).collect()
    }

    #[test]
    fn a_late_literal_never_replaces_a_younger_page_and_still_serves_who_waits() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * 4096).unwrap();
        let key = ChunkKey([1; 32]);
        let sink: Arc<dyn PageSink> = Arc::new(FileSink::new(file));
        let layout = Layout::new(16 << 12, &[]).unwrap();
        let placer = Placer::new(Arc::clone(&sink), Arc::new(EmptyCorpus), key.clone(), layout);
        let mut worker = Worker::new(Arc::new(placer)).unwrap();
        let (old, young) = ([1_u8; 4096], [2_u8; 4096]);
        let offer = |seq, page: u32| Frame {
            head: Head::Offer { seq, pages: runs(&[page]), zeros: vec![], extents: false },
            payload: key.id(&old).0.to_vec().into(),
        };
        let answer = worker.run(offer(1, 5)).unwrap();
        assert_eq!(
            (said(&answer), &answer[0].payload[..]),
            (vec![Head::Want { seq: 1 }], &[1][..])
        );
        // The same content elsewhere is not asked for again.
        assert_eq!(&worker.run(offer(3, 9)).unwrap()[0].payload[..], &[0]);
        let push = Head::Push {
            seq: 2,
            pages: runs(&[5]),
            zeros: vec![],
            sum: Sum::Quick,
            coding: Coding::Raw,
        };
        let answer = worker.run(Frame { head: push, payload: young.to_vec().into() }).unwrap();
        assert_eq!(said(&answer), [Head::Placed { seq: 2 }]);
        let literals = Frame {
            head: Head::Literals { segments: vec![(1, 1)], coding: Coding::Raw },
            payload: old.to_vec().into(),
        };
        let answer = worker.run(literals.clone()).unwrap();
        assert_eq!(said(&answer), [Head::Placed { seq: 1 }, Head::Placed { seq: 3 }]);
        assert_eq!(said(&worker.run(literals).unwrap()), [], "twice is once");
        let (mut there, mut copy) = ([0; 4096], [0; 4096]);
        sink.read(5, &mut there).unwrap();
        sink.read(9, &mut copy).unwrap();
        assert!(there == young && copy == old);
    }
}
