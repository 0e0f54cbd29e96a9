//! NICs of VMs that run here: connected to a wire, disconnected, filtered.
//!
//! Owns the order of the steps. Decides nothing: a change is a decree of the VM's record, so that nobody follows an
//! older route, and a move begins before or after it. Invariant: a NIC is on a wire only behind its filter; each
//! step can be repeated, and a change that was cut short is finished by asking again.

use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::id::{Epoch, Mac, Name, VmId};
use godwit_protocol::limits::RULES;
use godwit_protocol::wire::filter::Rule;
use godwit_protocol::wire::record::Cause;

use super::copies::Copy;
use super::node::Node;
use super::{boot, wires};
use crate::api::types::{ApiError, Done};
use crate::link::Where;
use crate::vmm::{self, resolved::ResolvedNic};

/// How long the voters may take.
const DECREE: Duration = Duration::from_secs(15);

/// `godwit wire connect`.
pub(super) async fn connect(
    node: &Arc<Node>,
    vm: &str,
    wire: &Name,
    mac: Option<&str>,
) -> Result<Done, ApiError> {
    let _one = node.rewiring.lock().await;
    let copy = boot::local(node, vm).await?;
    let mut nics = copy.nics();
    // Also one that is there already: the last time may have been cut short.
    let fits = |nic: &ResolvedNic| nic.wire.as_ref().is_none_or(|w| w == wire);
    let nic = one(&nics, mac, fits, |nic| nic.wire.is_none()).ok_or_else(|| {
        ApiError::new(
            format!("{vm} has no such NIC that is free for wire {wire}"),
            "see godwit vm show; disconnect one first, name it with --mac, or give the VM a [[nic]] without a wire",
        )
    })?;
    wires::ensure(node, wire).await?;
    nics[nic].wire = Some(wire.clone());
    let epoch = decree(node, copy.vm()).await?;
    keep(&copy, nics.clone()).await?;
    let nic = &nics[nic];
    attach(node, &copy, nic).await?;
    wires::tell(node, &copy, epoch).await?;
    Ok(Done { done: format!("NIC {} of {vm} is on wire {wire}", nic.mac.colons()) })
}

/// `godwit wire disconnect`.
pub(super) async fn disconnect(
    node: &Arc<Node>,
    vm: &str,
    wire: &Name,
    mac: Option<&str>,
) -> Result<Done, ApiError> {
    let _one = node.rewiring.lock().await;
    let copy = boot::local(node, vm).await?;
    let mut nics = copy.nics();
    let fits = |nic: &ResolvedNic| nic.wire.as_ref() == Some(wire);
    let nic = one(&nics, mac, fits, |_| true).ok_or_else(|| {
        ApiError::new(
            format!("no NIC of {vm}, or more than one, is on wire {wire}"),
            "see godwit vm show; name it with --mac",
        )
    })?;
    let mac = nics[nic].mac;
    nics[nic].wire = None;
    let epoch = decree(node, copy.vm()).await?;
    // The kernel first: a daemon that ends here finds the NIC connected, and connects it again.
    wires::set(node, wire, &mac, Where::None).await;
    node.links.detach(wire, &mac, copy.vm()).await.map_err(ApiError::plain)?;
    keep(&copy, nics).await?;
    wires::tell(node, &copy, epoch).await?;
    Ok(Done { done: format!("NIC {} of {vm} is on no wire", mac.colons()) })
}

/// `godwit wire filter`.
pub(super) async fn filter(
    node: &Arc<Node>,
    vm: &str,
    mac: Option<&str>,
    rules: &[String],
) -> Result<Done, ApiError> {
    let rules: Vec<Rule> =
        rules.iter().map(|r| r.parse()).collect::<Result<_, _>>().map_err(ApiError::plain)?;
    if rules.len() > RULES {
        return Err(ApiError::plain(format!("a NIC has at most {RULES} rules")));
    }
    let _one = node.rewiring.lock().await;
    let copy = boot::local(node, vm).await?;
    let mut nics = copy.nics();
    let nic = one(&nics, mac, |_| true, |_| true).ok_or_else(|| {
        ApiError::new(
            format!("{vm} has not just one such NIC"),
            "name it with --mac: see godwit vm show",
        )
    })?;
    let count = rules.len();
    nics[nic].filter = rules;
    let epoch = decree(node, copy.vm()).await?;
    if let Some(wire) = &nics[nic].wire {
        let set = node.links.set_filter(wire, &nics[nic].mac, &nics[nic].filter).await;
        set.map_err(ApiError::plain)?;
    }
    keep(&copy, nics.clone()).await?;
    wires::tell(node, &copy, epoch).await?;
    Ok(Done { done: format!("NIC {} of {vm} has {count} rules", nics[nic].mac.colons()) })
}

/// After a restart: what was under way is finished.
pub(super) async fn adopt(node: &Node, copy: &Copy) {
    for nic in copy.nics() {
        if let Err(error) = attach(node, copy, &nic).await {
            tracing::error!(nic = %nic.mac.colons(), error = %error.message, "not connected");
        }
    }
}

/// The NIC's tap is on its wire, behind its filter, and its frames come here.
async fn attach(node: &Node, copy: &Copy, nic: &ResolvedNic) -> Result<(), ApiError> {
    let Some(wire) = &nic.wire else { return Ok(()) };
    let (mac, filter) = (&nic.mac, &nic.filter);
    node.links.attach(wire, mac, copy.vm(), filter).await.map_err(ApiError::plain)?;
    wires::set(node, wire, mac, Where::Local).await;
    Ok(())
}

/// The NIC that is meant: by its address, else the only one of those that fit, `rather` these.
fn one(
    nics: &[ResolvedNic],
    mac: Option<&str>,
    fits: impl Fn(&ResolvedNic) -> bool,
    rather: impl Fn(&ResolvedNic) -> bool,
) -> Option<usize> {
    let wanted = mac.map(|mac| mac.replace(':', "").parse::<Mac>().ok());
    let fits = |nic: &ResolvedNic| fits(nic) && wanted.is_none_or(|mac| mac == Some(nic.mac));
    let of = |filter: &dyn Fn(&ResolvedNic) -> bool| {
        let found = nics.iter().enumerate().filter(|(_, nic)| filter(nic));
        found.map(|(index, _)| index).collect::<Vec<_>>()
    };
    match (of(&|nic| fits(nic) && rather(nic)).as_slice(), of(&fits).as_slice()) {
        ([one], _) | ([], [one]) => Some(*one),
        _ => None,
    }
}

/// The next record of the VM: the same, one epoch later.
async fn decree(node: &Arc<Node>, vm: VmId) -> Result<Epoch, ApiError> {
    let base = node.with_core(move |core, now| core.rewire(now, vm)).await?;
    let base = base.map_err(ApiError::plain)?;
    let wait = async {
        loop {
            let heard = node.decided.notified();
            let record = node.with_core(move |core, _| core.record_of(vm).cloned()).await?;
            if let Some(record) = record.filter(|r| r.epoch > base) {
                return Ok::<_, ApiError>(record);
            }
            heard.await;
        }
    };
    let record = tokio::time::timeout(DECREE, wait).await.map_err(|_| {
        ApiError::new(
            "a majority of the VM's voters does not answer",
            "ask again: repeating it is safe",
        )
    })??;
    if record.cause != Cause::Wires(vm) {
        return Err(ApiError::new("another change of the VM was decided first", "ask again"));
    }
    Ok(record.epoch)
}

async fn keep(copy: &Arc<Copy>, nics: Vec<ResolvedNic>) -> Result<(), ApiError> {
    let (dir, kept) = (copy.dir.clone(), nics.clone());
    let written = tokio::task::spawn_blocking(move || vmm::record::rewire(&dir, kept)).await;
    written.map_err(ApiError::plain)?.map_err(ApiError::plain)?;
    copy.set_nics(nics);
    Ok(())
}
