//! Setting wires up and taking them away.
//!
//! Owns the order of steps in which a wire's devices come and go. Invariant: a port is configured before
//! it is up, so no frame ever passes by default rules; and the filter stands before the first VXLAN
//! device does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use godwit_protocol::id::Name;
use godwit_protocol::limits::{TAP_QUEUE_FRAMES, TUNNEL_PORT_FRAMES};

use super::error::LinkError;
use super::guard::VXLAN_PORT;
use super::kernel::{Device, Fdb, PortFlags, WAITING, owner};
use super::tap::Reader;
use super::tunnel::Tunnel;
use super::{Links, State, Where, Wire, names};

/// Tunnel and VXLAN ports carry broadcasts, but not into each other.
const UPLINK: PortFlags = PortFlags { groups: true, isolated: true };

impl Links {
    /// Makes the wire's bridge and its ports towards other hosts, or adopts what is there, with its
    /// routes. Call it before any other call about the wire, and again at will. Of a wire that is `sealed`
    /// nothing comes or goes by VXLAN: a device for it goes.
    ///
    /// # Errors
    /// [`LinkError::Privilege`], [`LinkError::Foreign`], [`LinkError::VniTaken`], or the kernel's.
    pub async fn ensure_wire(&self, wire: &Name, sealed: bool) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        if !state.guarded {
            self.filter(&state).await?;
            state.guarded = true;
        }
        let bridge = self.ensure_bridge(wire).await?;
        let vxlan = self.ensure_vxlan(wire, bridge, sealed).await?;
        let tunnel = self.ensure_tunnel(wire, bridge).await?;
        match state.wires.get_mut(wire) {
            Some(known) if known.bridge == bridge && known.vxlan == vxlan => {
                if known.tunnel != tunnel {
                    known.tunnel = tunnel;
                    self.restore_tunnel_routes(known).await?;
                }
            }
            _ => {
                let adopted = self.adopt(wire, bridge, vxlan, tunnel).await?;
                state.wires.insert(wire.clone(), adopted);
            }
        }
        Ok(())
    }

    /// The routes through a tunnel port went with its device.
    async fn restore_tunnel_routes(&self, known: &Wire) -> Result<(), LinkError> {
        for mac in known.routes.iter().filter(|(_, r)| **r == Where::Tunnel).map(|(mac, _)| mac) {
            self.kernel.fdb_set(known.tunnel, mac, Fdb::Bridge).await?;
        }
        Ok(())
    }

    /// Removes every wire of ours that is not in `keep` and has no tap on it (no VM uses it), known or
    /// left by an earlier run, and the packet filter after the last one. Returns how many went.
    ///
    /// # Errors
    /// The kernel's; what is left is removed by the next call.
    pub async fn cleanup(&self, keep: &BTreeSet<Name>) -> Result<usize, LinkError> {
        let mut state = self.state.lock().await;
        let devices = self.kernel.devices().await?;
        let used: BTreeSet<Name> = devices
            .iter()
            .filter_map(owner)
            .filter_map(|(wire, mac)| mac.map(|_| wire))
            .chain(keep.iter().chain(state.uplinks.keys()).cloned())
            .collect();
        let (mut removed, mut left) = (0, 0);
        for device in &devices {
            let Some((wire, _)) = owner(device) else { continue };
            let is_bridge = device.name == names::bridge(&wire);
            if used.contains(&wire) {
                left += usize::from(is_bridge);
                continue;
            }
            self.forget_tunnel(&wire);
            state.wires.remove(&wire);
            self.kernel.delete(device.index).await?;
            removed += usize::from(is_bridge);
        }
        if left == 0 {
            state.guarded = false;
            let guard = self.guard.clone();
            self.blocking("remove the packet filter", move || guard.remove()).await?;
        }
        Ok(removed)
    }

    /// The filter as the state wants it.
    pub(super) async fn filter(&self, state: &State) -> Result<(), LinkError> {
        let (guard, members) = (self.guard.clone(), state.members.clone());
        let set = move || match members {
            Some(members) => guard.members(&members),
            None => guard.ensure(),
        };
        self.blocking("set the packet filter (nftables)", set).await
    }

    pub(super) async fn blocking(
        &self,
        what: &str,
        work: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> Result<(), LinkError> {
        let done = tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other);
        done.and_then(|result| result).map_err(|e| LinkError::kernel(what, e))
    }

    async fn ensure_bridge(&self, wire: &Name) -> Result<u32, LinkError> {
        let name = names::bridge(wire);
        let index = match self.kernel.device(&name).await? {
            Some(device) => ours(device, wire)?.index,
            None => {
                let address = names::bridge_address(wire, &self.config.underlay.to_string());
                self.kernel.add_bridge(&name, address).await?;
                self.index(&name).await?
            }
        };
        let alias = names::alias(wire, None);
        self.kernel.dress(index, &alias, self.config.mtu, None, None).await?;
        self.kernel.up(index).await?;
        Ok(index)
    }

    async fn ensure_vxlan(
        &self,
        wire: &Name,
        bridge: u32,
        sealed: bool,
    ) -> Result<Option<u32>, LinkError> {
        let name = names::vxlan(wire);
        let underlay = self.config.underlay;
        let alias = names::alias_via(wire, underlay);
        let mut found = match self.kernel.device(&name).await? {
            Some(device) => Some(ours(device, wire)?),
            None => None,
        };
        let wanted = !sealed && self.trusts(underlay);
        // One that belongs to another underlay address cannot be changed, only made again.
        if let Some(stale) = found.take_if(|device| !wanted || device.alias != alias) {
            self.kernel.delete(stale.index).await?;
        }
        if !wanted {
            return Ok(None);
        }
        let index = match found {
            Some(device) => device.index,
            None => {
                let vni = names::vni(wire);
                match self.kernel.add_vxlan(&name, vni, VXLAN_PORT, underlay).await {
                    Err(e) if e.errno() == Some(libc::EEXIST) => {
                        return Err(LinkError::VniTaken { wire: wire.clone(), vni });
                    }
                    other => other?,
                }
                self.index(&name).await?
            }
        };
        self.uplink(index, &alias, None, bridge).await?;
        Ok(Some(index))
    }

    async fn ensure_tunnel(&self, wire: &Name, bridge: u32) -> Result<u32, LinkError> {
        let name = names::tunnel(wire);
        let alias = names::alias(wire, None);
        let queue = Some(TUNNEL_PORT_FRAMES);
        let there = self.kernel.device(&name).await?.map(|device| device.index);
        if let Some(index) = self.open_tunnel_index(wire).filter(|open| Some(*open) == there) {
            self.uplink(index, &alias, queue, bridge).await?;
            return Ok(index);
        }
        self.forget_tunnel(wire);
        let fd = self.create_tap(&name, Reader::Node)?;
        let index = self.index(&name).await?;
        self.uplink(index, &alias, queue, bridge).await?;
        let queue = self.outgoing.clone();
        let tunnel = Tunnel::start(wire.clone(), index, fd, self.config.mtu, queue)
            .map_err(|e| LinkError::kernel("watch the tunnel port", e))?;
        let mut tunnels = self.tunnels.write().unwrap_or_else(PoisonError::into_inner);
        tunnels.insert(wire.clone(), Arc::new(tunnel));
        Ok(index)
    }

    async fn uplink(
        &self,
        index: u32,
        alias: &str,
        queue: Option<u32>,
        bridge: u32,
    ) -> Result<(), LinkError> {
        self.kernel.dress(index, alias, self.config.mtu, queue, Some(bridge)).await?;
        self.kernel.port(index, &UPLINK).await?;
        self.kernel.up(index).await
    }

    fn open_tunnel_index(&self, wire: &Name) -> Option<u32> {
        let tunnels = self.tunnels.read().unwrap_or_else(PoisonError::into_inner);
        tunnels.get(wire).filter(|t| t.is_open()).map(|t| t.index)
    }

    fn forget_tunnel(&self, wire: &Name) {
        self.tunnels.write().unwrap_or_else(PoisonError::into_inner).remove(wire);
    }

    pub(super) async fn index(&self, name: &str) -> Result<u32, LinkError> {
        let found = self.kernel.device(name).await?;
        found.map(|device| device.index).ok_or_else(|| LinkError::NoTap(name.to_owned()))
    }

    /// Reads back what an earlier run set: the kernel is the state.
    async fn adopt(
        &self,
        wire: &Name,
        bridge: u32,
        vxlan: Option<u32>,
        tunnel: u32,
    ) -> Result<Wire, LinkError> {
        let mut adopted = Wire {
            bridge,
            vxlan,
            tunnel,
            routes: BTreeMap::new(),
            aside: BTreeSet::new(),
            flood: BTreeSet::new(),
        };
        let taps = self.adopt_taps(wire, bridge).await?;
        let uplink = self.kernel.device(&names::uplink(wire)).await?.map(|device| device.index);
        for entry in self.kernel.entries().await? {
            match entry.remote {
                Some(ip) if Some(entry.port) == vxlan && entry.mac.0 == [0; 6] => {
                    adopted.flood.insert(ip);
                }
                Some(ip) if Some(entry.port) == vxlan => {
                    adopted.routes.insert(entry.mac, Where::Vxlan(ip));
                }
                None if taps.contains(&entry.port) => {
                    adopted.routes.insert(entry.mac, Where::Local);
                }
                None if Some(entry.port) == uplink => {
                    adopted.routes.insert(entry.mac, Where::Gateway);
                }
                None if entry.port == tunnel => {
                    adopted.routes.insert(entry.mac, Where::Tunnel);
                }
                _ => {}
            }
        }
        Ok(adopted)
    }
}

impl Links {
    /// Finds the wire's taps, and puts back on the bridge what is not there (somebody removed the bridge).
    async fn adopt_taps(&self, wire: &Name, bridge: u32) -> Result<BTreeSet<u32>, LinkError> {
        let mut taps = BTreeSet::new();
        for device in self.kernel.devices().await? {
            let Some((_, Some(_))) = owner(&device).filter(|(of, _)| of == wire) else { continue };
            if device.master != Some(bridge) {
                let queue = Some(TAP_QUEUE_FRAMES);
                let (alias, mtu) = (&device.alias, self.config.mtu);
                self.kernel.dress(device.index, alias, mtu, queue, Some(bridge)).await?;
                self.kernel.port(device.index, &WAITING).await?;
            }
            taps.insert(device.index);
        }
        Ok(taps)
    }
}

/// Accepts a device that we made for this wire, or were about to mark when an earlier run ended.
fn ours(device: Device, wire: &Name) -> Result<Device, LinkError> {
    let mark = owner(&device).map(|(wire, _)| wire);
    if device.alias.is_empty() || mark.as_ref() == Some(wire) {
        Ok(device)
    } else {
        Err(LinkError::Foreign(device.name))
    }
}
