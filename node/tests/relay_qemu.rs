//! Two real QEMUs, moved through both ends of the relay.
//!
//! A boot sector dirties memory all the time; the rest of the memory holds a pattern. Needs
//! `qemu-system-x86_64` 8.2 or newer and runs under TCG.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit::relay::corpus::EmptyCorpus;
use godwit::relay::dest::feed_blob;
use godwit::relay::{
    Budget, DestHandle, DestParams, DestinationSession, FileSink, SourceHandle, SourceParams,
    SourceSession, Stream,
};
use godwit_protocol::chunk::ChunkKey;
use godwit_protocol::chunk::layout::Layout;
use godwit_protocol::id::MigrationId;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

/// The last word of a source that gives up may not get through: then its silence tells.
const SILENCE: Duration = Duration::from_secs(15);
const RAM: u64 = 128 << 20;
const WAIT: Duration = Duration::from_secs(60);

/// Real mode: fills 64 KiB at 0x10000 with a counter, for ever.
const BOOT: [u8; 20] = [
    0xb8, 0x00, 0x10, 0x8e, 0xc0, 0x31, 0xdb, 0x43, 0x31, 0xff, 0xb9, 0x00, 0x80, 0x89, 0xd8, 0xfc,
    0xf3, 0xab, 0xeb, 0xf3,
];

struct Qmp {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Qmp {
    async fn connect(path: &Path) -> Self {
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(e) if began.elapsed() > WAIT => panic!("no monitor: {e}"),
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        };
        let (read, write) = stream.into_split();
        let mut qmp = Self { lines: BufReader::new(read).lines(), write };
        qmp.lines.next_line().await.unwrap().unwrap();
        qmp.run("qmp_capabilities", json!({})).await;
        qmp
    }

    async fn run(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.write.write_all(line.as_bytes()).await.unwrap();
        loop {
            let line = timeout(WAIT, self.lines.next_line()).await.unwrap().unwrap().unwrap();
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    async fn status(&mut self) -> String {
        self.run("query-status", json!({})).await["status"].as_str().unwrap().to_owned()
    }

    async fn until_status(&mut self, wanted: &str) {
        let began = Instant::now();
        loop {
            let status = self.status().await;
            if status == wanted {
                return;
            }
            assert!(began.elapsed() < WAIT, "{status} instead of {wanted}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn capabilities(&mut self, names: &[&str]) {
        let list: Vec<Value> =
            names.iter().map(|name| json!({"capability": name, "state": true})).collect();
        self.run("migrate-set-capabilities", json!({ "capabilities": list })).await;
    }
}

struct Qemu {
    child: Child,
    qmp: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn memory() -> File {
    let fd = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(RAM).unwrap();
    file
}

fn qemu(dir: &Path, name: &str, memory: &File, incoming: bool) -> Qemu {
    let qmp = dir.join(format!("{name}.qmp"));
    let _ = std::fs::remove_file(&qmp);
    let ram = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "q35,accel=tcg,memory-backend=pc.ram", "-m", "128", "-nodefaults"])
        .arg("-object")
        .arg(format!("memory-backend-file,id=pc.ram,share=on,size=128M,mem-path={ram}"))
        .arg("-drive")
        .arg(format!(
            "if=virtio,format=raw,readonly=on,file.locking=off,file.filename={}",
            dir.join("boot.img").display()
        ))
        .args(["-display", "none", "-vga", "none"])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", qmp.display()));
    if incoming {
        command.args(["-S", "-incoming", "defer"]);
    }
    let child = command.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 is needed");
    Qemu { child, qmp }
}

/// A pattern with zero, repeated, compressible and random pages above the first 16 MiB.
fn fill(memory: &File) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for page in (16 << 20) / 4096..(96 << 20) / 4096_u64 {
        let mut content = [0_u8; 4096];
        match page % 4 {
            0 => continue,
            1 => content.fill((page / 64) as u8),
            2 => content
                .iter_mut()
                .enumerate()
                .for_each(|(i, b)| *b = ((i as u64 * page) >> 9) as u8),
            _ => content.chunks_exact_mut(8).for_each(|word| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }),
        }
        memory.write_all_at(&content, page * 4096).unwrap();
    }
}

fn different_pages(a: &File, b: &File) -> Vec<u64> {
    let (mut x, mut y) = ([0; 4096], [0; 4096]);
    (0..RAM / 4096)
        .filter(|page| {
            a.read_exact_at(&mut x, page * 4096).unwrap();
            b.read_exact_at(&mut y, page * 4096).unwrap();
            x != y
        })
        .collect()
}

/// Both sessions over pipes that live in this process.
async fn sessions(dir: &Path, memory: &File) -> (SourceHandle, DestHandle) {
    let key = ChunkKey([7; 32]);
    let migration = MigrationId([1; 16]);
    let dest = DestinationSession::spawn(DestParams {
        seat: Arc::<Budget>::default().join(),
        qemu_socket: dir.join("in.sock"),
        sink: Arc::new(FileSink::new(memory.try_clone().unwrap())),
        corpus: Arc::new(EmptyCorpus),
        key: key.clone(),
        layout: Layout::new(RAM, &[]).unwrap(),
        settle: None,
        migration,
        silence_deadline: SILENCE,
        load_deadline: WAIT,
    })
    .unwrap();
    let (near, far) = tokio::io::duplex(1 << 20);
    dest.attach(Box::new(far)).await.unwrap();
    let mut near = Some(Box::new(near) as Stream);
    let source = SourceSession::spawn(SourceParams {
        seat: Arc::<Budget>::default().join(),
        listener: UnixListener::bind(dir.join("out.sock")).unwrap(),
        connect: Box::new(move || {
            let stream = near.take().ok_or(std::io::ErrorKind::ConnectionRefused.into());
            Box::pin(async { stream })
        }),
        key,
        ram_block: "pc.ram".to_owned(),
        ram_bytes: RAM,
        disks: Vec::new(),
        migration,
        bandwidth: 0,
        accept_deadline: WAIT,
        reconnect_deadline: WAIT,
    })
    .unwrap();
    (source, dest)
}

async fn wait_in(dir: &Path, name: &str, memory: &File) -> (Qemu, Qmp) {
    let qemu = qemu(dir, name, memory, true);
    let mut monitor = Qmp::connect(&qemu.qmp).await;
    monitor.capabilities(&["events", "x-ignore-shared"]).await;
    let uri = format!("unix:{}", dir.join("in.sock").display());
    let _ = std::fs::remove_file(dir.join("in.sock"));
    monitor.run("migrate-incoming", json!({"uri": uri, "exit-on-error": false})).await;
    (qemu, monitor)
}

/// A QEMU whose boot sector writes without end, with a filled memory.
async fn running_guest(dir: &Path, memory: &File) -> (Qemu, Qmp) {
    let mut image = vec![0; 1 << 20];
    image[..BOOT.len()].copy_from_slice(&BOOT);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(dir.join("boot.img"), image).unwrap();
    fill(memory);
    let source = qemu(dir, "source", memory, false);
    let qmp = Qmp::connect(&source.qmp).await;
    let counter = || {
        let mut word = [0; 2];
        memory.read_exact_at(&mut word, 0x10000).unwrap();
        u16::from_le_bytes(word)
    };
    timeout(WAIT, async {
        while counter() < 3 {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the boot sector runs");
    (source, qmp)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_and_a_lost_destination_is_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (from, to) = (memory(), memory());
    let (_source_qemu, mut source_qmp) = running_guest(dir, &from).await;
    let (dest_qemu, mut dest_qmp) = wait_in(dir, "dest", &to).await;
    let (mut source, mut dest) = sessions(dir, &to).await;

    source_qmp.capabilities(&["events", "return-path", "switchover-ack"]).await;
    source_qmp
        .run(
            "migrate-set-parameters",
            json!({"max-bandwidth": 0, "downtime-limit": 1, "avail-switchover-bandwidth": 1000}),
        )
        .await;
    let uri = format!("unix:{}", dir.join("out.sock").display());
    let began = Instant::now();
    source_qmp.run("migrate", json!({ "uri": uri })).await;
    let mut progress = source.progress();
    timeout(WAIT, progress.wait_for(|p| p.passes >= 3 && p.first_pass_nonzero_pages > 15_000))
        .await
        .expect("several passes")
        .unwrap();
    let transfer = began.elapsed();

    source.begin_cutover();
    let began = Instant::now();
    source_qmp.run("stop", json!({})).await;
    let end = timeout(WAIT, dest.ended()).await.unwrap().unwrap();
    let loaded = began.elapsed();
    let source_end = timeout(WAIT, &mut source.finished).await.unwrap().unwrap().unwrap();
    assert_eq!(end.ram_digest, source_end.ram_digest);
    assert_eq!(different_pages(&from, &to), Vec::<u64>::new());
    println!(
        "transfer {transfer:?}, loaded {loaded:?} after stop, blob {} bytes, {:?}",
        end.blob.len(),
        source_end.progress
    );
    dest_qmp.until_status("paused").await;
    let status = dest_qmp.run("query-migrate", json!({})).await["status"].clone();
    assert_eq!(status, "completed");

    // The destination's QEMU is lost before it ran: the stored stream and the memory rebuild it.
    drop((dest_qmp, dest_qemu));
    let (_again, mut again_qmp) = wait_in(dir, "again", &to).await;
    feed_blob(&dir.join("in.sock"), &end.blob, WAIT).await.unwrap();
    again_qmp.until_status("paused").await;
    assert_eq!(different_pages(&from, &to), Vec::<u64>::new());

    source.release_source(true).unwrap();
    source_qmp.until_status("postmigrate").await;
    again_qmp.run("cont", json!({})).await;
    again_qmp.until_status("running").await;
    timeout(WAIT, async {
        while different_pages(&from, &to).is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the guest goes on at the destination");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_move_leaves_the_source_running() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("boot.img"), vec![0; 1 << 20]).unwrap();
    let (from, to) = (memory(), memory());
    fill(&from);
    let source_qemu = qemu(dir, "source", &from, false);
    let mut source_qmp = Qmp::connect(&source_qemu.qmp).await;
    let (_dest_qemu, _dest_qmp) = wait_in(dir, "dest", &to).await;
    let (source, mut dest) = sessions(dir, &to).await;
    source_qmp.capabilities(&["events", "return-path", "switchover-ack"]).await;
    let uri = format!("unix:{}", dir.join("out.sock").display());
    source_qmp.run("migrate", json!({ "uri": uri })).await;
    let mut progress = source.progress();
    timeout(WAIT, progress.wait_for(|p| p.pages.literal > 1000)).await.unwrap().unwrap();
    source.abort();
    assert!(timeout(WAIT, dest.ended()).await.unwrap().is_err());
    let began = Instant::now();
    loop {
        let status = source_qmp.run("query-migrate", json!({})).await["status"].clone();
        if status == "failed" {
            break;
        }
        assert!(began.elapsed() < WAIT, "{status}");
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(source_qmp.status().await, "running");
}
