//! One long compressed stream, for paths that are slower than the processor.
//!
//! Owns a compressor that looks back over what it sent before, and its counterpart. A message alone
//! knows nothing of the messages before it; over a slow path what they have in common is worth
//! looking for (5 to 7 % of a Debian guest's memory). The price: messages are unpacked in the order
//! they were packed, and a new connection begins a new stream. Never trusts a length that came from
//! the network.

use std::io::Write;
use std::ops::RangeInclusive;

use bytes::Bytes;
use zstd::stream::raw::{CParameter, DParameter, Decoder, Operation};
use zstd::stream::write::Encoder;

use super::RelayError;
use super::budget::Window;

/// The level of the stream; [`super::pack::Levels`] chooses it where it pays.
pub(super) const STREAM_LEVEL: i32 = 7;
/// How far it may look back: 2 to this power, bytes. Both ends hold as much.
pub(super) const WINDOW_LOGS: RangeInclusive<u32> = 20..=25;
/// What a stream takes of the memory of the end that compresses, KiB, by how far it looks back.
const KIB: [usize; 6] = [2600, 4400, 8000, 15_200, 24_400, 42_900];
/// Logarithm of the places that are remembered, at most; as many as the level has by itself.
const HASH_LOG: u32 = 20;

/// What an end takes for a stream of such a window, bytes.
pub(super) fn stream_bytes(log: u32) -> usize {
    let at = log.saturating_sub(*WINDOW_LOGS.start()) as usize;
    KIB[at.min(KIB.len() - 1)] << 10
}

/// What is set for a stream of such a window.
fn parameters(log: u32) -> [CParameter; 4] {
    let hash = HASH_LOG.min(log - 3);
    [
        CParameter::WindowLog(log),
        CParameter::HashLog(hash),
        CParameter::ChainLog(hash - 1),
        CParameter::EnableLongDistanceMatching(true),
    ]
}

/// Compresses one message after the other.
pub(super) struct StreamPacker {
    /// Which connection's stream it is.
    pub(super) generation: u32,
    encoder: Encoder<'static, Vec<u8>>,
    _window: Window,
}

impl StreamPacker {
    pub(super) fn new(generation: u32, window: Window) -> Result<Self, RelayError> {
        let mut encoder = Encoder::new(Vec::new(), STREAM_LEVEL)?;
        for parameter in parameters(window.log) {
            encoder.set_parameter(parameter)?;
        }
        Ok(Self { generation, encoder, _window: window })
    }

    /// Packs the next message.
    pub(super) fn pack(&mut self, parts: &[Bytes]) -> Result<Vec<u8>, RelayError> {
        for part in parts {
            self.encoder.write_all(part)?;
        }
        self.encoder.flush()?;
        Ok(std::mem::take(self.encoder.get_mut()))
    }
}

/// Decompresses one message after the other.
pub(super) struct StreamUnpacker {
    /// What the far end was allowed; none: no stream.
    window: Option<Window>,
    decoder: Option<Decoder<'static>>,
}

impl StreamUnpacker {
    pub(super) fn new(window: Option<Window>) -> Self {
        Self { window, decoder: None }
    }

    /// The `len` bytes of content of the next message, at most `most`.
    pub(super) fn unpack(
        &mut self,
        begins: bool,
        len: usize,
        payload: &[u8],
        most: usize,
    ) -> Result<Vec<u8>, RelayError> {
        let broken = |what: &str| RelayError::Protocol(format!("a compressed stream {what}"));
        if len > most {
            return Err(broken(&format!("with {len} bytes where {most} are the most")));
        }
        if begins {
            let window = self.window.as_ref().ok_or_else(|| broken("that was not allowed"))?;
            // Before another takes as much.
            self.decoder = None;
            let mut decoder = Decoder::new()?;
            decoder.set_parameter(DParameter::WindowLogMax(window.log))?;
            self.decoder = Some(decoder);
        }
        let decoder = self.decoder.as_mut().ok_or_else(|| broken("without a beginning"))?;
        let mut content = vec![0; len];
        let (mut read, mut written) = (0, 0);
        while read < payload.len() || written < len {
            let step = decoder
                .run_on_buffers(&payload[read..], &mut content[written..])
                .map_err(|e| broken(&format!("that does not decompress: {e}")))?;
            if step.bytes_read == 0 && step.bytes_written == 0 {
                return Err(broken("of another length than said"));
            }
            read += step.bytes_read;
            written += step.bytes_written;
        }
        // What does not fit would come out with the next message.
        let more = decoder.run_on_buffers(&[], &mut [0]);
        if more.is_err() || more.is_ok_and(|more| more.bytes_written > 0) {
            return Err(broken("of another length than said"));
        }
        Ok(content)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use zstd::zstd_safe::{CCtx, InBuffer, OutBuffer};

    use super::*;
    use crate::relay::Budget;

    fn text(seed: u8, len: usize) -> Bytes {
        let mut x = u32::from(seed) + 1;
        let byte = |_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        };
        (0..len).map(byte).collect::<Vec<u8>>().into()
    }

    fn window(log: u32) -> Window {
        Arc::new(Budget::default()).join().window(log).unwrap()
    }

    fn packing(log: u32) -> StreamPacker {
        StreamPacker::new(1, window(log)).unwrap()
    }

    fn unpacking(log: u32) -> StreamUnpacker {
        StreamUnpacker::new(Some(window(log)))
    }

    #[test]
    fn a_stream_takes_what_is_counted() {
        for log in WINDOW_LOGS {
            let mut context = CCtx::create();
            context.set_parameter(CParameter::CompressionLevel(STREAM_LEVEL)).unwrap();
            for parameter in parameters(log) {
                context.set_parameter(parameter).unwrap();
            }
            let (content, mut packed) = ([7; 100_000], [0; 200_000]);
            let mut into = OutBuffer::around(&mut packed[..]);
            context.compress_stream(&mut into, &mut InBuffer::around(&content)).unwrap();
            let (takes, counted) = (context.sizeof(), stream_bytes(log));
            assert!(takes <= counted && takes > counted - counted / 10, "{log}: {takes} {counted}");
        }
    }

    #[test]
    fn a_stream_that_looks_back_further_than_allowed_is_an_error() {
        // A window is made when more than a small message needs it.
        let content = text(1, 3 << 20);
        let packed = packing(21).pack(std::slice::from_ref(&content)).unwrap();
        assert!(unpacking(20).unpack(true, content.len(), &packed, 4 << 20).is_err());
        assert!(StreamUnpacker::new(None).unpack(true, content.len(), &packed, 4 << 20).is_err());
        assert_eq!(unpacking(21).unpack(true, content.len(), &packed, 4 << 20).unwrap(), content);
    }

    #[test]
    fn a_message_may_look_back_and_is_bounded() {
        let (mut packer, mut unpacker) = (packing(25), unpacking(25));
        let first = text(1, 300_000);
        let packed = packer.pack(&[first.slice(..100_000), first.slice(100_000..)]).unwrap();
        let second = packer.pack(std::slice::from_ref(&first)).unwrap();
        assert!(second.len() < 2000, "the same again costs {} bytes", second.len());
        assert!(unpacker.unpack(false, 300_000, &packed, 300_000).is_err(), "no beginning");
        assert!(unpacker.unpack(true, 300_001, &packed, 300_000).is_err());
        assert_eq!(unpacker.unpack(true, 300_000, &packed, 300_000).unwrap(), first);
        assert_eq!(unpacker.unpack(false, 300_000, &second, 300_000).unwrap(), first);
    }

    #[test]
    fn a_wrong_length_or_a_lost_message_is_an_error() {
        let mut packer = packing(20);
        let packed = packer.pack(&[text(1, 50_000)]).unwrap();
        let later = packer.pack(&[text(2, 50_000)]).unwrap();
        let mut unpacker = unpacking(20);
        assert!(unpacker.unpack(true, 49_999, &packed, 1 << 20).is_err());
        let mut unpacker = unpacking(20);
        assert!(unpacker.unpack(true, 50_001, &packed, 1 << 20).is_err());
        let mut unpacker = unpacking(20);
        assert!(unpacker.unpack(true, 50_000, &later, 1 << 20).is_err());
    }
}
