//! One long compressed stream, for paths that are slower than the processor.
//!
//! Owns a compressor that looks back over what it sent before, and its counterpart. A message alone
//! knows nothing of the messages before it; over a slow path what they have in common is worth
//! looking for (5 to 7 % of a Debian guest's memory). The price: messages are unpacked in the order
//! they were packed, and a new connection begins a new stream. Never trusts a length that came from
//! the network.

use std::io::Write;

use bytes::Bytes;
use zstd::stream::raw::{CParameter, DParameter, Decoder, Operation};
use zstd::stream::write::Encoder;

use super::RelayError;

/// The level of the stream; [`super::pack::Levels`] chooses it where it pays.
pub(super) const STREAM_LEVEL: i32 = 7;
/// How far it looks back: 2 to this power, bytes. Both ends hold as much.
const WINDOW_LOG: u32 = 25;

/// Compresses one message after the other.
pub(super) struct StreamPacker {
    /// Which connection's stream it is.
    pub(super) generation: u32,
    encoder: Encoder<'static, Vec<u8>>,
}

impl StreamPacker {
    pub(super) fn new(generation: u32) -> Result<Self, RelayError> {
        let mut encoder = Encoder::new(Vec::new(), STREAM_LEVEL)?;
        encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        Ok(Self { generation, encoder })
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
#[derive(Default)]
pub(super) struct StreamUnpacker(Option<Decoder<'static>>);

impl StreamUnpacker {
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
            let mut decoder = Decoder::new()?;
            decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
            self.0 = Some(decoder);
        }
        let decoder = self.0.as_mut().ok_or_else(|| broken("without a beginning"))?;
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
    use super::*;

    fn text(seed: u8, len: usize) -> Bytes {
        let mut x = u32::from(seed) + 1;
        let byte = |_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        };
        (0..len).map(byte).collect::<Vec<u8>>().into()
    }

    #[test]
    fn a_message_may_look_back_and_is_bounded() {
        let (mut packer, mut unpacker) = (StreamPacker::new(1).unwrap(), StreamUnpacker::default());
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
        let mut packer = StreamPacker::new(1).unwrap();
        let packed = packer.pack(&[text(1, 50_000)]).unwrap();
        let later = packer.pack(&[text(2, 50_000)]).unwrap();
        let mut unpacker = StreamUnpacker::default();
        assert!(unpacker.unpack(true, 49_999, &packed, 1 << 20).is_err());
        let mut unpacker = StreamUnpacker::default();
        assert!(unpacker.unpack(true, 50_001, &packed, 1 << 20).is_err());
        let mut unpacker = StreamUnpacker::default();
        assert!(unpacker.unpack(true, 50_000, &later, 1 << 20).is_err());
    }
}
