//! Holding points for the lab: a fault can only be shown to have hit a phase that stands still.
//!
//! Owns the hook and nothing else. Without `GODWIT_LAB_HOLD` it does nothing. With it, a point whose
//! file `DIR/POINT` exists leaves `DIR/POINT.reached` and waits until the file is gone.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// A held point goes on by itself after this long.
const HELD: Duration = Duration::from_secs(60);

fn dir() -> Option<&'static PathBuf> {
    static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();
    DIR.get_or_init(|| std::env::var_os("GODWIT_LAB_HOLD").map(PathBuf::from)).as_ref()
}

/// Waits while the lab holds `point`.
pub(super) async fn at(point: &str) {
    let Some(dir) = dir() else { return };
    let file = dir.join(point);
    if !file.exists() {
        return;
    }
    tracing::info!(point, "held by the lab");
    let _ = std::fs::write(dir.join(format!("{point}.reached")), b"");
    let released = async {
        while file.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = tokio::time::timeout(HELD, released).await;
}

/// How much later what this point sends shall go, and then twice: the milliseconds in its file.
pub(super) fn late(point: &str) -> Option<Duration> {
    let text = std::fs::read_to_string(dir()?.join(point)).ok()?;
    text.trim().parse().ok().map(Duration::from_millis)
}

/// Leaves word for the lab that a point was passed once more.
pub(super) fn note(point: &str) {
    use std::io::Write;
    let Some(dir) = dir() else { return };
    let path = dir.join(format!("{point}.reached"));
    let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
    let _ = file.and_then(|mut file| file.write_all(b"x"));
}

/// Whether the lab asks for this fault.
pub(super) fn fault(name: &str) -> bool {
    dir().is_some_and(|dir| dir.join(name).exists())
}
