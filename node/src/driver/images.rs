//! The destination's disks: their images, filled through the QEMU that will use them.
//!
//! Owns the sockets between this node and that QEMU for the disks of one incoming migration.
//! Invariant: before a copy counts as loaded its images are flushed and nobody but its QEMU has them
//! open.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use godwit_protocol::chunk::layout::{Layout, Place};
use godwit_protocol::id::CopyId;
use godwit_protocol::limits::CHUNK_BYTES;

use super::copies::{Copy, lock};
use super::node::Node;
use super::{bulk, hold, mirrors};
use crate::nbd::Client;
use crate::relay::{PageSink, Settle};
use crate::vmm::{Backing, Refusal, Reservation, ResolvedDisk, ResolvedSpec, image, reserve};

/// How long QEMU may take to answer on its own disk.
const WRITE: Duration = Duration::from_secs(60);
/// Connections to each disk: one per thread that places.
const CLIENTS: usize = 2;
/// How often what was written is flushed: little is left for the stop.
const FLUSH: Duration = Duration::from_secs(1);
/// How long indexing what this host has may hold up a migration.
const INDEX: Duration = Duration::from_secs(20);

/// A place for the disks of a copy that comes: empty images, and room for what they will take.
pub(super) struct Room {
    pub spec: ResolvedSpec,
    pub reserved: Vec<Reservation>,
}

/// Makes images for the disks of `spec` that move; bases are found by their content. Blocks.
pub(super) fn make(node: &Node, spec: &ResolvedSpec, copy: CopyId) -> Result<Room, String> {
    let dir = &node.options.image_dir;
    std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let find = |base: &Backing| node.images.find(&base.blake3, base.bytes);
    let spec = spec.place(dir, copy, find).map_err(|e| e.to_string())?;
    let reserved = reserve::reserve(&spec, dir).or_else(|refusal| match lacking(&refusal) {
        // What is only kept gives way, what earlier tries left of this VM last.
        Some(bytes) if node.images.give_up(dir, bytes, spec.id) => reserve::reserve(&spec, dir),
        _ => Err(refusal),
    });
    let reserved = reserved.map_err(|e| e.to_string())?;
    image::create(&spec).map_err(|e| e.to_string())?;
    // What is here is worth waiting for; what is not indexed by then crosses.
    node.images.hurry();
    if !node.images.wait_indexed(Instant::now() + INDEX) {
        tracing::warn!("a migration begins before everything here is indexed");
    }
    Ok(Room { spec, reserved })
}

/// Whether disks of `spec` that move would find their bases and room here. Makes nothing. Blocks.
pub(super) fn has_room(node: &Node, spec: &ResolvedSpec) -> Result<(), String> {
    let dir = &node.options.image_dir;
    std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let find = |base: &Backing| node.images.find(&base.blake3, base.bytes);
    let spec = spec.place(dir, CopyId([0; 16]), find).map_err(|e| e.to_string())?;
    match reserve::check_room(&spec, dir) {
        Err(refusal) if lacking(&refusal).is_none_or(|b| b > node.images.spare_bytes(dir)) => {
            Err(refusal.to_string())
        }
        _ => Ok(()),
    }
}

/// Bytes that there is too little room for, if it is that.
fn lacking(refusal: &Refusal) -> Option<u64> {
    let Refusal::Space { need_mib, room_mib, .. } = refusal else { return None };
    Some(need_mib.saturating_sub(*room_mib).saturating_mul(1 << 20))
}

/// One disk as it is filled.
struct Disk {
    clients: Vec<Mutex<Client>>,
    flusher: Mutex<Client>,
    reserved: Mutex<Reservation>,
    written: AtomicU64,
    /// A fault that the lab asked for: the first block written is altered.
    altered: AtomicBool,
}

impl Disk {
    /// A free connection, or the first one when it is.
    fn client(&self) -> MutexGuard<'_, Client> {
        let free = self.clients.iter().find_map(|client| client.try_lock().ok());
        free.unwrap_or_else(|| lock(&self.clients[0]))
    }

    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        if !self.altered.swap(true, Ordering::Relaxed) {
            let mut other = content.to_vec();
            other.first_mut().into_iter().for_each(|byte| *byte ^= 1);
            return Ok(self.client().write(offset, &other)?);
        }
        self.client().write(offset, content)?;
        let written = self.written.fetch_add(content.len() as u64, Ordering::Relaxed);
        lock(&self.reserved).shrink(written)
    }
}

/// Memory and disks as one line.
struct Line {
    layout: Layout,
    memory: Arc<dyn PageSink>,
    disks: Arc<Vec<Disk>>,
}

impl Line {
    fn disk(&self, page: u32) -> io::Result<Option<(&Disk, u64)>> {
        match self.layout.place(page) {
            Some(Place::Ram(_)) => Ok(None),
            Some(Place::Disk(at, block)) => {
                let disk = self.disks.get(at).ok_or(io::ErrorKind::NotFound)?;
                Ok(Some((disk, u64::from(block) * CHUNK_BYTES as u64)))
            }
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl PageSink for Line {
    fn write(&self, first: u32, content: &[u8]) -> io::Result<()> {
        match self.disk(first)? {
            Some((disk, offset)) => disk.write(offset, content),
            None => self.memory.write(first, content),
        }
    }

    fn zero(&self, first: u32, count: u32) -> io::Result<()> {
        match self.disk(first)? {
            Some((disk, offset)) => {
                let len = u64::from(count) * CHUNK_BYTES as u64;
                Ok(disk.client().zero(offset, len, true)?)
            }
            None => self.memory.zero(first, count),
        }
    }

    fn read(&self, first: u32, content: &mut [u8]) -> io::Result<()> {
        match self.disk(first)? {
            Some((disk, offset)) => Ok(disk.client().read(offset, content)?),
            None => self.memory.read(first, content),
        }
    }
}

/// What a destination session writes to, and how it is closed.
pub(super) struct Filling {
    pub layout: Layout,
    pub sink: Arc<dyn PageSink>,
    pub settle: Option<Settle>,
}

/// Has the waiting QEMU of `copy` give its images to be filled.
pub(super) async fn open(copy: &Arc<Copy>, reserved: Vec<Reservation>) -> Result<Filling, String> {
    let memory = bulk::sink(copy);
    let spaces = mirrors::spaces(&copy.spec.disks);
    let layout = Layout::new(copy.spec.memory, &spaces)
        .ok_or("memory or disks of sizes that cannot be moved")?;
    if spaces.is_empty() {
        return Ok(Filling { layout, sink: memory, settle: None });
    }
    let qemu = copy.qemu();
    let socket = copy.dir.join("images.sock");
    qemu.nbd_serve(&socket).await.map_err(|e| e.to_string())?;
    let moving: Vec<ResolvedDisk> = copy.spec.moving().cloned().collect();
    for disk in &moving {
        qemu.nbd_export(&disk.id, &disk.id, true).await.map_err(|e| e.to_string())?;
    }
    let connect = move || connect(&socket, &moving, reserved);
    let disks = tokio::task::spawn_blocking(connect).await.map_err(|e| e.to_string())?;
    let disks = Arc::new(disks.map_err(|e| format!("the destination's disks: {e}"))?);
    let flusher = flush_often(&disks);
    let line = Line { layout: layout.clone(), memory, disks: Arc::clone(&disks) };
    let copy = Arc::clone(copy);
    let settle: Settle = Box::new(move || {
        Box::pin(async move {
            drop(flusher);
            close(&copy, disks).await
        })
    });
    Ok(Filling { layout, sink: Arc::new(line), settle: Some(settle) })
}

fn connect(
    socket: &Path,
    moving: &[ResolvedDisk],
    reserved: Vec<Reservation>,
) -> io::Result<Vec<Disk>> {
    let mut disks = Vec::with_capacity(moving.len());
    for (disk, reserved) in moving.iter().zip(reserved) {
        let client = || Client::connect(socket, &disk.id, WRITE).map(Mutex::new);
        disks.push(Disk {
            clients: (0..CLIENTS).map(|_| client()).collect::<Result<_, _>>()?,
            flusher: client()?,
            reserved: Mutex::new(reserved),
            written: AtomicU64::new(0),
            altered: AtomicBool::new(!hold::fault("alter-disk")),
        });
    }
    Ok(disks)
}

/// Ends with its owner.
struct Flusher(tokio::task::JoinHandle<()>);

impl Drop for Flusher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Flushes now and then, so that little is left to be flushed while the guest stands still.
fn flush_often(disks: &Arc<Vec<Disk>>) -> Flusher {
    let disks = Arc::clone(disks);
    Flusher(tokio::spawn(async move {
        let mut flushed = 0;
        loop {
            tokio::time::sleep(FLUSH).await;
            let written = disks.iter().map(|d| d.written.load(Ordering::Relaxed)).sum();
            if std::mem::replace(&mut flushed, written) == written {
                continue;
            }
            let disks = Arc::clone(&disks);
            // What fails here fails at the end, too, and is told there.
            let _ = tokio::task::spawn_blocking(move || flush(&disks)).await;
        }
    }))
}

fn flush(disks: &[Disk]) -> io::Result<()> {
    disks.iter().try_for_each(|disk| Ok(lock(&disk.flusher).flush()?))
}

/// Makes everything durable and gives the images to QEMU alone.
async fn close(copy: &Copy, disks: Arc<Vec<Disk>>) -> Result<(), String> {
    let flushed = tokio::task::spawn_blocking(move || flush(&disks)).await;
    flushed.map_err(|e| e.to_string())?.map_err(|e| format!("flushing the disks: {e}"))?;
    let qemu = copy.qemu();
    for disk in copy.spec.moving() {
        qemu.nbd_unexport(&disk.id).await.map_err(|e| e.to_string())?;
    }
    qemu.nbd_stop().await.map_err(|e| e.to_string())
}

/// The images of a copy that is here count as content of this host.
pub(super) fn attach(node: &Node, copy: &Copy) {
    for disk in copy.spec.moving() {
        if let Err(error) = node.images.attach_disk(&disk.path, copy.id) {
            tracing::warn!(disk = disk.id, %error, "not used as content");
        }
    }
}
