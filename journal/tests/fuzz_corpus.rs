//! Replays the fuzzers' corpora; see `fuzz/README.md`.

#[path = "../../fuzz/harness/journal_batch.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_batch;
#[path = "../../fuzz/harness/journal_segment.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_segment;
#[path = "../../fuzz/harness/journal_superblock.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_superblock;

fn replay(target: &str, run: fn(&[u8])) {
    let folder = format!("{}/../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).expect("corpus") {
        let path = entry.expect("entry").path();
        eprintln!("{}", path.display());
        run(&std::fs::read(&path).expect("input"));
        count += 1;
    }
    assert!(count > 0, "{folder} is empty");
}

#[test]
fn journal_batch_corpus() {
    replay("journal_batch", journal_batch::run);
}

#[test]
fn journal_segment_corpus() {
    replay("journal_segment", journal_segment::run);
}

#[test]
fn journal_superblock_corpus() {
    replay("journal_superblock", journal_superblock::run);
}
