//! The requests of one call that are in flight.
//!
//! Owns which bytes of each have been answered. Never touches the content. Invariant: a range that is
//! handed out lies inside its piece and is handed out once.

use std::ops::Range;

use super::NbdError;

/// Gaps that a server may leave in a reply on its way: one that answers in order leaves none.
const RANGES_MAX: usize = 1024;

/// One request in flight.
#[derive(Debug)]
pub(super) struct Piece {
    pub cookie: u64,
    /// Where it begins inside the call, bytes.
    pub at: u64,
    /// Bytes.
    pub len: u32,
    /// The server reported an error for it.
    pub failed: bool,
    /// What has been answered: from, to; inside the piece, in no order, none touches another.
    covered: Vec<(u64, u64)>,
}

impl Piece {
    pub(super) fn new(cookie: u64, at: u64, len: u32) -> Self {
        Self { cookie, at, len, failed: false, covered: Vec::new() }
    }

    /// The piece inside the call's buffer.
    pub(super) fn range(&self) -> Range<usize> {
        range(self.at, self.at + u64::from(self.len))
    }

    /// Notes that `len` bytes at `offset` of the export are answered, for a call that begins at `base`;
    /// answers their place in the call's buffer. Errors: outside the piece, answered before.
    pub(super) fn cover(
        &mut self,
        base: u64,
        offset: u64,
        len: u32,
    ) -> Result<Range<usize>, NbdError> {
        let outside = NbdError::Protocol("content outside its request");
        let Some(mut from) = offset.checked_sub(base + self.at) else { return Err(outside) };
        let Some(mut to) = from.checked_add(len.into()).filter(|to| *to <= self.len.into()) else {
            return Err(outside);
        };
        let place = range(self.at + from, self.at + to);
        if self.covered.iter().any(|(a, b)| from < *b && *a < to) {
            return Err(NbdError::Protocol("content twice"));
        }
        self.covered.retain(|(a, b)| {
            let touches = *b == from || *a == to;
            if touches {
                (from, to) = (from.min(*a), to.max(*b));
            }
            !touches
        });
        if self.covered.len() == RANGES_MAX {
            return Err(NbdError::Protocol("content in too many parts"));
        }
        self.covered.push((from, to));
        Ok(place)
    }

    /// Whether all of it is answered.
    pub(super) fn is_covered(&self) -> bool {
        self.covered == [(0, u64::from(self.len))]
    }
}

/// Bounded by the length of a buffer wherever it is used as one.
fn range(from: u64, to: u64) -> Range<usize> {
    let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    index(from)..index(to)
}

/// Requests in flight, few.
#[derive(Debug, Default)]
pub(super) struct Pieces(Vec<Piece>);

impl Pieces {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn add(&mut self, piece: Piece) {
        self.0.push(piece);
    }

    /// Error: a cookie that is not in flight.
    pub(super) fn find(&mut self, cookie: u64) -> Result<&mut Piece, NbdError> {
        self.0.iter_mut().find(|piece| piece.cookie == cookie).ok_or(NOT_IN_FLIGHT)
    }

    /// As `find`; it is answered.
    pub(super) fn take(&mut self, cookie: u64) -> Result<Piece, NbdError> {
        let at = self.0.iter().position(|piece| piece.cookie == cookie).ok_or(NOT_IN_FLIGHT)?;
        Ok(self.0.swap_remove(at))
    }
}

const NOT_IN_FLIGHT: NbdError = NbdError::Protocol("a reply to nothing");
