//! Moves with real daemons and guests. Needs root; without it the test says so and ends.

#[test]
fn there_and_back_while_somebody_talks_to_the_guest() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return Ok(());
    }
    let report = godwit_testbed::scenario::roundtrip::roundtrip()?;
    let failed = godwit_testbed::scenario::failed(&report);
    anyhow::ensure!(report["passed"] == true, "{failed:#?}");
    Ok(())
}
