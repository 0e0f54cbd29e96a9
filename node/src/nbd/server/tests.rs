//! The server against bytes: what it may never do, whatever a client sends.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::codec::BASE_ALLOCATION;
use super::super::codec::handshake::OptionReplyHeader;
use super::super::codec::handshake::{ClientOption, GREETING_BYTES, InfoRequest, MetaRequest};
use super::super::codec::transmission::ReplyHeader;
use super::testing::{Memory, SIZE};
use super::*;

/// All that the server says to `bytes`, and how it ends.
fn answer(export: &Memory, bytes: &[u8]) -> (Vec<u8>, Result<(), NbdError>) {
    let (here, there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(move || serve(there, "disk0", export));
        let mut reader = here.try_clone().unwrap();
        let replies = scope.spawn(move || {
            let mut all = Vec::new();
            // A reset connection is an end too: the server left with bytes unread.
            let _ = reader.read_to_end(&mut all);
            all
        });
        // A server that has left takes no more.
        let _ = (&here).write_all(bytes);
        let _ = here.shutdown(Shutdown::Write);
        (replies.join().unwrap(), server.join().unwrap())
    })
}

fn go() -> ClientOption {
    ClientOption::Go(InfoRequest { name: "disk0".to_owned(), items: vec![1, 3] })
}

/// A valid session: flags, options, then requests in pieces that can be changed one by one.
fn session(structured: bool, requests: &[(u16, u16, u64, u32)]) -> Vec<Vec<u8>> {
    let mut pieces = vec![3_u32.to_be_bytes().to_vec()];
    let mut options = vec![ClientOption::List];
    if structured {
        let queries = vec![BASE_ALLOCATION.to_owned()];
        let meta = MetaRequest { export: "disk0".to_owned(), queries };
        options.extend([ClientOption::StructuredReply, ClientOption::SetMeta(meta)]);
    }
    options.push(go());
    for option in options {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        pieces.push(bytes);
    }
    for (cookie, (flags, command, offset, len)) in (0_u64..).zip(requests) {
        let request = Request {
            flags: *flags,
            command: Command::Read,
            cookie,
            offset: offset * 512,
            len: len * 512,
        };
        let mut bytes = request.encode().to_vec();
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        if *command == 1 {
            bytes.extend(std::iter::repeat_n(0xab, (len * 512) as usize));
        }
        pieces.push(bytes);
    }
    pieces
}

fn requests() -> impl Strategy<Value = Vec<(u16, u16, u64, u32)>> {
    vec((0_u16..32, 0_u16..9, 0_u64..600, 0_u32..140), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_end(bytes in vec(any::<u8>(), 0..2000), greets in any::<bool>()) {
        let mut all = if greets { session(true, &[]).concat() } else { Vec::new() };
        all.extend(bytes);
        let (said, _) = answer(&Memory::new(512), &all);
        prop_assert!(said.len() >= GREETING_BYTES);
    }

    /// A valid session in which bytes are changed, or pieces lost, doubled or cut.
    #[test]
    fn changed_sessions_end(
        structured in any::<bool>(), requests in requests(),
        changes in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0_u8..5, any::<u8>()), 1..6),
    ) {
        let mut pieces = session(structured, &requests);
        for (piece, byte, how, value) in changes {
            let at = piece.index(pieces.len());
            let byte = byte.index(pieces[at].len());
            match how {
                0 => pieces[at][byte] = value,
                1 => pieces[at][byte] ^= 1 << (value % 8),
                2 => pieces[at].truncate(byte + 1),
                3 => pieces.insert(at, pieces[at].clone()),
                _ if pieces.len() > 1 => drop(pieces.remove(at)),
                _ => {}
            }
        }
        let (said, _) = answer(&Memory::new(512), &pieces.concat());
        prop_assert!(said.len() >= GREETING_BYTES);
    }

    /// Whatever is asked for in a valid form is answered, once each and in order.
    #[test]
    fn every_request_is_answered(requests in requests()) {
        let requests: Vec<_> = requests.into_iter().filter(|r| r.1 != 2).collect();
        let (said, end) = answer(&Memory::new(512), &session(true, &requests).concat());
        let (before, _) = answer(&Memory::new(512), &session(true, &[]).concat());
        prop_assert!(end.is_ok());
        let mut rest = &said[before.len()..];
        for cookie in 0..requests.len() as u64 {
            let chunk = ReplyHeader::is_chunk(rest.first_chunk().unwrap()).unwrap();
            let len = if chunk { ReplyHeader::CHUNK_BYTES } else { ReplyHeader::SIMPLE_BYTES };
            let payload = match ReplyHeader::decode(&rest[..len]).unwrap() {
                ReplyHeader::Simple { cookie: answered, error: None } => {
                    prop_assert_eq!(answered, cookie);
                    0
                }
                ReplyHeader::Chunk(header) => {
                    prop_assert_eq!((header.cookie, header.done), (cookie, true));
                    header.len as usize
                }
                other => panic!("{other:?}"),
            };
            rest = &rest[len + payload..];
        }
        prop_assert!(rest.is_empty());
    }
}

#[test]
fn what_is_not_there_is_refused_and_the_session_goes_on() {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    // TLS, extended headers, an option of 100 KiB, another export, then this one.
    for option in [5, 11] {
        ClientOption::Other(option).encode(&mut bytes);
    }
    bytes.extend(OptionHeader { option: 4711, len: 100 << 10 }.encode());
    bytes.extend(vec![7; 100 << 10]);
    let other = InfoRequest { name: "disk1".to_owned(), items: Vec::new() };
    ClientOption::Go(other).encode(&mut bytes);
    ClientOption::Go(InfoRequest { name: "disk0".to_owned(), items: Vec::new() })
        .encode(&mut bytes);
    let (said, end) = answer(&Memory::new(512), &bytes);
    assert!(end.is_ok());
    let mut rest = &said[GREETING_BYTES..];
    let mut kinds = Vec::new();
    while let Some((header, data)) = rest.split_first_chunk() {
        let header = OptionReplyHeader::decode(header).unwrap();
        kinds.push((header.option, header.kind));
        rest = &data[header.len as usize..];
    }
    let no = 1_u32 << 31;
    assert_eq!(kinds, [(5, no | 1), (11, no | 1), (4711, no | 9), (7, no | 6), (7, 3), (7, 1)]);
}

#[test]
fn a_client_without_go_gets_what_it_knows() {
    let mut bytes = 1_u32.to_be_bytes().to_vec();
    ClientOption::ExportName("disk0".to_owned()).encode(&mut bytes);
    let (said, end) = answer(&Memory::new(512), &bytes);
    assert!(end.is_ok());
    assert_eq!(said.len(), GREETING_BYTES + 8 + 2 + 124);
    assert_eq!(said[GREETING_BYTES..][..8], (SIZE as u64).to_be_bytes());
}
