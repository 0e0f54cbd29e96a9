//! The client against the server, and against servers that lie.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::codec::handshake::{OptionReply, encode_greeting};
use super::super::codec::transmission::{put_data, put_error, put_none, put_simple};
use super::super::server::{serve, testing::Memory};
use super::*;

const WAIT: Duration = Duration::from_secs(20);

/// Runs `act` with a client of `export`.
fn with<R>(export: &Memory, act: impl FnOnce(&mut Client) -> R) -> R {
    let (here, there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(move || serve(there, "disk0", export));
        let mut client = Client::over(here, "disk0", WAIT).unwrap();
        let result = act(&mut client);
        client.disconnect().unwrap();
        server.join().unwrap().unwrap();
        result
    })
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7 + i / 4096) as u8 | 1).collect()
}

#[test]
fn content_comes_back_in_pieces_longer_than_a_block() {
    let export = Memory::new(512);
    with(&export, |client| {
        let content = pattern(200 << 10);
        client.write(4096, &content).unwrap();
        let mut back = vec![1; content.len() + 8192];
        client.read(0, &mut back).unwrap();
        assert!(back[..4096].iter().all(|b| *b == 0));
        assert!(back[4096..][..content.len()] == content);
        client.zero(8192, 100 << 10, true).unwrap();
        client.read(8192, &mut back[..100 << 10]).unwrap();
        assert!(back[..100 << 10].iter().all(|b| *b == 0));
        client.flush().unwrap();
        assert_eq!(*export.flushes.lock().unwrap(), 1);
        let found = client.status(0, client.size()).unwrap();
        let data = |len: u64| Extent { len, hole: false, zero: false };
        let hole = |len: u64| Extent { len, hole: true, zero: true };
        let rest = (204 - 108) << 10;
        let all = [hole(4096), data(4096), hole(100 << 10), data(rest), hole((256 - 204) << 10)];
        assert_eq!(found, all);
    });
}

#[test]
fn an_error_is_told_and_leaves_the_connection_usable() {
    let bad = 100 << 10;
    let mut export = Memory::new(512);
    for (kind, code) in [
        (io::ErrorKind::StorageFull, ErrorCode::NoSpace),
        (io::ErrorKind::PermissionDenied, ErrorCode::Perm),
        (io::ErrorKind::InvalidInput, ErrorCode::Invalid),
        (io::ErrorKind::Unsupported, ErrorCode::Io),
    ] {
        export.bad = Some((bad, kind));
        with(&export, |client| {
            let all = vec![1; 256 << 10];
            let failed = |result: Result<(), NbdError>| match result {
                Err(NbdError::Failed { code, .. }) => code,
                other => panic!("{other:?}"),
            };
            assert_eq!(failed(client.write(0, &all)), code);
            assert_eq!(failed(client.read(0, &mut all.clone())), code);
            assert_eq!(failed(client.zero(bad, 512, false)), code);
            client.write(0, &all[..512]).unwrap();
        });
    }
    let error = NbdError::Failed { what: "write", code: ErrorCode::NoSpace, text: String::new() };
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::StorageFull);
}

#[test]
fn what_may_not_be_asked_for_is_not_sent() {
    with(&Memory::new(4096), |client| {
        let unaligned = client.write(512, &[0; 4096]);
        assert!(matches!(unaligned, Err(NbdError::InvalidInput(_))));
        assert!(matches!(client.read(0, &mut [0; 100]), Err(NbdError::InvalidInput(_))));
        let beyond = client.zero(client.size(), 4096, true);
        assert!(matches!(beyond, Err(NbdError::InvalidInput(_))));
        assert!(matches!(client.status(u64::MAX - 4095, 4096), Err(NbdError::InvalidInput(_))));
        client.write(4096, &[]).unwrap();
        client.write(4096, &[7; 4096]).unwrap();
    });
    let read_only = Memory { read_only: true, ..Memory::new(4096) };
    with(&read_only, |client| {
        assert!(client.read_only());
        let refused = client.write(0, &[1; 4096]);
        assert!(matches!(refused, Err(NbdError::Failed { code: ErrorCode::Perm, .. })));
    });
}

#[test]
fn a_shutdown_from_outside_ends_both() {
    let (here, there) = UnixStream::pair().unwrap();
    let handle = there.try_clone().unwrap();
    let server = std::thread::spawn(move || serve(there, "disk0", &Memory::new(512)));
    let mut client = Client::over(here, "disk0", WAIT).unwrap();
    client.write(0, &[1; 512]).unwrap();
    handle.shutdown(Shutdown::Both).unwrap();
    server.join().unwrap().unwrap();
    assert!(client.read(0, &mut [0; 512]).is_err());
    assert!(matches!(client.read(0, &mut [0; 512]), Err(NbdError::Ended)));
}

#[test]
fn a_wrong_name_is_refused() {
    let (here, there) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || serve(there, "disk0", &Memory::new(512)));
    let refused = Client::over(here, "disk1", WAIT);
    assert!(matches!(refused, Err(NbdError::Refused { .. })));
    server.join().unwrap().unwrap();
}

/// What a server says up to transmission: greeting, structured replies, a context, an export of 1 MiB.
fn welcome(max: u32) -> Vec<u8> {
    use super::super::codec::handshake::Info;
    let mut bytes = encode_greeting(3).to_vec();
    OptionReply::Ack.encode(8, &mut bytes);
    let name = super::super::codec::BASE_ALLOCATION.to_owned();
    OptionReply::Meta { id: 9, name }.encode(10, &mut bytes);
    OptionReply::Ack.encode(10, &mut bytes);
    let block = BlockSize { min: 512, preferred: 4096, max };
    OptionReply::Info(Info::Export { size: 1 << 20, flags: 0b1111_1111 }).encode(7, &mut bytes);
    OptionReply::Info(Info::BlockSize(block)).encode(7, &mut bytes);
    OptionReply::Ack.encode(7, &mut bytes);
    bytes
}

/// A client of a server that says `bytes` from the beginning and does not listen.
fn deaf<R>(bytes: &[u8], act: impl FnOnce(Result<Client, NbdError>) -> R) -> R {
    let (here, there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let mut listener = there.try_clone().unwrap();
        scope.spawn(move || io::copy(&mut listener, &mut io::sink()));
        scope.spawn(move || {
            // A client that has left takes no more.
            let _ = (&there).write_all(bytes);
            let _ = there.shutdown(Shutdown::Write);
        });
        act(Client::over(here, "disk0", WAIT))
    })
}

#[test]
fn replies_may_come_in_any_order_and_in_parts() {
    let content = pattern(12 << 10);
    let mut bytes = welcome(4096);
    let part = |cookie: u64, offset: usize, len: usize, done: bool, bytes: &mut Vec<u8>| {
        let start = bytes.len();
        put_data(cookie, offset as u64, len as u32, bytes);
        bytes[start + 5] = u8::from(done);
        bytes.extend_from_slice(&content[offset..][..len]);
    };
    part(3, 8192, 4096, true, &mut bytes);
    part(1, 2048, 2048, false, &mut bytes);
    part(2, 4096, 1024, false, &mut bytes);
    part(1, 0, 2048, false, &mut bytes);
    part(2, 5120, 3072, true, &mut bytes);
    put_none(1, &mut bytes);
    let read = deaf(&bytes, |client| {
        let mut back = vec![0; content.len()];
        client.unwrap().read(0, &mut back).map(|()| back)
    });
    assert!(read.unwrap() == content);
}

#[test]
fn lies_end_the_connection() {
    let lie = |what: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = welcome(4096);
        what(&mut bytes);
        deaf(&bytes, |client| {
            let mut client = client.unwrap();
            let first = client.read(4096, &mut [0; 4096]);
            assert!(matches!(client.flush(), Err(NbdError::Ended)), "{first:?}");
            first.unwrap_err()
        })
    };
    let data = |cookie, offset, len: u32| {
        move |bytes: &mut Vec<u8>| {
            put_data(cookie, offset, len, bytes);
            bytes.extend(vec![1; len as usize]);
        }
    };
    assert!(matches!(lie(&data(2, 4096, 4096)), NbdError::Protocol("a reply to nothing")));
    assert!(matches!(lie(&data(1, 0, 4096)), NbdError::Protocol("content outside its request")));
    assert!(matches!(lie(&data(1, 4096, 8192)), NbdError::Protocol("content outside its request")));
    assert!(matches!(lie(&data(1, 4096, 512)), NbdError::Protocol("an incomplete reply")));
    assert!(matches!(lie(&|b| put_none(1, b)), NbdError::Protocol("an incomplete reply")));
    assert!(matches!(lie(&|b| put_simple(1, None, b)), NbdError::Protocol(_)));
    let twice = |bytes: &mut Vec<u8>| {
        let start = bytes.len();
        data(1, 4096, 1024)(bytes);
        bytes[start + 5] = 0;
        data(1, 4096, 4096)(bytes);
    };
    assert!(matches!(lie(&twice), NbdError::Protocol("content twice")));
    assert!(matches!(lie(&|_| ()), NbdError::Closed));
    let endless = |bytes: &mut Vec<u8>| put_data(1, 4096, PAYLOAD_BYTES_MAX + 1, bytes);
    assert!(matches!(lie(&endless), NbdError::Codec(_)));
}

#[test]
fn a_silent_server_is_given_up() {
    let (here, _there) = UnixStream::pair().unwrap();
    let began = std::time::Instant::now();
    let given_up = Client::over(here, "disk0", Duration::from_millis(50));
    assert!(matches!(given_up, Err(NbdError::Deadline)));
    assert!(began.elapsed() < Duration::from_secs(60));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a server says: every call ends.
    #[test]
    fn any_server_is_survived(
        welcomes in any::<bool>(), noise in vec(any::<u8>(), 0..300),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut bytes = welcome(4096);
        put_simple(1, None, &mut bytes);
        put_data(2, 0, 512, &mut bytes);
        bytes.extend([0; 512]);
        put_error(3, ErrorCode::Io, "no", &mut bytes);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let bytes = if welcomes { [bytes, noise].concat() } else { noise };
        deaf(&bytes, |client| {
            let Ok(mut client) = client else { return };
            let mut into = [0; 512];
            let _ = client.write(0, &[1; 512]);
            let _ = client.read(0, &mut into);
            let _ = client.status(0, 512);
        });
    }
}
