//! The cache of built images: each is built once for its recipe and found again by later runs.
//!
//! Owns the directory, the lock that lets one builder run at a time, and the running of build commands under a deadline.
//! Knows nothing of what is built. Invariant: an entry under its final name is complete; a build happens under another
//! name and is renamed, so a run that was interrupted leaves nothing that a later one would take for an image.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Names the cache directory in the environment.
pub const CACHE_VARIABLE: &str = "GODWIT_LAB_CACHE";
/// How long one build step may take: the longest fetches and unpacks a whole Debian system.
const STEP_DEADLINE: Duration = Duration::from_secs(15 * 60);
/// How long to wait for another process that builds.
const LOCK_DEADLINE: Duration = Duration::from_secs(20 * 60);
/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(50);
/// Entries of one name that are kept; older ones are of outdated recipes.
const KEEP: usize = 6;
/// Bytes of a failed step's output that go into the error.
const SHOWN_OUTPUT: usize = 2000;

/// A directory of finished images.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// The cache named by `GODWIT_LAB_CACHE`, else `$XDG_CACHE_HOME/godwit-lab`, else `/var/cache/godwit-lab`.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open() -> Result<Self> {
        let dir = match (std::env::var_os(CACHE_VARIABLE), std::env::var_os("XDG_CACHE_HOME")) {
            (Some(dir), _) if !dir.is_empty() => PathBuf::from(dir),
            (_, Some(dir)) if !dir.is_empty() => PathBuf::from(dir).join("godwit-lab"),
            _ => PathBuf::from("/var/cache/godwit-lab"),
        };
        Self::at(dir)
    }

    /// A cache in `dir`, which is made if it does not exist.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn at(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        fs::create_dir_all(&dir)
            .with_context(|| format!("Cannot make {}; set {CACHE_VARIABLE}", dir.display()))?;
        let dir = dir.canonicalize()?;
        Ok(Cache { dir })
    }

    /// The directory of image `name` built by `recipe`; `build` makes its content in the directory that it is given, if
    /// no earlier run did. `recipe` must contain everything that the content depends on.
    ///
    /// # Errors
    /// What `build` says, or that another builder did not finish in time.
    pub fn get(
        &self,
        name: &str,
        recipe: &[&[u8]],
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let finished = self.dir.join(format!("{name}-{}", recipe_hash(recipe)));
        if finished.is_dir() {
            return Ok(finished);
        }
        let _lock = self.lock(name)?;
        if finished.is_dir() {
            return Ok(finished);
        }
        let building = self.dir.join(format!("{name}.building"));
        remove(&building)?;
        fs::create_dir(&building)?;
        eprintln!("building guest image {name} (once, in {})", self.dir.display());
        if let Err(cause) = build(&building) {
            remove(&building)?;
            return Err(cause.context(format!("Cannot build guest image {name}")));
        }
        fs::rename(&building, &finished)?;
        self.prune(name)?;
        Ok(finished)
    }

    fn lock(&self, name: &str) -> Result<Flock<File>> {
        let path = self.dir.join(format!("{name}.lock"));
        let deadline = Instant::now() + LOCK_DEADLINE;
        let mut file = File::create(&path)?;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
                Err((_, error)) => bail!("Cannot lock {}: {error}", path.display()),
            };
            ensure!(
                Instant::now() < deadline,
                "{} is held by another process; end it and try again",
                path.display()
            );
            thread::sleep(POLL);
        }
    }

    /// Removes all but the newest entries of `name`.
    fn prune(&self, name: &str) -> Result<()> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let file_name = entry.file_name();
            let hash =
                file_name.to_str().and_then(|text| text.strip_prefix(name)?.strip_prefix('-'));
            if hash.is_some_and(|h| h.len() == 16 && h.bytes().all(|b| b.is_ascii_hexdigit())) {
                entries.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        entries.sort();
        let outdated = entries.len().saturating_sub(KEEP);
        for (_, path) in entries.into_iter().take(outdated) {
            remove(&path)?;
        }
        Ok(())
    }
}

fn recipe_hash(recipe: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in recipe {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Removes a directory with its content, if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Runs one build step to its end and returns what it wrote to its standard output.
///
/// # Errors
/// If it cannot be started (the error names the program), fails (the error has the end of its output) or takes too long.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = tempfile::tempfile()?;
    let errors = tempfile::tempfile()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(errors.try_clone()?)
        .spawn()
        .with_context(|| {
            format!("Cannot start {program}; scripts/setup installs what is needed")
        })?;
    let deadline = Instant::now() + STEP_DEADLINE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("{program} did not end within {} s", STEP_DEADLINE.as_secs());
        }
        thread::sleep(POLL);
    };
    if !status.success() {
        let said = read_all(errors)?;
        let start = said.len().saturating_sub(SHOWN_OUTPUT);
        bail!("{program} failed ({status}): {}", said.get(start..).unwrap_or(&said).trim());
    }
    read_all(output)
}

fn read_all(mut file: File) -> Result<String> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_built_once_per_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let build = |path: &Path| Ok(fs::write(path.join("x"), "1")?);
        let first = cache.get("a", &[b"one"], build).unwrap();
        let again = cache.get("a", &[b"one"], |_| bail!("built twice")).unwrap();
        assert_eq!(first, again);
        let other = cache.get("a", &[b"two"], build).unwrap();
        assert_ne!(first, other);
        assert_ne!(recipe_hash(&[b"ab", b"c"]), recipe_hash(&[b"a", b"bc"]));
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let failed = cache.get("a", &[], |path| {
            fs::write(path.join("half"), "1")?;
            bail!("no space")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("no space"));
        assert!(!dir.path().join("a.building").exists());
        let built = cache.get("a", &[], |_| Ok(())).unwrap();
        assert!(!built.join("half").exists());
    }

    #[test]
    fn outdated_recipes_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        for recipe in 0..KEEP as u8 + 3 {
            cache.get("a", &[&[recipe]], |_| Ok(())).unwrap();
        }
        let left = fs::read_dir(dir.path())
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_dir());
        assert_eq!(left.count(), KEEP);
    }

    #[test]
    fn a_failed_step_says_why() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("broken"), "{error}");
        assert_eq!(run(Command::new("echo").arg("x")).unwrap(), "x\n");
    }
}
