//! The parser of QEMU's stream: the cut of the input never matters, garbage never hurts.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sample;

use godwit_protocol::chunk::Page;
use godwit_protocol::chunk::qemu::tail::Tail;
use godwit_protocol::chunk::qemu::{Parser, Sink, StreamError, TOKEN_BYTES};
use proptest::prelude::*;

const PAGES: u32 = 300;

#[derive(Debug, Default, PartialEq)]
struct Seen {
    pages: Vec<(u32, Option<u64>)>,
    opaque: Vec<u8>,
    pings: Vec<u32>,
    ram_end: Option<usize>,
    bytes: usize,
}

fn sum(content: &[u8]) -> u64 {
    content.iter().fold(0, |sum, b| (sum ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

impl Sink for Seen {
    fn page(&mut self, index: u32, content: &Page) {
        self.pages.push((index, Some(sum(content))));
    }
    fn zero(&mut self, index: u32) {
        self.pages.push((index, None));
    }
    fn opaque(&mut self, bytes: &[u8]) {
        self.opaque.extend_from_slice(bytes);
    }
    fn ping(&mut self, value: u32) {
        self.pings.push(value);
    }
    fn ram_end(&mut self) {
        self.ram_end = Some(self.opaque.len());
    }
}

/// Feeds `input` in pieces; keeps what the parser leaves, as the relay does.
fn parse(input: &[u8], cuts: &[usize]) -> Result<Seen, StreamError> {
    let mut parser = Parser::new("pc.ram", u64::from(PAGES) * 4096);
    let (mut seen, mut kept, mut at, mut cut) = (Seen::default(), Vec::new(), 0, 0);
    while at < input.len() {
        let len = cuts[cut % cuts.len()].clamp(1, input.len() - at);
        kept.extend_from_slice(&input[at..at + len]);
        (at, cut) = (at + len, cut + 1);
        let used = parser.feed(&kept, &mut seen)?;
        kept.drain(..used);
        assert!(kept.len() <= TOKEN_BYTES);
    }
    seen.bytes = input.len() - kept.len();
    Ok(seen)
}

fn passes() -> Vec<Vec<sample::Record>> {
    let page = |i: u32, v: u64| (i, (!i.is_multiple_of(3)).then(|| sample::page(u64::from(i) + v)));
    vec![
        (0..PAGES).map(|i| page(i, 0)).collect(),
        (10..40).map(|i| page(i, 1000)).collect(),
        vec![],
        (0..5).map(|i| page(i, 2000)).collect(),
    ]
}

#[test]
fn pages_come_out_and_the_rest_is_a_stream_for_the_destination() {
    let passes = passes();
    let input = sample::stream(PAGES, &passes);
    let seen = parse(&input, &[usize::MAX]).unwrap();
    let said: Vec<_> = passes.concat();
    let expected: Vec<_> = said.iter().map(|(i, c)| (*i, c.map(|c| sum(&c)))).collect();
    assert_eq!(seen.pages, expected);
    assert_eq!((seen.pings.as_slice(), seen.bytes), (&[1][..], input.len()));
    // The destination's stream: the capability, addresses, no main memory, device state untouched.
    let text = String::from_utf8_lossy(&seen.opaque).into_owned();
    assert!(text.contains("configuration/capabilities\0\0\0\u{1}\0\0\0\u{1}\u{f}x-ignore-shared"));
    let devices = &seen.opaque[seen.ram_end.unwrap()..];
    assert!(input.ends_with(devices) && devices.len() > sample::DEVICES);
    let mut tail = Tail::default();
    tail.feed(devices);
    assert!(tail.is_whole());
    // ROM pages: each behind its block id, none by CONTINUE.
    let roms = seen.opaque.windows(8).filter(|w| w == b"\x07pc.bios").count();
    assert_eq!(roms, 1 + passes.iter().map(|p| (p.len() + 3) / 7).sum::<usize>());
}

#[test]
fn what_cannot_be_carried_is_named() {
    let good = sample::stream(PAGES, &passes());
    let with = |from: &[u8], to: &[u8]| {
        let at = good.windows(from.len()).position(|w| w == from).unwrap();
        let mut bad = good.clone();
        bad.splice(at..at + from.len(), to.iter().copied());
        parse(&bad, &[4096]).unwrap_err().to_string()
    };
    assert!(with(b"QEVM", b"HTTP").contains("not a QEMU migration stream"));
    assert!(with(b"\x03ram\0", b"\x04vfio\0").contains("vfio"));
    assert!(with(b"\x06pc.ram", b"\x05other").contains("main memory"));
    assert!(with(b"\x08\0\x0b\0\0", b"\x08\0\x07\0\x04\0\0\0\x01").contains("command 7"));
    let smaller = sample::stream(PAGES - 1, &[vec![]]);
    assert!(matches!(parse(&smaller, &[9]), Err(StreamError::Memory { found: Some(_), .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_cut_does_not_matter(cuts in prop::collection::vec(1_usize..9000, 1..50)) {
        let input = sample::stream(PAGES, &passes());
        prop_assert_eq!(parse(&input, &cuts).unwrap(), parse(&input, &[usize::MAX]).unwrap());
    }

    #[test]
    fn damage_never_panics(
        changes in prop::collection::vec((0_usize..3000, any::<u8>()), 1..6),
        far in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in 1_usize..9000,
    ) {
        let mut input = sample::stream(PAGES, &passes());
        for (at, byte) in changes {
            input[at] = byte;
        }
        for (at, byte) in far {
            let at = at.index(input.len());
            input[at] = byte;
        }
        if let Ok(seen) = parse(&input, &[cut]) {
            prop_assert!(seen.opaque.len() <= 2 * input.len());
            prop_assert!(seen.pages.iter().all(|(i, _)| *i < PAGES));
        }
    }

    #[test]
    fn garbage_never_panics(input in prop::collection::vec(any::<u8>(), 0..5000)) {
        let _ = parse(&input, &[100]);
        let _ = parse(&[b"QEVM\0\0\0\x03\x07\0\0\0\x01x", input.as_slice()].concat(), &[100]);
    }
}
