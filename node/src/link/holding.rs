//! A hold device: a port of a wire's bridge whose frames wait in this process while their NIC moves.
//!
//! Owns the tap of one hold device. Never decides when it is in use (`Links::set_route` with
//! [`super::Where::Hold`]) or what becomes of its frames. Invariant: the device lives as long as the
//! [`Hold`]; with it, or with the daemon, go its forwarding entries.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::id::{Mac, Name};
use godwit_protocol::limits::TAP_QUEUE_FRAMES;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::kernel::WAITING;
use super::tap::Reader;
use super::tunnel::{HEADER, TAG};
use super::{LinkError, Links, names};

/// How long the kernel may take to notice that a device is up, and how often it is asked.
const NOTICED: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(10);

/// An open hold device.
pub struct Hold {
    pub(super) index: u32,
    fd: AsyncFd<OwnedFd>,
    longest: usize,
}

impl Hold {
    /// Waits until there may be a frame: then [`Hold::drain`] has to be called before the next wait.
    ///
    /// # Errors
    /// The device is gone.
    pub async fn wait_readable(&self) -> io::Result<()> {
        // Cleared before the device is read: what comes later is news again.
        self.fd.readable().await?.clear_ready();
        Ok(())
    }

    /// Gives every frame that is there now, oldest first. The frames are plain: whole checksums, no
    /// longer than the wire's MTU allows. Two callers at once would mix their order.
    ///
    /// # Errors
    /// The device is gone.
    pub fn drain(&self, mut take: impl FnMut(Bytes)) -> io::Result<()> {
        let mut buffer = vec![0; self.longest];
        loop {
            match nix::unistd::read(self.fd.get_ref(), &mut buffer) {
                Ok(length) if length < HEADER => {}
                // Each for itself: a frame that is kept for long keeps nothing else.
                Ok(length) => take(Bytes::copy_from_slice(&buffer[..length])),
                Err(nix::errno::Errno::EAGAIN) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Links {
    /// Makes the hold device of a NIC. It gets no frame until [`Links::set_route`] says
    /// [`super::Where::Hold`]. At most [`TAP_QUEUE_FRAMES`] wait in it.
    ///
    /// # Errors
    /// [`LinkError::NoWire`]; the kernel's, also if the NIC has one already.
    pub async fn open_hold(&self, wire: &Name, mac: &Mac) -> Result<Hold, LinkError> {
        // Not kept while the kernel is waited for: other NICs' routes change meanwhile.
        let bridge = {
            let state = self.state.lock().await;
            state.wires.get(wire).ok_or_else(|| LinkError::NoWire(wire.clone()))?.bridge
        };
        self.node_tap(&names::hold(wire, mac), wire, Some(bridge)).await
    }

    /// Makes a tap that this process reads.
    pub(super) async fn node_tap(
        &self,
        name: &str,
        wire: &Name,
        bridge: Option<u32>,
    ) -> Result<Hold, LinkError> {
        let fd = self.create_tap(name, Reader::Node)?;
        let device = self.kernel.device(name).await?;
        let index = device.ok_or_else(|| LinkError::NoTap(name.to_owned()))?.index;
        let queue = Some(TAP_QUEUE_FRAMES);
        let alias = names::alias(wire, None);
        self.kernel.dress(index, &alias, self.config.mtu, queue, bridge).await?;
        if bridge.is_some() {
            self.kernel.port(index, &WAITING).await?;
        }
        self.kernel.up(index).await?;
        // What is for a device is dropped that the kernel has not noticed to be up.
        let end = Instant::now() + NOTICED;
        while !self.kernel.device(name).await?.is_some_and(|d| d.runs) && Instant::now() < end {
            tokio::time::sleep(LOOK).await;
        }
        // SAFETY: the fd is owned by the AsyncFd, which is never taken apart: it stays open and the same.
        let fd = unsafe { AsyncFd::register(fd) }
            .map_err(|e| LinkError::kernel("watch a hold device", e.into()))?;
        Ok(Hold { index, fd, longest: usize::from(self.config.mtu) + HEADER + TAG })
    }
}
