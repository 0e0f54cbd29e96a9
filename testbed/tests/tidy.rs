//! The rules of this house, as a test: lengths, headers, who imports whom, what never occurs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// Longest file, lines.
const FILE_LINES: usize = 500;
/// Longest function with its signature, lines.
const FUNCTION_LINES: usize = 70;
/// Adapters of `node`: each knows itself and the protocol.
const ADAPTERS: [&str; 7] = ["api", "link", "nbd", "net", "relay", "store", "vmm"];
/// Modules of `protocol` and how far up they stand. Each imports lower ones; those that stand at 2 are
/// siblings that do not know each other.
const LAYERS: [(&str, u8); 11] = [
    ("id", 0),
    ("limits", 0),
    ("time", 0),
    ("wire", 1),
    ("chunk", 2),
    ("cutover", 2),
    ("epoch", 2),
    ("membership", 2),
    ("route", 2),
    ("migrate", 3),
    ("core", 4),
];

struct Source {
    /// Path inside the repository.
    path: String,
    text: String,
    /// The text with comments, strings and character literals blanked: same lines, same columns.
    code: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All files of the repository but what is built and version control's own.
fn files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name == "target" || name == ".git" {
                continue;
            }
            match path.symlink_metadata().unwrap() {
                m if m.is_dir() => open.push(path),
                m if m.is_file() => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

fn inside(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

fn sources() -> Vec<Source> {
    let rust = files().into_iter().filter(|p| p.extension().is_some_and(|e| e == "rs"));
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        Source { path: inside(&path), code: blank(&text), text }
    };
    let all: Vec<Source> = rust.map(read).collect();
    assert!(all.len() > 20, "the walk found only {} files", all.len());
    all
}

/// Replaces everything that is no code by blanks, line ends stay.
fn blank(text: &str) -> String {
    let b: Vec<char> = text.chars().collect();
    let at = |i: usize| b.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < b.len() {
        let end = match (at(i), at(i + 1)) {
            ('/', '/') => (i..b.len()).find(|j| b[*j] == '\n').unwrap_or(b.len()),
            ('/', '*') => block_end(&b, i),
            ('"', _) => string_end(&b, i),
            ('r', '"' | '#') if !is_word(i.checked_sub(1).map_or(' ', &at)) => raw_end(&b, i),
            ('b', '"') => string_end(&b, i + 1),
            ('b', 'r') if matches!(at(i + 2), '"' | '#') => raw_end(&b, i + 1),
            ('\'', '\\') => (i + 3..b.len()).find(|j| b[*j] == '\'').map_or(b.len(), |j| j + 1),
            ('\'', _) if at(i + 2) == '\'' => i + 3,
            _ => i,
        };
        if end == i {
            out.push(b[i]);
            i += 1;
        }
        for c in b.iter().take(end).skip(i) {
            out.push(if *c == '\n' { '\n' } else { ' ' });
        }
        i = i.max(end);
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn block_end(b: &[char], from: usize) -> usize {
    let mut depth = 0_usize;
    let mut i = from;
    while i + 1 < b.len() {
        match (b[i], b[i + 1]) {
            ('/', '*') => (depth, i) = (depth + 1, i + 2),
            ('*', '/') => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            return i;
        }
    }
    b.len()
}

/// `from` is the opening quote.
fn string_end(b: &[char], from: usize) -> usize {
    let mut i = from + 1;
    while i < b.len() {
        match b[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    b.len()
}

/// `from` is the `r`; answers `from` if this is a raw identifier and no string.
fn raw_end(b: &[char], from: usize) -> usize {
    let hashes = b[from + 1..].iter().take_while(|c| **c == '#').count();
    let quote = from + 1 + hashes;
    if b.get(quote) != Some(&'"') {
        return from;
    }
    let closes = |j: usize| b[j] == '"' && (1..=hashes).all(|k| b.get(j + k) == Some(&'#'));
    (quote + 1..b.len()).find(|j| closes(*j)).map_or(b.len(), |j| j + 1 + hashes)
}

/// (first line, lines, name) of every function with a body.
fn functions(code: &str) -> Vec<(usize, usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let name: String = code[at + 3..].chars().take_while(|c| is_word(*c)).collect();
        if name.is_empty() {
            continue;
        }
        let line = |at: usize| code[..at].matches('\n').count() + 1;
        if let Some(end) = body_end(code, at) {
            found.push((line(at), line(end) - line(at) + 1, name));
        }
    }
    found
}

/// Where the body ends that belongs to the `fn` at `from`; none: it has no body.
fn body_end(code: &str, from: usize) -> Option<usize> {
    let (mut round, mut curly) = (0_i32, 0_i32);
    for (i, c) in code[from..].char_indices() {
        match c {
            '(' | '[' => round += 1,
            ')' | ']' => round -= 1,
            '{' if round == 0 || curly > 0 => curly += 1,
            '}' if curly > 0 => {
                curly -= 1;
                if curly == 0 {
                    return Some(from + i);
                }
            }
            ';' if round == 0 && curly == 0 => return None,
            _ => {}
        }
    }
    None
}

/// First names behind `prefix::`, braces opened: `crate::{a::x, b}` gives a and b.
fn imported(code: &str, prefix: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let key = format!("{prefix}::");
    for (at, _) in code.match_indices(&key) {
        if code[..at].ends_with(|c| is_word(c) || c == ':') {
            continue;
        }
        let line = code[..at].matches('\n').count() + 1;
        let rest = &code[at + key.len()..];
        let first =
            |text: &str| text.trim_start().chars().take_while(|c| is_word(*c)).collect::<String>();
        let Some(group) = rest.strip_prefix('{') else {
            found.push((line, first(rest)));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in group.chars() {
            match c {
                '}' if depth == 0 => break,
                ',' if depth == 0 => found.push((line, first(&std::mem::take(&mut item)))),
                _ => {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    item.push(c);
                }
            }
        }
        found.push((line, first(&item)));
    }
    found.retain(|(_, name)| !name.is_empty());
    found
}

/// The module below `src/` that a file belongs to.
fn module<'a>(path: &'a str, krate: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(krate)?.strip_prefix("/src/")?;
    let first = rest.split('/').next()?;
    Some(first.strip_suffix(".rs").unwrap_or(first))
}

/// Shows all breaches of one rule at once.
fn none(rule: &str, breaches: &[String]) {
    assert!(breaches.is_empty(), "{rule}:\n  {}\n", breaches.join("\n  "));
}

#[test]
fn files_and_functions_are_short_enough_to_read() {
    let mut long = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        if lines > FILE_LINES {
            long.push(format!("{}: {lines} lines", source.path));
        }
        for (line, lines, name) in functions(&source.code) {
            if lines > FUNCTION_LINES {
                long.push(format!("{}:{line}: fn {name} has {lines} lines", source.path));
            }
        }
    }
    none(&format!("files have at most {FILE_LINES} lines, functions {FUNCTION_LINES}"), &long);
}

#[test]
fn every_module_says_what_it_is() {
    let bare = sources().into_iter().filter(|s| !s.text.starts_with("//!"));
    let bare: Vec<String> = bare.map(|s| s.path).collect();
    none("a file begins with //! and says what it owns", &bare);
}

#[test]
fn the_protocol_imports_downwards_only() {
    let layer = |name: &str| LAYERS.iter().find(|(n, _)| *n == name).map(|(_, l)| *l);
    let mut wrong = Vec::new();
    for source in sources() {
        let Some(own) = module(&source.path, "protocol").filter(|m| *m != "lib") else { continue };
        let Some(own_layer) = layer(own) else {
            wrong.push(format!("{}: module {own} has no layer in this test", source.path));
            continue;
        };
        for (line, name) in imported(&source.code, "crate") {
            let Some(other) = layer(&name) else { continue };
            // The lowest ones may know each other; they have nothing to decide.
            if name != own && (other > own_layer || (other == own_layer && own_layer > 0)) {
                wrong.push(format!("{}:{line}: {own} imports {name}", source.path));
            }
        }
    }
    none(
        "id, limits, time -> wire -> {chunk, epoch, membership, route} -> migrate -> core",
        &wrong,
    );
}

#[test]
fn the_protocol_touches_nothing() {
    let outside =
        ["std::fs", "std::net", "std::thread", "std::process", "std::env", "tokio", "libp2p"];
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|s| s.path.starts_with("protocol/src/")) {
        for word in outside {
            for (at, _) in source.code.match_indices(&format!("{word}::")) {
                let line = source.code[..at].matches('\n').count() + 1;
                wrong.push(format!("{}:{line}: {word}", source.path));
            }
        }
    }
    none("the protocol has no files, sockets, threads, processes or runtime", &wrong);
}

#[test]
fn adapters_do_not_know_each_other() {
    let mut wrong = Vec::new();
    for source in sources() {
        let Some(own) = module(&source.path, "node").filter(|m| ADAPTERS.contains(m)) else {
            continue;
        };
        for (line, name) in imported(&source.code, "crate") {
            if name != own && name != "limits" {
                wrong.push(format!("{}:{line}: {own} imports {name}", source.path));
            }
        }
    }
    none(
        "an adapter of node imports itself and the protocol; driver.rs brings them together",
        &wrong,
    );
}

#[test]
fn the_simulator_uses_the_protocol_alone() {
    let mut wrong = Vec::new();
    for source in sources() {
        if module(&source.path, "testbed") != Some("sim") {
            continue;
        }
        let outside = ["bench", "guest", "lab", "scenario"].map(|m| format!("crate::{m}"));
        for word in outside.iter().map(String::as_str).chain(["godwit", "tokio", "std::fs"]) {
            let key = format!("{word}::");
            for (at, _) in source.code.match_indices(&key) {
                if !source.code[..at].ends_with(is_word) {
                    let line = source.code[..at].matches('\n').count() + 1;
                    wrong.push(format!("{}:{line}: {word}", source.path));
                }
            }
        }
    }
    none("testbed::sim is seeded and uses godwit_protocol alone", &wrong);
}

#[test]
fn nothing_unfinished_and_no_private_paths() {
    let mut wrong = Vec::new();
    for source in sources() {
        for mark in ["todo!", "unimplemented!", "dbg!"] {
            if source.code.contains(mark) {
                wrong.push(format!("{}: {mark}", source.path));
            }
        }
    }
    // Written in two parts, or this file would be its own breach.
    let private = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];
    for path in files() {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (number, line) in text.lines().enumerate() {
            if private.iter().any(|p| line.contains(p)) {
                wrong.push(format!("{}:{}: {}", inside(&path), number + 1, line.trim()));
            }
        }
    }
    none("no unfinished places, no paths of one machine", &wrong);
}

#[test]
fn a_sleep_in_a_test_says_what_it_stands_for() {
    let mut wrong = Vec::new();
    for source in sources() {
        let tests = if source.path.contains("/tests/") {
            0
        } else {
            match source.text.find("#[cfg(test)]\nmod tests") {
                Some(at) => source.text[..at].matches('\n').count(),
                None => continue,
            }
        };
        let text: Vec<&str> = source.text.lines().collect();
        for (number, line) in source.code.lines().enumerate().skip(tests) {
            let sleeps = line.contains("thread::sleep(") || line.contains("time::sleep(");
            let said = (number.saturating_sub(3)..=number).any(|n| text[n].contains("//"));
            if sleeps && !said {
                wrong.push(format!("{}:{}", source.path, number + 1));
            }
        }
    }
    none("a sleep is no synchronisation: say in a comment above what passes meanwhile", &wrong);
}

#[test]
fn scripts_stop_at_the_first_error() {
    let mut wrong = Vec::new();
    for path in files() {
        let name = inside(&path);
        if !(name.starts_with("scripts/") || name.starts_with(".ci/")) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        if !text.starts_with("#!/usr/bin/env bash\n") || !text.contains("\nset -euo pipefail\n") {
            wrong.push(name);
        }
    }
    none("scripts begin with #!/usr/bin/env bash and set -euo pipefail", &wrong);
}

#[test]
fn the_rules_see_what_they_look_for() {
    let code =
        blank("fn a() { let s = \"}\"; // }\n let c = '}'; let r = r#\"\n}\"#; /* } */ }\nfn b();");
    assert_eq!(functions(&code), [(1, 3, "a".to_owned())]);
    let code = "fn long(x: [u8; 3]) {\n{}\n}\nimpl X { fn y(&self) -> u8\nwhere A: B,\n{ 1 } }";
    let seen: Vec<_> = functions(code).into_iter().collect();
    assert_eq!(seen, [(1, 3, "long".to_owned()), (4, 3, "y".to_owned())]);
    let names =
        |code: &str| imported(code, "crate").into_iter().map(|(_, n)| n).collect::<Vec<_>>();
    assert_eq!(names("use crate::{net::{a, b}, vmm};\ncrate::link::x();"), ["net", "vmm", "link"]);
    assert_eq!(names("use mycrate::net; use crate :: x;"), Vec::<String>::new());
    assert_eq!(module("node/src/net/a.rs", "node"), Some("net"));
    assert_eq!(module("node/src/net.rs", "node"), Some("net"));
    assert_eq!(blank("'a' 'static \"x\\\"y\" b'z'"), "    'static        b   ");
}
