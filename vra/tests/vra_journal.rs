//! The built `vra-journal` against foreign NBD clients.

use std::path::Path;
use std::process::{Child, Command};

#[path = "../src/view/test_journal.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the unit tests, which use more of it")]
mod test_journal;

use test_journal::TestJournal;

const SIZE_BYTES: u64 = 4 << 20;

/// The built command serves a checkpoint to qemu, read-only and with scratch.
#[test]
fn qemu_reads_and_writes_a_served_checkpoint() {
    if Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-io is not installed (package qemu-utils)");
        return;
    }
    let mut journal = TestJournal::new("serve", SIZE_BYTES, "{}");
    journal.random_changes(1, 80, 200);
    let cut = journal.checkpoint("before upgrade", 1_000_000);
    journal.random_changes(2, 80, 200);
    let store = journal.folder.clone();
    let socket = store.join("nbd.sock");
    let uri = format!("nbd+unix:///disk-0?socket={}", socket.display());
    let image = store.join("at.img");
    std::fs::write(&image, journal.model(cut)).expect("image");
    for scratch in [false, true] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vra-journal"));
        command.arg("serve").arg(&store).args(["--at", "before upgrade", "--socket"]).arg(&socket);
        if scratch {
            command.arg("--scratch").arg(&store).args(["--scratch-gib", "1"]);
        }
        let server = Served(command.stdout(std::process::Stdio::null()).spawn().expect("started"));
        wait_for(&socket);
        let compare = ["compare", "-f", "raw", "-F", "raw", &image.to_string_lossy(), &uri];
        let compared = Command::new("qemu-img").args(compare).output().expect("qemu-img");
        assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
        let script = [
            "-f",
            "raw",
            "-c",
            "write -P 9 4k 64k",
            "-c",
            "read -P 9 4k 64k",
            "-c",
            "discard 1M 1M",
            "-c",
            "read -P 0 1M 1M",
            &uri,
        ];
        let written = Command::new("qemu-io").args(script).output().expect("qemu-io");
        let text = String::from_utf8_lossy(&written.stdout).into_owned();
        let worked = written.status.success() && !text.contains("failed");
        assert_eq!(worked, scratch, "{text}{}", String::from_utf8_lossy(&written.stderr));
        server.stop();
        assert!(!socket.exists());
        let left: Vec<_> = std::fs::read_dir(&store)
            .expect("datastore")
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.contains("scratch"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

struct Served(Child);

impl Served {
    fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signalled");
        assert!(self.0.wait().expect("ended").success());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for(path: &Path) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !path.exists() {
        assert!(std::time::Instant::now() < deadline, "{} never came", path.display());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
