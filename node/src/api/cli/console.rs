//! The serial console of a VM: this terminal, raw, joined to a unix socket until Ctrl-].
//!
//! Owns the terminal's mode while it runs and always gives it back.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Answer;
use crate::api::client::ask;
use crate::api::types::{ApiError, Console, Request};

/// Ctrl-].
const LEAVE: u8 = 0x1d;

pub async fn run(state: &Path, vm: &str, json: bool) -> Result<Answer, ApiError> {
    let console: Console = ask(state, &Request::VmConsole { vm: vm.to_owned() }).await?;
    if json {
        let value = serde_json::to_value(&console).map_err(ApiError::plain)?;
        return Ok(Answer::Show(String::new(), value));
    }
    let socket = UnixStream::connect(&console.socket).map_err(|e| {
        ApiError::new(
            format!("cannot reach the console at {}: {e}", console.socket.display()),
            "is another console open? QEMU serves one at a time",
        )
    })?;
    eprintln!("console of {vm}: Ctrl-] leaves");
    let raw = Raw::enter();
    // Blocks this thread, which has nothing else to do.
    let result = join(&socket);
    drop(raw);
    eprintln!();
    result.map_err(|e| ApiError::plain(format!("the console broke: {e}")))?;
    Ok(Answer::Shown(0))
}

fn join(mut socket: &UnixStream) -> std::io::Result<()> {
    let stdin = std::io::stdin();
    let mut stdout = std::io::stdout();
    let mut buffer = [0_u8; 4096];
    loop {
        let (keys, guest) = {
            let mut fds = [
                PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
                PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            (fds[0].any().unwrap_or(true), fds[1].any().unwrap_or(true))
        };
        if guest {
            let n = socket.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            stdout.write_all(&buffer[..n])?;
            stdout.flush()?;
        }
        if keys {
            // Past std's buffer: what it kept back would not wake `poll`.
            let n = nix::unistd::read(&stdin, &mut buffer)?;
            let typed = &buffer[..n];
            let leave = typed.iter().position(|b| *b == LEAVE);
            socket.write_all(&typed[..leave.unwrap_or(n)])?;
            if leave.is_some() || n == 0 {
                return Ok(());
            }
        }
    }
}

/// The terminal in raw mode, until dropped.
struct Raw(libc::termios);

impl Raw {
    /// None if standard input is no terminal.
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        // SAFETY: `termios` is plain data; the calls read and write it through valid pointers on a
        // descriptor that stays open for the life of the process.
        unsafe {
            let mut mode: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(stdin.as_raw_fd(), &raw mut mode) != 0 {
                return None;
            }
            let before = Self(mode);
            libc::cfmakeraw(&raw mut mode);
            (libc::tcsetattr(stdin.as_raw_fd(), libc::TCSANOW, &raw const mode) == 0)
                .then_some(before)
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: as in `enter`; the mode is one that the terminal had.
        unsafe {
            libc::tcsetattr(std::io::stdin().as_raw_fd(), libc::TCSANOW, &raw const self.0);
        }
    }
}
