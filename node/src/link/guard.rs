//! The packet filter that belongs to the wires.
//!
//! Owns two nftables tables called `godwit`: one lets VXLAN in from members' addresses only, one keeps
//! frames of a wire away from the host itself. Never touches another table. Invariant: each change is one
//! transaction, and what a failed one leaves is the filter before it; until members are named, nothing
//! comes in by VXLAN.
//!
//! Spoken directly over netlink: the messages are few, and the daemon depends on no tool's syntax.

use std::io;
use std::net::IpAddr;
use std::sync::Mutex;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::nft::{Batch, Expression};

/// UDP port of the wires' VXLAN. Not the usual 4789, so that the filter never meets another program's
/// VXLAN, and below the ephemeral range.
pub(super) const VXLAN_PORT: u16 = 14789;

pub(super) const TABLE: &str = "godwit";
pub(super) const FAMILY_INET: u8 = 1;
const FAMILY_BRIDGE: u8 = 7;
/// The hook of packets for the host itself.
pub(super) const INPUT: u32 = 1;
const V4: (&str, u32, u32) = ("members4", 7, 4);
const V6: (&str, u32, u32) = ("members6", 8, 16);
/// Longest wait for the kernel's answer, seconds.
const ANSWER_S: u64 = 5;

/// A netfilter socket of the namespace in which it was opened.
pub(super) struct Guard {
    socket: Mutex<Socket>,
}

impl Guard {
    pub(super) fn open() -> io::Result<Self> {
        let protocol = Protocol::from(libc::NETLINK_NETFILTER);
        let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(protocol))?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(ANSWER_S)))?;
        socket.bind(&kernel_address())?;
        Ok(Self { socket: Mutex::new(socket) })
    }

    /// Puts the filter in place unless an earlier run left it: its members stay let in while the
    /// daemon restarts. Blocks for some milliseconds.
    pub(super) fn ensure(&self) -> io::Result<()> {
        match self.commit(&filter(&[], true)) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Lets exactly these underlay addresses in. Blocks for some milliseconds.
    pub(super) fn members(&self, members: &[IpAddr]) -> io::Result<()> {
        self.commit(&filter(members, false))
    }

    /// Takes the filter away, after the last wire.
    pub(super) fn remove(&self) -> io::Result<()> {
        let mut batch = Batch::new();
        for family in [FAMILY_INET, FAMILY_BRIDGE] {
            batch.table(family, TABLE, false);
            batch.delete_table(family, TABLE);
        }
        self.commit(&batch.finish())?;
        self.pass(&[])?;
        self.forget_nics()
    }

    /// Sends one transaction and reads the answers: an error to any message undoes all.
    pub(super) fn commit(&self, bytes: &(Vec<u8>, u32)) -> io::Result<()> {
        let socket = self.socket.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Answers to a transaction that was given up on would be taken for this one's.
        super::nft::drain(&socket)?;
        socket.send_to(&bytes.0, &kernel_address())?;
        super::nft::read_acks(&socket, bytes.1)
    }
}

/// The kernel's netlink address: port 0, no groups.
fn kernel_address() -> SockAddr {
    netlink_address(0)
}

/// A netlink address, of the kernel's choice: to hear of these groups.
pub(super) fn netlink_address(groups: u32) -> SockAddr {
    // SAFETY: the storage is zeroed and a sockaddr_nl fits it; the length given is that of sockaddr_nl.
    let made = unsafe {
        SockAddr::try_init(|storage, length| {
            let address = storage.cast::<libc::sockaddr_nl>();
            (*address).nl_family = libc::AF_NETLINK as libc::sa_family_t;
            (*address).nl_groups = groups;
            *length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
            Ok(())
        })
    };
    match made {
        Ok(((), address)) => address,
        Err(_) => unreachable!("the closure cannot fail"),
    }
}

/// Both tables from nothing, in one transaction.
fn filter(members: &[IpAddr], only_if_absent: bool) -> (Vec<u8>, u32) {
    let mut batch = Batch::new();
    for family in [FAMILY_INET, FAMILY_BRIDGE] {
        if !only_if_absent {
            batch.table(family, TABLE, false);
            batch.delete_table(family, TABLE);
        }
        batch.table(family, TABLE, only_if_absent);
        batch.chain(family, TABLE, "input", INPUT);
    }
    for ((set, key, length), protocol, offset) in [(V4, 2_u8, 12), (V6, 10, 8)] {
        batch.set(FAMILY_INET, TABLE, set, key, length);
        let addresses: Vec<Vec<u8>> = members
            .iter()
            .filter_map(|ip| match ip {
                IpAddr::V4(ip) if length == 4 => Some(ip.octets().to_vec()),
                IpAddr::V6(ip) if length == 16 => Some(ip.octets().to_vec()),
                _ => None,
            })
            .collect();
        batch.elements(FAMILY_INET, TABLE, set, &addresses);
        let stranger = [
            Expression::NetworkProtocol(protocol),
            Expression::TransportProtocol(libc::IPPROTO_UDP as u8),
            Expression::DestinationPort(VXLAN_PORT),
            Expression::SourceNotIn { offset, length, set },
            Expression::Count,
            Expression::Drop,
        ];
        batch.rule(FAMILY_INET, TABLE, "input", &stranger);
    }
    // A guest is on a wire with other guests, not with the host that carries it.
    // (By the port's name: matching the bridge's needs a kernel option that not every kernel has.)
    for prefix in super::names::PORT_PREFIXES {
        let up = [Expression::InputNamed(prefix), Expression::Count, Expression::Drop];
        batch.rule(FAMILY_BRIDGE, TABLE, "input", &up);
    }
    batch.finish()
}
