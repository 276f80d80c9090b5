//! What can be recovered of a group: its named checkpoints, and the disks of a test.

use super::vra::qemu_io;
use super::{Site, wait_for};

impl Site {
    /// Names a checkpoint as soon as there can be one, and waits until it can be opened.
    pub(crate) fn tag(&self, vpg: &str, tag: &str) {
        wait_for(tag, || self.zvm(&["checkpoint", "tag", vpg, tag]).code == 0);
        wait_for(tag, || self.complete(vpg).contains(&tag.to_owned()));
    }

    /// Names of checkpoints that can be opened, the newest first.
    pub(crate) fn complete(&self, vpg: &str) -> Vec<String> {
        let listed = self.json(&["checkpoint", "list", vpg, "--tagged"]);
        let listed = listed.as_array().expect("a list");
        let complete = listed.iter().filter(|info| info["complete"] == true);
        complete.map(|info| info["tag"].as_str().expect("a tag").to_owned()).collect()
    }

    /// Opens a group for a test, and gives its disks: the VRA's name and the disk's URI, in their order.
    pub(crate) fn tested(&self, vpg: &str, at: &str, check: impl Fn(&[(String, String)])) {
        let started = self.zvm(&["test", "start", vpg, "--at", at, "--door", "nbd"]);
        assert_eq!(started.code, 0, "{started:?}");
        let test = self.json(&["test", "show", vpg]);
        let mut disks = Vec::new();
        for view in test["views"].as_array().expect("views") {
            let vra = view["vra"].as_str().expect("a VRA").to_owned();
            for disk in view["view"]["disks"].as_array().expect("disks") {
                let text = |key: &str| disk["door"][key].as_str().unwrap_or_else(|| panic!("{disk}"));
                let uri = format!("nbd+unix:///{}?socket={}", text("export"), text("path"));
                disks.push((vra.clone(), uri));
            }
        }
        disks.sort();
        check(&disks);
        let stopped = self.zvm(&["test", "stop", vpg]);
        assert_eq!(stopped.code, 0, "{stopped:?}");
    }
}

/// Checks that a disk has this byte everywhere in a range.
pub(crate) fn reads(uri: &str, byte: u8, from: usize, len: usize) {
    qemu_io(uri, &[&format!("read -P {byte} {from} {len}")]);
}
