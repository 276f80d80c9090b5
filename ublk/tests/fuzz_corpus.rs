//! Replays the fuzzers' corpora; see `fuzz/README.md`.

#[path = "../../fuzz/harness/nbd_handshake.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod nbd_handshake;
#[path = "../../fuzz/harness/nbd_transmission.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod nbd_transmission;
#[path = "../../fuzz/harness/replay.rs"]
#[allow(unreachable_pub, reason = "shared with the other crates' tests")]
mod replay;

use replay::replay;

#[test]
fn nbd_handshake_corpus() {
    replay("nbd_handshake", nbd_handshake::run);
}

#[test]
fn nbd_transmission_corpus() {
    replay("nbd_transmission", nbd_transmission::run);
}
