//! What travels keeps its bounds, and what cannot move says why.

use super::*;

fn resolution() -> Resolution {
    Resolution {
        id: VmId([7; 16]),
        machine: "pc-q35-10.0".into(),
        accel: Accel::Tcg,
        mtu: 1400,
        macs: vec![Mac([0x52, 0x54, 0, 1, 2, 3]); 2],
    }
}

fn resolve(text: &str) -> Result<ResolvedSpec, Refusal> {
    ResolvedSpec::resolve(&text.parse()?, resolution())
}

#[test]
fn what_is_left_open_is_settled() {
    let spec = resolve("name = \"a\"\nmemory = \"64M\"\n[[nic]]\nwire = \"lan\"").unwrap();
    assert_eq!((spec.machine.as_str(), spec.cpu.as_str()), ("pc-q35-10.0", BASELINE_CPU));
    assert_eq!(spec.nics[0].mac.colons(), "52:54:00:01:02:03");
    assert_eq!(ResolvedSpec::decode(&spec.encode().unwrap()).unwrap(), spec);
    assert_eq!(
        serde_json::from_str::<ResolvedSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(),
        spec
    );
}

#[test]
fn two_nics_never_share_an_address() {
    let nic = "\n[[nic]]\nwire = \"lan\"";
    let error = resolve(&format!("name = \"a\"\nmemory = \"64M\"{nic}{nic}")).unwrap_err();
    assert_eq!(error.to_string(), "spec key `nic.mac`: two NICs have the same address");
}

#[test]
fn what_holds_a_vm_is_named() {
    let mut spec =
        resolve("name = \"a\"\nmemory = \"64M\"\n[[hostdev]]\naddress = \"0000:3b:00.0\"").unwrap();
    let error = spec.check_movable().unwrap_err().to_string();
    assert!(error.contains("passthrough device 0000:3b:00.0"), "{error}");
    spec.hostdevs.clear();
    spec.check_movable().unwrap();
}

#[test]
fn garbage_and_lies_do_not_decode() {
    let mut spec = resolve("name = \"a\"\nmemory = \"64M\"").unwrap();
    let good = spec.encode().unwrap();
    for len in 0..good.len() {
        assert!(ResolvedSpec::decode(&good[..len]).is_err());
    }
    assert!(ResolvedSpec::decode(&[good.clone(), vec![0]].concat()).is_err());
    spec.machine = "pc-q35-10.0,accel=kvm,foo=bar".into();
    assert!(ResolvedSpec::decode(&spec.encode().unwrap()).is_err());
    // A length of 2^63 in place of the name's: refused before anything is allocated.
    let mut lie = good;
    lie.splice(16..17, [0xfd, 0, 0, 0, 0, 0, 0, 0, 0x80]);
    assert!(ResolvedSpec::decode(&lie).is_err());
}

#[test]
fn files_are_compared_by_content() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, b"one").unwrap();
    let text = format!("name = \"a\"\nmemory = \"64M\"\nkernel = \"{}\"", kernel.display());
    let spec = resolve(&text).unwrap();
    spec.check_files().unwrap();
    std::fs::write(&kernel, b"two").unwrap();
    assert!(matches!(spec.check_files(), Err(Refusal::FileDiffers(_))));
    std::fs::remove_file(&kernel).unwrap();
    assert!(matches!(spec.check_files(), Err(Refusal::File { .. })));
}
