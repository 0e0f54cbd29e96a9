//! The daemon's side of the socket. Owns the listener and the connections; hands each request to
//! the driver's handler and never looks into answers. A handler runs to its end even if its client
//! has gone (see [`Handler`]); its connection's slot stays taken until then.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::types::{ApiError, CONNECTIONS, EVENTS, Event, LINE_BYTES, Line, Request};

/// How long a client may take to send its request or to take one line.
const CLIENT_DEADLINE: Duration = Duration::from_secs(10);

/// What answers requests: the driver.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request. Events may be sent before; use `try_send` for progress: a slow client
    /// must not slow the daemon. The client has gone when `events.is_closed()`: a handler that only
    /// watches should end then. The future is dropped when [`Request::deadline`] has passed.
    ///
    /// # Errors
    /// [`ApiError`] is shown to the person as it is.
    fn handle(
        &self,
        request: Request,
        events: mpsc::Sender<Event>,
    ) -> impl Future<Output = Result<Value, ApiError>> + Send;
}

impl<F, R> Handler for F
where
    F: Fn(Request, mpsc::Sender<Event>) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Value, ApiError>> + Send,
{
    fn handle(
        &self,
        request: Request,
        events: mpsc::Sender<Event>,
    ) -> impl Future<Output = Result<Value, ApiError>> + Send {
        self(request, events)
    }
}

/// Why the socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The path does not fit into a socket address.
    #[error(
        "the path of the local socket is too long ({0}): use a state directory with a shorter path"
    )]
    TooLong(PathBuf),
    /// The system said no.
    #[error("cannot make the local socket {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The listener of the local API: made first, so that an error is seen before anything starts.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Makes the socket at `path`: its directory becomes 0700, the socket 0600. A socket left by an
    /// earlier daemon is replaced; the caller holds the lock of the state directory.
    ///
    /// # Errors
    /// [`ServeError`]; an existing socket may be gone.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        /// `sun_path` less its closing zero.
        const SOCKET_PATH_BYTES: usize = 107;
        if path.as_os_str().len() > SOCKET_PATH_BYTES {
            return Err(ServeError::TooLong(path.to_owned()));
        }
        let bind = || {
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir)?;
                std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
            }
            match std::fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let socket = UnixListener::bind(path)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            Ok(socket)
        };
        let socket = bind().map_err(|source| ServeError::Io { path: path.to_owned(), source })?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Answers requests until the future is dropped.
    pub async fn run<H: Handler>(self, handler: Arc<H>) {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let stream = match self.socket.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors: wait for some to come back instead of spinning.
                    tracing::warn!(%error, "local socket: accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                tokio::spawn(refuse(stream));
                continue;
            };
            let handler = Arc::clone(&handler);
            tokio::spawn(async move {
                if let Err(error) = connection(stream, handler).await {
                    tracing::debug!(%error, "local client");
                }
                drop(slot);
            });
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // A client then says "not running" instead of "connection refused".
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Makes the socket at `path` and answers requests with `handler` until the future is dropped.
///
/// # Errors
/// [`ServeError`] if the socket cannot be made; it does not return otherwise.
pub async fn serve<H: Handler>(path: &Path, handler: H) -> Result<(), ServeError> {
    Listener::bind(path)?.run(Arc::new(handler)).await;
    Ok(())
}

async fn refuse(mut stream: UnixStream) {
    let error = ApiError::new("the daemon is busy", "too many requests at once: try again");
    let _ = write_line(&mut stream, &Line::Error(error)).await;
}

async fn connection<H: Handler>(stream: UnixStream, handler: Arc<H>) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    let (read, mut write) = stream.into_split();
    // The mode of the socket says the same; this holds even if someone changes that mode.
    let own = nix::unistd::geteuid().as_raw();
    if peer != 0 && peer != own {
        let error = ApiError::new("permission denied", "use the account that runs the daemon");
        return write_line(&mut write, &Line::Error(error)).await;
    }
    let (request, read) = match read_request(read).await {
        Ok(both) => both,
        Err(error) => return write_line(&mut write, &Line::Error(error)).await,
    };
    let (events, rx) = mpsc::channel(EVENTS);
    let deadline = request.deadline();
    let run = async move {
        match timeout(deadline, handler.handle(request, events)).await {
            Ok(Ok(result)) => Line::Result { result },
            Ok(Err(error)) => Line::Error(error),
            Err(_) => Line::Error(ApiError::new(
                format!("not done after {} s", deadline.as_secs()),
                "look at the daemon's log",
            )),
        }
    };
    answer(run, rx, read, write).await
}

/// Runs the handler to its end while events go to the client, as long as the client is there.
async fn answer(
    run: impl Future<Output = Line>,
    mut rx: mpsc::Receiver<Event>,
    mut read: OwnedReadHalf,
    mut write: OwnedWriteHalf,
) -> io::Result<()> {
    tokio::pin!(run);
    let mut here = true;
    let mut byte = [0_u8; 1];
    let last = loop {
        tokio::select! {
            biased;
            Some(event) = rx.recv() => {
                if here && write_line(&mut write, &Line::Event { event }).await.is_err() {
                    here = false;
                    rx.close();
                }
            }
            line = &mut run => break line,
            // Only the end of the stream is awaited; clients say nothing after their request.
            got = read.read(&mut byte), if here => {
                if !matches!(got, Ok(1)) {
                    here = false;
                    rx.close();
                }
            }
        }
    };
    while let Ok(event) = rx.try_recv() {
        if here {
            write_line(&mut write, &Line::Event { event }).await?;
        }
    }
    if here { write_line(&mut write, &last).await } else { Ok(()) }
}

async fn read_request(read: OwnedReadHalf) -> Result<(Request, OwnedReadHalf), ApiError> {
    let mut reader = BufReader::new(read.take_line_limit());
    let mut line = Vec::new();
    let got = timeout(CLIENT_DEADLINE, reader.read_until(b'\n', &mut line)).await;
    let hint = "this program and the daemon may be of different versions";
    match got {
        Err(_) => return Err(ApiError::plain("no request came")),
        Ok(Err(e)) => return Err(ApiError::plain(format!("cannot read the request: {e}"))),
        Ok(Ok(_)) if line.last() != Some(&b'\n') => {
            return Err(ApiError::new(
                format!("the request is no line of at most {LINE_BYTES} bytes"),
                hint,
            ));
        }
        Ok(Ok(_)) => {}
    }
    let request = serde_json::from_slice(&line)
        .map_err(|e| ApiError::new(format!("the request is not understood: {e}"), hint))?;
    Ok((request, reader.into_inner().into_inner()))
}

/// A reader that ends after the longest allowed line.
trait LineLimit: Sized {
    fn take_line_limit(self) -> tokio::io::Take<Self>;
}

impl LineLimit for OwnedReadHalf {
    fn take_line_limit(self) -> tokio::io::Take<Self> {
        self.take(LINE_BYTES as u64)
    }
}

async fn write_line<W: AsyncWrite + Unpin>(to: &mut W, line: &Line) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    if bytes.len() >= LINE_BYTES {
        let error = ApiError::new("the answer is too long", "ask for one item instead of all");
        bytes = serde_json::to_vec(&Line::Error(error))?;
    }
    bytes.push(b'\n');
    timeout(CLIENT_DEADLINE, to.write_all(&bytes)).await?
}
