//! Broadcasts and multicasts for a NIC that moves, led to this process in front of the NIC's tap.
//!
//! Owns one chain of nftables for such a tap, in front of its filter, and the device where they wait at the new host. Never
//! decides when. Invariant: each change is one transaction, so that every frame goes one way, and none goes both.

use std::io;

use godwit_protocol::id::{CopyId, Mac, Name};

use super::filter::FAMILY_NETDEV;
use super::guard::{Guard, TABLE};
use super::nft::{Batch, Expression};
use super::plug::MARK;
use super::{Hold, LinkError, Links, names};

impl Links {
    /// Makes the device where broadcasts wait for a NIC that comes with this copy. It is on no bridge.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn open_aside(
        &self,
        wire: &Name,
        mac: &Mac,
        copy: CopyId,
    ) -> Result<Hold, LinkError> {
        self.node_tap(&names::aside(wire, mac, copy), wire, None).await
    }

    /// From now on broadcasts and multicasts that would go into the NIC's tap wait in `hold`, but for what an
    /// [`super::Injector`] sends.
    ///
    /// # Errors
    /// [`LinkError::NoWire`], or the kernel's, which may not know how: then they go where they went.
    pub async fn lead_aside(&self, wire: &Name, mac: &Mac, hold: &Hold) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        let known = state.wires.get_mut(wire).ok_or_else(|| LinkError::NoWire(wire.clone()))?;
        let (guard, tap, index) = (self.guard.clone(), names::tap(wire, mac), hold.index);
        let lead = move || guard.lead_aside(&tap, index);
        self.blocking("lead broadcasts aside (nftables, netdev egress)", lead).await?;
        known.aside.insert(*mac);
        Ok(())
    }

    /// They go into the tap again. Those that do not are on their way to the device where they waited, until
    /// [`super::forwarding_settled`].
    ///
    /// # Errors
    /// The kernel's.
    pub async fn lead_back(&self, wire: &Name, mac: &Mac) -> Result<(), LinkError> {
        let mut state = self.state.lock().await;
        let (guard, tap) = (self.guard.clone(), names::tap(wire, mac));
        self.blocking("lead broadcasts back (nftables)", move || guard.lead_back(&tap)).await?;
        if let Some(known) = state.wires.get_mut(wire) {
            known.aside.remove(mac);
        }
        Ok(())
    }
}

fn chain(tap: &str) -> String {
    format!("{tap}-aside")
}

impl Guard {
    fn lead_aside(&self, tap: &str, to: u32) -> io::Result<()> {
        let chain = chain(tap);
        let mut batch = Batch::new();
        batch.table(FAMILY_NETDEV, TABLE, false);
        // Made, if it is not there, so that it can be replaced.
        batch.early_chain(FAMILY_NETDEV, TABLE, &chain, tap);
        batch.flush(FAMILY_NETDEV, TABLE, &chain);
        let lead = [Expression::Group, Expression::MarkNot(MARK), Expression::SendBy(to)];
        batch.rule(FAMILY_NETDEV, TABLE, &chain, &lead);
        self.commit(&batch.finish())
    }

    pub(super) fn lead_back(&self, tap: &str) -> io::Result<()> {
        self.forget_chain(&chain(tap))
    }
}
