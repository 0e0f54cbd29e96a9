//! The envelope of the control class: what two admitted nodes say to each other.

use serde::{Deserialize, Serialize};

use super::migrate::{Options, Status, Target};
use super::record::{Record, Voter};
use super::wiring::Change;
use super::{epoch, migrate, route};
use crate::id::{HostId, Mac, MigrationId, VmId};

/// One control message between two members. Order between messages is not promised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// Bytes of the membership protocol (SWIM).
    Membership(Vec<u8>),
    /// Routes.
    Route(route::Message),
    /// Decisions.
    Epoch(epoch::Message),
    /// A migration's two ends.
    Migrate(migrate::Message),
    /// A question that wants an answer with the same number.
    Ask {
        /// Chosen by the asker.
        number: u64,
        /// The question.
        ask: Ask,
    },
    /// The answer.
    Answer {
        /// The number of the question.
        number: u64,
        /// The answer.
        answer: Answer,
    },
    /// Lead to requester: how far a migration is.
    Progress(Box<Status>),
    /// The voter that the sender is.
    Voter {
        /// Its host and its store.
        voter: Voter,
        /// It will leave, so that another should vote in its place.
        leaving: bool,
    },
    /// Revoked members: spreads and is final. Signed bytes, checked by the admission adapter.
    Revocations(Vec<Vec<u8>>),
}

/// A question from one node to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// To the owner of a VM: move it.
    Migrate {
        /// The request's id: asked twice, it moves once.
        id: MigrationId,
        /// The VM.
        vm: VmId,
        /// Where to.
        target: Target,
        /// How.
        options: Options,
    },
    /// To the lead: give up if the guest has not been stopped yet.
    Abort(MigrationId),
    /// To any node: what it knows of migrations (all, or one).
    Migrations(Option<MigrationId>),
    /// To any node: what it can tell of itself (a JSON text for people).
    Host,
    /// To any node: the newest record of this cluster, or the one that governs this VM, that it knows.
    Record(VmId),
    /// To the host of a lone VM: let it join the cluster whose record this is. Asked again, it goes
    /// on; it is done when the cluster's record names the VM.
    Join {
        /// The VM.
        vm: VmId,
        /// The cluster, as the asker knows it.
        cluster: Box<Record>,
    },
    /// To a cluster's lead: these VMs leave it, and are lone VMs again.
    Release {
        /// The cluster.
        cluster: VmId,
        /// Members.
        vms: Vec<VmId>,
    },
    /// To a cluster's lead: delete it; its members are lone VMs again.
    Dissolve(VmId),
    /// To a cluster's lead: move these members together.
    MigrateCluster {
        /// The request's id: asked twice, it moves once.
        id: MigrationId,
        /// The cluster.
        cluster: VmId,
        /// Who moves, each with the hosts to try, best first.
        members: Vec<(VmId, Vec<HostId>)>,
        /// How.
        options: Options,
    },
    /// To the host that runs a VM: what a destination has to know of it.
    Describe(VmId),
    /// To a host: would it take a VM of that description? Nothing is reserved.
    Fits {
        /// The VM's description.
        spec: Vec<u8>,
        /// Memory of other VMs that would come with it, bytes.
        beside_bytes: u64,
    },
    /// To any node: that host shall not vote any more, or may vote after all. The answer is a JSON text:
    /// the names of the records that this node looks after and that name it as a voter.
    Unfit {
        /// The host.
        host: HostId,
        /// Whether it shall not vote.
        unfit: bool,
    },
    /// To the host of a VM: connect a NIC of it otherwise.
    Rewire {
        /// The VM.
        vm: VmId,
        /// The NIC.
        mac: Mac,
        /// What becomes of it; asked again, it is so already.
        change: Change,
    },
    /// To the host of a VM that is off: start it. Asked again until it runs.
    Start {
        /// The VM.
        vm: VmId,
        /// An [`Answer::Begun`] was heard: what that came to is wanted, not another start if it failed.
        begun: bool,
    },
}

/// The answer to an [`Ask`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Taken.
    Done,
    /// Not taken: why and what to do.
    Refused(String),
    /// Migrations.
    Migrations(Vec<Status>),
    /// A JSON text.
    Json(String),
    /// The newest record that is known, if any.
    Record(Option<Box<Record>>),
    /// A VM's description.
    Description(Vec<u8>),
    /// Taken, and not done yet: to be asked again.
    Begun,
}
