//! The stream that carries a NIC's tail, at both ends.
//!
//! Owns what is said on it and how long that may take. Never opens one. Invariant: whenever it ends, the
//! machines at its ends know enough to go on by the next.

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::cutover::Departure;
use godwit_protocol::wire::tail::{self, Item};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::super::hold;
use super::lock;

/// How long a frame may take into the stream before the stream counts as lost.
const WRITE: Duration = Duration::from_secs(30);

/// The old host's end, until the new host has all. `news`: there may be something to send.
pub(super) async fn send(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    machine: &Mutex<Departure<Bytes>>,
    news: &Notify,
) -> io::Result<()> {
    let came = timeout(WRITE, stream.read_u64()).await??;
    if !lock(machine).resumed(came) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let (numbers, items) = tokio::io::split(stream);
    // At once: neither end waits for the other to read before it reads itself.
    tokio::select! {
        end = read_numbers(numbers, machine) => end,
        end = write_items(BufWriter::new(items), machine, news) => end,
    }
}

async fn read_numbers(
    mut numbers: impl AsyncRead + Unpin,
    machine: &Mutex<Departure<Bytes>>,
) -> io::Result<()> {
    while !lock(machine).is_over() {
        let came = numbers.read_u64().await?;
        lock(machine).acknowledged(came);
    }
    Ok(())
}

async fn write_items(
    mut stream: impl AsyncWrite + Unpin,
    machine: &Mutex<Departure<Bytes>>,
    news: &Notify,
) -> io::Result<()> {
    loop {
        let item = lock(machine).next_item();
        if matches!(item, Some(Item::Frame(_))) {
            hold::at("tail").await;
        }
        let work = async {
            let Some(item) = &item else { return stream.flush().await };
            let (head, bytes) = item.parts().ok_or(io::ErrorKind::InvalidData)?;
            stream.write_all(&head).await?;
            stream.write_all(bytes).await
        };
        timeout(WRITE, work).await??;
        if item.is_none() {
            news.notified().await;
        }
    }
}

/// The new host's end, which has `came` items, until it has all.
pub(super) async fn receive(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    mut came: u64,
    mut take: impl FnMut(u64, Item<Bytes>),
) -> io::Result<()> {
    let mut stream = BufReader::with_capacity(64 << 10, stream);
    stream.write_u64(came).await?;
    stream.flush().await?;
    let mut said = came;
    loop {
        let item = read_item(&mut stream).await?;
        let end = item == Item::End;
        take(came, item);
        came += 1;
        if end || stream.buffer().is_empty() || came - said >= tail::UNACKNOWLEDGED {
            stream.write_u64(came).await?;
            stream.flush().await?;
            said = came;
        }
        if end {
            // The old host may have gone already: it has heard it.
            let _ = stream.shutdown().await;
            return Ok(());
        }
    }
}

async fn read_item(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Item<Bytes>> {
    let mut head = [0; tail::HEAD_BYTES];
    stream.read_exact(&mut head).await?;
    let length = tail::length(head).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    tail::item(head, Bytes::from(bytes)).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use godwit_protocol::cutover::{Arrival, Output};
    use godwit_protocol::time::Time;

    use super::*;

    const FRAMES: u16 = 2000;

    /// A stream; it breaks when the new host has that many items.
    async fn stream(old: &Mutex<Departure<Bytes>>, new: &Mutex<Arrival<Bytes>>, until: u64) {
        let (here, there) = tokio::io::duplex(4 << 10);
        let (news, enough) = (Notify::new(), Notify::new());
        let came = lock(new).tail_opened();
        let take = |number, item| {
            lock(new).tail(Time(0), number, item);
            if number + 1 >= until {
                enough.notify_one();
            }
        };
        tokio::select! {
            biased;
            () = enough.notified() => lock(new).tail_broken(Time(0)),
            ends = async { tokio::join!(send(here, old, &news), receive(there, came, take)) } => {
                assert!(matches!(ends, (Ok(()), Ok(()))), "{ends:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_stream_that_breaks_loses_nothing_and_brings_nothing_twice() {
        let old = Mutex::new(Departure::new(1 << 20));
        let new = Mutex::new(Arrival::new(1 << 20));
        let frames: Vec<Bytes> =
            (0..FRAMES).map(|n| Bytes::copy_from_slice(&n.to_be_bytes().repeat(50))).collect();
        lock(&old).stopped(frames[..100].to_vec(), 0);
        frames[100..1000].iter().cloned().for_each(|frame| lock(&old).frame(frame));
        for until in [1, 300, 700] {
            stream(&old, &new, until).await;
        }
        lock(&new).runs(Time(0), []);
        lock(&old).moved(Time(0), []);
        frames[1000..].iter().cloned().for_each(|frame| lock(&old).frame(frame));
        stream(&old, &new, 1500).await;
        assert!(lock(&old).close_due(Time(0)));
        lock(&old).close();
        stream(&old, &new, u64::MAX).await;
        assert!(lock(&old).is_over() && lock(&new).is_over());
        let outputs: Vec<_> = std::iter::from_fn(|| lock(&new).poll_output(true)).collect();
        let injected = |output| if let Output::Inject(frame) = output { Some(frame) } else { None };
        assert_eq!(outputs.into_iter().filter_map(injected).collect::<Vec<_>>(), frames);
        assert_eq!((lock(&old).counts().dropped, lock(&new).counts().dropped), (0, 0));
    }
}
