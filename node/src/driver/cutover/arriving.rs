//! A NIC that comes to this host: its plugged tap, and the stream of its tail.
//!
//! Owns one task, which reads the tail and keeps the machine's time. Invariant: frames go into the tap
//! under the machine's lock, in the order in which the machine gives them.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::cutover::{Arrival, Output};
use godwit_protocol::id::{CopyId, HostId, Mac, MigrationId, Name};
use godwit_protocol::limits::CUTOVER_BYTES;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep};

use super::super::copies::Copy;
use super::super::node::Node;
use super::super::{bulk, hold, wires};
use super::{Key, instant, lock, report, tail, tail_id};
use crate::link::{Injector, Where};
use crate::net::BulkStream;

/// How long the reader of a tail may take to say that it has all of it.
const HEARD: Duration = Duration::from_secs(1);
/// How long a guest that is to leave again may take to read what is still to be put into its tap.
const READ: Duration = Duration::from_millis(500);
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
    /// What the kernel dropped, as more came than may wait there.
    behind_plug: u64,
    unplug: bool,
    unplugged: bool,
    over: bool,
}

impl Inside {
    /// Does what the machine asks for, as far as the tap has room.
    fn pump(&mut self) {
        loop {
            let room = self.past.as_mut().is_none_or(Injector::has_room);
            match self.machine.poll_output(room) {
                Some(Output::Inject(frame)) => self.inject(&frame),
                Some(Output::Unplug) => (self.unplug, self.unplugged) = (true, true),
                Some(Output::Over) => self.over = true,
                None => return,
            }
        }
    }

    /// There may be room now.
    fn look(&mut self) {
        if let Some(past) = self.past.as_mut().filter(|_| self.unplugged) {
            past.press();
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
        let sent = self.past.as_mut().is_some_and(|past| past.send(frame));
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
        if node.cutovers.arriving(key).is_some_and(|a| (a.copy, a.id) == (copy.id, id)) {
            continue;
        }
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
                behind_plug: 0,
                unplug: false,
                unplugged: false,
                over: false,
            }),
            quiet: watch::Sender::new(false),
            news: Notify::new(),
            task: Mutex::default(),
        });
        super::dial(node, key.0, from);
        let tails = bulk::attach(node, tail_id(id, &nic.wire, &nic.mac));
        let task = tokio::spawn(keep(Arc::clone(node), Arc::clone(&arriving), tails));
        *lock(&arriving.task) = Some(task.abort_handle());
        let earlier = node.cutovers.lock().arriving.insert(key, Arc::clone(&arriving));
        if let Some(earlier) = earlier {
            earlier.forget(node);
        }
        if node.copies.get(copy.id).is_none() {
            // Its QEMU ended meanwhile, and nobody else looks for what was not there yet.
            arriving.end(node);
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

async fn keep(node: Arc<Node>, nic: Arc<Arriving>, mut tails: mpsc::Receiver<BulkStream>) {
    let (mut reading, mut heard): (Option<Reading>, Option<Instant>) = (None, None);
    let mut looks = interval(Injector::LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (due, waits) = {
            let inside = lock(&nic.inside);
            (instant(&node, inside.machine.timeout()), inside.machine.has_output())
        };
        tokio::select! {
            Some(stream) = tails.recv() => if stream.peer() == nic.from {
                // The old host has given the other one up. It has to have ended: it may just say so.
                if let Some(mut other) = reading.take() {
                    other.0.abort();
                    let _ = (&mut other.0).await;
                }
                let read = read(Arc::clone(&node), Arc::clone(&nic), stream);
                reading = Some(Reading(tokio::spawn(read)));
            },
            () = nic.news.notified() => {}
            _ = looks.tick(), if waits || heard.is_some() => nic.with(Inside::look),
            () = tokio::time::sleep_until(due) => {
                nic.with(|inside| inside.machine.handle_timeout(node.now()));
            }
        }
        let (unplug, over) = {
            let mut inside = lock(&nic.inside);
            (std::mem::take(&mut inside.unplug), inside.over)
        };
        if unplug {
            hold::at("plugged").await;
            nic.unplug(&node, &mut looks).await;
        }
        if over {
            // The old host does not let go before it is heard.
            let until = *heard.get_or_insert_with(|| Instant::now() + HEARD);
            let told =
                reading.as_ref().is_none_or(|r| r.0.is_finished()) || Instant::now() >= until;
            if told && nic.end_if_empty(&node) {
                return;
            }
        }
    }
}

/// The task that reads; it ends with its NIC.
struct Reading(JoinHandle<()>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn read(node: Arc<Node>, nic: Arc<Arriving>, stream: BulkStream) {
    // The machine counts: an item that an earlier stream still brought does not come twice.
    let came = lock(&nic.inside).machine.tail_opened();
    let take = |number, item| {
        nic.with(|inside| inside.machine.tail(number, item));
        if lock(&nic.inside).machine.is_quiet() {
            nic.quiet.send_replace(true);
        }
    };
    if let Err(error) = tail::receive(stream, came, take).await {
        // So it does when the guest stays.
        tracing::info!(from = %nic.from, %error, "the tail of a NIC broke off");
        nic.with(|inside| inside.machine.tail_broken(node.now()));
    }
    nic.news.notify_one();
}

impl Arriving {
    pub fn key(&self) -> Key {
        self.key
    }

    fn with(&self, work: impl FnOnce(&mut Inside)) {
        let mut inside = lock(&self.inside);
        work(&mut inside);
        inside.pump();
        if inside.unplug || inside.over || inside.machine.has_output() {
            self.news.notify_one();
        }
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
        if lock(&self.inside).machine.has_tail() {
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
        let past = super::injector(node, self.copy, &self.wire, &self.mac).await;
        wires::set(node, &self.wire, &self.mac, Where::Local).await;
        let kernel = node.kernel_senders(self.key.0);
        self.with(|inside| {
            inside.past = past;
            inside.machine.runs(node.now(), kernel);
        });
        self.news.notify_one();
    }

    /// What comes past the plug meanwhile goes on.
    async fn unplug(&self, node: &Node, looks: &mut Interval) {
        let mut work = pin!(super::unplug(node, self.copy, &self.wire, &self.mac));
        let dropped = loop {
            tokio::select! {
                dropped = &mut work => break dropped,
                _ = looks.tick() => self.with(Inside::look),
            }
        };
        lock(&self.inside).behind_plug = dropped;
    }

    /// Releases everything now.
    pub async fn finish(&self, node: &Node) {
        self.with(|inside| inside.machine.tail_lost());
        let deadline = Instant::now() + READ;
        while lock(&self.inside).machine.has_output() && Instant::now() < deadline {
            sleep(Injector::LOOK).await;
            self.with(|_| {});
        }
        self.with(|inside| inside.machine.cut());
        let dropped = super::unplug(node, self.copy, &self.wire, &self.mac).await;
        lock(&self.inside).behind_plug = dropped;
        self.end(node);
    }

    /// Forgets the NIC, unless something waits for room in its tap: what comes meanwhile is behind that.
    fn end_if_empty(&self, node: &Node) -> bool {
        self.end_if(node, |inside| !inside.machine.has_output())
    }

    /// Forgets the NIC.
    pub fn end(&self, node: &Node) {
        self.end_if(node, |_| true);
    }

    fn end_if(&self, node: &Node, may: impl FnOnce(&Inside) -> bool) -> bool {
        let removed = {
            let mut table = node.cutovers.lock();
            if !may(&lock(&self.inside)) {
                return false;
            }
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
        true
    }

    fn forget(&self, node: &Node) {
        node.receiving().remove(&tail_id(self.id, &self.wire, &self.mac));
        let (ran, mut counts) = {
            let mut inside = lock(&self.inside);
            inside.machine.cut();
            let mut counts = inside.machine.counts();
            counts.dropped += inside.refused + inside.behind_plug;
            // With it goes the hold on the tap.
            (inside.past.take().is_some(), counts)
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
