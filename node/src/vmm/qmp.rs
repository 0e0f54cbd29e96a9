//! A thin QMP client over a unix socket.
//!
//! Owns one connection: a writer task, a reader task, the table of commands in flight. Never decides anything, never ends
//! over an event or a line it does not know, never waits without a deadline. Invariant: every command ends exactly once,
//! as its answer, as QEMU's error, as [`QmpError::Deadline`] or as [`QmpError::Disconnected`].

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::events::{EventTime, Events, Journal};

/// Longest line taken from QEMU, in bytes. The longest honest answers (`query-qmp-schema`) are below 1 MiB.
pub const MAX_LINE: usize = 16 << 20;
/// Time for an ordinary command.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// Commands in flight at most; QEMU itself answers one at a time.
const MAX_PENDING: usize = 128;
/// Lines that are not QMP, after which the peer is taken for something else than QEMU.
const MAX_GARBAGE: u32 = 64;

/// How a command failed.
#[derive(Debug, Clone, Error)]
pub enum QmpError {
    /// QEMU refused the command.
    #[error("QEMU refuses {command}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, such as `GenericError`.
        class: String,
        /// QEMU's description.
        desc: String,
    },
    /// No answer in time. The command may still have an effect.
    #[error("QEMU did not answer {command} within {after:?}")]
    Deadline {
        /// The command.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// The connection ended before the answer: QEMU has gone or is going.
    #[error("QEMU closed its QMP connection")]
    Disconnected,
    /// An answer that does not look as documented.
    #[error("QEMU's answer to {command} is not understood: {reason}")]
    BadAnswer {
        /// The command.
        command: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Too many commands in flight.
    #[error("QEMU has too many commands to answer")]
    Busy,
    /// No connection.
    #[error("Cannot connect to QEMU at {path}: {reason}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        reason: String,
    },
}

type Answer = Result<Value, (String, String)>;

#[derive(Debug)]
struct Shared {
    pending: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    journal: Arc<Journal>,
    closed: watch::Sender<bool>,
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.closed.send_replace(true);
        // Dropping the senders fails every command in flight with `Disconnected`.
        self.pending().clear();
    }
}

#[derive(Debug)]
struct Connection {
    shared: Arc<Shared>,
    lines: mpsc::Sender<Vec<u8>>,
    next_id: AtomicU64,
    greeting: Value,
    oob: bool,
    tasks: [AbortHandle; 2],
}

impl Drop for Connection {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.close();
    }
}

/// A connection to one QEMU. Clones share it; it closes when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Qmp(Arc<Connection>);

/// Removes a command from the table when its waiter gives up, for whatever reason.
struct Forget<'a>(&'a Shared, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.pending().remove(&self.1);
    }
}

impl Qmp {
    /// Connects to the socket at `path`, negotiates, and is ready for commands.
    ///
    /// # Errors
    /// [`QmpError::Connect`], or what went wrong in the negotiation, after at most `deadline`.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let connect_error =
            |reason: String| QmpError::Connect { path: path.display().to_string(), reason };
        let connected = timeout(deadline, UnixStream::connect(path)).await;
        let stream = connected
            .map_err(|_| connect_error("no answer in time".into()))?
            .map_err(|error| connect_error(error.to_string()))?;
        Self::over(stream, deadline).await
    }

    /// Negotiates over a connected stream.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub async fn over(stream: UnixStream, deadline: Duration) -> Result<Self, QmpError> {
        let (read, write) = stream.into_split();
        let mut reader = BufReader::with_capacity(64 << 10, read);
        let greeting = timeout(deadline, read_greeting(&mut reader)).await.map_err(|_| {
            QmpError::Deadline { command: "its greeting".into(), after: deadline }
        })??;
        let offered = greeting.pointer("/QMP/capabilities");
        let oob = offered
            .and_then(Value::as_array)
            .is_some_and(|list| list.iter().any(|item| item == "oob"));
        let shared = Arc::new(Shared {
            pending: Mutex::new(HashMap::new()),
            journal: Journal::new(),
            closed: watch::Sender::new(false),
        });
        let (lines, queue) = mpsc::channel(MAX_PENDING);
        let writer = tokio::spawn(write_lines(write, queue, shared.clone()));
        let reader = tokio::spawn(read_lines(reader, shared.clone()));
        let client = Self(Arc::new(Connection {
            shared,
            lines,
            next_id: AtomicU64::new(1),
            greeting,
            oob,
            tasks: [writer.abort_handle(), reader.abort_handle()],
        }));
        let enable: &[&str] = if oob { &["oob"] } else { &[] };
        let arguments = json!({ "enable": enable });
        client.execute("qmp_capabilities", arguments, deadline).await?;
        Ok(client)
    }

    /// QEMU's version from its greeting: major, minor, micro.
    #[must_use]
    pub fn version(&self) -> [u32; 3] {
        ["major", "minor", "micro"].map(|part| {
            let pointer = format!("/QMP/version/qemu/{part}");
            let number = self.0.greeting.pointer(&pointer).and_then(Value::as_u64);
            number.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
        })
    }

    /// The package name from QEMU's greeting, such as `Debian 1:10.0.2+ds-2`.
    #[must_use]
    pub fn package(&self) -> &str {
        let package = self.0.greeting.pointer("/QMP/version/package");
        package.and_then(Value::as_str).unwrap_or("")
    }

    /// Whether out-of-band commands were negotiated.
    #[must_use]
    pub fn has_oob(&self) -> bool {
        self.0.oob
    }

    /// Whether QEMU has closed the connection.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.0.shared.closed.borrow()
    }

    /// Completes when QEMU closes the connection.
    pub async fn closed(&self) {
        let mut closed = self.0.shared.closed.subscribe();
        // An error means that the sender has gone, which is the same end.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// All events from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events_after(self.0.shared.journal.position())
    }

    /// The events behind position `seq` that are still kept, and all later ones; 0 for all of this connection.
    #[must_use]
    pub fn events_after(&self, seq: u64) -> Events {
        let shared = &self.0.shared;
        Events::new(&shared.journal, shared.closed.subscribe(), seq)
    }

    /// Runs a command with arguments (`Null` for none) and returns QEMU's `return` value.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        self.send("execute", command, arguments, deadline).await
    }

    /// Runs a command out of band: answered even when QEMU's main loop hangs. Falls back to in band without the capability.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute_oob(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let verb = if self.0.oob { "exec-oob" } else { "execute" };
        self.send(verb, command, arguments, deadline).await
    }

    async fn send(
        &self,
        verb: &str,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let shared = &*self.0.shared;
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let mut request = json!({ verb: command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        let (answer_to, answer) = oneshot::channel();
        {
            let mut pending = shared.pending();
            if pending.len() >= MAX_PENDING {
                return Err(QmpError::Busy);
            }
            pending.insert(id, answer_to);
        }
        let _forget = Forget(shared, id);
        // After the insertion: a connection that closes in between clears the table, which drops our sender.
        if self.is_closed() {
            return Err(QmpError::Disconnected);
        }
        let exchange = async {
            self.0.lines.send(line).await.map_err(|_| ())?;
            answer.await.map_err(|_| ())
        };
        match timeout(deadline, exchange).await {
            Err(_) => Err(QmpError::Deadline { command: command.into(), after: deadline }),
            Ok(Err(())) => Err(QmpError::Disconnected),
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err((class, desc)))) => Err(QmpError::Refused {
                command: command.into(),
                class,
                desc: desc.replace('\n', " "),
            }),
        }
    }
}

async fn write_lines(
    mut socket: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Vec<u8>>,
    shared: Arc<Shared>,
) {
    let mut closed = shared.closed.subscribe();
    let write = async {
        while let Some(line) = queue.recv().await {
            if socket.write_all(&line).await.is_err() {
                break;
            }
        }
    };
    // The socket closes only when both halves are dropped: the end of the reader must end the writer too.
    tokio::select! {
        () = write => {}
        _ = closed.wait_for(|closed| *closed) => {}
    }
    shared.close();
}

async fn read_lines(mut socket: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    let mut line = Vec::new();
    let mut garbage = 0;
    loop {
        match read_line(&mut socket, &mut line, MAX_LINE).await {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => {
                tracing::warn!(%error, "QMP connection ends");
                break;
            }
        }
        match parse_line(&line) {
            Some(Message::Event(name, data, at)) => shared.journal.push(name, data, at),
            Some(Message::Answer(id, answer)) => {
                let waiter = shared.pending().remove(&id);
                // No waiter: it gave up at its deadline.
                if let Some(waiter) = waiter {
                    let _ = waiter.send(answer);
                }
            }
            None => {
                garbage += 1;
                tracing::warn!(bytes = line.len(), "a line from QEMU is not QMP, passed over");
                if garbage > MAX_GARBAGE {
                    break;
                }
            }
        }
        line.clear();
        line.shrink_to(64 << 10);
    }
    shared.close();
}

async fn read_greeting<R: AsyncBufRead + Unpin>(reader: &mut R) -> Result<Value, QmpError> {
    let mut line = Vec::new();
    match read_line(reader, &mut line, MAX_LINE).await {
        Ok(true) => {}
        Ok(false) | Err(_) => return Err(QmpError::Disconnected),
    }
    match serde_json::from_slice::<Value>(&line) {
        Ok(value) if value.get("QMP").is_some() => Ok(value),
        _ => Err(QmpError::BadAnswer {
            command: "a connection".into(),
            reason: "it does not greet as QMP".into(),
        }),
    }
}

/// Reads one line of at most `limit` bytes into the empty `line`, without its end; false at the end of the stream.
async fn read_line<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    line: &mut Vec<u8>,
    limit: usize,
) -> std::io::Result<bool> {
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return Ok(false);
        }
        let end = available.iter().position(|byte| *byte == b'\n');
        let part = &available[..end.unwrap_or(available.len())];
        if line.len() + part.len() > limit {
            let reason = format!("a line of more than {limit} bytes");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, reason));
        }
        line.extend_from_slice(part);
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            return Ok(true);
        }
    }
}

enum Message {
    Event(String, Value, EventTime),
    Answer(u64, Answer),
}

fn parse_line(line: &[u8]) -> Option<Message> {
    let Value::Object(mut object) = serde_json::from_slice(line).ok()? else {
        return None;
    };
    if let Some(Value::String(name)) = object.remove("event") {
        let time = object.get("timestamp");
        let part = |key: &str| time.and_then(|t| t.get(key)).and_then(Value::as_i64);
        let micros = match (part("seconds"), part("microseconds")) {
            (Some(seconds), Some(micros)) => seconds.checked_mul(1_000_000)?.checked_add(micros)?,
            _ => 0,
        };
        let data = object.remove("data").unwrap_or(Value::Null);
        return Some(Message::Event(name, data, EventTime { micros }));
    }
    let id = object.get("id").and_then(Value::as_u64)?;
    if let Some(value) = object.remove("return") {
        return Some(Message::Answer(id, Ok(value)));
    }
    let error = object.remove("error")?;
    let text = |key: &str| {
        let field = error.get(key).and_then(Value::as_str);
        field.unwrap_or("(none)").to_owned()
    };
    Some(Message::Answer(id, Err((text("class"), text("desc")))))
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
