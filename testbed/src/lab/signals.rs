//! Ctrl-C: SIGINT, SIGTERM and SIGHUP remove every lab of this process, then end it.
//!
//! Owns the handlers of these three signals from the first lab on. Never does work in the handler itself: it writes
//! one byte into a pipe that a thread reads. Invariant: no lab of this process survives one of these signals.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Result;
use nix::fcntl::OFlag;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static LABS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static INSTALLED: Mutex<bool> = Mutex::new(false);
static PIPE: AtomicI32 = AtomicI32::new(-1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it exists a signal removes this lab.
#[derive(Debug)]
pub struct Watch {
    labid: String,
}

impl Watch {
    /// Puts the lab under watch; the first call installs the handlers.
    pub(super) fn labs_end(labid: &str) -> Result<Self> {
        let mut installed = lock(&INSTALLED);
        if !*installed {
            install()?;
            *installed = true;
        }
        lock(&LABS).push(labid.to_owned());
        Ok(Self { labid: labid.to_owned() })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&LABS).retain(|labid| *labid != self.labid);
    }
}

extern "C" fn on_signal(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: write is async-signal-safe; one byte from the stack; a full pipe means that the thread knows already.
    unsafe { libc::write(PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
}

fn install() -> Result<()> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    PIPE.store(writer.as_raw_fd(), Ordering::Relaxed);
    // The handler may run at any time until the process ends: its end of the pipe is never closed.
    let _ = writer.into_raw_fd();
    let mut reader = File::from(reader);
    thread::Builder::new().name("lab-signals".to_owned()).spawn(move || {
        let mut byte = [0];
        if reader.read_exact(&mut byte).is_ok() {
            end_all(byte[0]);
        }
    })?;
    let action =
        SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler is async-signal-safe (one write).
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

fn end_all(signal: u8) {
    super::ns::refuse_new_processes();
    eprintln!("signal {signal}: removing the lab");
    let mut code = 128 + i32::from(signal);
    // The labs' locks are held by this process until it exits.
    for labid in lock(&LABS).iter() {
        if let Err(error) = super::cleanup::sweep(labid) {
            eprintln!("lab {labid}: {error:#}; run `godwit-lab cleanup {labid}`");
            code = 1;
        }
        super::cleanup::forget_lock(labid);
    }
    std::process::exit(code);
}
