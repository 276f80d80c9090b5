//! Replays the fuzzers' corpora; see `fuzz/README.md`.

#[path = "../../fuzz/harness/nbd_handshake.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod nbd_handshake;
#[path = "../../fuzz/harness/nbd_transmission.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod nbd_transmission;

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
fn nbd_handshake_corpus() {
    replay("nbd_handshake", nbd_handshake::run);
}

#[test]
fn nbd_transmission_corpus() {
    replay("nbd_transmission", nbd_transmission::run);
}
