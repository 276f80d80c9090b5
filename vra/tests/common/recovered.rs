//! What can be recovered at a target: by a view, and without any VRA.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ::vra::api::{OpenView, ViewInfo};

use super::pair::open_view;
use super::vra::{Vra, nbdcopy};

/// A view, and copies of its disks.
pub async fn shown(target: &Vra, open: &OpenView) -> (ViewInfo, Vec<Vec<u8>>) {
    let view = open_view(target, open).await;
    let disks = copies(target, &view);
    (view, disks)
}

/// Copies of a view's disks.
pub fn copies(target: &Vra, view: &ViewInfo) -> Vec<Vec<u8>> {
    let copy =
        |number: usize| nbdcopy(&view.disks[number].door, &target.path("copy.raw")).expect("installed");
    (0..view.disks.len()).map(copy).collect()
}

/// The files in a folder's folders' folders.
pub fn walk(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = |folder: &Path| {
        std::fs::read_dir(folder)
            .into_iter()
            .flatten()
            .map(|entry| entry.expect("entry").path())
            .collect::<Vec<_>>()
    };
    let vms: Vec<PathBuf> = entries(folder).iter().flat_map(|vpg| entries(vpg)).collect();
    vms.into_iter().flat_map(move |vm| entries(&vm))
}

/// A VM's disks at a checkpoint, without any VRA.
pub fn extract(target: &Vra, at: &str) -> Vec<Vec<u8>> {
    let out = target.path(&format!("extracted-{at}"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_vra-journal"));
    command.arg("extract").arg(target.path("datastore"));
    command.args(["--vpg", "shop", "--quiet", "--at", at, "--out-dir"]).arg(&out);
    let done = command.output().expect("vra-journal");
    assert!(done.status.success(), "{done:?}");
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(&out).expect("folder").map(|entry| entry.expect("entry").path()).collect();
    names.sort();
    let images = names.iter().map(|path| std::fs::read(path).expect("image")).collect();
    std::fs::remove_dir_all(&out).expect("removed");
    images
}

/// Destroys both superblocks of the target's one journal.
pub fn lose_superblocks(target: &Vra) {
    let journal =
        walk(&target.path("datastore")).find(|path| path.ends_with("journal.hfj")).expect("the journal");
    let file = std::fs::OpenOptions::new().write(true).open(journal).expect("journal");
    for offset_bytes in [0, 64 << 10] {
        file.write_all_at(&[0; 4096], offset_bytes).expect("lost");
    }
}
