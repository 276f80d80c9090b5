//! The built `vra-journal` on a VM's folder as version 1 wrote it, with a locked checkpoint that is older than the history
//! (`journal/tests/fixtures/v1/locked`, which `vra/src/view/fixture_tests.rs` has made).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const FILES: [&str; 3] = ["journal.hfj", "disk-0.raw", "lock-8-0.raw"];

struct Unpacked(PathBuf);

impl Unpacked {
    fn new() -> Self {
        let packed = packed();
        let folder = std::env::temp_dir().join(format!("holdfast-fixture-locked-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        for file in FILES {
            let mut gzip = Command::new("gzip");
            gzip.arg("-dc").stdin(File::open(packed.join(format!("{file}.gz"))).expect("the fixture"));
            gzip.stdout(Stdio::from(File::create(folder.join(file)).expect("a file")));
            assert!(gzip.status().expect("gzip").success(), "{file}");
        }
        Self(folder)
    }

    fn extract(&self, at: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vra-journal"));
        command.arg("extract").arg(&self.0).args(["--at", at, "--out"]).arg(self.0.join("out"));
        command.args(["--quiet", "--force"]).output().expect("started")
    }

    fn verify(&self) -> bool {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vra-journal"));
        command.arg("verify").arg(&self.0).output().expect("started").status.success()
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn packed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../journal/tests/fixtures/v1/locked")
}

/// The only image below a folder, or the file itself.
fn image(path: &Path) -> Vec<u8> {
    if path.is_file() {
        return fs::read(path).expect("an image");
    }
    let mut entries = fs::read_dir(path).expect("a folder").map(|entry| entry.expect("an entry").path());
    let (first, second) = (entries.next(), entries.next());
    assert_eq!(second, None, "one disk");
    image(&first.expect("an image"))
}

#[test]
fn a_locked_checkpoint_of_version_1_is_extracted_with_its_overlay_and_lost_without() {
    let unpacked = Unpacked::new();
    let lines = fs::read_to_string(packed().join("expected.tsv")).expect("what is expected");
    for tag in ["kept", "newest"] {
        let output = unpacked.extract(tag);
        assert!(output.status.success(), "{tag}: {}", String::from_utf8_lossy(&output.stderr));
        let found = format!("{tag}\t{:08x}", crc32c::crc32c(&image(&unpacked.0.join("out"))));
        assert!(lines.lines().any(|line| line == found), "{found} is not in\n{lines}");
    }
    assert!(unpacked.verify(), "all whole");
    fs::remove_file(unpacked.0.join(FILES[2])).expect("removed");
    assert!(!unpacked.verify(), "a locked checkpoint is lost");
    let output = unpacked.extract("kept");
    assert!(!output.status.success(), "what it had is not on the recovery disk any more");
    assert!(unpacked.extract("newest").status.success());
}
