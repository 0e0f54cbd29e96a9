//! A stream like QEMU's, made of pages that a test chooses.
#![allow(dead_code)]

pub const DEVICES: usize = 20_000;

/// A page record of the main block: content, or zeros.
pub type Record = (u32, Option<[u8; 4096]>);

/// The stream of a guest of `pages` pages: each element of `passes` becomes a PART section, the
/// last one the END section. A ROM page goes between every few records, so that CONTINUE changes
/// its meaning.
pub fn stream(pages: u32, passes: &[Vec<Record>]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0");
    out.extend_from_slice(b"\x08\0\x01\0\0");
    out.extend_from_slice(b"\x08\0\x02\0\x04\0\0\0\x01");
    out.extend_from_slice(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    let main = u64::from(pages) * 4096;
    out.extend_from_slice(&((main + 0x40000) | 0x004).to_be_bytes());
    for (name, bytes) in [("pc.ram", main), ("pc.bios", 0x40000)] {
        name_of(&mut out, name);
        out.extend_from_slice(&bytes.to_be_bytes());
    }
    footer(&mut out);
    let mut current = "";
    for (i, pass) in passes.iter().enumerate() {
        let last = i + 1 == passes.len();
        if last {
            out.extend_from_slice(b"\x08\0\x0b\0\0");
        }
        out.extend_from_slice(if last { b"\x03\0\0\0\x02" } else { b"\x02\0\0\0\x02" });
        for (n, (page, content)) in pass.iter().enumerate() {
            if n % 7 == 3 && n < 2000 {
                record(&mut out, &mut current, "pc.bios", (n as u32 % 64, Some(&[n as u8; 4096])));
            }
            record(&mut out, &mut current, "pc.ram", (*page, content.as_ref()));
        }
        out.extend_from_slice(&0x10_u64.to_be_bytes());
        footer_body(&mut out);
    }
    out.extend_from_slice(b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02");
    out.extend((0..DEVICES).map(|i| ((i * i) >> 3) as u8));
    out.extend_from_slice(b"\x00\x06\0\0\0\x0a{\"vm\": [] }");
    // The length above counts the braces' content: keep both in step.
    let at = out.len() - 11;
    out[at - 4..at].copy_from_slice(&11_u32.to_be_bytes());
    out
}

fn record(
    out: &mut Vec<u8>,
    current: &mut &str,
    block: &'static str,
    record: (u32, Option<&[u8; 4096]>),
) {
    let (page, content) = record;
    let again = if *current == block { 0x20 } else { 0 };
    let flag = if content.is_some() { 0x008 } else { 0x002 };
    out.extend_from_slice(&((u64::from(page) * 4096) | flag | again).to_be_bytes());
    if again == 0 {
        name_of(out, block);
        *current = block;
    }
    match content {
        Some(content) => out.extend_from_slice(content),
        None => out.push(0),
    }
}

fn name_of(out: &mut Vec<u8>, name: &str) {
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
}

fn footer(out: &mut Vec<u8>) {
    out.extend_from_slice(&0x10_u64.to_be_bytes());
    footer_body(out);
}

fn footer_body(out: &mut Vec<u8>) {
    out.extend_from_slice(b"\x7e\0\0\0\x02");
}

/// A page that compresses to about a half and depends on `seed`.
pub fn page(seed: u64) -> [u8; 4096] {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut content = [0; 4096];
    for (i, word) in content.chunks_exact_mut(8).enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = if i % 4 == 0 { state } else { seed };
        word.copy_from_slice(&value.to_le_bytes());
    }
    content
}
