//! What a copy leaves behind: content for the next move.
//!
//! Owns what becomes of the disks and the memory of a copy that is not needed any more, and the marks of
//! VMs of which something is being written. Invariant: nothing waits for a mark without a limit, and no VM
//! waits for another's.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use godwit_protocol::id::{CopyId, VmId};

use super::bulk;
use super::copies::{Copy, lock};
use super::node::Node;
use crate::store::images::{Keep, Kind};
use crate::vmm::{ResolvedDisk, ResolvedSpec, image, image_path, is_image_of, reserve};

/// Of which VMs something is being kept, or ended.
#[derive(Default)]
pub(super) struct Keeping {
    vms: Mutex<BTreeMap<VmId, usize>>,
    done: Condvar,
    /// One memory is written at a time: together they take as long, and each is whole later.
    writing: Mutex<()>,
}

/// Something of a VM is being kept while this lives.
pub(super) struct Mark {
    keeping: Arc<Keeping>,
    vm: VmId,
}

impl Drop for Mark {
    fn drop(&mut self) {
        let mut vms = lock(&self.keeping.vms);
        if let Some(count) = vms.get_mut(&self.vm) {
            *count -= 1;
            if *count == 0 {
                vms.remove(&self.vm);
            }
        }
        self.keeping.done.notify_all();
    }
}

impl Keeping {
    /// Marks a VM.
    pub fn begin(self: &Arc<Self>, vm: VmId) -> Mark {
        *lock(&self.vms).entry(vm).or_default() += 1;
        Mark { keeping: Arc::clone(self), vm }
    }

    /// Whether something of `vm` is being kept.
    pub fn holds(&self, vm: VmId) -> bool {
        lock(&self.vms).contains_key(&vm)
    }

    /// Waits until nothing of `vm` is being kept (blocks); whether that is so.
    pub fn wait(&self, vm: VmId, deadline: Instant) -> bool {
        let mut vms = lock(&self.vms);
        while vms.contains_key(&vm) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            vms = self.done.wait_timeout(vms, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// What a copy has that is not needed any more: it has moved away, or was received in vain, and its QEMU has ended.
pub(super) struct Left<'a> {
    pub copy: CopyId,
    pub spec: &'a ResolvedSpec,
    /// Its guest ran in it; what an earlier copy of the VM left is of no more use then.
    pub whole: bool,
    /// Images that another copy of the VM has by now: it was switched on here as that one.
    pub spared: BTreeSet<PathBuf>,
}

/// The images of a VM that is here, if it is here as another copy.
pub(super) fn spared(
    here: Result<(CopyId, ResolvedSpec), String>,
    copy: CopyId,
) -> BTreeSet<PathBuf> {
    let other = here.ok().filter(|(here, _)| *here != copy).into_iter();
    other.flat_map(|(_, spec)| spec.disks.into_iter().map(|disk| disk.path)).collect()
}

/// Keeps the disks of such a copy. Blocks.
pub(super) fn disks(node: &Node, left: &Left) {
    let Left { copy, spec, whole, spared } = left;
    let (copy, vm) = (*copy, spec.id);
    node.images.detach_disks(copy);
    let dir = node.options.image_dir.as_path();
    // Another file may lie there too: the operator's, or one that a stopped VM left to them.
    let owned = |disk: &ResolvedDisk| is_image_of(dir, vm, disk);
    let full = spec.moving().any(owned) && reserve::room(dir).is_ok_and(|room| room == 0);
    if full && !whole && spared.is_empty() {
        tracing::warn!(path = %dir.display(), "removed, not kept: its file system is nearly full");
        return discard(node, spec, copy);
    }
    for disk in spec.moving().filter(|disk| !spared.contains(&disk.path)) {
        let keep = Keep { vm, owned: owned(disk), in_vain: !whole };
        let own = keep.owned.then(|| image_path(dir, vm, copy, disk));
        let kept = retire(&disk.path, copy, own).map_err(|e| e.to_string());
        let kept = kept.and_then(|path| {
            node.images.keep(&path, Kind::KeptDisk, keep).map_err(|e| e.to_string())
        });
        if let Err(error) = kept {
            tracing::warn!(path = %disk.path.display(), error, "not kept as content");
        }
    }
    if *whole {
        forget_older(node, vm, copy);
    }
}

/// Removes images that were made here for a copy. Blocks.
pub(super) fn discard(node: &Node, spec: &ResolvedSpec, copy: CopyId) {
    if let Err(error) = image::remove(spec, &node.options.image_dir, copy) {
        tracing::warn!(%copy, %error, "an image that is of no use stays");
    }
}

/// Keeps its memory. Blocks for as long as all of it takes to be written.
pub(super) fn memory(node: &Node, copy: &Copy, whole: bool) {
    let _writing = lock(&node.keeping.writing);
    let memory = bulk::Readable(Arc::clone(&copy.memory));
    if let Err(error) = node.images.keep_memory(&memory, copy.vm(), copy.id, !whole) {
        tracing::warn!(copy = %copy.id, %error, "its memory is not kept");
    }
}

fn forget_older(node: &Node, vm: VmId, copy: CopyId) {
    let this = copy.to_string();
    let kept = node.images.list().into_iter().filter(|image| {
        matches!(image.kind, Kind::KeptDisk | Kind::KeptMemory) && image.vm == Some(vm)
    });
    for image in kept.filter(|image| !image.path.to_string_lossy().contains(&this)) {
        if let Err(error) = node.images.remove(&image.path) {
            tracing::debug!(path = %image.path.display(), %error, "an older image stays");
        }
    }
}

/// An operator's own image gets a name that says that its VM has moved; nothing else is done to it. One that was made
/// here has that of the last copy that had it.
fn retire(path: &Path, copy: CopyId, own: Option<PathBuf>) -> io::Result<PathBuf> {
    let to = own.unwrap_or_else(|| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".moved-{copy}"));
        PathBuf::from(name)
    });
    if path != to {
        std::fs::rename(path, &to)?;
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_vm_waits_for_its_own_only_and_not_for_ever() {
        let keeping = Arc::new(Keeping::default());
        let [a, b] = [VmId([1; 16]), VmId([2; 16])];
        let marks = [keeping.begin(a), keeping.begin(a)];
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(keeping.wait(b, soon()));
        let [first, second] = marks;
        drop(first);
        assert!(!keeping.wait(a, soon()), "the second is still being written");
        let waits = {
            let keeping = Arc::clone(&keeping);
            std::thread::spawn(move || keeping.wait(a, Instant::now() + Duration::from_secs(60)))
        };
        drop(second);
        assert!(waits.join().unwrap());
    }
}
