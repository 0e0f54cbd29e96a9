//! Moves, an abort and a stay with frames going in and out. Needs root; without it the test says so and ends.

use godwit_testbed::scenario::frames::{Plan, frames};

#[test]
fn none_is_lost_none_comes_twice_and_none_overtakes() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the lab needs root");
        return Ok(());
    }
    let report = frames(&Plan { labid: "tframes", moves: 2, aborted: 2, rate: 200, fast: false })?;
    anyhow::ensure!(report["passed"] == true && report["lost"] == 0, "{report:#}");
    anyhow::ensure!(report["moves"] == 2 && report["aborted"] == 2, "{report:#}");
    Ok(())
}
