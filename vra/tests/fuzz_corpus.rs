//! Replays the fuzzer's corpus; see `fuzz/README.md`.

#[path = "../../fuzz/harness/wire_frame.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod wire_frame;

#[test]
fn wire_frame_corpus() {
    let folder = format!("{}/../fuzz/corpus/wire_frame", env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).expect("corpus") {
        let path = entry.expect("entry").path();
        eprintln!("{}", path.display());
        wire_frame::run(&std::fs::read(&path).expect("input"));
        count += 1;
    }
    assert!(count > 0, "{folder} is empty");
}
