//! Measures the store: `cargo test --release --test store_speed -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::Write;
use std::time::Instant;

use godwit::store::{Corpus, Hard};
use godwit_protocol::limits::CHUNK_BYTES;

#[test]
#[ignore = "a measurement: prints figures, asserts only that they are of this world"]
fn figures() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut file = std::io::BufWriter::new(File::create(&path).unwrap());
    let pages = 262_144_u32;
    let mut chunk = [0_u8; CHUNK_BYTES];
    for n in 0..pages {
        let mut x = u64::from(n) + 1;
        for word in chunk.chunks_exact_mut(8) {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&x.to_le_bytes());
        }
        file.write_all(&chunk).unwrap();
    }
    drop(file);
    let corpus = Corpus::new([1; 32], 1 << 24);
    let begun = Instant::now();
    corpus.add_file(File::open(&path).unwrap()).unwrap();
    let index_s = begun.elapsed().as_secs_f64();
    let (held, bytes) = corpus.size();
    println!("index of 1 GiB: {index_s:.2} s, {held} pages, {:.2} MB", bytes as f64 / 1e6);

    let last = corpus.id_of(&chunk);
    let mut out = [0_u8; CHUNK_BYTES];
    let begun = Instant::now();
    let reads = 200_000;
    assert!((0..reads).all(|_| corpus.read(&last, &mut out)));
    println!("read and verify: {:.2} us", begun.elapsed().as_secs_f64() * 1e6 / f64::from(reads));
    let begun = Instant::now();
    let misses = (0..1_000_000_u32).filter(|n| {
        let mut id = last;
        id.0[..4].copy_from_slice(&n.wrapping_mul(2_654_435_761).to_le_bytes());
        corpus.has(&id)
    });
    let misses = misses.count();
    println!("look-up: {:.3} us ({misses} found)", begun.elapsed().as_secs_f64());

    let hard = Hard::open(dir.path()).unwrap();
    let begun = Instant::now();
    for n in 0..200_u32 {
        hard.put_many(&[(b"vote", Some(&n.to_le_bytes()))]).unwrap();
    }
    println!("durable put: {:.2} ms", begun.elapsed().as_secs_f64() * 1e3 / 200.0);
    assert_eq!(held, pages as usize);
}
