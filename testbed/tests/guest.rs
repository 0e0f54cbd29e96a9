//! The guests of the lab, run by QEMU alone: they start, obey, and notice when their memory was changed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use godwit_testbed::guest::pattern::{PAGE_BYTES, page_bytes};
use godwit_testbed::guest::wire::READY;
use godwit_testbed::guest::{
    Accel, Cache, GuestControl, GuestFiles, GuestKind, QemuSpec, qemu_command,
};

/// A guest under QEMU alone; ends with the test.
struct Running {
    qemu: Child,
    spec: QemuSpec,
    control: GuestControl,
    boot: Duration,
    _dir: tempfile::TempDir,
}

impl Running {
    async fn start(
        kind: GuestKind,
        memory_mib: u32,
        accel: Accel,
        boot_deadline: Duration,
    ) -> anyhow::Result<Self> {
        let files = GuestFiles::prepare(kind, &Cache::open()?)?;
        let dir = tempfile::tempdir()?;
        let mut spec = QemuSpec::new(dir.path(), memory_mib, accel);
        spec.disk = files.make_disk(&dir.path().join("vm.img"))?;
        let started = Instant::now();
        let qemu = qemu_command(&files, &spec)?
            .stdin(Stdio::null())
            .stderr(File::create(dir.path().join("qemu.log"))?)
            .spawn()?;
        let control = GuestControl::new(spec.serial1());
        let mut running = Running { qemu, spec, control, boot: Duration::ZERO, _dir: dir };
        if let Err(error) = running.control.wait_ready(boot_deadline).await {
            let qemu = fs::read_to_string(running.spec.dir.join("qemu.log"))?;
            return Err(error.context(format!("{}\n{qemu}", running.console())));
        }
        running.boot = started.elapsed();
        Ok(running)
    }

    fn console(&self) -> String {
        fs::read_to_string(self.spec.console()).unwrap_or_default()
    }

    /// The guest's memory as its memfd.
    fn memory(&self) -> PathBuf {
        let fds = format!("/proc/{}/fd", self.qemu.id());
        fs::read_dir(fds)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|fd| fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().contains("memfd:")))
            .expect("QEMU has no memfd")
    }

    fn open_memory(&self) -> File {
        let path = self.memory();
        File::options().read(true).write(true).open(path).unwrap()
    }

    /// Offsets in guest memory of each page that equals `content`.
    fn find(&self, content: &[u8; PAGE_BYTES]) -> Vec<u64> {
        let memory = self.open_memory();
        let mut found = Vec::new();
        let mut page = [0; PAGE_BYTES];
        for at in 0..u64::from(self.spec.memory_mib) * 256 {
            let offset = at * PAGE_BYTES as u64;
            memory.read_exact_at(&mut page, offset).unwrap();
            if &page == content {
                found.push(offset);
            }
        }
        found
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Rewrites pages for a while; every one must verify, and about as many must have been written as the rate asks for.
async fn churns_and_verifies(guest: &mut Running) {
    guest.control.churn(16, 1000, false).await.unwrap();
    let before = guest.control.stats(true).await.unwrap();
    assert_eq!(before.pages, 4096);
    assert!(before.churning);
    let start = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = guest.control.stats(false).await.unwrap();
    let kbps = (after.pages_written - before.pages_written) as f64 * PAGE_BYTES as f64
        / 1000.0
        / start.elapsed().as_secs_f64();
    println!("churn asked 1000 kB/s, got {kbps:.0}; {after:?}");
    assert!((400.0..1300.0).contains(&kbps), "{kbps} kB/s");
    assert!(after.ticks > before.ticks);
    let during = guest.control.verify().await.unwrap();
    assert_eq!((during.pages_verified, during.pages_corrupt), (4096, 0));
    guest.control.stop().await.unwrap();
    let first = guest.control.verify().await.unwrap();
    let again = guest.control.verify().await.unwrap();
    assert_eq!(first, again, "pages changed after stop");
    assert_eq!(first.versions_total, first.pages_written);
    assert_eq!(first.pages_corrupt, 0);
}

/// Changes pages behind the guest's back; exactly those must be reported, as what they are.
async fn notices_changed_pages(guest: &mut Running) {
    // A region of its own, with every page at version 1.
    let known = guest.control.stats(false).await.unwrap().pages as u32;
    guest.control.churn(known / 256 + 8, 0, false).await.unwrap();
    let seed = guest.control.stats(false).await.unwrap().seed;
    let index = known + 77;
    let right = page_bytes(seed, index, 1);
    let found = guest.find(&right);
    assert_eq!(found.len(), 1, "page {index} of the guest's workload");
    let memory = guest.open_memory();
    let cases: [(&str, Vec<u8>); 4] = [
        ("garbage", {
            let mut page = right.to_vec();
            page[1234] ^= 1;
            page
        }),
        ("zero", vec![0; PAGE_BYTES]),
        ("garbage", page_bytes(seed, index + 1, 1).to_vec()),
        ("garbage", page_bytes(seed + 1, index, 1).to_vec()),
    ];
    for (fault, page) in cases {
        memory.write_all_at(&page, found[0]).unwrap();
        let result = guest.control.verify().await.unwrap();
        assert_eq!(result.pages_corrupt, 1);
        let corrupt = result.first_corrupt.unwrap();
        assert_eq!((corrupt.index, corrupt.expected_version), (index, 1));
        assert_eq!(corrupt.fault, fault);
    }
    memory.write_all_at(&right, found[0]).unwrap();
    assert_eq!(guest.control.verify().await.unwrap().pages_corrupt, 0);
}

#[tokio::test]
async fn busybox_obeys_and_verifies_under_emulation() {
    let mut guest =
        Running::start(GuestKind::Busybox, 256, Accel::Tcg, Duration::from_secs(60)).await.unwrap();
    println!("busybox guest ready after {:?}", guest.boot);
    assert!(guest.console().contains(READY), "{}", guest.console());
    churns_and_verifies(&mut guest).await;
    notices_changed_pages(&mut guest).await;
    let refused = guest.control.churn(100_000, 0, false).await.unwrap_err();
    assert!(format!("{refused:#}").contains("mb must be"), "{refused:#}");
    // Another connection to the same guest, as after a move.
    let mut other = GuestControl::new(guest.spec.serial1());
    drop(std::mem::replace(&mut guest.control, GuestControl::new("/")));
    other.ping().await.unwrap();
}

async fn bare_obeys_and_verifies(accel: Accel) -> anyhow::Result<()> {
    let mut guest = Running::start(GuestKind::Bare, 64, accel, Duration::from_secs(15)).await?;
    println!("bare guest ready after {:?} under {}", guest.boot, accel.name());
    churns_and_verifies(&mut guest).await;
    notices_changed_pages(&mut guest).await;
    assert!(guest.console().contains("bare: pages"));
    let refused = guest.control.churn(4000, 0, false).await.unwrap_err();
    assert!(format!("{refused:#}").contains("mb must be"), "{refused:#}");
    Ok(())
}

#[tokio::test]
async fn bare_obeys_and_verifies_under_emulation() {
    bare_obeys_and_verifies(Accel::Tcg).await.unwrap();
}

#[tokio::test]
async fn bare_obeys_and_verifies_under_kvm() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return;
    }
    if std::env::var_os("GODWIT_SLOW").is_none() {
        println!("skipped: GODWIT_SLOW is not set");
        return;
    }
    bare_obeys_and_verifies(Accel::Kvm).await.unwrap();
}

/// Slow: set `GODWIT_SLOW=1`.
#[tokio::test]
async fn debian_has_memory_worth_moving() {
    if std::env::var_os("GODWIT_SLOW").is_none() {
        println!("skipped: GODWIT_SLOW is not set");
        return;
    }
    let mut guest =
        Running::start(GuestKind::Debian, 512, Accel::Tcg, Duration::from_secs(180)).await.unwrap();
    println!("debian guest ready after {:?}", guest.boot);
    let memory = fs::read(guest.memory()).unwrap();
    let pages: Vec<&[u8]> =
        memory.chunks_exact(PAGE_BYTES).filter(|page| page.iter().any(|byte| *byte != 0)).collect();
    let packed: usize =
        pages.chunks(64).map(|batch| zstd::bulk::compress(&batch.concat(), 1).unwrap().len()).sum();
    let image = fs::read(guest.spec.disk.as_ref().unwrap()).unwrap();
    let blocks: std::collections::HashSet<&[u8]> = image.chunks_exact(PAGE_BYTES).collect();
    let unknown: Vec<&[u8]> = pages.iter().copied().filter(|page| !blocks.contains(page)).collect();
    let unknown_packed: usize = unknown
        .chunks(64)
        .map(|batch| zstd::bulk::compress(&batch.concat(), 1).unwrap().len())
        .sum();
    let mb = |bytes: usize| bytes as f64 / 1e6;
    println!(
        "non-zero {:.1} MB, zstd level 1 {:.1} MB; not in the image {:.1} MB, zstd level 1 {:.1} MB",
        mb(pages.len() * PAGE_BYTES),
        mb(packed),
        mb(unknown.len() * PAGE_BYTES),
        mb(unknown_packed)
    );
    assert!(pages.len() * PAGE_BYTES >= 180_000_000);
    churns_and_verifies(&mut guest).await;
    notices_changed_pages(&mut guest).await;
}
