//! Replays the fuzzer's corpus; see `fuzz/README.md`.

#[path = "../../fuzz/harness/replay.rs"]
#[allow(unreachable_pub, reason = "shared with the other crates' tests")]
mod replay;
#[path = "../../fuzz/harness/wire_frame.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod wire_frame;

#[test]
fn wire_frame_corpus() {
    replay::replay("wire_frame", wire_frame::run);
}
