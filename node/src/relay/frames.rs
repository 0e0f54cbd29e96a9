//! Messages over one byte stream.
//!
//! Owns the two tasks of a connection and its counters. Never interprets a message. Invariant: a
//! lost stream shows as closed queues at both ends and nothing else.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::limits::TEXT_BYTES;
use godwit_protocol::wire::bulk::{self, Head, PREFIX_BYTES};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::RelayError;
use super::buffers::Buffers;

/// A byte stream in both directions (TLS over TCP; a pipe in tests).
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// An owned byte stream.
pub type Stream = Box<dyn Duplex>;

/// Opens a new bulk stream to the destination node; called again after a cut.
pub type Connector =
    Box<dyn FnMut() -> Pin<Box<dyn Future<Output = io::Result<Stream>> + Send>> + Send>;

/// Bytes that are written before the rate is looked at again.
const SLICE: usize = 64 << 10;
/// How often a limit is looked at again while it makes the stream wait.
const LOOK: Duration = Duration::from_millis(20);
/// Messages that wait between a task and the session.
const QUEUE: usize = 1;
/// How long a last word may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// Payloads below this are written together with their head, bytes.
const SMALL: usize = 16 << 10;

/// One message.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) head: Head,
    pub(super) payload: Bytes,
}

impl From<Head> for Frame {
    fn from(head: Head) -> Self {
        Self { head, payload: Bytes::new() }
    }
}

/// What crossed, over all connections of a session.
#[derive(Debug, Default)]
pub(super) struct Meter {
    pub(super) bytes_out: AtomicU64,
    pub(super) bytes_in: AtomicU64,
    /// Nanoseconds during which the stream was taking bytes.
    pub(super) busy: AtomicU64,
    /// Nanoseconds during which the cap held the stream back: they say nothing of the path.
    pub(super) held: AtomicU64,
    /// Most bytes per second that leave; 0: no limit. May change at any time.
    pub(super) cap: AtomicU64,
}

/// A connection: closed queues mean that it is lost.
pub(super) struct Conn {
    pub(super) incoming: mpsc::Receiver<Result<Frame, RelayError>>,
    pub(super) outgoing: mpsc::Sender<Frame>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Conn {
    /// Starts the tasks; no more leaves than the meter's cap says.
    pub(super) fn start(stream: Stream, meter: Arc<Meter>, buffers: Buffers) -> Self {
        let (mut read, write) = tokio::io::split(stream);
        let (to_session, incoming) = mpsc::channel(QUEUE);
        let (outgoing, from_session) = mpsc::channel(QUEUE);
        let counter = Arc::clone(&meter);
        let reader = tokio::spawn(async move {
            loop {
                let frame = match receive(&mut read, &counter, &buffers).await {
                    Ok(Some(frame)) => Ok(frame),
                    Ok(None) => return,
                    Err(e) => Err(e),
                };
                let last = frame.is_err();
                if to_session.send(frame).await.is_err() || last {
                    return;
                }
            }
        });
        let writer = tokio::spawn(async move {
            if let Err(cause) = send_all(write, from_session, &meter).await {
                tracing::debug!(%cause, "bulk stream lost");
            }
        });
        Self { incoming, outgoing, tasks: [reader, writer] }
    }
}

impl Conn {
    /// Sends the last messages and waits until they have left.
    pub(super) async fn drain(mut self, frames: impl Iterator<Item = Frame>) {
        let last = async {
            for frame in frames {
                if self.outgoing.send(frame).await.is_err() {
                    return;
                }
            }
            let (closed, _) = mpsc::channel(1);
            self.outgoing = closed;
            // The writer ends once it has sent everything.
            let _ = (&mut self.tasks[1]).await;
        };
        let _ = tokio::time::timeout(FAREWELL, last).await;
    }

    /// Says why this end gives up, as far as the stream still carries it.
    pub(super) async fn farewell(self, mut cause: String) {
        cause.truncate(cause.floor_char_boundary(TEXT_BYTES));
        self.drain(std::iter::once(Head::Failed { cause }.into())).await;
    }
}

/// The next message; `None`: the stream is lost.
async fn receive(
    read: &mut (impl AsyncRead + Unpin),
    meter: &Meter,
    buffers: &Buffers,
) -> Result<Option<Frame>, RelayError> {
    let mut prefix = [0; PREFIX_BYTES];
    if read.read_exact(&mut prefix).await.is_err() {
        return Ok(None);
    }
    let (head, payload) = bulk::lengths(prefix)?;
    let mut bytes = vec![0; head];
    if read.read_exact(&mut bytes).await.is_err() {
        return Ok(None);
    }
    let head = bulk::head(&bytes)?;
    meter.bytes_in.fetch_add((PREFIX_BYTES + bytes.len()) as u64, Ordering::Relaxed);
    let mut content = buffers.take(payload);
    let mut limited = (&mut *read).take(payload as u64);
    while content.len() < payload {
        match limited.read_buf(&mut content).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return Ok(None),
        }
    }
    meter.bytes_in.fetch_add(payload as u64, Ordering::Relaxed);
    Ok(Some(Frame { head, payload: buffers.share(content) }))
}

async fn send_all(
    mut write: impl AsyncWrite + Unpin,
    mut frames: mpsc::Receiver<Frame>,
    meter: &Meter,
) -> io::Result<()> {
    let mut due = Instant::now();
    while let Some(frame) = frames.recv().await {
        let mut bytes = bulk::prefix(&frame.head, frame.payload.len()).map_err(io::Error::other)?;
        let total = bytes.len() + frame.payload.len();
        let (began, mut held) = (Instant::now(), Duration::ZERO);
        if frame.payload.len() < SMALL {
            bytes.extend_from_slice(&frame.payload);
            write.write_all(&bytes).await?;
        } else {
            write.write_all(&bytes).await?;
            for slice in frame.payload.chunks(SLICE) {
                write.write_all(slice).await?;
                let paced = Instant::now();
                due = pace(due, slice.len(), &meter.cap).await;
                held += paced.elapsed();
            }
        }
        if frames.is_empty() {
            write.flush().await?;
        }
        meter.bytes_out.fetch_add(total as u64, Ordering::Relaxed);
        let busy = began.elapsed().saturating_sub(held);
        meter.busy.fetch_add(busy.as_nanos() as u64, Ordering::Relaxed);
        meter.held.fetch_add(held.as_nanos() as u64, Ordering::Relaxed);
    }
    write.shutdown().await
}

/// Waits until `len` more bytes keep within `cap` bytes per second. A cap that was raised meanwhile
/// shortens the wait: what is due under a low one may be a second away.
async fn pace(due: Instant, len: usize, cap: &AtomicU64) -> Instant {
    let at = cap.load(Ordering::Relaxed);
    if at == 0 {
        return due;
    }
    let next = due.max(Instant::now()) + Duration::from_secs_f64(len as f64 / at as f64);
    while Instant::now() < due {
        tokio::time::sleep_until(due.min(Instant::now() + LOOK)).await;
        if cap.load(Ordering::Relaxed) != at {
            return Instant::now();
        }
    }
    next
}
