#![no_main]

#[path = "../harness/view_scratch.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::run(data));
