//! Both ends of the relay with a stream made by the test: cuts, known contents, faults.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../protocol/tests/sample/mod.rs"]
mod sample;

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use godwit::relay::corpus::{EmptyCorpus, MemoryCorpus};
use godwit::relay::{
    Budget, Connector, Corpus, DestEnd, DestParams, DestinationSession, ImageReader, Inlet,
    PageSink, RelayError, SourceEnd, SourceParams, SourceSession, Stream,
};
use godwit_protocol::chunk::ChunkKey;
use godwit_protocol::chunk::layout::{DiskSpace, Layout};
use godwit_protocol::chunk::qemu::tail::Tail;
use godwit_protocol::id::MigrationId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

const WAIT: Duration = Duration::from_secs(60);
/// Below this a path is asked over, however near it is; bytes per second.
const CAP: u64 = 30 << 20;
const KEY: ChunkKey = ChunkKey([9; 32]);

/// Memory in a vector; a fault may strike one write.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    fault: Fault,
    writes: AtomicU32,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// One bit of the page written n-th.
    Altered(u32),
    /// The page written n-th goes one page further.
    Misplaced(u32),
}

impl Memory {
    fn new(pages: u32, fault: Fault) -> Arc<Self> {
        let bytes = Mutex::new(vec![0; pages as usize * 4096]);
        Arc::new(Self { bytes, fault, writes: AtomicU32::new(0) })
    }
}

impl PageSink for Memory {
    fn write(&self, first: u32, content: &[u8]) -> io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap();
        for (page, content) in (first as usize..).zip(content.chunks_exact(4096)) {
            let n = self.writes.fetch_add(1, Ordering::Relaxed);
            let page = page + usize::from(self.fault == Fault::Misplaced(n));
            bytes[page * 4096..][..4096].copy_from_slice(content);
            bytes[page * 4096 + 77] ^= u8::from(self.fault == Fault::Altered(n));
        }
        Ok(())
    }
    fn zero(&self, first: u32, count: u32) -> io::Result<()> {
        let len = count as usize * 4096;
        self.bytes.lock().unwrap()[first as usize * 4096..][..len].fill(0);
        Ok(())
    }
    fn read(&self, first: u32, content: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        content.copy_from_slice(&bytes[first as usize * 4096..][..content.len()]);
        Ok(())
    }
}

/// What one run needs.
struct Setup {
    pages: u32,
    passes: Vec<Vec<sample::Record>>,
    fault: Fault,
    corpus: Arc<dyn Corpus>,
    /// Bytes after which each connection is cut, both directions together.
    cuts: Vec<u64>,
    hurry: bool,
    bandwidth: u64,
    /// What a disk held at first, and how many writes follow.
    disk: Option<(Vec<u8>, u32)>,
    /// The image turns out to hold something else than what its mirror wrote.
    forged: bool,
}

struct Outcome {
    memory: Arc<Memory>,
    layout: Layout,
    /// The disk at the source.
    image: Vec<u8>,
    source: Result<SourceEnd, RelayError>,
    dest: Result<DestEnd, RelayError>,
    took: Duration,
    /// What QEMU at the source read on its return path.
    heard: Vec<u8>,
}

impl Setup {
    fn new(pages: u32, passes: Vec<Vec<sample::Record>>) -> Self {
        let (fault, corpus) = (Fault::None, Arc::new(EmptyCorpus));
        Self {
            pages,
            passes,
            fault,
            corpus,
            cuts: vec![],
            hurry: false,
            bandwidth: CAP,
            disk: None,
            forged: false,
        }
    }

    fn expected(&self) -> Vec<u8> {
        let mut memory = vec![0; self.pages as usize * 4096];
        for (page, content) in self.passes.iter().flatten() {
            memory[*page as usize * 4096..][..4096].copy_from_slice(&content.unwrap_or([0; 4096]));
        }
        memory
    }

    /// Connections that break as planned.
    fn connector(&self, streams: mpsc::Sender<Stream>) -> Connector {
        let (mut count, cuts) = (0, self.cuts.clone());
        Box::new(move || {
            let budget = cuts.get(count).copied().unwrap_or(u64::MAX);
            count += 1;
            let stream = cut_after(budget, streams.clone());
            Box::pin(async { Ok(stream.await) })
        })
    }

    async fn run(&self) -> Outcome {
        let dir = tempfile::tempdir().unwrap();
        let (inward, outward) = (dir.path().join("in"), dir.path().join("out"));
        let (ram_bytes, migration) = (u64::from(self.pages) * 4096, MigrationId([3; 16]));
        let spaces: Vec<_> = self.disk.iter().map(|(image, _)| space(image)).collect();
        let layout = Layout::new(ram_bytes, &spaces).unwrap();
        let memory = Memory::new(layout.pages(), self.fault);
        let image = Arc::new(Mutex::new(self.disk.clone().map_or(vec![], |(image, _)| image)));
        let fake_dest = tokio::spawn(load(UnixListener::bind(&inward).unwrap()));
        let mut dest = DestinationSession::spawn(DestParams {
            seat: Arc::<Budget>::default().join(),
            qemu_socket: inward,
            sink: memory.clone(),
            corpus: self.corpus.clone(),
            key: KEY,
            layout: layout.clone(),
            settle: None,
            migration,
            silence_deadline: WAIT,
            load_deadline: WAIT,
        })
        .unwrap();
        let connect = self.connector(dest.streams());
        let mut source = SourceSession::spawn(SourceParams {
            seat: Arc::<Budget>::default().join(),
            listener: UnixListener::bind(&outward).unwrap(),
            connect,
            key: KEY,
            ram_block: "pc.ram".to_owned(),
            ram_bytes,
            disks: spaces.into_iter().map(|s| (s, reader(&image))).collect(),
            migration,
            bandwidth: self.bandwidth,
            accept_deadline: WAIT,
            reconnect_deadline: WAIT,
        })
        .unwrap();
        if self.hurry {
            source.begin_cutover();
        }
        let began = Instant::now();
        if let Some((_, writes)) = &self.disk {
            let (inlet, image) = (Arc::clone(&source.inlets()[0]), Arc::clone(&image));
            let (writes, forged) = (*writes, self.forged);
            let mirror = move || mirror(&inlet, &image, writes, forged);
            tokio::task::spawn_blocking(mirror).await.unwrap();
        }
        let (mut back, mut qemu) = UnixStream::connect(&outward).await.unwrap().into_split();
        let input = sample::stream(self.pages, &self.passes);
        let feeding = tokio::spawn(async move {
            // A session that gives up closes the socket.
            let _ = qemu.write_all(&input).await;
            qemu
        });
        let dest_end = timeout(WAIT, dest.ended()).await.expect("an end");
        let took = began.elapsed();
        let source_end = timeout(WAIT, &mut source.finished).await.expect("an end").unwrap();
        let mut heard = Vec::new();
        if source_end.is_ok() {
            source.release_source(true).unwrap();
        }
        drop(source);
        timeout(WAIT, back.read_to_end(&mut heard)).await.unwrap().unwrap();
        drop((feeding.await, fake_dest.abort()));
        let image = image.lock().unwrap().clone();
        Outcome { memory, layout, image, source: source_end, dest: dest_end, took, heard }
    }
}

fn space(image: &[u8]) -> DiskSpace {
    DiskSpace { bytes: image.len() as u64, backed: false }
}

type Image = Arc<Mutex<Vec<u8>>>;

struct Reader(Image);

impl ImageReader for Reader {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }
}

fn reader(image: &Image) -> Box<dyn ImageReader> {
    Box::new(Reader(Arc::clone(image)))
}

/// A mirror: the whole disk once, as QEMU does it, then what a guest writes and discards.
fn mirror(inlet: &Inlet, image: &Image, writes: u32, forged: bool) {
    let whole = image.lock().unwrap().clone();
    inlet.zero(0, inlet.bytes()).unwrap();
    inlet.holds(0, inlet.bytes()).unwrap();
    for (at, content) in (0..).step_by(128 << 10).zip(whole.chunks(128 << 10)) {
        inlet.write(at, content).unwrap();
    }
    let blocks = inlet.bytes() / 4096;
    for n in 0..u64::from(writes) {
        let (block, len) = (n * 7919 % (blocks - 8), 1 + n % 8);
        let range = (block * 4096) as usize..((block + len) * 4096) as usize;
        let content: Vec<u8> =
            (0..len).flat_map(|i| sample::page(0xd15c << 32 | n << 4 | i)).collect();
        let content = if n % 5 == 0 { vec![0; range.len()] } else { content };
        image.lock().unwrap()[range].copy_from_slice(&content);
        if n % 10 == 0 {
            inlet.zero(block * 4096, len * 4096).unwrap();
        } else {
            inlet.write(block * 4096, &content).unwrap();
        }
    }
    if forged {
        image.lock().unwrap()[77 * 4096 + 5] ^= 1;
        inlet.holds(77 * 4096, 4096).unwrap();
    }
    inlet.finish(WAIT).unwrap();
}

/// QEMU at the destination: takes the stream, says PONG, and SHUT at its end.
async fn load(listener: UnixListener) {
    let (mut socket, _) = listener.accept().await.unwrap();
    // A session that has given up reads no more.
    let _ = socket.write_all(b"\0\x02\0\x04\0\0\0\x01").await;
    let (mut tail, mut buffer) = (Tail::default(), vec![0; 65536]);
    while !tail.is_whole() {
        match socket.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(len) => tail.feed(&buffer[..len]),
        }
    }
    socket.write_all(b"\0\x01\0\x04\0\0\0\0").await.unwrap();
    // Stays until the relay has read it.
    let _ = socket.read(&mut buffer).await;
}

/// A stream to the destination session that breaks after `budget` bytes.
async fn cut_after(budget: u64, streams: mpsc::Sender<Stream>) -> Stream {
    let (near, near_inner) = tokio::io::duplex(256 << 10);
    let (far, far_inner) = tokio::io::duplex(256 << 10);
    streams.send(Box::new(far)).await.unwrap();
    let left = Arc::new(AtomicU64::new(budget));
    let (near_read, near_write) = tokio::io::split(near_inner);
    let (far_read, far_write) = tokio::io::split(far_inner);
    let there = pass(near_read, far_write, Arc::clone(&left));
    let back = pass(far_read, near_write, left);
    tokio::spawn(async move {
        tokio::select! { () = there => {}, () = back => {} }
    });
    Box::new(near)
}

async fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    left: Arc<AtomicU64>,
) {
    let mut buffer = vec![0; 65536];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        let before = left.load(Ordering::Relaxed);
        let len = before.min(len as u64) as usize;
        left.store(before - len as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..len]).await.is_err() || before == len as u64 {
            return;
        }
    }
}

fn versions(pages: u32, version: u64) -> Vec<sample::Record> {
    // Some zero, some shared between pages and versions, some of their own.
    let content = |i: u32| match i % 5 {
        0 => None,
        1 => Some(sample::page(u64::from(i / 50))),
        _ => Some(sample::page(u64::from(i) << 20 | version)),
    };
    (0..pages).map(|i| (i, content(i))).collect()
}

fn check(setup: &Setup, outcome: &Outcome) {
    let (dest, source) = (outcome.dest.as_ref().unwrap(), outcome.source.as_ref().unwrap());
    let line = outcome.memory.bytes.lock().unwrap();
    let (ram, rest) = line.split_at(setup.pages as usize * 4096);
    assert!(ram == setup.expected(), "memory differs");
    if let Some(disk) = outcome.layout.disk(0) {
        let from = (disk.start - setup.pages) as usize * 4096;
        assert!(rest[from..] == outcome.image, "the disk differs");
    }
    drop(line);
    assert_eq!(dest.ram_digest, source.ram_digest);
    assert_eq!(dest.blob.len() as u64, source.opaque_bytes);
    assert_eq!(dest.progress.altered_pages, 0);
    let sent = sample::stream(setup.pages, &setup.passes);
    assert!(dest.blob.ends_with(&sent[sent.len() - sample::DEVICES..]));
    // PONG 1, then SHUT 0.
    assert_eq!(outcome.heard, b"\0\x02\0\x04\0\0\0\x01\0\x01\0\x04\0\0\0\0");
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_arrives_whatever_is_cut() {
    let pages = 3000;
    for seed in 0..6_u64 {
        let passes = (0..4).map(|v| versions(pages / (v as u32 * 3 + 1), v)).collect();
        let mut setup = Setup::new(pages, passes);
        let cut = |i: u64| (seed * 7919 + i * 104_729) % 500_000 + 300;
        setup.cuts = (0..seed * 3).map(cut).collect();
        setup.hurry = seed == 5;
        let outcome = setup.run().await;
        check(&setup, &outcome);
        let progress = outcome.source.unwrap().progress;
        assert!(u64::from(progress.reconnects) >= seed, "cuts were felt: {progress:?}");
        assert_eq!(progress.first_pass_nonzero_pages, u64::from(pages) * 4 / 5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_destination_has_does_not_cross() {
    let pages = 4000;
    let mut setup = Setup::new(pages, vec![versions(pages, 1), vec![]]);
    let alone = setup.run().await;
    check(&setup, &alone);
    let mut corpus = MemoryCorpus::default();
    for (_, content) in setup.passes[0].iter().filter(|(i, _)| i % 2 == 0) {
        content.iter().for_each(|c| corpus.add(&KEY, c));
    }
    // An index that promises what is not there any more: fetched instead.
    for (_, content) in setup.passes[0].iter().filter(|(i, _)| i % 20 == 3) {
        content.iter().for_each(|c| corpus.add_wrong(KEY.id(c), &[1; 4096]));
    }
    setup.corpus = Arc::new(corpus);
    let known = setup.run().await;
    check(&setup, &known);
    let figures = |o: &Outcome| o.source.as_ref().unwrap().progress;
    let (alone, known_figures) = (figures(&alone), figures(&known));
    // Contents shared between pages cross once even to an empty destination.
    assert!(alone.pages.known > 600, "{alone:?}");
    assert!(known_figures.wire_bytes_out < alone.wire_bytes_out * 6 / 10, "{known_figures:?}");
    assert!(known.dest.unwrap().progress.stale_copies >= 200);
}

/// 12 MiB: the first third known by extents, every other page of the second; holes between.
fn disk() -> (Vec<u8>, MemoryCorpus) {
    let mut corpus = MemoryCorpus::default();
    let mut image = vec![0; 12 << 20];
    for (n, page) in (0_u64..).zip(image.as_chunks_mut::<4096>().0) {
        if n % 100 < 90 {
            *page = sample::page(0xd15c_0000_0000 | n);
        }
        if (1024..2048).contains(&n) && n % 2 == 0 {
            corpus.add(&KEY, page);
        }
    }
    image[..4 << 20].as_chunks::<65536>().0.iter().for_each(|e| corpus.add_extent(&KEY, e));
    (image, corpus)
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_arrive_with_memory_whatever_is_cut() {
    for seed in 0..4_u64 {
        let (image, corpus) = disk();
        let mut setup = Setup::new(1000, vec![versions(1000, 1), vec![]]);
        setup.disk = Some((image, 400));
        setup.corpus = Arc::new(corpus);
        let cut = |i: u64| (seed * 7919 + i * 104_729) % 900_000 + 300;
        setup.cuts = (0..seed * 3).map(cut).collect();
        let outcome = setup.run().await;
        check(&setup, &outcome);
        let figures = outcome.source.unwrap().progress;
        assert!(figures.disk_blocks.known >= 900 + 450, "{figures:?}");
        assert!(figures.disk_blocks.literal >= 900, "{figures:?}");
        assert!(figures.disk_wire_bytes > 0, "{figures:?}");
        // What a cut broke off is not counted as sent.
        assert!(seed > 0 || figures.disk_wire_bytes < figures.wire_bytes_out, "{figures:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_what_its_mirror_wrote_is_caught() {
    let mut setup = Setup::new(100, vec![versions(100, 1), vec![]]);
    setup.disk = Some((disk().0, 10));
    setup.forged = true;
    let outcome = setup.run().await;
    assert!(matches!(outcome.source, Err(RelayError::DigestMismatch)), "{:?}", outcome.source);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_was_altered_or_misplaced_is_caught() {
    for fault in [Fault::Altered(700), Fault::Misplaced(700)] {
        let mut setup = Setup::new(2000, vec![versions(2000, 1), vec![]]);
        setup.fault = fault;
        let outcome = setup.run().await;
        assert!(matches!(outcome.dest, Err(RelayError::DigestMismatch)), "{:?}", outcome.dest);
        assert!(matches!(outcome.source, Err(RelayError::DigestMismatch)), "{:?}", outcome.source);
        assert!(outcome.heard.len() <= 8, "the source is not released");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_gets_the_higher_level_and_keeps_its_rate() {
    let pages = 3000;
    let mut setup = Setup::new(pages, vec![versions(pages, 1), vec![]]);
    setup.bandwidth = 4 << 20;
    let outcome = setup.run().await;
    check(&setup, &outcome);
    let progress = outcome.source.unwrap().progress;
    let rate = progress.wire_bytes_out as f64 / outcome.took.as_secs_f64();
    assert!(rate < (4 << 20) as f64 * 1.2, "{rate} B/s");
    // How high depends on what the machine has to spare.
    assert!(progress.level >= 3, "{progress:?}");
}

/// Run by hand: `cargo test --release --test relay -- --ignored --nocapture speed`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn speed() {
    let pages = 100_000;
    let mut setup = Setup::new(pages, vec![versions(pages, 1), vec![]]);
    let seen = Instant::now();
    let input = sample::stream(pages, &setup.passes);
    println!("made {} MB in {:?}", input.len() / 1_000_000, seen.elapsed());
    for bandwidth in [0, 12_500_000] {
        setup.bandwidth = bandwidth;
        let outcome = setup.run().await;
        let progress = outcome.source.unwrap().progress;
        let rate = f64::from(pages) * 4096.0 * 0.8 / outcome.took.as_secs_f64() / 1e6;
        println!("cap {bandwidth}: {:?}, {rate:.0} MB/s of content, {progress:?}", outcome.took);
    }
}
