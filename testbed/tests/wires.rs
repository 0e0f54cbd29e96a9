//! A NIC's filter and its connection, across moves; an encrypted wire, a way out, a router. Needs root; without it the test says so and ends.

#[test]
fn a_filter_moves_with_its_nic() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the lab needs root");
        return Ok(());
    }
    let report = godwit_testbed::scenario::wires::wires("twires")?;
    let failed = godwit_testbed::scenario::failed(&report);
    anyhow::ensure!(report["passed"] == true, "{failed:#?}");
    Ok(())
}

#[test]
fn an_encrypted_wire_never_travels_by_vxlan() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the lab needs root");
        return Ok(());
    }
    println!("{:#}", godwit_testbed::scenario::wires::sealed("tsealed")?);
    Ok(())
}

#[test]
fn clients_outside_keep_their_connections() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the lab needs root");
        return Ok(());
    }
    println!("{:#}", godwit_testbed::scenario::wires::uplink("tuplink")?);
    Ok(())
}

#[test]
fn a_router_moves_with_its_wires() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the lab needs root");
        return Ok(());
    }
    println!("{:#}", godwit_testbed::scenario::wires::router("trouter")?);
    Ok(())
}

#[test]
fn a_qemu_that_ends_while_its_move_is_prepared_leaves_nothing() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the lab needs root");
        return Ok(());
    }
    println!("{:#}", godwit_testbed::scenario::wires::ended("tended")?);
    Ok(())
}
