//! The MPI guest's disk: Debian with Open MPI, the lab's job, and a way to start it from another guest.
//!
//! Owns what is added to Debian; what the job does is in `guest/mpi/ring.c`.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::cache::{Cache, run};
use super::debian;

const PACKAGES: &str = "systemd-sysv,udev,dbus,procps,iproute2,ca-certificates,python3,openmpi-bin";
const RING: &str = include_str!("../../guest/mpi/ring.c");
const RSH: &str = include_str!("../../guest/mpi/rsh");
const RSHD: &str = include_str!("../../guest/mpi/rshd");
/// The package with the headers; nothing else of it is needed.
const HEADERS: &str = "libopenmpi-dev";
const UNIT: &str = "\
[Unit]
Description=Runs what the other guests of a job ask for

[Service]
ExecStart=/usr/local/bin/rshd

[Install]
WantedBy=multi-user.target
";

/// The pristine raw ext4 image.
pub(super) fn image(cache: &Cache) -> Result<PathBuf> {
    let parts = [RING, RSH, RSHD, UNIT].map(str::as_bytes);
    debian::build(cache, "mpi", PACKAGES, &parts, |root| {
        let bin = root.join("usr/local/bin");
        for (name, text) in [("rsh", RSH), ("rshd", RSHD)] {
            fs::write(bin.join(name), text)?;
            fs::set_permissions(bin.join(name), Permissions::from_mode(0o755))?;
        }
        let units = root.join("etc/systemd/system");
        fs::write(units.join("rshd.service"), UNIT)?;
        symlink("../rshd.service", units.join("multi-user.target.wants/rshd.service"))?;
        compile(root, &bin.join("ring"))
    })
}

/// Compiles the job on this machine, against the guest's libraries.
fn compile(root: &Path, to: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    run(Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", HEADERS])
        .current_dir(work.path()))
    .with_context(|| format!("Cannot fetch {HEADERS}; is `apt-get update` recent?"))?;
    let deb = fs::read_dir(work.path())?.next().context("apt-get left nothing")??.path();
    run(Command::new("dpkg").arg("-x").arg(&deb).arg(work.path()))?;
    fs::write(work.path().join("ring.c"), RING)?;
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let headers = work.path().join("usr/lib/x86_64-linux-gnu/openmpi/include");
    run(Command::new("cc")
        .args(["-O2", "-Wall", "-Werror", "ring.c", "-o"])
        .arg(to)
        .arg("-I")
        .arg(headers)
        .arg("-L")
        .arg(libraries)
        .args(["-l:libmpi.so.40", "-Wl,--allow-shlib-undefined"])
        .current_dir(work.path()))?;
    Ok(())
}
