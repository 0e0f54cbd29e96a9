//! Questions between nodes: who waits for which answer, and what this node answers.
//!
//! Owns the table of open questions. Bounded; every question has a deadline.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use godwit_protocol::core::Core;
use godwit_protocol::id::HostId;
use godwit_protocol::time::Time;
use godwit_protocol::wire::control::{Answer, Ask, Control};
use tokio::sync::oneshot;

use super::node::Node;
use super::{destination, group, leave, migrate, nics, on};
use crate::api::types::ApiError;

/// Questions that may be open at once.
const OPEN: usize = 1024;
/// Migrations in one answer: as many as the core remembers.
const ANSWERED: usize = 256;
/// How long a node may take to answer.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// Open questions of this node.
#[derive(Default)]
pub(super) struct Asks {
    next: AtomicU64,
    open: Mutex<BTreeMap<u64, (HostId, oneshot::Sender<Answer>)>>,
}

impl Asks {
    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (HostId, oneshot::Sender<Answer>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer came; one from another host than was asked is dropped.
    pub fn answered(&self, from: HostId, number: u64, answer: Answer) {
        let mut open = self.table();
        if open.get(&number).is_some_and(|(asked, _)| *asked == from)
            && let Some((_, tell)) = open.remove(&number)
        {
            // The asker may have given up.
            let _ = tell.send(answer);
        }
    }

    /// The connection to a host is gone, and with it what was asked of it.
    pub fn gone(&self, host: HostId) {
        self.table().retain(|_, (asked, _)| *asked != host);
    }
}

impl Node {
    /// Asks another node and waits for the answer.
    pub async fn ask(&self, host: HostId, ask: Ask) -> Result<Answer, ApiError> {
        let number = self.asks.next.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = oneshot::channel();
        {
            let mut open = self.asks.table();
            if open.len() >= OPEN {
                return Err(ApiError::plain("too many questions are open: try again"));
            }
            open.insert(number, (host, tell));
        }
        let unreachable = || {
            ApiError::new(
                format!("{} does not answer", self.host_name(host)),
                "see godwit hosts; the request can be repeated safely",
            )
        };
        let answer = match self.net.send(host, Control::Ask { number, ask }) {
            Ok(()) => tokio::time::timeout(ANSWER, told).await.ok().and_then(Result::ok),
            Err(_) => None,
        };
        self.asks.table().remove(&number);
        answer.ok_or_else(unreachable)
    }
}

impl Node {
    /// Asks a host, which may be this one.
    pub async fn ask_at(self: &Arc<Self>, host: HostId, ask: Ask) -> Result<Answer, ApiError> {
        if host != self.me {
            return self.ask(host, ask).await;
        }
        let (node, me) = (Arc::clone(self), self.me);
        match self.with_core(move |core, now| at_once(&node, core, now, me, ask)).await? {
            Ok(answer) => Ok(answer),
            Err(ask) => slowly(self, me, ask).await,
        }
    }
}

/// Answers another node's question.
pub(super) fn answer(
    node: &Arc<Node>,
    core: &mut Core,
    now: Time,
    from: HostId,
    number: u64,
    ask: Ask,
) {
    match at_once(node, core, now, from, ask) {
        Ok(answer) => reply(node, from, number, answer),
        Err(ask) => {
            let node = Arc::clone(node);
            tokio::spawn(async move {
                // Fails only when the engine has ended.
                if let Ok(answer) = slowly(&node, from, ask).await {
                    reply(&node, from, number, answer);
                }
            });
        }
    }
}

fn taken(result: Result<(), String>) -> Answer {
    match result {
        Ok(()) => Answer::Done,
        Err(cause) => Answer::Refused(cause),
    }
}

/// Short work, done on the core; a question that takes longer comes back.
fn at_once(
    node: &Arc<Node>,
    core: &mut Core,
    now: Time,
    from: HostId,
    ask: Ask,
) -> Result<Answer, Box<Ask>> {
    Ok(match ask {
        Ask::Migrate { vm, .. } | Ask::Describe(vm) if core.is_releasing(vm) => {
            return Err(Box::new(ask));
        }
        Ask::Describe(_) | Ask::Fits { .. } | Ask::Rewire { .. } | Ask::Start { .. } => {
            return Err(Box::new(ask));
        }
        Ask::Migrate { id, vm, target, options } => {
            taken(migrate::lead(node, core, now, migrate::Wanted { id, vm, target, options, from }))
        }
        Ask::MigrateCluster { id, cluster, members, options } => {
            let wanted = group::Wanted { id, cluster, members, options, from };
            taken(match core.newest(cluster).cloned() {
                Some(record) => core.request_cluster(now, group::begin(node.me, record, wanted)),
                None => Err("this host holds no record of the cluster".into()),
            })
        }
        Ask::Abort(id) => taken(core.abort(now, id)),
        Ask::Migrations(id) => Answer::Migrations(
            core.statuses()
                .filter(|s| id.is_none_or(|id| migrate::is_of(s, id)))
                .take(ANSWERED)
                .map(|s| node.with_timeline(s.clone(), id.is_some()))
                .collect(),
        ),
        Ask::Host => Answer::Json(migrate::host_json(node)),
        Ask::Record(id) => Answer::Record(core.record_of(id).cloned().map(Box::new)),
        Ask::Join { vm, cluster } => taken(core.join(now, vm, *cluster)),
        Ask::Release { cluster, vms } => taken(core.release(now, cluster, &vms, false)),
        Ask::Dissolve(cluster) => taken(core.dissolve(now, cluster)),
        Ask::Unfit { host, unfit } => leave::unfit(core, now, host, unfit),
    })
}

/// Work off the engine.
async fn slowly(node: &Arc<Node>, from: HostId, ask: Box<Ask>) -> Result<Answer, ApiError> {
    Ok(match *ask {
        Ask::Migrate { id, vm, target, options } => {
            migrate::settled(node, vm).await;
            let (lead, wanted) =
                (Arc::clone(node), migrate::Wanted { id, vm, target, options, from });
            taken(node.with_core(move |core, now| migrate::lead(&lead, core, now, wanted)).await?)
        }
        Ask::Describe(vm) => {
            migrate::settled(node, vm).await;
            match migrate::describe(node, vm).await {
                Ok((description, _)) => Answer::Description(description),
                Err(cause) => Answer::Refused(cause),
            }
        }
        Ask::Fits { spec, beside_bytes } => {
            taken(destination::would_take(node, &spec, beside_bytes).await)
        }
        Ask::Rewire { vm, mac, change } => taken(nics::begin(node, vm, mac, change).await),
        Ask::Start { vm, begun } => {
            on::begin(node, vm, begun).await.unwrap_or_else(Answer::Refused)
        }
        _ => Answer::Refused("this question makes no sense here".into()),
    })
}

fn reply(node: &Node, from: HostId, number: u64, answer: Answer) {
    if let Err(error) = node.net.send(from, Control::Answer { number, answer }) {
        tracing::debug!(%from, %error, "answer not sent");
    }
}
