//! The Debian guest's disk: a small real system with ordinary services, as an ext4 image.
//!
//! Owns what the system contains. Never starts it. Invariant: the image stays as it was built ("pristine"); every VM
//! gets a copy. The kernel, its modules and the agent are not in it: they come with the initrd.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::cache::{Cache, run};

/// The release that guests run.
const SUITE: &str = "bookworm";
/// What is installed beside the base system: an ordinary small server.
const PACKAGES: &str = "systemd-sysv,udev,dbus,procps,iproute2,ca-certificates,openssl,perl,python3,nginx-light,redis-server";
/// Size of the image; the file is sparse.
const IMAGE_SIZE: &str = "1G";
/// Changes when the code below changes what it builds.
const VERSION: &[u8] = b"1";

const AGENT_UNIT: &str = "\
[Unit]
Description=Guest agent of the lab
After=godwit-warm.service redis-server.service nginx.service

[Service]
ExecStart=/run/godwit/ld.so --library-path /run/godwit /run/godwit/agent
Restart=no
StandardOutput=journal+console

[Install]
WantedBy=multi-user.target
";

/// A server that has been up for a while has read its programs and libraries; one that has just booted has not.
const WARM_UNIT: &str = "\
[Unit]
Description=Read the programs and libraries of this system once
After=local-fs.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'find /usr/bin /usr/sbin /usr/lib -xdev -type f -print0 | sort -z | xargs -0 cat >/dev/null'

[Install]
WantedBy=multi-user.target
";

/// Units that would only cost boot time or write at odd moments while a benchmark runs.
const MASKED: [&str; 10] = [
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "systemd-timesyncd.service",
    "systemd-networkd-wait-online.service",
];

/// The pristine raw ext4 image.
pub(super) fn image(cache: &Cache) -> Result<PathBuf> {
    build(cache, "debian", PACKAGES, &[], |_| Ok(()))
}

/// An image of that name with these packages, to which `finish` adds what else it is for; `parts` is all
/// that this depends on.
pub(super) fn build(
    cache: &Cache,
    name: &str,
    packages: &str,
    parts: &[&[u8]],
    finish: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let masked = MASKED.join(" ");
    let common: [&[u8]; 7] = [
        VERSION,
        SUITE.as_bytes(),
        packages.as_bytes(),
        IMAGE_SIZE.as_bytes(),
        AGENT_UNIT.as_bytes(),
        WARM_UNIT.as_bytes(),
        masked.as_bytes(),
    ];
    let recipe: Vec<&[u8]> = common.iter().chain(parts).copied().collect();
    let dir = cache.get(name, &recipe, |dir| {
        let root = dir.join("root");
        run(Command::new("mmdebstrap")
            .args(["--mode=root", "--variant=minbase"])
            .arg("--aptopt=Acquire::Languages \"none\"")
            .arg(format!("--include={packages}"))
            .arg(SUITE)
            .arg(&root)
            .arg(mirror()?))?;
        configure(&root)?;
        finish(&root)?;
        let image = dir.join("root.img");
        run(Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "godwit"])
            .arg("-d")
            .arg(&root)
            .arg(&image)
            .arg(IMAGE_SIZE))?;
        fs::remove_dir_all(&root)?;
        Ok(())
    })?;
    Ok(dir.join("root.img"))
}

/// The mirror of the main archive that this machine's apt uses.
fn mirror() -> Result<String> {
    let targets = run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(RELEASE)|$(COMPONENT)|$(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    mirror_of(&targets).with_context(|| {
        format!("This machine's apt has no source for {SUITE} main; add one and run scripts/setup")
    })
}

fn mirror_of(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let uri = line.strip_prefix(SUITE)?.strip_prefix("|main|")?;
        Some(uri.to_owned())
    })
}

fn configure(root: &Path) -> Result<()> {
    let write = |path: &str, content: &str| {
        fs::write(root.join(path), content).with_context(|| format!("Cannot write {path}"))
    };
    write("etc/hostname", "guest\n")?;
    write("etc/hosts", "127.0.0.1 localhost guest\n")?;
    write("etc/fstab", "/dev/vda / ext4 defaults 0 0\n")?;
    // An id of its own for every boot, made in memory.
    write("etc/machine-id", "")?;
    let units = root.join("etc/systemd/system");
    let wanted = units.join("multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    for (name, unit) in [("godwit-guest.service", AGENT_UNIT), ("godwit-warm.service", WARM_UNIT)] {
        fs::write(units.join(name), unit)?;
        symlink(format!("../{name}"), wanted.join(name))?;
    }
    for name in MASKED {
        let path = units.join(name);
        if path.symlink_metadata().is_ok() {
            fs::remove_file(&path)?;
        }
        symlink("/dev/null", &path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_of_the_main_archive() {
        let targets = "bookworm-backports|main|http://a/\nbookworm|contrib|http://b/\n\
                       bookworm|main|http://c/debian/\nbookworm|main|http://d/\n";
        assert_eq!(mirror_of(targets).as_deref(), Some("http://c/debian/"));
        assert_eq!(mirror_of("trixie|main|http://a/\n"), None);
    }
}
