//! What passed over the wires. Owns the joining of the kernel's counts with the tunnel ports' own; resets
//! nothing, so every figure only grows while its device lives.

use std::sync::PoisonError;

use godwit_protocol::id::{Mac, Name};

use super::error::LinkError;
use super::kernel::{LinkStats, owner};
use super::tunnel::TunnelCounters;
use super::{Links, names};

/// Counts of a NIC's tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicCounters {
    /// The wire.
    pub wire: Name,
    /// The NIC.
    pub mac: Mac,
    /// The kernel's counts.
    pub stats: LinkStats,
}

/// Counts of a wire's ways to other hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireCounters {
    /// The wire.
    pub wire: Name,
    /// The tunnel port as this process counts it, since it was opened.
    pub tunnel: TunnelCounters,
    /// Frames that overflowed the kernel's queue towards the tunnel: dropped.
    pub tunnel_overflow: u64,
    /// The VXLAN device, where there is one.
    pub vxlan: Option<LinkStats>,
}

/// All counts at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// Every tap of a NIC on this host.
    pub nics: Vec<NicCounters>,
    /// Every wire set up by this process.
    pub wires: Vec<WireCounters>,
}

impl Links {
    /// Reads all counts.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn counters(&self) -> Result<Counters, LinkError> {
        let devices = self.kernel.devices().await?;
        let named = |name: &str| devices.iter().find(|d| d.name == name).map(|d| d.stats);
        let nics = devices
            .iter()
            .filter_map(|device| match owner(device)? {
                (wire, Some(mac)) => Some(NicCounters { wire, mac, stats: device.stats }),
                _ => None,
            })
            .collect();
        let tunnels = self.tunnels.read().unwrap_or_else(PoisonError::into_inner);
        let wires = tunnels
            .iter()
            .map(|(wire, tunnel)| WireCounters {
                wire: wire.clone(),
                tunnel: tunnel.counters(),
                tunnel_overflow: named(&names::tunnel(wire)).map_or(0, |s| s.tx_dropped),
                vxlan: named(&names::vxlan(wire)),
            })
            .collect();
        Ok(Counters { nics, wires })
    }
}
