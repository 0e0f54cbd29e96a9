//! Hosts that are about to go: drained by themselves, or revoked by another.
//!
//! Owns the order: first their votes move to other hosts, then they go. The core moves the votes; here it
//! is asked for and waited for.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::join_all;
use godwit_protocol::core::Core;
use godwit_protocol::id::{HostId, Name};
use godwit_protocol::time::Time;
use godwit_protocol::wire::control::{Answer, Ask};
use godwit_protocol::wire::route::{Kind, Route};
use tokio::time::Instant;

use super::migrate;
use super::node::{DriverError, Node};
use crate::api::types::{ApiError, Done, Drained};
use crate::store::Hard;

/// How long votes may take to move to other hosts.
const MOVED: Duration = Duration::from_secs(30);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Where it is stored that this host is drained.
const KEY: &[u8] = b"drain";

/// Whether this host was drained before its node was started.
pub(super) fn was_drained(hard: &Hard) -> Result<bool, DriverError> {
    Ok(hard.get(KEY).map_err(DriverError::of)?.is_some())
}

/// `godwit drain`.
pub(super) async fn drain(node: &Arc<Node>, undo: bool) -> Result<Drained, ApiError> {
    node.keep(KEY.to_vec(), (!undo).then(|| vec![1])).await?;
    node.draining.store(!undo, Ordering::SeqCst);
    let me = node.me;
    let until = Instant::now() + if undo { Duration::ZERO } else { MOVED };
    loop {
        let (votes, vms) = node
            .with_core(move |core, now| {
                core.leaving(now, !undo);
                let votes: Vec<Name> = core.voted_by(me).map(|r| r.name.clone()).collect();
                let vm = |r: &&Route| r.kind == Kind::Vm;
                let vms = core.routes().of_host(me).filter(vm).map(|r| r.name.clone());
                (votes, vms.collect::<Vec<Name>>())
            })
            .await?;
        if votes.is_empty() || Instant::now() >= until {
            return Ok(drained(node, undo, votes, vms));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn drained(node: &Node, undo: bool, votes: Vec<Name>, vms: Vec<Name>) -> Drained {
    let host = &node.name;
    let done = match (undo, votes.is_empty(), vms.is_empty()) {
        (true, ..) => format!("{host} is a host like any other again"),
        (false, false, _) => format!(
            "{host} takes no VMs, but still votes on {}: no other host can take its place",
            list(&votes)
        ),
        (false, true, false) => format!(
            "{host} votes on nothing and takes no VMs; move those that it runs: {}",
            list(&vms)
        ),
        (false, true, true) => format!("{host} votes on nothing and runs nothing: it can go"),
    };
    Drained { done, draining: !undo, votes, vms }
}

fn list(names: &[Name]) -> String {
    names.iter().map(|n| n.as_str().to_owned()).collect::<Vec<_>>().join(", ")
}

/// `godwit revoke`.
pub(super) async fn revoke(node: &Arc<Node>, text: &str, now: bool) -> Result<Done, ApiError> {
    let host = migrate::host(node, text)?;
    if !now {
        let vms = node
            .with_core(move |core, _| {
                let vm = |r: &&Route| r.kind == Kind::Vm;
                core.routes().of_host(host).filter(vm).map(|r| r.name.clone()).collect::<Vec<_>>()
            })
            .await?;
        if !vms.is_empty() {
            return Err(ApiError::new(
                format!("VMs run on {text}: {}", list(&vms)),
                format!("move them first, or godwit revoke {text} --now"),
            ));
        }
        unseat(node, host).await.map_err(|left| {
            ApiError::new(
                format!("{text} still votes on {}: no other host can take its place", list(&left)),
                format!("let another host join, or godwit revoke {text} --now"),
            )
        })?;
    }
    node.net.revoke(host).await.map_err(ApiError::plain)?;
    Ok(Done { done: format!("{text} is revoked, for ever") })
}

/// Has the votes of a host moved to others; an error with what it still votes on, and it may vote again.
async fn unseat(node: &Arc<Node>, host: HostId) -> Result<(), Vec<Name>> {
    let until = Instant::now() + MOVED;
    loop {
        let left = tell(node, host, true).await;
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            tell(node, host, false).await;
            return Err(left.into_iter().collect());
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn tell(node: &Arc<Node>, host: HostId, unfit: bool) -> BTreeSet<Name> {
    let hosts: Vec<HostId> = node.reachable().into_iter().filter(|h| *h != host).collect();
    let mut asked = Vec::with_capacity(hosts.len());
    for at in hosts {
        asked.push(node.ask_at(at, Ask::Unfit { host, unfit }));
    }
    let told = join_all(asked).await;
    let names = |answer| match answer {
        Ok(Answer::Json(text)) => serde_json::from_str::<Vec<Name>>(&text).unwrap_or_default(),
        // One that is away will hear of the revocation itself.
        _ => Vec::new(),
    };
    told.into_iter().flat_map(names).collect()
}

/// Another node's question: that host shall not vote. Answers what this node looks after and it votes on.
pub(super) fn unfit(core: &mut Core, now: Time, host: HostId, unfit: bool) -> Answer {
    if unfit {
        core.unfit(now, host);
    } else {
        core.fit_again(now, host);
    }
    let records: Vec<_> = core.voted_by(host).cloned().collect();
    let names: Vec<&Name> =
        records.iter().filter(|r| core.looks_after(now, r)).map(|r| &r.name).collect();
    Answer::Json(serde_json::to_string(&names).unwrap_or_default())
}
