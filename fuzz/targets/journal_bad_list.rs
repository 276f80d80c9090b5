#![no_main]

#[path = "../harness/journal_bad_list.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::run(data));
