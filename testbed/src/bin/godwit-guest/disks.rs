//! The disk workload: files or whole devices whose pages are rewritten at a set rate, and the table of what each must hold.
//!
//! Owns the open files, their version tables and the writer thread. Invariant: under the lock every page was written as the
//! version that the table names; verifying flushes and then reads past the page cache, so what is judged is the disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use godwit_testbed::guest::pattern::{self, PAGE_BYTES, PAGE_WORDS, Page};
use godwit_testbed::guest::wire::{Corrupt, Verified};

/// Disks or files of one guest.
const MAX_REGIONS: usize = 4;
/// Largest of them, MiB.
const MAX_MIB: u32 = 1024;
/// How often the writer looks at the clock.
const SLICE: Duration = Duration::from_millis(20);
/// How often what was written is flushed.
const FLUSH: Duration = Duration::from_secs(1);

/// One page where `O_DIRECT` can read it to.
#[repr(align(4096))]
struct Aligned([u8; PAGE_BYTES]);

struct Region {
    file: File,
    seed: u64,
    versions: Vec<u32>,
    written: u64,
    draw: u64,
    /// 0 = not rewriting.
    rate_kbps: u32,
    owed_bytes: f64,
    unflushed: Option<Instant>,
}

impl Region {
    fn open(path: &str, mb: u32, seed: u64) -> io::Result<Self> {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let pages = (u64::from(mb) << 20) / PAGE_BYTES as u64;
        let versions = vec![0; usize::try_from(pages).map_err(io::Error::other)?];
        let mut region = Region {
            file,
            seed,
            versions,
            written: 0,
            draw: seed,
            rate_kbps: 0,
            owed_bytes: 0.0,
            unflushed: None,
        };
        for page in 0..region.versions.len() {
            region.write(page)?;
        }
        region.flush()?;
        Ok(region)
    }

    fn write(&mut self, page: usize) -> io::Result<()> {
        let version = self.versions[page].wrapping_add(1);
        let content = pattern::page_bytes(self.seed, page as u32, version);
        self.file.write_all_at(&content, page as u64 * PAGE_BYTES as u64)?;
        self.versions[page] = version;
        self.written += 1;
        self.unflushed.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.unflushed = None;
        self.file.sync_data()
    }

    /// Time lost to a pause is not made up.
    fn rewrite(&mut self, elapsed: Duration) -> io::Result<()> {
        self.owed_bytes += f64::from(self.rate_kbps) * 1000.0 * elapsed.as_secs_f64();
        while self.rate_kbps > 0 && self.owed_bytes >= PAGE_BYTES as f64 {
            self.owed_bytes -= PAGE_BYTES as f64;
            self.draw = pattern::mix(self.draw);
            let page = (u128::from(self.draw) * self.versions.len() as u128) >> 64;
            self.write(page as usize)?;
        }
        match self.unflushed {
            Some(since) if since.elapsed() >= FLUSH => self.flush(),
            _ => Ok(()),
        }
    }

    fn verify(&mut self, path: &str, result: &mut Verified) -> io::Result<()> {
        self.flush()?;
        let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(path)?;
        let mut bytes = Box::new(Aligned([0; PAGE_BYTES]));
        let mut page: Page = [0; PAGE_WORDS];
        for (index, version) in self.versions.iter().enumerate() {
            direct.read_exact_at(&mut bytes.0, index as u64 * PAGE_BYTES as u64)?;
            for (word, bytes) in page.iter_mut().zip(bytes.0.chunks_exact(8)) {
                *word = u64::from_le_bytes(bytes.try_into().map_err(io::Error::other)?);
            }
            result.pages_verified += 1;
            result.versions_total += u64::from(*version);
            if let Some(fault) = pattern::diagnose(&page, self.seed, index as u32, *version) {
                result.pages_corrupt += 1;
                result.first_corrupt.get_or_insert(Corrupt {
                    index: index as u32,
                    expected_version: *version,
                    fault: fault.name().to_owned(),
                    found_version: None,
                });
            }
        }
        result.pages_written += self.written;
        Ok(())
    }
}

struct State {
    seed: u64,
    regions: BTreeMap<String, Region>,
    /// The first error of a write: the disk failed the guest.
    failed: Option<String>,
}

/// Handle to the workload, shared by all control channels.
#[derive(Clone)]
pub struct Disks(Arc<Mutex<State>>);

impl Disks {
    /// Nothing yet; starts the writer thread.
    pub fn start(seed: u64) -> io::Result<Self> {
        let state = State { seed, regions: BTreeMap::new(), failed: None };
        let disks = Disks(Arc::new(Mutex::new(state)));
        let writer = disks.clone();
        thread::Builder::new().name("disk-writer".into()).spawn(move || writer.write_for_ever())?;
        Ok(disks)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills the first `mb` MiB of `path` (unless it did before) and rewrites pages there at the rate.
    pub fn churn(&self, path: &str, mb: u32, rate_kbps: u32) -> Result<(), String> {
        let mut state = self.lock();
        if !state.regions.contains_key(path) {
            if state.regions.len() >= MAX_REGIONS || mb == 0 || mb > MAX_MIB {
                return Err(format!("at most {MAX_REGIONS} of 1 to {MAX_MIB} MiB"));
            }
            let seed = pattern::mix(state.seed ^ (1 + state.regions.len() as u64));
            let region = Region::open(path, mb, seed).map_err(|e| format!("{path}: {e}"))?;
            state.regions.insert(path.to_owned(), region);
        }
        if let Some(region) = state.regions.get_mut(path) {
            region.rate_kbps = rate_kbps;
            region.owed_bytes = 0.0;
        }
        Ok(())
    }

    /// Compares every page on the disks with the version that the table names.
    pub fn verify(&self) -> Result<Verified, String> {
        let mut state = self.lock();
        if let Some(failed) = &state.failed {
            return Err(failed.clone());
        }
        let mut result = Verified::default();
        for (path, region) in &mut state.regions {
            region.verify(path, &mut result).map_err(|e| format!("{path}: {e}"))?;
        }
        Ok(result)
    }

    fn write_for_ever(&self) {
        let mut last = Instant::now();
        loop {
            thread::sleep(SLICE);
            let elapsed = last.elapsed().min(5 * SLICE);
            last = Instant::now();
            let mut state = self.lock();
            let State { regions, failed, .. } = &mut *state;
            for (path, region) in regions {
                if let Err(error) = region.rewrite(elapsed) {
                    region.rate_kbps = 0;
                    failed.get_or_insert(format!("writing {path}: {error}"));
                }
            }
        }
    }
}

/// Runs a line of shell to its end; its output, or why it failed.
pub fn shell(line: &str, output_max: usize) -> Result<String, String> {
    let shell = if fs::exists("/bin/sh").unwrap_or(false) { "/bin/sh" } else { "/bin/busybox" };
    let mut command = std::process::Command::new(shell);
    if shell == "/bin/busybox" {
        command.arg("sh");
    }
    let done = command.arg("-c").arg(line).output().map_err(|e| format!("{shell}: {e}"))?;
    let said = [&done.stdout[..], &done.stderr[..]].concat();
    let start = said.len().saturating_sub(output_max);
    let said = String::from_utf8_lossy(&said[start..]).trim().to_owned();
    if done.status.success() { Ok(said) } else { Err(format!("{}: {said}", done.status)) }
}
