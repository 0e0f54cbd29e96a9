//! NICs of VMs that are here: connected to wires, disconnected, filtered, as their record says.
//!
//! Owns the way from a request to the kernel. Decides nothing: a change is a decree of the VM's record, wherever it is
//! asked for and whether the VM runs, is off or is about to move. Invariant: a NIC is on a wire only behind its filter;
//! each step can be repeated, and a change that was cut short is finished when the record is looked at again.

use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::core::Core;
use godwit_protocol::id::{Epoch, Mac, VmId};
use godwit_protocol::wire::control::{Answer, Ask};
use godwit_protocol::wire::record::{Cause, Placement, Record};
use godwit_protocol::wire::wiring::{Change, Wiring};
use tokio::time::Instant;

use super::copies::Copy;
use super::node::Node;
use super::{boot, clusters, cutover, off, wires};
use crate::api::types::{ApiError, Done};
use crate::link::Where;
use crate::vmm::{self, ResolvedSpec, resolved::ResolvedNic};

/// How long the voters may take.
const DECREE: Duration = Duration::from_secs(8);
/// How long what passes by itself is waited for: another change of the record, a VM that is between two hosts.
const PASSES: Duration = Duration::from_secs(20);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// `godwit wire connect|disconnect|filter`: the host of the VM is asked, wherever that is by now.
pub(super) async fn change(
    node: &Arc<Node>,
    vm: &str,
    mac: Option<&str>,
    change: Change,
) -> Result<Done, ApiError> {
    let mac = mac.map(|mac| mac.replace(':', "").parse::<Mac>()).transpose();
    let mac = mac.map_err(|_| ApiError::new("that is no NIC's address", "see godwit vm show"))?;
    let (until, mut chosen) = (Instant::now() + PASSES, None);
    loop {
        let (cause, error) = match step(node, vm, mac, &mut chosen, &change).await {
            Ok(mac) => return Ok(Done { done: told(vm, mac, &change) }),
            Err(Failure::Refused(cause)) => (cause, None),
            Err(Failure::NoAnswer(error)) => (String::new(), Some(error)),
        };
        let over = Instant::now() >= until;
        match error {
            Some(error) if over => return Err(error),
            None if over || !clusters::passes(&cause) => {
                let hint = format!("see godwit vm show {vm}; --mac names the NIC");
                return Err(ApiError::new(format!("{vm}: {cause}"), hint));
            }
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

enum Failure {
    Refused(String),
    NoAnswer(ApiError),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::NoAnswer(error)
    }
}

/// Asks once. Which NIC is meant is settled before the first time: repeated, it is the same.
async fn step(
    node: &Arc<Node>,
    vm: &str,
    mac: Option<Mac>,
    chosen: &mut Option<Mac>,
    change: &Change,
) -> Result<Mac, Failure> {
    let route = boot::find_vm(node, vm).await.map_err(|e| Failure::Refused(e.to_string()))?;
    let mac = match *chosen {
        Some(mac) => mac,
        None => {
            let Answer::Record(Some(record)) =
                node.ask_at(route.host, Ask::Record(route.vm)).await?
            else {
                return Err(Failure::Refused("its host has no record of it: ask again".into()));
            };
            let nics = record.placement_of(route.vm).map(|p| p.nics.as_slice());
            let mac = change.choose(nics.unwrap_or_default(), mac).map_err(Failure::Refused)?;
            *chosen.insert(mac)
        }
    };
    let ask = Ask::Rewire { vm: route.vm, mac, change: change.clone() };
    match node.ask_at(route.host, ask).await? {
        Answer::Done => Ok(mac),
        Answer::Refused(cause) => Err(Failure::Refused(cause)),
        _ => Err(Failure::Refused("an answer that makes no sense".into())),
    }
}

fn told(vm: &str, mac: Mac, change: &Change) -> String {
    let nic = format!("NIC {} of {vm}", mac.colons());
    match change {
        Change::Connect(wire) => format!("{nic} is on wire {wire}"),
        Change::Disconnect(wire) => format!("{nic} is not on wire {wire}"),
        Change::Filter(rules) => format!("{nic} has {} rules", rules.len()),
    }
}

/// What is asked of a VM's host. Asked again, it finishes what was decided and not done.
pub(super) async fn begin(
    node: &Arc<Node>,
    vm: VmId,
    mac: Mac,
    change: Change,
) -> Result<(), String> {
    let wanted = change.clone();
    let base = node.with_core(move |core, now| core.rewire(now, vm, mac, &wanted)).await;
    let base = base.map_err(|e| e.to_string())??;
    let record = decided(node, vm, base).await?;
    let nics = record.placement_of(vm).map(|p| p.nics.clone()).unwrap_or_default();
    let mut so = nics.clone();
    change.apply(&mut so, mac)?;
    if so != nics {
        // Two were asked for at once, and this is the record of the other.
        return Err("another change was decided first: ask again".into());
    }
    match here(node, &record, vm) {
        Some((placed, Some(copy))) if !placed.off => follow_record(node, &copy).await,
        Some((placed, _)) if placed.off => tell_off(node, vm).await,
        _ => Ok(()),
    }
    .map_err(|error| format!("it is decided, but not done yet ({error}): ask again"))
}

/// The record that was proposed after `base`, or the newest if nothing was.
async fn decided(node: &Arc<Node>, vm: VmId, base: Option<Epoch>) -> Result<Record, String> {
    let wait = async {
        loop {
            let heard = node.decided.notified();
            let record = node.with_core(move |core, _| core.record_of(vm).cloned()).await;
            let record = record.map_err(|e| e.to_string())?;
            match record.filter(|r| base.is_none_or(|base| r.epoch > base)) {
                Some(record) if base.is_none() || record.cause == Cause::Wires(vm) => {
                    return Ok(record);
                }
                Some(_) => return Err("another change was decided first: ask again".to_owned()),
                None => heard.await,
            }
        }
    };
    let late = |_| "a majority of its voters has not agreed so far: ask again".to_owned();
    tokio::time::timeout(DECREE, wait).await.map_err(late)?
}

/// Where that record places the VM, if it is here, and the copy.
fn here(node: &Node, record: &Record, vm: VmId) -> Option<(Placement, Option<Arc<Copy>>)> {
    let placed = record.placement_of(vm).filter(|p| p.host == node.me)?;
    Some((placed.clone(), node.copies.get(placed.copy)))
}

async fn tell_off(node: &Arc<Node>, vm: VmId) -> Result<(), ApiError> {
    let (copy, spec) = off::kept(node, vm).await.map_err(ApiError::plain)?;
    let node_ = Arc::clone(node);
    node.with_core(move |core, _| off::announce(&node_, core, &spec, copy)).await
}

/// A record was decided: NICs of VMs that are here may be connected otherwise by it.
pub(super) fn heard(node: &Arc<Node>, record: &Record) {
    for placed in record.placement.iter().filter(|p| p.host == node.me && !p.off) {
        let copy = node.copies.get(placed.copy);
        let Some(copy) = copy.filter(|c| differs(&c.nics(), &placed.nics)) else { continue };
        let node = Arc::clone(node);
        tokio::spawn(async move {
            if let Err(error) = follow_record(&node, &copy).await {
                tracing::error!(vm = %copy.spec.name, %error, "its NICs are not as its record says");
            }
        });
    }
}

/// The NICs of a copy that a record names here are connected as the newest one says, and everyone is told.
pub(super) async fn follow_record(node: &Arc<Node>, copy: &Arc<Copy>) -> Result<(), ApiError> {
    // Most often there is nothing to do: no guest waits for another's NICs then.
    let differs = |nics: &Vec<Wiring>| differs(&copy.nics(), nics);
    if newest(node, copy).await?.filter(differs).is_none() {
        return Ok(());
    }
    let _one = node.rewiring.lock().await;
    let Some(nics) = newest(node, copy).await?.filter(differs) else { return Ok(()) };
    let done = wire_up(node, copy, &nics).await;
    if copy.ran() && !copy.qemu().is_still() {
        wires::tell(node, copy).await?;
    }
    done
}

/// What the newest record that names the copy says of its NICs.
async fn newest(node: &Arc<Node>, copy: &Copy) -> Result<Option<Vec<Wiring>>, ApiError> {
    let (vm, id, me) = (copy.vm(), copy.id, node.me);
    let newest = move |core: &mut Core, _| {
        let record = core.record_of(vm).filter(|r| r.places(vm, me, id))?;
        record.placement_of(vm).map(|p| p.nics.clone())
    };
    node.with_core(newest).await
}

/// Before the stop: the NICs of a copy that arrives are connected like that.
pub(super) async fn follow(
    node: &Arc<Node>,
    copy: &Arc<Copy>,
    nics: &[Wiring],
) -> Result<(), ApiError> {
    let _one = node.rewiring.lock().await;
    wire_up(node, copy, nics).await
}

/// Connects a copy's NICs like that, each whatever becomes of the others: one that cannot be is on no wire.
async fn wire_up(node: &Arc<Node>, copy: &Arc<Copy>, wanted: &[Wiring]) -> Result<(), ApiError> {
    let old = copy.nics();
    let mut new = old.clone();
    by_record(&mut new, wanted);
    if new == old {
        return Ok(());
    }
    let mut failed = None;
    // One that only shows its disks has no NIC that anybody could reach.
    let kernel = !copy.qemu().is_still();
    // What is taken away goes first.
    let gives = |i: &usize| new[*i].wire.is_some() && new[*i].wire != old[*i].wire;
    let changed = (0..old.len()).filter(|i| kernel && old[*i] != new[*i]);
    let (last, first): (Vec<_>, Vec<_>) = changed.partition(gives);
    for i in first.into_iter().chain(last) {
        if let Err(error) = rewire(node, copy, &old[i], &new[i]).await {
            new[i].wire = None;
            failed.get_or_insert(error);
        }
    }
    keep(copy, new).await?;
    failed.map_or(Ok(()), Err)
}

async fn rewire(
    node: &Arc<Node>,
    copy: &Copy,
    old: &ResolvedNic,
    new: &ResolvedNic,
) -> Result<(), ApiError> {
    let (mac, vm) = (&old.mac, copy.vm());
    if let Some(wire) = old.wire.as_ref().filter(|_| old.wire != new.wire) {
        // The kernel first: a daemon that ends here finds the NIC connected, and begins again.
        wires::set(node, wire, mac, Where::None).await;
        cutover::unwired(node, copy.id, wire, mac).await;
        node.links.detach(wire, mac, vm).await.map_err(ApiError::plain)?;
    }
    let Some(wire) = &new.wire else { return Ok(()) };
    if !node.carries(wire) {
        wires::ensure(node, wire).await?;
    }
    let attached = attach(node, copy, new).await;
    if attached.is_err() {
        let _ = node.links.detach(wire, mac, vm).await;
    }
    attached
}

/// Makes NICs what a record says of them; one of which it does not speak is on no wire.
pub(super) fn by_record(nics: &mut [ResolvedNic], wanted: &[Wiring]) {
    for nic in nics {
        let said = wanted.iter().find(|w| w.mac == nic.mac);
        nic.wire = said.and_then(|w| w.wire.clone());
        nic.filter = said.map(|w| w.filter.clone()).unwrap_or_default();
    }
}

fn differs(nics: &[ResolvedNic], wanted: &[Wiring]) -> bool {
    let mut said = nics.to_vec();
    by_record(&mut said, wanted);
    said != nics
}

/// What a record says of a VM's NICs, from its description.
pub(super) fn wiring(spec: &ResolvedSpec) -> Vec<Wiring> {
    let one = |nic: &ResolvedNic| Wiring {
        mac: nic.mac,
        wire: nic.wire.clone(),
        filter: nic.filter.clone(),
    };
    spec.nics.iter().map(one).collect()
}

/// After a restart: what was under way is finished.
pub(super) async fn adopt(node: &Arc<Node>, copy: &Arc<Copy>, record: Option<&Record>) {
    let places = |r: &&Record| r.places(copy.vm(), node.me, copy.id);
    let placed = record.filter(places).and_then(|r| r.placement_of(copy.vm()));
    for wire in placed.iter().flat_map(|p| &p.nics).filter_map(|nic| nic.wire.as_ref()) {
        wires::adopt(node, wire).await;
    }
    if let Some(placed) = placed
        && let Err(error) = wire_up(node, copy, &placed.nics).await
    {
        tracing::error!(vm = %copy.spec.name, %error, "its NICs are not as its record says");
    }
    for nic in copy.nics() {
        if let Err(error) = attach(node, copy, &nic).await {
            tracing::error!(nic = %nic.mac.colons(), error = %error.message, "not connected");
        }
    }
}

/// The NIC's tap is on its wire, behind its filter; if its guest runs here, its frames come here. Without its filter
/// none come.
async fn attach(node: &Node, copy: &Copy, nic: &ResolvedNic) -> Result<(), ApiError> {
    let Some(wire) = &nic.wire else { return Ok(()) };
    let (mac, filter) = (&nic.mac, &nic.filter);
    let attached = node.links.attach(wire, mac, copy.vm(), filter).await;
    if attached.is_err() {
        wires::set(node, wire, mac, Where::None).await;
    } else if copy.ran() && node.cutovers.held((wires::tag(wire), *mac)).is_none() {
        wires::set(node, wire, mac, Where::Local).await;
    }
    attached.map_err(ApiError::plain)
}

async fn keep(copy: &Arc<Copy>, nics: Vec<ResolvedNic>) -> Result<(), ApiError> {
    let (dir, kept) = (copy.dir.clone(), nics.clone());
    let written = tokio::task::spawn_blocking(move || vmm::record::rewire(&dir, kept)).await;
    written.map_err(ApiError::plain)?.map_err(ApiError::plain)?;
    copy.set_nics(nics);
    Ok(())
}
