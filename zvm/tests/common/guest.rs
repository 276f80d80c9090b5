//! Disks of guests that boot from them and count on them.

#[path = "../../../hwtests/src/counting_guest.rs"]
#[allow(unreachable_pub, reason = "shared with the rig")]
mod counting_guest;

use std::path::Path;

use super::libvirt_host::TestFolder;

/// Makes a disk that a guest can boot from.
pub(crate) fn bootable_disk(folder: &TestFolder, name: &str, bytes: u64) -> std::path::PathBuf {
    let path = folder.disk(name, bytes);
    counting_guest::make_bootable(&path).expect("boot sector");
    path
}

/// How far a guest has counted on a disk.
pub(crate) fn counted(disk: &Path) -> u16 {
    counting_guest::counted_on(disk).expect("the counter's sector")
}

/// The same on a disk that is an NBD export.
pub(crate) fn counted_at(uri: &str, folder: &TestFolder) -> u16 {
    let copy = folder.path.join("copy.img");
    let mut convert = std::process::Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "raw", uri]).arg(&copy);
    assert!(convert.status().expect("qemu-img").success());
    counted(&copy)
}
