//! The source's session: one connection after the other until the destination has everything.
//!
//! Owns the connection, its replacement after a cut, and the clock of the session. Invariant: it
//! ends with equal digests or with a cause; every wait has a deadline.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::chunk::Sum;
use godwit_protocol::chunk::qemu::Parser;
use godwit_protocol::id::{ChunkId, MigrationId};
use godwit_protocol::wire::bulk::{Coding, Head};
use godwit_protocol::wire::codec::WIRE_VERSION;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

use super::exchange::Exchange;
use super::reader::{self, Batch};
use super::shared::Shared;
use super::work::Job;
use super::{SourceEnd, SourceProgress};
use crate::relay::RelayError;
use crate::relay::frames::{Conn, Connector, Frame, Meter};
use crate::relay::pool::Pool;

const TICK: Duration = Duration::from_millis(20);
/// A PING every so many ticks.
const PING_TICKS: u64 = 5;
/// Touched regions of the digest are closed every so many ticks.
const CLOSE_TICKS: u64 = 5;
/// Round trip up to which a link that took bytes quickly is believed at once, microseconds.
const NEAR_US: u64 = 3000;
/// Bytes after which a farther link is believed, too: more than a socket's buffer.
const BELIEVE_BYTES: u64 = 16 << 20;
/// A connection on which nothing was heard for so long is given up.
const SILENCE: Duration = Duration::from_secs(8);
/// How long the answer to the first hello is waited for: an end that is near is known by then, a
/// far one has nothing to tell, and the round trip would be lost.
const FIRST_ANSWER: Duration = Duration::from_micros(2 * NEAR_US);
/// How long connecting and the first answer may take together.
const CONNECT: Duration = Duration::from_secs(10);
/// What is read from QEMU after its first pass, in time of the link beyond a round trip, and at least.
const READ_AHEAD: Duration = Duration::from_millis(100);
const READ_AHEAD_BYTES: f64 = 1e6;
/// How many bytes of a guest become one on the link, at best: more would only wait.
const SHRINK: f64 = 3.0;
const BACKOFF: [u64; 5] = [50, 100, 250, 500, 1000];

/// What threads tell the session.
pub(super) enum Event {
    Hashed {
        batch: Batch,
        sum: Sum,
        sums: Vec<ChunkId>,
    },
    Packed {
        parcel: Parcel,
        level: i32,
        /// It is a part of this connection's long stream.
        stream: Option<u32>,
        from: usize,
        took: Duration,
        coding: Coding,
        payload: Bytes,
    },
    Opaque {
        offset: u64,
        len: usize,
        held: bool,
        coding: Coding,
        payload: Bytes,
    },
    RamEnd {
        seq: u32,
    },
    StreamEnd {
        bytes: u64,
        hash: [u8; 32],
    },
    /// The image of one disk is in the digest as it is.
    DiskChecked,
    Failed(RelayError),
}

/// What a compressed message will be.
pub(super) enum Parcel {
    /// (batch, pages) of several batches.
    Literals(Vec<(u32, u32)>),
    /// One batch without asking.
    Push(u32),
}

/// The session's queues.
pub(super) struct Channels {
    pub(super) events_out: mpsc::Sender<Event>,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) progress: watch::Sender<SourceProgress>,
}

/// What the session keeps of its parameters.
pub(super) struct Params {
    pub(super) connect: Connector,
    pub(super) ram_block: String,
    pub(super) ram_bytes: u64,
    /// How many disks move.
    pub(super) disks: usize,
    pub(super) migration: MigrationId,
    pub(super) accept_deadline: Duration,
    pub(super) reconnect_deadline: Duration,
}

/// How serving one connection ended.
enum Served {
    Equal,
    Lost,
}

pub(super) struct Session {
    shared: Arc<Shared>,
    pool: Arc<Pool<Job>>,
    channels: Channels,
    params: Params,
    exchange: Exchange,
    meter: Arc<Meter>,
    began: Instant,
    best_rtt_us: u64,
    /// When the first hello was said, until it is answered.
    unanswered: Option<Instant>,
    /// Whether a destination was ever spoken to.
    greeted: bool,
}

impl Session {
    pub(super) fn new(
        shared: Arc<Shared>,
        pool: Arc<Pool<Job>>,
        channels: Channels,
        meter: Arc<Meter>,
        params: Params,
    ) -> Self {
        let exchange = Exchange::new(Arc::clone(&shared), Arc::clone(&pool), params.disks);
        Self {
            shared,
            pool,
            channels,
            params,
            exchange,
            meter,
            began: Instant::now(),
            best_rtt_us: u64::MAX,
            unanswered: None,
            greeted: false,
        }
    }

    /// Relays until the end or until `aborted` says something.
    pub(super) async fn run(
        mut self,
        listener: UnixListener,
        mut aborted: mpsc::Receiver<()>,
    ) -> Result<SourceEnd, RelayError> {
        self.accept(listener);
        let outcome = self.relay(&mut aborted).await;
        if outcome.is_err() {
            self.shared.stop();
        }
        self.publish(false);
        outcome
    }

    async fn relay(&mut self, aborted: &mut mpsc::Receiver<()>) -> Result<SourceEnd, RelayError> {
        let mut reconnects = 0;
        loop {
            let mut conn = self.connect(aborted).await?;
            self.exchange.progress.reconnects = reconnects;
            reconnects += 1;
            match self.serve(&mut conn, aborted).await {
                Ok(Served::Equal) => {
                    let ram_digest = self.shared.table.digest();
                    let opaque_bytes = self.exchange.opaque_bytes();
                    self.publish(false);
                    let progress = self.exchange.progress;
                    return Ok(SourceEnd { ram_digest, opaque_bytes, progress });
                }
                Ok(Served::Lost) => tracing::info!("bulk stream lost, connecting again"),
                Err(cause) => {
                    if !matches!(cause, RelayError::Peer(_) | RelayError::DigestMismatch) {
                        conn.farewell(cause.to_string()).await;
                    }
                    return Err(cause);
                }
            }
        }
    }

    /// Waits for QEMU beside the session.
    fn accept(&self, listener: UnixListener) {
        let shared = Arc::clone(&self.shared);
        let pool = Arc::clone(&self.pool);
        let events = self.channels.events_out.clone();
        let parser = Parser::new(&self.params.ram_block, self.params.ram_bytes);
        let deadline = self.params.accept_deadline;
        tokio::spawn(async move {
            let started = match timeout(deadline, listener.accept()).await {
                Ok(Ok((socket, _))) => socket.into_std().map_err(RelayError::Local),
                Ok(Err(e)) => Err(RelayError::Local(e)),
                Err(_) => Err(RelayError::SourceQemu(format!(
                    "did not connect within {} s",
                    deadline.as_secs()
                ))),
            };
            let tell = events.clone();
            let started = started.and_then(|socket| start(socket, parser, shared, pool, events));
            if let Err(cause) = started {
                // A session that has ended needs no cause.
                let _ = tell.send(Event::Failed(cause)).await;
            }
        });
    }

    /// Connects and says hello until it works or the deadline is over.
    async fn connect(&mut self, aborted: &mut mpsc::Receiver<()>) -> Result<Conn, RelayError> {
        let limit = self.params.reconnect_deadline;
        let deadline = Instant::now() + limit;
        let mut tries = BACKOFF.iter().chain(std::iter::repeat(&BACKOFF[4]));
        loop {
            let attempt = timeout_at(deadline, timeout(CONNECT, self.attempt()));
            let outcome = tokio::select! {
                outcome = attempt => outcome,
                _ = aborted.recv() => return Err(RelayError::Aborted),
            };
            match outcome {
                Err(_) => return Err(RelayError::Unreachable(limit.as_secs())),
                Ok(Ok(Ok(Some(conn)))) => return Ok(conn),
                Ok(Ok(Err(cause))) => return Err(cause),
                Ok(Ok(Ok(None)) | Err(_)) => {}
            }
            self.publish(false);
            let pause = Duration::from_millis(*tries.next().unwrap_or(&1000));
            if Instant::now() + pause > deadline {
                return Err(RelayError::Unreachable(limit.as_secs()));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One attempt; `None`: no connection yet.
    async fn attempt(&mut self) -> Result<Option<Conn>, RelayError> {
        let stream = match (self.params.connect)().await {
            Ok(stream) => stream,
            Err(cause) => {
                tracing::debug!(%cause, "bulk stream not connected");
                return Ok(None);
            }
        };
        let mut conn = Conn::start(stream, Arc::clone(&self.meter), self.shared.buffers());
        let hello = Head::Hello {
            version: WIRE_VERSION,
            migration: self.params.migration,
            pages: self.shared.table.pages(),
        };
        let said = Instant::now();
        if conn.outgoing.send(hello.into()).await.is_err() {
            return Ok(None);
        }
        self.unanswered = None;
        let answer = if self.greeted {
            conn.incoming.recv().await
        } else {
            self.greeted = true;
            let Ok(answer) = timeout(FIRST_ANSWER, conn.incoming.recv()).await else {
                self.unanswered = Some(said);
                self.go_on(0, 0);
                return Ok(Some(conn));
            };
            answer
        };
        match answer {
            Some(Ok(Frame { head: Head::Welcome { placed, opaque, window }, .. })) => {
                self.shared.window.store(window.into(), Ordering::Relaxed);
                self.note_rtt(said.elapsed().as_micros() as u64);
                self.go_on(placed, opaque);
                Ok(Some(conn))
            }
            Some(Ok(Frame { head: Head::Failed { cause }, .. })) => Err(RelayError::Peer(cause)),
            Some(Ok(frame)) => {
                Err(RelayError::Protocol(format!("{:?} instead of a welcome", frame.head)))
            }
            Some(Err(cause)) => Err(cause),
            None => Ok(None),
        }
    }

    /// Goes on from what the destination has.
    fn go_on(&mut self, placed: u32, opaque: u64) {
        let near = self.best_rtt_us <= NEAR_US;
        self.exchange.levels.expect(near);
        self.follow_link();
        self.exchange.resume(placed, opaque);
    }

    async fn serve(
        &mut self,
        conn: &mut Conn,
        aborted: &mut mpsc::Receiver<()>,
    ) -> Result<Served, RelayError> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut window = Window::new(&self.meter);
        loop {
            let idle = conn.outgoing.capacity() == conn.outgoing.max_capacity();
            self.exchange.pump(idle);
            let eager = self.exchange.is_eager();
            tokio::select! {
                event = self.channels.events.recv() => {
                    let Some(event) = event else { return Err(RelayError::Aborted) };
                    self.exchange.event(event)?;
                }
                frame = conn.incoming.recv() => {
                    let Some(frame) = frame else { return Ok(Served::Lost) };
                    heard = Instant::now();
                    if self.hear(frame?)? {
                        return Ok(Served::Equal);
                    }
                }
                permit = conn.outgoing.reserve(), if eager => {
                    let Ok(permit) = permit else { return Ok(Served::Lost) };
                    if let Some(frame) = self.exchange.next() {
                        permit.send(frame);
                    } else {
                        drop(permit);
                        self.exchange.pump(true);
                    }
                }
                _ = aborted.recv() => return Err(RelayError::Aborted),
                _ = ticks.tick() => {
                    if heard.elapsed() > SILENCE {
                        return Ok(Served::Lost);
                    }
                    self.exchange.progress.silent_ms = heard.elapsed().as_millis() as u64;
                    self.tick(&mut window);
                }
            }
        }
    }

    fn hear(&mut self, frame: Frame) -> Result<bool, RelayError> {
        if let Head::Pong { stamp } = frame.head {
            let now = self.began.elapsed().as_micros() as u64;
            self.note_rtt(now.saturating_sub(stamp).max(1));
            return Ok(false);
        }
        if let Head::Welcome { placed: 0, opaque: 0, window } = frame.head
            && let Some(said) = self.unanswered.take()
        {
            self.shared.window.store(window.into(), Ordering::Relaxed);
            self.note_rtt(said.elapsed().as_micros() as u64);
            return Ok(false);
        }
        self.exchange.heard(frame)
    }

    fn tick(&mut self, window: &mut Window) {
        let rtt = self.best_rtt_us;
        let sent = self.meter.bytes_out.load(Ordering::Relaxed);
        let work = self.exchange.is_packing() && (rtt <= NEAR_US || sent > BELIEVE_BYTES);
        window.close(&self.meter, |bytes, over, busy| {
            self.exchange.levels.sent(bytes, over, busy, work);
        });
        self.follow_link();
        if window.ticks.is_multiple_of(CLOSE_TICKS) {
            self.shared.table.close();
        }
        if window.ticks.is_multiple_of(PING_TICKS) {
            let stamp = self.began.elapsed().as_micros() as u64;
            self.exchange.soon(Head::Ping { stamp });
        }
        self.publish(true);
        self.pace_reading();
    }

    fn note_rtt(&mut self, rtt: u64) {
        self.best_rtt_us = self.best_rtt_us.min(rtt);
        self.exchange.progress.rtt_us = self.best_rtt_us;
    }

    fn follow_link(&mut self) {
        self.exchange.levels.hold_to(self.meter.cap.load(Ordering::Relaxed));
        self.shared.raw.store(self.exchange.levels.choose() == 0, Ordering::Relaxed);
    }

    /// After the first pass QEMU sends whatever was dirtied as fast as it is read, hot pages again
    /// and again: it is read only when the link is about to have nothing to do.
    fn pace_reading(&self) {
        let p = &self.exchange.progress;
        let ahead = Duration::from_micros(p.rtt_us) + READ_AHEAD;
        let enough = (p.link_bytes_per_s * ahead.as_secs_f64() * SHRINK).max(READ_AHEAD_BYTES);
        self.shared.hold(p.passes > 0 && p.unplaced_bytes as f64 > enough);
    }

    fn publish(&mut self, connected: bool) {
        self.exchange.refresh();
        let progress = &mut self.exchange.progress;
        progress.connected = connected;
        progress.wire_bytes_out = self.meter.bytes_out.load(Ordering::Relaxed);
        progress.wire_bytes_in = self.meter.bytes_in.load(Ordering::Relaxed);
        self.channels.progress.send_replace(*progress);
    }
}

/// Starts the reader thread on an accepted connection of QEMU.
fn start(
    socket: UnixStream,
    parser: Parser,
    shared: Arc<Shared>,
    pool: Arc<Pool<Job>>,
    events: mpsc::Sender<Event>,
) -> Result<(), RelayError> {
    socket.set_nonblocking(false)?;
    shared.set_qemu(socket.try_clone()?);
    if shared.stop.load(Ordering::Relaxed) {
        shared.stop();
        return Err(RelayError::Aborted);
    }
    std::thread::Builder::new()
        .name("relay-reader".to_owned())
        .spawn(move || reader::run(socket, parser, shared, pool, events))?;
    Ok(())
}

/// What the meter counted since the last tick.
struct Window {
    at: Instant,
    bytes: u64,
    busy: u64,
    held: u64,
    ticks: u64,
}

impl Window {
    fn new(meter: &Meter) -> Self {
        Self {
            at: Instant::now(),
            bytes: meter.bytes_out.load(Ordering::Relaxed),
            busy: meter.busy.load(Ordering::Relaxed),
            held: meter.held.load(Ordering::Relaxed),
            ticks: 0,
        }
    }

    fn close(&mut self, meter: &Meter, note: impl FnOnce(u64, Duration, Duration)) {
        let ticks = self.ticks + 1;
        let now = Self { ticks, ..Self::new(meter) };
        let busy = Duration::from_nanos(now.busy - self.busy);
        // While a cap held the stream back, what left says nothing of the path: the last word on it stays.
        if now.held == self.held {
            note(now.bytes - self.bytes, now.at - self.at, busy);
        }
        *self = now;
    }
}
