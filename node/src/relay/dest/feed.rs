//! Gives the destination's QEMU its stream and listens to its return path.
//!
//! Owns the connection to QEMU. Never forwards what QEMU says: the driver decides what the source
//! hears. Invariant: never a byte beyond what was allowed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

use crate::relay::RelayError;
use crate::relay::pool::lock;

const SLICE: usize = 256 << 10;
const SHUT: u16 = 1;
/// Longest message of a return path, bytes.
const MESSAGE_BYTES: u16 = 512;

/// The stream received so far.
pub(super) type Blob = Arc<Mutex<Vec<u8>>>;

/// Feeds `blob` up to the allowed length until QEMU says SHUT; answers its code.
pub(super) async fn feed(
    path: PathBuf,
    blob: Blob,
    mut allowed: watch::Receiver<usize>,
) -> Result<u32, RelayError> {
    allowed.wait_for(|&len| len > 0).await.map_err(|_| RelayError::Aborted)?;
    let (read, mut write) = connect(&path).await?;
    let feeding = async {
        let mut fed = 0;
        loop {
            let len = *allowed.borrow_and_update();
            while fed < len {
                let slice = lock(&blob)[fed..len.min(fed + SLICE)].to_vec();
                write.write_all(&slice).await.map_err(gone)?;
                fed += slice.len();
            }
            if allowed.changed().await.is_err() {
                // The session is gone, or everything was allowed: keep the connection.
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        outcome = feeding => outcome,
        code = listen(read) => code,
    }
}

/// Rebuilds a lost QEMU: feeds the whole stream of an earlier [`super::DestEnd`] to one that waits
/// at `path` on the same memory.
///
/// # Errors
/// [`RelayError::DestQemu`] if it cannot be reached or is silent until `deadline` is over,
/// [`RelayError::LoadFailed`] if it refuses the stream.
pub async fn feed_blob(path: &Path, blob: &[u8], deadline: Duration) -> Result<(), RelayError> {
    let load = async {
        let (read, mut write) = connect(path).await?;
        let feeding = async {
            write.write_all(blob).await.map_err(gone)?;
            std::future::pending().await
        };
        tokio::select! {
            outcome = feeding => outcome,
            code = listen(read) => code,
        }
    };
    match tokio::time::timeout(deadline, load).await {
        Ok(Ok(0)) => Ok(()),
        Ok(Ok(code)) => Err(RelayError::LoadFailed(code)),
        Ok(Err(cause)) => Err(cause),
        Err(_) => Err(RelayError::DestQemu("did not load in time".to_owned())),
    }
}

async fn connect(path: &Path) -> Result<(OwnedReadHalf, OwnedWriteHalf), RelayError> {
    let socket = UnixStream::connect(path)
        .await
        .map_err(|e| RelayError::DestQemu(format!("does not listen on {}: {e}", path.display())))?;
    Ok(socket.into_split())
}

fn gone(cause: io::Error) -> RelayError {
    RelayError::DestQemu(format!("went away while it loaded: {cause} (see its log)"))
}

/// Reads the return path until SHUT; everything else (PONG) needs no answer.
async fn listen(mut read: OwnedReadHalf) -> Result<u32, RelayError> {
    let mut data = [0; MESSAGE_BYTES as usize];
    loop {
        let kind = read.read_u16().await.map_err(gone)?;
        let len = read.read_u16().await.map_err(gone)?;
        if len > MESSAGE_BYTES {
            return Err(RelayError::DestQemu("said something that is no message".to_owned()));
        }
        let data = &mut data[..usize::from(len)];
        read.read_exact(data).await.map_err(gone)?;
        if let (SHUT, &[a, b, c, d]) = (kind, &*data) {
            return Ok(u32::from_be_bytes([a, b, c, d]));
        }
    }
}
