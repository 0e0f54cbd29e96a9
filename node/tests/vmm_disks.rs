//! Disks that move, against the real QEMU of this machine: mirrors, exports, the hold before the switchover. The guest
//! is halted firmware; its writes are made at its disk device by the monitor.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use godwit::vmm::{
    Adoption, MirrorParams, Mode, Outgoing, ProcessError, Qemu, ResolvedSpec, StartParams, image,
};
use godwit_protocol::id::CopyId;
use serde_json::json;

mod common;
use common::{Cleanup, SOON, params, resolve};

const SIZE: &str = "16M";
const COPY: CopyId = CopyId([5; 16]);

fn tool(program: &str, dir: &Path, args: &[&str]) -> String {
    let output = Command::new(program).current_dir(dir).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text} {complaint}");
    text
}

/// A VM with a raw disk, a qcow2 on a base, and firmware with its variables.
fn make_vm(dir: &Path) -> ResolvedSpec {
    std::fs::create_dir(dir).unwrap();
    tool("qemu-img", dir, &["create", "-q", "-f", "raw", "raw.img", SIZE]);
    tool("qemu-io", dir, &["-f", "raw", "-c", "write -P 7 1M 8M", "raw.img"]);
    tool("qemu-img", dir, &["create", "-q", "-f", "qcow2", "base.qcow2", SIZE]);
    tool("qemu-io", dir, &["-f", "qcow2", "-c", "write -P 8 0 2M", "base.qcow2"]);
    tool(
        "qemu-img",
        dir,
        &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", SIZE],
    );
    tool("qemu-io", dir, &["-f", "qcow2", "-c", "write -P 9 1M 64k", "top.qcow2"]);
    // All `hlt`: where a processor starts, too.
    std::fs::write(dir.join("code.fd"), vec![0xf4; 64 << 10]).unwrap();
    std::fs::write(dir.join("vars.fd"), vec![0x5a; 128 << 10]).unwrap();
    resolve(&format!(
        "name = \"d\"\nmemory = \"64M\"\n\
         [[disk]]\npath = \"{0}/raw.img\"\nformat = \"raw\"\n\
         [[disk]]\npath = \"{0}/top.qcow2\"\nformat = \"qcow2\"\n\
         [nvram]\ncode = \"{0}/code.fd\"\nvars = \"{0}/vars.fd\"",
        dir.display()
    ))
}

/// A VM with one raw disk.
fn small_vm(dir: &Path) -> ResolvedSpec {
    std::fs::create_dir(dir).unwrap();
    tool("qemu-img", dir, &["create", "-q", "-f", "raw", "raw.img", SIZE]);
    tool("qemu-io", dir, &["-f", "raw", "-c", "write -P 7 0 16M", "raw.img"]);
    let path = dir.join("raw.img");
    let disk = format!("[[disk]]\npath = \"{}\"\nformat = \"raw\"", path.display());
    resolve(&format!("name = \"d\"\nmemory = \"64M\"\n{disk}"))
}

/// What the guest would do: `command` of qemu-io at the device of a disk.
async fn guest(qemu: &Qemu, disk: &str, command: &str) {
    let line = format!("qemu-io -d {disk}-dev/virtio-backend \"{command}\"");
    let arguments = json!({ "command-line": line });
    let said = qemu.qmp().execute("human-monitor-command", arguments, SOON).await.unwrap();
    let said = said.as_str().unwrap_or_default();
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
}

fn mirror<'a>(disk: &'a str, socket: &'a Path) -> MirrorParams<'a> {
    MirrorParams { disk, socket, export: disk, speed: 0, top_only: false }
}

/// A destination that exports its images.
async fn destination(cleanup: &Cleanup, name: &str, source: &ResolvedSpec) -> (Qemu, PathBuf) {
    let images = cleanup.dir(&format!("{name}-images"));
    std::fs::create_dir(&images).unwrap();
    let placed = source.place(&images, COPY, |layer| Some(layer.path.clone())).unwrap();
    image::create(&placed).unwrap();
    let qemu = params(placed, &cleanup.dir(name), Mode::Incoming);
    let qemu = Qemu::start(qemu).await.unwrap();
    let socket = cleanup.dir(name).join("nbd.sock");
    qemu.nbd_serve(&socket).await.unwrap();
    qemu.nbd_serve(&socket).await.expect("one of an earlier daemon is replaced");
    for disk in qemu.spec().moving() {
        qemu.nbd_export(&disk.id, &disk.id, true).await.unwrap();
    }
    (qemu, socket)
}

/// Up to the hold before the switchover, with all mirrors finished.
async fn to_the_hold(source: &Qemu, destination: &Qemu, nbd: &Path, incoming: &Path) {
    for disk in source.spec().moving() {
        let top_only = !disk.backing.is_empty();
        source.mirror_start(MirrorParams { top_only, ..mirror(&disk.id, nbd) }).await.unwrap();
    }
    source.mirror_wait_ready(SOON).await.unwrap();
    assert_eq!(source.mirror_status().await.unwrap().len(), 3);
    destination.incoming_start(incoming, false).await.unwrap();
    let how = Outgoing { pause_before_switchover: true, ..Outgoing::default() };
    source.outgoing_start(incoming, how).await.unwrap();
    guest(source, "disk0", "write -P 3 5M 64k").await;
    guest(source, "disk1", "write -P 4 6M 4k").await;
    source.stop().await.unwrap().unwrap();
    source.wait_pre_switchover(SOON).await.unwrap();
    for disk in source.spec().moving() {
        source.mirror_finish(&disk.id, SOON).await.unwrap();
        source.mirror_finish(&disk.id, SOON).await.expect("finished is finished");
    }
    assert_eq!(source.mirror_status().await.unwrap(), []);
    for disk in destination.spec().moving() {
        destination.nbd_unexport(&disk.id).await.unwrap();
        destination.nbd_unexport(&disk.id).await.unwrap();
    }
    destination.nbd_stop().await.unwrap();
    destination.nbd_stop().await.unwrap();
}

fn assert_equal(source: &ResolvedSpec, destination: &ResolvedSpec) {
    for (from, to) in source.moving().zip(destination.moving()) {
        let [from, to, format] =
            [from.path.to_str(), to.path.to_str(), Some(from.format.name())].map(Option::unwrap);
        tool("qemu-img", Path::new("/"), &["compare", "-U", "-f", format, "-F", format, from, to]);
    }
}

#[tokio::test]
async fn a_vm_moves_with_its_disks_after_a_try_that_was_given_up() {
    let cleanup = Cleanup::new();
    let spec = make_vm(&cleanup.dir("vm"));
    let source = Qemu::start(params(spec.clone(), &cleanup.dir("s"), Mode::Boot)).await.unwrap();
    source.cont().await.unwrap();
    let (first, nbd) = destination(&cleanup, "d1", &spec).await;
    to_the_hold(&source, &first, &nbd, &cleanup.dir("in1.sock")).await;
    assert_equal(&spec, first.spec());
    // From the hold back: what was stopped stays stopped, and can go on.
    source.migrate_cancel().await.unwrap();
    let ended = source.wait_outgoing(SOON).await.unwrap();
    assert_eq!(ended.status.as_deref(), Some("cancelled"));
    assert_eq!(source.run_state().await.unwrap().status, "paused");
    assert!(source.wait_pre_switchover(SOON).await.is_err(), "it has ended");
    first.kill().await.unwrap();
    assert!(source.cont().await.unwrap().is_some());
    guest(&source, "disk0", "write -P 11 0 1M").await;
    guest(&source, "disk0", "discard 2M 1M").await;

    let (second, nbd) = destination(&cleanup, "d2", &spec).await;
    to_the_hold(&source, &second, &nbd, &cleanup.dir("in2.sock")).await;
    source.migrate_continue().await.unwrap();
    second.wait_incoming(SOON).await.unwrap();
    source.wait_outgoing(SOON).await.unwrap();
    assert!(!source.run_state().await.unwrap().running);
    assert_equal(&spec, second.spec());
    assert!(second.cont().await.unwrap().is_some());
    guest(&second, "disk0", "read -P 11 0 1M").await;
    guest(&second, "disk0", "read -P 3 5M 64k").await;
    guest(&second, "disk1", "read -P 8 0 1M").await;
    guest(&second, "disk1", "read -P 9 1M 64k").await;
    guest(&second, "disk1", "write -P 12 0 4k").await;
    second.stop().await.unwrap();
    assert!(source.cont().await.unwrap().is_some(), "the source could have gone on");
    guest(&source, "disk0", "write -P 13 0 4k").await;
    source.quit(SOON).await.unwrap();
    second.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn a_destination_lost_in_the_hold_leaves_the_source_stopped_and_whole() {
    let cleanup = Cleanup::new();
    let spec = make_vm(&cleanup.dir("vm"));
    let source = Qemu::start(params(spec.clone(), &cleanup.dir("s"), Mode::Boot)).await.unwrap();
    source.cont().await.unwrap();
    let (destination, nbd) = destination(&cleanup, "d", &spec).await;
    to_the_hold(&source, &destination, &nbd, &cleanup.dir("in.sock")).await;
    destination.kill().await.unwrap();
    source.migrate_continue().await.unwrap();
    let ended = source.wait_outgoing(SOON).await.unwrap();
    assert_eq!(ended.status.as_deref(), Some("failed"));
    assert_eq!(source.run_state().await.unwrap().status, "paused");
    assert!(source.cont().await.unwrap().is_some());
    guest(&source, "disk0", "write -P 13 0 4k").await;
    source.quit(SOON).await.unwrap();
}

/// An NBD server that can be hung and killed.
struct Target {
    child: Child,
    socket: PathBuf,
}

impl Target {
    fn start(dir: &Path, size: &str) -> Self {
        tool("qemu-img", dir, &["create", "-q", "-f", "raw", "target.img", size]);
        let (socket, pid) = (dir.join("t.sock"), dir.join("t.pid"));
        let _ = std::fs::remove_file(&pid);
        let mut command = Command::new("qemu-storage-daemon");
        command.current_dir(dir).args(["--blockdev", "file,node-name=f,filename=target.img"]);
        command.args(["--nbd-server", "addr.type=unix,addr.path=t.sock"]);
        command.args(["--export", "nbd,id=e,node-name=f,name=disk0,writable=on"]);
        let child = command.args(["--pidfile", "t.pid"]).spawn().unwrap();
        let end = Instant::now() + SOON;
        // Written once the exports are there.
        while !pid.exists() {
            assert!(Instant::now() < end, "no NBD server");
            // Another program's start: it has no other sign than its file.
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, socket }
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_mirror_that_cannot_be_says_why_and_leaves_nothing() {
    let cleanup = Cleanup::new();
    let spec = small_vm(&cleanup.dir("vm"));
    let source = Qemu::start(params(spec, &cleanup.dir("s"), Mode::Boot)).await.unwrap();
    let nowhere = cleanup.dir("none.sock");
    let error = source.mirror_start(mirror("disk0", &nowhere)).await.unwrap_err().to_string();
    assert!(error.contains("Failed to connect"), "{error}");
    let error = source.mirror_start(mirror("disk7", &nowhere)).await.unwrap_err().to_string();
    assert!(error.contains("the VM has no disk disk7"), "{error}");
    let target = Target::start(cleanup.0.path(), "8M");
    source.mirror_start(mirror("disk0", &target.socket)).await.unwrap();
    let error = source.mirror_wait_ready(SOON).await.unwrap_err();
    assert!(matches!(&error, ProcessError::Mirror { disk, .. } if disk == "disk0"), "{error}");
    assert!(error.to_string().contains("different sizes"), "{error}");
    assert!(source.mirror_finish("disk0", SOON).await.is_err(), "a failure is never a finish");
    source.mirror_abort("disk0").await.unwrap();
    source.mirror_abort("disk0").await.unwrap();
    drop(target);
    let target = Target::start(cleanup.0.path(), SIZE);
    source
        .mirror_start(MirrorParams { speed: 1 << 20, ..mirror("disk0", &target.socket) })
        .await
        .unwrap();
    let error = source.mirror_finish("disk0", SOON).await.unwrap_err().to_string();
    assert!(error.contains("has not copied everything yet"), "{error}");
    source.mirror_speed("disk0", 0).await.unwrap();
    source.mirror_wait_ready(SOON).await.unwrap();
    source.mirror_abort("disk0").await.unwrap();
    assert_eq!(source.mirror_status().await.unwrap(), []);
    source.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn a_target_that_hangs_or_is_gone_holds_nobody_up() {
    let cleanup = Cleanup::new();
    let spec = small_vm(&cleanup.dir("vm"));
    let source = Qemu::start(params(spec, &cleanup.dir("s"), Mode::Boot)).await.unwrap();
    source.cont().await.unwrap();
    for gone in [false, true] {
        let mut target = Target::start(cleanup.0.path(), SIZE);
        source.mirror_start(mirror("disk0", &target.socket)).await.unwrap();
        if gone {
            target.child.kill().unwrap();
            target.child.wait().unwrap();
        } else {
            source.mirror_wait_ready(SOON).await.unwrap();
            target.signal(nix::sys::signal::Signal::SIGSTOP);
        }
        guest(&source, "disk0", "write -P 3 5M 64k").await;
        let begin = Instant::now();
        source.mirror_abort("disk0").await.unwrap();
        assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
        assert!(source.run_state().await.unwrap().running);
    }
    // A target that is lost is not waited for: QEMU would stand still.
    let target = Target::start(cleanup.0.path(), SIZE);
    let slow = MirrorParams { speed: 1 << 20, ..mirror("disk0", &target.socket) };
    source.mirror_start(slow).await.unwrap();
    drop(target);
    let error = source.mirror_wait_ready(SOON).await.unwrap_err().to_string();
    assert!(error.contains("Input/output error"), "{error}");
    source.mirror_abort("disk0").await.unwrap();
    let target = Target::start(cleanup.0.path(), SIZE);
    source.mirror_start(mirror("disk0", &target.socket)).await.unwrap();
    source.mirror_wait_ready(SOON).await.unwrap();
    // One that is lost when all was copied: the end fails, it is not taken for finished.
    drop(target);
    guest(&source, "disk0", "write -P 4 6M 64k").await;
    let error = source.mirror_finish("disk0", SOON + SOON).await.unwrap_err().to_string();
    assert!(error.contains("Input/output error"), "{error}");
    source.mirror_abort("disk0").await.unwrap();
    source.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn a_daemon_clears_what_the_last_one_left_and_mirrors_again() {
    let cleanup = Cleanup::new();
    let spec = small_vm(&cleanup.dir("vm"));
    let dir = cleanup.dir("s");
    let source = Qemu::start(params(spec.clone(), &dir, Mode::Boot)).await.unwrap();
    source.cont().await.unwrap();
    let target = Target::start(cleanup.0.path(), SIZE);
    let slow = MirrorParams { speed: 1 << 20, ..mirror("disk0", &target.socket) };
    source.mirror_start(slow).await.unwrap();
    let exports = dir.join("nbd.sock");
    source.nbd_serve(&exports).await.unwrap();
    source.nbd_export("disk0", "disk0", false).await.unwrap();
    drop(source);
    let Adoption::Alive(source) = Qemu::readopt(&dir).await.unwrap() else { panic!("gone") };
    let left = source.mirror_status().await.unwrap();
    assert!(left.len() == 1 && left[0].disk == "disk0" && !left[0].ready, "{left:?}");
    source.mirror_abort("disk0").await.unwrap();
    source.nbd_serve(&exports).await.unwrap();
    source.nbd_export("disk0", "disk0", false).await.unwrap();
    source.mirror_start(mirror("disk0", &target.socket)).await.unwrap();
    source.mirror_wait_ready(SOON).await.unwrap();
    // What the guest writes is seen through the read-only export at once, while the mirror runs.
    guest(&source, "disk0", "write -P 3 5M 64k").await;
    let url = format!("nbd+unix:///disk0?socket={}", exports.display());
    let read = "read -P 3 5M 64k";
    assert!(!tool("qemu-io", &dir, &["-r", "-f", "raw", "-c", read, &url]).contains("failed"));
    source.stop().await.unwrap();
    source.mirror_finish("disk0", SOON).await.unwrap();
    let image = spec.disks[0].path.to_str().unwrap();
    let copy = cleanup.dir("target.img");
    drop(target);
    tool(
        "qemu-img",
        &dir,
        &["compare", "-U", "-f", "raw", "-F", "raw", image, copy.to_str().unwrap()],
    );
    source.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn writes_are_counted_and_throttled() {
    let cleanup = Cleanup::new();
    let spec = make_vm(&cleanup.dir("vm"));
    let source = Qemu::start(params(spec, &cleanup.dir("s"), Mode::Boot)).await.unwrap();
    let target = Target::start(cleanup.0.path(), SIZE);
    source.mirror_start(mirror("disk0", &target.socket)).await.unwrap();
    let names = |stats: &[(String, u64)]| stats.iter().map(|s| s.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(&source.write_stats().await.unwrap()), ["disk0", "disk1"]);
    source.throttle_disk("disk0", Some(1 << 20)).await.unwrap();
    source.throttle_disk("nvram", Some(1 << 20)).await.unwrap();
    let info = source.qmp().execute("query-block", json!({}), SOON).await.unwrap();
    assert!(info.to_string().contains("\"bps_wr\":1048576"), "{info}");
    source.throttle_disk("disk0", None).await.unwrap();
    let info = source.qmp().execute("query-block", json!({}), SOON).await.unwrap();
    assert!(!info.to_string().contains("\"bps_wr\":1048576"), "{info}");
    assert!(source.throttle_disk("disk7", None).await.is_err());
    source.quit(SOON).await.unwrap();
}

#[tokio::test]
async fn an_image_in_use_is_refused_before_anything_is_started() {
    let cleanup = Cleanup::new();
    let spec = small_vm(&cleanup.dir("vm"));
    let first = params(spec.clone(), &cleanup.dir("s"), Mode::Boot);
    let first = Qemu::start(first).await.unwrap();
    let path = spec.disks[0].path.display().to_string();
    let text =
        format!("name = \"e\"\nmemory = \"64M\"\n[[disk]]\npath = \"{path}\"\nformat = \"raw\"");
    let refused = godwit::vmm::ResolvedSpec::resolve(&text.parse().unwrap(), common::resolution());
    assert!(refused.unwrap_err().to_string().contains("is in use by another process"));
    // Started all the same, its locks refuse it.
    let second =
        StartParams { copy: CopyId([8; 16]), ..params(spec, &cleanup.dir("t"), Mode::Boot) };
    assert!(Qemu::start(second).await.unwrap_err().to_string().contains("lock"));
    first.quit(SOON).await.unwrap();
}
