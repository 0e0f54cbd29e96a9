//! Waiting until the kernel has let go: of a forwarding entry that was replaced, of frames for a guest.
//!
//! Owns nothing but the waits. Invariant: each has a deadline.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use bytes::Bytes;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::time::Instant;

/// `TUNGETVNETHDRSZ`: `_IOR('T', 215, int)`.
const TUNGETVNETHDRSZ: libc::Ioctl = 0x8004_54d7;
/// Longest virtio-net header, bytes.
const HEADER_MAX: usize = 24;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CHECKSUM: u8 = 1;
/// `MEMBARRIER_CMD_GLOBAL`: returns after an RCU grace period.
const GLOBAL: libc::c_int = 1;
/// A grace period where the kernel cannot be asked for one.
const GRACE: Duration = Duration::from_millis(50);
/// How often a tap is looked at. Nothing tells when it becomes empty.
pub(super) const LOOK: Duration = Duration::from_millis(1);
/// How often in a row it has to be empty.
const LOOKS: u32 = 5;

/// Waits until no frame is on its way by a forwarding entry that was replaced before: every processor
/// has finished with the frames that it was forwarding.
pub async fn forwarding_settled() {
    // SAFETY: the call takes three numbers and touches no memory of this process.
    let ask = || unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if !matches!(tokio::task::spawn_blocking(ask).await, Ok(0)) {
        tokio::time::sleep(GRACE).await;
    }
}

/// The tap of a NIC that a QEMU reads, looked at from outside. The device lives as long as it: drop it soon.
pub struct TapView(OwnedFd);

impl TapView {
    /// `tap`: a copy of QEMU's own descriptor.
    #[must_use]
    pub fn new(tap: OwnedFd) -> Self {
        Self(tap)
    }

    /// Whether no frame waits for the guest.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// Waits until no frame waits for the guest; false at the deadline. It has to be empty for some time:
    /// QEMU takes one frame more than its guest has room for, and would lose it with the stop.
    pub async fn emptied(&self, deadline: Instant) -> bool {
        let mut empty = 0;
        while empty < LOOKS {
            empty = if self.is_empty() { empty + 1 } else { 0 };
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    /// Takes what waits for a guest that stands still, oldest first, as plain frames. Returns how many
    /// could not be taken: large segments that nobody has cut yet. QEMU has taken one more, and loses it.
    pub fn take_rest(&self, mut take: impl FnMut(Bytes)) -> u64 {
        let (mut lost, mut bytes) = (0, vec![0; HEADER_MAX + (64 << 10)]);
        let mut header: libc::c_int = 0;
        // SAFETY: TUNGETVNETHDRSZ writes one int, which lives through the call; the fd is open.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), TUNGETVNETHDRSZ, &mut header) } < 0 {
            return lost;
        }
        let header = usize::try_from(header).unwrap_or(0).clamp(10, HEADER_MAX);
        while !self.is_empty() {
            let Ok(length) = nix::unistd::read(&self.0, &mut bytes) else { return lost };
            match bytes.get_mut(..length).and_then(|b| plain(b.split_at_mut_checked(header)?)) {
                Some(frame) => take(Bytes::copy_from_slice(frame)),
                None => lost += 1,
            }
        }
        lost
    }
}

/// The frame behind a virtio-net header, with its checksum finished; none for a large segment.
fn plain<'a>((header, frame): (&mut [u8], &'a mut [u8])) -> Option<&'a [u8]> {
    let [flags, segments, _, _, _, _, a, b, c, d, ..] = *header else { return None };
    if segments != 0 {
        return None;
    }
    if flags & NEEDS_CHECKSUM != 0 {
        let (from, at) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let part = frame.get_mut(usize::from(from)..)?;
        let words =
            part.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // A sum of zero is written as its other form: zero means that there is none.
        let sum = match !(sum as u16) {
            0 => 0xffff,
            sum => sum,
        };
        part.get_mut(usize::from(at)..)?
            .first_chunk_mut::<2>()?
            .copy_from_slice(&sum.to_be_bytes());
    }
    Some(&*frame)
}
