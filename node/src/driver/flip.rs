//! A sender's turn: this host's frames for a NIC go another way, and its old host is told.
//!
//! Owns the order of the steps. Invariant: the marker leaves behind every frame that went by the old way,
//! whichever of the two ways is the kernel's.
//!
//! ```text
//!   tunnel -> tunnel   one lock: table, marker
//!   tunnel -> kernel   the port's rest goes the old way; FDB; grace period; port empty; marker
//!   kernel -> any      FDB; grace period; marker
//! ```

use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::id::{Epoch, HostId, Name};
use godwit_protocol::wire::route::{Nic, Route};
use godwit_protocol::wire::tail::Flipped;
use tokio::time::{sleep, timeout};

use super::copies::Copy;
use super::cutover::{self, Key};
use super::node::Node;
use super::switch::Table;
use super::wires::tag;
use crate::link::{Where, forwarding_settled};

/// How long what is in a tunnel port may take to leave.
const FENCE: Duration = Duration::from_secs(10);
/// A marker is a datagram, and is said again after so long.
const AGAIN: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(80), Duration::from_millis(300)];

/// A NIC's turn that was begun: wires differ in how their frames travel.
pub(super) struct Turn {
    old: HostId,
    nic: Nic,
    epoch: Epoch,
    /// The old way was the tunnel, the new one is not: the port's rest has to leave first.
    rest: bool,
    /// The marker has been said.
    said: bool,
}

/// Whether a newer route of the VM is known: this one was read before it came.
pub(super) fn is_old(node: &Node, route: &Route) -> bool {
    node.table().routes.get(&route.vm).is_some_and(|known| known.epoch > route.epoch)
}

/// Where this host has sent frames for the VM until now, if it shall send them to another host by this route.
fn old_way(node: &Node, table: &Table, route: &Route) -> Option<HostId> {
    let old = table.routes.get(&route.vm).filter(|known| !known.gone && !route.gone)?.host;
    let far = old != node.me && route.host != node.me;
    Some(old).filter(|old| far && *old != route.host)
}

/// Whether a changed route has this host's senders turn.
pub(super) fn is_due(node: &Node, route: &Route) -> bool {
    old_way(node, &node.table(), route).is_some()
}

/// Enters a changed route into the table. A turn, if this host sends another way now, whose FDB entries
/// are to be set next.
pub(super) fn begin(node: &Node, route: &Route) -> Vec<Turn> {
    let mut table = node.table();
    let old = old_way(node, &table, route);
    let mut turns: Vec<Turn> =
        old.map(|old| turns(old, &route.nics, route.epoch)).into_iter().flatten().collect();
    for turn in &mut turns {
        let (tag, _) = turn.key();
        let by_tunnel = node.via(tag, turn.old) == Where::Tunnel;
        turn.rest = by_tunnel && node.via(tag, route.host) != Where::Tunnel;
        // Of an earlier turn nothing is waited for any more.
        table.behind.remove(&turn.key());
        if turn.rest {
            table.behind.insert(turn.key(), turn.old);
        }
        turn.said = by_tunnel && !turn.rest;
    }
    table.put(route.clone());
    turns.iter().filter(|turn| turn.said).for_each(|turn| turn.say(node));
    turns
}

/// The guest runs here, and ran elsewhere: this host's own frames for it do not leave any more.
pub(super) fn here(node: &Node, copy: &Copy) -> Vec<Turn> {
    let arriving = |n: &Nic| node.cutovers.arriving((tag(&n.wire), n.mac)).map(|a| a.from);
    let nics = copy.wired();
    let Some(old) = nics.iter().find_map(arriving) else { return Vec::new() };
    let mut turns = turns(old, &nics, Epoch::default());
    for turn in &mut turns {
        turn.rest = node.via(turn.key().0, old) == Where::Tunnel;
        if turn.rest {
            node.table().behind.insert(turn.key(), old);
        }
    }
    turns
}

fn turns(old: HostId, nics: &[Nic], epoch: Epoch) -> Vec<Turn> {
    let turn = |nic: &Nic| Turn { old, nic: nic.clone(), epoch, rest: false, said: false };
    nics.iter().map(turn).collect()
}

/// Whether all that is in the wire's tunnel port now has left. A port that is gone has left nothing.
pub(super) async fn port_left(node: &Node, wire: &Name) -> bool {
    timeout(FENCE, node.links.fence(wire)).await.is_ok()
}

impl Turn {
    /// With the epoch of the route that made it necessary.
    pub fn at(mut self, epoch: Epoch) -> Self {
        self.epoch = epoch;
        self
    }

    /// The FDB entries are set: says the marker as soon as it is true.
    pub fn end(self, node: &Arc<Node>) {
        let node = Arc::clone(node);
        tokio::spawn(async move {
            if !self.said {
                forwarding_settled().await;
            }
            if self.rest {
                let left = port_left(&node, &self.nic.wire).await;
                let mut table = node.table();
                if table.behind.get(&self.key()) == Some(&self.old) {
                    table.behind.remove(&self.key());
                }
                drop(table);
                if !left {
                    // A marker would not be behind everything: the old host's deadline does without, and the
                    // rest of the port finds the new one.
                    return tracing::warn!(wire = %self.nic.wire, "its tunnel port does not empty");
                }
            }
            if !self.said {
                self.say(&node);
            }
            for pause in AGAIN {
                sleep(pause).await;
                self.say(&node);
            }
        });
    }

    fn key(&self) -> Key {
        (tag(&self.nic.wire), self.nic.mac)
    }

    fn say(&self, node: &Node) {
        let (tag, mac) = self.key();
        cutover::mark(node, self.old, tag, Flipped { mac, epoch: self.epoch });
    }
}
