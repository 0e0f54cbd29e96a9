//! One move as a client of the node sees it: every word of progress, and the end.
//!
//! Owns the request and the judgement of its progress. Reads the node's own socket, as programs do.

use std::path::PathBuf;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use godwit::api::client::{call, read_answer};
use godwit::api::types::{Event, Migration, Request};
use godwit_protocol::wire::migrate::Phase;

use crate::scenario::Swarm;
use crate::scenario::swarm::run;

/// What is asked for.
#[derive(Clone, Debug)]
pub(in crate::scenario) struct Wish<'a> {
    pub on: &'a str,
    pub vm: &'a str,
    pub to: &'a str,
    pub bandwidth: u64,
    pub deadline_s: u64,
    /// Where members go, by name.
    pub place: &'a [(&'a str, &'a str)],
}

impl<'a> Wish<'a> {
    pub fn new(on: &'a str, vm: &'a str, to: &'a str) -> Self {
        Self { on, vm, to, bandwidth: 0, deadline_s: 0, place: &[] }
    }
}

/// A move that is followed.
pub(in crate::scenario) struct Moving(JoinHandle<Result<Migration>>);

impl Moving {
    /// Asks, and follows on a thread of its own.
    pub fn start(swarm: &Swarm, wish: &Wish<'_>) -> Result<Self> {
        let state = swarm.node(wish.on)?.state_dir().to_owned();
        let request = Request::Migrate {
            vm: wish.vm.to_owned(),
            to: wish.to.to_owned(),
            wait: true,
            bandwidth_bytes_per_s: wish.bandwidth,
            max_downtime_ms: 0,
            disk_bandwidth_bytes_per_s: 0,
            place: wish.place.iter().map(|(vm, host)| ((*vm).into(), (*host).into())).collect(),
            dry_run: false,
            deadline_s: wish.deadline_s,
            id: None,
        };
        Ok(Self(std::thread::spawn(move || follow(state, &request))))
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.0.is_finished()
    }

    /// How it ended; an error if its progress ran backwards.
    pub fn end(self) -> Result<Migration> {
        self.0.join().map_err(|_| anyhow!("the follower panicked"))?
    }
}

fn follow(state: PathBuf, request: &Request) -> Result<Migration> {
    let (mut last, mut backwards) = ((0_u8, 0_u32, 0_u64), None);
    let answer = run(async {
        let event = |event| {
            let Event::Progress(m) = event else { return };
            let s = &m.status;
            let now = (order(s.phase), s.done_ppm, s.bulk_bytes);
            if now.0 < last.0 || now.1 < last.1 || now.2 < last.2 {
                backwards = backwards.or(Some((last, now)));
            }
            last = now;
        };
        call(&state, request, event).await.map_err(|e| anyhow!("{e}"))
    })?;
    ensure!(backwards.is_none(), "progress ran backwards: {backwards:?}");
    read_answer(answer).map_err(|e| anyhow!("{e}")).context("the end of the move")
}

fn order(phase: Phase) -> u8 {
    match phase {
        Phase::Preparing => 0,
        Phase::Transfer => 1,
        Phase::Stopped => 2,
        Phase::Deciding => 3,
        Phase::Starting => 4,
        Phase::Releasing => 5,
        Phase::Moved | Phase::Stayed | Phase::Lost => 6,
    }
}
