//! The source's disks: what their mirrors write goes into the relay, and their images are read as
//! QEMU shows them.
//!
//! Owns the sockets between this node and the source's QEMU for the disks of one migration.
//! Invariant: nothing of a disk is changed here; whatever fails, the mirrors can be taken away and
//! the guest goes on.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use godwit_protocol::chunk::layout::DiskSpace;
use godwit_protocol::migrate::wait;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use super::copies::{Copy, lock};
use crate::nbd::{self, BlockSize, Client, Export, Extent, NbdError};
use crate::relay::{ImageReader, Inlet};
use crate::vmm::{Mirror, MirrorParams, Qemu, ResolvedDisk};

/// How long QEMU may take to answer on its own disk.
const READ: Duration = Duration::from_secs(30);
/// How long the end of all mirrors may take while the guest stands still.
const FINISH: Duration = Duration::from_secs(10);
/// Bytes per second of a mirror until all of them are there. To add one QEMU waits for what the others have under
/// way, with its main loop and the guest's disks: on a slow path for seconds.
const HELD: u64 = 1;
/// How QEMU is told to address the relay: the grid of the exchange.
const BLOCKS: BlockSize = BlockSize { min: 4096, preferred: 64 << 10, max: 2 << 20 };
/// What is read at a time for a range that the guest discarded, bytes.
const TRIM: u64 = 1 << 20;

/// The disks of a copy that move.
pub(super) fn spaces(disks: &[ResolvedDisk]) -> Vec<DiskSpace> {
    let moving = disks.iter().filter(|disk| disk.moves());
    moving.map(|d| DiskSpace { bytes: d.size, backed: !d.backing.is_empty() }).collect()
}

/// How a client reaches an export.
type Connect = fn(&Path, &str, Duration) -> Result<Client, NbdError>;

/// The images of a running copy, each readable through its QEMU.
pub(super) struct Images {
    socket: PathBuf,
    disks: Vec<ResolvedDisk>,
}

impl Images {
    /// Has QEMU show the disks that move.
    pub async fn export(copy: &Copy) -> Result<Self, String> {
        let disks: Vec<ResolvedDisk> = copy.spec.moving().cloned().collect();
        let socket = copy.dir.join("images.sock");
        if !disks.is_empty() {
            let qemu = copy.qemu();
            let _ = std::fs::remove_file(&socket);
            qemu.nbd_serve(&socket).await.map_err(|e| e.to_string())?;
            for disk in &disks {
                qemu.nbd_export(&disk.id, &disk.id, false).await.map_err(|e| e.to_string())?;
            }
        }
        Ok(Self { socket, disks })
    }

    /// Readers for the relay, in the order of [`spaces`].
    pub async fn readers(&self) -> Result<Vec<(DiskSpace, Box<dyn ImageReader>)>, String> {
        let mut readers: Vec<(DiskSpace, Box<dyn ImageReader>)> = Vec::new();
        for (disk, space) in self.disks.iter().zip(spaces(&self.disks)) {
            readers.push((space, Box::new(Reader(self.client(disk, Client::connect).await?))));
        }
        Ok(readers)
    }

    async fn client(&self, disk: &ResolvedDisk, connect: Connect) -> Result<Client, String> {
        let (socket, id) = (self.socket.clone(), disk.id.clone());
        let connect = move || connect(&socket, &id, READ);
        let client = tokio::task::spawn_blocking(connect).await.map_err(|e| e.to_string())?;
        client.map_err(|e| format!("{} at the source: {e}", disk.id))
    }
}

struct Reader(Client);

impl ImageReader for Reader {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Ok(self.0.read(offset, into)?)
    }
}

/// What a mirror writes to.
struct Target {
    inlet: Arc<Inlet>,
    image: Mutex<Client>,
}

impl Target {
    fn image(&self) -> MutexGuard<'_, Client> {
        lock(&self.image)
    }
}

impl Export for Target {
    fn size(&self) -> u64 {
        self.inlet.bytes()
    }

    fn block_size(&self) -> BlockSize {
        BLOCKS
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Ok(self.image().read(offset, into)?)
    }

    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        self.inlet.write(offset, content)
    }

    fn zero(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.inlet.zero(offset, len)
    }

    /// What a discarded range reads as is the image's to say.
    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut content = Vec::new();
        let end = offset + len;
        for at in (offset..end).step_by(TRIM as usize) {
            content.resize(TRIM.min(end - at) as usize, 0);
            self.image().read(at, &mut content)?;
            self.inlet.write(at, &content)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn status(&self, _: u64, len: u64) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { len, hole: false, zero: false }])
    }
}

/// How far the disks are.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Copied {
    pub bytes: u64,
    pub left: u64,
    pub ready: bool,
}

/// The mirrors of one migration.
pub(super) struct Mirrors {
    qemu: Qemu,
    images: Images,
    inlets: Vec<Arc<Inlet>>,
    servers: Vec<JoinHandle<()>>,
    streams: Streams,
}

/// The mirrors' connections, so that they can be cut.
type Streams = Arc<Mutex<Vec<UnixStream>>>;

impl Drop for Mirrors {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
        for stream in lock(&self.streams).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Mirrors {
    /// Starts to copy every disk.
    pub async fn start(
        copy: &Copy,
        images: Images,
        inlets: &[Arc<Inlet>],
        speed: u64,
    ) -> Result<Self, String> {
        let mut this = Self {
            qemu: copy.qemu(),
            images,
            inlets: inlets.to_vec(),
            servers: Vec::new(),
            streams: Streams::default(),
        };
        for (disk, inlet) in this.images.disks.iter().zip(inlets) {
            let own = !disk.backing.is_empty();
            let connect = if own { Client::connect_own_layer } else { Client::connect };
            note_content(this.images.client(disk, connect).await?, Arc::clone(inlet), own).await?;
            let socket = copy.dir.join(format!("mirror-{}.sock", disk.id));
            let target = Target {
                inlet: Arc::clone(inlet),
                image: Mutex::new(this.images.client(disk, Client::connect).await?),
            };
            this.servers.push(serve(&this.streams, &socket, &disk.id, target)?);
            let params = MirrorParams {
                disk: &disk.id,
                socket: &socket,
                export: &disk.id,
                speed: HELD,
                top_only: !disk.backing.is_empty(),
            };
            this.qemu.mirror_start(params).await.map_err(|e| e.to_string())?;
        }
        for disk in &this.images.disks {
            this.qemu.mirror_speed(&disk.id, speed).await.map_err(|e| e.to_string())?;
        }
        Ok(this)
    }

    /// How far they are; an error if one failed.
    pub async fn copied(&self) -> Result<Copied, String> {
        if self.images.disks.is_empty() {
            return Ok(Copied { ready: true, ..Copied::default() });
        }
        let mirrors = self.qemu.mirror_status().await.map_err(|e| e.to_string())?;
        let mut all = Copied { ready: true, ..Copied::default() };
        for disk in &self.images.disks {
            let mirror = mirrors.iter().find(|mirror| mirror.disk == disk.id);
            let Some(mirror) = mirror else {
                return Err(format!("the copy of {} ended by itself", disk.id));
            };
            failure(mirror)?;
            all.bytes += disk.size;
            all.left += mirror.len.saturating_sub(mirror.offset);
            all.ready &= mirror.ready;
        }
        Ok(all)
    }

    /// Waits until every disk is copied but for what the guest writes just now.
    pub async fn wait_copied(&self) -> Result<(), String> {
        let limit = Duration::from_millis(wait::TRANSFER_MS);
        self.qemu.mirror_wait_ready(limit).await.map_err(|e| e.to_string())
    }

    /// The guest stands still: ends the mirrors, so that the relay has every byte, and the images'
    /// exports, so that QEMU can give the disks away.
    pub async fn finish(&self) -> Result<(), String> {
        let end = Instant::now() + FINISH;
        let left = move || end.saturating_duration_since(Instant::now());
        for disk in &self.images.disks {
            self.qemu.mirror_finish(&disk.id, left()).await.map_err(|e| e.to_string())?;
        }
        let inlets = self.inlets.clone();
        let finish = move || inlets.iter().try_for_each(|inlet| inlet.finish(left()));
        let finished = tokio::task::spawn_blocking(finish).await.map_err(|e| e.to_string())?;
        finished.map_err(|e| format!("reading the disks at the source: {e}"))?;
        for disk in &self.images.disks {
            self.qemu.nbd_unexport(&disk.id).await.map_err(|e| e.to_string())?;
        }
        self.qemu.nbd_stop().await.map_err(|e| e.to_string())
    }
}

/// Serves one disk's mirror until it is aborted.
fn serve(
    streams: &Streams,
    socket: &Path,
    name: &str,
    target: Target,
) -> Result<JoinHandle<()>, String> {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).map_err(|e| format!("{}: {e}", socket.display()))?;
    let (target, streams) = (Arc::new(target), Arc::clone(streams));
    let name = name.to_owned();
    Ok(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(stream) = stream.into_std() else { continue };
            let both = stream.set_nonblocking(false).and_then(|()| stream.try_clone());
            let Ok(other) = both else { continue };
            lock(&streams).push(other);
            let (target, name) = (Arc::clone(&target), name.clone());
            let serve = move || {
                if let Err(error) = nbd::serve(stream, &name, &*target) {
                    tracing::debug!(disk = name, %error, "a mirror's connection ended");
                }
            };
            if std::thread::Builder::new().name("mirror".into()).spawn(serve).is_err() {
                return;
            }
        }
    }))
}

/// Why a mirror does not go on, in QEMU's words.
fn failure(mirror: &Mirror) -> Result<(), String> {
    match &mirror.error {
        Some(error) => Err(format!("copying {} failed: {error}", mirror.disk)),
        None if mirror.status == "concluded" => {
            Err(format!("the copy of {} ended by itself", mirror.disk))
        }
        None => Ok(()),
    }
}

/// Tells the relay what the image says it holds: all of it is read, whatever the mirror writes. Of one
/// with layers below it only what is its own: the far side has those.
async fn note_content(mut image: Client, inlet: Arc<Inlet>, own: bool) -> Result<(), String> {
    let note = move || -> io::Result<()> {
        let (mut at, end) = (0, inlet.bytes());
        if !image.knows_status() {
            return Err(io::Error::other("its QEMU does not say"));
        }
        while at < end {
            for extent in image.status(at, (end - at).min(1 << 30))? {
                let len = extent.len.min(end - at);
                let whole = at.next_multiple_of(4096)..(at + len) / 4096 * 4096;
                let holds = if own { !extent.hole } else { !extent.zero };
                if holds && !whole.is_empty() {
                    inlet.holds(whole.start, whole.end - whole.start)?;
                }
                at += len;
            }
        }
        Ok(())
    };
    let noted = tokio::task::spawn_blocking(note).await.map_err(|e| e.to_string())?;
    noted.map_err(|e| format!("asking a disk at the source what it holds: {e}"))
}

/// Takes away whatever a migration, or an earlier daemon's, left at a running copy's disks.
pub(super) async fn clear(copy: &Copy) {
    let qemu = copy.qemu();
    for disk in copy.spec.moving() {
        if let Err(error) = qemu.mirror_abort(&disk.id).await {
            tracing::warn!(disk = disk.id, %error, "a mirror is not taken away");
        }
        if let Err(error) = qemu.throttle_disk(&disk.id, None).await {
            tracing::debug!(disk = disk.id, %error, "the limit of its writes stays");
        }
    }
    if copy.spec.moving().next().is_some()
        && let Err(error) = qemu.nbd_stop().await
    {
        tracing::debug!(%error, "no exports to stop");
    }
}
