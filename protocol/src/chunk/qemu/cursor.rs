//! A position in a slice. Owns bounds: every read answers `None` beyond the end.

/// Reads forward; [`Cursor::taken`] is what was read since the start.
pub(super) struct Cursor<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(input: &'a [u8]) -> Self {
        Self { input, at: 0 }
    }

    pub(super) fn left(&self) -> usize {
        self.input.len() - self.at
    }

    pub(super) fn taken(&self) -> &'a [u8] {
        &self.input[..self.at]
    }

    pub(super) fn all(&mut self) -> &'a [u8] {
        self.at = self.input.len();
        self.input
    }

    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Goes back to a position that was reached before.
    pub(super) fn rewind(&mut self, position: usize) {
        self.at = position.min(self.at);
    }

    pub(super) fn peek(&self) -> Option<u8> {
        self.input.get(self.at).copied()
    }

    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let out = self.input.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(out)
    }

    fn array<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let out = self.input.get(self.at..)?.first_chunk::<N>()?;
        self.at += N;
        Some(out)
    }

    pub(super) fn page(&mut self) -> Option<&'a crate::chunk::Page> {
        self.array()
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|b| b[0])
    }

    pub(super) fn be16(&mut self) -> Option<u16> {
        self.array().map(|b| u16::from_be_bytes(*b))
    }

    pub(super) fn be32(&mut self) -> Option<u32> {
        self.array().map(|b| u32::from_be_bytes(*b))
    }

    pub(super) fn be64(&mut self) -> Option<u64> {
        self.array().map(|b| u64::from_be_bytes(*b))
    }

    /// A name of at most 255 bytes behind its length.
    pub(super) fn name(&mut self) -> Option<&'a [u8]> {
        let len = self.u8()?;
        self.bytes(usize::from(len))
    }
}
