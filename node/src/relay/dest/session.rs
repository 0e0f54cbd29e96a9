//! The destination's session: messages in, answers out, until memory and device state are whole.
//!
//! Owns the connection (the newest that was attached), the stream for QEMU and the end. Invariant:
//! device state is fed only when all pages are placed; every wait has a deadline, and what waits to
//! be placed or said is bounded: nothing more is heard meanwhile.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use godwit_protocol::limits::{BULK_MESSAGE_BYTES, DEVICE_STATE_BYTES, PLACING_BYTES};
use godwit_protocol::wire::bulk::{Coding, Head};
use godwit_protocol::wire::codec::WIRE_VERSION;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::feed::{Blob, feed};
use super::place::{Placer, Worker};
use super::{DestEnd, DestParams, DestProgress, Settle};
use crate::relay::RelayError;
use crate::relay::budget::Window;
use crate::relay::frames::{Conn, Frame, Meter, Stream};
use crate::relay::pack::Unpacker;
use crate::relay::pool::{Pool, lock};
use crate::relay::stream::{StreamUnpacker, WINDOW_LOGS};

const WORKERS: usize = 2;
const TICK: Duration = Duration::from_millis(100);
const HELLO: Duration = Duration::from_secs(5);
/// Answers that wait between threads and session.
const ANSWERS: usize = 64;
/// Messages that wait for a far end that does not read: with so many nothing more is heard of it.
const UNSAID: usize = 1024;
/// What may wait to be placed when many sessions share the node, bytes; one message may be more.
const PLACING_LEAST: usize = 256 << 10;
/// What a message counts for besides what it carries, bytes.
const MESSAGE_BYTES: usize = 256;

/// What a thread did: bytes of the message it is done with, and what to say.
type Done = (usize, Result<Vec<Frame>, RelayError>);

type Incoming = mpsc::Receiver<Result<Frame, RelayError>>;

/// Where [`DestParams::settle`] stands.
enum Settling {
    Waits(Settle),
    Begun(JoinHandle<Result<(), String>>),
    Done,
}

impl Settling {
    fn begin(&mut self) {
        match std::mem::replace(self, Self::Done) {
            Self::Waits(settle) => *self = Self::Begun(tokio::spawn(settle())),
            other => *self = other,
        }
    }

    /// Waits for the end of what was begun; for ever if nothing was.
    async fn ended(&mut self) -> Result<(), RelayError> {
        let Self::Begun(task) = self else { return std::future::pending().await };
        let outcome = task.await;
        *self = Self::Done;
        outcome.unwrap_or_else(|e| Err(e.to_string())).map_err(RelayError::Settle)
    }
}

struct End {
    digest: [u8; 32],
    opaque_bytes: u64,
    opaque: [u8; 32],
}

pub(super) struct Session {
    params: DestParams,
    placer: Arc<Placer>,
    pool: Arc<Pool<Frame>>,
    /// Unpacks what belongs to one long stream, in order, before it is placed.
    unstream: Pool<Frame>,
    /// How far a long stream may look back: 2 to this power, bytes; 0: there is none.
    looks_back: u8,
    done: mpsc::Receiver<Done>,
    progress: watch::Sender<DestProgress>,
    unpacker: Unpacker,
    blob: Blob,
    allowed: watch::Sender<usize>,
    /// Where device state begins in the blob.
    gate: Option<usize>,
    ram_end: Option<u32>,
    end: Option<End>,
    /// Digests are equal.
    equal: Option<[u8; 32]>,
    settling: Settling,
    placing: usize,
    outbox: VecDeque<Frame>,
}

impl Session {
    pub(super) fn start(
        mut params: DestParams,
        progress: watch::Sender<DestProgress>,
    ) -> Result<Self, RelayError> {
        let sink = Arc::clone(&params.sink);
        let corpus = Arc::clone(&params.corpus);
        let settling = params.settle.take().map_or(Settling::Done, Settling::Waits);
        let layout = params.layout.clone();
        let placer = Arc::new(Placer::new(sink, corpus, params.key.clone(), layout));
        let (done_out, done) = mpsc::channel::<Done>(ANSWERS);
        let workers = (0..WORKERS)
            .map(|_| Worker::new(Arc::clone(&placer)))
            .collect::<Result<Vec<_>, _>>()?;
        let mut workers = workers.into_iter();
        let pool = Pool::start("relay-place", WORKERS, || {
            let (mut worker, done) = (workers.next(), done_out.clone());
            move |frame: Frame| {
                let Some(worker) = worker.as_mut() else { return };
                let bytes = weight(&frame.head, frame.payload.len());
                // A session that has ended wants no answers.
                let _ = done.blocking_send((bytes, worker.run(frame)));
            }
        })?;
        let pool = Arc::new(pool);
        let window = params.seat.window(*WINDOW_LOGS.end());
        let looks_back = window.as_ref().map_or(0, |window| window.log as u8);
        let unstream = unstream(Arc::clone(&pool), done_out, window)?;
        Ok(Self {
            params,
            placer,
            pool,
            unstream,
            looks_back,
            done,
            progress,
            unpacker: Unpacker::new()?,
            blob: Blob::default(),
            allowed: watch::Sender::new(0),
            gate: None,
            ram_end: None,
            end: None,
            equal: None,
            settling,
            placing: 0,
            outbox: VecDeque::new(),
        })
    }

    pub(super) async fn run(
        mut self,
        streams: mpsc::Receiver<Stream>,
    ) -> Result<DestEnd, RelayError> {
        let mut conn = None;
        let path = self.params.qemu_socket.clone();
        let feeder = tokio::spawn(feed(path, Arc::clone(&self.blob), self.allowed.subscribe()));
        let mut feeder = Ended(feeder);
        let outcome = self.serve(&mut conn, streams, &mut feeder).await;
        self.publish();
        match (&outcome, conn) {
            (Err(RelayError::Peer(_)), _) | (_, None) => {}
            (Err(RelayError::DigestMismatch), Some(conn)) => {
                conn.drain(self.outbox.drain(..)).await;
            }
            (Err(cause), Some(conn)) => conn.farewell(cause.to_string()).await,
            // The verdict has been put into the queue: let it leave.
            (Ok(_), Some(conn)) => conn.drain(self.outbox.drain(..)).await,
        }
        outcome
    }

    async fn serve(
        &mut self,
        conn: &mut Option<Conn>,
        mut streams: mpsc::Receiver<Stream>,
        feeder: &mut Ended,
    ) -> Result<DestEnd, RelayError> {
        let meter = Arc::new(Meter::default());
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut whole) = (Instant::now(), None);
        let mut loaded = false;
        loop {
            let most = self.params.seat.part(PLACING_BYTES, PLACING_LEAST);
            let room = self.placing < most && self.outbox.len() < UNSAID;
            let saying = !self.outbox.is_empty();
            let (incoming, outgoing) = match conn.as_mut() {
                Some(conn) => (Some(&mut conn.incoming), Some(&conn.outgoing)),
                None => (None, None),
            };
            tokio::select! {
                stream = streams.recv() => {
                    let Some(stream) = stream else { return Err(RelayError::Aborted) };
                    if let Some(new) = self.greet(stream, &meter).await? {
                        *conn = Some(new);
                        heard = Instant::now();
                    }
                }
                frame = receive(incoming), if room => {
                    heard = Instant::now();
                    match frame {
                        Some(frame) => self.hear(frame?)?,
                        None => *conn = None,
                    }
                }
                sent = send(outgoing, &mut self.outbox), if saying => {
                    if !sent {
                        *conn = None;
                    }
                }
                done = self.done.recv() => {
                    let Some((bytes, answers)) = done else { return Err(RelayError::Aborted) };
                    self.placing = self.placing.saturating_sub(bytes);
                    self.outbox.extend(answers?);
                }
                code = &mut feeder.0, if !loaded => match code {
                    Ok(Ok(0)) => loaded = true,
                    Ok(Ok(code)) => return Err(RelayError::LoadFailed(code)),
                    Ok(Err(cause)) => return Err(cause),
                    Err(_) => return Err(RelayError::Aborted),
                },
                settled = self.settling.ended() => settled?,
                _ = ticks.tick() => {
                    self.placer.table.close();
                    self.publish();
                    self.check_deadlines(heard, whole)?;
                }
            }
            self.advance()?;
            if let Some(ram_digest) = self.equal {
                whole.get_or_insert_with(Instant::now);
                if loaded {
                    let blob = std::mem::take(&mut *lock(&self.blob)).into();
                    let progress = self.figures();
                    return Ok(DestEnd { ram_digest, blob, progress });
                }
            }
        }
    }

    fn check_deadlines(&self, heard: Instant, whole: Option<Instant>) -> Result<(), RelayError> {
        if whole.is_some_and(|since| since.elapsed() > self.params.load_deadline) {
            return Err(RelayError::DestQemu("did not load in time".to_owned()));
        }
        if whole.is_none() && heard.elapsed() > self.params.silence_deadline {
            return Err(RelayError::Unreachable(self.params.silence_deadline.as_secs()));
        }
        Ok(())
    }

    /// Reads a hello and answers; `None`: no use.
    async fn greet(
        &mut self,
        stream: Stream,
        meter: &Arc<Meter>,
    ) -> Result<Option<Conn>, RelayError> {
        let mut conn =
            Conn::start(stream, Arc::clone(meter), self.params.seat.budget().buffers.clone());
        let hello = match timeout(HELLO, conn.incoming.recv()).await {
            Ok(Some(Ok(frame))) => frame.head,
            _ => return Ok(None),
        };
        let Head::Hello { version, migration, pages } = hello else { return Ok(None) };
        let refusal = if version != WIRE_VERSION {
            Some(format!("wire version {version} here {WIRE_VERSION}"))
        } else if migration != self.params.migration {
            Some("another migration".to_owned())
        } else if pages != self.placer.table.pages() {
            Some(format!("{pages} pages of memory, here {}", self.placer.table.pages()))
        } else {
            None
        };
        if let Some(cause) = refusal {
            conn.farewell(cause).await;
            return Ok(None);
        }
        // Answers meant for the old stream are repeated on request.
        self.outbox.clear();
        let placed = lock(&self.placer.state).through();
        let opaque = lock(&self.blob).len() as u64;
        self.outbox.push_back(Head::Welcome { placed, opaque, window: self.looks_back }.into());
        if self.equal.is_some() {
            self.outbox.push_back(Head::Verdict { equal: true }.into());
        }
        Ok(Some(conn))
    }

    fn hear(&mut self, frame: Frame) -> Result<(), RelayError> {
        match frame.head {
            Head::Offer { .. } | Head::Ids { .. } | Head::Push { .. } | Head::Literals { .. } => {
                if let Head::Literals { coding: Coding::Stream { len, .. }, .. } = frame.head {
                    self.placing += weight(&frame.head, len as usize);
                    self.unstream.put(frame, false);
                    return Ok(());
                }
                let urgent = matches!(frame.head, Head::Offer { .. } | Head::Ids { .. });
                self.placing += weight(&frame.head, frame.payload.len());
                self.pool.put(frame, urgent);
            }
            Head::Opaque { offset, held, coding } => {
                self.opaque(offset, held, coding, frame.payload)?;
            }
            Head::RamEnd { seq } => self.ram_end = Some(seq),
            Head::End { digest, opaque_bytes, opaque } => {
                self.end = Some(End { digest, opaque_bytes, opaque });
            }
            Head::Ping { stamp } => self.outbox.push_back(Head::Pong { stamp }.into()),
            Head::Failed { cause } => return Err(RelayError::Peer(cause)),
            other => return Err(RelayError::Protocol(format!("unexpected {other:?}"))),
        }
        Ok(())
    }

    fn opaque(
        &mut self,
        offset: u64,
        held: bool,
        coding: Coding,
        payload: bytes::Bytes,
    ) -> Result<(), RelayError> {
        let mut blob = lock(&self.blob);
        let have = blob.len();
        let content = self.unpacker.unpack(coding, payload, 1 << 20)?;
        if offset > have as u64 {
            return Err(RelayError::Protocol("a gap in the device state".to_owned()));
        }
        let skip = have - offset as usize;
        if have + content.len() > DEVICE_STATE_BYTES {
            return Err(RelayError::StateTooLarge(DEVICE_STATE_BYTES));
        }
        if let Some(new) = content.get(skip..) {
            blob.extend_from_slice(new);
        }
        if held && self.gate.is_none() {
            self.gate = Some(offset as usize);
        }
        self.outbox.push_back(Head::OpaqueHave { bytes: blob.len() as u64 }.into());
        Ok(())
    }

    /// Lets QEMU have what it may have, and closes the digest once everything is there.
    fn advance(&mut self) -> Result<(), RelayError> {
        let have = lock(&self.blob).len();
        let placed = lock(&self.placer.state).through();
        let all_placed = self.ram_end.is_some_and(|seq| placed >= seq);
        if all_placed {
            self.settling.begin();
        }
        let ready = all_placed && matches!(self.settling, Settling::Done);
        let allowed = self.gate.filter(|_| !ready).unwrap_or(have);
        self.allowed.send_if_modified(|now| {
            let more = allowed > *now;
            *now = allowed.max(*now);
            more
        });
        let Some(end) = &self.end else { return Ok(()) };
        if self.equal.is_some() || !all_placed || (have as u64) < end.opaque_bytes {
            return Ok(());
        }
        let digest = self.placer.table.digest();
        let opaque = *blake3::hash(&lock(&self.blob)).as_bytes();
        let equal = digest == end.digest && opaque == end.opaque && have as u64 == end.opaque_bytes;
        self.outbox.push_back(Head::Verdict { equal }.into());
        if !equal {
            return Err(RelayError::DigestMismatch);
        }
        self.equal = Some(digest);
        Ok(())
    }

    fn figures(&self) -> DestProgress {
        let placer = &self.placer;
        DestProgress {
            pages_placed: placer.placed.load(Ordering::Relaxed),
            pages_known: placer.known.load(Ordering::Relaxed),
            stale_copies: placer.stale_copies.load(Ordering::Relaxed),
            altered_pages: placer.altered.load(Ordering::Relaxed),
            opaque_bytes: lock(&self.blob).len() as u64,
            digest_equal: self.equal.is_some(),
        }
    }

    fn publish(&self) {
        self.progress.send_replace(self.figures());
    }
}

/// Bytes that a message takes until it is placed: also one without content takes some.
fn weight(head: &Head, content: usize) -> usize {
    let lists = match head {
        Head::Offer { pages, zeros, .. } | Head::Push { pages, zeros, .. } => {
            pages.len() + zeros.len()
        }
        Head::Literals { segments, .. } => std::mem::size_of_val(segments.as_slice()),
        _ => 0,
    };
    MESSAGE_BYTES + lists + content
}

/// A thread that unpacks a long stream and hands its content to those who place it.
fn unstream(
    pool: Arc<Pool<Frame>>,
    done: mpsc::Sender<Done>,
    window: Option<Window>,
) -> std::io::Result<Pool<Frame>> {
    let mut given = Some((pool, done, StreamUnpacker::new(window)));
    Pool::start("relay-unpack", 1, || {
        let mut given = given.take();
        move |frame: Frame| {
            let Some((pool, done, unpacker)) = &mut given else { return };
            let Head::Literals { segments, coding: Coding::Stream { len, begins } } = frame.head
            else {
                return;
            };
            let len = len as usize;
            match unpacker.unpack(begins, len, &frame.payload, BULK_MESSAGE_BYTES) {
                Ok(content) => {
                    let head = Head::Literals { segments, coding: Coding::Raw };
                    pool.put(Frame { head, payload: content.into() }, false);
                }
                // A session that has ended wants no answers.
                Err(cause) => drop(done.blocking_send((len, Err(cause)))),
            }
        }
    })
}

/// A task that ends with its owner.
struct Ended(JoinHandle<Result<u32, RelayError>>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn receive(from: Option<&mut Incoming>) -> Option<Result<Frame, RelayError>> {
    match from {
        Some(from) => from.recv().await,
        None => std::future::pending().await,
    }
}

/// Sends the first message; false: the stream is lost.
async fn send(to: Option<&mpsc::Sender<Frame>>, outbox: &mut VecDeque<Frame>) -> bool {
    let Some(to) = to else { return std::future::pending().await };
    match to.reserve().await {
        Ok(permit) => {
            if let Some(frame) = outbox.pop_front() {
                permit.send(frame);
            }
            true
        }
        Err(_) => false,
    }
}
