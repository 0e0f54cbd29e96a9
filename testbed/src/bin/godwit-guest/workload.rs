//! The memory workload: regions of pages that are rewritten at a set rate, and the table of what each must hold.
//!
//! Owns the regions, the version table and the writer thread. Invariant: under the lock every page of a region is exactly
//! the version that the table names, so a verifying pass may run at any time; whatever differs then was changed from outside.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use godwit_testbed::guest::pattern::{self, Fault, PAGE_BYTES, PAGE_WORDS, Page};
use godwit_testbed::guest::wire::{Corrupt, Verified};

/// Regions one guest can have.
const MAX_REGIONS: usize = 8;
/// Pages in one MiB.
const PAGES_PER_MIB: u32 = 256;
/// How often the writer looks at the clock.
const SLICE: Duration = Duration::from_millis(10);

/// Page-aligned memory, so that a page of the workload is a page of the guest.
struct Pages {
    start: *mut Page,
    count: usize,
}

// SAFETY: the mapping is private to this struct and reached only through `&self`/`&mut self`.
unsafe impl Send for Pages {}

impl Pages {
    fn map(count: usize) -> Result<Self, String> {
        // SAFETY: a fresh anonymous mapping aliases nothing; the result is checked before use.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(format!("mmap: {}", std::io::Error::last_os_error()));
        }
        Ok(Pages { start: start.cast(), count })
    }

    fn page(&self, index: usize) -> &Page {
        assert!(index < self.count);
        // SAFETY: the index is inside the mapping, which lives as long as self.
        unsafe { &*self.start.add(index) }
    }

    fn page_mut(&mut self, index: usize) -> &mut Page {
        assert!(index < self.count);
        // SAFETY: as above, and `&mut self` is exclusive.
        unsafe { &mut *self.start.add(index) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; no reference outlives self.
        unsafe { libc::munmap(self.start.cast(), self.count * PAGE_BYTES) };
    }
}

struct Region {
    pages: Pages,
    versions: Vec<u32>,
    /// Index of the region's first page in the whole workload.
    first: u32,
}

struct State {
    seed: u64,
    regions: Vec<Region>,
    pages_written: u64,
    /// Draws which page comes next.
    draw: u64,
    /// 0 = not rewriting.
    rate_kbps: u32,
    hot_quarter: bool,
}

impl State {
    fn write(&mut self, region: usize, page: usize) {
        let seed = self.seed;
        let region = &mut self.regions[region];
        let version = region.versions[page].wrapping_add(1);
        // Generated aside and copied at once: the time in which a page is neither version stays short.
        let mut content = [0; PAGE_WORDS];
        pattern::fill(&mut content, seed, region.first + page as u32, version);
        *region.pages.page_mut(page) = content;
        region.versions[page] = version;
        self.pages_written += 1;
    }

    fn write_one_at_random(&mut self) {
        let Some(last) = self.regions.len().checked_sub(1) else {
            return;
        };
        let mut range = self.regions[last].pages.count as u64;
        if self.hot_quarter {
            range = (range / 4).max(1);
        }
        self.draw = pattern::mix(self.draw);
        let page = (u128::from(self.draw) * u128::from(range)) >> 64;
        self.write(last, page as usize);
    }

    fn add_region(&mut self, mb: u32) -> Result<(), String> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(format!("already {MAX_REGIONS} regions"));
        }
        let available = available_mib();
        if mb == 0 || mb > available * 3 / 4 {
            return Err(format!("mb must be 1 to {}", available * 3 / 4));
        }
        let count = mb * PAGES_PER_MIB;
        let region = Region {
            pages: Pages::map(count as usize)?,
            versions: vec![0; count as usize],
            first: self.page_count(),
        };
        self.regions.push(region);
        let last = self.regions.len() - 1;
        for page in 0..count as usize {
            self.write(last, page);
        }
        Ok(())
    }

    fn page_count(&self) -> u32 {
        self.regions.iter().map(|r| r.pages.count as u32).sum()
    }
}

/// Counters of the workload.
pub struct Counters {
    pub seed: u64,
    pub pages: u64,
    pub pages_written: u64,
    pub churning: bool,
}

/// Handle to the workload, shared by all control channels.
#[derive(Clone)]
pub struct Workload(Arc<Mutex<State>>);

impl Workload {
    /// No regions yet; starts the writer thread.
    pub fn start(seed: u64) -> std::io::Result<Self> {
        let workload = Workload(Arc::new(Mutex::new(State {
            seed,
            regions: Vec::new(),
            pages_written: 0,
            draw: seed,
            rate_kbps: 0,
            hot_quarter: false,
        })));
        let writer = workload.clone();
        thread::Builder::new().name("writer".into()).spawn(move || writer.write_for_ever())?;
        Ok(workload)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills a region (unless the newest has this size) and rewrites it at the rate.
    pub fn churn(&self, mb: u32, rate_kbps: u32, hot_quarter: bool) -> Result<(), String> {
        let mut state = self.lock();
        let pages = u64::from(mb) * u64::from(PAGES_PER_MIB);
        let newest = state.regions.last().map(|r| r.pages.count as u64);
        if newest != Some(pages) {
            state.add_region(mb)?;
        }
        state.rate_kbps = rate_kbps;
        state.hot_quarter = hot_quarter;
        Ok(())
    }

    /// Stops rewriting; once this returns no page changes any more.
    pub fn stop(&self) {
        self.lock().rate_kbps = 0;
    }

    /// Compares every page with the version that the table names.
    pub fn verify(&self) -> Verified {
        let state = self.lock();
        let mut result = Verified { pages_written: state.pages_written, ..Verified::default() };
        for region in &state.regions {
            for (page, version) in region.versions.iter().enumerate() {
                let index = region.first + page as u32;
                result.pages_verified += 1;
                result.versions_total += u64::from(*version);
                let content = region.pages.page(page);
                let Some(fault) = pattern::diagnose(content, state.seed, index, *version) else {
                    continue;
                };
                result.pages_corrupt += 1;
                result.first_corrupt.get_or_insert(Corrupt {
                    index,
                    expected_version: *version,
                    fault: fault.name().to_owned(),
                    found_version: match fault {
                        Fault::Stale { version } | Fault::Torn { version } => Some(version),
                        Fault::Zero | Fault::Garbage => None,
                    },
                });
            }
        }
        result
    }

    /// Counters.
    pub fn counters(&self) -> Counters {
        let state = self.lock();
        Counters {
            seed: state.seed,
            pages: u64::from(state.page_count()),
            pages_written: state.pages_written,
            churning: state.rate_kbps > 0,
        }
    }

    /// Writes as many pages per slice as the rate asks for. Time lost to a pause is not made up: the rate is what a guest
    /// does while it runs.
    fn write_for_ever(&self) {
        let mut last = Instant::now();
        let mut owed_bytes = 0.0;
        loop {
            thread::sleep(SLICE);
            let elapsed = last.elapsed().min(10 * SLICE);
            last = Instant::now();
            let rate = f64::from(self.lock().rate_kbps) * 1000.0;
            owed_bytes += rate * elapsed.as_secs_f64();
            while owed_bytes >= PAGE_BYTES as f64 {
                owed_bytes -= PAGE_BYTES as f64;
                // Locked per page: a verifying pass waits for one page, not for a slice.
                let mut state = self.lock();
                if state.rate_kbps == 0 {
                    owed_bytes = 0.0;
                    break;
                }
                state.write_one_at_random();
            }
            if rate > 0.0 && last.elapsed() > 10 * SLICE {
                // The guest is too slow for this rate: do not let the debt grow.
                owed_bytes = 0.0;
            }
        }
    }
}

/// Memory that the kernel could still give out, in MiB.
fn available_mib() -> u32 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|kib| kib.parse::<u32>().ok())
        .map_or(0, |kib| kib / 1024)
}
