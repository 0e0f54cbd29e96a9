//! Commands to a guest, over the unix socket that is its second serial port.
//!
//! Owns one connection. Every request has a deadline and an id; after a failure the next request connects again, because
//! the socket of a VM that moved is another one. Never assumes that an answer belongs to its request without the id.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

use super::wire::{Envelope, MAX_LINE, Reply, Request, Stats, Verified};
use crate::lab::prober::ProbeReport;

/// How long a guest that runs may take to answer; verifying many pages under emulation is the longest.
const REPLY_DEADLINE: Duration = Duration::from_secs(60);
/// How often a guest that boots is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_millis(250);

/// The harness's end of a guest's control channel.
#[derive(Debug)]
pub struct GuestControl {
    path: PathBuf,
    connection: Option<BufReader<UnixStream>>,
    last_id: u32,
    deadline: Duration,
}

impl GuestControl {
    /// For the socket at `path` (`serial1` in `godwit vm show NAME --json`). Connects with the first request.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        GuestControl { path: path.into(), connection: None, last_id: 0, deadline: REPLY_DEADLINE }
    }

    /// Gives up on a request after `deadline` instead of 60 s.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the guest answers, at most `deadline`, from before its QEMU has made the socket.
    ///
    /// # Errors
    /// If the deadline passes.
    pub async fn wait_ready(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let until = (Instant::now() + PING_INTERVAL).min(end);
            let answer = self.request_until(&Request::Ping, until).await;
            match answer {
                Ok(_) => return Ok(()),
                Err(cause) if Instant::now() >= end => {
                    let path = self.path.display();
                    return Err(cause.context(format!("Guest at {path} did not become ready")));
                }
                Err(_) => sleep(until.saturating_duration_since(Instant::now())).await,
            }
        }
    }

    /// Asks whether the guest is there.
    ///
    /// # Errors
    /// If it does not answer in time.
    pub async fn ping(&mut self) -> Result<()> {
        self.request(&Request::Ping).await.map(drop)
    }

    /// Fills `mb` MiB with pages and then rewrites pages of it at `rate_kbps` thousands of bytes a second (0: only fills).
    /// With `hot_quarter` only the first quarter is rewritten.
    ///
    /// # Errors
    /// If the guest refuses (not enough memory) or does not answer in time.
    pub async fn churn(&mut self, mb: u32, rate_kbps: u32, hot_quarter: bool) -> Result<()> {
        let request = Request::Churn { mb, rate_kbps, hot_quarter };
        self.request(&request).await.map(drop)
    }

    /// Stops rewriting.
    ///
    /// # Errors
    /// If the guest does not answer in time.
    pub async fn stop(&mut self) -> Result<()> {
        self.request(&Request::Stop).await.map(drop)
    }

    /// Has the guest check every page that it ever wrote.
    ///
    /// # Errors
    /// If the guest does not answer in time. Corrupt pages are not an error here: they are in the result.
    pub async fn verify(&mut self) -> Result<Verified> {
        let reply = self.request(&Request::Verify).await?;
        reply.verified.context("Guest answered without a result")
    }

    /// Fills the first `mb` MiB of a file or device of the guest and then rewrites pages there at `rate_kbps` thousands of
    /// bytes a second (0: only fills, or stops).
    ///
    /// # Errors
    /// If the guest refuses, its disk fails, or it does not answer in time.
    pub async fn disk(&mut self, path: &str, mb: u32, rate_kbps: u32) -> Result<()> {
        let request = Request::Disk { path: path.to_owned(), mb, rate_kbps };
        self.request(&request).await.map(drop)
    }

    /// Has the guest check every page that it ever wrote by [`GuestControl::disk`], as its disks have them.
    ///
    /// # Errors
    /// As [`GuestControl::verify`], and if a disk failed the guest.
    pub async fn verify_disks(&mut self) -> Result<Verified> {
        let reply = self.request(&Request::VerifyDisks).await?;
        reply.verified.context("Guest answered without a result")
    }

    /// Runs a line of shell in the guest; its output (of a long one the end).
    ///
    /// # Errors
    /// If it fails, or does not end in time.
    pub async fn shell(&mut self, line: &str) -> Result<String> {
        let reply = self.request(&Request::Shell { line: line.to_owned() }).await?;
        Ok(reply.output.unwrap_or_default())
    }

    /// Has the guest send numbered datagrams to another one's echo, until [`GuestControl::hush`].
    ///
    /// # Errors
    /// If the guest talks already, or does not answer in time.
    pub async fn talk(&mut self, to: Ipv4Addr, rate_pps: u32) -> Result<()> {
        self.request(&Request::Talk { to, rate_pps }).await.map(drop)
    }

    /// Ends that: what came back.
    ///
    /// # Errors
    /// If the guest does not talk, or does not answer in time.
    pub async fn hush(&mut self) -> Result<ProbeReport> {
        let reply = self.request(&Request::Hush).await?;
        reply.talked.context("Guest answered without a result")
    }

    /// The guest's counters; `reset` starts its longest gaps again from zero afterwards.
    ///
    /// # Errors
    /// If the guest does not answer in time.
    pub async fn stats(&mut self, reset: bool) -> Result<Stats> {
        let reply = self.request(&Request::Stats { reset }).await?;
        reply.stats.context("Guest answered without counters")
    }

    async fn request(&mut self, request: &Request) -> Result<Reply> {
        let until = Instant::now() + self.deadline;
        self.request_until(request, until)
            .await
            .with_context(|| format!("Guest at {}", self.path.display()))
    }

    async fn request_until(&mut self, request: &Request, until: Instant) -> Result<Reply> {
        let answer = timeout_at(until, self.exchange(request)).await;
        let answer = answer.unwrap_or_else(|_| Err(anyhow::anyhow!("No answer in time")));
        if answer.is_err() {
            self.connection = None;
        }
        let reply = answer?;
        ensure!(reply.ok, "Refused: {}", reply.error.as_deref().unwrap_or("no cause"));
        Ok(reply)
    }

    async fn exchange(&mut self, request: &Request) -> Result<Reply> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let mut stream = UnixStream::connect(&self.path).await?;
                // Ends a line that an earlier connection may have left unfinished.
                stream.write_all(b"\n").await?;
                none.insert(BufReader::new(stream))
            }
        };
        self.last_id = self.last_id.wrapping_add(1).max(1);
        let envelope = Envelope { id: self.last_id, request: request.clone() };
        let mut line = serde_json::to_vec(&envelope)?;
        line.push(b'\n');
        connection.write_all(&line).await?;
        loop {
            let mut line = Vec::new();
            let limit = MAX_LINE as u64 + 1;
            let length = connection.take(limit).read_until(b'\n', &mut line).await?;
            if length == 0 {
                bail!("Its serial port was closed");
            }
            ensure!(length <= MAX_LINE, "A line of more than {MAX_LINE} bytes");
            // What is not a reply to this request is left from an earlier one, or from the guest's boot.
            match serde_json::from_slice::<Reply>(line.trim_ascii()) {
                Ok(reply) if reply.id == self.last_id => return Ok(reply),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn answers_to_earlier_requests_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut lines = BufReader::new(stream).lines();
            assert_eq!(lines.next_line().await.unwrap().unwrap(), "");
            let line = lines.next_line().await.unwrap().unwrap();
            let envelope: Envelope = serde_json::from_str(&line).unwrap();
            let answers = format!(
                "half a li\n{{\"id\":99,\"ok\":true}}\n{{\"id\":{},\"ok\":false,\"error\":\"too big\"}}\n",
                envelope.id
            );
            let stream = lines.get_mut().get_mut();
            stream.write_all(answers.as_bytes()).await.unwrap();
        });
        let mut control = GuestControl::new(&path);
        let error = control.churn(1 << 30, 0, false).await.unwrap_err();
        assert!(format!("{error:#}").contains("too big"), "{error:#}");
        guest.await.unwrap();
    }

    #[tokio::test]
    async fn a_silent_guest_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut control = GuestControl::new(&path).with_deadline(Duration::from_millis(50));
        assert!(control.ping().await.is_err());
        assert!(control.wait_ready(Duration::from_millis(50)).await.is_err());
        assert!(GuestControl::new("/nowhere").ping().await.is_err());
    }
}
