//! The source's processor work: hashing batches and compressing what was wanted.
//!
//! Owns one thread's contexts. Answers with events; bounded by what the session and the store let
//! through.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use godwit_protocol::chunk::digest::REGION_PAGES;
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::CHUNK_BYTES;
use tokio::sync::mpsc;

use super::reader::Batch;
use super::session::{Event, Parcel};
use super::shared::Shared;
use crate::relay::RelayError;
use crate::relay::pack::Packer;

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
    },
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    events: mpsc::Sender<Event>,
    packer: Packer,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        events: mpsc::Sender<Event>,
    ) -> Result<Self, RelayError> {
        Ok(Self { shared, events, packer: Packer::new()? })
    }

    pub(super) fn run(&mut self, job: Job) {
        let event = match job {
            Job::Hash(batch) => self.hash(batch),
            Job::Pack { parcel, parts, level } => self.pack(parcel, &parts, level),
        };
        // A session that has ended wants no more events.
        let _ = self.events.blocking_send(event);
    }

    fn hash(&self, batch: Batch) -> Event {
        let key = &self.shared.key;
        let ids: Vec<ChunkId> = batch.data.chunks_exact(CHUNK_BYTES).map(|p| key.id(p)).collect();
        for (page, &id) in batch.pages.iter().zip(&ids) {
            self.enter(page, batch.seq, id);
        }
        let zero = key.zero_id();
        for page in batch.zeros.iter() {
            self.enter(page, batch.seq, zero);
        }
        Event::Hashed { batch, ids }
    }

    fn enter(&self, page: u32, seq: u32, id: ChunkId) {
        let (region, slot) = (page as usize / REGION_PAGES, page as usize % REGION_PAGES);
        let mut locked = self.shared.table.lock(region);
        let entries = locked.region();
        if entries.claim(slot, seq) {
            entries.set(slot, id);
        }
    }

    fn pack(&mut self, parcel: Parcel, parts: &[Bytes], level: i32) -> Event {
        let began = Instant::now();
        let content = parts.concat();
        let from = content.len();
        match self.packer.pack(content, level) {
            Ok((coding, payload)) => {
                let payload = Bytes::from(payload);
                Event::Packed { parcel, level, from, took: began.elapsed(), coding, payload }
            }
            Err(cause) => Event::Failed(cause),
        }
    }
}
