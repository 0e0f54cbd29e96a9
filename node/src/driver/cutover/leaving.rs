//! A NIC that leaves this host: its hold device, and the stream of its tail.
//!
//! Owns one hold device and two tasks: one empties the device and keeps the machine's time, one writes
//! the tail. Invariant: the machine's lock is held while the device is read, so that the order of its
//! frames and of markers is the order in which they came.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::cutover::Departure;
use godwit_protocol::id::{CopyId, Epoch, HostId, Mac, MigrationId, Name};
use godwit_protocol::limits::CUTOVER_BYTES;
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::super::copies::Copy;
use super::super::node::Node;
use super::super::{flip, hold, wires};
use super::{Key, instant, lock, report, tail, tail_id};
use crate::link::{Hold, TapView, Where, forwarding_settled};

/// How long a guest may take to empty its taps before it is stopped all the same. It runs meanwhile, but the
/// other members of its cluster may stand still already; what it leaves goes along.
const EMPTY: Duration = Duration::from_millis(500);
/// Before a stream that broke is opened again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long a guest that stays may take to read what was held.
const READ: Duration = Duration::from_secs(3);

/// One NIC that leaves.
pub(in super::super) struct Leaving {
    pub copy: CopyId,
    pub base: Epoch,
    to: HostId,
    key: Key,
    wire: Name,
    mac: Mac,
    id: MigrationId,
    hold: Hold,
    held: AtomicBool,
    /// Nothing is held any more; what was is on its way.
    closing: AtomicBool,
    /// Where the guest runs, once that is known.
    host: Mutex<Option<HostId>>,
    machine: Mutex<Departure<Bytes>>,
    /// There is something for the tail.
    items: Notify,
    /// The machine's time may have changed.
    steps: Notify,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

/// Makes the hold devices of a copy that is to leave, and opens the streams of their tails.
pub(in super::super) async fn prepare(
    node: &Arc<Node>,
    id: MigrationId,
    copy: &Copy,
    base: Epoch,
    to: HostId,
) {
    for nic in copy.wired() {
        let key = (wires::tag(&nic.wire), nic.mac);
        let earlier = node.cutovers.lock().leaving.get(&key).cloned();
        if earlier.as_ref().is_some_and(|e| (e.copy, e.id, e.to) == (copy.id, id, to)) {
            continue;
        }
        if let Some(earlier) = earlier {
            // The name of its device is needed.
            earlier.put_away(node).await;
        }
        super::dial(node, key.0, to);
        let hold = match node.links.open_hold(&nic.wire, &nic.mac).await {
            Ok(hold) => hold,
            Err(error) => {
                tracing::error!(wire = %nic.wire, mac = %nic.mac.colons(), %error, "frames will be lost at the stop");
                continue;
            }
        };
        hold::at("leaving").await;
        let leaving = Arc::new(Leaving {
            copy: copy.id,
            base,
            to,
            key,
            wire: nic.wire.clone(),
            mac: nic.mac,
            id,
            hold,
            held: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            host: Mutex::default(),
            machine: Mutex::new(Departure::new(CUTOVER_BYTES)),
            items: Notify::new(),
            steps: Notify::new(),
            tasks: Mutex::default(),
        });
        let keeper = tokio::spawn(keep(Arc::clone(node), Arc::clone(&leaving)));
        let writer = tokio::spawn(write(Arc::clone(node), Arc::clone(&leaving), to));
        lock(&leaving.tasks).extend([keeper, writer]);
        node.cutovers.lock().leaving.insert(key, Arc::clone(&leaving));
        if node.copies.get(copy.id).is_none() {
            // Its QEMU ended meanwhile, and nobody else looks for what was not there yet.
            leaving.end(node);
        }
    }
}

/// Turns the frames of these NICs into their holds, and waits for the guest to take what it has. What it
/// has not taken in time is in the views that come back.
pub(super) async fn hold(node: &Arc<Node>, copy: &Copy, nics: Vec<Arc<Leaving>>) -> Rest {
    let mut held = Vec::new();
    for nic in nics {
        let view = super::view(copy, &nic.mac);
        // A route that is told again must not find it set and not held.
        let _turn = node.turning.lock().await;
        if let Err(error) = node.links.lead_aside(&nic.wire, &nic.mac, &nic.hold).await {
            tracing::warn!(wire = %nic.wire, %error, "broadcasts may come twice");
        }
        match node.links.set_route(&nic.wire, &nic.mac, Where::Hold).await {
            Ok(()) => nic.held.store(true, Ordering::SeqCst),
            Err(error) => tracing::error!(wire = %nic.wire, %error, "frames are not held"),
        }
        held.push((nic, view));
    }
    if !held.is_empty() {
        forwarding_settled().await;
    }
    let deadline = Instant::now() + EMPTY;
    let mut rest = Vec::new();
    for (nic, view) in held {
        let emptied = match &view {
            Some(view) => view.emptied(deadline).await,
            None => true,
        };
        rest.push((nic, view.filter(|_| !emptied)));
    }
    Rest(rest)
}

/// NICs that are held, with the taps that their guest did not empty.
pub(in super::super) struct Rest(Vec<(Arc<Leaving>, Option<TapView>)>);

impl Rest {
    /// The guest stands still: what it left goes ahead of what is held.
    pub fn stopped(self, node: &Arc<Node>) {
        for (nic, view) in self.0 {
            let (mut frames, mut lost) = (Vec::new(), 0);
            if let Some(view) = view {
                // And the one that QEMU has taken.
                lost = view.take_rest(|frame| frames.push(frame)) + 1;
                tracing::warn!(frames = frames.len(), lost, "the guest did not empty its tap");
            }
            lock(&nic.machine).stopped(frames, lost);
            nic.items.notify_one();
            let (node, leaving) = (Arc::clone(node), Arc::clone(&nic));
            let quiet = tokio::spawn(async move { leaving.quiet(&node).await });
            // It ends with the NIC, whose device nothing else may hold.
            lock(&nic.tasks).push(quiet);
        }
    }
}

/// Empties the hold device and does what the machine's time asks for, until the tail has ended.
async fn keep(node: Arc<Node>, nic: Arc<Leaving>) {
    loop {
        let due = instant(&node, lock(&nic.machine).timeout());
        tokio::select! {
            waited = nic.hold.wait_readable() => if let Err(error) = waited {
                tracing::error!(%error, "a hold device is gone");
                return nic.end(&node);
            },
            () = nic.steps.notified() => {}
            () = tokio::time::sleep_until(due) => {}
        }
        nic.drain();
        lock(&nic.machine).handle_timeout(node.now());
        if lock(&nic.machine).close_due(node.now()) {
            nic.close(&node).await;
        }
        if lock(&nic.machine).is_over() {
            return nic.end(&node);
        }
    }
}

/// Writes the tail, from the first held frame on: what crosses before the decision need not cross after.
/// A stream that breaks is opened again, for as long as the machine waits.
async fn write(node: Arc<Node>, nic: Arc<Leaving>, to: HostId) {
    while let Err(error) = nic.write_tail(&node, to).await {
        // So it ends when the guest stays; frames that are lost with it are counted.
        tracing::debug!(%to, %error, "the tail of a NIC broke off");
        tokio::time::sleep(AGAIN).await;
    }
    nic.steps.notify_one();
}

impl Leaving {
    pub fn key(&self) -> Key {
        self.key
    }

    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::SeqCst)
    }

    /// The NIC's frames go where the newest route says: routes that come now are not for the hold.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Until the new host has the end of it.
    async fn write_tail(&self, node: &Node, to: HostId) -> std::io::Result<()> {
        let mut stream = node.bulk.connect(to).await.map_err(std::io::Error::other)?;
        stream.write_all(&tail_id(self.id, &self.wire, &self.mac).0).await?;
        stream.flush().await?;
        tail::send(stream, &self.machine, &self.items).await
    }

    /// Gives the machine what is in the device.
    fn drain(&self) {
        let mut machine = lock(&self.machine);
        self.drain_into(&mut machine);
        drop(machine);
        self.items.notify_one();
    }

    fn drain_into(&self, machine: &mut Departure<Bytes>) {
        let take = |frame: Bytes| {
            if !super::is_own(&frame, &self.mac) {
                machine.frame(frame);
            }
        };
        if let Err(error) = self.hold.drain(take) {
            tracing::error!(%error, "a hold device is gone");
        }
    }

    /// All that `from` sent by the old way is in the device by now.
    pub fn marker(&self, from: HostId) {
        let mut machine = lock(&self.machine);
        self.drain_into(&mut machine);
        machine.marker(from);
        drop(machine);
        self.items.notify_one();
        self.steps.notify_one();
    }

    /// The guest runs at `host`.
    pub fn moved(&self, node: &Node, host: HostId) {
        *lock(&self.host) = Some(host);
        let senders = node.senders(self.key.0, host);
        lock(&self.machine).moved(node.now(), senders);
        self.steps.notify_one();
    }

    pub fn orphaned(&self, node: &Node) {
        lock(&self.machine).orphaned(node.now());
        self.steps.notify_one();
    }

    /// Tells the new host that what the guest sent here has left.
    async fn quiet(&self, node: &Node) {
        // Not told in time, it goes on without.
        if flip::port_left(node, &self.wire).await {
            lock(&self.machine).quiet();
            self.items.notify_one();
        }
    }

    /// Everybody else sends to the new host: so does this one now, and the rest of the hold follows.
    async fn close(&self, node: &Arc<Node>) {
        {
            let _turn = node.turning.lock().await;
            self.closing.store(true, Ordering::SeqCst);
            let newest = node.table().host_of(self.key).filter(|host| *host != node.me);
            let host = newest.or(*lock(&self.host));
            let to = host.map_or(Where::None, |host| node.via(self.key.0, host));
            wires::set(node, &self.wire, &self.mac, to).await;
        }
        forwarding_settled().await;
        let mut machine = lock(&self.machine);
        self.drain_into(&mut machine);
        machine.close();
        drop(machine);
        self.items.notify_one();
    }

    /// Decided: the guest stays. What was held goes into its own tap, ahead of what comes now.
    pub async fn stays(&self, node: &Arc<Node>) {
        let (wire, mac) = (&self.wire, &self.mac);
        let before = match node.links.plug(wire, mac).await {
            Ok(before) => before,
            Err(error) => {
                tracing::error!(%wire, %error, "frames may overtake older ones");
                0
            }
        };
        let past = super::injector(node, self.copy, wire, mac).await;
        wires::set(node, wire, mac, Where::Local).await;
        super::lead_back(node, wire, mac).await;
        forwarding_settled().await;
        let frames = {
            let mut machine = lock(&self.machine);
            self.drain_into(&mut machine);
            machine.stay()
        };
        let lost = match past {
            Some(mut past) => past.send_all(&frames, Instant::now() + READ).await,
            None => frames.len(),
        };
        let dropped = super::unplug(node, self.copy, wire, mac).await;
        node.count_frames(self.id, 0, lost as u64 + dropped.saturating_sub(before));
        self.end(node);
    }

    /// Forgets the NIC, and returns when its device is gone.
    pub async fn put_away(&self, node: &Node) {
        let tasks = std::mem::take(&mut *lock(&self.tasks));
        self.end(node);
        for task in tasks {
            task.abort();
            let _ = task.await;
        }
    }

    /// Forgets the NIC; its device goes with the last task.
    pub fn end(&self, node: &Node) {
        let removed = {
            let mut table = node.cutovers.lock();
            let same = |l: &Arc<Self>| std::ptr::eq(Arc::as_ptr(l), self);
            table.leaving.get(&self.key).is_some_and(same).then(|| table.leaving.remove(&self.key))
        };
        if removed.is_none() {
            return;
        }
        if self.is_held() {
            report(node, self.id, &self.mac, lock(&self.machine).counts());
        }
        lock(&self.tasks).drain(..).for_each(|task| task.abort());
    }
}
