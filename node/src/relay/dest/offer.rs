//! Offers: what this host has is placed, what it lacks is asked for.
//!
//! Owns the answers to an offer, and to the ids of extents that were asked for. Pages that lie one
//! after the other are placed together: a disk takes one write for many blocks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use godwit_protocol::chunk::extent::{Part, parts};
use godwit_protocol::chunk::pages::Runs;
use godwit_protocol::chunk::{EXTENT_CHUNKS, Page, Sum, ZERO_PAGE};
use godwit_protocol::id::ChunkId;
use godwit_protocol::limits::CHUNK_BYTES;
use godwit_protocol::wire::bulk::Head;

use super::place::{Worker, self_check};
use super::state::{Known, Splitting};
use crate::relay::RelayError;
use crate::relay::frames::Frame;
use crate::relay::pool::lock;

/// A page of an offer: its place in it, its index, its id.
type Item = (usize, u32, ChunkId);

/// Pages that are placed together at most.
const RUN_PAGES: usize = 256;

/// Consecutive pages that were found here.
#[derive(Default)]
struct Found {
    first: u32,
    ids: Vec<ChunkId>,
    content: Vec<u8>,
}

impl Found {
    fn takes(&self, page: u32) -> bool {
        let next = u64::from(self.first) + self.ids.len() as u64;
        self.ids.is_empty() || (u64::from(page) == next && self.ids.len() < RUN_PAGES)
    }

    fn push(&mut self, page: u32, id: ChunkId, content: &[u8]) {
        if self.ids.is_empty() {
            self.first = page;
        }
        self.ids.push(id);
        self.content.extend_from_slice(content);
    }
}

impl Worker {
    pub(super) fn offer(
        &mut self,
        seq: u32,
        pages: &Runs,
        zeros: &Runs,
        extents: bool,
        ids: &[u8],
    ) -> Result<Vec<Frame>, RelayError> {
        let parts: Vec<Part> = if extents {
            parts(pages).collect()
        } else {
            pages.iter().enumerate().map(|(at, page)| Part::Single(at, page)).collect()
        };
        let (ids, rest) = ids.as_chunks::<16>();
        if ids.len() != parts.len() || !rest.is_empty() {
            return Err(RelayError::Protocol("an offer with too few or many ids".to_owned()));
        }
        match lock(&self.placer.state).begin(seq) {
            Known::Placed => return Ok(vec![Head::Placed { seq }.into()]),
            Known::Waiting(bits) => return Ok(vec![frame(Head::Want { seq }, bits)]),
            Known::Split(bits) => return Ok(vec![frame(Head::Split { seq }, bits)]),
            Known::Busy => return Ok(Vec::new()),
            Known::New => {}
        }
        self.claim(seq, pages);
        self.claim(seq, zeros);
        self.zeros(seq, zeros)?;
        let mut splitting = Splitting { count: pages.len(), ..Splitting::default() };
        for (part, id) in parts.into_iter().zip(ids) {
            match part {
                Part::Single(at, page) => splitting.items.push((at, page, ChunkId(*id))),
                Part::Extent(_, page) if self.extent(seq, page, &ChunkId(*id))? => {}
                Part::Extent(at, page) => splitting.asked.push((at, page)),
            }
        }
        if !splitting.asked.is_empty() {
            let bits = lock(&self.placer.state).split(seq, splitting);
            return Ok(vec![frame(Head::Split { seq }, bits)]);
        }
        self.settle(seq, splitting.count, &splitting.items)
    }

    /// The ids of the extents that were asked for.
    pub(super) fn ids(&mut self, seq: u32, ids: &[u8]) -> Result<Vec<Frame>, RelayError> {
        let Some(mut splitting) = lock(&self.placer.state).joined(seq) else {
            return Ok(Vec::new());
        };
        let (ids, rest) = ids.as_chunks::<16>();
        if ids.len() != splitting.asked.len() * EXTENT_CHUNKS || !rest.is_empty() {
            return Err(RelayError::Protocol("ids that were not asked for".to_owned()));
        }
        for (&(at, page), ids) in splitting.asked.iter().zip(ids.chunks_exact(EXTENT_CHUNKS)) {
            let items = ids.iter().enumerate();
            splitting.items.extend(items.map(|(i, id)| (at + i, page + i as u32, ChunkId(*id))));
        }
        splitting.items.sort_unstable_by_key(|item| item.0);
        self.settle(seq, splitting.count, &splitting.items)
    }

    /// Places what is known of a batch and asks for the rest.
    fn settle(&mut self, seq: u32, count: usize, items: &[Item]) -> Result<Vec<Frame>, RelayError> {
        let lacking = self.copies(seq, items)?;
        let bits = lock(&self.placer.state).lack(seq, count, &lacking);
        Ok(vec![match bits {
            Some(bits) => frame(Head::Want { seq }, bits),
            None => Head::Placed { seq }.into(),
        }])
    }

    /// Places a whole extent if this host has it.
    fn extent(&mut self, seq: u32, page: u32, id: &ChunkId) -> Result<bool, RelayError> {
        let placer = Arc::clone(&self.placer);
        let mut content = vec![0; EXTENT_CHUNKS * CHUNK_BYTES];
        let Some(extent) = content.first_chunk_mut() else { return Ok(false) };
        let Some(ids) = placer.corpus.read_extent(id, extent) else { return Ok(false) };
        self.put_found(seq, &Found { first: page, ids: ids.to_vec(), content })?;
        Ok(true)
    }

    fn put_found(&mut self, seq: u32, found: &Found) -> Result<(), RelayError> {
        let placer = Arc::clone(&self.placer);
        let mut learnt = Vec::with_capacity(found.ids.len());
        self.put(seq, Sum::Id, found.first, &found.content, |i, page, sum| {
            self_check(&placer, page, sum, &found.ids[i], &mut learnt);
        })?;
        placer.known.fetch_add(found.ids.len() as u64, Ordering::Relaxed);
        placer.learn(&learnt);
        Ok(())
    }

    /// Places what this host has; answers what it lacks.
    fn copies(&mut self, seq: u32, items: &[Item]) -> Result<Vec<Item>, RelayError> {
        let placer = Arc::clone(&self.placer);
        let ids: Vec<ChunkId> = items.iter().map(|item| item.2).collect();
        let has = placer.corpus.has(&ids);
        let own: Vec<Option<u32>> = {
            let state = lock(&placer.state);
            ids.iter().map(|id| state.page_of(id)).collect()
        };
        let (mut lacking, mut found) = (Vec::new(), Found::default());
        let mut buffer: Page = ZERO_PAGE;
        for (i, &(at, page, id)) in items.iter().enumerate() {
            let own = own[i].filter(|&own| placer.sink.read(own, &mut buffer).is_ok());
            let mut here = own.is_some() && placer.key.id(&buffer) == id;
            if !here && has.get(i) == Some(&true) {
                here = placer.corpus.read(&id, &mut buffer) && placer.key.id(&buffer) == id;
                placer.stale_copies.fetch_add(u64::from(!here), Ordering::Relaxed);
            }
            if !here {
                lacking.push((at, page, id));
                continue;
            }
            if !found.takes(page) {
                self.put_found(seq, &std::mem::take(&mut found))?;
            }
            found.push(page, id, &buffer);
        }
        if !found.ids.is_empty() {
            self.put_found(seq, &found)?;
        }
        Ok(lacking)
    }
}

fn frame(head: Head, payload: Vec<u8>) -> Frame {
    Frame { head, payload: payload.into() }
}
