//! Disks that move, with real daemons and a small guest. Needs root; without it the test says so and ends.

#[test]
fn disks_move_with_their_vm_or_it_stays() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return Ok(());
    }
    let report = godwit_testbed::scenario::disks::small()?;
    let failed = godwit_testbed::scenario::failed(&report);
    anyhow::ensure!(report["passed"] == true, "{failed:#?}");
    Ok(())
}
