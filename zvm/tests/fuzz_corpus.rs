//! Replays the fuzzers' corpora; see `fuzz/README.md`.

#[path = "../../fuzz/harness/replay.rs"]
#[allow(unreachable_pub, reason = "shared with the other crates' tests")]
mod replay;
#[path = "../../fuzz/harness/vcenter_soap.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod vcenter_soap;

#[test]
fn vcenter_soap_corpus() {
    replay::replay("vcenter_soap", vcenter_soap::run);
}
