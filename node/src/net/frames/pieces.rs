//! Frames in datagrams: a head, and pieces for what is longer than one datagram. A marker is a datagram of
//! no pieces: what the driver says in the order of the frames.
//!
//! Owns the form and the table of unfinished frames. Sans-IO: time is an argument. Invariant: the
//! table is bounded in entries and bytes, and an unfinished frame is dropped, never delivered.
//!
//! ```text
//! datagram = wire tag u32 | frame number u16 | piece u8 | pieces u8 | bytes
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;

pub use godwit_protocol::limits::FRAME_BYTES;

/// Longest marker, bytes.
pub const MARKER_BYTES: usize = 64;
/// Bytes in front of each piece.
pub const HEAD_BYTES: usize = 8;
/// Most pieces of a frame.
const PIECES: usize = 16;
/// Most unfinished frames from one peer.
const UNFINISHED: usize = 64;
/// An unfinished frame is given up after this long: the other piece was lost.
const EXPIRY: Duration = Duration::from_millis(500);

/// Cuts a frame into datagrams of at most `datagram` bytes; `None` if it cannot be.
#[must_use]
pub fn split(tag: u32, number: u16, frame: &[u8], datagram: usize) -> Option<Vec<Bytes>> {
    let room = datagram.checked_sub(HEAD_BYTES).filter(|room| *room > 0)?;
    if frame.is_empty() || frame.len() > FRAME_BYTES {
        return None;
    }
    let pieces = frame.len().div_ceil(room);
    let count = u8::try_from(pieces).ok().filter(|_| pieces <= PIECES)?;
    // Pieces of equal length: a short last one would arrive before the long one more often.
    let each = frame.len().div_ceil(pieces);
    let cut = frame.chunks(each).zip(0_u8..).map(|(bytes, piece)| {
        let mut datagram = Vec::with_capacity(HEAD_BYTES + bytes.len());
        datagram.extend_from_slice(&tag.to_be_bytes());
        datagram.extend_from_slice(&number.to_be_bytes());
        datagram.extend_from_slice(&[piece, count]);
        datagram.extend_from_slice(bytes);
        Bytes::from(datagram)
    });
    Some(cut.collect())
}

/// What one or more datagrams were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// A frame of a wire.
    Frame(Bytes),
    /// What the driver says behind the frames sent before; at most [`MARKER_BYTES`].
    Marker(Bytes),
}

/// A marker as a datagram; `None` if it is too long.
#[must_use]
pub fn marker(tag: u32, bytes: &[u8]) -> Option<Bytes> {
    let head = [&tag.to_be_bytes()[..], &[0; 4]].concat();
    (1..=MARKER_BYTES).contains(&bytes.len()).then(|| Bytes::from([&head, bytes].concat()))
}

struct Unfinished {
    number: u16,
    tag: u32,
    since: Instant,
    missing: usize,
    pieces: Vec<Option<Bytes>>,
}

/// Puts the frames of one connection together again.
#[derive(Default)]
pub struct Joiner {
    unfinished: VecDeque<Unfinished>,
    /// Frames given up: a piece was lost, malformed or too late.
    pub dropped: u64,
}

impl Joiner {
    /// Takes a datagram; gives a frame and its wire tag if this completes one, or a marker.
    pub fn take(&mut self, datagram: Bytes, now: Instant) -> Option<(u32, Payload)> {
        while self.unfinished.front().is_some_and(|u| now.duration_since(u.since) > EXPIRY) {
            self.unfinished.pop_front();
            self.dropped += 1;
        }
        let (head, bytes) = datagram.split_at_checked(HEAD_BYTES)?;
        let tag = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let number = u16::from_be_bytes([head[4], head[5]]);
        let (piece, count) = (usize::from(head[6]), usize::from(head[7]));
        if (piece, count) == (0, 0) && (1..=MARKER_BYTES).contains(&bytes.len()) {
            return Some((tag, Payload::Marker(datagram.slice(HEAD_BYTES..))));
        }
        if bytes.is_empty() || piece >= count || count > PIECES {
            self.dropped += 1;
            return None;
        }
        let bytes = datagram.slice(HEAD_BYTES..);
        if count == 1 {
            return Some((tag, Payload::Frame(bytes)));
        }
        let same = |u: &Unfinished| u.number == number && u.tag == tag && u.pieces.len() == count;
        let at = match self.unfinished.iter().position(same) {
            Some(at) => at,
            None => {
                if self.unfinished.len() >= UNFINISHED {
                    self.unfinished.pop_front();
                    self.dropped += 1;
                }
                let pieces = vec![None; count];
                let fresh = Unfinished { number, tag, since: now, missing: count, pieces };
                self.unfinished.push_back(fresh);
                self.unfinished.len() - 1
            }
        };
        let entry = &mut self.unfinished[at];
        if entry.pieces[piece].replace(bytes).is_none() {
            entry.missing -= 1;
        }
        if entry.missing > 0 {
            return None;
        }
        let whole = self.unfinished.remove(at)?;
        let frame: Vec<u8> = whole.pieces.into_iter().flatten().flatten().collect();
        if frame.len() > FRAME_BYTES {
            self.dropped += 1;
            return None;
        }
        Some((tag, Payload::Frame(Bytes::from(frame))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_pieces_in_any_order() {
        let frame: Vec<u8> = (0..1514_u32).map(|i| i as u8).collect();
        let pieces = split(7, 1, &frame, 1200).unwrap();
        assert_eq!(pieces.len(), 2);
        let now = Instant::now();
        let mut joiner = Joiner::default();
        assert_eq!(joiner.take(pieces[1].clone(), now), None);
        let (tag, whole) = joiner.take(pieces[0].clone(), now).unwrap();
        assert_eq!((tag, whole), (7, Payload::Frame(frame.into())));
        assert!(split(7, 1, &[0; FRAME_BYTES + 1], 1200).is_none());
        assert!(split(7, 1, &[], 1200).is_none() && split(7, 1, &[1], 8).is_none());
    }

    #[test]
    fn a_marker_is_no_frame() {
        let mut joiner = Joiner::default();
        let sent = marker(7, b"flipped").unwrap();
        let got = joiner.take(sent, Instant::now());
        assert_eq!(got, Some((7, Payload::Marker(Bytes::from_static(b"flipped")))));
        assert!(marker(7, b"").is_none() && marker(7, &[0; MARKER_BYTES + 1]).is_none());
        let long = [&[0; HEAD_BYTES][..], &[1; MARKER_BYTES + 1]].concat();
        assert_eq!((joiner.take(long.into(), Instant::now()), joiner.dropped), (None, 1));
    }

    #[test]
    fn a_lost_piece_costs_its_frame_and_nothing_else() {
        let now = Instant::now();
        let mut joiner = Joiner::default();
        for number in 0..200 {
            let pieces = split(7, number, &[1; 1514], 1200).unwrap();
            assert_eq!(joiner.take(pieces[0].clone(), now), None);
        }
        assert_eq!(joiner.unfinished.len(), UNFINISHED);
        let one = split(7, 300, &[2; 64], 1200).unwrap();
        assert!(joiner.take(one[0].clone(), now + 2 * EXPIRY).is_some());
        assert_eq!((joiner.unfinished.len(), joiner.dropped), (0, 200));
    }

    proptest::proptest! {
        #[test]
        fn any_length_and_datagram_size(len in 1_usize..=FRAME_BYTES, room in 1_usize..2000) {
            let frame: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let Some(pieces) = split(1, 2, &frame, room) else { return Ok(()) };
            let mut joiner = Joiner::default();
            let now = Instant::now();
            let last = pieces.into_iter().inspect(|p| assert!(p.len() <= room));
            let whole = last.filter_map(|p| joiner.take(p, now)).next().unwrap();
            assert_eq!(whole.1, Payload::Frame(frame.into()));
        }

        #[test]
        fn garbage_never_panics(
            all in proptest::collection::vec(
                proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40), 0..40),
        ) {
            let mut joiner = Joiner::default();
            for datagram in all {
                let _ = joiner.take(Bytes::from(datagram), Instant::now());
            }
            assert!(joiner.unfinished.len() <= UNFINISHED);
        }
    }
}
