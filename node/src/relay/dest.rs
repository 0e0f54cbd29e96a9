//! The destination end: from the network into the guest's memory and its waiting QEMU.
//!
//! Owns the session's start and its handle. Never starts the guest and never decides: it says
//! whether memory and device state are whole.

mod feed;
mod offer;
mod place;
mod session;
mod state;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::chunk::ChunkKey;
use godwit_protocol::chunk::layout::Layout;
use godwit_protocol::id::MigrationId;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::corpus::Corpus;
use super::frames::Stream;
use super::sink::PageSink;
use super::{RelayError, Seat};

pub use feed::feed_blob;

/// What has to be done between *everything is placed* and *the device state is loaded*.
pub type Settle =
    Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send>;

/// What a destination session needs.
pub struct DestParams {
    /// Its part of what this node's sessions may hold together.
    pub seat: Arc<Seat>,
    /// Where the destination's QEMU listens (`migrate-incoming unix:PATH`, capability
    /// `x-ignore-shared`, started with `-S`). Connected to when the first bytes are there.
    pub qemu_socket: PathBuf,
    /// The guest's memory and disks in one line ([`Layout`]), all zeros.
    pub sink: Arc<dyn PageSink>,
    /// What this host can produce.
    pub corpus: Arc<dyn Corpus>,
    /// The swarm's chunk key.
    pub key: ChunkKey,
    /// Where memory and disks lie in that line.
    pub layout: Layout,
    /// Done once everything is placed and before QEMU is given its device state: disks are made
    /// durable and handed over. None: there is nothing to do.
    pub settle: Option<Settle>,
    /// The migration; a stream of another one is refused.
    pub migration: MigrationId,
    /// How long the session lives without a stream from the source node.
    pub silence_deadline: Duration,
    /// How long QEMU may take to load once it has everything.
    pub load_deadline: Duration,
}

/// How far a destination session is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DestProgress {
    /// Pages whose zeros or content were placed, with repetitions.
    pub pages_placed: u64,
    /// Of these, copied from what this host had.
    pub pages_known: u64,
    /// Copies that turned out not to be what their index said (fetched instead).
    pub stale_copies: u64,
    /// Pages that read back otherwise than announced: the digests will differ.
    pub altered_pages: u64,
    /// Bytes of the stream received for QEMU.
    pub opaque_bytes: u64,
    /// All memory is placed and its digest equals the source's.
    pub digest_equal: bool,
}

/// How a destination session ended well: digests equal and device state loaded.
#[derive(Debug, Clone)]
pub struct DestEnd {
    /// The digest of memory that both ends have.
    pub ram_digest: [u8; 32],
    /// The stream that QEMU was given: with the memory it rebuilds a lost QEMU ([`feed_blob`]).
    pub blob: Bytes,
    /// The last progress.
    pub progress: DestProgress,
}

/// Starts destination sessions.
#[derive(Debug, Clone, Copy)]
pub struct DestinationSession;

/// A running destination session; dropping it ends it.
pub struct DestHandle {
    streams: mpsc::Sender<Stream>,
    progress: watch::Receiver<DestProgress>,
    finished: JoinHandle<Result<DestEnd, RelayError>>,
}

impl DestinationSession {
    /// Starts the session.
    ///
    /// # Errors
    /// [`RelayError::Local`] if threads cannot be started.
    pub fn spawn(params: DestParams) -> Result<DestHandle, RelayError> {
        let (streams_out, streams) = mpsc::channel(4);
        let (progress_out, progress) = watch::channel(DestProgress::default());
        let session = session::Session::start(params, progress_out)?;
        let finished = tokio::spawn(session.run(streams));
        Ok(DestHandle { streams: streams_out, progress, finished })
    }
}

impl DestHandle {
    /// Gives the session a new stream from the source node; it replaces the one before.
    ///
    /// # Errors
    /// [`RelayError::Aborted`] if the session has ended: see [`DestHandle::ended`].
    pub async fn attach(&self, stream: Stream) -> Result<(), RelayError> {
        self.streams.send(stream).await.map_err(|_| RelayError::Aborted)
    }

    /// Where the node's bulk listener puts streams of this migration; see [`DestHandle::attach`].
    #[must_use]
    pub fn streams(&self) -> mpsc::Sender<Stream> {
        self.streams.clone()
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<DestProgress> {
        self.progress.clone()
    }

    /// Waits for the end: QEMU has loaded and the digests are equal, or a cause. Can be waited for
    /// again after it was cancelled, not after it has answered.
    ///
    /// # Errors
    /// [`RelayError`].
    pub async fn ended(&mut self) -> Result<DestEnd, RelayError> {
        match (&mut self.finished).await {
            Ok(outcome) => outcome,
            Err(_) => Err(RelayError::Aborted),
        }
    }

    /// Gives up: drops the stream and QEMU's connection.
    pub fn abort(&self) {
        self.finished.abort();
    }
}

impl Drop for DestHandle {
    fn drop(&mut self) {
        self.finished.abort();
    }
}
