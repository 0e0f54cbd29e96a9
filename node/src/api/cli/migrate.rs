//! `godwit migrate`: ask, follow, say how it ended.

use std::path::Path;

use godwit_protocol::id::MigrationId;
use serde_json::Value;

use super::Answer;
use super::args::MigrateOptions;
use super::progress::Progress;
use super::show;
use super::timeline::{exit_code, outcome};
use crate::api::client::{call, read_answer};
use crate::api::types::{ApiError, Event, Migration, Request};

/// Left by Ctrl-C, as shells count it.
const LEFT: u8 = 130;

pub async fn run(state: &Path, options: &MigrateOptions) -> Result<Answer, ApiError> {
    let id = new_id()?;
    let ms = |d: std::time::Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let request = Request::Migrate {
        vm: options.vm.clone(),
        to: options.to.clone().unwrap_or_default(),
        place: options.place.iter().cloned().collect(),
        dry_run: options.dry_run,
        wait: options.wait,
        bandwidth_bytes_per_s: options.bandwidth.unwrap_or(0),
        max_downtime_ms: options.max_downtime.map_or(0, ms),
        // A part of a second counts as a whole one: 0 would mean the default.
        deadline_s: options.deadline.map_or(0, |d| ms(d).div_ceil(1000)),
        disk_bandwidth_bytes_per_s: options.disk_bandwidth.unwrap_or(0),
        id: Some(id),
    };
    match (options.dry_run, options.wait) {
        (true, _) => show::answer(&request, call(state, &request, |_| {}).await?),
        (false, true) => follow(state, &request, id).await,
        (false, false) => start(state, &request).await,
    }
}

async fn start(state: &Path, request: &Request) -> Result<Answer, ApiError> {
    let value = call(state, request, |_| {}).await?;
    let migration: Migration = read_answer(value.clone())?;
    let id = migration.status.id;
    let text = match exit_code(migration.status.phase) {
        Some(_) => outcome(&migration),
        None => format!("{}\nfollow it: godwit migrations show {id}", outcome(&migration)),
    };
    let code = exit_code(migration.status.phase).unwrap_or(0);
    Ok(Answer::Code(code, text, value))
}

async fn follow(state: &Path, request: &Request, id: MigrationId) -> Result<Answer, ApiError> {
    let mut progress = Progress::start();
    let mut taken = false;
    let result = {
        let on_event = |event| match event {
            Event::Progress(migration) => {
                taken = true;
                progress.update(&migration.status);
            }
            Event::Note(text) => progress.note(&text),
        };
        tokio::select! {
            result = call(state, request, on_event) => Some(result),
            _ = tokio::signal::ctrl_c() => None,
        }
    };
    progress.end();
    let follow = format!("godwit migrations show {id}");
    match result {
        None => {
            let text = format!(
                "the migration goes on: follow it with {follow}, give it up with godwit abort {id}"
            );
            let value = serde_json::json!({"left": true, "id": id});
            Ok(Answer::Code(LEFT, text, value))
        }
        // The daemon went away in the middle: the migration is not ours to call ended.
        Some(Err(error)) if taken => {
            Err(ApiError::new(error.message, format!("it may go on: see {follow}")))
        }
        Some(Err(error)) => Err(error),
        Some(Ok(value)) => ended(value, &follow),
    }
}

fn ended(value: Value, follow: &str) -> Result<Answer, ApiError> {
    let migration: Migration = read_answer(value.clone())?;
    match exit_code(migration.status.phase) {
        Some(code) => Ok(Answer::Code(code, outcome(&migration), value)),
        None => Err(ApiError::new("the daemon answered before the end", format!("see {follow}"))),
    }
}

fn new_id() -> Result<MigrationId, ApiError> {
    let mut id = [0_u8; 16];
    getrandom::fill(&mut id).map_err(|e| ApiError::plain(format!("no randomness: {e}")))?;
    Ok(MigrationId(id))
}
