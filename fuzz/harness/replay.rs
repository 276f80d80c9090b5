//! For the tests that replay a target's corpus.

pub fn replay(target: &str, run: fn(&[u8])) {
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
