//! Bounds of both ends of the relay when the far end takes nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use godwit::relay::corpus::EmptyCorpus;
use godwit::relay::{
    Budget, Connector, DestParams, DestinationSession, ImageReader, PageSink, SourceHandle,
    SourceParams, SourceSession,
};
use godwit_protocol::chunk::ChunkKey;
use godwit_protocol::chunk::layout::{DiskSpace, Layout};
use godwit_protocol::id::MigrationId;
use godwit_protocol::limits::RELAY_STORE_BYTES;
use godwit_protocol::wire::bulk::{self, Head};
use godwit_protocol::wire::codec::WIRE_VERSION;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::time::timeout;

const WAIT: Duration = Duration::from_secs(60);
const KEY: ChunkKey = ChunkKey([9; 32]);
/// What a disk is written with at a time.
static PART: [u8; 64 << 10] = [7; 64 << 10];

struct Unread;

impl ImageReader for Unread {
    fn read(&mut self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(7);
        Ok(())
    }
}

struct Nowhere;

impl PageSink for Nowhere {
    fn write(&self, _: u32, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn zero(&self, _: u32, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn read(&self, _: u32, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }
}

/// A source with one disk whose destination is never reached.
fn cut_off(dir: &Path, bytes: u64, budget: &Arc<Budget>) -> SourceHandle {
    let connect: Connector = Box::new(|| Box::pin(std::future::pending()));
    SourceSession::spawn(SourceParams {
        seat: budget.join(),
        listener: UnixListener::bind(dir.join("out")).unwrap(),
        connect,
        key: KEY,
        ram_block: "pc.ram".to_owned(),
        ram_bytes: 1 << 20,
        disks: vec![(DiskSpace { bytes, backed: false }, Box::new(Unread))],
        migration: MigrationId([3; 16]),
        bandwidth: 0,
        accept_deadline: WAIT,
        reconnect_deadline: WAIT,
    })
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_does_not_hold_up_the_end_of_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = 2 * RELAY_STORE_BYTES as u64;
    let budget = Arc::<Budget>::default();
    let source = cut_off(dir.path(), bytes, &budget);
    let inlet = Arc::clone(&source.inlets()[0]);
    let writing = Arc::clone(&inlet);
    let written = Arc::new(AtomicU64::new(0));
    let so_far = Arc::clone(&written);
    let writer = tokio::task::spawn_blocking(move || {
        for at in (0..bytes).step_by(PART.len()) {
            writing.write(at, &PART)?;
            so_far.store(at, Ordering::SeqCst);
        }
        Ok::<_, io::Error>(())
    });
    let waits = async {
        let mut before = u64::MAX;
        // Alone it may have a good seven tenths of the store, and no batch more.
        while budget.stored() < RELAY_STORE_BYTES * 7 / 10
            || before != written.load(Ordering::SeqCst)
        {
            before = written.load(Ordering::SeqCst);
            // Nothing tells that a writer waits: it has come no further.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    timeout(WAIT, waits).await.expect("the store is full");
    let finish = tokio::task::spawn_blocking(move || inlet.finish(Duration::from_millis(300)));
    let finished = timeout(WAIT, finish).await.expect("bounded").unwrap();
    assert_eq!(finished.unwrap_err().kind(), io::ErrorKind::TimedOut);
    let cause = timeout(WAIT, writer).await.expect("bounded").unwrap().unwrap_err();
    assert!(matches!(cause.kind(), io::ErrorKind::TimedOut | io::ErrorKind::BrokenPipe), "{cause}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_far_end_that_does_not_read_is_not_heard_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let _qemu = UnixListener::bind(dir.path().join("in")).unwrap();
    let layout = Layout::new(1 << 20, &[]).unwrap();
    let (migration, pages) = (MigrationId([3; 16]), layout.pages());
    let dest = DestinationSession::spawn(DestParams {
        seat: Arc::<Budget>::default().join(),
        qemu_socket: dir.path().join("in"),
        sink: Arc::new(Nowhere),
        corpus: Arc::new(EmptyCorpus),
        key: KEY,
        layout,
        settle: None,
        migration,
        silence_deadline: WAIT,
        load_deadline: WAIT,
    })
    .unwrap();
    let (near, mut far) = tokio::io::duplex(64 << 10);
    dest.streams().send(Box::new(near)).await.unwrap();
    let say = |head: Head| bulk::prefix(&head, 0).unwrap();
    far.write_all(&say(Head::Hello { version: WIRE_VERSION, migration, pages })).await.unwrap();
    let pings = say(Head::Ping { stamp: 1 }).repeat(1000);
    let mut heard = 0;
    // Both buffers take some thousands, the queue a thousand.
    while let Ok(sent) = timeout(Duration::from_secs(3), far.write_all(&pings)).await {
        sent.unwrap();
        heard += 1000;
        assert!(heard < 100_000, "every one is answered, and the answers wait");
    }
}
