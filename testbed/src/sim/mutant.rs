//! What is wrong on purpose: proof that the checkers bite.
//!
//! Owns the list. Each mutant is a wrapper around the production core, in this crate alone: it drops,
//! delays or changes what the core says, or does to a QEMU what the core did not ask for. Each names the
//! invariant whose checker catches it, and from which seed on it is looked for.

use super::check::Invariant;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// Nothing.
    None,
    /// The source resumes after everyone it reaches still names it.
    CleanRead,
    /// The destination runs as soon as it has loaded.
    ContEarly,
    /// The bound flag never reaches the disk.
    Unbound,
    /// Votes reach the disk after they were spoken.
    VoteEarly,
    /// A restart forgets what was promised and accepted, and votes under the same name.
    Forgets,
    /// The source copy goes when the move is decided.
    DiscardEarly,
    /// What a voter has accepted is not told to the next proposer.
    NoAdoption,
    /// A voter votes on an epoch without the record before it.
    NewVoter,
    /// The source resumes when the connection is lost after it has stopped.
    LostReply,
    /// A record is taken to name a host, not a copy.
    HostOnly,
    /// A VM is added to a cluster with a record below the VM's own ones.
    MergeBelow,
    /// The proposer waits for its own member only.
    Alone,
    /// What crosses is what the guest held before it was stopped.
    EarlyRead,
    /// A bound end does nothing unless somebody speaks to it.
    Sleepy,
    /// A route is told once; nobody compares.
    ToldOnce,
    /// A vote counts whoever brings it.
    AnyVote,
    /// The plug is taken off before the tail was injected.
    UnplugEarly,
    /// What a record says of NICs is not looked at again before a guest runs.
    StaleNics,
}

/// A mutant, its name, who catches it, and the first seed that is tried.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What is wrong.
    pub mutant: Mutant,
    /// Its name on the command line.
    pub name: &'static str,
    /// Any of these is the right reason.
    pub caught_by: &'static [Invariant],
    /// A seed that catches it.
    pub seed: u64,
}

/// How many seeds from the first one are tried.
pub const TRIED: u64 = 1000;

const fn case(
    mutant: Mutant,
    name: &'static str,
    caught_by: &'static [Invariant],
    seed: u64,
) -> Case {
    Case { mutant, name, caught_by, seed }
}

/// All of them.
pub const ALL: &[Case] = &[
    case(Mutant::CleanRead, "resume-after-clean-read", &[Invariant::OneCopy], 0),
    case(Mutant::ContEarly, "run-when-loaded", &[Invariant::OneCopy], 0),
    case(Mutant::Unbound, "bound-flag-not-written", &[Invariant::OneCopy], 0),
    case(Mutant::VoteEarly, "vote-before-persist", &[Invariant::Epochs, Invariant::OneCopy], 460),
    case(Mutant::Forgets, "promise-lost-in-restart", &[Invariant::Epochs], 0),
    case(Mutant::DiscardEarly, "discard-source-at-decision", &[Invariant::OneCopy], 0),
    case(Mutant::NoAdoption, "skip-adoption", &[Invariant::Epochs], 440),
    case(Mutant::NewVoter, "new-voter-without-record", &[Invariant::Epochs], 7700),
    case(Mutant::LostReply, "resume-on-lost-reply", &[Invariant::OneCopy], 0),
    case(Mutant::HostOnly, "placement-without-copy", &[Invariant::OneCopy, Invariant::Content], 0),
    case(Mutant::MergeBelow, "merge-below-epoch", &[Invariant::Epochs], 0),
    case(Mutant::Alone, "propose-for-one-member", &[Invariant::Teams], 130),
    case(Mutant::EarlyRead, "read-before-stop", &[Invariant::Content], 0),
    case(Mutant::Sleepy, "no-deadline-when-bound", &[Invariant::Ends], 0),
    case(Mutant::ToldOnce, "no-anti-entropy", &[Invariant::Routes], 0),
    case(Mutant::UnplugEarly, "unplug-before-tail", &[Invariant::Frames], 0),
    case(Mutant::StaleNics, "run-behind-old-filter", &[Invariant::Wiring], 0),
    case(Mutant::AnyVote, "votes-of-strangers", &[Invariant::Strangers, Invariant::Epochs], 0),
];

/// The one of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Case> {
    ALL.iter().find(|c| c.name == name)
}
