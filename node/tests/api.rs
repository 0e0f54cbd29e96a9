//! The local socket and the command line against a handler that plays the driver.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use godwit::api::client::{SOCKET, call};
use godwit::api::server::Listener;
use godwit::api::types::{CONNECTIONS, Done, LINE_BYTES, Migration};
use godwit::api::{ApiError, Event, Request};
use godwit_protocol::id::{Epoch, HostId, MigrationId, VmId};
use godwit_protocol::wire::migrate::{Phase, Status};
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

fn status(id: MigrationId, phase: Phase, done_ppm: u32) -> Migration {
    let status = Status {
        id,
        vm: VmId([2; 16]),
        cluster: VmId([2; 16]),
        name: "web".parse().unwrap(),
        from: HostId([3; 32]),
        to: Some(HostId([4; 32])),
        requested_on: HostId([5; 32]),
        phase,
        cause: if phase == Phase::Stayed { "no room".into() } else { String::new() },
        epoch_before: Epoch(1),
        epoch_after: phase.is_end().then_some(Epoch(2)),
        ram_bytes: 1 << 29,
        ram_nonzero_bytes: 1 << 28,
        bulk_bytes: 1 << 20,
        done_ppm,
        left_ms: None,
        dirty_bytes_per_s: 0,
        disk_bytes: 0,
        disk_wan_bytes: 0,
        disk_throttle_bytes_per_s: 0,
        disk_throttled_ms: 0,
        frames_held: 0,
        frames_dropped: 0,
        chunks_zero: 1,
        chunks_known: 2,
        chunks_literal: 3,
        total_ms: 10,
        downtime_us: None,
        members: vec![],
        stop_spread_us: None,
        stop_budget_us: 0,
        resume_spread_us: None,
        timeline: vec![],
    };
    Migration::new(status, |host| format!("h{}", host.0[0]))
}

/// What the played driver shares with a test.
#[derive(Default)]
struct Stage {
    /// A `migrate --wait` for "hang" has begun.
    begun: Notify,
    /// It saw its client go.
    gone: Notify,
    /// Lets `vm show slow` end.
    release: Notify,
    ended: AtomicBool,
}

async fn played(
    stage: Arc<Stage>,
    request: Request,
    events: mpsc::Sender<Event>,
) -> Result<Value, ApiError> {
    match request {
        Request::Migrate { vm, id: Some(id), .. } => {
            let end = match vm.as_str() {
                "web" => Phase::Moved,
                "busy" => Phase::Stayed,
                "doomed" => Phase::Lost,
                "hang" => {
                    let progress = Event::Progress(Box::new(status(id, Phase::Transfer, 1)));
                    events.send(progress).await.map_err(ApiError::plain)?;
                    stage.begun.notify_one();
                    events.closed().await;
                    stage.gone.notify_one();
                    Phase::Moved
                }
                _ => return Err(ApiError::new(format!("no VM {vm}"), "see godwit vm list")),
            };
            for done in [100_000, 500_000] {
                let progress = Event::Progress(Box::new(status(id, Phase::Transfer, done)));
                let _ = events.try_send(progress);
            }
            serde_json::to_value(status(id, end, 1_000_000)).map_err(ApiError::plain)
        }
        Request::Migrations { .. } => {
            let all = [status(MigrationId([0xab; 16]), Phase::Moved, 1_000_000)];
            serde_json::to_value(all).map_err(ApiError::plain)
        }
        Request::VmShow { .. } => {
            stage.release.notified().await;
            stage.ended.store(true, SeqCst);
            Ok(json!({"done": "at last"}))
        }
        Request::Hosts {} => Ok(json!([])),
        Request::VmList {} => Ok(json!(["x".repeat(LINE_BYTES)])),
        other => Ok(json!(Done { done: format!("{other:?}") })),
    }
}

struct Daemon {
    dir: tempfile::TempDir,
    stage: Arc<Stage>,
    runtime: tokio::runtime::Runtime,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let stage = Arc::new(Stage::default());
        let shared = Arc::clone(&stage);
        let listener = runtime.block_on(async { Listener::bind(&dir.path().join(SOCKET)) });
        let handler = move |request, events| played(Arc::clone(&shared), request, events);
        runtime.spawn(listener.unwrap().run(Arc::new(handler)));
        Self { dir, stage, runtime }
    }

    fn state(&self) -> &Path {
        self.dir.path()
    }

    fn cli(&self, args: &[&str]) -> Output {
        cli(self.state(), args)
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.state().join(SOCKET)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

fn command(state: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit"));
    command.arg("--state").arg(state).args(args).stdin(Stdio::null());
    command
}

fn cli(state: &Path, args: &[&str]) -> Output {
    command(state, args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn outcomes_have_their_exit_codes() {
    let daemon = Daemon::start();
    for (vm, code, says) in
        [("web", 0, "moved: "), ("busy", 3, "stayed: "), ("doomed", 4, "lost: ")]
    {
        let out = daemon.cli(&["migrate", vm, "--to", "auto", "--wait"]);
        assert_eq!(out.status.code(), Some(code), "{vm}");
        assert!(text(&out.stdout).starts_with(says), "{}", text(&out.stdout));
        assert!(text(&out.stderr).starts_with(" 10 %  transfer"), "{}", text(&out.stderr));
        let out = daemon.cli(&["--json", "migrate", vm, "--to", "auto", "--wait"]);
        assert_eq!(out.status.code(), Some(code), "{vm}");
        let value: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(value["to_name"], "h4");
    }
    let out = daemon.cli(&["migrate", "nix", "--to", "auto", "--wait", "--json"]);
    assert_eq!(out.status.code(), Some(1));
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(value, json!({"error": "no VM nix", "hint": "see godwit vm list"}));
}

#[test]
fn ctrl_c_leaves_the_migration_and_says_so() {
    let daemon = Daemon::start();
    let child = command(daemon.state(), &["migrate", "hang", "--to", "auto", "--wait"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let wait = Duration::from_secs(20);
    daemon.runtime.block_on(async {
        tokio::time::timeout(wait, daemon.stage.begun.notified()).await.expect("begun");
    });
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(130), "{}", text(&out.stderr));
    let said = text(&out.stdout);
    assert!(said.contains("goes on") && said.contains("godwit abort "), "{said}");
    daemon.runtime.block_on(async {
        tokio::time::timeout(wait, daemon.stage.gone.notified()).await.expect("client seen gone");
    });
}

#[test]
fn lists_and_migrations_are_shown() {
    let daemon = Daemon::start();
    let out = daemon.cli(&["hosts"]);
    assert_eq!(text(&out.stdout).split_whitespace().next(), Some("NAME"));
    assert_eq!(text(&daemon.cli(&["hosts", "--json"]).stdout), "[]\n");
    let out = daemon.cli(&["migrations", "show", "abab"]);
    assert!(text(&out.stdout).starts_with("moved: web runs on h4"), "{}", text(&out.stdout));
    let out = daemon.cli(&["abort", "abab"]);
    assert!(text(&out.stdout).contains("Abort"), "{}", text(&out.stdout));
    let out = daemon.cli(&["abort", "cdcd"]);
    assert_eq!(
        text(&out.stderr),
        "error: no migration begins with cdcd\n  next: see godwit migrations\n"
    );
}

#[test]
fn no_daemon_is_one_clear_line_with_a_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let out = cli(dir.path(), &["hosts"]);
    assert_eq!(out.status.code(), Some(1));
    let said = text(&out.stderr);
    assert!(said.starts_with("error: no daemon is running for ") && said.contains("godwit run"));
    let out = cli(dir.path(), &["hosts", "--json"]);
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(value["error"].as_str().unwrap().starts_with("no daemon is running"));
    let out = cli(dir.path(), &["--json", "migrate", "web"]);
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(value["error"].as_str().unwrap().contains("required"), "{value}");
}

#[test]
fn the_socket_is_private_and_replaced_after_a_kill() {
    let daemon = Daemon::start();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let socket = daemon.state().join(SOCKET);
    assert_eq!((mode(daemon.state()), mode(&socket)), (0o700, 0o600));
    // A second bind stands for the daemon that comes after one that was killed.
    let _enter = daemon.runtime.enter();
    assert!(Listener::bind(&socket).is_ok());
    let long = daemon.state().join("x".repeat(120)).join(SOCKET);
    assert!(Listener::bind(&long).unwrap_err().to_string().contains("too long"));
}

#[test]
fn malformed_and_endless_requests_are_refused() {
    let daemon = Daemon::start();
    let answer = |mut stream: UnixStream| {
        let mut line = String::new();
        BufReader::new(&mut stream).read_line(&mut line).unwrap();
        serde_json::from_str::<Value>(&line).unwrap()
    };
    for bad in ["{}\n", "not json\n", "{\"op\":\"nope\"}\n", "{\"op\":\"hosts\",\"x\":1}\n"] {
        let mut stream = daemon.raw();
        stream.write_all(bad.as_bytes()).unwrap();
        let said = answer(stream);
        assert!(said["error"].as_str().unwrap().contains("not understood"), "{said}");
    }
    let mut stream = daemon.raw();
    stream.write_all(&vec![b'x'; LINE_BYTES]).unwrap();
    assert!(answer(stream)["error"].as_str().unwrap().contains("no line"));
    // An answer over the limit becomes an error instead of breaking the client.
    let out = daemon.cli(&["vm", "list", "--json"]);
    assert!(text(&out.stdout).contains("too long"), "{}", out.stdout.len());
}

#[test]
fn connections_are_bounded_and_come_back() {
    let daemon = Daemon::start();
    let silent: Vec<UnixStream> = (0..CONNECTIONS).map(|_| daemon.raw()).collect();
    let refused = call_hosts(&daemon).unwrap_err();
    assert!(refused.message.contains("busy"), "{refused}");
    drop(silent);
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while call_hosts(&daemon).is_err() {
        assert!(std::time::Instant::now() < end, "slots did not come back");
    }
}

fn call_hosts(daemon: &Daemon) -> Result<Value, ApiError> {
    daemon.runtime.block_on(call(daemon.state(), &Request::Hosts {}, |_| {}))
}

#[test]
fn a_handler_ends_its_work_when_its_client_has_gone() {
    let daemon = Daemon::start();
    let mut stream = daemon.raw();
    stream.write_all(b"{\"op\":\"vm_show\",\"vm\":\"slow\"}\n").unwrap();
    drop(stream);
    daemon.stage.release.notify_one();
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while !daemon.stage.ended.load(SeqCst) {
        assert!(std::time::Instant::now() < end, "the handler was dropped");
        std::thread::yield_now();
    }
    // And the connection of another client is not disturbed by any of it.
    let mut rest = String::new();
    let mut stream = daemon.raw();
    stream.write_all(b"{\"op\":\"hosts\"}\n").unwrap();
    stream.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "{\"result\":[]}\n");
}
