//! What an encoder writes its decoder reads; what nobody wrote is an error and no panic.

use proptest::collection::vec;
use proptest::prelude::*;

use super::handshake::{
    ClientOption, GREETING_BYTES, Info, InfoRequest, MetaRequest, OptionHeader, OptionReply,
    OptionReplyHeader, Refusal, decode_greeting, encode_greeting,
};
use super::transmission::{
    ChunkHeader, ChunkKind, Command, Descriptor, ReplyHeader, Request, decode_error, decode_hole,
    decode_status, put_data, put_error, put_hole, put_none, put_simple, put_status,
};
use super::{BlockSize, CodecError, ErrorCode, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX};

fn name() -> BoxedStrategy<String> {
    "[a-zä0-9:_-]{0,40}".boxed()
}

fn option() -> impl Strategy<Value = ClientOption> {
    let info =
        || (name(), vec(any::<u16>(), 0..9)).prop_map(|(name, items)| InfoRequest { name, items });
    let meta = || {
        (name(), vec(name(), 0..9)).prop_map(|(export, queries)| MetaRequest { export, queries })
    };
    prop_oneof![
        name().prop_map(ClientOption::ExportName),
        Just(ClientOption::Abort),
        Just(ClientOption::List),
        info().prop_map(ClientOption::Info),
        info().prop_map(ClientOption::Go),
        Just(ClientOption::StructuredReply),
        meta().prop_map(ClientOption::ListMeta),
        meta().prop_map(ClientOption::SetMeta),
        prop_oneof![Just(4_u32), Just(5), 11_u32..].prop_map(ClientOption::Other),
    ]
}

fn option_reply() -> impl Strategy<Value = OptionReply> {
    let block = any::<[u32; 3]>();
    let why = prop_oneof![
        Just(Refusal::Unsupported),
        Just(Refusal::Policy),
        Just(Refusal::Invalid),
        Just(Refusal::Unknown),
        Just(Refusal::Shutdown),
        Just(Refusal::TooBig),
        (10_u32..1 << 31).prop_map(Refusal::Other),
    ];
    prop_oneof![
        Just(OptionReply::Ack),
        name().prop_map(OptionReply::Server),
        any::<(u64, u16)>()
            .prop_map(|(size, flags)| OptionReply::Info(Info::Export { size, flags })),
        name().prop_map(|name| OptionReply::Info(Info::Name(name))),
        block.prop_map(|[min, preferred, max]| {
            OptionReply::Info(Info::BlockSize(BlockSize { min, preferred, max }))
        }),
        (4_u16..).prop_map(|kind| OptionReply::Info(Info::Other(kind))),
        (any::<u32>(), name()).prop_map(|(id, name)| OptionReply::Meta { id, name }),
        (why, name()).prop_map(|(why, text)| OptionReply::Refused { why, text }),
    ]
}

fn split<const N: usize>(bytes: &[u8]) -> (&[u8; N], &[u8]) {
    bytes.split_first_chunk().unwrap()
}

fn chunk(bytes: &[u8]) -> (ChunkHeader, &[u8]) {
    let (header, payload) = split::<{ ReplyHeader::CHUNK_BYTES }>(bytes);
    assert!(ReplyHeader::is_chunk(header.first_chunk().unwrap()).unwrap());
    match ReplyHeader::decode(header).unwrap() {
        ReplyHeader::Chunk(header) => (header, payload),
        simple @ ReplyHeader::Simple { .. } => panic!("{simple:?}"),
    }
}

proptest! {
    #[test]
    fn options_survive(option in option()) {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        let (header, data) = split(&bytes);
        let header = OptionHeader::decode(header).unwrap();
        prop_assert_eq!(header.len as usize, data.len());
        prop_assert_eq!(ClientOption::decode(header.option, data).unwrap(), option);
    }

    #[test]
    fn replies_to_options_survive(reply in option_reply(), option in any::<u32>()) {
        let mut bytes = Vec::new();
        reply.encode(option, &mut bytes);
        let (header, data) = split(&bytes);
        let header = OptionReplyHeader::decode(header).unwrap();
        prop_assert_eq!((header.option, header.len as usize), (option, data.len()));
        prop_assert_eq!(OptionReply::decode(header.kind, data).unwrap(), reply);
    }

    #[test]
    fn requests_survive(
        flags in any::<u16>(), command in 0_u16..12, cookie in any::<u64>(),
        offset in any::<u64>(), len in 0..=PAYLOAD_BYTES_MAX,
    ) {
        let mut bytes = Request { flags, command: Command::Read, cookie, offset, len }.encode();
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        let request = Request::decode(&bytes).unwrap();
        prop_assert_eq!(request.encode(), bytes);
        prop_assert_eq!((request.flags, request.cookie, request.offset), (flags, cookie, offset));
        prop_assert_eq!(request.payload(), if command == 1 { len } else { 0 });
    }

    #[test]
    fn status_survives(
        cookie in any::<u64>(),
        all in vec((1_u32.., any::<u32>()).prop_map(|(len, flags)| Descriptor { len, flags }), 1..99),
    ) {
        let mut bytes = Vec::new();
        put_status(cookie, 7, &all, &mut bytes);
        let (header, payload) = chunk(&bytes);
        prop_assert_eq!((header.kind, header.done, header.cookie), (ChunkKind::Status, true, cookie));
        prop_assert_eq!(header.len as usize, payload.len());
        prop_assert_eq!(decode_status(payload).unwrap(), (7, all));
    }

    /// Whatever the bytes are: an answer, and no more memory than they take.
    #[test]
    fn no_bytes_break_a_decoder(
        bytes in vec(any::<u8>(), 0..200), number in 0_u32..14, refused in any::<bool>(),
    ) {
        if let Ok(ClientOption::SetMeta(request)) = ClientOption::decode(number, &bytes) {
            prop_assert!(request.queries.len() <= bytes.len() / 4);
        }
        let _ = OptionReply::decode(number | u32::from(refused) << 31, &bytes);
        let _ = ReplyHeader::decode(&bytes);
        let _ = decode_error(&bytes);
        if let Ok((_, found)) = decode_status(&bytes) {
            prop_assert!(found.capacity() <= bytes.len() / 8);
        }
        if let Some(part) = bytes.first_chunk() {
            let _ = (decode_hole(part), decode_hole(part).is_ok());
        }
        if let Some(part) = bytes.first_chunk::<GREETING_BYTES>() {
            let _ = decode_greeting(part);
        }
        if let Some(part) = bytes.first_chunk() {
            let _ = Request::decode(part);
        }
    }

    /// A chunk's length is bounded by its kind before anybody waits for it.
    #[test]
    fn lengths_are_bounded(kind in prop_oneof![0_u16..8, 0x8000_u16..0x8004], len in any::<u32>()) {
        let mut bytes = Vec::new();
        put_none(1, &mut bytes);
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[16..].copy_from_slice(&len.to_be_bytes());
        if let Ok(ReplyHeader::Chunk(header)) = ReplyHeader::decode(&bytes) {
            prop_assert!(header.len <= PAYLOAD_BYTES_MAX + 8);
            prop_assert!(header.kind != ChunkKind::Error || header.len < 5000);
        }
    }
}

#[test]
fn small_messages_survive() {
    assert_eq!(decode_greeting(&encode_greeting(3)), Ok(3));
    let mut bytes = Vec::new();
    put_simple(5, Some(ErrorCode::NoSpace), &mut bytes);
    let simple = ReplyHeader::Simple { cookie: 5, error: Some(ErrorCode::NoSpace) };
    assert_eq!(ReplyHeader::decode(&bytes), Ok(simple));
    bytes.clear();
    put_hole(6, 1 << 40, 4096, &mut bytes);
    let (header, payload) = chunk(&bytes);
    assert_eq!((header.kind, header.len), (ChunkKind::Hole, 12));
    assert_eq!(decode_hole(split(payload).0), Ok((1 << 40, 4096)));
    bytes.clear();
    put_data(7, 3, 4, &mut bytes);
    let (header, payload) = chunk(&bytes);
    assert_eq!((header.kind, header.len, payload), (ChunkKind::Data, 12, &3_u64.to_be_bytes()[..]));
    bytes.clear();
    put_error(8, ErrorCode::Perm, &"ä".repeat(5000), &mut bytes);
    let (header, payload) = chunk(&bytes);
    assert_eq!((header.kind, header.len as usize), (ChunkKind::Error, payload.len()));
    let (code, text) = decode_error(payload).unwrap();
    assert_eq!((code, text.len()), (ErrorCode::Perm, 4096));
}

#[test]
fn what_is_out_of_bounds_is_an_error() {
    let too_long = PAYLOAD_BYTES_MAX + 1;
    let write = Request { flags: 0, command: Command::Write, cookie: 0, offset: 0, len: too_long };
    assert!(matches!(Request::decode(&write.encode()), Err(CodecError::Length { .. })));
    // Only a write brings its length along.
    let zero = Request { command: Command::WriteZeroes, len: u32::MAX, ..write };
    assert_eq!(Request::decode(&zero.encode()), Ok(zero));
    let mut reply = Vec::new();
    OptionReply::Ack.encode(1, &mut reply);
    reply[16..].copy_from_slice(&(OPTION_BYTES_MAX + 1).to_be_bytes());
    let reply = OptionReplyHeader::decode(split(&reply).0);
    assert!(matches!(reply, Err(CodecError::Length { .. })));
    assert_eq!(ClientOption::decode(3, &[0]), Err(CodecError::Trailing(1)));
    assert_eq!(ClientOption::decode(7, &[0, 0, 0, 9]), Err(CodecError::Short));
    assert_eq!(ClientOption::decode(1, &[0xff]), Err(CodecError::Text));
    assert_eq!(decode_status(&[0; 12]), Err(CodecError::Value("extent")));
}

#[test]
fn errors_have_the_numbers_of_the_protocol() {
    for (code, number) in ErrorCode::ALL {
        assert_eq!((code.to_wire(), ErrorCode::from_wire(number)), (number, Some(code)));
    }
    assert_eq!(ErrorCode::from_wire(0), None);
    assert_eq!(ErrorCode::from_wire(4711), Some(ErrorCode::Invalid));
}
