//! A cursor over received bytes. Owns nothing; every step checks what is left.

use super::{CodecError, TEXT_BYTES_MAX};

/// What is left of a message.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], CodecError> {
        let (part, rest) = self.0.split_at_checked(len).ok_or(CodecError::Short)?;
        self.0 = rest;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (part, rest) = self.0.split_first_chunk().ok_or(CodecError::Short)?;
        self.0 = rest;
        Ok(*part)
    }

    pub(super) fn u16(&mut self) -> Result<u16, CodecError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, CodecError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, CodecError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn magic(&mut self, what: &'static str, magic: u64) -> Result<(), CodecError> {
        let found = self.u64()?;
        if found == magic { Ok(()) } else { Err(CodecError::Magic { what, found }) }
    }

    /// A string whose length, a 32-bit number, stands before it.
    pub(super) fn counted_text(&mut self) -> Result<String, CodecError> {
        let len = usize::try_from(self.u32()?).map_err(|_| CodecError::Short)?;
        text(self.bytes(len)?)
    }

    /// All that is left, as a string.
    pub(super) fn rest_text(&mut self) -> Result<String, CodecError> {
        text(std::mem::take(&mut self.0))
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), CodecError> {
        if self.0.is_empty() { Ok(()) } else { Err(CodecError::Trailing(self.0.len())) }
    }
}

fn text(bytes: &[u8]) -> Result<String, CodecError> {
    if bytes.len() > TEXT_BYTES_MAX {
        return Err(CodecError::Text);
    }
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| CodecError::Text)
}

/// Appends a string behind its length, cut to what a string may have.
pub(super) fn put_counted_text(out: &mut Vec<u8>, text: &str) {
    let text = cut(text);
    // Below 4097 by the cut.
    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The longest beginning of `text` that a string may have.
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}
