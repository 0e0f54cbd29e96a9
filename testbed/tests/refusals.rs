//! Bad input and hosts that cannot take a VM, with real daemons. Needs root; without it the test says so and ends.

#[test]
fn every_refusal_is_one_clear_line_and_changes_nothing() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return Ok(());
    }
    let report = godwit_testbed::scenario::refusals::refusals()?;
    let failed = godwit_testbed::scenario::failed(&report);
    anyhow::ensure!(report["passed"] == true, "{failed:#?}");
    Ok(())
}
