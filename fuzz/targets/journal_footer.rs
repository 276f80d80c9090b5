#![no_main]

#[path = "../harness/journal_footer.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::run(data));
