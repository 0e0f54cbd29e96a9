//! News of this host's devices: something about one has changed.
//!
//! Owns one netlink socket. Never says what has changed: whoever cares looks. Invariant: what waits is bounded by the
//! kernel, and news that are lost there are news.

use std::io;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;

use super::LinkError;
use super::guard::netlink_address;
use super::nft::drain;

/// Devices of the namespace in which it was opened.
pub struct DeviceNews(AsyncFd<Socket>);

impl DeviceNews {
    /// Listens from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open() -> Result<Self, LinkError> {
        let open = || {
            let protocol = Protocol::from(libc::NETLINK_ROUTE);
            let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(protocol))?;
            socket.set_nonblocking(true)?;
            socket.bind(&netlink_address(libc::RTMGRP_LINK as u32))?;
            // SAFETY: the socket is owned by the AsyncFd, which is never taken apart: it stays open and the same.
            unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)
        };
        open().map(Self).map_err(|e| LinkError::kernel("watch this host's devices", e))
    }

    /// Waits until a device comes, goes or changes; what has changed until then is one piece of news.
    ///
    /// # Errors
    /// The socket is broken.
    pub async fn next(&self) -> io::Result<()> {
        // Cleared before the socket is read: what comes later is news again.
        self.0.readable().await?.clear_ready();
        drain(self.0.get_ref())
    }
}
