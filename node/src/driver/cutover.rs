//! NICs that move: what the machines of `godwit_protocol::cutover` ask for, done to devices and streams.
//!
//! Owns the table of NICs that leave this host or come to it, and the fast path's look into it. Decides
//! nothing. Invariant: whatever becomes of a migration, a hold or a plug ends: with the machine's
//! deadline, with the copy, or when the daemon that takes the VM up finds it.
//!
//! Broadcasts and multicasts (ARP, neighbour discovery) go to every host of a wire, so to both. In front of the NIC's
//! tap they are led to the node, at the old host into its hold, from the moment the guest runs also at the new one: the
//! machine there lets one of two copies through.

mod arriving;
mod leaving;
mod tail;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::cutover::Counts;
use godwit_protocol::id::{CopyId, HostId, Mac, MigrationId, Name};
use godwit_protocol::limits::CONTROL_MESSAGE_BYTES;
use godwit_protocol::time::Time;
use godwit_protocol::wire::codec;
use godwit_protocol::wire::route::Route;
use godwit_protocol::wire::tail::{FLIPPED_BYTES, Flipped};
use tokio::time::Instant;

use super::copies::{Copy, lock};
use super::node::Node;
use crate::link::{Injector, LinkError, TapView};

pub(super) use arriving::Arriving;
pub(super) use leaving::{Leaving, Rest};

/// How long a kernel sender's last frames may be on their way across the LAN when its marker has come.
const LAN: Duration = Duration::from_millis(3);
/// How long the guest waits for word that what it sent at the old host has left it.
const QUIET: Duration = Duration::from_millis(10);

/// Before a plug that could not be taken off is tried again.
const UNPLUG_AGAIN: [Duration; 6] = [
    Duration::from_millis(10),
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
];

/// A NIC: the tag of its wire and its address.
pub(super) type Key = (u32, Mac);

/// The NICs of this host that move.
#[derive(Default)]
pub(super) struct Cutovers(Mutex<Table>);

#[derive(Default)]
struct Table {
    leaving: BTreeMap<Key, Arc<Leaving>>,
    arriving: BTreeMap<Key, Arc<Arriving>>,
}

impl Cutovers {
    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.0)
    }

    pub fn arriving(&self, key: Key) -> Option<Arc<Arriving>> {
        self.lock().arriving.get(&key).cloned()
    }

    /// The NIC whose frames wait in a hold here.
    pub fn held(&self, key: Key) -> Option<Arc<Leaving>> {
        self.lock().leaving.get(&key).filter(|l| l.is_held() && !l.is_closing()).cloned()
    }

    fn of_copy(&self, copy: CopyId) -> (Vec<Arc<Leaving>>, Vec<Arc<Arriving>>) {
        let table = self.lock();
        let leaving = table.leaving.values().filter(|l| l.copy == copy).cloned().collect();
        (leaving, table.arriving.values().filter(|a| a.copy == copy).cloned().collect())
    }

    /// Takes a frame that came by tunnel, if it is for a NIC that moves.
    pub fn take_in(&self, from: HostId, tag: u32, frame: &Bytes) -> bool {
        let Some(mac) = frame.first_chunk::<6>() else { return false };
        let key = (tag, Mac(*mac));
        let table = self.lock();
        let arriving = table.arriving.get(&key).filter(|a| a.runs_already());
        if let Some(arriving) = arriving {
            arriving.fresh(from, frame.clone());
        }
        arriving.is_some()
    }
}

/// The stream that carries a NIC's tail says this in place of its migration's id.
fn tail_id(id: MigrationId, wire: &Name, mac: &Mac) -> MigrationId {
    let mut hasher = blake3::Hasher::new_derive_key("godwit tail stream v1");
    hasher.update(&id.0).update(&mac.0).update(wire.as_str().as_bytes());
    let mut derived = [0; 16];
    hasher.finalize_xof().fill(&mut derived);
    MigrationId(derived)
}

/// A look into the tap of a copy's NIC; `None`: it has none, or it is said why it cannot be looked at.
fn view(copy: &Copy, mac: &Mac) -> Option<TapView> {
    let index = copy.spec.nics.iter().position(|nic| nic.mac == *mac)?;
    let warn = |error: &_| tracing::warn!(%error, "cannot look into a tap");
    copy.qemu().tap(index).inspect_err(warn).ok().map(TapView::new)
}

/// The way past the plug of a copy's NIC; without one, it is said that older frames are lost.
async fn injector(node: &Node, copy: CopyId, wire: &Name, mac: &Mac) -> Option<Injector> {
    let view = node.copies.get(copy).and_then(|copy| view(&copy, mac))?;
    let error =
        |error: &_| tracing::error!(%wire, mac = %mac.colons(), %error, "what was held is lost");
    node.links.injector(wire, mac, view).await.inspect_err(error).ok()
}

/// Takes a plug off, and does not give up soon: a NIC that stays plugged is deaf. Returns what the kernel has dropped
/// behind plugs of this tap.
async fn unplug(node: &Node, copy: CopyId, wire: &Name, mac: &Mac) -> u64 {
    for pause in UNPLUG_AGAIN {
        let tap = node.copies.get(copy).and_then(|copy| view(&copy, mac));
        match node.links.unplug(wire, mac, tap).await {
            Ok(dropped) => return dropped,
            Err(LinkError::NoTap(_)) => return 0,
            Err(error) => tracing::error!(%wire, mac = %mac.colons(), %error, "its tap is plugged"),
        }
        tokio::time::sleep(pause).await;
    }
    0
}

/// Broadcasts go into the NIC's tap again. Does not give up soon: a NIC without them is half deaf.
pub(super) async fn lead_back(node: &Node, wire: &Name, mac: &Mac) {
    for pause in UNPLUG_AGAIN {
        match node.links.lead_back(wire, mac).await {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(%wire, mac = %mac.colons(), %error, "its broadcasts go astray");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// Whether the frame is of the NIC's own guest: a bridge gives a broadcast to every port but its sender's, but one that
/// was sent at the other host comes back.
fn is_own(frame: &[u8], mac: &Mac) -> bool {
    frame.get(6..12) == Some(&mac.0)
}

/// When a machine's timeout is, for the runtime; without one, some day.
fn instant(node: &Node, timeout: Option<Time>) -> Instant {
    let after = timeout.map_or(Duration::from_secs(3600), |t| Duration::from_micros(t.0));
    if timeout.is_some() { node.started + after } else { Instant::now() + after }
}

fn report(node: &Node, id: MigrationId, nic: &Mac, counts: Counts) {
    let Counts { held, dropped, reordered, late } = counts;
    if counts == Counts::default() {
        return;
    }
    node.count_frames(id, held, dropped);
    let late = match (late, reordered) {
        (_, 1..) => &format!(", {reordered} behind newer ones"),
        (true, 0) => ", released by the deadline",
        (false, 0) => "",
    };
    let what = format!("frames of {}: {held} held, {dropped} dropped{late}", nic.colons());
    if dropped > 0 || !late.is_empty() {
        tracing::warn!(migration = %id, "{what}");
    }
    node.moment(id, what);
}

/// A marker came: its sender sends this NIC's frames to the new host from now on.
pub(super) fn marker(node: &Arc<Node>, from: HostId, tag: u32, bytes: &[u8]) {
    let Ok(flipped) = codec::decode::<Flipped, FLIPPED_BYTES>(bytes) else {
        return tracing::debug!(%from, "a marker that cannot be read");
    };
    let leaving = node.cutovers.lock().leaving.get(&(tag, flipped.mac)).cloned();
    let Some(leaving) = leaving.filter(|l| flipped.epoch > l.base) else { return };
    if !matches!(node.via(tag, from), crate::link::Where::Vxlan(_)) {
        return leaving.marker(from);
    }
    tokio::spawn(async move {
        // Its frames took another way than the marker.
        tokio::time::sleep(LAN).await;
        leaving.marker(from);
    });
}

/// Tells the old host of a NIC, behind all that went there.
pub(super) fn mark(node: &Node, to: HostId, tag: u32, flipped: Flipped) {
    let Ok(bytes) = codec::encode(&flipped, CONTROL_MESSAGE_BYTES) else { return };
    if let Err(error) = node.frames.mark(to, tag, &bytes) {
        tracing::debug!(%to, %error, "no marker");
    }
}

/// Makes tunnels to who may send to the NIC, or be sent to by its guest, before they are needed.
fn dial(node: &Node, tag: u32, other_end: HostId) {
    for host in node.senders(tag, other_end) {
        // Refused only if it is no member.
        let _ = node.frames.prepare(host);
    }
}

/// The guest has a new host: what its old one held is on its way there. True: the hold is still needed.
pub(super) fn moved(node: &Arc<Node>, key: Key, route: &Route) -> bool {
    let Some(leaving) = node.cutovers.held(key) else { return false };
    if route.host != node.me && !route.gone {
        leaving.moved(node, route.host);
    }
    true
}

/// The copy is to leave for `to`: everything that takes time is done before it is stopped. Again when a NIC was connected
/// since.
pub(super) async fn leave(node: &Arc<Node>, id: MigrationId, copy: &Copy, to: HostId) {
    let vm = copy.vm();
    let newest = node.with_core(move |core, _| core.record_of(vm).map(|r| r.epoch)).await;
    let base = newest.ok().flatten().unwrap_or_default();
    leaving::prepare(node, id, copy, base, to).await;
}

/// The copy is to come from `from`. Again when a NIC was connected since.
pub(super) async fn arrive(node: &Arc<Node>, id: MigrationId, copy: &Copy, from: HostId) {
    arriving::prepare(node, id, copy, from).await;
}

/// The copy's QEMU was started again, on new taps.
pub(super) async fn plug_again(node: &Node, copy: &Copy) {
    for arriving in node.cutovers.of_copy(copy.id).1 {
        arriving.plug(node).await;
    }
}

/// Frames for the copy's NICs wait here from now on; returns when its guest has taken what came before.
/// What it has not taken is the rest's, to be told when the guest stands still.
pub(super) async fn hold(node: &Arc<Node>, copy: &Arc<Copy>) -> Rest {
    let (leaving, arrived) = node.cutovers.of_copy(copy.id);
    for arriving in arrived {
        arriving.finish(node).await;
    }
    leaving::hold(node, copy, leaving).await
}

/// Waits, a little, until what the guest sent at the old host is ahead of what it will send here.
pub(super) async fn quiet(node: &Node, copy: CopyId) {
    let waits = node.cutovers.of_copy(copy).1;
    let all = futures::future::join_all(waits.iter().map(|a| a.quiet()));
    if tokio::time::timeout(QUIET, all).await.is_err() {
        tracing::debug!(%copy, "started without word that the old host is quiet");
    }
}

/// The transfer ended before anything was held.
pub(super) fn cancelled(node: &Node, copy: CopyId) {
    for leaving in node.cutovers.of_copy(copy).0 {
        if !leaving.is_held() {
            leaving.end(node);
        }
    }
}

/// The NIC is taken off its wire: nothing that waits can reach it any more.
pub(super) async fn unwired(node: &Node, copy: CopyId, wire: &Name, mac: &Mac) {
    let (leaving, arriving) = node.cutovers.of_copy(copy);
    let key = (super::wires::tag(wire), *mac);
    for nic in leaving.iter().filter(|nic| nic.key() == key) {
        nic.put_away(node).await;
    }
    for nic in arriving.iter().filter(|nic| nic.key() == key) {
        nic.end(node);
        // Its tap may come onto a wire again.
        lead_back(node, wire, mac).await;
        unplug(node, copy, wire, mac).await;
    }
}

/// The copy is gone from this host.
pub(super) fn gone(node: &Node, copy: CopyId) {
    let (leaving, arriving) = node.cutovers.of_copy(copy);
    for leaving in leaving {
        if leaving.is_held() { leaving.orphaned(node) } else { leaving.end(node) }
    }
    for arriving in arriving {
        arriving.end(node);
    }
}
