//! One control stream: hello, then messages both ways until it ends.
//!
//! Owns the order of a stream's life. Never decides when to dial; that is `swarm`'s. Invariant:
//! nothing of the core crosses before both hellos were checked.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{MissedTickBehavior, interval, timeout};

use godwit_protocol::id::HostId;
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::wire::control::Control;

use super::NetEvent;
use super::certificate::Signed;
use super::hello::{
    self, BATCH, FRAME_BYTES, Frame, Hello, StreamError, read_message, write_version,
};
use super::roster::MemberRecord;
use super::shared::{LinkEnds, Shared};

/// How long a hello may take.
pub(super) const HELLO_TIME: Duration = Duration::from_secs(6);
/// Time between two pings.
const PING_EVERY: Duration = Duration::from_secs(2);
/// A stream on which nothing arrives for this long is dead. Longer than a cut of 5 s with QUIC's
/// probes backing off over it.
const SILENCE: Duration = Duration::from_secs(15);
/// How long a stream that is stopped may take to send what waits.
const DRAIN_TIME: Duration = Duration::from_secs(1);
/// Whole rosters are sent to one peer at most this often.
const ROSTER_EVERY: Duration = Duration::from_secs(4);

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It lived and ended.
    Ended,
    /// Another stream to the same peer stays instead.
    Duplicate,
    /// The peer did not answer our hello: it does not know us as a member, or has a stream already.
    Refused,
    /// The peer is no member.
    Stranger,
    /// The peer speaks another version.
    Mismatch,
    /// The stream could not be opened or broke in the hello.
    Failed,
}

/// The side that dialled.
pub(super) async fn outbound<S>(shared: Arc<Shared>, host: HostId, mut stream: S) -> Outcome
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Some(ours) = shared.hello() else { return Outcome::Failed };
    let exchanged = timeout(HELLO_TIME, async {
        hello::write_hello(&mut stream, shared.version, &ours).await?;
        hello::read_hello(&mut stream, shared.version).await
    });
    let theirs = match exchanged.await {
        Ok(Ok(theirs)) => theirs,
        Ok(Err(StreamError::Version { theirs, .. })) => {
            return mismatch(&shared, host, theirs).await;
        }
        Ok(Err(StreamError::Io(e))) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Outcome::Refused;
        }
        Ok(Err(cause)) => {
            tracing::debug!(%host, %cause, "hello failed");
            return Outcome::Failed;
        }
        Err(_) => return Outcome::Failed,
    };
    if let Err(cause) = shared.check_hello(host, &theirs) {
        tracing::warn!(%host, %cause, "the peer is no member of this swarm");
        return Outcome::Stranger;
    }
    let me = shared.me.host();
    live(shared, host, theirs, me, stream).await
}

/// The side that was dialled: says nothing to a stranger but, at most, its version.
/// `permit` counts the hellos under way and is given back when this one is done.
pub(super) async fn inbound<S>(
    shared: Arc<Shared>,
    host: HostId,
    mut stream: S,
    permit: OwnedSemaphorePermit,
) -> Outcome
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let theirs = match timeout(HELLO_TIME, hello::read_hello(&mut stream, shared.version)).await {
        Ok(Ok(theirs)) => theirs,
        Ok(Err(StreamError::Version { theirs, .. })) => {
            let said = timeout(HELLO_TIME, async {
                write_version(&mut stream, shared.version).await?;
                stream.close().await.map_err(StreamError::from)
            });
            let _ = said.await;
            return mismatch(&shared, host, theirs).await;
        }
        Ok(Err(StreamError::Io(_))) | Err(_) => return Outcome::Failed,
        Ok(Err(cause)) => {
            tracing::warn!(%host, %cause, "a host that does not speak our protocol was closed");
            return Outcome::Stranger;
        }
    };
    if let Err(cause) = shared.check_hello(host, &theirs) {
        tracing::warn!(%host, %cause, "a host that is no member was closed");
        return Outcome::Stranger;
    }
    if !shared.may_replace(host, theirs.instance, host) {
        return Outcome::Duplicate;
    }
    let Some(ours) = shared.hello() else { return Outcome::Failed };
    let said = hello::write_hello(&mut stream, shared.version, &ours);
    if !matches!(timeout(HELLO_TIME, said).await, Ok(Ok(()))) {
        return Outcome::Failed;
    }
    drop(permit);
    live(shared, host, theirs, host, stream).await
}

async fn mismatch(shared: &Shared, host: HostId, theirs: u16) -> Outcome {
    // Only of members: strangers must not fill the log.
    if shared.admitted(host) && shared.first_mismatch(host, theirs) {
        let ours = shared.version;
        tracing::error!(%host, ours, theirs, "the host speaks another wire version and is left alone; install the same version of godwit on both");
        shared.emit(NetEvent::VersionMismatch { host, ours, theirs }).await;
    }
    Outcome::Mismatch
}

async fn live<S>(
    shared: Arc<Shared>,
    host: HostId,
    theirs: Hello,
    initiator: HostId,
    stream: S,
) -> Outcome
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if !shared.may_replace(host, theirs.instance, initiator) {
        return Outcome::Duplicate;
    }
    let restarted = shared.connected(host);
    let (ends, news) = shared.register(host, &theirs, initiator);
    if news && restarted {
        shared.emit(NetEvent::Disconnected(host)).await;
    }
    if news {
        tracing::info!(%host, "connected");
        shared.emit(NetEvent::Connected(host)).await;
    }
    shared.learn(vec![theirs.member], Vec::new(), Some(host)).await;
    let id = ends.id;
    drive(&shared, host, stream, ends).await;
    if shared.unregister(host, id) {
        tracing::info!(%host, "disconnected");
        shared.emit(NetEvent::Disconnected(host)).await;
        return Outcome::Ended;
    }
    Outcome::Duplicate
}

async fn drive<S>(shared: &Arc<Shared>, host: HostId, stream: S, ends: LinkEnds)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut from, mut to) = stream.split();
    let LinkEnds { mut queue, mut internal, answers, waiting_bytes, rtt_us, stop, .. } = ends;
    let (start, answered) = (ends.since, ends.answered);
    let reader = async {
        let mut roster_sent: Option<Instant> = None;
        loop {
            let read = read_message::<_, Frame, FRAME_BYTES>(&mut from);
            let frame = match timeout(SILENCE, read).await {
                Ok(Ok(frame)) => frame,
                Ok(Err(cause)) => return format!("{cause}"),
                Err(_) => return format!("nothing heard for {} s", SILENCE.as_secs()),
            };
            match frame {
                Frame::Control(msg) => deliver(shared, host, *msg).await,
                Frame::Ping { number, digest } => {
                    reply(&answers, &Frame::Pong(number));
                    send_roster(shared, digest, &answers, &mut roster_sent);
                }
                Frame::Pong(number) => {
                    if let Some(rtt) = rtt_us_since(start, number) {
                        rtt_us.store(rtt, Ordering::Relaxed);
                        answered.notify_waiters();
                    }
                }
                Frame::Roster { members, revocations } => {
                    if members.len() > BATCH || revocations.len() > BATCH {
                        return "a roster frame over its limit".to_owned();
                    }
                    learn(shared, members, revocations, host).await;
                }
            }
        }
    };
    let writer = async {
        let mut ping = interval(PING_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut changed = shared.changed.subscribe();
        // The host may have been revoked since its hello was checked.
        changed.mark_changed();
        loop {
            let frame = tokio::select! {
                biased;
                Some(frame) = internal.recv() => frame,
                () = stop.notified() => return drain(&mut to, Vec::new(), &mut internal).await,
                _ = changed.changed() => {
                    if shared.admitted(host) { continue }
                    // It hears why, also if the news went to another stream of its, which has ended.
                    return drain(&mut to, shared.revocations_as_frames(), &mut internal).await;
                }
                _ = ping.tick() => ping_frame(shared, start),
                Some(frame) = queue.recv() => {
                    waiting_bytes.fetch_sub(frame.len(), Ordering::Relaxed);
                    frame
                }
            };
            if let Err(cause) = write_and_flush(&mut to, &frame, queue.is_empty()).await {
                return cause.to_string();
            }
        }
    };
    let cause = tokio::select! {
        cause = reader => cause,
        cause = writer => cause,
    };
    tracing::debug!(%host, %cause, "control stream ended");
}

/// Round trip of a ping that was sent so many microseconds after the start; none if it comes from the future.
fn rtt_us_since(start: Instant, sent_us: u64) -> Option<u64> {
    let rtt = start.elapsed().checked_sub(Duration::from_micros(sent_us))?;
    Some(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX - 1))
}

/// Sends what this node knows of members to a peer that knows something else, not too often.
fn send_roster(
    shared: &Shared,
    digest: [u8; 16],
    answers: &tokio::sync::mpsc::Sender<Vec<u8>>,
    sent: &mut Option<Instant>,
) {
    if digest == shared.digest() || sent.is_some_and(|at| at.elapsed() <= ROSTER_EVERY) {
        return;
    }
    *sent = Some(Instant::now());
    for frame in shared.roster_as_frames() {
        // A full queue: the next ping asks again.
        let _ = answers.try_send(frame);
    }
}

async fn deliver(shared: &Arc<Shared>, from: HostId, msg: Control) {
    if let Control::Revocations(encoded) = msg {
        let limit = encoded.len().min(BATCH);
        let decode = |bytes: &Vec<u8>| {
            godwit_protocol::wire::codec::decode::<Signed, CONTROL_MESSAGE_BYTES>(bytes).ok()
        };
        let revocations = encoded[..limit].iter().filter_map(decode).collect();
        learn(shared, Vec::new(), revocations, from).await;
    } else {
        shared.emit(NetEvent::Message { from, msg: Box::new(msg) }).await;
    }
}

/// Takes in news to the end, also if they are that this very stream has to end.
async fn learn(
    shared: &Arc<Shared>,
    members: Vec<MemberRecord>,
    revocations: Vec<Signed>,
    from: HostId,
) {
    let shared = Arc::clone(shared);
    let learning =
        tokio::spawn(async move { shared.learn(members, revocations, Some(from)).await });
    if let Err(cause) = learning.await {
        tracing::error!(%cause, "news of the roster were not taken in");
    }
}

fn reply(answers: &tokio::sync::mpsc::Sender<Vec<u8>>, frame: &Frame) {
    if let Ok(bytes) = hello::message(frame, FRAME_BYTES) {
        // A full queue means that the peer does not read: its ping stays unanswered, as it should.
        let _ = answers.try_send(bytes);
    }
}

fn ping_frame(shared: &Shared, start: Instant) -> Vec<u8> {
    let number = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    let ping = Frame::Ping { number, digest: shared.digest() };
    hello::message(&ping, FRAME_BYTES).unwrap_or_default()
}

async fn write_and_flush<S>(to: &mut S, frame: &[u8], flush: bool) -> std::io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    to.write_all(frame).await?;
    if flush { to.flush().await } else { Ok(()) }
}

/// Sends what `net` itself still has to say (a revoked host hears why), then closes.
async fn drain<S>(
    to: &mut S,
    last: Vec<Vec<u8>>,
    internal: &mut tokio::sync::mpsc::Receiver<Vec<u8>>,
) -> String
where
    S: AsyncWrite + Unpin,
{
    let said = timeout(DRAIN_TIME, async {
        for frame in last {
            to.write_all(&frame).await?;
        }
        while let Ok(frame) = internal.try_recv() {
            to.write_all(&frame).await?;
        }
        to.close().await
    });
    let _ = said.await;
    "stopped".to_owned()
}
