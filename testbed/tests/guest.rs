//! The guests of the lab, run by QEMU alone: they start, obey, and notice when their memory was changed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use godwit_testbed::guest::disk::DiskForm;
use godwit_testbed::guest::pattern::{PAGE_BYTES, page_bytes};
use godwit_testbed::guest::wire::{
    CONTROL_PORT, Corrupt, READY, Reply, Stats, TCP_ECHO_PORT, UDP_ECHO_PORT,
};
use godwit_testbed::guest::{
    Accel, Cache, GuestAddress, GuestControl, GuestFiles, GuestKind, QemuSpec, qemu_command,
};

/// How long a guest may take to start, and to say something.
const BOOT: Duration = Duration::from_secs(180);

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
        Self::start_with(kind, memory_mib, accel, boot_deadline, None, &[]).await
    }

    async fn start_with(
        kind: GuestKind,
        memory_mib: u32,
        accel: Accel,
        boot_deadline: Duration,
        address: Option<GuestAddress>,
        more: &[String],
    ) -> anyhow::Result<Self> {
        let files = GuestFiles::prepare(kind, &Cache::open()?)?;
        let dir = tempfile::tempdir()?;
        let mut spec = QemuSpec::new(dir.path(), memory_mib, accel);
        let disk = dir.path().join("vm.img");
        spec.disk = files.make_disk(&disk, DiskForm::Raw)?.then_some(disk);
        spec.address = address;
        let started = Instant::now();
        let qemu = qemu_command(&files, &spec)?
            .args(more)
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

    /// Waits for a text on the console, which is slower than the control channel.
    async fn says(&self, text: &str) {
        let said = async {
            while !self.console().contains(text) {
                // The log is looked at again.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(BOOT, said).await.unwrap();
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

    /// Where in guest memory a page of the workload lies that has one of these (index, version).
    fn find(&self, seed: u64, candidates: impl Iterator<Item = (u32, u32)>) -> Vec<Found> {
        let wanted: HashMap<Vec<u8>, (u32, u32)> = candidates
            .map(|(index, version)| (page_bytes(seed, index, version).to_vec(), (index, version)))
            .collect();
        let memory = self.open_memory();
        let mut page = vec![0; PAGE_BYTES];
        let offsets = (0..u64::from(self.spec.memory_mib) * 256).map(|at| at * PAGE_BYTES as u64);
        offsets
            .filter_map(|offset| {
                memory.read_exact_at(&mut page, offset).unwrap();
                let (index, version) = *wanted.get(&page)?;
                Some(Found { offset, index, version })
            })
            .collect()
    }
}

/// A page of the workload in guest memory.
#[derive(Debug)]
struct Found {
    offset: u64,
    index: u32,
    version: u32,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Rewrites pages of `mb` MiB; every one must verify, and as many must be written as the rate asks for, not faster.
async fn churns_and_verifies(guest: &mut Running, mb: u32, rate_kbps: u32) {
    guest.control.churn(mb, rate_kbps, false).await.unwrap();
    let start = Instant::now();
    let before = guest.control.stats(true).await.unwrap();
    assert_eq!(before.pages, u64::from(mb) * 256);
    assert!(before.churning);
    let written =
        |now: &Stats| (now.pages_written - before.pages_written) as f64 * PAGE_BYTES as f64;
    let after = loop {
        let now = guest.control.stats(false).await.unwrap();
        if written(&now) >= 2e3 * f64::from(rate_kbps) {
            break now;
        }
        assert!(start.elapsed() < Duration::from_secs(120), "not two seconds' worth: {now:?}");
        // Its counters are all there is to look at.
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let bytes = written(&after);
    let kbps = bytes / 1000.0 / start.elapsed().as_secs_f64();
    println!("churn asked {rate_kbps} kB/s, got {kbps:.0}; {after:?}");
    assert!(kbps < 1.3 * f64::from(rate_kbps), "{kbps} kB/s");
    assert!(after.ticks > before.ticks);
    let during = guest.control.verify().await.unwrap();
    assert_eq!((during.pages_verified, during.pages_corrupt), (before.pages, 0));
    guest.control.stop().await.unwrap();
    let first = guest.control.verify().await.unwrap();
    let again = guest.control.verify().await.unwrap();
    assert_eq!(first, again, "pages changed after stop");
    assert_eq!(first.versions_total, first.pages_written);
    assert_eq!(first.pages_corrupt, 0);
}

/// Changes a page behind the guest's back, in each way; exactly it must be reported, as what it is.
async fn notices_changed_pages(guest: &mut Running) {
    let stats = guest.control.stats(false).await.unwrap();
    assert!(!stats.churning);
    let seed = stats.seed;
    let rewritten = (0..stats.pages as u32).flat_map(|index| [(index, 2), (index, 3)]);
    let found = guest.find(seed, rewritten);
    assert!(!found.is_empty(), "no page was rewritten");
    let Found { offset, index, version } = found[0];
    let right = page_bytes(seed, index, version);
    let older = page_bytes(seed, index, version - 1);
    let mut flipped = right;
    flipped[1234] ^= 1;
    let mut torn = right;
    torn[2048..].copy_from_slice(&older[2048..]);
    let cases = [
        ("garbage", None, flipped),
        ("zero", None, [0; PAGE_BYTES]),
        ("stale", Some(version - 1), older),
        ("torn", Some(version - 1), torn),
        ("garbage", None, page_bytes(seed, index + 1, version)),
        ("garbage", None, page_bytes(seed + 1, index, version)),
    ];
    let memory = guest.open_memory();
    for (fault, found_version, page) in cases {
        memory.write_all_at(&page, offset).unwrap();
        let result = guest.control.verify().await.unwrap();
        assert_eq!(result.pages_corrupt, 1, "{fault}");
        let expected =
            Corrupt { index, expected_version: version, fault: fault.to_owned(), found_version };
        assert_eq!(result.first_corrupt, Some(expected));
    }
    memory.write_all_at(&right, offset).unwrap();
    assert_eq!(guest.control.verify().await.unwrap().pages_corrupt, 0);
}

#[tokio::test]
async fn busybox_obeys_and_verifies_under_emulation() {
    let mut guest = Running::start(GuestKind::Busybox, 256, Accel::Tcg, BOOT).await.unwrap();
    println!("busybox guest ready after {:?}", guest.boot);
    guest.says(READY).await;
    churns_and_verifies(&mut guest, 16, 1000).await;
    notices_changed_pages(&mut guest).await;
    let refused = guest.control.churn(100_000, 0, false).await.unwrap_err();
    assert!(format!("{refused:#}").contains("mb must be"), "{refused:#}");
    // Another connection to the same guest, as after a move.
    let mut other = GuestControl::new(guest.spec.serial1());
    drop(std::mem::replace(&mut guest.control, GuestControl::new("/")));
    other.ping().await.unwrap();
}

/// Ports of this machine that were free a moment ago.
fn free_ports() -> [u16; 3] {
    let held = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|listener| listener.local_addr().unwrap().port())
}

#[tokio::test]
async fn the_agent_echoes_and_is_commanded_over_the_network() {
    let [udp, tcp, control] = free_ports();
    let forwards = format!(
        "user,id=u,hostfwd=udp:127.0.0.1:{udp}-:{UDP_ECHO_PORT},\
         hostfwd=tcp:127.0.0.1:{tcp}-:{TCP_ECHO_PORT},\
         hostfwd=tcp:127.0.0.1:{control}-:{CONTROL_PORT}"
    );
    let more = ["-netdev", &forwards, "-device", "virtio-net-pci,netdev=u"].map(str::to_owned);
    let address = GuestAddress { ip: [10, 0, 2, 15].into(), prefix: 24, mtu: Some(1300) };
    let kind = GuestKind::Busybox;
    let _guest =
        Running::start_with(kind, 256, Accel::Tcg, BOOT, Some(address), &more).await.unwrap();
    let patience = Some(Duration::from_secs(60));

    let mut stream = TcpStream::connect(("127.0.0.1", tcp)).unwrap();
    stream.set_read_timeout(patience).unwrap();
    let sent: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
    for part in sent.chunks(1000) {
        let mut echoed = vec![0; part.len()];
        stream.write_all(part).unwrap();
        stream.read_exact(&mut echoed).unwrap();
        assert_eq!(echoed, part);
    }

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(("127.0.0.1", udp)).unwrap();
    socket.set_read_timeout(patience).unwrap();
    for size in [1, 64, 1200] {
        let datagram = vec![size as u8; size];
        socket.send(&datagram).unwrap();
        let mut echoed = [0; 2000];
        let length = socket.recv(&mut echoed).unwrap();
        assert_eq!(echoed[..length], datagram);
    }

    let mut stream = TcpStream::connect(("127.0.0.1", control)).unwrap();
    stream.set_read_timeout(patience).unwrap();
    stream.write_all(b"not json\n{\"cmd\":\"stats\",\"id\":5}\n").unwrap();
    let mut lines = BufReader::new(stream).lines();
    let refused: Reply = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert!(!refused.ok && refused.id == 0);
    let stats: Reply = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert!(stats.ok && stats.id == 5 && stats.stats.is_some());
}

/// `mb` and `rate_kbps` are what the accelerator can do: a KVM without hardware underneath writes some 400 pages a second.
async fn bare_obeys_and_verifies(mut guest: Running, mb: u32, rate_kbps: u32) {
    println!("bare guest ready after {:?} under {}", guest.boot, guest.spec.accel.name());
    churns_and_verifies(&mut guest, mb, rate_kbps).await;
    notices_changed_pages(&mut guest).await;
    guest.says("bare: pages").await;
    let refused = guest.control.churn(4000, 0, false).await.unwrap_err();
    assert!(format!("{refused:#}").contains("mb must be"), "{refused:#}");
}

#[tokio::test]
async fn bare_obeys_and_verifies_under_emulation() {
    let guest = Running::start(GuestKind::Bare, 64, Accel::Tcg, BOOT).await;
    bare_obeys_and_verifies(guest.unwrap(), 16, 1000).await;
}

#[tokio::test]
async fn bare_obeys_and_verifies_under_kvm() {
    let deadline = Duration::from_secs(30);
    match Running::start(GuestKind::Bare, 64, Accel::Kvm, deadline).await {
        Ok(guest) => bare_obeys_and_verifies(guest, 1, 200).await,
        Err(cause) => println!("skipped: {cause:#}"),
    }
}

/// Slow: set `GODWIT_SLOW=1`.
#[tokio::test]
async fn debian_has_memory_worth_moving() {
    if std::env::var_os("GODWIT_SLOW").is_none() {
        println!("skipped: GODWIT_SLOW is not set");
        return;
    }
    let mut guest = Running::start(GuestKind::Debian, 512, Accel::Tcg, BOOT).await.unwrap();
    println!("debian guest ready after {:?}", guest.boot);
    let memory = fs::read(guest.memory()).unwrap();
    let pages: Vec<&[u8]> =
        memory.chunks_exact(PAGE_BYTES).filter(|page| page.iter().any(|byte| *byte != 0)).collect();
    let packed: usize =
        pages.chunks(64).map(|batch| zstd::bulk::compress(&batch.concat(), 1).unwrap().len()).sum();
    let image = fs::read(guest.spec.disk.as_ref().unwrap()).unwrap();
    let blocks: HashSet<&[u8]> = image.chunks_exact(PAGE_BYTES).collect();
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
    churns_and_verifies(&mut guest, 16, 1000).await;
    notices_changed_pages(&mut guest).await;
}
