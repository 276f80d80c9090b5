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
#[path = "../../fuzz/harness/vcenter_soap.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz target")]
mod vcenter_soap;

#[test]
fn libvirt_domain_corpus() {
    replay::replay("libvirt_domain", libvirt_domain::run);
}

#[test]
fn libvirt_message_corpus() {
    replay::replay("libvirt_message", libvirt_message::run);
}

#[test]
fn vcenter_soap_corpus() {
    replay::replay("vcenter_soap", vcenter_soap::run);
}
