//! An older QEMU, unpacked beside the installed one: a host of the lab that lacks what a move needs.
//!
//! Owns the fetching of the distribution's own packages and the program that starts it. Installs nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::cache::{Cache, run};

/// Versions from this one on have switchover-ack, which the lab's older host is to lack.
const NEW: [u32; 2] = [8, 1];
/// Built from one source in one version.
const PARTS: [&str; 3] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data"];
/// Everything below `tree` is found from the program's own place: the cache renames the directory.
const PROGRAM: &str = "#!/bin/sh\ndir=$(dirname \"$(readlink -f \"$0\")\")\n\
    exec \"$dir/tree/usr/bin/qemu-system-x86_64\" -L \"$dir/tree/usr/share/qemu\" \
    -L \"$dir/tree/usr/share/seabios\" \"$@\"\n";

/// The program that starts the newest QEMU before 8.1 that this machine's package sources offer.
///
/// # Errors
/// If they offer none, or it cannot be fetched.
pub fn old_qemu(cache: &Cache) -> Result<PathBuf> {
    let mut wanted = Vec::new();
    for part in PARTS {
        let offered = run(Command::new("apt-cache").args(["madison", part]))?;
        let version = newest_old(&offered)
            .with_context(|| format!("no package source has a {part} before 8.1"))?;
        wanted.push(format!("{part}={version}"));
    }
    wanted.push("seabios".to_owned());
    let recipe = wanted.join(" ");
    let dir = cache.get("old-qemu", &[recipe.as_bytes(), PROGRAM.as_bytes()], |dir| {
        let mut fetch = Command::new("apt-get");
        fetch.args(["-q", "download"]).args(&wanted).current_dir(dir);
        run(&mut fetch).context("fetching an older QEMU")?;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                run(Command::new("dpkg").arg("-x").arg(&path).arg(dir.join("tree")))?;
                fs::remove_file(path)?;
            }
        }
        let program = dir.join("qemu");
        fs::write(&program, PROGRAM)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        run(Command::new(&program).arg("--version")).context("the older QEMU does not run")?;
        Ok(())
    })?;
    Ok(dir.join("qemu"))
}

/// The first version below [`NEW`] in what `apt-cache madison` prints, which is ordered newest first.
fn newest_old(madison: &str) -> Option<String> {
    madison.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim).find_map(|version| {
        let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
        let mut parts = upstream.split(['.', '+', '-', '~']).map_while(|p| p.parse::<u32>().ok());
        let number = [parts.next()?, parts.next()?];
        (number < NEW).then(|| version.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::newest_old;

    #[test]
    fn the_newest_of_the_old_is_taken() {
        let offered = "qemu-system-x86 | 1:10.0.2+ds-2~bpo12+1 | http://x y\n\
            qemu-system-x86 | 1:7.2+dfsg-7+deb12u18 | http://x y\n\
            qemu-system-x86 | 1:7.2+dfsg-7+deb12u15 | http://x y\n";
        assert_eq!(newest_old(offered).unwrap(), "1:7.2+dfsg-7+deb12u18");
        assert_eq!(newest_old("qemu-system-x86 | 1:8.2.1+ds-1 | x"), None);
        assert_eq!(newest_old(""), None);
    }
}
