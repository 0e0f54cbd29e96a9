//! What a spec accepts, and what its refusals say.

use super::*;

const FULL: &str = r#"
name = "web-1"
memory = "512M"
vcpus = 2
machine = "pc-q35-10.0"
cpu = "Nehalem-v1,+aes"
accel = "tcg"
kernel = "/boot/vmlinuz"
initrd = "/boot/initrd"
cmdline = "console=ttyS0"
serial1 = true
[[disk]]
path = "/srv/web.img"
format = "raw"
shared = true
discard = false
[nvram]
code = "/srv/code.fd"
vars = "/srv/vars.fd"
[[nic]]
wire = "lan"
mac = "52:54:00:12:34:56"
mtu = 1400
[[hostdev]]
address = "0000:3b:00.0"
"#;

#[test]
fn a_full_spec_is_read() {
    let spec: VmSpec = FULL.parse().unwrap();
    assert_eq!(spec.memory_bytes().unwrap(), 512 << 20);
    assert_eq!((spec.vcpus, spec.accel, spec.serial1), (2, AccelChoice::Tcg, true));
    let small: VmSpec = "name = \"a\"\nmemory = \"16M\"".parse().unwrap();
    assert_eq!((small.vcpus, small.accel), (1, AccelChoice::Auto));
    let disk = "name = \"a\"\nmemory = \"16M\"\n[[disk]]\npath = \"/a\"\nformat = \"qcow2\"";
    let disk = disk.parse::<VmSpec>().unwrap().disk.remove(0);
    assert_eq!((disk.shared, disk.readonly, disk.discard), (false, false, true));
}

#[test]
fn refusals_are_one_line_that_names_the_key() {
    let cases = [
        ("memory = \"512M\"", "memroy = \"512M\"", "spec line 3: unknown field `memroy`"),
        ("vcpus = 2", "vcpus = \"2\"", "spec line 4: invalid type"),
        ("\"512M\"", "\"512\"", "spec key `memory`: `512` is not a size"),
        ("\"512M\"", "\"99999999T\"", "spec key `memory`"),
        ("\"512M\"", "\"15M\"", "spec key `memory`: must be a whole number"),
        ("\"512M\"", "\"é\"", "spec key `memory`"),
        ("vcpus = 2", "vcpus = 0", "spec key `vcpus`: must be 1 to 255"),
        ("web-1", "Web", "spec key `name`"),
        ("pc-q35-10.0", "q35", "spec key `machine`"),
        ("pc-q35-10.0", "pc-q35-10.0,foo=bar", "spec key `machine`"),
        ("Nehalem-v1,+aes", "x y", "spec key `cpu`"),
        ("kernel = \"/boot/vmlinuz\"", "", "spec key `initrd`: needs `kernel`"),
        ("/boot/initrd", "boot/initrd", "spec key `initrd`: must be an absolute path"),
        ("path = \"/srv", "path = \"srv", "spec key `disk.path`: must be an absolute path"),
        ("discard = false", "discard = 0", "spec line 16: invalid type"),
        ("vars = \"/srv", "vars = \"srv", "spec key `nvram.vars`: must be an absolute path"),
        ("shared = true", "shred = true", "spec line 15: unknown field `shred`"),
        ("raw", "vmdk", "spec line 14: unknown variant `vmdk`"),
        ("52:54", "53:54", "spec key `nic.mac`"),
        ("52:54:00", "52:54", "spec key `nic.mac`"),
        ("mtu = 1400", "mtu = 68", "spec key `nic.mtu`"),
        ("0000:3b:00.0", "3b:00.0", "spec key `hostdev.address`"),
        ("\"lan\"", "\"l,an\"", "spec key `nic.wire`"),
    ];
    for (from, to, expected) in cases {
        assert!(FULL.contains(from), "{from}");
        let error = FULL.replace(from, to).parse::<VmSpec>().unwrap_err().to_string();
        assert!(error.starts_with(expected), "{to}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
