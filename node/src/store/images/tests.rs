//! The library with real files: what is listed, indexed, found, kept and deleted.

use std::fs::{File, FileTimes, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::SystemTime;

use godwit_protocol::limits::CHUNK_BYTES;

use super::*;

const KEY: [u8; 32] = [3; 32];
const VM: VmId = VmId([8; 16]);
const COPY: CopyId = CopyId([9; 16]);

const OURS: Keep = Keep { vm: VM, owned: true, in_vain: false };
const THEIRS: Keep = Keep { owned: false, ..OURS };
const IN_VAIN: Keep = Keep { in_vain: true, ..OURS };

struct Lab {
    dir: tempfile::TempDir,
    keep_bytes: u64,
    key: [u8; 32],
    room: fn(&Path) -> std::io::Result<u64>,
}

impl Lab {
    fn new() -> Self {
        let room = |_: &Path| Ok(u64::MAX);
        Self { dir: tempfile::tempdir().unwrap(), keep_bytes: 1 << 30, key: KEY, room }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    fn open(&self) -> (Images, Arc<Corpus>) {
        let corpus = Arc::new(Corpus::new(self.key, 1000));
        let state = self.path("state");
        let hard = Arc::new(Hard::open(&state).unwrap());
        let keep_bytes = self.keep_bytes;
        let settings = Settings { keep_bytes, ..Settings::new(state, self.room) };
        (Images::open(hard, Arc::clone(&corpus), settings).unwrap(), corpus)
    }

    /// A file of pages, each filled with one number.
    fn file(&self, name: &str, pages: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, pages.iter().flat_map(|n| page(*n)).collect::<Vec<_>>()).unwrap();
        path
    }

    fn index_files(&self) -> usize {
        std::fs::read_dir(self.path("state/index")).map_or(0, Iterator::count)
    }
}

fn page(n: u8) -> [u8; CHUNK_BYTES] {
    [n; CHUNK_BYTES]
}

fn has(corpus: &Corpus, n: u8) -> bool {
    corpus.has(&corpus.id_of(&page(n)))
}

fn settle(images: &Images) {
    images.hurry();
    assert!(images.wait_indexed(Instant::now() + Duration::from_secs(60)));
}

/// Changes the content of a file and nothing that tells so.
fn change_unseen(path: &Path, content: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(content, 0).unwrap();
    file.set_times(FileTimes::new().set_modified(modified)).unwrap();
}

#[test]
fn the_list_survives_and_follows_the_files() {
    let lab = Lab::new();
    let path = lab.file("base.img", &[1, 2, 1]);
    let (images, corpus) = lab.open();
    let added = images.add(&path).unwrap();
    assert_eq!((added.chunks, added.bytes, &added.state), (2, 12288, &State::Ready));
    assert_eq!((added.kind, added.expires_s), (Kind::Image, None));
    assert_eq!(images.add(&path).unwrap(), added);
    assert_eq!(corpus.size().0, 2);
    drop(images);

    let (images, corpus) = lab.open();
    assert_eq!(images.list()[0].state, State::Indexing);
    settle(&images);
    assert_eq!(images.list(), [added]);
    assert!(has(&corpus, 2));

    lab.file("base.img", &[9]);
    settle(&images);
    assert_eq!((images.list()[0].chunks, images.list()[0].bytes), (1, 4096));
    assert!(!has(&corpus, 2));

    std::fs::remove_file(&path).unwrap();
    settle(&images);
    assert!(matches!(images.list()[0].state, State::Dropped(_)));
    assert_eq!(corpus.size().0, 0);
    lab.file("base.img", &[7]);
    settle(&images);
    assert!(has(&corpus, 7), "it came back");
    assert!(!images.remove(&path).unwrap());
    assert!(path.exists());
    assert_eq!(lab.index_files(), 0);
    assert!(matches!(images.remove(&path), Err(ImageError::Unknown(_))));
    drop(images);
    assert!(lab.open().0.list().is_empty());
}

#[test]
fn what_is_no_file_is_refused() {
    let lab = Lab::new();
    let (images, _) = lab.open();
    let fifo = lab.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    for path in [Path::new("relative.img"), Path::new("/nonexistent/x"), lab.dir.path(), &fifo] {
        assert!(images.add(path).is_err(), "{}", path.display());
        assert!(images.attach_disk(path, COPY).is_err(), "{}", path.display());
        assert!(images.digest_of(path).is_err(), "{}", path.display());
    }
    let large = lab.path("large");
    let file = File::create(&large).unwrap();
    (0..1001_u32).for_each(|n| file.write_all_at(&n.to_le_bytes(), u64::from(n) << 12).unwrap());
    file.write_all_at(&[1], 1001 << 12).unwrap();
    file.set_len(1002 << 12).unwrap();
    let error = images.add(&large).unwrap_err().to_string();
    assert!(error.contains("the index is full"), "{error}");
    assert!(images.list().is_empty());
}

#[test]
fn an_index_is_used_again_while_nothing_tells_that_the_file_changed() {
    let mut lab = Lab::new();
    let path = lab.file("base.img", &[1, 2]);
    drop((lab.open().0.add(&path).unwrap(), ()));
    change_unseen(&path, &page(5));

    let (images, corpus) = lab.open();
    settle(&images);
    assert!(has(&corpus, 1) && !has(&corpus, 5), "it was not read");
    assert!(!corpus.read(&corpus.id_of(&page(1)), &mut page(0)), "and is not believed");
    drop(images);

    // A new time: the same content is read again.
    let file = File::options().write(true).open(&path).unwrap();
    file.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH)).unwrap();
    let (images, corpus) = lab.open();
    settle(&images);
    assert!(!has(&corpus, 1) && has(&corpus, 5));
    drop(images);

    change_unseen(&path, &page(6));
    lab.key = [4; 32];
    let (images, corpus) = lab.open();
    settle(&images);
    assert!(has(&corpus, 6), "an index under another key is none");
    drop(images);

    change_unseen(&path, &page(7));
    for entry in std::fs::read_dir(lab.path("state/index")).unwrap() {
        let file = File::options().write(true).open(entry.unwrap().path()).unwrap();
        file.write_all_at(b"x", 70).unwrap();
    }
    std::fs::write(lab.path("state/index/of-nobody.idx"), b"").unwrap();
    let (images, corpus) = lab.open();
    settle(&images);
    assert!(has(&corpus, 7), "a damaged one neither");
    // The thread sweeps when it has nothing else to do.
    let begun = Instant::now();
    while lab.index_files() > 1 && begun.elapsed() < Duration::from_secs(20) {
        std::thread::yield_now();
    }
    assert_eq!(lab.index_files(), 1);
}

#[test]
fn files_are_found_by_content() {
    let lab = Lab::new();
    let (path, other) = (lab.file("base.img", &[1, 2]), lab.file("backing.img", &[3]));
    let digest = |path: &Path| *blake3::hash(&std::fs::read(path).unwrap()).as_bytes();
    let (of_path, of_other) = (digest(&path), digest(&other));
    let (images, _) = lab.open();
    assert_eq!(images.find(&of_path, 8192), None);
    images.add(&path).unwrap();
    assert_eq!(images.find(&of_path, 8192), Some(path.clone()));
    assert_eq!(images.find(&of_path, 4096), None);
    assert_eq!(images.find(&of_other, 4096), None);
    assert_eq!(images.digest_of(&other).unwrap(), of_other);
    assert_eq!(images.find(&of_other, 4096), Some(other.clone()));
    change_unseen(&other, &page(4));
    assert_eq!(images.digest_of(&other).unwrap(), of_other, "by its stamp");
    drop(images);

    let (images, _) = lab.open();
    assert_eq!(images.find(&of_path, 8192), Some(path.clone()));
    assert_eq!(images.find(&of_other, 4096), Some(other.clone()));
    lab.file("base.img", &[1, 3]);
    lab.file("backing.img", &[3]);
    assert_eq!(images.find(&of_path, 8192), None);
    assert_eq!(images.find(&of_other, 4096), None, "not known to be the same again");
    assert_eq!(images.digest_of(&other).unwrap(), of_other);
    settle(&images);
    assert_eq!(images.find(&digest(&path), 8192), Some(path));
}

#[test]
fn a_live_disk_stays_until_its_copy_is_gone() {
    let lab = Lab::new();
    let (path, named) = (lab.file("disk.raw", &[1, 2]), lab.file("named.raw", &[3]));
    let (images, corpus) = lab.open();
    images.add(&named).unwrap();
    images.attach_disk(&path, COPY).unwrap();
    images.attach_disk(&named, COPY).unwrap();
    images.attach_disk(&named, CopyId([1; 16])).unwrap();
    settle(&images);
    assert_eq!(images.list().iter().map(|i| i.kind).collect::<Vec<_>>(), [Kind::Disk; 2]);
    assert!(has(&corpus, 2));
    for path in [&path, &named] {
        assert!(matches!(images.remove(path), Err(ImageError::Live(_))));
        assert!(matches!(images.keep(path, Kind::KeptDisk, OURS), Err(ImageError::Live(_))));
    }
    lab.file("disk.raw", &[4, 4]);
    settle(&images);
    assert!(has(&corpus, 2) && !has(&corpus, 4), "read less than a minute ago");

    images.detach_disks(COPY);
    assert!(!has(&corpus, 2));
    assert_eq!(images.list().len(), 1);
    assert_eq!(images.list()[0].kind, Kind::Disk, "another copy has it");
    images.detach_disks(CopyId([1; 16]));
    assert_eq!(images.list()[0].kind, Kind::Image);
    images.attach_disk(&path, COPY).unwrap();
    drop(images);
    assert_eq!(lab.open().0.list().len(), 1, "who finds the copy says so again");
}

#[test]
fn the_oldest_makes_room_and_only_our_own_is_deleted() {
    let mut lab = Lab::new();
    let pages: Vec<u8> = (1..=250).collect();
    let names = ["a", "b", "c", "d"];
    let paths = names.map(|name| lab.file(name, &pages));
    let each = paths[0].metadata().unwrap().blocks() * 512;
    let theirs = 0o640;
    std::fs::set_permissions(&paths[0], Permissions::from_mode(theirs)).unwrap();
    lab.keep_bytes = 2 * each;
    let (images, corpus) = lab.open();
    let now = kept::wall_s();
    let keep = |i: usize, owned, after| {
        let kept =
            images.library.keep(&paths[i], Kind::KeptDisk, Keep { owned, ..OURS }, now + after);
        kept.unwrap().is_some()
    };
    assert!(keep(1, true, 200));
    assert!(keep(0, false, 100));
    settle(&images);
    let first = &images.list()[0];
    assert_eq!(
        (first.kind, first.vm, first.expires_s),
        (Kind::KeptDisk, Some(VM), Some(now + 86_500))
    );
    let mode = |i: usize| paths[i].metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(0), mode(1)), (theirs, 0o600), "the operator's stays as it is");
    assert!(keep(2, true, 300));
    let listed = || images.list().into_iter().map(|i| i.path).collect::<Vec<_>>();
    assert_eq!(listed(), paths[1..3]);
    assert!(paths[0].exists(), "the operator's is only forgotten");
    // What took the place of a kept file is not ours.
    std::fs::rename(lab.file("other", &[1]), &paths[1]).unwrap();
    assert_eq!(images.prune(now + 86_600), 1);
    assert!(paths[1].exists());
    assert_eq!(listed(), paths[2..3]);
    let larger = lab.file("larger", &[pages.clone(), pages.clone(), pages].concat());
    assert_eq!(images.keep(&larger, Kind::KeptDisk, OURS).unwrap(), None);
    assert!(!larger.exists());
    assert_eq!(listed(), paths[2..3], "what is too large drives nothing out");
    assert!(images.keep(&paths[3], Kind::Image, OURS).is_err());
    drop(images);

    lab.keep_bytes = each / 2;
    let (images, _) = lab.open();
    images.prune(now);
    assert!(images.list().is_empty() && !paths[2].exists(), "a lower bound holds at once");
    drop(images);
    lab.keep_bytes = 0;
    let (images, _) = lab.open();
    assert_eq!(images.keep(&paths[3], Kind::KeptDisk, THEIRS).unwrap(), None);
    assert!(paths[3].exists());
    drop(corpus);
}

#[test]
fn what_is_kept_can_be_removed_or_become_the_operators() {
    let lab = Lab::new();
    let paths = ["a", "b"].map(|name| lab.file(name, &[1]));
    let (images, _) = lab.open();
    for path in &paths {
        images.keep(path, Kind::KeptDisk, OURS).unwrap();
    }
    assert!(images.remove(&paths[0]).unwrap());
    assert!(!paths[0].exists());
    assert_eq!(images.add(&paths[1]).unwrap().kind, Kind::Image);
    assert_eq!(images.keep(&paths[1], Kind::KeptDisk, OURS).unwrap().unwrap().expires_s, None);
    assert_eq!(images.prune(u64::MAX), 0);
    assert!(!images.remove(&paths[1]).unwrap());
    assert!(paths[1].exists());
}

#[test]
fn memory_is_kept_sparse_bounded_and_across_restarts() {
    let mut lab = Lab::new();
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 30).unwrap();
    for (n, at) in [(1, 0), (0, 1), (2, 2), (3, 70_000), (0, 70_001)] {
        memory.write_all_at(&page(n), at << 12).unwrap();
    }
    let (images, corpus) = lab.open();
    let kept = images.keep_memory(&memory, VM, COPY, false).unwrap().unwrap();
    assert_eq!(kept.path, lab.path(&format!("state/kept/{COPY}.mem")));
    assert_eq!((kept.kind, kept.bytes), (Kind::KeptMemory, 1 << 30));
    assert!(kept.allocated <= 64 << 10, "{}", kept.allocated);
    assert_eq!(kept.path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(images.keep_memory(&memory, VM, COPY, false).is_err(), "a copy is kept once");
    assert!(kept.path.exists());
    settle(&images);
    assert!([1, 2, 3].iter().all(|n| has(&corpus, *n)));
    assert_eq!(corpus.size().0, 3);
    drop((images, corpus));

    std::fs::write(lab.path("state/kept/half.mem"), b"what a killed daemon left").unwrap();
    let (images, corpus) = lab.open();
    assert!(!lab.path("state/kept/half.mem").exists());
    settle(&images);
    assert!(has(&corpus, 3));
    drop((images, corpus));

    lab.keep_bytes = 4096;
    let other = CopyId([1; 16]);
    let (images, _) = lab.open();
    assert_eq!(images.keep_memory(&memory, VM, other, false).unwrap(), None);
    assert!(!lab.path(&format!("state/kept/{other}.mem")).exists());
}

#[test]
fn what_came_in_vain_waits_for_the_next_try_whatever_the_bound_says() {
    let mut lab = Lab::new();
    lab.keep_bytes = 0;
    let disk = |copy: u8, name: &str, pages: usize| {
        lab.file(&format!("{VM}-{}-{name}", CopyId([copy; 16])), &vec![copy; pages])
    };
    let (first, second, other) =
        (disk(1, "disk0.raw", 8), disk(2, "disk0.raw", 16), disk(1, "disk1.raw", 1));
    let memory = tempfile::tempfile().unwrap();
    memory.write_all_at(&page(9), 0).unwrap();
    let (images, corpus) = lab.open();
    for path in [&first, &other] {
        assert!(images.keep(path, Kind::KeptDisk, IN_VAIN).unwrap().is_some());
    }
    let kept = images.keep_memory(&memory, VM, COPY, true).unwrap().unwrap();
    let now = kept::wall_s();
    assert!(kept.expires_s.unwrap() <= now + 3600 && kept.expires_s.unwrap() > now + 3000);
    drop((images, corpus));

    let (images, corpus) = lab.open();
    assert_eq!(images.prune(now), 0, "also after a restart");
    settle(&images);
    assert!(has(&corpus, 1) && has(&corpus, 9));
    images.keep(&second, Kind::KeptDisk, IN_VAIN).unwrap().unwrap();
    assert!(!first.exists(), "the second try had all that the first had");
    assert!(second.exists() && other.exists() && kept.path.exists());
    images.keep(&disk(3, "disk0.raw", 1), Kind::KeptDisk, IN_VAIN).unwrap().unwrap();
    assert!(second.exists(), "the third had not");
    images.end_in_vain(VmId([1; 16]));
    assert_eq!(images.list().len(), 4);
    images.end_in_vain(VM);
    assert!(images.list().is_empty() && !second.exists() && !kept.path.exists());

    images.keep(&disk(4, "disk0.raw", 1), Kind::KeptDisk, IN_VAIN).unwrap().unwrap();
    assert_eq!(images.prune(now + 3000), 0);
    assert_eq!(images.prune(kept::wall_s() + 3600), 1);
}

#[test]
fn nothing_is_written_where_no_room_is_left() {
    let mut lab = Lab::new();
    // What the file system must keep free is gone when two pieces are written.
    lab.room = |dir| {
        let files = std::fs::read_dir(dir)?.map(|f| Ok(f?.metadata()?.blocks() * 512));
        Ok((3_u64 << 20).saturating_sub(files.sum::<std::io::Result<u64>>()?))
    };
    let memory = tempfile::tempfile().unwrap();
    memory.write_all_at(&vec![7; 2 << 20], 0).unwrap();
    let (images, _) = lab.open();
    let kept = images.keep_memory(&memory, VM, COPY, false).unwrap().unwrap();
    let other = CopyId([1; 16]);
    for in_vain in [false, true] {
        assert_eq!(images.keep_memory(&memory, VM, other, in_vain).unwrap(), None);
        assert!(!lab.path(&format!("state/kept/{other}.mem")).exists());
    }
    // Who needs the room for a VM that comes gets it, but only where that is enough.
    let theirs = lab.file("theirs.raw", &[1]);
    images.keep(&theirs, Kind::KeptDisk, THEIRS).unwrap();
    let spare = images.spare_bytes(lab.dir.path());
    assert_eq!(spare, kept.allocated, "the operator's is not ours to give");
    assert!(!images.give_up(lab.dir.path(), spare + 1, VM) && kept.path.exists());
    assert!(images.give_up(lab.dir.path(), 4096, VM));
    assert!(!kept.path.exists() && theirs.exists());
}

#[test]
fn ending_does_not_wait_for_a_file_to_be_read() {
    let lab = Lab::new();
    let path = lab.path("sparse.img");
    // Its digest alone takes minutes.
    File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let (images, _) = lab.open();
    images.library.insert(&path, Some(Listed::Image), None).unwrap();
    images.refresh();
    assert!(!images.wait_indexed(Instant::now() + Duration::from_millis(50)));
    let begun = Instant::now();
    drop(images);
    assert!(begun.elapsed() < Duration::from_secs(60));
}
