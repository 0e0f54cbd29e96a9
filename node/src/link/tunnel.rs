//! A wire's tunnel port: frames that leave for hosts beyond the trusted LAN, and frames that come from them.
//!
//! Owns the tap's fd and its reader task; never decides where a frame goes (the driver looks up the
//! route) and never encrypts (the transport does). Invariant: a frame is read only when the queue to the
//! driver has room, so the bounded buffer is the kernel's (`txqueuelen`), and the kernel counts what overflows.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use godwit_protocol::id::{Mac, Name};
use godwit_protocol::limits::TUNNEL_PORT_FRAMES;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::AbortHandle;

/// Ethernet header, bytes.
pub(super) const HEADER: usize = 14;
/// One 802.1Q tag, bytes: a guest may use tags inside its wire.
pub(super) const TAG: usize = 4;
/// Bytes taken from the allocator at a time; frames are slices of it.
pub(super) const BLOCK: usize = 64 << 10;
/// Frames read before the task yields to others.
const BATCH: usize = 64;

/// What the driver gets from the tunnel ports, in order.
#[derive(Debug)]
pub enum Outgoing {
    /// A frame that leaves.
    Frame(TunnelFrame),
    /// All that was in the port when this was asked for ([`super::Links::fence`]) came before: say so.
    Fence(oneshot::Sender<()>),
}

/// A frame from a local guest that has to leave this host through a tunnel.
#[derive(Debug, Clone)]
pub struct TunnelFrame {
    /// The wire it is on.
    pub wire: Name,
    /// The whole Ethernet frame, 14 bytes or more, no longer than the wire's MTU allows.
    pub frame: Bytes,
}

impl TunnelFrame {
    /// Where the frame wants to go.
    #[must_use]
    pub fn destination(&self) -> Mac {
        let mut mac = [0; 6];
        mac.copy_from_slice(&self.frame[..6]);
        Mac(mac)
    }

    /// Whether it goes to every host of the wire (broadcast or multicast).
    #[must_use]
    pub fn is_group(&self) -> bool {
        self.frame[0] & 1 == 1
    }
}

/// What became of a frame given to [`super::Links::inject`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    /// On the bridge.
    Yes,
    /// This host does not have the wire (any more).
    NoWire,
    /// Shorter than an Ethernet header or longer than the wire's MTU: dropped, counted.
    BadLength,
    /// The kernel refused it: dropped, counted.
    Refused,
}

/// Counts of one tunnel port since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TunnelCounters {
    /// Frames handed to the driver.
    pub out_frames: u64,
    /// Bytes handed to the driver.
    pub out_bytes: u64,
    /// Frames put onto the bridge.
    pub in_frames: u64,
    /// Bytes put onto the bridge.
    pub in_bytes: u64,
    /// Frames of impossible length, either way: dropped.
    pub bad_length: u64,
    /// Frames the kernel did not take: dropped.
    pub refused: u64,
}

#[derive(Default)]
struct Counts {
    out_frames: AtomicU64,
    out_bytes: AtomicU64,
    in_frames: AtomicU64,
    in_bytes: AtomicU64,
    bad_length: AtomicU64,
    refused: AtomicU64,
}

fn bump(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

struct Port {
    fd: AsyncFd<OwnedFd>,
    longest: usize,
    counts: Counts,
    /// Asked for and not seen by the reader yet.
    fences: Mutex<Vec<oneshot::Sender<()>>>,
    asked: Notify,
}

/// The open tunnel port of one wire. Dropping it ends the reader, and the device goes with its fd.
pub(super) struct Tunnel {
    pub(super) index: u32,
    port: Arc<Port>,
    reader: AbortHandle,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Tunnel {
    /// Starts reading `fd`, the tap with the kernel's `index`.
    pub(super) fn start(
        wire: Name,
        index: u32,
        fd: OwnedFd,
        mtu: u16,
        queue: mpsc::Sender<Outgoing>,
    ) -> io::Result<Self> {
        // SAFETY: the fd is owned by the AsyncFd, which is never taken apart: it stays open and the same.
        let fd = unsafe { AsyncFd::register(fd) }?;
        let port = Arc::new(Port {
            fd,
            longest: usize::from(mtu) + HEADER + TAG,
            counts: Counts::default(),
            fences: Mutex::default(),
            asked: Notify::new(),
        });
        let reader = tokio::spawn(read_frames(wire, port.clone(), queue)).abort_handle();
        Ok(Self { index, port, reader })
    }

    /// Puts a frame from another host onto the bridge.
    pub(super) fn inject(&self, frame: &[u8]) -> Injected {
        let counts = &self.port.counts;
        if frame.len() < HEADER || frame.len() > self.port.longest {
            bump(&counts.bad_length, 1);
            return Injected::BadLength;
        }
        match nix::unistd::write(self.port.fd.get_ref(), frame) {
            Ok(_) => {
                bump(&counts.in_frames, 1);
                bump(&counts.in_bytes, frame.len());
                Injected::Yes
            }
            Err(_) => {
                bump(&counts.refused, 1);
                Injected::Refused
            }
        }
    }

    /// Puts a fence behind what is in the port now.
    pub(super) fn fence(&self, tell: oneshot::Sender<()>) {
        self.port.fences.lock().unwrap_or_else(PoisonError::into_inner).push(tell);
        self.port.asked.notify_one();
    }

    /// Whether its reader still runs.
    pub(super) fn is_open(&self) -> bool {
        !self.reader.is_finished()
    }

    pub(super) fn counters(&self) -> TunnelCounters {
        let c = &self.port.counts;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TunnelCounters {
            out_frames: get(&c.out_frames),
            out_bytes: get(&c.out_bytes),
            in_frames: get(&c.in_frames),
            in_bytes: get(&c.in_bytes),
            bad_length: get(&c.bad_length),
            refused: get(&c.refused),
        }
    }
}

/// Fences that the reader has seen, and how many frames may still be in front of them.
#[derive(Default)]
struct Fences {
    seen: Vec<oneshot::Sender<()>>,
    ahead: u32,
}

impl Fences {
    /// Takes up what was asked for. What the port holds now is at most its queue.
    fn look(&mut self, port: &Port) {
        let mut asked = port.fences.lock().unwrap_or_else(PoisonError::into_inner);
        if !asked.is_empty() {
            self.seen.append(&mut asked);
            self.ahead = TUNNEL_PORT_FRAMES;
        }
    }

    /// Hands them on if everything that was in front of them has been read.
    async fn pass(&mut self, empty: bool, queue: &mpsc::Sender<Outgoing>) {
        if empty || self.ahead == 0 {
            for tell in self.seen.drain(..) {
                // The driver is gone: nobody waits.
                let _ = queue.send(Outgoing::Fence(tell)).await;
            }
        }
    }
}

/// Ends when the driver drops its end of the queue, or the device is removed under it.
async fn read_frames(wire: Name, port: Arc<Port>, queue: mpsc::Sender<Outgoing>) {
    let mut block = BytesMut::new();
    let mut fences = Fences::default();
    loop {
        let mut ready = tokio::select! {
            ready = port.fd.readable() => match ready {
                Ok(ready) => Some(ready),
                Err(_) => return,
            },
            () = port.asked.notified() => None,
        };
        fences.look(&port);
        let mut empty = false;
        for _ in 0..BATCH {
            let Ok(slot) = queue.reserve().await else { return };
            // One byte more than the longest frame: a longer one shows, instead of arriving cut.
            let room = port.longest + 1;
            if block.capacity() < room {
                block = BytesMut::with_capacity(BLOCK.max(room));
            }
            block.resize(room, 0);
            match nix::unistd::read(port.fd.get_ref(), &mut block) {
                Ok(length) if length < HEADER || length > port.longest => {
                    bump(&port.counts.bad_length, 1);
                }
                Ok(length) => {
                    let frame = block.split_to(length).freeze();
                    bump(&port.counts.out_frames, 1);
                    bump(&port.counts.out_bytes, length);
                    fences.ahead = fences.ahead.saturating_sub(1);
                    slot.send(Outgoing::Frame(TunnelFrame { wire: wire.clone(), frame }));
                }
                Err(nix::errno::Errno::EAGAIN) => {
                    ready.iter_mut().for_each(AsyncFdReadyGuard::clear_ready);
                    empty = true;
                    break;
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::warn!(%wire, %error, "tunnel port ended; its wire is set up again on the next call");
                    return;
                }
            }
        }
        fences.pass(empty, &queue).await;
        if !empty && !fences.seen.is_empty() {
            port.asked.notify_one();
        }
        tokio::task::yield_now().await;
    }
}
