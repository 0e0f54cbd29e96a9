//! The copies that this host holds: running, waiting, or being received.
//!
//! Owns the table from copy to QEMU, its memory and its taps. Never decides which may run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use godwit_protocol::id::{CopyId, VmId};
use godwit_protocol::wire::route::Nic;

use crate::vmm::resolved::ResolvedNic;
use crate::vmm::{GuestMemory, Qemu, ResolvedSpec};

/// One copy.
pub(super) struct Copy {
    pub id: CopyId,
    pub spec: ResolvedSpec,
    pub dir: PathBuf,
    pub memory: Arc<GuestMemory>,
    qemu: Mutex<Qemu>,
    /// What the spec says of its NICs, as it is by now.
    nics: Mutex<Vec<ResolvedNic>>,
    /// Set before `cont` is written to its QEMU: from then on its guest may have run.
    ran: AtomicBool,
}

impl Copy {
    pub fn new(qemu: Qemu, ran: bool) -> Self {
        Self {
            id: qemu.copy(),
            spec: qemu.spec().clone(),
            dir: qemu.dir().to_owned(),
            memory: Arc::clone(qemu.memory()),
            nics: Mutex::new(qemu.spec().nics.clone()),
            qemu: Mutex::new(qemu),
            ran: AtomicBool::new(ran),
        }
    }

    pub fn vm(&self) -> VmId {
        self.spec.id
    }

    pub fn qemu(&self) -> Qemu {
        lock(&self.qemu).clone()
    }

    /// Its NICs, in the guest's order.
    pub fn nics(&self) -> Vec<ResolvedNic> {
        lock(&self.nics).clone()
    }

    pub fn set_nics(&self, nics: Vec<ResolvedNic>) {
        *lock(&self.nics) = nics;
    }

    /// Those of its NICs that are on a wire.
    pub fn wired(&self) -> Vec<Nic> {
        wired(&lock(&self.nics))
    }

    /// The spec with its NICs as they are by now.
    pub fn described(&self) -> ResolvedSpec {
        ResolvedSpec { nics: self.nics(), ..self.spec.clone() }
    }

    pub fn replace(&self, qemu: Qemu) {
        *lock(&self.qemu) = qemu;
        self.ran.store(false, Ordering::SeqCst);
    }

    pub fn ran(&self) -> bool {
        self.ran.load(Ordering::SeqCst)
    }

    pub fn will_run(&self) {
        self.ran.store(true, Ordering::SeqCst);
    }
}

/// Those of these NICs that are on a wire.
pub(super) fn wired(nics: &[ResolvedNic]) -> Vec<Nic> {
    let wired = |nic: &ResolvedNic| Some(Nic { wire: nic.wire.clone()?, mac: nic.mac });
    nics.iter().filter_map(wired).collect()
}

/// Guests' memory on this host, in the table or not: what is being kept takes room until it is.
#[derive(Default)]
struct Memories(Vec<Weak<GuestMemory>>);

impl Memories {
    fn add(&mut self, memory: &Arc<GuestMemory>) {
        self.0.push(Arc::downgrade(memory));
    }

    /// Bytes of those that exist.
    fn bytes(&mut self) -> u64 {
        self.0.retain(|memory| memory.strong_count() > 0);
        self.0.iter().filter_map(Weak::upgrade).map(|memory| memory.size()).sum()
    }
}

/// All copies of this host, and memory that is promised to copies still being made.
#[derive(Default)]
pub(super) struct Copies {
    copies: Mutex<BTreeMap<CopyId, Arc<Copy>>>,
    memories: Mutex<Memories>,
    promised: Mutex<BTreeMap<CopyId, u64>>,
}

/// Locks, also if a thread panicked while it held the lock: what is guarded is whole between calls.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Copies {
    pub fn insert(&self, copy: Arc<Copy>) {
        lock(&self.memories).add(&copy.memory);
        lock(&self.promised).remove(&copy.id);
        lock(&self.copies).insert(copy.id, copy);
    }

    pub fn remove(&self, id: CopyId) -> Option<Arc<Copy>> {
        lock(&self.promised).remove(&id);
        lock(&self.copies).remove(&id)
    }

    pub fn get(&self, id: CopyId) -> Option<Arc<Copy>> {
        lock(&self.copies).get(&id).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Copy>> {
        lock(&self.copies).values().cloned().collect()
    }

    /// The copy of `vm` that has run here, if there is one.
    pub fn running(&self, vm: VmId) -> Option<Arc<Copy>> {
        lock(&self.copies).values().find(|c| c.vm() == vm && c.ran()).cloned()
    }

    /// Bytes of memory that guests have, had and have not given back yet, or are promised.
    pub fn used(&self) -> u64 {
        lock(&self.memories).bytes() + lock(&self.promised).values().sum::<u64>()
    }

    /// Promises memory to a copy that is being made: until it is inserted or removed.
    pub fn promise(&self, id: CopyId, bytes: u64) {
        lock(&self.promised).insert(id, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_counts_until_nobody_reads_it() {
        let mut memories = Memories::default();
        let made = [1_u64, 2].map(|mib| Arc::new(GuestMemory::create(mib << 20).unwrap()));
        made.iter().for_each(|memory| memories.add(memory));
        assert_eq!(memories.bytes(), 3 << 20);
        let [first, second] = made;
        let kept = Arc::clone(&second);
        drop((first, second));
        assert_eq!(memories.bytes(), 2 << 20, "one is being kept");
        drop(kept);
        assert_eq!(memories.bytes(), 0);
    }
}
