//! A plug on a NIC's tap: what comes through the kernel waits in order, what is older goes past it.
//!
//! Owns the queueing discipline of taps and the packet sockets that reach them. Never decides when.
//! Invariant: taking a plug off keeps what waited, also if it is more than the tap has room for; only the kernel's bound
//! (32 MiB) drops, counted there.
//!
//! A token bucket that is empty and fills by a byte a second is a plug that every kernel has. It lets
//! the first burst pass, which a frame that no guest takes uses up.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use godwit_protocol::id::{Mac, Name};
use godwit_protocol::limits::{CUTOVER_BYTES, TAP_QUEUE_FRAMES};
use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_ECHO, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption, TcStats2};
use tokio::time::{Instant, sleep};

use super::kernel::Kernel;
use super::settle::{LOOK, TapView};
use super::{LinkError, Links, names};

/// Bytes per second of a plug, and of a tap without one.
const SHUT: u64 = 1;
const OPEN: u64 = 12_500_000_000;
/// What an open tap passes at once, bytes.
const OPEN_BURST: u32 = 64 << 20;
/// To nobody, from nobody, of a type that is for experiments: QEMU drops it.
const FILLER: [u8; 14] = [2, 0, 0, 0, 0, 0xfe, 2, 0, 0, 0, 0, 0xff, 0x88, 0xb6];
/// Shortest frame of Ethernet, bytes.
const SHORTEST: usize = 60;

/// Frames that a tap takes after its guest has emptied it: half of its queue, as others may send too.
const ROOM: u32 = TAP_QUEUE_FRAMES / 2;
/// Frames that are put into a tap which others keep full.
const SHARE: u32 = 16;

/// What an [`Injector`] puts into a tap bears this: it is not to be led aside.
pub(super) const MARK: u32 = 0x6777_6974;

/// Bytes that a tap is given at once of what waits behind its plug: its queue has room for so many of the shortest frames,
/// and for what an [`Injector`] puts into it meanwhile.
const PART: u32 = 300_000;
/// Frames that may be given to it with all that comes after them.
const LAST: u32 = TAP_QUEUE_FRAMES / 4;
/// How long a guest is waited for that does not empty its tap, and how long one that does.
const PATIENCE: Duration = Duration::from_secs(3);
const LONGEST: Duration = Duration::from_secs(30);

/// Puts frames into a tap as if they came from its bridge, past a plug, as fast as its guest takes them.
pub struct Injector {
    socket: OwnedFd,
    tap: TapView,
    /// How many frames fit for certain.
    room: u32,
}

impl Injector {
    /// Whether one more frame fits. Never waits: ask again after [`Injector::LOOK`].
    pub fn has_room(&mut self) -> bool {
        if self.room == 0 && self.tap.is_empty() {
            self.room = ROOM;
        }
        self.room > 0
    }

    /// How often it is worth to ask whether there is room.
    pub const LOOK: Duration = LOOK;

    /// Lets a few frames in beside those of others, who may never leave the tap empty.
    pub fn press(&mut self) {
        self.room = self.room.max(SHARE);
    }

    /// Gives the guest a frame; false if the kernel refused it: the frame is lost. Never waits; without
    /// room it may be in vain.
    pub fn send(&mut self, frame: &[u8]) -> bool {
        self.room = self.room.saturating_sub(1);
        send(&self.socket, frame)
    }

    /// Gives the guest all of these frames, waiting for room until the deadline. Returns how many are lost.
    pub async fn send_all<F: AsRef<[u8]>>(&mut self, frames: &[F], deadline: Instant) -> usize {
        let mut lost = 0;
        for frame in frames {
            while !self.has_room() && Instant::now() < deadline {
                sleep(LOOK).await;
            }
            lost += usize::from(!self.send(frame.as_ref()));
        }
        lost
    }
}

fn send(socket: &OwnedFd, frame: &[u8]) -> bool {
    let (bytes, length) = (frame.as_ptr().cast(), frame.len());
    // SAFETY: the pointer and length are of one living slice; the fd is open.
    unsafe { libc::send(socket.as_raw_fd(), bytes, length, libc::MSG_DONTWAIT) >= 0 }
}

impl Links {
    /// Plugs the NIC's tap: frames from its bridge wait. Until then none may come. Returns how many were dropped behind
    /// earlier plugs.
    ///
    /// # Errors
    /// [`LinkError::NoTap`], or the kernel's.
    pub async fn plug(&self, wire: &Name, mac: &Mac) -> Result<u64, LinkError> {
        let index = self.tap_index(wire, mac).await?;
        // Not longer than what the filler uses up, not shorter than the longest frame.
        let burst = u32::from(self.config.mtu) + 18;
        let what = "plug a tap";
        self.kernel.token_bucket(what, index, SHUT, burst, NLM_F_CREATE | NLM_F_REPLACE).await?;
        let longest = usize::from(self.config.mtu) + FILLER.len();
        // Not sent, it would leave room for the first frames.
        spend(index, longest).map_err(|e| LinkError::kernel(what, e))?;
        Ok(self.kernel.queue(index).await?.1.into())
    }

    /// Takes the plug off: what waited goes first, in its order, as fast as the guest (`tap`) reads; without one, at once.
    /// Without a plug, nothing changes. Returns how many frames have been dropped since the tap was first plugged, as more
    /// came than may wait.
    ///
    /// # Errors
    /// [`LinkError::NoTap`], or the kernel's.
    pub async fn unplug(
        &self,
        wire: &Name,
        mac: &Mac,
        tap: Option<TapView>,
    ) -> Result<u64, LinkError> {
        let index = self.tap_index(wire, mac).await?;
        let last = Instant::now() + LONGEST;
        let mut end = Instant::now() + PATIENCE;
        let mut in_vain = 0;
        while let Some(tap) = tap.as_ref().filter(|_| Instant::now() < end.min(last))
            && self.kernel.queue(index).await?.0 > LAST
        {
            if tap.is_empty() {
                let Some(filler) = self.let_pass(index, SHUT, PART).await? else { return Ok(0) };
                in_vain += filler;
                end = Instant::now() + PATIENCE;
            }
            sleep(LOOK).await;
        }
        let Some(filler) = self.let_pass(index, OPEN, OPEN_BURST).await? else { return Ok(0) };
        let dropped = self.kernel.queue(index).await?.1;
        Ok(u64::from(dropped).saturating_sub(in_vain + filler))
    }

    /// Lets so many bytes pass. `None`: there is no plug. Else how many frames of ours were dropped for it.
    async fn let_pass(&self, index: u32, rate: u64, bytes: u32) -> Result<Option<u64>, LinkError> {
        let what = "unplug a tap";
        match self.kernel.token_bucket(what, index, rate, bytes, 0).await {
            Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::EINVAL)) => return Ok(None),
            other => other?,
        }
        // A queue is looked at when a frame comes, also when it is full.
        match spend(index, SHORTEST) {
            Ok(()) => Ok(Some(0)),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(Some(1)),
            Err(e) => Err(LinkError::kernel(what, e)),
        }
    }

    /// The way past a plug into the NIC's tap, as it is now; `tap` is the same.
    ///
    /// # Errors
    /// [`LinkError::NoTap`], or the kernel's.
    pub async fn injector(
        &self,
        wire: &Name,
        mac: &Mac,
        tap: TapView,
    ) -> Result<Injector, LinkError> {
        let index = self.tap_index(wire, mac).await?;
        let socket =
            socket(index, true).map_err(|e| LinkError::kernel("open a packet socket", e))?;
        Ok(Injector { socket, tap, room: 0 })
    }

    async fn tap_index(&self, wire: &Name, mac: &Mac) -> Result<u32, LinkError> {
        let name = names::tap(wire, mac);
        let device = self.kernel.device(&name).await?;
        Ok(device.ok_or(LinkError::NoTap(name))?.index)
    }
}

/// Sends a frame that no guest takes into a tap's queue.
fn spend(index: u32, length: usize) -> io::Result<()> {
    let mut frame = FILLER.to_vec();
    frame.resize(length, 0);
    if send(&socket(index, false)?, &frame) { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A packet socket that sends on a device and receives nothing.
fn socket(index: u32, past: bool) -> io::Result<OwnedFd> {
    let check = |rc: libc::c_int| if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) };
    // SAFETY: plain system calls; every pointer is to a living value of the size that is passed.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let fd = check(libc::socket(libc::AF_PACKET, kind, 0))?;
        let socket = OwnedFd::from_raw_fd(fd);
        let yes = libc::c_int::from(past);
        let size = size_of_val(&yes) as libc::socklen_t;
        let option = (&raw const yes).cast();
        check(libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, option, size))?;
        let (mark, size) = (MARK, size_of::<u32>() as libc::socklen_t);
        let option = (&raw const mark).cast();
        check(libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_MARK, option, size))?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index as libc::c_int;
        let size = size_of_val(&address) as libc::socklen_t;
        check(libc::bind(fd, (&raw const address).cast(), size))?;
        Ok(socket)
    }
}

impl Kernel {
    /// How many frames wait in the queue at the root of a device, and how many it has dropped.
    async fn queue(&self, index: u32) -> Result<(u32, u32), LinkError> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = TcHandle::ROOT;
        let message = RouteNetlinkMessage::GetQueueDiscipline(message);
        // Told to whoever listens; to who asks, too, only if that is said.
        let answers = self.ask("look at a tap's queue", message, NLM_F_ECHO).await?;
        let stats = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewQueueDiscipline(message) => Some(message.attributes),
            _ => None,
        });
        let stats = stats.flatten().filter_map(|attribute| match attribute {
            TcAttribute::Stats2(stats) => Some(stats),
            _ => None,
        });
        let queue = stats.flatten().find_map(|stats| match stats {
            TcStats2::Queue(queue) => Some((queue.qlen, queue.drops)),
            _ => None,
        });
        Ok(queue.unwrap_or_default())
    }

    /// Makes or changes the token bucket at the root of a device. `flags` 0: only changes one.
    async fn token_bucket(
        &self,
        what: &str,
        index: u32,
        rate: u64,
        burst: u32,
        flags: u16,
    ) -> Result<(), LinkError> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = TcHandle::ROOT;
        let own = |kind, bytes: Vec<u8>| TcOption::Other(DefaultNla::new(kind, bytes));
        message.attributes.push(TcAttribute::Kind("tbf".into()));
        message.attributes.push(TcAttribute::Options(vec![
            own(1, parameters(rate)),
            own(4, rate.to_ne_bytes().to_vec()),
            own(6, burst.to_ne_bytes().to_vec()),
        ]));
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        self.order(what, message, flags).await
    }
}

/// `struct tc_tbf_qopt`: the rate (its linklayer Ethernet, so that no table is needed), no peak rate,
/// how many bytes may wait. Rate and burst as 64 and 32 bits follow as attributes of their own.
fn parameters(rate: u64) -> Vec<u8> {
    let rate = u32::try_from(rate).unwrap_or(u32::MAX);
    let mut bytes = vec![0, 1, 0, 0, 0, 0, 0, 0];
    bytes.extend(rate.to_ne_bytes());
    bytes.extend([0; 12]);
    bytes.extend((CUTOVER_BYTES as u32).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes
}
