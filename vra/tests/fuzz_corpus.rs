//! Replays the fuzzers' corpora; see `fuzz/README.md`.

#[path = "../../fuzz/harness/replay.rs"]
#[allow(unreachable_pub, reason = "shared with the other crates' tests")]
mod replay;
#[path = "../../fuzz/harness/view_scratch.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod view_scratch;
#[path = "../../fuzz/harness/wire_frame.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod wire_frame;

#[test]
fn view_scratch_corpus() {
    replay::replay("view_scratch", view_scratch::run);
}

#[test]
fn wire_frame_corpus() {
    replay::replay("wire_frame", wire_frame::run);
}
