//! The client's side of the socket: the command line, the lab and tests. Owns one connection per
//! request.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::types::{ApiError, Event, LINE_BYTES, Line, Request};

/// The socket's name in the state directory.
pub const SOCKET: &str = "api.sock";
/// More than the daemon's own deadline: its answer says more than ours.
const SLACK: Duration = Duration::from_secs(15);

/// Asks the daemon whose state directory is `state` and calls `on_event` for what it says before
/// its answer. Dropping the future leaves what was asked for running in the daemon.
///
/// # Errors
/// What the daemon answered, or why it cannot be asked, with a next step.
pub async fn call(
    state: &Path,
    request: &Request,
    mut on_event: impl FnMut(Event),
) -> Result<Value, ApiError> {
    let stream = connect(state).await?;
    let talk = async {
        let (read, mut write) = stream.into_split();
        let mut line = serde_json::to_vec(request).map_err(ApiError::plain)?;
        line.push(b'\n');
        if line.len() > LINE_BYTES {
            return Err(ApiError::plain(format!("the request is over {LINE_BYTES} bytes")));
        }
        // A daemon that is busy answers and closes without reading: its answer says why.
        let written = write.write_all(&line).await;
        let mut reader = BufReader::new(read);
        loop {
            let mut line = Vec::new();
            let limit = LINE_BYTES as u64;
            (&mut reader).take(limit).read_until(b'\n', &mut line).await.map_err(broken)?;
            if line.last() != Some(&b'\n') {
                written.map_err(broken)?;
                return Err(broken(io::ErrorKind::UnexpectedEof.into()));
            }
            match serde_json::from_slice(&line) {
                Ok(Line::Event { event }) => on_event(event),
                Ok(Line::Result { result }) => return Ok(result),
                Ok(Line::Error(error)) => return Err(error),
                Err(e) => {
                    return Err(ApiError::new(
                        format!("the daemon's answer is not understood: {e}"),
                        "this program and the daemon may be of different versions",
                    ));
                }
            }
        }
    };
    timeout(request.deadline() + SLACK, talk).await.unwrap_or_else(|_| {
        Err(ApiError::new(
            "the daemon does not answer",
            "look at its log; is the machine overloaded?",
        ))
    })
}

/// [`call`] without events, with the answer in its type.
///
/// # Errors
/// As [`call`]; also if the answer has another form.
pub async fn ask<T: DeserializeOwned>(state: &Path, request: &Request) -> Result<T, ApiError> {
    read_answer(call(state, request, |_| {}).await?)
}

/// Reads an answer in its type.
///
/// # Errors
/// If it has another form.
pub fn read_answer<T: DeserializeOwned>(value: Value) -> Result<T, ApiError> {
    serde_json::from_value(value).map_err(|e| {
        ApiError::new(
            format!("the daemon's answer is not understood: {e}"),
            "this program and the daemon may be of different versions",
        )
    })
}

async fn connect(state: &Path) -> Result<UnixStream, ApiError> {
    let path = state.join(SOCKET);
    UnixStream::connect(&path).await.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ApiError::new(
            format!("no daemon is running for {}", state.display()),
            "start it with: godwit run (or name its directory with --state)",
        ),
        io::ErrorKind::PermissionDenied => ApiError::new(
            format!("no permission to talk to the daemon of {}", state.display()),
            "run this command as root",
        ),
        _ => ApiError::plain(format!("cannot talk to the daemon at {}: {e}", path.display())),
    })
}

fn broken(error: io::Error) -> ApiError {
    ApiError::new(
        format!("the connection to the daemon broke: {error}"),
        "the daemon may have been stopped: look at its log",
    )
}
