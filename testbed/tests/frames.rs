//! Moves, an abort and a stay with frames going in and out. Needs root; without it the test says so and ends.

use godwit_testbed::scenario::frames::{Plan, frames};

#[test]
fn none_is_lost_and_none_comes_twice() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the lab needs root");
        return Ok(());
    }
    let report = frames(&Plan { labid: "tframes", moves: 2, aborted: 2, fast: false })?;
    // Order is judged by `godwit-lab run frames`: a known defect (docs/architecture.md) breaks it now and then.
    anyhow::ensure!(report["lost"] == 0 && report["duplicated"] == 0, "{report:#}");
    anyhow::ensure!(report["moves"] == 2 && report["aborted"] == 2, "{report:#}");
    Ok(())
}
