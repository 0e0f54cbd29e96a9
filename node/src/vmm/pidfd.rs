//! A process held by its pidfd: signals that cannot hit a stranger, and its death as an event.
//!
//! Owns the descriptor. Works for children and for processes adopted after a restart of the node.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How a process ended, as far as it can be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was not a child of this process, so nobody tells.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Self::Unknown => f.write_str("has ended"),
        }
    }
}

/// A process that cannot be mistaken for another with the same number.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

fn syscall_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl PidFd {
    /// Opens process `pid`. The caller checks that it is the one meant ([`start_time`]) *after* this.
    ///
    /// # Errors
    /// The kernel's: no such process.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: no memory is passed. The kernel sets close-on-exec on the new descriptor.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        syscall_fd(result).map(Self)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The kernel's: the process has gone.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null `info` is allowed and means an ordinary kill.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, no_info, 0)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// A duplicate of the process's descriptor number `fd`.
    ///
    /// # Errors
    /// The kernel's: no such descriptor, or no right to ptrace the process.
    pub fn duplicate_fd(&self, fd: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: no memory is passed. The kernel sets close-on-exec on the new descriptor.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), fd, 0) };
        syscall_fd(result)
    }

    /// Waits for the process's end and reaps it if it is a child.
    ///
    /// # Errors
    /// The reactor's.
    pub async fn wait(&self) -> io::Result<Exit> {
        let fd = self.0.try_clone()?;
        // SAFETY: an `OwnedFd` stays open and the same until it is dropped, which deregisters first.
        let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? };
        let _ready = watched.readable().await?;
        Ok(self.reap())
    }

    fn reap(&self) -> Exit {
        let Ok(id) = libc::id_t::try_from(self.0.as_raw_fd()) else {
            return Exit::Unknown;
        };
        // SAFETY: `siginfo_t` is plain data for which all zeros is a value, and the kernel fills it.
        let (result, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let flags = libc::WEXITED | libc::WNOHANG;
            (libc::waitid(libc::P_PIDFD, id, &raw mut info, flags), info)
        };
        if result != 0 || info.si_signo != libc::SIGCHLD {
            return Exit::Unknown;
        }
        // SAFETY: for SIGCHLD the kernel has filled the status.
        let status = unsafe { info.si_status() };
        if info.si_code == libc::CLD_EXITED { Exit::Code(status) } else { Exit::Signal(status) }
    }
}

/// When process `pid` started, in clock ticks since the host's boot: with the number itself and the boot's id, a process
/// for ever. `None` when there is no such process or it is a zombie.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in brackets and may hold spaces and brackets itself.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    // `starttime` is field 22; the state just taken was field 3.
    fields.nth(18)?.parse().ok()
}

/// The id of the host's present boot.
///
/// # Errors
/// When /proc is not there.
pub fn boot_id() -> io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::zombie_processes, reason = "the pidfd reaps it, which is what is tested")]
    fn child(script: &str) -> u32 {
        std::process::Command::new("sh").args(["-c", script]).spawn().unwrap().id()
    }

    #[tokio::test]
    async fn death_is_an_event_and_the_child_is_reaped() {
        let pid = child("exec sleep 60");
        let process = PidFd::open(pid).unwrap();
        assert!(start_time(pid).is_some_and(|ticks| ticks > 0));
        process.signal(libc::SIGKILL).unwrap();
        assert_eq!(process.wait().await.unwrap(), Exit::Signal(libc::SIGKILL));
        assert_eq!(start_time(pid), None);
        assert!(process.signal(0).is_err());
    }

    #[tokio::test]
    async fn an_exit_code_is_reported() {
        let process = PidFd::open(child("exit 3")).unwrap();
        assert_eq!(process.wait().await.unwrap(), Exit::Code(3));
    }
}
