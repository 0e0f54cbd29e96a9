//! The initrd that starts every Linux guest of the lab, and the kernel under it.
//!
//! Owns what the two contain: the distribution's cloud kernel with the virtio modules that it does not have built in, a
//! static busybox, the guest agent with the shared objects it needs, and `guest/init`. Never starts a guest. Invariant: the
//! same parts give the same initrd, byte for byte.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::cache::{Cache, run};
use super::cpio::Cpio;

/// What the kernel image depends on; another value makes another image.
const KERNEL_RECIPE: &[u8] = b"1 linux-image-cloud-amd64 vmlinuz modules";
/// The package whose dependency is the newest cloud kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// Modules that guests need; what these depend on comes with them.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "virtio_net"];
/// The first program of a guest.
const INIT: &[u8] = include_bytes!("../../guest/init");
/// Names the agent's binary in the environment, for programs that do not lie beside it.
const AGENT_VARIABLE: &str = "GODWIT_GUEST_AGENT";
const AGENT: &str = "godwit-guest";

/// The directory with `vmlinuz`, `modules/*.ko` and `modules/order`.
pub(super) fn kernel(cache: &Cache) -> Result<PathBuf> {
    cache.get("kernel", &[KERNEL_RECIPE], |dir| {
        let depends = run(Command::new("apt-cache").args(["depends", KERNEL_PACKAGE]))?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .with_context(|| format!("apt knows no {KERNEL_PACKAGE}; run scripts/setup"))?;
        let unpacked = dir.join("unpacked");
        fs::create_dir(&unpacked)?;
        run(Command::new("apt-get")
            .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(&unpacked))
        .context("Cannot fetch the guests' kernel; is `apt-get update` recent?")?;
        let deb = single(&unpacked, "deb")?;
        run(Command::new("dpkg").arg("-x").arg(&deb).arg(&unpacked))?;
        let release = package.trim_start_matches("linux-image-");
        fs::rename(unpacked.join("boot").join(format!("vmlinuz-{release}")), dir.join("vmlinuz"))?;
        let drivers = unpacked.join("lib/modules").join(release).join("kernel");
        let target = dir.join("modules");
        fs::create_dir(&target)?;
        let mut order = Vec::new();
        for module in MODULES {
            copy_module(&drivers, &target, module, &mut order)?;
        }
        fs::write(target.join("order"), order.join("\n") + "\n")?;
        fs::remove_dir_all(&unpacked)?;
        Ok(())
    })
}

/// The initrd for that kernel. It boots to the agent, or to the system on the disk that `root=` names.
pub(super) fn initrd(cache: &Cache, kernel: &Path) -> Result<PathBuf> {
    let agent = agent_binary()?;
    let binary = fs::read(&agent).with_context(|| format!("Cannot read {}", agent.display()))?;
    let key = kernel.as_os_str().as_encoded_bytes();
    let dir = cache.get("initrd", &[b"1", key, INIT, &binary], |dir| {
        let mut cpio = Cpio::new();
        for name in ["bin", "dev", "proc", "sys", "run", "tmp", "newroot", "godwit", "modules"] {
            cpio.directory(name)?;
        }
        cpio.console()?;
        let busybox = find_program("busybox")?;
        ensure!(
            libraries(&busybox)?.is_empty(),
            "{} is not static; install busybox-static",
            busybox.display()
        );
        cpio.file("bin/busybox", 0o755, &fs::read(&busybox)?)?;
        cpio.file("init", 0o755, INIT)?;
        for entry in sorted(&kernel.join("modules"))? {
            let name = entry.file_name().unwrap_or_default().to_string_lossy();
            cpio.file(&format!("modules/{name}"), 0o644, &fs::read(&entry)?)?;
        }
        cpio.file("godwit/agent", 0o755, &stripped(&agent, dir)?)?;
        for library in libraries(&agent)? {
            let name = library.file_name().unwrap_or_default().to_string_lossy();
            let name = if name.starts_with("ld-") { "ld.so" } else { &*name };
            cpio.file(&format!("godwit/{name}"), 0o755, &fs::read(&library)?)?;
        }
        fs::write(dir.join("initrd"), cpio.finish()?)?;
        Ok(())
    })?;
    Ok(dir.join("initrd"))
}

/// The agent beside the running program, or beside the directory of a test program.
fn agent_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(AGENT_VARIABLE) {
        return Ok(PathBuf::from(path));
    }
    let program = std::env::current_exe()?;
    let found =
        program.ancestors().skip(1).take(2).map(|dir| dir.join(AGENT)).find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "No {AGENT} beside {}; run `cargo build` or set {AGENT_VARIABLE}",
            program.display()
        )
    })
}

/// Copies `module` and, before it, all that it depends on.
fn copy_module(from: &Path, to: &Path, module: &str, order: &mut Vec<String>) -> Result<()> {
    if order.iter().any(|known| known == module) {
        return Ok(());
    }
    let Some(path) = find_file(from, &format!("{module}.ko"))? else {
        bail!("The kernel has no module {module}");
    };
    let content = fs::read(&path)?;
    for needed in module_depends(&content) {
        copy_module(from, to, &needed, order)?;
    }
    fs::write(to.join(format!("{module}.ko")), &content)?;
    order.push(module.to_owned());
    Ok(())
}

/// What a module says in its `.modinfo` that it depends on.
fn module_depends(content: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = content.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = content[at + KEY.len()..].split(|b| *b == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The shared objects, loader included, that `ldd` names for `binary`; none for a static one.
fn libraries(binary: &Path) -> Result<BTreeSet<PathBuf>> {
    // ldd fails for a static binary, so its status says nothing.
    let output = Command::new("ldd").arg(binary).env("LC_ALL", "C").output();
    let output = output.context("Cannot start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(!text.contains("not found"), "{}: {text}", binary.display());
    let paths = text.lines().filter_map(|line| {
        let path = line.rsplit("=>").next()?.trim().split(" (").next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    });
    Ok(paths.collect())
}

/// The binary without symbols, or as it is where there is no `strip`: a smaller initrd boots sooner.
fn stripped(binary: &Path, dir: &Path) -> Result<Vec<u8>> {
    let small = dir.join("agent.stripped");
    let strip = run(Command::new("strip").arg("-o").arg(&small).arg(binary));
    let from = if strip.is_ok() { &small } else { binary };
    let content = fs::read(from)?;
    if small.exists() {
        fs::remove_file(&small)?;
    }
    Ok(content)
}

fn find_program(name: &str) -> Result<PathBuf> {
    ["/usr/bin", "/bin", "/usr/sbin", "/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.metadata().is_ok_and(|m| m.permissions().mode() & 0o111 != 0))
        .with_context(|| format!("No {name} on this machine; run scripts/setup"))
}

fn find_file(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    for path in sorted(dir)? {
        if path.is_dir() {
            if let Some(found) = find_file(&path, name)? {
                return Ok(Some(found));
            }
        } else if path.file_name().is_some_and(|file| file == name) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn single(dir: &Path, extension: &str) -> Result<PathBuf> {
    sorted(dir)?
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == extension))
        .with_context(|| format!("No .{extension} in {}", dir.display()))
}

fn sorted(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries: std::io::Result<Vec<_>> = fs::read_dir(dir)
        .with_context(|| format!("Cannot read {}", dir.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect();
    let mut paths = entries?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_dependencies_are_read_from_modinfo() {
        let content = b"junk\0license=GPL\0depends=virtio,virtio_ring\0name=virtio_blk\0";
        assert_eq!(module_depends(content), ["virtio", "virtio_ring"]);
        assert!(module_depends(b"\0depends=\0").is_empty());
        assert!(module_depends(b"").is_empty());
    }

    #[test]
    fn libraries_of_a_dynamic_program_include_its_loader() {
        let found = libraries(Path::new("/bin/sh")).unwrap();
        assert!(found.iter().any(|path| path.to_string_lossy().contains("/ld-")));
    }
}
