//! What a QEMU that ended had to say, as one line.
//!
//! Owns the reading of its log. Never interprets more than where an error begins.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// Bytes of the log's end that are read.
const TAIL: u64 = 4096;
/// Longest line made of it, in characters.
const MAX_CHARS: usize = 400;

/// The last complaint in QEMU's log, without QEMU's own name.
pub(super) fn last_log_line(dir: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(dir.join("qemu.log"))?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
        let mut tail = Vec::new();
        file.take(TAIL).read_to_end(&mut tail)?;
        Ok(String::from_utf8_lossy(&tail).into_owned())
    };
    match read() {
        Ok(log) => last_complaint(&log),
        Err(error) => format!("its log cannot be read: {error}"),
    }
}

/// The last error in what a QEMU wrote, with the hints behind it, as one line.
pub(super) fn last_complaint(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let own = |line: &&str| line.split_once(": ").is_some_and(|(name, _)| name.contains("qemu"));
    // Hints follow an error without QEMU's name before them.
    let last = lines.iter().rposition(own).unwrap_or(lines.len().saturating_sub(1));
    let words = match lines.get(last..) {
        Some([first, hints @ ..]) => {
            let first =
                if own(first) { first.split_once(": ").map_or(*first, |p| p.1) } else { first };
            [&[first], hints].concat().join("; ")
        }
        _ => "it ended without a word".into(),
    };
    words.chars().filter(|c| !c.is_control()).take(MAX_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::last_complaint;

    #[test]
    fn an_error_comes_with_its_hints() {
        let cases = [
            ("", "it ended without a word"),
            (
                "qemu-system-x86_64: warning: x\nqemu-system-x86_64: no lock\nIs it in use?\n\n",
                "no lock; Is it in use?",
            ),
            ("sh: not found\n", "sh: not found"),
            ("2026 qemu: a: b\n", "a: b"),
        ];
        for (log, line) in cases {
            assert_eq!(last_complaint(log), line);
        }
        assert_eq!(last_complaint(&"é\u{7}".repeat(5000)).chars().count(), 400);
    }
}
