//! One migration for people: its outcome in one line, and its timeline from both ends.

use std::path::Path;

use godwit_protocol::wire::migrate::{Phase, Status, of_member};
use serde_json::Value;

use super::Answer;
use super::human::{show_bytes, show_ms};
use super::progress::{dedup_percent, phase};
use super::show::table;
use crate::api::client::{call, read_answer};
use crate::api::types::{ApiError, Migration, Request};

/// The outcome, or how far it is.
pub fn outcome(migration: &Migration) -> String {
    let s = &migration.status;
    let (_, word) = phase(s.phase);
    let to = migration.to_name.as_deref().unwrap_or("?");
    let cause = if s.cause.is_empty() { String::new() } else { format!(": {}", s.cause) };
    match s.phase {
        Phase::Moved => {
            let down = s.downtime_us.map_or("unknown".into(), |us| show_ms(us.div_ceil(1000)));
            let known = dedup_percent(s).map(|p| format!(", {p} % not sent again"));
            let together = together(s);
            format!(
                "moved: {} runs on {to} (epoch {}) after {}, downtime {down}{together}, {} sent of {}{}{cause}",
                s.name,
                s.epoch_after.unwrap_or(s.epoch_before.next()),
                show_ms(s.total_ms),
                show_bytes(s.bulk_bytes),
                show_bytes(s.ram_nonzero_bytes),
                known.unwrap_or_default(),
            )
        }
        Phase::Stayed => format!("stayed: {} runs on {}{cause}", s.name, migration.from_name),
        Phase::Lost => format!("lost: {} is not known to run on {to}{cause}", s.name),
        _ => format!("{word}: {} from {} to {to}{cause}", s.name, migration.from_name),
    }
}

/// How far apart the members of a cluster were stopped and resumed.
fn together(status: &Status) -> String {
    let (Some(stop), Some(resume)) = (status.stop_spread_us, status.resume_spread_us) else {
        return String::new();
    };
    let ms = |us: u64| show_ms(us.div_ceil(1000));
    let (budget, stop, resume) = (ms(status.stop_budget_us), ms(stop), ms(resume));
    format!(" (stopped within {stop} of {budget}, resumed within {resume})")
}

/// Exit code of a migration that was waited for; none: it has not ended.
pub fn exit_code(phase: Phase) -> Option<u8> {
    match phase {
        Phase::Moved => Some(0),
        Phase::Stayed => Some(3),
        Phase::Lost => Some(4),
        _ => None,
    }
}

/// The moments of both ends in order of their time, aligned.
pub fn timeline(migration: &Migration) -> String {
    let mut moments: Vec<_> = migration.status.timeline.iter().collect();
    moments.sort_by_key(|m| m.at_us);
    let first = moments.first().map_or(0, |m| m.at_us);
    let rows = moments.iter().map(|m| {
        let at = m.at_us.saturating_sub(first);
        let time = format!("{:>8}.{:06} s", at / 1_000_000, at % 1_000_000);
        vec![time, migration.host_name(m.host), m.what.clone()]
    });
    table(&["TIME", "HOST", "EVENT"], rows.collect())
}

/// `godwit migrations show`; of a cluster with the timeline of each member.
pub async fn show(state: &Path, value: Value) -> Result<Answer, ApiError> {
    let all: Vec<Migration> = read_answer(value)?;
    let migration = all
        .into_iter()
        .next()
        .ok_or_else(|| ApiError::new("this migration is not known", "see godwit migrations"))?;
    let s = &migration.status;
    let mut text = format!("{}\n", outcome(&migration));
    text += &format!("id {}, asked on {}\n", s.id, migration.requested_on_name);
    text += &format!(
        "pages: {} zero, {} known, {} sent\n",
        s.chunks_zero, s.chunks_known, s.chunks_literal
    );
    if s.disk_throttled_ms > 0 {
        let rate = show_bytes(s.disk_throttle_bytes_per_s);
        let time = show_ms(s.disk_throttled_ms);
        text += &format!("writes to disk were held to {rate}/s for {time}\n");
    }
    text.push('\n');
    text += &timeline(&migration);
    let mut value = serde_json::to_value(&migration).map_err(ApiError::plain)?;
    if !s.members.is_empty() {
        text += &format!("\n{}", members(&migration));
        let mut all = Vec::new();
        for member in &s.members {
            let id = Some(of_member(s.id, member.vm));
            // One that did not begin has no timeline, and a host may be away.
            let Ok(told) = call(state, &Request::Migrations { id }, |_| {}).await else { continue };
            let Some(told) = read_answer::<Vec<Migration>>(told)?.into_iter().next() else {
                continue;
            };
            text += &format!("\n{} ({})\n{}", member.name, told.status.id, timeline(&told));
            all.push(told);
        }
        value["member_migrations"] = serde_json::to_value(&all).map_err(ApiError::plain)?;
    }
    Ok(Answer::Show(text, value))
}

/// The members of a cluster's migration, one line each.
fn members(migration: &Migration) -> String {
    let rows = migration.status.members.iter().map(|m| {
        let down = m.downtime_us.map_or("-".into(), |us| show_ms(us.div_ceil(1000)));
        let to = m.to.map_or("?".into(), |to| migration.host_name(to));
        let from = migration.host_name(m.from);
        vec![m.name.to_string(), from, to, phase(m.phase).1.into(), down, m.cause.clone()]
    });
    table(&["MEMBER", "FROM", "TO", "PHASE", "DOWNTIME", "CAUSE"], rows.collect())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use godwit_protocol::id::{Epoch, HostId, MigrationId, VmId};
    use godwit_protocol::wire::migrate::Moment;

    pub fn status(phase: Phase) -> Status {
        Status {
            id: MigrationId([1; 16]),
            vm: VmId([2; 16]),
            cluster: VmId([2; 16]),
            name: "web".parse().unwrap(),
            from: HostId([3; 32]),
            to: Some(HostId([4; 32])),
            requested_on: HostId([5; 32]),
            phase,
            cause: String::new(),
            epoch_before: Epoch(1),
            epoch_after: phase.is_end().then_some(Epoch(2)),
            ram_bytes: 512 << 20,
            ram_nonzero_bytes: 209 << 20,
            bulk_bytes: 31 << 20,
            done_ppm: 400_000,
            left_ms: None,
            dirty_bytes_per_s: 1 << 20,
            disk_bytes: 0,
            disk_wan_bytes: 0,
            disk_throttle_bytes_per_s: 0,
            disk_throttled_ms: 0,
            frames_held: 0,
            frames_dropped: 0,
            chunks_zero: 10,
            chunks_known: 0,
            chunks_literal: 0,
            total_ms: 12_300,
            downtime_us: Some(209_001),
            members: vec![],
            stop_spread_us: None,
            stop_budget_us: 3_000_000,
            resume_spread_us: None,
            timeline: vec![],
        }
    }

    pub fn migration(phase: Phase) -> Migration {
        Migration::new(status(phase), |h| format!("h{}", h.0[0]))
    }

    #[test]
    fn outcomes_are_one_line() {
        let mut m = migration(Phase::Moved);
        assert_eq!(
            outcome(&m),
            "moved: web runs on h4 (epoch 2) after 12.3 s, downtime 210 ms, 31.0 MiB sent of 209 MiB"
        );
        m.status.phase = Phase::Stayed;
        m.status.cause = "host h4 has not enough memory".into();
        assert_eq!(outcome(&m), "stayed: web runs on h3: host h4 has not enough memory");
        m.status.phase = Phase::Lost;
        assert!(outcome(&m).starts_with("lost: web"));
    }

    #[test]
    fn the_timeline_is_one_of_both_ends() {
        let mut m = migration(Phase::Moved);
        let moment =
            |at_us, host, what: &str| Moment { at_us, host: HostId([host; 32]), what: what.into() };
        m.status.timeline = vec![
            moment(1_000_500, 3, "stop"),
            moment(2_200_000, 4, "resume"),
            moment(1_000_000, 3, "asked"),
        ];
        let text = timeline(&m);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines[1], "0.000000 s  h3    asked");
        assert_eq!(lines[2], "0.000500 s  h3    stop");
        assert_eq!(lines[3], "1.200000 s  h4    resume");
    }

    #[test]
    fn a_migration_reads_back_from_json_with_readable_ids() {
        let m = migration(Phase::Moved);
        let value = serde_json::to_value(&m).unwrap();
        assert_eq!(value["id"], "01".repeat(16));
        assert_eq!(value["phase"], "moved");
        assert_eq!(value["to_name"], "h4");
        assert_eq!(serde_json::from_value::<Migration>(value).unwrap(), m);
    }
}
