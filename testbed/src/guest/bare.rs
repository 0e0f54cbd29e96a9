//! The bare guest's ELF: compiled by the machine's C compiler from `guest/bare`, for 32-bit x86 without any library.
//!
//! Owns how it is compiled; what it does is in `guest/bare/bare.c`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::cache::{Cache, run};

const START: &str = include_str!("../../guest/bare/start.S");
const MAIN: &str = include_str!("../../guest/bare/bare.c");
const LAYOUT: &str = include_str!("../../guest/bare/bare.ld");
/// General registers only: nothing that a KVM without hardware underneath may not emulate.
const FLAGS: &str = "-m32 -march=i686 -mgeneral-regs-only -O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -no-pie \
     -fno-stack-protector -fno-strict-aliasing -fno-tree-loop-distribute-patterns -fcf-protection=none -nostdlib -static \
     -Wl,--build-id=none -Wl,--no-warn-rwx-segments -Wl,-T,bare.ld";

/// The PVH kernel for `-kernel`.
pub(super) fn elf(cache: &Cache) -> Result<PathBuf> {
    let sources = [("start.S", START), ("bare.c", MAIN), ("bare.ld", LAYOUT), ("flags", FLAGS)];
    let recipe: Vec<&[u8]> = sources.iter().map(|(_, text)| text.as_bytes()).collect();
    let dir = cache.get("bare", &recipe, |dir| {
        for (name, text) in sources {
            fs::write(dir.join(name), text)?;
        }
        run(Command::new("cc")
            .args(FLAGS.split_whitespace())
            .args(["-o", "bare.elf", "start.S", "bare.c"])
            .current_dir(dir))?;
        Ok(())
    })?;
    Ok(dir.join("bare.elf"))
}
