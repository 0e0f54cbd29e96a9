//! Hard state: what must be on the disk before anything is spoken.
//!
//! Owns `<state>/lock` (one daemon per state directory) and `<state>/hard.redb`, one table of bytes
//! to bytes. Never knows what the bytes mean.
//! Invariant: when [`Hard::put_many`] returns, all its changes are on the disk, or none ever will
//! be. A [`StoreId`] is born with the file and dies with it: hard state that was lost or cannot be
//! read never votes under its old id.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use godwit_protocol::id::StoreId;
use redb::{Builder, Database, Durability, ReadableDatabase, TableDefinition, TableError};

const TABLE: TableDefinition<&[u8], &[u8]> = TableDefinition::new("hard");
/// Our own entries; the rest of the key space belongs to the caller.
const STORE_KEY: &[u8] = b"\0store";
const FILE: &str = "hard.redb";
/// Hard state is small: a record per cluster. redb's default would be 1 GiB.
const CACHE_BYTES: usize = 8 << 20;
/// Largest value, bytes.
pub const VALUE_BYTES: usize = 64 << 20;

/// Why hard state could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another daemon has this state directory. Nothing was changed.
    #[error("another godwit daemon uses {0}: stop it, or name another directory with --state")]
    Locked(PathBuf),
    /// The file system said no. Nothing was changed.
    #[error("cannot use {path}: {source}")]
    Io {
        /// What was opened.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The value or key is no such thing. Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// The store failed. A write that failed may be on the disk or not: the caller must stop and
    /// open it again before it speaks.
    #[error("hard state failed: {0}")]
    Failed(String),
}

/// One change: a key and its new value, or none to remove it.
pub type Change<'a> = (&'a [u8], Option<&'a [u8]>);

/// One entry: a key and its value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// The hard state of a node, locked for this process.
#[derive(Debug)]
pub struct Hard {
    db: Database,
    id: StoreId,
    new: bool,
    set_aside: Option<PathBuf>,
    _lock: File,
}

impl Hard {
    /// Locks the state directory (made with mode 0700 if missing) and opens its hard state. If that
    /// is missing or unreadable a new one is made, with a new id; an unreadable file is set aside.
    ///
    /// # Errors
    /// [`StoreError::Locked`], [`StoreError::Io`], [`StoreError::Failed`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { path, source }
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io(dir))?;
        let lock = lock(dir)?;
        let path = dir.join(FILE);
        let mut set_aside = None;
        let existed = path.try_exists().map_err(io(&path))?;
        let opened = match open_db(&path) {
            Err(Opening::Unreadable(why)) if existed => {
                let aside = free_name(&path);
                std::fs::rename(&path, &aside).map_err(io(&path))?;
                tracing::error!(file = %aside.display(), %why, "hard state unreadable: set aside, voting under a new id");
                set_aside = Some(aside);
                open_db(&path)
            }
            other => other,
        };
        let (db, id, new) = opened.map_err(|e| match e {
            Opening::Unreadable(why) => StoreError::Failed(why),
            Opening::Io(source) => StoreError::Io { path: path.clone(), source },
        })?;
        // The file's name must be as durable as what is in it.
        File::open(dir).and_then(|d| d.sync_all()).map_err(io(dir))?;
        Ok(Self { db, id, new, set_aside, _lock: lock })
    }

    /// The id that was made with this store.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.id
    }

    /// Whether this call of [`Hard::open`] made the store.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.new
    }

    /// Where the unreadable predecessor was put, if there was one.
    #[must_use]
    pub fn set_aside(&self) -> Option<&Path> {
        self.set_aside.as_deref()
    }

    /// Makes all changes or none, and returns when they are on the disk (one fsync or two).
    ///
    /// # Errors
    /// [`StoreError::Refused`]: nothing was changed. [`StoreError::Failed`]: unknown; stop.
    pub fn put_many(&self, changes: &[Change<'_>]) -> Result<(), StoreError> {
        for (key, value) in changes {
            check_key(key)?;
            if let Some(value) = value.filter(|v| v.len() > VALUE_BYTES) {
                let len = value.len();
                return Err(StoreError::Refused(format!(
                    "a value of {len} bytes is over the limit of {VALUE_BYTES}"
                )));
            }
        }
        write(&self.db, changes).map_err(|e| StoreError::Failed(e.to_string()))
    }

    /// The value of a key.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        read(&self.db, key).map_err(|e| StoreError::Failed(e.to_string()))
    }

    /// All entries whose key begins with `prefix`, in order of their keys.
    ///
    /// # Errors
    /// [`StoreError::Failed`]; [`StoreError::Refused`] for a prefix that covers the store's own keys.
    pub fn scan(&self, prefix: &[u8]) -> Result<Vec<Entry>, StoreError> {
        check_key(prefix)?;
        scan(&self.db, prefix).map_err(|e| StoreError::Failed(e.to_string()))
    }
}

fn check_key(key: &[u8]) -> Result<(), StoreError> {
    match key.first() {
        None | Some(0) => {
            Err(StoreError::Refused("a key is not empty and begins not with 0".into()))
        }
        Some(_) => Ok(()),
    }
}

fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| StoreError::Io { path: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(StoreError::Io { path, source }),
    }
}

enum Opening {
    /// The content is no hard state of ours.
    Unreadable(String),
    /// The file could not be reached: its content may be fine.
    Io(io::Error),
}

impl From<redb::Error> for Opening {
    fn from(error: redb::Error) -> Self {
        use io::ErrorKind::{InvalidData, UnexpectedEof};
        match error {
            redb::Error::Io(e) if !matches!(e.kind(), InvalidData | UnexpectedEof) => Self::Io(e),
            // Whole, but not for us: setting it aside would throw promises away.
            e @ (redb::Error::DatabaseAlreadyOpen | redb::Error::UpgradeRequired(_)) => {
                Self::Io(io::Error::other(e.to_string()))
            }
            other => Self::Unreadable(other.to_string()),
        }
    }
}

/// Opens or makes the file; answers with its id and whether it was made.
fn open_db(path: &Path) -> Result<(Database, StoreId, bool), Opening> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(Opening::Io)?;
    let made = Builder::new().set_cache_size(CACHE_BYTES).create_file(file);
    let mut db = made.map_err(redb::Error::from)?;
    // Pages have checksums that ordinary reads do not compare. A repair would go back to an older
    // state, in which promises are missing: that store must not vote on.
    if !db.check_integrity().map_err(redb::Error::from)? {
        return Err(Opening::Unreadable("its checksums do not match".into()));
    }
    match read(&db, STORE_KEY)? {
        Some(bytes) => {
            let bytes = <[u8; 16]>::try_from(bytes.as_slice())
                .map_err(|_| Opening::Unreadable("its id has not 16 bytes".into()))?;
            Ok((db, StoreId(bytes), false))
        }
        None => {
            let mut bytes = [0_u8; 16];
            getrandom::fill(&mut bytes).map_err(|e| Opening::Io(io::Error::other(e)))?;
            write(&db, &[(STORE_KEY, Some(&bytes))])?;
            Ok((db, StoreId(bytes), true))
        }
    }
}

/// A name beside `path` that nothing has.
fn free_name(path: &Path) -> PathBuf {
    let name = |n: u32| path.with_extension(format!("redb.unreadable-{n}"));
    (1..u32::MAX).map(name).find(|p| !p.exists()).unwrap_or_else(|| name(u32::MAX))
}

fn write(db: &Database, changes: &[Change<'_>]) -> Result<(), redb::Error> {
    let mut tx = db.begin_write()?;
    tx.set_durability(Durability::Immediate)?;
    // A second fsync: without it, damage found after a crash could be taken for a torn last commit
    // and quietly undone, and with it a promise that was already spoken.
    tx.set_two_phase_commit(true);
    {
        let mut table = tx.open_table(TABLE)?;
        for (key, value) in changes {
            match value {
                Some(value) => table.insert(*key, *value)?,
                None => table.remove(*key)?,
            };
        }
    }
    tx.commit()?;
    Ok(())
}

fn read(db: &Database, key: &[u8]) -> Result<Option<Vec<u8>>, redb::Error> {
    match db.begin_read()?.open_table(TABLE) {
        Ok(table) => Ok(table.get(key)?.map(|v| v.value().to_vec())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn scan(db: &Database, prefix: &[u8]) -> Result<Vec<Entry>, redb::Error> {
    let table = match db.begin_read()?.open_table(TABLE) {
        Ok(table) => table,
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let mut found = Vec::new();
    for entry in table.range(prefix..)? {
        let (key, value) = entry?;
        if !key.value().starts_with(prefix) {
            break;
        }
        found.push((key.value().to_vec(), value.value().to_vec()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_was_put_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let hard = Hard::open(dir.path()).unwrap();
        assert!(hard.is_new());
        let id = hard.id();
        hard.put_many(&[(b"a/1", Some(b"x")), (b"a/2", Some(b"y")), (b"b", Some(b""))]).unwrap();
        hard.put_many(&[(b"a/1", None), (b"a/3", Some(b"z"))]).unwrap();
        drop(hard);
        let hard = Hard::open(dir.path()).unwrap();
        assert!(!hard.is_new());
        assert_eq!(hard.id(), id);
        let found = hard.scan(b"a/").unwrap();
        assert_eq!(found, [(b"a/2".to_vec(), b"y".to_vec()), (b"a/3".to_vec(), b"z".to_vec())]);
        assert_eq!(hard.get(b"b").unwrap(), Some(Vec::new()));
        assert_eq!(hard.get(b"a/1").unwrap(), None);
        let mode = std::fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_second_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = Hard::open(dir.path()).unwrap();
        assert!(matches!(Hard::open(dir.path()), Err(StoreError::Locked(_))));
        drop(first);
        assert!(Hard::open(dir.path()).is_ok());
    }

    #[test]
    fn one_refused_change_refuses_all() {
        let dir = tempfile::tempdir().unwrap();
        let hard = Hard::open(dir.path()).unwrap();
        assert!(hard.put_many(&[(b"a", Some(b"x")), (b"\0store", None)]).is_err());
        assert!(hard.put_many(&[(b"a", Some(b"x")), (b"", None)]).is_err());
        assert_eq!(hard.get(b"a").unwrap(), None);
        assert!(hard.scan(b"").is_err());
    }

    #[test]
    fn lost_or_unreadable_state_gets_a_new_id() {
        let dir = tempfile::tempdir().unwrap();
        let first = Hard::open(dir.path()).unwrap().id();
        let path = dir.path().join(FILE);
        std::fs::remove_file(&path).unwrap();
        let second = Hard::open(dir.path()).unwrap().id();
        assert_ne!(first, second);
        let whole = std::fs::read(&path).unwrap();
        // Every copy of it in the file: older pages keep theirs.
        let mut flipped = whole.clone();
        for at in 0..whole.len() - 7 {
            flipped[at + 6] ^= u8::from(&whole[at..at + 6] == STORE_KEY);
        }
        assert_ne!(flipped, whole);
        let damaged: [(&str, Vec<u8>); 6] = [
            ("one bit of the id", flipped),
            ("text", b"not a database".to_vec()),
            ("zeros", vec![0; whole.len()]),
            ("cut", whole[..whole.len() / 3].to_vec()),
            (
                "header",
                whole.iter().enumerate().map(|(i, b)| if i < 320 { !b } else { *b }).collect(),
            ),
            ("one byte", vec![7]),
        ];
        let mut seen = vec![first, second];
        for (what, bytes) in damaged {
            std::fs::write(&path, bytes).unwrap();
            let hard = Hard::open(dir.path()).unwrap();
            let seen_as = (hard.is_new(), hard.set_aside().is_some());
            assert_eq!(seen_as, (true, true), "{what}");
            assert!(!seen.contains(&hard.id()), "{what}");
            seen.push(hard.id());
        }
    }

    #[test]
    fn a_file_that_cannot_be_reached_is_an_error_not_a_new_identity() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(FILE)).unwrap();
        assert!(matches!(Hard::open(dir.path()), Err(StoreError::Io { .. })));
    }

    #[test]
    fn state_survives_a_process_that_was_killed_while_writing() {
        // A copy of the file at any moment between commits is what a killed process leaves behind.
        let dir = tempfile::tempdir().unwrap();
        let hard = Hard::open(dir.path()).unwrap();
        for n in 0_u32..20 {
            hard.put_many(&[(b"n", Some(&n.to_be_bytes()))]).unwrap();
            let other = tempfile::tempdir().unwrap();
            std::fs::copy(dir.path().join(FILE), other.path().join(FILE)).unwrap();
            let copy = Hard::open(other.path()).unwrap();
            assert_eq!(copy.id(), hard.id());
            assert_eq!(copy.get(b"n").unwrap(), Some(n.to_be_bytes().to_vec()));
        }
    }
}
