//! The core of a node: every part of the protocol behind one event queue.
//!
//! Owns the wiring: which part hears of what, and in which order commands are performed. Decides
//! nothing that a part could decide. Never does I/O: [`Core::poll_command`] answers, and each
//! command is finished (a [`Command::Persist`]: flushed) before the next one is taken.
//!
//! ```text
//!   network --Message--> +--------------------------------------+ --Send--------> network
//!   driver --Happened--> | membership | routes | epochs | moves | --Persist-----> store
//!   clock ---- now ----> +--------------------------------------+ --Effect------> QEMU, kernel
//! ```

mod clusters;
mod leads;
mod moves;
mod places;
mod power;
mod voters;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::epoch::{self, Epochs, Hard};
use crate::id::{CopyId, Epoch, HostId, MigrationId, Name, StoreId, VmId};
use crate::limits;
use crate::membership::{self, Membership};
use crate::migrate::destination::Destination;
use crate::migrate::lead::Lead;
use crate::migrate::source::Source;
use crate::migrate::{Effect, Happened, Migration, Moving};
use crate::route::{self, Routes};
use crate::time::Time;
use crate::wire;
use crate::wire::control::Control;
use crate::wire::migrate::Status;
use crate::wire::record::{Cause, Placement, Record, Voter};
use crate::wire::route::Route;
use crate::wire::wiring::Wiring;
use power::Minted;

/// What a node is when its core starts.
#[derive(Debug)]
pub struct Config {
    /// This host.
    pub me: HostId,
    /// Its store: with the host, the voter that it is.
    pub store: StoreId,
    /// Its site.
    pub site: Name,
    /// Higher than in every earlier start of this host (seconds of wall time).
    pub generation: u64,
    /// Feeds every pseudo-random choice; should differ between nodes.
    pub seed: u64,
    /// Hard state of its votes.
    pub hard: BTreeMap<VmId, Hard>,
    /// Bound ends of migrations, each with whether its copy's QEMU is there and loaded.
    pub moving: Vec<(Moving, bool)>,
    /// Migrations that it knew of.
    pub statuses: Vec<Status>,
}

/// What the core answers with. To be performed in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Write (or remove) this and flush it.
    Persist(Key, Option<Value>),
    /// Send; may be lost.
    Send(HostId, Control),
    /// Do this for a migration; answer with [`Core::happened`].
    Effect {
        /// The migration.
        id: MigrationId,
        /// The VM.
        vm: VmId,
        /// What.
        effect: Effect,
    },
    /// A record was learned as decided.
    Decided(Record),
    /// A decided record names this copy of the VM, which was minted here ([`Core::turn_on`]) and never ran: start it
    /// from its images. Answered with [`Core::runs`] or [`Core::ended`].
    Boot(VmId, CopyId),
    /// A VM is removed of which this host has what that copy left ([`Core::remove`]).
    Removed(VmId, CopyId),
    /// A proposal of [`Core::propose`] came to nothing in time: unknown, ask again.
    Undecided(VmId, Epoch),
    /// A migration's status changed.
    Status(Box<Status>),
    /// A route changed.
    Route(Route),
    /// A host is taken to be up or down: a hint.
    Member(HostId, bool),
}

/// Where a value is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// Votes and the newest record of a cluster.
    Epoch(VmId),
    /// A bound end.
    Moving(MigrationId),
    /// A migration's last known status.
    Status(MigrationId),
}

/// What is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Under [`Key::Epoch`].
    Epoch(Box<Hard>),
    /// Under [`Key::Moving`].
    Moving(Moving),
    /// Under [`Key::Status`].
    Status(Box<Status>),
}

/// A VM that this host runs.
#[derive(Debug, Clone)]
struct Local {
    copy: CopyId,
}

enum Move {
    Source(Box<Source>),
    Destination(Box<Destination>),
    Lead(Box<Lead>),
}

impl Move {
    fn get_mut(&mut self) -> &mut dyn Migration {
        match self {
            Self::Source(m) => &mut **m,
            Self::Destination(m) => &mut **m,
            Self::Lead(m) => &mut **m,
        }
    }

    fn get(&self) -> &dyn Migration {
        match self {
            Self::Source(m) => &**m,
            Self::Destination(m) => &**m,
            Self::Lead(m) => &**m,
        }
    }

    fn status(&self) -> &Status {
        self.get().status()
    }

    fn timeout(&self) -> Option<Time> {
        self.get().timeout()
    }
}

/// The core of one node.
pub struct Core {
    me: Voter,
    site: Name,
    epochs: Epochs,
    membership: Membership,
    routes: Routes,
    /// Connected members, the voter each says it is, and whether it will leave.
    peers: BTreeMap<HostId, Option<(Voter, bool)>>,
    up: BTreeSet<HostId>,
    /// Since when members are down.
    down: BTreeMap<HostId, Time>,
    /// Members that shall not vote.
    unfit: BTreeSet<HostId>,
    /// Whether this host will leave.
    leaving: bool,
    started: Time,
    /// The cluster that each VM belongs to.
    clusters: BTreeMap<VmId, VmId>,
    /// Copies that this host runs (not those that wait).
    local: BTreeMap<VmId, Local>,
    /// Copies whose QEMUs ended here by themselves, as long as a record places them here.
    ended: BTreeMap<VmId, CopyId>,
    /// Copies that were minted here to be booted, until they run.
    minted: BTreeMap<VmId, Minted>,
    /// VMs to be removed, with what is here of them, until the record says so.
    removing: BTreeMap<VmId, CopyId>,
    /// Clusters of which members move elsewhere, until when that counts.
    led: BTreeMap<VmId, Time>,
    moves: BTreeMap<MigrationId, Move>,
    statuses: BTreeMap<MigrationId, Status>,
    /// The statuses' ids, the longest known first.
    order: VecDeque<MigrationId>,
    out: VecDeque<Command>,
    /// What this host's migrations say to each other.
    inbox: VecDeque<wire::migrate::Message>,
    voters_at: Time,
}

impl Core {
    /// Starts, and takes up what was bound.
    #[must_use]
    pub fn new(now: Time, config: Config) -> Self {
        let me = Voter { host: config.me, store: config.store };
        let mut this = Self {
            me,
            site: config.site.clone(),
            epochs: Epochs::new(me, config.seed, config.hard),
            membership: Membership::new(
                config.me,
                config.site,
                config.generation,
                config.seed,
                now,
            ),
            routes: Routes::new(config.me, config.seed, now),
            peers: BTreeMap::new(),
            up: BTreeSet::new(),
            down: BTreeMap::new(),
            unfit: BTreeSet::new(),
            leaving: false,
            started: now,
            clusters: BTreeMap::new(),
            local: BTreeMap::new(),
            ended: BTreeMap::new(),
            minted: BTreeMap::new(),
            removing: BTreeMap::new(),
            led: BTreeMap::new(),
            moves: BTreeMap::new(),
            order: config.statuses.iter().map(|s| s.id).collect(),
            statuses: config.statuses.into_iter().map(|s| (s.id, s)).collect(),
            out: VecDeque::new(),
            inbox: VecDeque::new(),
            voters_at: now,
        };
        for record in this.epochs.records().cloned().collect::<Vec<_>>() {
            this.index(&record);
        }
        for (moving, present) in config.moving {
            this.take_up(now, &moving, present);
        }
        this.close_unbound();
        this.drain(now);
        this
    }

    /// A member is connected: it hears who votes here, and membership and routes know it.
    pub fn connected(&mut self, now: Time, host: HostId) {
        if self.peers.len() < limits::MEMBERS {
            self.peers.entry(host).or_default();
        }
        self.tell_voter(host);
        self.membership.announce(now, host);
        self.routes.set_peers(self.peers.keys().copied());
        for id in self.moves.keys().copied().collect::<Vec<_>>() {
            self.happened(now, id, Happened::Connected(host));
        }
        self.drain(now);
    }

    /// The connection is gone: a hint, nothing else.
    pub fn disconnected(&mut self, now: Time, host: HostId) {
        self.peers.remove(&host);
        self.routes.set_peers(self.peers.keys().copied());
        self.drain(now);
    }

    /// A message of an admitted member. `Ask` and `Answer` are the driver's and ignored here.
    pub fn message(&mut self, now: Time, from: HostId, message: Control) {
        match message {
            Control::Membership(bytes) => {
                if let Err(error) = self.membership.handle_data(now, from, &bytes) {
                    tracing::debug!(%from, %error, "membership message dropped");
                }
            }
            Control::Route(m) => self.routes.handle(from, m),
            Control::Epoch(m) => self.epochs.handle(now, from, m),
            Control::Migrate(m) => self.said(now, from, m),
            Control::Voter { voter, leaving } if voter.host == from => {
                if let Some(known) = self.peers.get_mut(&from) {
                    *known = Some((voter, leaving));
                }
            }
            Control::Progress(status) if status.from == from || status.to == Some(from) => {
                self.note(*status);
            }
            Control::Voter { .. }
            | Control::Progress(_)
            | Control::Ask { .. }
            | Control::Answer { .. }
            | Control::Revocations(_) => {}
        }
        self.drain(now);
    }

    /// Whatever is due.
    pub fn timer(&mut self, now: Time) {
        self.membership.handle_timeout(now);
        self.routes.handle_timeout(now);
        self.epochs.handle_timeout(now);
        let due = self.moves.iter().filter(|(_, m)| m.timeout().is_some_and(|t| t <= now));
        for id in due.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.happened(now, id, Happened::Timer);
        }
        if now >= self.voters_at {
            self.voters_at = now.plus_ms(voters::EVERY_MS);
            self.led.retain(|_, until| now < *until);
            self.finish_joins(now);
            self.turn_off(now);
            self.finish_removals(now);
            self.look_after_voters(now);
        }
        self.drain(now);
    }

    /// When [`Core::timer`] wants to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        let parts = [
            self.membership.poll_timeout(),
            self.routes.poll_timeout(),
            self.epochs.poll_timeout(),
            self.moves.values().filter_map(Move::timeout).min(),
        ];
        parts.into_iter().flatten().fold(self.voters_at, Time::min)
    }

    /// The next thing to do, if any.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.out.pop_front()
    }

    /// The newest record of a cluster that is known here. A newer one may have been decided.
    #[must_use]
    pub fn newest(&self, cluster: VmId) -> Option<&Record> {
        self.epochs.newest(cluster)
    }

    /// The routing table.
    #[must_use]
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// The membership.
    #[must_use]
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// Migrations that are known here, by id.
    pub fn statuses(&self) -> impl Iterator<Item = &Status> {
        self.statuses.values()
    }

    /// Another node's word on a migration, as the answer to a question.
    pub fn heard(&mut self, status: Status) {
        self.note(status);
    }

    /// The migration of `vm` that is under way here, if any.
    #[must_use]
    pub fn migration_of(&self, vm: VmId) -> Option<MigrationId> {
        self.moves.iter().find(|(_, m)| m.status().vm == vm).map(|(id, _)| *id)
    }

    /// The first record of a VM that was made here: this host alone votes until others are found.
    ///
    /// # Errors
    /// See [`Epochs::create`]; nothing changed.
    pub fn create(
        &mut self,
        now: Time,
        vm: VmId,
        name: Name,
        copy: CopyId,
        nics: Vec<Wiring>,
    ) -> Result<(), epoch::ProposeError> {
        let host = self.me.host;
        let record = Record {
            cluster: vm,
            name: name.clone(),
            epoch: Epoch(1),
            voters: vec![self.me],
            placement: vec![Placement { vm, name, host, copy, off: false, nics }],
            departed: Vec::new(),
            cause: Cause::Create,
        };
        self.epochs.create(now, record)?;
        self.voters_at = now;
        self.drain(now);
        Ok(())
    }

    /// Tells a member which voter this host is.
    fn tell_voter(&mut self, host: HostId) {
        let (voter, leaving) = (self.me, self.leaving);
        self.out.push_back(Command::Send(host, Control::Voter { voter, leaving }));
    }

    /// Moves what the parts want to do into the queue of commands.
    fn drain(&mut self, now: Time) {
        loop {
            if let Some(output) = self.epochs.poll_output() {
                self.epoch_output(now, output);
            } else if let Some(output) = self.membership.poll_output() {
                self.membership_output(now, output);
            } else if let Some(output) = self.routes.poll_output() {
                self.out.push_back(match output {
                    route::Output::Send { to, message } => {
                        Command::Send(to, Control::Route(message))
                    }
                    route::Output::Changed(route) => Command::Route(route),
                });
            } else if let Some(message) = self.inbox.pop_front() {
                self.said(now, self.me.host, message);
            } else {
                return;
            }
        }
    }

    fn epoch_output(&mut self, now: Time, output: epoch::Output) {
        use epoch::Output;
        match output {
            Output::Persist { cluster, hard } => {
                let value = Value::Epoch(Box::new(hard));
                self.out.push_back(Command::Persist(Key::Epoch(cluster), Some(value)));
            }
            Output::Send { to, message } => {
                self.out.push_back(Command::Send(to, Control::Epoch(message)));
            }
            Output::Decided(record) => {
                self.out.push_back(Command::Decided(record.clone()));
                self.index(&record);
                self.show_cluster(&record);
                match record.cause {
                    Cause::Delete => self.retire(record.cluster, record.epoch),
                    Cause::Joined(_) => self.finish_join(now, record.cluster),
                    _ => {}
                }
                self.tell_moves(now, &record);
                self.boot_named();
                self.end_removals();
            }
            Output::BallotReady { cluster, adopted: false, .. } => {
                self.tell_ballot(now, cluster);
            }
            Output::BallotReady { .. } | Output::Preempted { .. } => {}
            Output::Failed { cluster, epoch } => {
                self.out.push_back(Command::Undecided(cluster, epoch));
            }
        }
    }

    /// The VM is gone: its route becomes a tombstone of that epoch.
    fn retire(&mut self, vm: VmId, epoch: Epoch) {
        let Some(route) = self.routes.get(vm).cloned() else { return };
        // Refused only if it is the older word.
        let _ = self.routes.put(Route { epoch, gone: true, ..route });
    }

    fn membership_output(&mut self, now: Time, output: membership::Output) {
        use membership::Output;
        match output {
            Output::Send { to, bytes } => {
                self.out.push_back(Command::Send(to, Control::Membership(bytes)));
            }
            Output::Up(host) => {
                self.up.insert(host);
                self.down.remove(&host);
                self.out.push_back(Command::Member(host, true));
            }
            Output::Down(host) => {
                self.up.remove(&host);
                if self.down.len() < limits::MEMBERS {
                    self.down.insert(host, now);
                }
                self.out.push_back(Command::Member(host, false));
            }
        }
    }

    fn persist_status(&mut self, status: &Status) {
        let value = Value::Status(Box::new(status.clone()));
        self.out.push_back(Command::Persist(Key::Status(status.id), Some(value)));
    }
}
