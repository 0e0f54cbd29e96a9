//! A NIC that comes to this host: its plugged tap, and the stream of its tail.
//!
//! Owns one task, which reads the tail and keeps the machine's time. Invariant: frames go into the tap
//! under the machine's lock, in the order in which the machine gives them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use godwit_protocol::cutover::{Arrival, Output};
use godwit_protocol::id::{CopyId, HostId, Mac, MigrationId, Name};
use godwit_protocol::limits::CUTOVER_BYTES;
use godwit_protocol::wire::tail::{self, Item};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

use super::super::copies::Copy;
use super::super::node::Node;
use super::super::{bulk, wires};
use super::{Key, instant, report, tail_id};
use crate::link::{Injector, Where};
use crate::net::BulkStream;

/// Different broadcasts that are remembered while a NIC comes.
const GROUPS: usize = 4096;

/// One NIC that comes.
pub(in super::super) struct Arriving {
    pub copy: CopyId,
    /// The old host.
    pub from: HostId,
    key: Key,
    wire: Name,
    mac: Mac,
    id: MigrationId,
    inside: Mutex<Inside>,
    attached: AtomicBool,
    quiet: watch::Sender<bool>,
    news: Notify,
    task: Mutex<Option<AbortHandle>>,
}

struct Inside {
    machine: Arrival<Bytes>,
    past: Option<Injector>,
    /// Broadcasts that this host has flooded since its tap takes part: how often, by content.
    groups: BTreeMap<[u8; 32], u32>,
    refused: u64,
    unplug: bool,
    over: bool,
}

impl Inside {
    fn pump(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::Inject(frame) => self.inject(&frame),
                Output::Unplug => self.unplug = true,
                Output::Over => self.over = true,
            }
        }
    }

    fn inject(&mut self, frame: &[u8]) {
        if frame[0] & 1 == 1
            && let Some(seen) = self.groups.get_mut(blake3::hash(frame).as_bytes())
            && *seen > 0
        {
            // The sender's other copy came straight here.
            *seen -= 1;
            return;
        }
        let sent = self.past.as_ref().is_some_and(|past| past.send(frame));
        self.refused += u64::from(!sent);
    }
}

/// Plugs the taps of a copy that is to come, and waits for the tails of its NICs.
pub(in super::super) async fn prepare(
    node: &Arc<Node>,
    id: MigrationId,
    copy: &Copy,
    from: HostId,
) {
    plug(node, copy).await;
    for nic in copy.wired() {
        let key = (wires::tag(&nic.wire), nic.mac);
        let arriving = Arc::new(Arriving {
            copy: copy.id,
            from,
            key,
            wire: nic.wire.clone(),
            mac: nic.mac,
            id,
            inside: Mutex::new(Inside {
                machine: Arrival::new(CUTOVER_BYTES),
                past: None,
                groups: BTreeMap::new(),
                refused: 0,
                unplug: false,
                over: false,
            }),
            attached: AtomicBool::new(false),
            quiet: watch::Sender::new(false),
            news: Notify::new(),
            task: Mutex::default(),
        });
        super::dial(node, key.0, from);
        let tails = bulk::attach(node, tail_id(id, &nic.wire, &nic.mac));
        let task = tokio::spawn(keep(Arc::clone(node), Arc::clone(&arriving), tails));
        *lock(&arriving.task) = Some(task.abort_handle());
        let earlier = node.cutovers.lock().arriving.insert(key, arriving);
        if let Some(earlier) = earlier {
            earlier.forget(node);
        }
    }
}

/// Plugs a copy's taps, before anything comes for them. Again after its QEMU was started again.
pub(in super::super) async fn plug(node: &Node, copy: &Copy) {
    for nic in copy.wired() {
        if let Err(error) = node.links.plug(&nic.wire, &nic.mac).await {
            tracing::error!(wire = %nic.wire, %error, "frames may overtake older ones");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn keep(node: Arc<Node>, nic: Arc<Arriving>, mut tails: mpsc::Receiver<BulkStream>) {
    let mut reading = None;
    loop {
        let due = instant(&node, lock(&nic.inside).machine.timeout());
        tokio::select! {
            Some(tail) = tails.recv(), if reading.as_ref().is_none_or(Reading::is_over) => {
                if tail.peer() == nic.from {
                    nic.attached.store(true, Ordering::SeqCst);
                    reading = Some(Reading(tokio::spawn(Arc::clone(&nic).read(tail)).abort_handle()));
                }
            }
            () = nic.news.notified() => {}
            () = tokio::time::sleep_until(due) => {
                nic.with(|inside| inside.machine.handle_timeout(node.now()));
            }
        }
        let (unplug, over) = {
            let mut inside = lock(&nic.inside);
            (std::mem::take(&mut inside.unplug), inside.over)
        };
        if unplug {
            nic.unplug(&node).await;
        }
        if over {
            return nic.end(&node);
        }
    }
}

/// The task that reads; it ends with its NIC.
struct Reading(AbortHandle);

impl Reading {
    fn is_over(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Arriving {
    fn with(&self, work: impl FnOnce(&mut Inside)) {
        let mut inside = lock(&self.inside);
        work(&mut inside);
        inside.pump();
        if inside.unplug || inside.over {
            self.news.notify_one();
        }
    }

    async fn read(self: Arc<Self>, tail: BulkStream) {
        let mut tail = BufReader::with_capacity(64 << 10, tail);
        let mut used = false;
        loop {
            match read_item(&mut tail).await {
                Ok(Item::End) => {
                    self.with(|inside| inside.machine.tail(Item::End));
                    break;
                }
                Ok(item) => self.with(|inside| inside.machine.tail(item)),
                Err(_) if !used && !self.runs_already() => {
                    // It is opened again.
                    return self.attached.store(false, Ordering::SeqCst);
                }
                Err(error) => {
                    // So it does when the guest stays.
                    tracing::info!(from = %self.from, %error, "the tail of a NIC broke off");
                    self.with(|inside| inside.machine.tail_lost());
                    break;
                }
            }
            used = true;
            if lock(&self.inside).machine.is_quiet() {
                self.quiet.send_replace(true);
            }
        }
        self.quiet.send_replace(true);
        self.news.notify_one();
    }

    /// Frames for the NIC may come here: its guest runs here. Earlier, one that comes is passed on.
    pub fn runs_already(&self) -> bool {
        lock(&self.inside).past.is_some()
    }

    /// A frame came here and not by way of the old host.
    pub fn fresh(&self, from: HostId, frame: Bytes) {
        self.with(|inside| inside.machine.fresh(from, frame));
    }

    /// A broadcast is flooded on this host.
    pub fn flooded(&self, frame: &[u8]) {
        let mut inside = lock(&self.inside);
        if inside.past.is_some() && inside.groups.len() < GROUPS {
            *inside.groups.entry(*blake3::hash(frame).as_bytes()).or_default() += 1;
        }
    }

    /// Waits for word that the old host is quiet; not at all if none can come.
    pub async fn quiet(&self) {
        if self.attached.load(Ordering::SeqCst) {
            // The sender is this NIC's own.
            let _ = self.quiet.subscribe().wait_for(|quiet| *quiet).await;
        }
    }

    /// The guest runs: its frames come here now, older ones first.
    pub async fn runs(&self, node: &Arc<Node>) {
        // Again: a plug lets a byte a second pass, and the transfer may have taken long.
        if let Err(error) = node.links.plug(&self.wire, &self.mac).await {
            tracing::error!(wire = %self.wire, %error, "frames may overtake older ones");
        }
        let past = node.links.injector(&self.wire, &self.mac).await;
        if let Err(error) = &past {
            tracing::error!(wire = %self.wire, %error, "what the old host held is lost");
        }
        wires::set(node, &self.wire, &self.mac, Where::Local).await;
        let attached = self.attached.load(Ordering::SeqCst);
        let kernel = node.kernel_senders(self.key.0);
        self.with(|inside| {
            inside.past = past.ok();
            inside.machine.runs(node.now(), kernel);
            if !attached {
                inside.machine.tail_lost();
            }
        });
        self.news.notify_one();
    }

    /// Releases everything now.
    pub async fn finish(&self, node: &Node) {
        self.with(|inside| inside.machine.tail_lost());
        self.unplug(node).await;
        self.end(node);
    }

    async fn unplug(&self, node: &Node) {
        super::unplug(node, &self.wire, &self.mac).await;
    }

    /// Forgets the NIC.
    pub fn end(&self, node: &Node) {
        let removed = {
            let mut table = node.cutovers.lock();
            let same = |a: &Arc<Self>| std::ptr::eq(Arc::as_ptr(a), self);
            table
                .arriving
                .get(&self.key)
                .is_some_and(same)
                .then(|| table.arriving.remove(&self.key))
        };
        if removed.is_some() {
            self.forget(node);
        }
    }

    fn forget(&self, node: &Node) {
        node.receiving().remove(&tail_id(self.id, &self.wire, &self.mac));
        let (ran, mut counts) = {
            let inside = lock(&self.inside);
            let mut counts = inside.machine.counts();
            counts.dropped += inside.refused;
            (inside.past.is_some(), counts)
        };
        if ran {
            // What the old host held it counts itself.
            counts.held = 0;
            report(node, self.id, &self.mac, counts);
        }
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

async fn read_item(tail: &mut BufReader<BulkStream>) -> std::io::Result<Item<Bytes>> {
    let mut head = [0; tail::HEAD_BYTES];
    tail.read_exact(&mut head).await?;
    let length = tail::length(head).map_err(std::io::Error::other)?;
    let mut bytes = vec![0; length];
    tail.read_exact(&mut bytes).await?;
    tail::item(head, Bytes::from(bytes)).map_err(std::io::Error::other)
}
