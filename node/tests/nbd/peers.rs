//! The peers of these tests: an export with counters behind our server, and QEMU's programs.
//!
//! Every program runs under `timeout`, so that no wait is for ever.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use godwit::nbd::{BlockSize, Export, Extent, FileExport, serve};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Longest life of a program, seconds.
const LIFE: &str = "60";

fn command(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args([LIFE, name]).args(args).stdin(Stdio::null());
    command
}

fn run(name: &str, args: &[&str]) -> Output {
    let output = command(name, args).output().unwrap();
    assert_ne!(output.status.code(), Some(127), "{name} is missing: scripts/setup installs it");
    assert_ne!(output.status.code(), Some(124), "{name} {args:?} took more than {LIFE} s");
    output
}

/// What a program says that must succeed.
pub fn tool(name: &str, args: &[&str]) -> String {
    let output = run(name, args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {args:?}: {said}{complaint}");
    said
}

pub fn tool_json(name: &str, args: &[&str]) -> Value {
    serde_json::from_str(&tool(name, args)).unwrap()
}

/// Runs a program that must fail.
pub fn refused(name: &str, args: &[&str]) {
    let output = run(name, args);
    assert!(!output.status.success(), "{name} {args:?} should fail");
}

/// What an export was asked for.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    pub reads: u64,
    pub writes: u64,
    pub zeros: u64,
    /// Those of `zeros` that may leave holes.
    pub punches: u64,
    pub trims: u64,
    pub flushes: u64,
    pub statuses: u64,
    /// Longest read or write, bytes.
    pub longest: u64,
}

struct Counting {
    file: FileExport,
    seen: Arc<Mutex<Seen>>,
}

impl Counting {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }
}

impl Export for Counting {
    fn size(&self) -> u64 {
        self.file.size()
    }
    fn block_size(&self) -> BlockSize {
        self.file.block_size()
    }
    fn read_only(&self) -> bool {
        self.file.read_only()
    }
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.seen().reads += 1;
        self.file.read(offset, into)
    }
    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        let mut seen = self.seen();
        seen.writes += 1;
        seen.longest = seen.longest.max(content.len() as u64);
        drop(seen);
        self.file.write(offset, content)
    }
    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        let mut seen = self.seen();
        seen.zeros += 1;
        seen.punches += u64::from(punch);
        drop(seen);
        self.file.zero(offset, len, punch)
    }
    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.seen().trims += 1;
        self.file.trim(offset, len)
    }
    fn flush(&self) -> io::Result<()> {
        self.seen().flushes += 1;
        self.file.flush()
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
        self.seen().statuses += 1;
        self.file.status(offset, len)
    }
}

/// Our server at a socket, a thread for each connection.
pub struct Served {
    pub socket: PathBuf,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Served {
    /// Shows a file as `disk0` at a socket in `dir`.
    pub fn file(dir: &Path, path: &Path, block: BlockSize, read_only: bool) -> Self {
        let socket = dir.join("served.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        let file = FileExport::new(file, block, read_only).unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let export = Arc::new(Counting { file, seen: seen.clone() });
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let accepting = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let export = export.clone();
                thread::spawn(move || serve(stream.unwrap(), "disk0", &*export));
            }
        });
        Self { socket, seen, stop, accepting: Some(accepting) }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk0?socket={}", self.socket.display())
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = UnixStream::connect(&self.socket);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let _ = fs::remove_file(&self.socket);
    }
}

/// A program that is ended with its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // `timeout` hands it on.
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}

/// A server of one disk.
pub struct QemuNbd {
    socket: PathBuf,
    _child: Ended,
}

/// Starts `qemu-nbd`, which shows its disk as `disk0`; it listens when this returns.
pub fn qemu_nbd(dir: &Path, args: &[&str]) -> QemuNbd {
    let socket = dir.join("nbd.sock");
    let own = ["-t", "-x", "disk0", "-k", socket.to_str().unwrap()];
    let mut child = Ended(command("qemu-nbd", &[&own, args].concat()).spawn().unwrap());
    while UnixStream::connect(&socket).is_err() {
        let ended = child.0.try_wait().unwrap();
        assert!(ended.is_none(), "qemu-nbd {args:?} (scripts/setup installs it): {ended:?}");
        // It has no sign of being ready but its socket.
        thread::sleep(Duration::from_millis(5));
    }
    QemuNbd { socket, _child: child }
}

impl QemuNbd {
    pub fn path(&self) -> &Path {
        &self.socket
    }
}

/// A `qemu-storage-daemon` with one node, shown as `node`.
pub struct StorageDaemon {
    pub socket: PathBuf,
    stdin: ChildStdin,
    lines: BufReader<ChildStdout>,
    events: Vec<String>,
    _child: Ended,
}

impl StorageDaemon {
    pub fn start(dir: &Path, node: &Value, writable: bool) -> Self {
        let socket = dir.join("daemon.sock");
        let mut node = node.clone();
        node["node-name"] = json!("node");
        let server = json!({"addr": {"type": "unix", "path": socket.to_str().unwrap()}});
        let export = json!({"type": "nbd", "id": "export", "node-name": "node", "name": "node",
            "writable": writable});
        let [node, server, export] = [node, server, export].map(|value| value.to_string());
        let args = ["--blockdev", &node, "--nbd-server", &server, "--export", &export];
        let monitor = ["--chardev", "stdio,id=m", "--monitor", "chardev=m"];
        let mut child = command("qemu-storage-daemon", &[&args[..], &monitor].concat())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let _child = Ended(child);
        let mut daemon = Self { socket, stdin, lines, events: Vec::new(), _child };
        // It greets when all that it was started with is there.
        daemon.line();
        daemon.run("qmp_capabilities", json!({}));
        daemon
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        let len = self.lines.read_line(&mut line).unwrap();
        assert!(len > 0, "qemu-storage-daemon ended (scripts/setup installs it)");
        serde_json::from_str(&line).unwrap()
    }

    pub fn run(&mut self, command: &str, arguments: Value) {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stdin, "{request}").unwrap();
        loop {
            let mut line = self.line();
            match line["event"].take() {
                Value::String(event) => self.events.push(event),
                _ if line.get("return").is_some() => return,
                _ => panic!("{command}: {line}"),
            }
        }
    }

    pub fn wait(&mut self, event: &str) {
        while !self.events.iter().any(|seen| seen == event) {
            if let Value::String(event) = self.line()["event"].take() {
                self.events.push(event);
            }
        }
    }
}
