//! Network namespaces: making them, running commands, closures and threads inside.
//!
//! Owns the namespace files under `/run/netns` whose names start with `gw-`. Never creates a device in the root
//! namespace. Invariant: a process started by [`NetNs::command`] carries [`MARK`] in its environment, which its
//! descendants inherit, so that a later run can find it even when its namespace has lost its name.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

/// Environment variable that marks every process of a lab; its value is the lab's id.
pub const MARK: &str = "GODWIT_LAB";

/// Where `ip netns` keeps the names.
pub const NETNS_DIR: &str = "/run/netns";

/// Set when the lab is being torn down by a signal: nothing new may start.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// From now on [`spawn`] refuses; used while a signal tears the lab down.
pub fn refuse_new_processes() {
    STOPPING.store(true, Ordering::SeqCst);
}

/// A named network namespace. Cloning the handle does not clone the namespace; dropping it does not delete it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes the namespace `name` and brings its loopback up. Needs root. Fails when the name exists.
    pub fn create(name: &str) -> Result<Self> {
        let ns = Self::named(name);
        // Marked: if this process is killed now, the next run finds the command before it looks for names.
        run_ip(
            Command::new("ip").args(["netns", "add", name]).env(MARK, ns.labid().unwrap_or("")),
        )?;
        ns.batch(&["link set lo up".to_owned()])?;
        Ok(ns)
    }

    /// A handle on a namespace that exists already (not checked).
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds it.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// Takes the name away; devices go when the last process and descriptor inside are gone.
    pub fn delete(&self) -> Result<()> {
        ip(&["netns", "del", &self.name]).map(drop)
    }

    /// Runs several `ip` commands (without the leading `ip`) in the namespace, in one process; the first failure ends it.
    pub fn batch(&self, lines: &[String]) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .env(MARK, self.labid().unwrap_or(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("running ip (package iproute2)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(lines.join("\n").as_bytes())?;
        }
        let out = child.wait_with_output()?;
        if !out.status.success() {
            let why = String::from_utf8_lossy(&out.stderr);
            bail!("ip in namespace {}: {} (of {lines:?})", self.name, why.trim());
        }
        Ok(())
    }

    /// A command that will run inside, killed with this process (more exactly: with the *thread* that spawns it; use
    /// [`spawn`] from threads that end early).
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.make_command(program, true)
    }

    /// As [`NetNs::command`], but the process outlives this one; the cleanup of the lab finds it.
    pub fn command_outliving(&self, program: impl AsRef<OsStr>) -> Command {
        self.make_command(program, false)
    }

    fn make_command(&self, program: impl AsRef<OsStr>, die_with_parent: bool) -> Command {
        let mut command = Command::new(program);
        if let Some(labid) = self.labid() {
            command.env(MARK, labid);
        }
        let path =
            CString::new(self.path().into_os_string().into_encoded_bytes()).unwrap_or_default();
        let parent = nix::unistd::getpid();
        // SAFETY: the hook makes plain system calls only (open, setns, close, prctl, getppid), all async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                enter(&path)?;
                if die_with_parent {
                    die_with(parent)?;
                }
                Ok(())
            });
        }
        command
    }

    /// The lab's id inside a name of the form `gw-<labid>-<rest>`.
    fn labid(&self) -> Option<&str> {
        self.name.strip_prefix("gw-")?.split('-').next()
    }

    /// Runs `f` inside, on a thread of its own, and waits for it. Sockets opened by `f` stay in the namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let file =
            File::open(self.path()).with_context(|| format!("no namespace {}", self.name))?;
        thread::scope(|scope| {
            let worker = scope.spawn(move || -> Result<T> {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET).context("setns")?;
                Ok(f())
            });
            match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Sets a network sysctl of the namespace, such as `ipv4/ip_forward` (a path under `/proc/sys/net`).
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(key);
        self.run(|| std::fs::write(&path, value))?
            .with_context(|| format!("sysctl {key}={value} in {}", self.name))
    }

    /// Inode of the namespace, as `/proc/PID/ns/net` shows it, too.
    pub fn inode(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let path = self.path();
        Ok(std::fs::metadata(&path)
            .with_context(|| format!("no namespace {}", path.display()))?
            .ino())
    }
}

/// In the child, before exec: moves it into the namespace at `path`.
fn enter(path: &CString) -> io::Result<()> {
    // SAFETY: `path` is a valid C string; the descriptor is closed before return.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let done = libc::setns(fd, libc::CLONE_NEWNET);
        let error = io::Error::last_os_error();
        libc::close(fd);
        if done != 0 { Err(error) } else { Ok(()) }
    }
}

/// In the child, before exec: SIGKILL when the parent goes; fails if it is gone already.
fn die_with(parent: nix::unistd::Pid) -> io::Result<()> {
    // SAFETY: prctl with PR_SET_PDEATHSIG takes one integer.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if nix::unistd::getppid() != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

/// Runs `ip` with these arguments in the root namespace and gives its output; a failure carries what it said.
pub fn ip(args: &[&str]) -> Result<String> {
    run_ip(Command::new("ip").args(args))
}

fn run_ip(command: &mut Command) -> Result<String> {
    let out = command.output().context("running ip (package iproute2)")?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

type Launch = (Command, SyncSender<io::Result<Child>>);

/// Spawns the command from a thread that lives as long as this process, so that a child that dies with its parent
/// does not die with some short-lived thread.
pub fn spawn(command: Command) -> io::Result<Child> {
    static LAUNCHER: OnceLock<SyncSender<Launch>> = OnceLock::new();
    let launcher = LAUNCHER.get_or_init(|| {
        let (sender, receiver) = sync_channel::<Launch>(16);
        thread::spawn(move || {
            while let Ok((mut command, reply)) = receiver.recv() {
                let child = if STOPPING.load(Ordering::SeqCst) {
                    Err(io::Error::other("the lab is being torn down"))
                } else {
                    command.spawn()
                };
                // A caller that went away leaves a child behind that nobody owns: end it.
                if let Err(lost) = reply.send(child)
                    && let Ok(mut child) = lost.0
                {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        });
        sender
    });
    let gone = || io::Error::other("the launcher thread ended");
    let (reply, answer) = sync_channel(1);
    launcher.send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}
