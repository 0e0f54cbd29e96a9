//! The source's work of a migration: QEMU's mirrors and stream go into the relay, the relay crosses
//! the WAN.
//!
//! Owns the sessions of one outgoing migration. Decides nothing: it measures and obeys.

use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::chunk::ChunkKey;
use godwit_protocol::id::HostId;
use godwit_protocol::migrate::{Happened, Progress, wait};
use godwit_protocol::wire::migrate::Options;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use super::copies::Copy;
use super::hold;
use super::mirrors::{self, Images, Mirrors};
use super::node::wall_us;
use super::throttle::Throttle;
use super::worker::Worker;
use super::{bulk, cutover, off};
use crate::relay::{
    RelayError, SourceEnd, SourceHandle, SourceParams, SourceProgress, SourceSession,
};
use crate::vmm::commands::RamInfo;
use crate::vmm::{Outgoing, RAM_BLOCK};

/// How often the core hears figures.
const FIGURES: Duration = Duration::from_millis(100);

/// How long QEMU may take to connect to the relay.
const ACCEPT: Duration = Duration::from_secs(10);
/// How long a cut of the bulk connection may last.
const RECONNECT: Duration = Duration::from_secs(60);
/// How long QEMU may take to end a migration that was cancelled.
const CANCEL: Duration = Duration::from_secs(5);

/// How long QEMU may take from the stop to where its disks can be taken over.
const SWITCHOVER: Duration = Duration::from_secs(10);

/// What is taken for the path of a guest that is off as long as nothing is measured, bytes per second.
const STILL_BYTES_PER_S: u64 = 100_000;

/// One outgoing migration.
pub(super) struct Sending {
    copy: Arc<Copy>,
    pub to: HostId,
    session: Arc<SourceHandle>,
    mirrors: Arc<Mirrors>,
    /// What the user allows, bytes per second; 0: no limit.
    limit: u64,
    tasks: Vec<JoinHandle<()>>,
}

impl Sending {
    /// What this exchange may take of the path from now on, bytes per second; 0: what the path gives.
    pub(super) fn pace(&self, share: u64) {
        self.session.set_bandwidth(least(self.limit, share));
    }
}

/// The lower of two limits, of which 0 is none.
fn least(a: u64, b: u64) -> u64 {
    if a == 0 || b == 0 { a.max(b) } else { a.min(b) }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.session.abort();
    }
}

impl Worker {
    /// Dials the destination, copies the disks, then lets QEMU stream.
    pub(super) async fn transfer(&mut self, to: HostId, options: Options) -> Result<(), String> {
        off::settled(&self.node, self.vm).await?;
        // Counted in before its pages come: those of a cluster's other members are, too.
        let seat = self.node.relaying.join();
        let copy = match self.node.copies.running(self.vm) {
            Some(copy) => copy,
            None => off::show_disks(&self.node, self.vm).await?,
        };
        let socket = copy.dir.join("out.sock");
        if !copy.qemu().is_still() {
            cutover::leave(&self.node, self.id, &copy, to).await;
        }
        let _ = std::fs::remove_file(&socket);
        let listener =
            UnixListener::bind(&socket).map_err(|e| format!("{}: {e}", socket.display()))?;
        let connect = bulk::connector(&self.node, to, self.id);
        let images = Images::export(&copy).await?;
        let params = SourceParams {
            seat,
            listener,
            connect,
            key: ChunkKey(self.node.chunk_key),
            ram_block: RAM_BLOCK.into(),
            ram_bytes: copy.spec.memory,
            disks: images.readers().await?,
            migration: self.id,
            bandwidth: options.bandwidth_bytes_per_s,
            accept_deadline: Duration::from_millis(wait::TRANSFER_MS) + ACCEPT,
            reconnect_deadline: RECONNECT,
        };
        let mut session = SourceSession::spawn(params).map_err(|e| e.to_string())?;
        let finished = std::mem::replace(&mut session.finished, tokio::spawn(pending()));
        let session = Arc::new(session);
        let speed = options.disk_bandwidth_bytes_per_s;
        let mirrors = Arc::new(Mirrors::start(&copy, images, session.inlets(), speed).await?);
        let limit = options.bandwidth_bytes_per_s;
        let tasks = vec![
            self.watch_figures(&session, &copy, &mirrors, limit),
            self.watch_end(finished),
            self.stream_when_copied(&copy, socket, &mirrors),
        ];
        self.sending = Some(Sending { copy, to, session, mirrors, limit, tasks });
        Ok(())
    }

    /// Memory follows once the disks are copied: what they brought need not cross again, and the
    /// guest changes its memory faster than its disks.
    fn stream_when_copied(
        &self,
        copy: &Arc<Copy>,
        socket: PathBuf,
        mirrors: &Arc<Mirrors>,
    ) -> JoinHandle<()> {
        let (node, id, qemu) = (Arc::clone(&self.node), self.id, copy.qemu());
        let (mirrors, disks) = (Arc::clone(mirrors), copy.spec.moving().next().is_some());
        tokio::spawn(async move {
            if disks {
                let copied = mirrors.wait_copied().await;
                if let Err(cause) = copied {
                    return node.happened(id, Happened::TransferFailed(cause)).await;
                }
                node.moment(id, "the disks are copied, memory begins");
            }
            let pause_before_switchover = disks || qemu.is_still();
            let how = Outgoing { pause_before_switchover, ..Outgoing::default() };
            if let Err(error) = qemu.outgoing_start(&socket, how).await {
                node.happened(id, Happened::TransferFailed(error.to_string())).await;
            }
        })
    }

    /// Tells the core figures until the guest is stopped.
    fn watch_figures(
        &self,
        session: &Arc<SourceHandle>,
        copy: &Arc<Copy>,
        mirrors: &Arc<Mirrors>,
        limit: u64,
    ) -> JoinHandle<()> {
        let (node, id, session) = (Arc::clone(&self.node), self.id, Arc::clone(session));
        let (qemu, mirrors) = (copy.qemu(), Arc::clone(mirrors));
        let mut throttle = Throttle::new(Arc::clone(copy));
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(FIGURES);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let progress = session.progress();
            let mut cost = Cost::default();
            loop {
                tick.tick().await;
                let now = *progress.borrow();
                cost.learn(&now);
                let Ok(info) = qemu.query_migrate().await else { continue };
                let copied = match mirrors.copied().await {
                    Ok(copied) => copied,
                    Err(cause) => {
                        return node.happened(id, Happened::TransferFailed(cause)).await;
                    }
                };
                throttle.follow(&now, &copied, cost.ppm()).await;
                let waits = qemu.is_still() && info.is_before_switchover();
                let mut figures = figures(&now, &cost, &info.ram.unwrap_or_default());
                if waits {
                    still(&mut figures);
                }
                figures.link_bytes_per_s = least(limit, figures.link_bytes_per_s);
                figures.disk_bytes = copied.bytes;
                figures.disk_left_bytes = copied.left;
                figures.disks_ready = copied.ready;
                figures.disk_throttle_bytes_per_s = throttle.limit();
                figures.disk_throttled_ms = throttle.spent_ms();
                node.happened(id, Happened::Progress(figures)).await;
            }
        })
    }

    /// Tells the core when the session cannot go on. A good end is told by the destination.
    fn watch_end(&self, finished: JoinHandle<Result<SourceEnd, RelayError>>) -> JoinHandle<()> {
        let (node, id) = (Arc::clone(&self.node), self.id);
        tokio::spawn(async move {
            let cause = match finished.await {
                Ok(Ok(_)) => return,
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            node.happened(id, Happened::TransferFailed(cause)).await;
        })
    }

    /// QMP `stop` is the gate: what follows is the last of the disks and of the stream.
    pub(super) async fn stop(&mut self) -> Result<u64, String> {
        let sending = self.sending.as_ref().ok_or("there is no transfer")?;
        sending.tasks.iter().for_each(JoinHandle::abort);
        // All members are stopped together: none is held back for another now.
        sending.session.set_bandwidth(sending.limit);
        sending.session.brace();
        // Before the stop, while the guest still empties its taps.
        let rest = cutover::hold(&self.node, &sending.copy).await;
        hold::at("held").await;
        // Before the stop: QEMU waits in it for what its mirrors have under way.
        sending.session.begin_cutover();
        let qemu = sending.copy.qemu();
        let at = qemu.stop().await.map_err(|e| e.to_string())?;
        rest.stopped(&self.node);
        if sending.copy.spec.moving().next().is_some() || qemu.is_still() {
            qemu.wait_pre_switchover(SWITCHOVER).await.map_err(|e| e.to_string())?;
            hold::at("mirrored").await;
            sending.mirrors.finish().await?;
            qemu.migrate_continue().await.map_err(|e| e.to_string())?;
        }
        Ok(at.map_or_else(wall_us, |t| u64::try_from(t.micros).unwrap_or(0)))
    }

    /// Ends the transfer; QEMU's migration and its mirrors with it. Whether the guest runs is not
    /// touched.
    pub(super) async fn cancel_transfer(&mut self) {
        let copy = match self.sending.take() {
            Some(sending) => Arc::clone(&sending.copy),
            None => match self.node.copies.running(self.vm) {
                Some(copy) => copy,
                None => return,
            },
        };
        cutover::cancelled(&self.node, copy.id);
        let qemu = copy.qemu();
        // Refused when nothing is under way, which is what is wanted.
        if let Err(error) = qemu.migrate_cancel().await {
            tracing::debug!(%error, "no transfer to cancel");
        }
        mirrors::clear(&copy).await;
        if let Err(error) = qemu.wait_outgoing(CANCEL).await {
            tracing::debug!(%error, "the cancelled transfer");
        }
        let _ = std::fs::remove_file(copy.dir.join("out.sock"));
    }
}

/// What a non-zero guest page costs on the wire, learned from the last pages that were placed.
#[derive(Default)]
struct Cost {
    placed: u64,
    bytes: u64,
    ppm: Option<u64>,
}

impl Cost {
    /// Guest bytes after which the ratio is taken anew.
    const SAMPLE: u64 = 1 << 20;
    /// A page that crosses as it is.
    const WHOLE: u64 = 1_000_000;

    /// Pages that are asked for and wait have cost nothing yet: only what is placed tells the price.
    fn learn(&mut self, p: &SourceProgress) {
        let asked = (p.pages.known + p.pages.literal) * 4096;
        let placed = asked.saturating_sub(p.unplaced_bytes);
        let bytes = p.wire_bytes_out;
        let (new, cost) = (placed.saturating_sub(self.placed), bytes.saturating_sub(self.bytes));
        if new >= Self::SAMPLE || (p.unplaced_bytes == 0 && self.ppm.is_none() && new > 0) {
            self.ppm = Some((cost.saturating_mul(Self::WHOLE) / new).min(Self::WHOLE));
            (self.placed, self.bytes) = (placed, bytes);
        }
    }

    /// Until something is known, the worst is.
    fn ppm(&self) -> u64 {
        self.ppm.unwrap_or(Self::WHOLE)
    }

    /// What a byte that QEMU still holds will cost: after the first pass it is what the guest wrote
    /// just now, which nobody else has.
    fn to_come(&self, p: &SourceProgress) -> u64 {
        if p.passes == 0 { self.ppm() } else { self.ppm().max(p.literal_ppm) }
    }

    /// What is in the node and not placed: known to cross whole, or not asked for yet.
    fn backlog(&self, p: &SourceProgress) -> u64 {
        let asked = p.unplaced_bytes.saturating_sub(p.literal_bytes);
        share(p.literal_bytes, p.literal_ppm).saturating_add(share(asked, self.ppm()))
    }
}

fn share(bytes: u64, ppm: u64) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(ppm) / 1_000_000).unwrap_or(u64::MAX)
}

fn figures(p: &SourceProgress, cost: &Cost, ram: &RamInfo) -> Progress {
    let handled = p.pages.zero + p.pages.known + p.pages.literal;
    let disks = p.disk_blocks.zero + p.disk_blocks.known + p.disk_blocks.literal;
    Progress {
        passes: u64::from(p.passes),
        remaining_bytes: ram.remaining,
        backlog_bytes: cost.backlog(p),
        silent_ms: p.silent_ms,
        disk_wire_bytes: p.disk_wire_bytes,
        link_bytes_per_s: p.path_bytes_per_s as u64,
        rtt_ms: p.rtt_us / 1000,
        dirty_bytes_per_s: ram.dirty_pages_rate.saturating_mul(4096),
        wire_per_guest_ppm: cost.to_come(p),
        bulk_bytes: p.wire_bytes_out + p.wire_bytes_in,
        nonzero_bytes: p.first_pass_nonzero_pages * 4096,
        first_pass_bytes: if p.passes > 0 { u64::MAX } else { (handled - disks) * 4096 },
        zero: p.pages.zero,
        known: p.pages.known,
        literal: p.pages.literal,
        ..Progress::default()
    }
}

/// QEMU looks at memory that nobody changes only once, and waits with the end of its stream in its hand.
fn still(figures: &mut Progress) {
    (figures.passes, figures.remaining_bytes) = (figures.passes.max(1), 0);
    figures.dirty_bytes_per_s = 0;
    // Of so little the path may not have been measured.
    figures.link_bytes_per_s = figures.link_bytes_per_s.max(STILL_BYTES_PER_S);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::PageCounts;

    #[test]
    fn what_waits_in_the_node_is_not_taken_for_cheap() {
        let mut cost = Cost::default();
        // 24 MiB are read and asked for, nothing has crossed: a stop now would be a long pause.
        let full = SourceProgress {
            pages: PageCounts { literal: 6144, ..PageCounts::default() },
            unplaced_bytes: 6144 * 4096,
            wire_bytes_out: 100_000,
            ..SourceProgress::default()
        };
        cost.learn(&full);
        assert_eq!(cost.backlog(&full), full.unplaced_bytes);
        let half =
            SourceProgress { unplaced_bytes: 3072 * 4096, wire_bytes_out: 3072 * 2048, ..full };
        cost.learn(&half);
        assert_eq!(cost.backlog(&half), 3072 * 2048);
    }

    #[test]
    fn what_is_wanted_is_not_as_cheap_as_what_was_known() {
        let mut cost = Cost::default();
        let pages = PageCounts { known: 6144, ..PageCounts::default() };
        let known = SourceProgress { pages, wire_bytes_out: 100_000, ..SourceProgress::default() };
        cost.learn(&known);
        let (unplaced_bytes, literal_bytes, literal_ppm) = (24 << 20, 20 << 20, 500_000);
        let wanted = SourceProgress { unplaced_bytes, literal_bytes, literal_ppm, ..known };
        assert!(cost.backlog(&wanted) > 10 << 20);
        assert_eq!(cost.to_come(&SourceProgress { passes: 1, ..wanted }), 500_000);
    }

    #[test]
    fn no_limit_is_none() {
        assert_eq!((least(0, 7), least(7, 0), least(7, 9), least(0, 0)), (7, 7, 7, 0));
    }

    #[test]
    fn a_small_guest_is_learned_once_all_is_placed() {
        let mut cost = Cost::default();
        let pages = PageCounts { known: 10, ..PageCounts::default() };
        let done = SourceProgress { pages, wire_bytes_out: 400, ..SourceProgress::default() };
        cost.learn(&done);
        assert!(share(1 << 20, cost.ppm()) < 20_000);
    }
}
