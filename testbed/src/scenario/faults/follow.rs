//! Follows a migration from the node that was asked, by its own socket.
//!
//! Owns one request and what came of it. An answer that does not come (the node was killed) is no error here.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, bail};
use godwit::api::client::call;
use godwit::api::types::{Event, Request};
use godwit_protocol::id::MigrationId;
use godwit_protocol::wire::migrate::Phase;
use tokio::sync::oneshot;

/// How fast a move may be, bytes per second; 0: no limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// On the link.
    pub link: u64,
    /// Read of each disk.
    pub disk: u64,
}

/// What was heard so far.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// The newest phase.
    pub phase: Option<Phase>,
    /// Share of the work that is done, parts per million.
    pub done_ppm: u32,
    /// The end of the request: its error.
    pub error: Option<String>,
    /// The request was answered, or failed.
    pub over: bool,
}

/// A request that is being followed.
pub struct Follow {
    /// The migration.
    pub id: MigrationId,
    heard: Arc<Mutex<Heard>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Follow {
    /// Asks the node of that state directory to move `vm` to `to`.
    pub fn start(state: &Path, vm: &str, to: &str, pace: Pace) -> Result<Self> {
        Self::placed(state, vm, to, &[], pace)
    }

    /// As [`Follow::start`]; these members of a cluster go to these hosts.
    pub fn placed(
        state: &Path,
        vm: &str,
        to: &str,
        place: &[(&str, &str)],
        pace: Pace,
    ) -> Result<Self> {
        let mut id = [0; 16];
        let Some(bytes) = blake3::hash(format!("{:?}", std::time::SystemTime::now()).as_bytes())
            .as_bytes()
            .first_chunk::<16>()
            .copied()
        else {
            bail!("no id");
        };
        id.copy_from_slice(&bytes);
        let request = Request::Migrate {
            vm: vm.to_owned(),
            to: to.to_owned(),
            wait: true,
            bandwidth_bytes_per_s: pace.link,
            max_downtime_ms: 0,
            disk_bandwidth_bytes_per_s: pace.disk,
            place: place.iter().map(|(vm, to)| ((*vm).to_owned(), (*to).to_owned())).collect(),
            dry_run: false,
            deadline_s: 0,
            id: Some(MigrationId(id)),
        };
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (stop, stopped) = oneshot::channel();
        let (shared, state) = (Arc::clone(&heard), state.to_owned());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("follow".to_owned()).spawn(move || {
            let note = |change: &dyn Fn(&mut Heard)| {
                change(&mut shared.lock().unwrap_or_else(PoisonError::into_inner));
            };
            let work = call(&state, &request, |event| {
                if let Event::Progress(migration) = event {
                    note(&|heard| {
                        heard.phase = Some(migration.status.phase);
                        heard.done_ppm = migration.status.done_ppm;
                    });
                }
            });
            let ended = runtime.block_on(async {
                tokio::select! {
                    ended = work => ended.err(),
                    _ = stopped => None,
                }
            });
            note(&|heard| {
                heard.error = ended.as_ref().map(ToString::to_string);
                heard.over = true;
            });
        })?;
        Ok(Self { id: MigrationId(id), heard, stop: Some(stop), thread: Some(thread) })
    }

    /// What was heard so far.
    #[must_use]
    pub fn heard(&self) -> Heard {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until what was heard is enough; an error when the request fails or the time is over.
    pub fn wait(&self, deadline: Duration, enough: impl Fn(&Heard) -> bool) -> Result<Heard> {
        let end = std::time::Instant::now() + deadline;
        loop {
            let heard = self.heard();
            if enough(&heard) {
                return Ok(heard);
            }
            if let Some(error) = heard.error {
                bail!("the request: {error}");
            }
            if std::time::Instant::now() > end {
                bail!("not reached within {deadline:?}: {heard:?}");
            }
            // Progress comes from another thread; a deadline bounds this.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails when the request has ended.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
