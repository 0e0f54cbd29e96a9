//! How much memory a client can make the server ask for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use godwit::nbd::codec::handshake::{ClientOption, InfoRequest, OptionHeader};
use godwit::nbd::codec::transmission::{Command, Request};
use godwit::nbd::{BlockSize, FileExport, serve};
use proptest::collection::vec;
use proptest::prelude::*;

/// The system's allocator; remembers the largest piece that a thread asked for.
struct Watching;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    // Fails in a thread that is ending, which nobody asks.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: all is handed on to the system's allocator; `note` does not allocate.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// An export that takes 64 KiB at a time: what it needs itself is small.
const BLOCK: BlockSize = BlockSize { min: 512, preferred: 4096, max: 64 << 10 };
const LARGEST_MAX: usize = 512 << 10;

/// The largest piece of memory that the server asks for while it gets `bytes`.
fn largest(bytes: &[u8]) -> usize {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let export = FileExport::new(file, BLOCK, false).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            LARGEST.set(0);
            let _ = serve(there, "disk0", &export);
            LARGEST.get()
        });
        let mut reader = here.try_clone().unwrap();
        scope.spawn(move || reader.read_to_end(&mut Vec::new()));
        // A server that has left takes no more.
        let _ = (&here).write_all(bytes);
        let _ = here.shutdown(Shutdown::Write);
        server.join().unwrap()
    })
}

fn session(
    option: u32,
    option_len: u32,
    requests: &[(Command, u64, u32)],
    noise: &[u8],
) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    ClientOption::StructuredReply.encode(&mut bytes);
    let info = InfoRequest { name: "disk0".to_owned(), items: vec![3] };
    ClientOption::Go(info).encode(&mut bytes);
    for (command, offset, len) in requests {
        let (flags, cookie) = (0, 1);
        let request = Request { flags, command: *command, cookie, offset: offset * 512, len: *len };
        bytes.extend(request.encode());
    }
    if option != 0 {
        bytes.truncate(4);
        bytes.extend(OptionHeader { option, len: option_len }.encode());
    }
    bytes.extend(noise);
    bytes
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        Just(Command::Read),
        Just(Command::Write),
        Just(Command::Trim),
        Just(Command::Cache),
        Just(Command::WriteZeroes),
        Just(Command::BlockStatus),
        Just(Command::Flush),
        (8_u16..).prop_map(Command::Other),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    let edge = prop_oneof![Just(1_u32 << 16), Just(1 << 25), Just(1 << 31), Just(u32::MAX)];
    prop_oneof![any::<u32>(), (0_u32..300).prop_map(|n| n * 512), edge]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_length_that_is_only_told_allocates_nothing(
        option in 0_u32..12, option_len in length(),
        requests in vec((command(), 0_u64..3000, length()), 0..6),
        noise in vec(any::<u8>(), 0..3000),
    ) {
        let bytes = session(option, option_len, &requests, &noise);
        let largest = largest(&bytes);
        prop_assert!(largest <= LARGEST_MAX, "{largest} bytes");
    }
}

#[test]
fn the_watch_sees_what_the_server_asks_for() {
    let read = session(0, 0, &[(Command::Read, 0, 64 << 10)], &[]);
    assert!((64 << 10..=LARGEST_MAX).contains(&largest(&read)));
}
