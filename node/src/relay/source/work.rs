//! The source's processor work: hashing batches and compressing what was wanted.
//!
//! Owns one thread's contexts. Answers with events; bounded by what the session and the store let
//! through.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use godwit_protocol::chunk::Sum;
use godwit_protocol::chunk::pages::Runs;
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::CHUNK_BYTES;
use godwit_protocol::wire::bulk::Coding;
use tokio::sync::mpsc;

use super::reader::Batch;
use super::session::{Event, Parcel};
use super::shared::Shared;
use crate::relay::pool::lock;
use crate::relay::stream::StreamPacker;
use crate::relay::table::parts;

/// What a worker is asked.
pub(super) enum Job {
    /// Name the contents of a batch and enter them into the digest table.
    Hash(Batch),
    /// Compress pages into one message.
    Pack {
        /// What the message is.
        parcel: Parcel,
        /// The pages.
        parts: Vec<Bytes>,
        /// At this level.
        level: i32,
        /// As the next part of the long stream of this connection.
        stream: Option<u32>,
    },
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    events: mpsc::Sender<Event>,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, events: mpsc::Sender<Event>) -> Self {
        Self { shared, events }
    }

    pub(super) fn run(&self, job: Job) {
        let event = match job {
            Job::Hash(batch) => self.hash(batch),
            Job::Pack { parcel, parts, level, stream: None } => {
                self.pack(parcel, &parts, level, None)
            }
            Job::Pack { parcel, parts, level, stream: Some(generation) } => {
                self.pack_stream(parcel, &parts, level, generation)
            }
        };
        // A session that has ended wants no more events.
        let _ = self.events.blocking_send(event);
    }

    fn hash(&self, batch: Batch) -> Event {
        let key = &self.shared.key;
        // The digest's entries of a disk are ids: its image is read by another thread.
        let sum = if self.shared.pushes() && !batch.disk { Sum::Quick } else { Sum::Id };
        let pages = batch.data.chunks_exact(CHUNK_BYTES);
        let sums: Vec<ChunkId> = pages.map(|page| key.sum(sum, page)).collect();
        if !batch.disk {
            self.enter(&batch.pages, batch.seq, sums.iter().copied());
            self.enter(&batch.zeros, batch.seq, std::iter::repeat(key.zero_id()));
        }
        Event::Hashed { batch, sum, sums }
    }

    fn enter(&self, pages: &Runs, seq: u32, mut sums: impl Iterator<Item = ChunkId>) {
        for &(first, count) in pages.runs() {
            for (region, slot, _, count) in parts(first, count) {
                let mut locked = self.shared.table.lock(region);
                let entries = locked.region();
                for (slot, sum) in (slot..slot + count as usize).zip(sums.by_ref()) {
                    if entries.claim(slot, seq) {
                        entries.set(slot, sum);
                    }
                }
            }
        }
    }

    fn pack(&self, parcel: Parcel, parts: &[Bytes], level: i32, stream: Option<u32>) -> Event {
        let began = Instant::now();
        let content = parts.concat();
        let from = content.len();
        match self.shared.seat.budget().packers.pack(content, level) {
            Ok((coding, payload)) => {
                let payload = Bytes::from(payload);
                let took = began.elapsed();
                Event::Packed { parcel, level, stream, from, took, coding, payload }
            }
            Err(cause) => Event::Failed(cause),
        }
    }

    fn pack_stream(&self, parcel: Parcel, parts: &[Bytes], level: i32, generation: u32) -> Event {
        let began = Instant::now();
        let mut stream = lock(&self.shared.stream);
        let begins = stream.as_ref().is_none_or(|stream| stream.generation != generation);
        if begins {
            // What the one before held is there for this one.
            *stream = None;
            let window = self.shared.seat.window(self.shared.window.load(Ordering::Relaxed));
            match window.map(|window| StreamPacker::new(generation, window)).transpose() {
                Ok(new) => *stream = new,
                Err(cause) => return Event::Failed(cause),
            }
        }
        let Some(packer) = stream.as_mut() else {
            drop(stream);
            return self.pack(parcel, parts, level, Some(generation));
        };
        let from: usize = parts.iter().map(Bytes::len).sum();
        match packer.pack(parts) {
            Ok(payload) => {
                let (took, payload) = (began.elapsed(), Bytes::from(payload));
                // The session bounds what is packed together far below 4 GiB.
                let coding = Coding::Stream { len: from as u32, begins };
                let stream = Some(generation);
                Event::Packed { parcel, level, stream, from, took, coding, payload }
            }
            Err(cause) => Event::Failed(cause),
        }
    }
}
