//! NICs that are on no wire, and their way to one and back.
//!
//! Owns the taps of such NICs: down, on no bridge, under a name of their own. Decides nothing. Invariant: on its way
//! to a wire a tap has its filter before it is on the bridge; on its way back it is off the bridge before it loses it.

use std::os::fd::OwnedFd;

use godwit_protocol::id::{Mac, Name, VmId};
use godwit_protocol::limits::TAP_QUEUE_FRAMES;
use godwit_protocol::wire::filter::Rule;

use super::kernel::WAITING;
use super::tap::Reader;
use super::{LinkError, Links, names};

impl Links {
    /// Makes the tap of a NIC that is on no wire and returns its fd, for QEMU.
    ///
    /// # Errors
    /// [`LinkError::TapBusy`] if a VM holds it.
    pub async fn open_loose_tap(&self, vm: VmId, mac: &Mac) -> Result<OwnedFd, LinkError> {
        let _state = self.state.lock().await;
        self.create_tap(&names::loose(vm, mac), Reader::Qemu)
    }

    /// Puts a NIC onto a wire, behind its filter. It gets no frames until [`Links::set_route`] says
    /// [`super::Where::Local`]. One that is there already only gets the filter.
    ///
    /// # Errors
    /// [`LinkError::NoWire`], [`LinkError::NoTap`], or the kernel's: it is on no wire then.
    pub async fn attach(
        &self,
        wire: &Name,
        mac: &Mac,
        vm: VmId,
        rules: &[Rule],
    ) -> Result<(), LinkError> {
        let state = self.state.lock().await;
        let bridge = state.wires.get(wire).ok_or_else(|| LinkError::NoWire(wire.clone()))?.bridge;
        let (name, loose) = (names::tap(wire, mac), names::loose(vm, mac));
        if self.kernel.device(&name).await?.is_some_and(|d| d.master == Some(bridge)) {
            return self.filter_device(name, rules, false).await;
        }
        let index = match self.kernel.device(&loose).await? {
            Some(device) => {
                self.kernel.rename(device.index, &name).await?;
                device.index
            }
            // Renamed, and then cut short.
            None => {
                let device = self.kernel.device(&name).await?;
                device.ok_or(LinkError::NoTap(loose))?.index
            }
        };
        self.filter_device(name, rules, true).await?;
        self.join(index, wire, mac, bridge).await
    }

    /// Takes a NIC off its wire. One that is on none stays so.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn detach(&self, wire: &Name, mac: &Mac, vm: VmId) -> Result<(), LinkError> {
        let _state = self.state.lock().await;
        let name = names::tap(wire, mac);
        let Some(device) = self.kernel.device(&name).await? else { return Ok(()) };
        self.kernel.leave(device.index).await?;
        self.kernel.rename(device.index, &names::loose(vm, mac)).await?;
        self.forget_filter(name).await
    }

    /// A tap with its filter gets onto the bridge, without frames as yet.
    pub(super) async fn join(
        &self,
        index: u32,
        wire: &Name,
        mac: &Mac,
        bridge: u32,
    ) -> Result<(), LinkError> {
        let alias = names::alias(wire, Some(mac));
        let queue = Some(TAP_QUEUE_FRAMES);
        self.kernel.dress(index, &alias, self.config.mtu, queue, Some(bridge)).await?;
        self.kernel.port(index, &WAITING).await?;
        self.kernel.up(index).await
    }
}
