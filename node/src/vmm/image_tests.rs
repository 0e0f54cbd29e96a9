//! What images are taken, what is made, and what room is held, with the real `qemu-img`.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use godwit_protocol::id::{Mac, VmId};

use super::super::reserve::reserve;
use super::super::resolved::{FileRef, Resolution};
use super::super::spec::Accel;
use super::*;

fn qemu_img(dir: &Path, args: &str) {
    let mut command = Command::new("qemu-img");
    let status = command.current_dir(dir).args(args.split(' ')).status().unwrap();
    assert!(status.success(), "{args}");
}

fn spec(disks: &[(&Path, &str)]) -> Result<ResolvedSpec, Refusal> {
    let mut text = "name = \"a\"\nmemory = \"64M\"\n".to_owned();
    for (path, format) in disks {
        text += &format!("[[disk]]\npath = \"{}\"\nformat = \"{format}\"\n", path.display());
    }
    let with = Resolution {
        id: VmId([7; 16]),
        machine: "pc-q35-10.0".into(),
        accel: Accel::Tcg,
        mtu: 1400,
        macs: vec![Mac([0x52, 0x54, 0, 1, 2, 3])],
    };
    ResolvedSpec::resolve(&text.parse()?, with)
}

fn refusal(path: &Path, format: &str) -> String {
    let error = spec(&[(path, format)]).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn a_chain_is_found_and_named_by_content() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), "create -q -f raw root.img 1M");
    qemu_img(dir.path(), "create -q -f qcow2 -b root.img -F raw base.qcow2 2M");
    // Relative to where the image lies, not to where anybody stands.
    qemu_img(dir.path(), "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 4M");
    let spec = spec(&[(&dir.path().join("top.qcow2"), "qcow2")]).unwrap();
    let [disk] = &spec.disks[..] else { panic!("{:?}", spec.disks) };
    assert_eq!((disk.id.as_str(), disk.size), ("disk0", 4 << 20));
    assert!(disk.allocated >= 64 << 10 && disk.moves());
    let layers: Vec<_> = disk.backing.iter().map(|layer| (&*layer.path, layer.format)).collect();
    let [base, root] = ["base.qcow2", "root.img"].map(|name| dir.path().join(name));
    assert_eq!(layers, [(&*base, DiskFormat::Qcow2), (&*root, DiskFormat::Raw)]);
    assert_eq!(disk.backing[0].blake3, FileRef::hash(&base).unwrap().blake3);
    assert_eq!(disk.backing[0].bytes, std::fs::metadata(&base).unwrap().len());
    assert_eq!(ResolvedSpec::decode(&spec.encode().unwrap()).unwrap(), spec);
}

#[test]
fn what_cannot_be_a_disk_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    qemu_img(dir.path(), "create -q -f raw raw.img 1M");
    qemu_img(dir.path(), "create -q -f qcow2 a.qcow2 1M");
    assert!(refusal(&at("none.img"), "raw").starts_with("cannot read "));
    assert!(refusal(&at("raw.img"), "qcow2").contains("is no qcow2, the spec says qcow2"));
    assert!(refusal(&at("a.qcow2"), "raw").contains("is qcow2, the spec says raw"));
    std::fs::write(at("odd.img"), [1; 4097]).unwrap();
    let odd = refusal(&at("odd.img"), "raw");
    assert!(odd.contains("`qemu-img resize -f raw "), "{odd}");
    qemu_img(dir.path(), "create -q -f qcow2 -o data_file=data.raw data.qcow2 1M");
    assert!(refusal(&at("data.qcow2"), "qcow2").contains("keeps its data in another file"));
    qemu_img(
        dir.path(),
        "create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s \
         enc.qcow2 1M",
    );
    assert!(refusal(&at("enc.qcow2"), "qcow2").contains("is encrypted"));
    qemu_img(dir.path(), "create -q -f vmdk base.vmdk 1M");
    qemu_img(dir.path(), "create -q -f qcow2 -b base.vmdk -F vmdk on-vmdk.qcow2 1M");
    assert!(refusal(&at("on-vmdk.qcow2"), "qcow2").contains("format vmdk is not raw or qcow2"));
    qemu_img(dir.path(), "snapshot -c one a.qcow2");
    assert!(refusal(&at("a.qcow2"), "qcow2").contains("internal snapshots"));
}

#[test]
fn a_disk_with_lies_does_not_decode() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), "create -q -f qcow2 a.qcow2 1M");
    let good = spec(&[(&dir.path().join("a.qcow2"), "qcow2")]).unwrap();
    let layer = |path: &str| {
        let (path, format) = (PathBuf::from(path), DiskFormat::Raw);
        Backing { path, format, blake3: [0; 32], bytes: 1 }
    };
    let lies: [&dyn Fn(&mut ResolvedDisk); 7] = [
        &|disk| disk.id = "disk1".into(),
        &|disk| disk.path = "../etc/passwd".into(),
        &|disk| disk.size = 0,
        &|disk| disk.size = u64::MAX - 4095,
        &|disk| disk.backing = vec![layer("/a"); MAX_BACKING + 1],
        &|disk| disk.backing = vec![layer("/a"); 2],
        &|disk| disk.backing = vec![layer("a")],
    ];
    for (index, lie) in lies.iter().enumerate() {
        let mut spec = good.clone();
        lie(&mut spec.disks[0]);
        assert!(ResolvedSpec::decode(&spec.encode().unwrap()).is_err(), "lie {index}");
    }
    let mut flash = good;
    flash.firmware = Some(FileRef { path: "/fw".into(), blake3: [0; 32] });
    assert!(flash.check().is_err(), "the last disk is not the firmware's");
}

#[test]
fn a_copy_gets_images_of_its_own() {
    let [from, to] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    qemu_img(from.path(), "create -q -f raw a.img 1M");
    qemu_img(from.path(), "create -q -f qcow2 base.qcow2 2M");
    qemu_img(from.path(), "create -q -f qcow2 -b base.qcow2 -F qcow2 b.qcow2 2M");
    let base = to.path().join("other-name");
    std::fs::copy(from.path().join("base.qcow2"), &base).unwrap();
    let paths = ["a.img", "b.qcow2"].map(|name| from.path().join(name));
    let source = spec(&[(&paths[0], "raw"), (&paths[1], "qcow2")]).unwrap();
    let copy = CopyId([3; 16]);
    let missing = source.place(to.path(), copy, |_| None).unwrap_err().to_string();
    assert!(missing.starts_with("base base.qcow2 of disk1 is not in this host's image library"));
    let placed = source.place(to.path(), copy, |_| Some(base.clone())).unwrap();
    create(&placed).unwrap();
    let made = spec(&[(&placed.disks[0].path, "raw"), (&placed.disks[1].path, "qcow2")]).unwrap();
    for (made, disk) in made.disks.iter().zip(&placed.disks) {
        assert!(disk.path.starts_with(to.path()));
        assert_eq!((made.size, &made.backing), (disk.size, &disk.backing));
        assert_eq!(disk.path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    let again = create(&placed).unwrap_err().to_string();
    assert!(again.contains("exists"), "an image that is there is never touched: {again}");
    assert!(placed.disks[0].path.exists());
    let disk = &placed.disks[0];
    let others = crate::vmm::ResolvedDisk { path: to.path().join("web.qcow2"), ..disk.clone() };
    assert!(crate::vmm::is_image_of(to.path(), placed.id, disk), "of whichever copy");
    assert!(!crate::vmm::is_image_of(to.path(), VmId([8; 16]), disk));
    assert!(!crate::vmm::is_image_of(from.path(), placed.id, disk));
    assert!(!crate::vmm::is_image_of(to.path(), placed.id, &others), "an operator's");
    remove(&placed, to.path(), copy).unwrap();
    remove(&placed, to.path(), copy).unwrap();
    assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 1, "the base alone");
    remove(&source, from.path(), copy).unwrap();
    assert!(paths.iter().all(|path| path.exists()), "nothing of the source is named so");
    // The second cannot be made: the first is taken back.
    std::fs::remove_file(&base).unwrap();
    assert!(create(&placed).is_err());
    assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0);
}

#[test]
fn room_is_held_given_back_and_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.img");
    std::fs::write(&image, vec![7; 40 << 20]).unwrap();
    let source = spec(&[(&image, "raw")]).unwrap();
    let mut placed = source.place(dir.path(), CopyId([3; 16]), |_| None).unwrap();
    let mut held = reserve(&placed, dir.path()).unwrap();
    let file = reserve_path(&placed.disks[0].path);
    let need = placed.disks[0].allocated / 20 * 21;
    assert_eq!((held[0].disk.as_str(), held[0].held()), ("disk0", need));
    assert!(file.metadata().unwrap().blocks() * 512 >= need);
    held[0].shrink(20 << 20).unwrap();
    assert_eq!(held[0].held(), 32 << 20);
    held[0].shrink(0).unwrap();
    assert_eq!(held[0].held(), 32 << 20, "what was given back is not taken again");
    held[0].shrink(u64::MAX).unwrap();
    assert_eq!(file.metadata().unwrap().blocks(), 0);
    drop(held);
    assert!(!file.exists());
    // A share of the file system stays free, whatever is asked for.
    let stat = nix::sys::statvfs::statvfs(dir.path()).unwrap();
    let free = stat.blocks_available() * stat.fragment_size();
    placed.disks[0].allocated = free / 21 * 20 - (64 << 20);
    assert!(matches!(reserve(&placed, dir.path()), Err(Refusal::Space { .. })));
    placed.disks[0].allocated = 1 << 45;
    let refused = reserve(&placed, dir.path()).unwrap_err().to_string();
    assert!(refused.starts_with("no space: the VM's disks need 35232154 MiB, "), "{refused}");
    assert!(!file.exists());
}
