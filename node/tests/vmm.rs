//! The VM driver against the real QEMU of this machine, under TCG, with firmware as the only guest.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use godwit::vmm::memfd::PAGE;
use godwit::vmm::probe::{Kvm, MemoryBudget};
use godwit::vmm::resolved::BASELINE_CPU;
use godwit::vmm::selftest::{self, SelfTestError};
use godwit::vmm::{
    Accel, AccelChoice, Adoption, Exit, HostCaps, Mode, Outgoing, ProcessError, Qemu, Refusal,
    ResolvedSpec, StartParams, copy_dirs, kill_copy,
};
use tokio::io::{AsyncBufReadExt, BufReader};

mod common;
use common::{Cleanup, QEMU, SOON, params, resolve};

const MEMORY: u64 = 64 << 20;

fn spec() -> ResolvedSpec {
    resolve("name = \"fw\"\nmemory = \"64M\"\nserial1 = true")
}

fn now_micros() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_micros()).unwrap()
}

#[tokio::test]
async fn a_started_vm_stands_until_cont_and_tells_when_it_ran() {
    let cleanup = Cleanup::new();
    let dir = cleanup.dir("a");
    let qemu = Qemu::start(params(spec(), &dir, Mode::Boot)).await.unwrap();
    assert!(!qemu.run_state().await.unwrap().running);
    assert_eq!(qemu.memory().allocated().unwrap(), 0, "not one instruction has run");
    assert_eq!(qemu.stop().await.unwrap(), None, "it does not run");
    let before = now_micros();
    let resumed = qemu.cont().await.unwrap().unwrap();
    assert!((before..=now_micros()).contains(&resumed.micros), "{resumed:?}");
    assert_eq!(qemu.cont().await.unwrap(), None, "it runs already");
    let stopped = qemu.stop().await.unwrap().unwrap();
    assert!((resumed.micros..=now_micros()).contains(&stopped.micros));
    assert_eq!(qemu.run_state().await.unwrap().status, "paused");
    assert!(qemu.console().exists() && qemu.serial1().unwrap().exists());
    assert_eq!(copy_dirs(cleanup.0.path()).unwrap(), [dir]);
    assert_eq!(qemu.quit(SOON).await.unwrap(), Exit::Code(0));
}

#[tokio::test]
async fn a_qemu_outlives_its_node_and_is_found_again() {
    let cleanup = Cleanup::new();
    let dir = cleanup.dir("a");
    let qemu = Qemu::start(params(spec(), &dir, Mode::Boot)).await.unwrap();
    let (pid, copy) = (qemu.pid(), qemu.copy());
    qemu.cont().await.unwrap();
    qemu.stop().await.unwrap();
    qemu.memory().write_page(9000, &[0xa5; PAGE]).unwrap();
    drop(qemu);
    let Adoption::Alive(again) = Qemu::readopt(&dir).await.unwrap() else { panic!("gone") };
    assert_eq!((again.pid(), again.copy()), (pid, copy));
    assert_eq!(again.run_state().await.unwrap().status, "paused");
    let mut page = [0; PAGE];
    again.memory().read_page(9000, &mut page).unwrap();
    assert_eq!(page, [0xa5; PAGE]);
    assert!(again.cont().await.unwrap().is_some());
    again.kill().await.unwrap();
    assert!(again.exit().is_some());
    assert!(again.run_state().await.is_err());
    let Adoption::Gone(record) = Qemu::readopt(&dir).await.unwrap() else { panic!("alive") };
    assert_eq!(record.copy, copy);
    kill_copy(&dir).await.unwrap();
}

/// The node that the next test kills: this program again, with a directory in its environment.
#[tokio::test]
async fn a_node_to_be_killed() {
    let Some(dir) = std::env::var_os("GODWIT_TEST_NODE_DIR") else { return };
    let qemu = Qemu::start(params(spec(), Path::new(&dir), Mode::Boot)).await.unwrap();
    qemu.cont().await.unwrap();
    qemu.memory().write_page(9000, &[0x3c; PAGE]).unwrap();
    println!("\nstarted {}", qemu.pid());
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn kill_9_of_the_node_leaves_the_guest_running_and_managed_by_the_next() {
    let cleanup = Cleanup::new();
    let dir = cleanup.dir("a");
    let mut node = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_node_to_be_killed", "--nocapture"])
        .env("GODWIT_TEST_NODE_DIR", &dir)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(node.stdout.take().unwrap()).lines();
    let pid: u32 = loop {
        let line = tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
        if let Some(pid) = line.strip_prefix("started ") {
            break pid.parse().unwrap();
        }
    };
    node.kill().await.unwrap();
    let Adoption::Alive(again) = Qemu::readopt(&dir).await.unwrap() else { panic!("gone") };
    assert_eq!(again.pid(), pid);
    assert!(again.run_state().await.unwrap().running);
    let mut page = [0; PAGE];
    again.memory().read_page(9000, &mut page).unwrap();
    assert_eq!(page, [0x3c; PAGE]);
    assert_eq!(again.quit(SOON).await.unwrap(), Exit::Unknown, "it is nobody's child here");
}

#[tokio::test]
async fn a_recycled_process_number_is_not_adopted() {
    let cleanup = Cleanup::new();
    let dir = cleanup.dir("a");
    let qemu = Qemu::start(params(spec(), &dir, Mode::Boot)).await.unwrap();
    qemu.quit(SOON).await.unwrap();
    let mut stranger = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let path = dir.join("copy.json");
    let mut record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["process"]["pid"] = stranger.id().into();
    std::fs::write(&path, record.to_string()).unwrap();
    assert!(matches!(Qemu::readopt(&dir).await.unwrap(), Adoption::Gone(_)));
    kill_copy(&dir).await.unwrap();
    assert!(stranger.try_wait().unwrap().is_none(), "the stranger lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[tokio::test]
async fn a_qemu_that_was_not_recorded_is_ended() {
    let cleanup = Cleanup::new();
    let dir = cleanup.dir("a");
    let qemu = Qemu::start(params(spec(), &dir, Mode::Boot)).await.unwrap();
    let path = dir.join("copy.json");
    let mut record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["process"] = serde_json::Value::Null;
    std::fs::write(&path, record.to_string()).unwrap();
    let pid = qemu.pid();
    drop(qemu);
    assert!(matches!(Qemu::readopt(&dir).await.unwrap(), Adoption::Gone(_)));
    let end = godwit::vmm::pidfd::PidFd::open(pid);
    if let Ok(process) = end {
        tokio::time::timeout(SOON, process.wait()).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_qemu_that_does_not_start_says_why() {
    let cleanup = Cleanup::new();
    let mut wrong = spec();
    wrong.cpu = "NoSuchCpu-v1".into();
    let error = Qemu::start(params(wrong, &cleanup.dir("a"), Mode::Boot)).await.unwrap_err();
    assert!(matches!(error, ProcessError::Exited { exit: Exit::Code(1), .. }), "{error:?}");
    assert!(error.to_string().contains("NoSuchCpu-v1"), "{error}");
    let mut absent = params(spec(), &cleanup.dir("b"), Mode::Boot);
    absent.qemu = "/nonexistent/qemu".into();
    let error = Qemu::start(absent).await.unwrap_err().to_string();
    assert!(error.contains("running /nonexistent/qemu"), "{error}");
    let mut nics = resolve("name = \"a\"\nmemory = \"64M\"\n[[nic]]\nwire = \"lan\"");
    nics.memory = MEMORY;
    let error = Qemu::start(params(nics, &cleanup.dir("c"), Mode::Boot)).await.unwrap_err();
    assert!(error.to_string().contains("1 NICs, 0 taps"), "{error}");
}

#[tokio::test]
async fn one_image_has_one_qemu() {
    let cleanup = Cleanup::new();
    let image = cleanup.dir("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let text = format!(
        "name = \"d\"\nmemory = \"64M\"\n[[disk]]\npath = \"{}\"\nformat = \"raw\"\nshared = true",
        image.display()
    );
    let first = Qemu::start(params(resolve(&text), &cleanup.dir("a"), Mode::Boot)).await.unwrap();
    let error = Qemu::start(params(resolve(&text), &cleanup.dir("b"), Mode::Boot)).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("lock"), "{error}");
    // One that waits for a migration does not take the lock before the guest is its own.
    let waiting = params(resolve(&text), &cleanup.dir("c"), Mode::Incoming);
    let waiting = Qemu::start(waiting).await.unwrap();
    waiting.quit(SOON).await.unwrap();
    first.quit(SOON).await.unwrap();
}

/// Passes bytes both ways between a socket that the source connects to and one that the destination listens on.
async fn pump(listener: tokio::net::UnixListener, to: PathBuf) -> u64 {
    let (mut source, _) = listener.accept().await.unwrap();
    let mut destination = tokio::net::UnixStream::connect(to).await.unwrap();
    let copied = tokio::io::copy_bidirectional(&mut source, &mut destination).await;
    copied.map_or(0, |(forth, _)| forth)
}

async fn start_pair(cleanup: &Cleanup) -> (Qemu, Qemu, tokio::task::JoinHandle<u64>) {
    let source = Qemu::start(params(spec(), &cleanup.dir("s"), Mode::Boot)).await.unwrap();
    let destination = params(spec(), &cleanup.dir("dst"), Mode::Incoming);
    let destination = Qemu::start(destination).await.unwrap();
    let listen = UnixListener::bind(cleanup.dir("out.sock")).unwrap();
    listen.set_nonblocking(true).unwrap();
    let listen = tokio::net::UnixListener::from_std(listen).unwrap();
    let to = cleanup.dir("in.sock");
    destination.incoming_start(&to, false).await.unwrap();
    let pump = tokio::spawn(pump(listen, to));
    (source, destination, pump)
}

/// Waits until QEMU has gone over the guest's memory at least `rounds` times, by its own events.
async fn wait_rounds(qemu: &Qemu, rounds: u64) {
    let mut events = qemu.qmp().events_after(0);
    let enough = events.find(|event| {
        event.name == "MIGRATION_PASS" && event.data["pass"].as_u64().is_some_and(|n| n >= rounds)
    });
    tokio::time::timeout(SOON, enough).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_move_waits_for_stop_and_stop_completes_it() {
    let cleanup = Cleanup::new();
    let (source, destination, pump) = start_pair(&cleanup).await;
    source.cont().await.unwrap();
    source.memory().write_page(12_000, &[0x5a; PAGE]).unwrap();
    let how = Outgoing::default();
    source.outgoing_start(&cleanup.dir("out.sock"), how).await.unwrap();
    wait_rounds(&source, 5).await;
    source.set_max_bandwidth(1 << 20).await.unwrap();
    let info = source.query_migrate().await.unwrap();
    assert_eq!(info.status.as_deref(), Some("active"), "it iterates: nothing acknowledged");
    assert!(source.run_state().await.unwrap().running);
    source.set_max_bandwidth(0).await.unwrap();
    let stopped = source.stop().await.unwrap().unwrap();
    destination.wait_incoming(SOON).await.unwrap();
    assert_eq!(destination.run_state().await.unwrap().status, "paused");
    assert_eq!(source.wait_outgoing(SOON).await.unwrap().status.as_deref(), Some("completed"));
    assert_eq!(source.run_state().await.unwrap().status, "postmigrate");
    let mut page = [0; PAGE];
    destination.memory().read_page(12_000, &mut page).unwrap();
    assert_eq!(page, [0x5a; PAGE]);
    let resumed = destination.cont().await.unwrap().unwrap();
    assert!(resumed > stopped);
    assert!(pump.await.unwrap() > 0);
    destination.stop().await.unwrap();
    assert!(source.cont().await.unwrap().is_some(), "the source could have gone on");
    source.quit(SOON).await.unwrap();
    destination.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn what_came_without_its_memory_can_leave_again() {
    let cleanup = Cleanup::new();
    let source = Qemu::start(params(spec(), &cleanup.dir("s"), Mode::Boot)).await.unwrap();
    source.cont().await.unwrap();
    source.stop().await.unwrap();
    // The same memory at both ends and a stream without it: what the node does, without a network between.
    let second = StartParams {
        memory: source.memory().clone(),
        ..params(spec(), &cleanup.dir("dst"), Mode::Incoming)
    };
    let second = Qemu::start(second).await.unwrap();
    second.incoming_start(&cleanup.dir("in.sock"), true).await.unwrap();
    let list = [("x-ignore-shared", true), ("events", true), ("return-path", true)];
    source.qmp().migrate_set_capabilities(&list).await.unwrap();
    let uri = format!("unix:{}", cleanup.dir("in.sock").display());
    source.qmp().migrate(&uri).await.unwrap();
    second.wait_incoming(SOON).await.unwrap();
    let info = source.wait_outgoing(SOON).await.unwrap();
    let sent = info.ram.unwrap().transferred;
    assert!(sent < MEMORY / 16, "{sent} bytes: the memory was sent");
    source.quit(SOON).await.unwrap();
    assert!(second.cont().await.unwrap().is_some());
    let third = Qemu::start(params(spec(), &cleanup.dir("t"), Mode::Incoming)).await.unwrap();
    third.incoming_start(&cleanup.dir("in2.sock"), false).await.unwrap();
    second.outgoing_start(&cleanup.dir("in2.sock"), Outgoing::default()).await.unwrap();
    second.stop().await.unwrap();
    third.wait_incoming(SOON).await.unwrap();
    assert!(third.memory().allocated().unwrap() > 0, "this time the memory was sent");
    second.quit(SOON).await.unwrap();
    assert!(third.cont().await.unwrap().is_some());
    third.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn a_stopped_source_never_resumes_by_itself() {
    let cleanup = Cleanup::new();
    let (source, destination, pump) = start_pair(&cleanup).await;
    source.cont().await.unwrap();
    // 64 KiB/s: the stream is far from its end when it is cut.
    let how = Outgoing { max_bandwidth: 64 << 10, ..Outgoing::default() };
    source.outgoing_start(&cleanup.dir("out.sock"), how).await.unwrap();
    source.stop().await.unwrap().unwrap();
    destination.kill().await.unwrap();
    pump.abort();
    let info = source.wait_outgoing(SOON).await.unwrap();
    assert_eq!(info.status.as_deref(), Some("failed"), "{info:?}");
    assert_eq!(source.run_state().await.unwrap().status, "paused");
    assert!(source.cont().await.unwrap().is_some());
    source.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn a_cancelled_move_leaves_the_guest_running() {
    let cleanup = Cleanup::new();
    let (source, destination, pump) = start_pair(&cleanup).await;
    source.cont().await.unwrap();
    let how = Outgoing { max_bandwidth: 64 << 10, ..Outgoing::default() };
    source.outgoing_start(&cleanup.dir("out.sock"), how).await.unwrap();
    source.migrate_cancel().await.unwrap();
    let info = source.wait_outgoing(SOON).await.unwrap();
    assert_eq!(info.status.as_deref(), Some("cancelled"));
    assert!(source.run_state().await.unwrap().running);
    let error = destination.wait_incoming(SOON).await.unwrap_err();
    assert!(
        matches!(error, ProcessError::Migration { .. } | ProcessError::Exited { .. }),
        "{error}"
    );
    pump.abort();
    destination.kill().await.unwrap();
    source.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn this_host_is_probed_and_checks_a_vm_by_name() {
    let caps = HostCaps::probe(Path::new(QEMU)).await.unwrap();
    caps.check_migration().unwrap();
    println!("QEMU {} ({}), KVM {:?}", caps.version_text(), caps.package, caps.kvm);
    let machine = caps.newest_machine().unwrap().to_owned();
    let budget = MemoryBudget { limit: 128 << 20, used: 0 };
    let mut vm = spec();
    vm.machine.clone_from(&machine);
    caps.check_accepts(&vm, budget).await.unwrap();
    let full = MemoryBudget { limit: 128 << 20, used: 65 << 20 };
    let refused = caps.check_accepts(&vm, full).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the VM needs 64 MiB of memory, 63 MiB of this host's limit of 128 MiB are free"
    );
    vm.cpu = "Nehalem-v1,+avx512f".into();
    let refused = caps.check_accepts(&vm, budget).await.unwrap_err();
    assert!(
        matches!(&refused, Refusal::MissingCpuFeatures { features, .. } if features == "avx512f")
    );
    vm.cpu = "NoSuchCpu".into();
    let refused = caps.check_accepts(&vm, budget).await.unwrap_err();
    assert!(matches!(refused, Refusal::BadCpu { .. }), "{refused}");
    vm.machine = "pc-q35-99.9".into();
    let refused = caps.check_accepts(&vm, budget).await.unwrap_err();
    assert!(refused.to_string().contains("does not know machine type pc-q35-99.9"), "{refused}");
    let auto = caps.choose_accel(AccelChoice::Auto).unwrap();
    assert_eq!(auto == Accel::Kvm, caps.kvm == Kvm::Works);
    assert!(HostCaps::probe(Path::new("/nonexistent/qemu")).await.is_err());
    assert!(HostCaps::probe(Path::new("/bin/true")).await.is_err());
}

#[tokio::test]
async fn the_trial_guest_passes_where_linux_runs() {
    let caps = HostCaps::probe(Path::new(QEMU)).await.unwrap();
    let machine = caps.newest_machine().unwrap();
    let run = |accel, cpu| selftest::run(Path::new(QEMU), accel, machine, cpu);
    run(Accel::Tcg, BASELINE_CPU).await.unwrap();
    // A CPU without POPCNT: the trial takes an invalid opcode without a handler and QEMU ends in a triple fault.
    let failed = run(Accel::Tcg, "Nehalem-v1,-popcnt").await.unwrap_err();
    assert!(matches!(failed, SelfTestError::Wrong { .. }), "{failed}");
    if let Kvm::Limited(reason) = &caps.kvm {
        println!("KVM with the baseline: {reason}");
        let kvm = run(Accel::Kvm, "host,-arch-capabilities").await;
        println!("KVM with what it has: {kvm:?}");
    }
}

/// `GODWIT_OLD_QEMU` names a QEMU before 8.1 unpacked beside, such as Debian 12's own; without it the answer of one is
/// put in its place.
#[tokio::test]
async fn an_older_qemu_is_refused_by_the_name_of_what_it_lacks() {
    let caps = match std::env::var_os("GODWIT_OLD_QEMU") {
        Some(path) => HostCaps::probe(Path::new(&path)).await.unwrap(),
        None => {
            let mut caps = HostCaps::probe(Path::new(QEMU)).await.unwrap();
            caps.capabilities.retain(|name| name != "switchover-ack");
            caps.version = [7, 2, 22];
            caps
        }
    };
    let version = caps.version_text();
    assert_eq!(
        caps.check_migration().unwrap_err().to_string(),
        format!(
            "QEMU {version} on this host has no migration capability switchover-ack; \
             install QEMU 8.2 or newer (scripts/setup does)"
        )
    );
}

#[tokio::test]
async fn a_qemu_without_what_a_move_sets_is_refused_before_it_begins() {
    let mut caps = HostCaps::probe(Path::new(QEMU)).await.unwrap();
    caps.check_migration().unwrap();
    let refused = |caps: &HostCaps, what: &str| {
        let cause = caps.check_migration().unwrap_err().to_string();
        assert!(cause.contains(&format!("has no migration {what}; install QEMU 8.2")), "{cause}");
    };
    // As QEMU 8.1.
    caps.parameters.retain(|name| name != "avail-switchover-bandwidth");
    refused(&caps, "parameter avail-switchover-bandwidth");
    caps.capabilities.retain(|name| name != "pause-before-switchover");
    refused(&caps, "capability pause-before-switchover");
}

#[tokio::test]
async fn a_tap_is_taken_back_from_a_living_qemu() {
    let cleanup = Cleanup::new();
    let Some(tap) = open_tap() else {
        println!("skipped: no right to make a tap");
        return;
    };
    let mut with_nic = params(
        resolve("name = \"n\"\nmemory = \"64M\"\n[[nic]]\nwire = \"lan\""),
        &cleanup.dir("a"),
        Mode::Boot,
    );
    with_nic.taps.push(tap);
    let qemu = Qemu::start(with_nic).await.unwrap();
    drop(qemu);
    let Adoption::Alive(again) = Qemu::readopt(&cleanup.dir("a")).await.unwrap() else {
        panic!("gone")
    };
    let tap = again.tap(0).unwrap();
    let link =
        std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&tap)));
    assert_eq!(link.unwrap(), Path::new("/dev/net/tun"));
    assert!(again.tap(1).is_err());
    again.quit(SOON).await.unwrap();
}

/// A tap of its own, unnamed, gone with its last descriptor.
fn open_tap() -> Option<OwnedFd> {
    let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun").ok()?;
    let mut request = [0u8; 40];
    request[..7].copy_from_slice(b"gwtst%d");
    // IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    request[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which is 40 bytes on 64-bit Linux.
    let result = unsafe { libc::ioctl(fd, 0x4004_54ca, request.as_mut_ptr()) };
    (result == 0).then(|| OwnedFd::from(file))
}
