//! A NIC that comes to this host: its plugged tap, and the stream of its tail.
//!
//! Owns one task, which reads the tail and what is led aside, and keeps the machine's time. Invariant: frames go into the
//! tap under the machine's lock, in the order in which the machine gives them.

use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use godwit_protocol::cutover::{Arrival, Output};
use godwit_protocol::id::{CopyId, HostId, Mac, MigrationId, Name};
use godwit_protocol::limits::CUTOVER_BYTES;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep};

use super::super::copies::Copy;
use super::super::node::Node;
use super::super::{bulk, hold, wires};
use super::{Key, instant, lock, report, tail, tail_id};
use crate::link::{Hold, Injector, Where, forwarding_settled};
use crate::net::BulkStream;

/// How long the reader of a tail may take to say that it has all of it.
const HEARD: Duration = Duration::from_secs(1);
/// How long a guest that is to leave again may take to read what is still to be put into its tap.
const READ: Duration = Duration::from_millis(500);

/// One NIC that comes.
pub(in super::super) struct Arriving {
    pub copy: CopyId,
    /// The old host.
    pub from: HostId,
    key: Key,
    wire: Name,
    mac: Mac,
    id: MigrationId,
    /// Where its broadcasts wait.
    aside: Option<Hold>,
    inside: Mutex<Inside>,
    quiet: watch::Sender<bool>,
    news: Notify,
    task: Mutex<Option<JoinHandle<()>>>,
}

struct Inside {
    machine: Arrival<Bytes>,
    past: Option<Injector>,
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
    for nic in copy.wired() {
        let key = (wires::tag(&nic.wire), nic.mac);
        if node.cutovers.arriving(key).is_some_and(|a| (a.copy, a.id) == (copy.id, id)) {
            continue;
        }
        let warn =
            |error: &_| tracing::warn!(wire = %nic.wire, %error, "broadcasts may come twice");
        let aside = node.links.open_aside(&nic.wire, &nic.mac, copy.id).await;
        let arriving = Arc::new(Arriving {
            copy: copy.id,
            from,
            key,
            wire: nic.wire.clone(),
            mac: nic.mac,
            id,
            aside: aside.inspect_err(warn).ok(),
            inside: Mutex::new(Inside {
                machine: Arrival::new(CUTOVER_BYTES),
                past: None,
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
        arriving.plug(node).await;
        super::dial(node, key.0, from);
        let tails = bulk::attach(node, tail_id(id, &nic.wire, &nic.mac));
        let task = tokio::spawn(keep(Arc::clone(node), Arc::clone(&arriving), tails));
        *lock(&arriving.task) = Some(task);
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

async fn keep(node: Arc<Node>, nic: Arc<Arriving>, mut tails: mpsc::Receiver<BulkStream>) {
    let (mut reading, mut heard): (Option<Reading>, Option<Instant>) = (None, None);
    let mut looks = interval(Injector::LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ends = Ending::default();
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
            waited = nic.wait_aside(), if ends == Ending::Aside => match waited {
                Ok(()) => nic.drain(),
                Err(error) => {
                    tracing::error!(%error, "where broadcasts wait is gone");
                    super::lead_back(&node, &nic.wire, &nic.mac).await;
                    ends = Ending::Plugged;
                }
            },
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
            if !over {
                nic.unplug(&node, &mut looks).await;
            }
        }
        if over {
            ends.go_on(&node, &nic, &mut looks).await;
            // The old host does not let go before it is heard.
            let until = *heard.get_or_insert_with(|| Instant::now() + HEARD);
            let told = reading.as_ref().is_none_or(|r| r.0.is_finished());
            let late = Instant::now() >= until;
            // Nobody else would take the plug off.
            let open = ends == Ending::Unplugged;
            if open && (told || late) && nic.end_if_empty(&node) {
                return;
            }
        }
    }
}

/// Broadcasts go their own way again, behind those that came before.
#[derive(Default, PartialEq, Eq)]
enum Ending {
    #[default]
    Aside,
    /// What comes waits behind the plug for what waits in the node.
    Plugged,
    Unplugged,
}

impl Ending {
    async fn go_on(&mut self, node: &Node, nic: &Arriving, looks: &mut Interval) {
        if *self == Self::Aside {
            nic.lead_back(node).await;
            *self = Self::Plugged;
        }
        if *self == Self::Plugged && !lock(&nic.inside).machine.has_output() {
            nic.unplug(node, looks).await;
            *self = Self::Unplugged;
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
        nic.with(|inside| inside.machine.tail(node.now(), number, item));
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

    /// Plugs its tap and leads broadcasts aside, before anything comes for it.
    pub async fn plug(&self, node: &Node) {
        self.shut(node).await;
        let Some(aside) = &self.aside else { return };
        if let Err(error) = node.links.lead_aside(&self.wire, &self.mac, aside).await {
            tracing::warn!(wire = %self.wire, %error, "broadcasts may come twice");
        }
    }

    /// Again: a plug lets a byte a second pass, and the transfer may have taken long.
    async fn shut(&self, node: &Node) {
        if let Err(error) = node.links.plug(&self.wire, &self.mac).await {
            tracing::error!(wire = %self.wire, %error, "frames may overtake older ones");
        }
    }

    async fn wait_aside(&self) -> io::Result<()> {
        match &self.aside {
            Some(aside) => aside.wait_readable().await,
            None => std::future::pending().await,
        }
    }

    /// Gives the machine the broadcasts that have come.
    fn drain(&self) {
        let Some(aside) = &self.aside else { return };
        self.with(|inside| {
            let take = |frame: Bytes| {
                if !super::is_own(&frame, &self.mac) {
                    inside.machine.group(frame);
                }
            };
            if let Err(error) = aside.drain(take) {
                tracing::error!(%error, "where broadcasts wait is gone");
            }
        });
    }

    /// Broadcasts that come now wait behind the plug, those that came before are in the machine.
    async fn lead_back(&self, node: &Node) {
        if self.aside.is_some() {
            self.shut(node).await;
            super::lead_back(node, &self.wire, &self.mac).await;
            forwarding_settled().await;
            self.drain();
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
        if self.runs_already() {
            // `cont` was asked for again: what goes on meanwhile takes its plug off once.
            return;
        }
        self.shut(node).await;
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
        let task = lock(&self.task).take();
        if let Some(task) = task {
            // It would plug the tap again.
            task.abort();
            let _ = task.await;
        }
        self.with(|inside| inside.machine.tail_lost());
        self.lead_back(node).await;
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
