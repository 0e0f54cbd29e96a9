//! A `godwit` node in a lab host: started, killed, restarted, asked through its CLI.
//!
//! Owns the daemon's process and its log file. Never owns what the daemon starts: QEMUs outlive it on purpose and end
//! with the lab. Invariant: every wait has a deadline, and a failure carries the end of the log.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Host, cleanup, ns};

/// UDP and TCP port of a node in the lab, unless told otherwise.
pub const PORT: u16 = 7700;
/// How long a node may take to forget a file.
const FORGET: Duration = Duration::from_secs(60);
/// Output of one CLI command that is kept, in bytes.
const OUTPUT_MAX: u64 = 16 << 20;

/// Path of the `godwit` binary that was built together with this program (`GODWIT_BIN` overrides it).
pub fn godwit_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("GODWIT_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("path of this program")?;
    // Tests live in target/PROFILE/deps, programs in target/PROFILE.
    let mut dirs = own.ancestors().skip(1).take(2).map(|dir| dir.join("godwit"));
    dirs.find(|path| path.is_file()).with_context(|| {
        format!("no godwit beside {}: build it with `cargo build -p godwit`", own.display())
    })
}

/// What a CLI command answered.
#[derive(Clone, Debug)]
pub struct CliOutput {
    /// Exit code; 128 + signal when it was killed.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl CliOutput {
    /// True: exit code 0.
    pub fn ok(&self) -> bool {
        self.code == 0
    }

    /// The whole output as JSON or, of a command that prints one object per line, the last line.
    pub fn json(&self) -> Result<Value> {
        let text = self.stdout.trim();
        serde_json::from_str(text)
            .or_else(|_| serde_json::from_str(text.lines().last().unwrap_or_default()))
            .with_context(|| format!("not JSON: {text:?}, stderr {:?}", self.stderr.trim()))
    }
}

/// A daemon in a host. Dropping it kills the daemon, not its QEMUs.
pub struct Node {
    host: Host,
    listen: SocketAddr,
    program: PathBuf,
    args: Vec<String>,
    environment: Vec<(String, String)>,
    child: Option<Child>,
}

impl Node {
    /// The node of a host, not started: listens on the host's address and [`PORT`].
    pub fn new(host: &Host) -> Result<Self> {
        Ok(Self::with_program(host, godwit_binary()?))
    }

    /// As [`Node::new`] with another program in godwit's place.
    pub fn with_program(host: &Host, program: PathBuf) -> Self {
        let listen = SocketAddr::from((host.addr, PORT));
        Self {
            host: host.clone(),
            listen,
            program,
            args: Vec::new(),
            environment: Vec::new(),
            child: None,
        }
    }

    /// Adds an argument for `godwit run`, from the next start on.
    pub fn arg(&mut self, arg: &str) -> &mut Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Sets an environment variable of the daemon, from the next start on.
    pub fn env(&mut self, key: &str, value: &str) -> &mut Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Its host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Where it listens and what it advertises.
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    /// Its API socket, `<state>/api.sock`.
    pub fn socket(&self) -> PathBuf {
        self.host.state_dir.join("api.sock")
    }

    /// Its log: both outputs of every start, appended.
    pub fn log_path(&self) -> PathBuf {
        self.host.work_dir.join("godwit.log")
    }

    /// Process id of the running daemon.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Starts `godwit run`; an error if it runs already. Does not wait for readiness.
    pub fn start(&mut self) -> Result<()> {
        if self.exit_status()?.is_none() && self.child.is_some() {
            bail!("the node of {} runs already", self.host.name);
        }
        let address = self.listen.to_string();
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(self.log_path())?;
        let mut command = self.host.ns.command(&self.program);
        command.arg("run").arg("--state").arg(&self.host.state_dir);
        command.args(["--listen", &address, "--advertise", &address]).args(&self.args);
        command.envs(self.environment.iter().cloned()).current_dir(&self.host.work_dir);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child =
            ns::spawn(command).with_context(|| format!("starting {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Starts and waits for readiness.
    pub fn start_ready(&mut self, deadline: Duration) -> Result<()> {
        self.start()?;
        self.wait_ready(deadline)
    }

    /// Waits until the API socket accepts a connection; fails at once when the daemon ends.
    pub fn wait_ready(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            if UnixStream::connect(self.socket()).is_ok() {
                return Ok(());
            }
            if let Some(status) = self.exit_status()? {
                bail!(
                    "the node of {} ended ({status}); its log ends:\n{}",
                    self.host.name,
                    self.log_tail()
                );
            }
            if Instant::now() > end {
                let name = &self.host.name;
                bail!(
                    "the node of {name} was not ready after {deadline:?}; its log ends:\n{}",
                    self.log_tail()
                );
            }
            // Polling with a deadline: there is no event for a socket that another process will bind.
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// How it ended, if it has.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        Ok(match &mut self.child {
            Some(child) => child.try_wait()?,
            None => None,
        })
    }

    /// SIGKILL, and waits for the end. Nothing happens if it does not run. Its QEMUs live on.
    pub fn kill9(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// SIGTERM, then waits; SIGKILL and an error at the deadline.
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let mut child = self.child.take().context("the node does not run")?;
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        let handle = cleanup::pidfd(pid.as_raw());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let ended =
            handle.is_none_or(|handle| cleanup::wait_readable(&handle, Instant::now() + deadline));
        if !ended {
            child.kill()?;
            child.wait()?;
            bail!("the node of {} did not end within {deadline:?} of SIGTERM", self.host.name);
        }
        Ok(child.wait()?)
    }

    /// `kill -9`, then a new start that must be ready in time.
    pub fn restart(&mut self, deadline: Duration) -> Result<()> {
        self.kill9()?;
        self.start_ready(deadline)
    }

    /// Runs `godwit --state DIR ARGS` in the host; a non-zero exit is an answer, not an error. Errors: it could not be
    /// run, or the deadline passed (it is killed then).
    pub fn cli(&self, args: &[&str], deadline: Duration) -> Result<CliOutput> {
        let mut command = self.host.ns.command(&self.program);
        command
            .arg("--state")
            .arg(&self.host.state_dir)
            .args(args)
            .current_dir(&self.host.work_dir);
        run_with_deadline(command, deadline)
            .with_context(|| format!("godwit {} on {}", args.join(" "), self.host.name))
    }

    /// As [`Node::cli`] with `--json`; a non-zero exit is an error with the command's own words.
    pub fn cli_json(&self, args: &[&str], deadline: Duration) -> Result<Value> {
        let all: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        let out = self.cli(&all, deadline)?;
        if !out.ok() {
            let said = if out.stderr.trim().is_empty() { &out.stdout } else { &out.stderr };
            bail!(
                "godwit {} on {}: exit code {}: {}",
                args.join(" "),
                self.host.name,
                out.code,
                said.trim()
            );
        }
        out.json()
    }

    /// Ends whatever it keeps of moves, also for the next try of one, so that a move to it starts from nothing.
    ///
    /// # Errors
    /// The node does not say what it keeps.
    pub fn forget_kept(&self) -> Result<()> {
        let images = self.cli_json(&["image", "list"], FORGET)?;
        for image in images.as_array().into_iter().flatten() {
            let kept = image["kind"].as_str().is_some_and(|kind| kind.starts_with("kept"));
            if let Some(path) = image["path"].as_str().filter(|_| kept) {
                // Refused when it is gone by now.
                self.cli(&["image", "remove", path], FORGET)?;
            }
        }
        Ok(())
    }

    /// The last 4 KiB of the log.
    pub fn log_tail(&self) -> String {
        let log = fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&log[log.len().saturating_sub(4096)..]).into_owned()
    }

    /// State directory of the node.
    pub fn state_dir(&self) -> &Path {
        &self.host.state_dir
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.kill9();
    }
}

/// Runs a command to its end, collecting up to 16 MiB of each output; killed at the deadline.
pub fn run_with_deadline(mut command: Command, deadline: Duration) -> Result<CliOutput> {
    let end = Instant::now() + deadline;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ns::spawn(command)?;
    let handle = cleanup::pidfd(child.id() as i32).context("pidfd_open")?;
    let stdout =
        child.stdout.take().map(|pipe| collect(File::from(std::os::fd::OwnedFd::from(pipe))));
    let stderr =
        child.stderr.take().map(|pipe| collect(File::from(std::os::fd::OwnedFd::from(pipe))));
    if !cleanup::wait_readable(&handle, end) {
        child.kill()?;
        child.wait()?;
        bail!("not finished after {deadline:?}");
    }
    let status = child.wait()?;
    let text =
        |output: Option<Output>| output.map(|output| output.until(end + GRACE)).unwrap_or_default();
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(CliOutput { code, stdout: text(stdout), stderr: text(stderr) })
}

/// A process may leave a pipe open in a child of its own: then this much later its output is taken as it is.
const GRACE: Duration = Duration::from_secs(1);

struct Output(std::sync::mpsc::Receiver<Vec<u8>>);

impl Output {
    fn until(self, end: Instant) -> String {
        let left = end.saturating_duration_since(Instant::now()).min(GRACE);
        String::from_utf8_lossy(&self.0.recv_timeout(left).unwrap_or_default()).into_owned()
    }
}

fn collect(pipe: File) -> Output {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = (&pipe).take(OUTPUT_MAX).read_to_end(&mut bytes);
        let _ = sender.send(bytes);
        // Whatever exceeds the limit is read and dropped, so that the process does not block on a full pipe.
        let _ = std::io::copy(&mut &pipe, &mut std::io::sink());
    });
    Output(receiver)
}
