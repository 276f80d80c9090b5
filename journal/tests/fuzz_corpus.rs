//! Replays the fuzzers' corpora; see `fuzz/README.md`.

#[path = "../../fuzz/harness/journal_bad_list.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_bad_list;
#[path = "../../fuzz/harness/journal_batch.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_batch;
#[path = "../../fuzz/harness/journal_footer.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_footer;
#[path = "../../fuzz/harness/journal_manifest.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_manifest;
#[path = "../../fuzz/harness/journal_segment.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_segment;
#[path = "../../fuzz/harness/journal_superblock.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod journal_superblock;
#[path = "../../fuzz/harness/replay.rs"]
#[allow(unreachable_pub, reason = "shared with the other crates' tests")]
mod replay;

use replay::replay;

#[test]
fn journal_bad_list_corpus() {
    replay("journal_bad_list", journal_bad_list::run);
}

#[test]
fn journal_batch_corpus() {
    replay("journal_batch", journal_batch::run);
}

#[test]
fn journal_footer_corpus() {
    replay("journal_footer", journal_footer::run);
}

#[test]
fn journal_manifest_corpus() {
    replay("journal_manifest", journal_manifest::run);
}

#[test]
fn journal_segment_corpus() {
    replay("journal_segment", journal_segment::run);
}

#[test]
fn journal_superblock_corpus() {
    replay("journal_superblock", journal_superblock::run);
}
