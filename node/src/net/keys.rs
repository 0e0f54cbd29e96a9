//! The state directory: where keys, certificates and members survive a restart.
//!
//! Owns file modes, atomic replacement and locks: the directory is 0700, every file 0600, a file is
//! replaced by temporary file + fsync + rename + fsync of the directory, so a reader sees the old
//! content or the new one. Never interprets what it stores.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// The node's own key: 64 bytes of Ed25519 in hexadecimal.
pub const NODE_KEY: &str = "node.key";
/// The swarm's authority key, on the first member (or wherever the operator keeps it).
pub const AUTHORITY_KEY: &str = "authority.key";
/// Certificate, chunk key, members and revocations.
pub const SWARM_FILE: &str = "swarm.bin";
/// Hashes of minted tokens.
pub const TOKENS_FILE: &str = "tokens.bin";
/// Held by the one daemon of this directory.
pub const DAEMON_LOCK: &str = "net.lock";
/// Held while the token file is read and replaced.
pub const TOKENS_LOCK: &str = "tokens.lock";

/// Why the state directory could not be used. Nothing was changed unless the variant says so.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed.
    #[error("cannot {verb} {path}: {cause}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On which path.
        path: String,
        /// The system's answer.
        cause: io::Error,
    },
    /// A file is longer than anything that this program writes there.
    #[error("{path} is longer than {limit} bytes: it was not written by this program")]
    TooLong {
        /// The file.
        path: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// A file is not what this program writes.
    #[error("{path} is damaged ({cause}); restore it, or remove the directory and join again")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        cause: String,
    },
    /// Another process uses the directory.
    #[error("{path} is in use: another godwit runs with this state directory; stop it first")]
    Busy {
        /// The lock file.
        path: String,
    },
    /// The operating system gave no randomness. Nothing was made.
    #[error("the system gave no randomness: {0}")]
    Random(String),
}

/// A lock of the state directory; released when dropped, or when the process dies.
#[derive(Debug)]
pub struct StateLock(#[allow(dead_code)] Flock<File>);

/// A state directory that exists and is private.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Makes the directory (0700) if it is missing, and takes group and others' rights away.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn create(path: &Path) -> Result<Self, StateError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|cause| io_error("make", path, cause))?;
        fs::set_permissions(path, Permissions::from_mode(0o700))
            .map_err(|cause| io_error("protect", path, cause))?;
        Ok(Self { path: path.to_owned() })
    }

    /// The full path of a file of this directory.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether the file exists.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.file(name).exists()
    }

    /// Reads a file of at most `limit` bytes; `None` if it does not exist.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.file(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(io_error("open", &path, cause)),
        };
        let mut bytes = Vec::new();
        file.take(limit as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|cause| io_error("read", &path, cause))?;
        if bytes.len() > limit {
            return Err(StateError::TooLong { path: path.display().to_string(), limit });
        }
        Ok(Some(bytes))
    }

    /// Replaces a file (0600) so that a crash leaves the old content or the new one, never a mix.
    /// When it returns, the new content is durable.
    ///
    /// # Errors
    /// [`StateError::Io`]; the old content is still there.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let path = self.file(name);
        let temporary = self.file(&format!(".{name}.new"));
        let written = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()
        })();
        written.map_err(|cause| io_error("write", &path, cause))
    }

    /// Removes a file; one that does not exist is no error.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.file(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path, e)),
            _ => Ok(()),
        }
    }

    /// Takes an exclusive lock; `wait` blocks until it is free (the holders are short).
    ///
    /// # Errors
    /// [`StateError::Busy`] if another process holds it and `wait` is false.
    pub fn lock(&self, name: &str, wait: bool) -> Result<StateLock, StateError> {
        let path = self.file(name);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|cause| io_error("open", &path, cause))?;
        let how = if wait { FlockArg::LockExclusive } else { FlockArg::LockExclusiveNonblock };
        Flock::lock(file, how).map(StateLock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => StateError::Busy { path: path.display().to_string() },
            other => io_error("lock", &path, io::Error::from(other)),
        })
    }
}

/// Fills an array from the operating system's randomness.
///
/// # Errors
/// [`StateError::Random`].
pub fn random<const N: usize>() -> Result<[u8; N], StateError> {
    let mut bytes = [0_u8; N];
    getrandom::fill(&mut bytes).map_err(|e| StateError::Random(e.to_string()))?;
    Ok(bytes)
}

fn io_error(verb: &'static str, path: &Path, cause: io::Error) -> StateError {
    StateError::Io { verb, path: path.display().to_string(), cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_private_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::create(&dir.path().join("s")).unwrap();
        state.write(NODE_KEY, b"one").unwrap();
        state.write(NODE_KEY, b"two").unwrap();
        assert_eq!(state.read(NODE_KEY, 16).unwrap().unwrap(), b"two");
        let mode = |p: PathBuf| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(state.file(NODE_KEY)), 0o600);
        assert_eq!(mode(dir.path().join("s")), 0o700);
        assert!(matches!(state.read(NODE_KEY, 2), Err(StateError::TooLong { .. })));
        assert_eq!(state.read("absent", 2).unwrap(), None);
    }

    #[test]
    fn a_second_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::create(dir.path()).unwrap();
        let held = state.lock(DAEMON_LOCK, false).unwrap();
        assert!(matches!(state.lock(DAEMON_LOCK, false), Err(StateError::Busy { .. })));
        drop(held);
        state.lock(DAEMON_LOCK, false).unwrap();
    }
}
