//! Replays the fuzzers' corpora; see `fuzz/README.md`.

#[path = "../../fuzz/harness/libvirt_domain.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod libvirt_domain;
#[path = "../../fuzz/harness/libvirt_message.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod libvirt_message;
#[path = "../../fuzz/harness/replay.rs"]
#[allow(unreachable_pub, reason = "shared with the other crates' tests")]
mod replay;

#[test]
fn libvirt_domain_corpus() {
    replay::replay("libvirt_domain", libvirt_domain::run);
}

#[test]
fn libvirt_message_corpus() {
    replay::replay("libvirt_message", libvirt_message::run);
}
