//! NBD with real peers: QEMU's tools and libnbd at our server, our client at QEMU's servers.
//!
//! Needs `qemu-img`, `qemu-io`, `qemu-nbd`, `qemu-storage-daemon` and `nbdinfo`: `scripts/setup` installs them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "nbd/bounds.rs"]
mod bounds;
#[path = "nbd/peers.rs"]
mod peers;

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use godwit::nbd::{BlockSize, Client, ErrorCode, Extent, NbdError};
use serde_json::{Value, json};
use tempfile::TempDir;

use peers::{Served, StorageDaemon, qemu_nbd, refused, tool, tool_json};

const WAIT: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;
/// As a mirror's target has it.
const BLOCK: BlockSize = BlockSize { min: 4096, preferred: 64 << 10, max: 2 << 20 };

/// Content without zeros that is the same nowhere.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut all = Vec::with_capacity(len);
    while all.len() < len {
        all.extend((next() | 0x0101_0101_0101_0101).to_le_bytes());
    }
    all.truncate(len);
    all
}

/// An image of 32 MiB with three pieces of data, the rest holes.
fn image(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path).unwrap();
    file.set_len(32 * MIB).unwrap();
    for (at, len) in [(0, 64 << 10), (5 * MIB, 3 << 20), (31 * MIB + 8192, 4096)] {
        file.write_all_at(&pattern(len, at + 1), at).unwrap();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn qemu_img_copies_in_compares_maps_and_copies_out() {
    let dir = TempDir::new().unwrap();
    let (source, target) = (dir.path().join("source.raw"), dir.path().join("target.raw"));
    image(&source);
    // Old content: what the copy does not overwrite would be seen.
    fs::write(&target, pattern(32 << 20, 99)).unwrap();
    let served = Served::file(dir.path(), &target, BLOCK, false);
    let uri = served.uri();
    tool("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&source), &uri]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &uri]);
    assert!(fs::read(&source).unwrap() == fs::read(&target).unwrap());
    assert!(served.seen().zeros > 0, "{:?}", served.seen());

    let map = |what: &str| tool_json("qemu-img", &["map", "--output=json", "-f", "raw", what]);
    let areas = |map: Value| -> Vec<(u64, u64, bool)> {
        let area = |a: &Value| {
            let number = |key: &str| a[key].as_u64().unwrap();
            (number("start"), number("length"), a["zero"] == json!(true))
        };
        map.as_array().unwrap().iter().map(area).collect()
    };
    assert_eq!(areas(map(&uri)), areas(map(text(&source))));

    let out = dir.path().join("out.qcow2");
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&out)]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&source), text(&out)]);
}

#[test]
fn qemu_io_writes_zeros_discards_and_reads_back() {
    let dir = TempDir::new().unwrap();
    let target = dir.path().join("target.raw");
    image(&target);
    for (block, name) in [(BLOCK, "a"), (BlockSize::DEFAULT, "b")] {
        let socket_dir = dir.path().join(name);
        fs::create_dir(&socket_dir).unwrap();
        let served = Served::file(&socket_dir, &target, block, false);
        let uri = served.uri();
        let run = |commands: &[&str]| {
            let mut args = vec!["-f", "raw"];
            args.extend(commands.iter().flat_map(|command| ["-c", *command]));
            args.push(&uri);
            let said = tool("qemu-io", &args);
            assert!(!said.contains("failed"), "{said}");
        };
        run(&[
            "write -P 0xab 1M 4M",
            "write -f -P 0xcd 2M 64k",
            "write -z 3M 128k",
            "write -z -u 4M 512k",
            "flush",
            // Not a multiple of a block: QEMU reads and writes around it.
            "write -P 0xef 1536 700",
            "aio_write -P 0x11 8M 1M",
            "aio_write -P 0x22 9M 1M",
            "aio_flush",
            "discard 5M 64k",
        ]);
        run(&[
            "read -P 0xab 1M 1M",
            "read -P 0xcd 2M 64k",
            "read -P 0xab 2162688 983040",
            "read -P 0 3M 128k",
            "read -P 0 4M 512k",
            "read -P 0xef 1536 700",
            "read -P 0x11 8M 1M",
            "read -P 0x22 9M 1M",
        ]);
        let seen = served.seen();
        assert!(seen.zeros >= 2 && seen.trims >= 1 && seen.flushes >= 1, "{seen:?}");
        assert!(seen.punches < seen.zeros, "{seen:?}");
        assert!(seen.longest <= u64::from(block.max), "{seen:?}");
    }
    let read_only = Served::file(dir.path(), &target, BLOCK, true);
    let uri = read_only.uri();
    refused("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]);
    tool("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0xcd 2M 64k", &uri]);
    refused("qemu-io", &["-r", "-f", "raw", "-c", "read 0 4k", &uri.replace("disk0", "disk1")]);
}

#[test]
fn libnbd_sees_what_is_shown() {
    let dir = TempDir::new().unwrap();
    let target = dir.path().join("target.raw");
    image(&target);
    let served = Served::file(dir.path(), &target, BLOCK, false);
    let info = &tool_json("nbdinfo", &["--json", &served.uri()])["exports"][0];
    assert_eq!(info["export-name"], "disk0");
    assert_eq!(info["export-size"], 32 * MIB);
    assert_eq!(info["contexts"], json!(["base:allocation"]));
    let sizes = ["minimum", "preferred", "maximum"].map(|kind| &info[format!("block_size_{kind}")]);
    assert_eq!(sizes, [4096, 64 << 10, 2 << 20]);
    for can in ["can_df", "can_fast_zero", "can_flush", "can_fua", "can_trim", "can_zero"] {
        assert_eq!(info[can], true, "{can}");
    }
    assert_eq!(info["is_read_only"], false);
    let list = tool_json("nbdinfo", &["--list", "--json", &served.uri()]);
    assert_eq!(list["exports"].as_array().unwrap().len(), 1);
    assert_eq!(list["exports"][0]["export-name"], "disk0");

    let map = tool_json("nbdinfo", &["--map", "--json", &served.uri()]);
    let areas: Vec<[u64; 3]> = map.as_array().unwrap().iter().map(area).collect();
    let expected = [
        [0, 64 << 10, 0],
        [64 << 10, 5 * MIB - (64 << 10), 3],
        [5 * MIB, 3 * MIB, 0],
        [8 * MIB, 23 * MIB + 8192, 3],
        [31 * MIB + 8192, 4096, 0],
        [31 * MIB + 12288, MIB - 12288, 3],
    ];
    assert_eq!(areas, expected);
    let all = dir.path().join("all.raw");
    tool("nbdcopy", &[&served.uri(), text(&all)]);
    assert!(fs::read(&all).unwrap() == fs::read(&target).unwrap());
}

fn area(area: &Value) -> [u64; 3] {
    ["offset", "length", "type"].map(|key| area[key].as_u64().unwrap())
}

/// What a move does at the source: QEMU mirrors a disk that is written meanwhile into our server.
#[test]
fn a_mirror_follows_a_disk_that_is_written() {
    for mode in ["background", "write-blocking"] {
        let dir = TempDir::new().unwrap();
        let (source, target) = (dir.path().join("source.raw"), dir.path().join("target.raw"));
        image(&source);
        fs::write(&target, pattern(32 << 20, 99)).unwrap();
        let served = Served::file(dir.path(), &target, BLOCK, false);
        let mut daemon = StorageDaemon::start(dir.path(), &raw(&source), true);
        let mut disk = Client::connect(&daemon.socket, "node", WAIT).unwrap();
        let server = json!({"type": "unix", "path": text(&served.socket)});
        let to = json!({"driver": "nbd", "node-name": "to", "server": server, "export": "disk0",
            "discard": "unmap"});
        daemon.run("blockdev-add", to);
        let job = json!({"job-id": "job", "device": "node", "target": "to", "sync": "full",
            "copy-mode": mode});
        daemon.run("blockdev-mirror", job);
        for at in 0..8 {
            disk.write(at * 3 * MIB, &pattern(256 << 10, at)).unwrap();
        }
        daemon.wait("BLOCK_JOB_READY");
        disk.write(20 * MIB, &pattern(1 << 20, 77)).unwrap();
        disk.zero(6 * MIB, MIB, true).unwrap();
        daemon.run("block-job-cancel", json!({"device": "job"}));
        daemon.wait("BLOCK_JOB_COMPLETED");
        daemon.run("blockdev-del", json!({"node-name": "to"}));
        disk.disconnect().unwrap();
        assert!(fs::read(&source).unwrap() == fs::read(&target).unwrap(), "{mode}");
        // Only a target that was added with discard=unmap gets zeros that may be holes.
        let seen = served.seen();
        assert!(seen.punches > 0 && seen.flushes > 0, "{seen:?}");
    }
}

fn raw(path: &Path) -> Value {
    json!({"driver": "raw", "file": {"driver": "file", "filename": text(path)}})
}

/// What is done to each server: a write in several pieces, zeros, status, an error.
fn exercise(mut client: Client, max: u32) -> Vec<u8> {
    assert_eq!((client.size(), client.block_size().max), (32 * MIB, max));
    assert!(client.knows_status());
    let content = pattern(5 << 20, 5);
    client.write(8 * MIB, &content).unwrap();
    client.zero(9 * MIB, MIB, true).unwrap();
    client.zero(10 * MIB, MIB, false).unwrap();
    client.flush().unwrap();
    let mut back = vec![1; 32 << 20];
    client.read(0, &mut back).unwrap();
    let (mib, at) = (1 << 20, 8 << 20);
    assert!(back[at..at + mib] == content[..mib]);
    assert!(back[at + mib..at + 3 * mib].iter().all(|byte| *byte == 0));
    assert!(back[at + 3 * mib..at + 5 * mib] == content[3 * mib..]);
    let mut covered = 0;
    let mut zeros = 0;
    while covered < client.size() {
        let found = client.status(covered, client.size() - covered).unwrap();
        assert!(!found.is_empty());
        for Extent { len, zero, .. } in found {
            let range = usize::try_from(covered).unwrap()..usize::try_from(covered + len).unwrap();
            assert!(!zero || back[range].iter().all(|byte| *byte == 0));
            zeros += if zero { len } else { 0 };
            covered += len;
        }
    }
    assert_eq!(covered, client.size());
    assert!(zeros >= 20 * MIB, "only {zeros} bytes are known to be zeros");
    let beyond = client.read(32 * MIB, &mut [0; 4096]);
    assert!(matches!(beyond, Err(NbdError::InvalidInput(_))));
    client.disconnect().unwrap();
    back
}

#[test]
fn what_is_of_the_image_itself_is_told_from_what_is_below() {
    let dir = TempDir::new().unwrap();
    let (base, top) = (dir.path().join("base.img"), dir.path().join("top.qcow2"));
    image(&base);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&top)]);
    let write = |what: &str| tool("qemu-io", &["-f", "qcow2", "-c", what, text(&top)]);
    write("write -P 7 6M 1M");
    // Zeros over content of the base are the image's own, too.
    write("write -z 0 64k");
    let server = qemu_nbd(dir.path(), &["-f", "qcow2", "-A", text(&top)]);
    let mut client = Client::connect_own_layer(server.path(), "disk0", WAIT).unwrap();
    assert!(client.knows_status());
    let (mut at, mut own) = (0, Vec::new());
    while at < client.size() {
        for Extent { len, hole, zero } in client.status(at, client.size() - at).unwrap() {
            assert!(!zero, "nobody says so");
            if !hole {
                own.push(at..at + len);
            }
            at += len;
        }
    }
    assert_eq!(own, [0..64 << 10, 6 * MIB..7 * MIB]);
}

#[test]
fn our_client_at_qemu_nbd() {
    for format in ["raw", "qcow2"] {
        let dir = TempDir::new().unwrap();
        let disk = dir.path().join("disk");
        tool("qemu-img", &["create", "-q", "-f", format, text(&disk), "32M"]);
        let server = qemu_nbd(dir.path(), &["-f", format, "--discard=unmap", text(&disk)]);
        let client = Client::connect(server.path(), "disk0", WAIT).unwrap();
        let content = exercise(client, 32 << 20);
        let plain = dir.path().join("plain.raw");
        fs::write(&plain, content).unwrap();
        tool("qemu-img", &["compare", "-U", "-f", "raw", "-F", format, text(&plain), text(&disk)]);
    }
}

#[test]
fn what_qemu_nbd_refuses_is_told() {
    let dir = TempDir::new().unwrap();
    let disk = dir.path().join("disk");
    image(&disk);
    let server = qemu_nbd(dir.path(), &["-f", "raw", "-r", text(&disk)]);
    let other = Client::connect(server.path(), "disk1", WAIT);
    assert!(matches!(other, Err(NbdError::Refused { .. })), "{other:?}");
    let mut client = Client::connect(server.path(), "disk0", WAIT).unwrap();
    assert!(client.read_only());
    let refused = client.write(0, &[1; 4096]);
    // QEMU 10.0 has the wrong number for it and the right words.
    let Err(NbdError::Failed { code: ErrorCode::Invalid, text, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert!(text.contains("read-only"), "{text}");
    let mut back = [0; 8192];
    client.read(0, &mut back).unwrap();
    assert!(back[..] == pattern(64 << 10, 1)[..8192]);
    client.disconnect().unwrap();
    let nobody = Client::connect(&dir.path().join("nobody"), "disk0", WAIT);
    let io = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    assert!(matches!(nobody, Err(NbdError::Io(e)) if io(&e)));
}

/// A storage daemon whose disk wants blocks of 4 KiB and takes 64 KiB at a time.
#[test]
fn our_client_splits_and_aligns_as_the_server_wants() {
    let dir = TempDir::new().unwrap();
    let disk = dir.path().join("disk.raw");
    fs::File::create(&disk).unwrap().set_len(32 * MIB).unwrap();
    let file = json!({"driver": "file", "filename": text(&disk), "discard": "unmap"});
    let node = json!({"driver": "blkdebug", "align": 4096, "max-transfer": 64 << 10,
        "image": file});
    let daemon = StorageDaemon::start(dir.path(), &node, true);
    let mut client = Client::connect(&daemon.socket, "node", WAIT).unwrap();
    assert_eq!(client.block_size().min, 4096);
    let unaligned = client.write(512, &[0; 4096]);
    assert!(matches!(unaligned, Err(NbdError::InvalidInput(_))));
    client.disconnect().unwrap();
    let content = exercise(Client::connect(&daemon.socket, "node", WAIT).unwrap(), 64 << 10);
    assert!(fs::read(&disk).unwrap() == content);
}
