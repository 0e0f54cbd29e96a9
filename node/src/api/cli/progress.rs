//! Progress of one migration. Owns what was shown last; invariant: neither the share that is done
//! nor the bytes ever shrink on the screen, whatever order reports come in.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use godwit_protocol::wire::migrate::{Phase, Status};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::human::{show_bytes, show_ms};

/// Without a terminal, at most one line in this time.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// The whole, parts per million.
const WHOLE: u32 = 1_000_000;

/// Shows progress on standard error: a bar on a terminal, plain lines elsewhere.
pub struct Progress {
    seen: Seen,
    out: Out,
}

enum Out {
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
}

impl Progress {
    pub fn start() -> Self {
        let out = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(
                Some(u64::from(WHOLE)),
                ProgressDrawTarget::stderr_with_hz(10),
            );
            // Both templates are constants: the plain one is never needed.
            let style = ProgressStyle::with_template("{bar:24} {percent:>3} %  {wide_msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.progress_chars("=> "));
            Out::Bar(bar)
        } else {
            Out::Lines { last: None }
        };
        Self { seen: Seen::default(), out }
    }

    pub fn update(&mut self, status: &Status) {
        self.seen.take(status);
        match &mut self.out {
            Out::Bar(bar) => {
                bar.set_position(u64::from(self.seen.done_ppm));
                bar.set_message(self.seen.text(status));
            }
            Out::Lines { last } => {
                let now = Instant::now();
                if last.is_some_and(|last| now < last + LINE_EVERY) {
                    return;
                }
                *last = Some(now);
                let percent = self.seen.done_ppm / 10_000;
                let text = self.seen.text(status);
                let _ = writeln!(std::io::stderr().lock(), "{percent:>3} %  {text}");
            }
        }
    }

    /// One line above the progress.
    pub fn note(&self, text: &str) {
        match &self.out {
            Out::Bar(bar) => bar.println(text),
            Out::Lines { .. } => {
                let _ = writeln!(std::io::stderr().lock(), "{text}");
            }
        }
    }

    /// Takes the bar off the screen.
    pub fn end(self) {
        if let Out::Bar(bar) = self.out {
            bar.finish_and_clear();
        }
    }
}

/// What was shown: the highest of each.
#[derive(Debug, Default)]
struct Seen {
    done_ppm: u32,
    bulk_bytes: u64,
    phase: u8,
    phase_name: &'static str,
}

impl Seen {
    fn take(&mut self, status: &Status) {
        // 100 % is for the end alone.
        let most = if status.phase.is_end() { WHOLE } else { WHOLE / 100 * 99 };
        self.done_ppm = self.done_ppm.max(status.done_ppm.min(most));
        self.bulk_bytes = self.bulk_bytes.max(status.bulk_bytes);
        let (order, name) = phase(status.phase);
        if order >= self.phase {
            (self.phase, self.phase_name) = (order, name);
        }
    }

    fn text(&self, status: &Status) -> String {
        let mut text = format!("{}, {} sent", self.phase_name, show_bytes(self.bulk_bytes));
        if let Some(share) = dedup_percent(status) {
            text += &format!(", {share} % not sent again");
        }
        text += &format!(", dirty {}/s", show_bytes(status.dirty_bytes_per_s));
        if status.disk_throttle_bytes_per_s > 0 {
            let rate = show_bytes(status.disk_throttle_bytes_per_s);
            text += &format!(", its writes to disk are held to {rate}/s");
        }
        if let Some(left) = status.left_ms.filter(|_| status.phase == Phase::Transfer) {
            text += &format!(", {} left", show_ms(left));
        }
        text
    }
}

/// The share of non-zero pages that the destination had already, percent.
pub fn dedup_percent(status: &Status) -> Option<u64> {
    let all = status.chunks_known.checked_add(status.chunks_literal)?;
    (status.chunks_known.saturating_mul(100)).checked_div(all)
}

/// The order of phases, and how people read them.
pub fn phase(phase: Phase) -> (u8, &'static str) {
    match phase {
        Phase::Preparing => (0, "preparing"),
        Phase::Transfer => (1, "transfer"),
        Phase::Stopped => (2, "stopped"),
        Phase::Deciding => (3, "deciding"),
        Phase::Starting => (4, "starting"),
        Phase::Releasing => (5, "releasing"),
        Phase::Moved => (6, "moved"),
        Phase::Stayed => (6, "stayed"),
        Phase::Lost => (6, "lost"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::timeline::tests::status;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nothing_runs_backwards(
            reports in proptest::collection::vec((any::<u32>(), any::<u64>(), 0_usize..9), 1..50)
        ) {
            let phases = [Phase::Preparing, Phase::Transfer, Phase::Stopped, Phase::Deciding,
                Phase::Starting, Phase::Releasing, Phase::Moved, Phase::Stayed, Phase::Lost];
            let mut seen = Seen::default();
            let mut before = (0, 0, 0);
            for (done_ppm, bulk_bytes, at) in reports {
                let mut status = status(phases[at]);
                status.done_ppm = done_ppm;
                status.bulk_bytes = bulk_bytes;
                seen.take(&status);
                let now = (seen.done_ppm, seen.bulk_bytes, seen.phase);
                prop_assert!(now.0 >= before.0 && now.1 >= before.1 && now.2 >= before.2);
                prop_assert!(now.0 <= WHOLE);
                before = now;
                let _ = seen.text(&status);
            }
        }
    }

    #[test]
    fn a_line_says_it_all() {
        let mut status = status(Phase::Transfer);
        status.chunks_known = 3;
        status.chunks_literal = 1;
        status.left_ms = Some(12_000);
        let mut seen = Seen::default();
        seen.take(&status);
        assert_eq!(
            seen.text(&status),
            "transfer, 31.0 MiB sent, 75 % not sent again, dirty 1.0 MiB/s, 12.0 s left"
        );
        status.disk_throttle_bytes_per_s = 1 << 20;
        assert!(seen.text(&status).contains(", its writes to disk are held to 1.0 MiB/s, "));
    }
}
