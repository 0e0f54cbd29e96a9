//! The corpus with real files: what is found, what is verified, what is bounded.

use super::*;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

const KEY: [u8; 32] = [7; 32];

fn page(n: u32) -> [u8; CHUNK_BYTES] {
    let mut page = [0_u8; CHUNK_BYTES];
    for (i, word) in page.chunks_exact_mut(4).enumerate() {
        word.copy_from_slice(&(n.wrapping_mul(2_654_435_761) ^ i as u32).to_le_bytes());
    }
    page
}

/// 40 MiB with data at both ends, across a segment's border, and a cut tail.
fn file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    for n in [0_u32, 1, 4095, 4096, 10_000, 10_001] {
        file.seek(SeekFrom::Start(u64::from(n) * 4096)).unwrap();
        file.write_all(&page(n)).unwrap();
    }
    file.write_all(b"less than a chunk").unwrap();
    file
}

fn reads(corpus: &Corpus, n: u32) -> bool {
    let mut out = [0_u8; CHUNK_BYTES];
    let got = corpus.read(&corpus.id_of(&page(n)), &mut out);
    if got {
        assert_eq!(out, page(n), "page {n}");
    }
    got
}

#[test]
fn indexes_data_and_skips_holes_and_tails() {
    let corpus = Corpus::new(KEY, 1000);
    let id = corpus.add_file(file()).unwrap();
    assert_eq!(corpus.size().0, 6);
    assert!([0, 1, 4095, 4096, 10_000, 10_001].iter().all(|n| reads(&corpus, *n)));
    assert!(!reads(&corpus, 2));
    assert!(!corpus.has(&corpus.id_of(&[0; CHUNK_BYTES])));
    corpus.remove(id);
    assert!(!reads(&corpus, 0));
    assert_eq!(corpus.size().0, 0);
}

#[test]
fn a_changed_page_is_never_given_out() {
    let file = Arc::new(file());
    let corpus = Corpus::new(KEY, 1000);
    let id = corpus.add_memory(Arc::clone(&file) as Arc<dyn ReadAt>).unwrap();
    assert!(!reads(&corpus, 1));
    assert_eq!(corpus.scan(id).unwrap(), 6);
    FileExt::write_all_at(&*file, &page(77), 4096).unwrap();
    assert!(corpus.has(&corpus.id_of(&page(1))));
    assert!(!reads(&corpus, 1));
    assert!(!reads(&corpus, 77));
    assert_eq!(corpus.scan(id).unwrap(), 6);
    assert!(reads(&corpus, 77));
    file.set_len(0).unwrap();
    assert!(!reads(&corpus, 77));
}

#[test]
fn a_second_source_stands_in_and_learned_chunks_are_found() {
    let corpus = Corpus::new(KEY, 1000);
    let first = Arc::new(file());
    let a = corpus.add_memory(Arc::clone(&first) as Arc<dyn ReadAt>).unwrap();
    corpus.scan(a).unwrap();
    corpus.add_file(file()).unwrap();
    FileExt::write_all_at(&*first, &page(500), 0).unwrap();
    assert!(reads(&corpus, 0), "from the second file");
    assert!(!reads(&corpus, 500));
    corpus.learn(a, &corpus.id_of(&page(500)), 0);
    assert!(reads(&corpus, 500));
    corpus.remove(a);
    assert!(!reads(&corpus, 500));
}

#[test]
fn the_index_is_bounded() {
    let corpus = Corpus::new(KEY, 8);
    corpus.add_file(file()).unwrap();
    assert!(matches!(corpus.add_file(file()), Err(CorpusError::Full { held: 6, limit: 8 })));
    assert_eq!(corpus.size().0, 6);
}

#[test]
fn another_swarms_key_gives_other_ids() {
    let ours = Corpus::new(KEY, 8);
    let theirs = Corpus::new([8; 32], 8);
    assert_ne!(ours.id_of(&page(1)), theirs.id_of(&page(1)));
}

/// 1 MiB, every page different, page 32..48 zero, one page of extent 3 zero.
fn extents() -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    for n in (0..256_u32).filter(|n| !(32..48).contains(n) && *n != 50) {
        FileExt::write_all_at(&file, &page(n), u64::from(n) * 4096).unwrap();
    }
    Arc::new(file)
}

fn extent_ids(corpus: &Corpus, extent: u32) -> [ChunkId; EXTENT_CHUNKS] {
    let zero = |n: u32| (32..48).contains(&n) || n == 50;
    std::array::from_fn(|i| match extent * 16 + i as u32 {
        n if zero(n) => corpus.id_of(&[0; CHUNK_BYTES]),
        n => corpus.id_of(&page(n)),
    })
}

#[test]
fn an_extent_is_read_whole_and_with_the_ids_of_its_chunks() {
    let file = extents();
    let corpus = Corpus::new(KEY, 1000);
    let source = corpus.add_memory(Arc::clone(&file) as Arc<dyn ReadAt>).unwrap();
    corpus.scan(source).unwrap();
    let mut into = [0_u8; EXTENT_BYTES];
    for extent in [0_u32, 1, 3, 15] {
        let ids = extent_ids(&corpus, extent);
        let id = corpus.key().extent_id(&ids);
        assert!(corpus.has_extent(&id));
        assert_eq!(corpus.read_extent(&id, &mut into), Some(ids), "extent {extent}");
        let mut whole = [0_u8; EXTENT_BYTES];
        FileExt::read_exact_at(&*file, &mut whole, u64::from(extent) << 16).unwrap();
        assert!(into == whole);
    }
    let zeros = corpus.key().extent_id(&extent_ids(&corpus, 2));
    assert!(!corpus.has_extent(&zeros), "an extent of zeros is no content");
    let id = corpus.key().extent_id(&extent_ids(&corpus, 15));
    file.write_all_at(b"x", 15 << 16).unwrap();
    assert!(corpus.has_extent(&id));
    assert_eq!(corpus.read_extent(&id, &mut into), None, "changed");
    file.set_len((15 << 16) + 5).unwrap();
    assert_eq!(corpus.read_extent(&id, &mut into), None, "cut");
    corpus.remove(source);
    assert!(!corpus.has_extent(&corpus.key().extent_id(&extent_ids(&corpus, 0))));
}

#[test]
fn a_copys_memory_is_one_source_until_it_is_forgotten() {
    let corpus = Corpus::new(KEY, 1000);
    let (memory, copy) = (extents(), CopyId([5; 16]));
    let index = || corpus.index_memory(copy, Arc::clone(&memory) as Arc<dyn ReadAt>).unwrap();
    assert_eq!(index(), 239);
    memory.set_len(16 * 4096).unwrap();
    assert_eq!(index(), 16);
    assert_eq!(corpus.size().0, 16);
    corpus.forget_memory(copy);
    assert_eq!(corpus.size().0, 0);
    assert_eq!(Arc::strong_count(&memory), 1);
}
