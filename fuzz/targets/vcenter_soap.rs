#![no_main]

#[path = "../harness/vcenter_soap.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::run(data));
