//! Why the network adapter could not do something, with the operator's next step.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use godwit_protocol::id::Name;

/// Why a network operation failed. Nothing is half done that calling again would not finish.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The kernel said no.
    #[error("The kernel refused to {what}: {source}")]
    Kernel {
        /// What was asked of it.
        what: String,
        /// What it answered.
        #[source]
        source: io::Error,
    },
    /// No answer from the kernel within the deadline.
    #[error("The kernel did not answer within {0} s when asked to {1}")]
    Late(u64, String),
    /// Not enough privilege.
    #[error("Making bridges and taps needs CAP_NET_ADMIN: run the daemon as root")]
    Privilege,
    /// The wire was not set up with `ensure_wire`.
    #[error("Wire {0} is not set up on this host")]
    NoWire(Name),
    /// The NIC has no tap here.
    #[error("There is no tap {0} on this host for that NIC")]
    NoTap(String),
    /// Somebody holds the tap.
    #[error("Tap {0} is in use: a VM with this NIC is running on this host")]
    TapBusy(String),
    /// Somebody else carries the wires of this network namespace.
    #[error("Tunnel port {0} is held by another process: stop the other daemon on this host first")]
    SecondDaemon(String),
    /// The peer is not reachable by plain VXLAN.
    #[error("{0} is outside the LAN declared trusted (--trusted-lan): use the tunnel")]
    Untrusted(IpAddr),
    /// A device with our name is not ours.
    #[error("Device {0} exists and belongs to something else: remove it with `ip link del {0}`")]
    Foreign(String),
    /// There is nothing that an uplink could go out by.
    #[error("There is no interface {0} that leads outside: see `ip -br link`")]
    NoInterface(String),
    /// Nothing gets out by it now.
    #[error("{0} is down or has no carrier: `ip link set {0} up`, or see to its other end")]
    NotRunning(String),
    /// The host would drop what comes in from outside.
    #[error(
        "{0} does not forward IPv4, so nobody outside would get in: `sysctl -w net.ipv4.conf.{0}.forwarding=1`, and ask again"
    )]
    NotForwarding(String),
    /// The subnet is somewhere else already.
    #[error(
        "This host has the address {0}/{1} in the gateway's subnet: give the wire a subnet of its own"
    )]
    SubnetTaken(Ipv4Addr, u8),
    /// The wire has a way out here, with another address.
    #[error(
        "The wire's gateway is {0}/{1} here: take its uplink away first (godwit wire disconnect WIRE --uplink)"
    )]
    OtherGateway(Ipv4Addr, u8),
    /// Another wire or program has this VXLAN identifier.
    #[error(
        "VXLAN identifier {vni} of wire {wire} is taken on this host: name the wire otherwise, or remove the other device"
    )]
    VniTaken {
        /// The wire.
        wire: Name,
        /// Its identifier.
        vni: u32,
    },
}

impl LinkError {
    /// An answer of the kernel, when asked to `what`.
    pub(super) fn kernel(what: impl Into<String>, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Privilege,
            _ => Self::Kernel { what: what.into(), source },
        }
    }

    /// The errno that the kernel answered, if it did.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
