//! Notices that a VM's files were moved, removed or replaced while they are open: what is written then is where nobody will look for it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use journal::storage::ring::DirectFile;

use super::TargetVm;
use crate::receive::files::VmFiles;
use crate::receive::folder::VmFolder;
use crate::receive::receiver_types::Failure;
use crate::receive::worker::Input;

/// A VM's files as they were opened.
#[derive(Clone, Debug)]
pub(super) struct OpenedFiles(Vec<(PathBuf, FileMark)>);

/// What tells a file from another of the same name. Not its device: a datastore that is mounted again may have another one. When it was made
/// tells a copy that got the number of the one it replaces; not all filesystems know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileMark {
    inode: u64,
    made: Option<SystemTime>,
}

impl FileMark {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self { inode: metadata.ino(), made: metadata.created().ok() }
    }
}

impl OpenedFiles {
    pub(super) fn of(folder: &VmFolder, files: &VmFiles) -> Self {
        let disks = (0_u16..).zip(&files.disks).map(|(volume, disk)| (folder.disk(volume), disk));
        let mark = |(path, file): (PathBuf, &DirectFile)| {
            // What can't be asked isn't watched.
            file.file().metadata().ok().map(|metadata| (path, FileMark::of(&metadata)))
        };
        Self(std::iter::once((folder.journal(), &files.journal)).chain(disks).filter_map(mark).collect())
    }

    /// The first of which the other ones have another file. The VM may have got disks since.
    pub(super) fn first_other(&self, others: &Self) -> Option<&Path> {
        let is_other = |(path, mark): &&(PathBuf, FileMark)| {
            others.0.iter().any(|(other, now)| path == other && mark != now)
        };
        self.0.iter().find(is_other).map(|(path, _)| path.as_path())
    }

    /// The first whose name leads nowhere, or to another file. Waits for the filesystem. A datastore that can't be asked tells nothing.
    pub(super) fn first_moved(&self) -> Option<&Path> {
        let is_moved = |(path, mark): &&(PathBuf, FileMark)| match std::fs::metadata(path) {
            Ok(metadata) => FileMark::of(&metadata) != *mark,
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        };
        self.0.iter().find(is_moved).map(|(path, _)| path.as_path())
    }
}

impl TargetVm {
    /// Closes the files if one isn't where it was opened: nothing more is acknowledged, and [`TargetVm::reopen`] waits until it is back.
    /// Waits for the filesystem.
    pub(in crate::receive) fn look_at_files(self: &Arc<Self>) {
        let (key, opened) = {
            let inner = self.lock();
            let Some(key) = inner.key else { return };
            (key, inner.opened_files.clone())
        };
        let Some(path) = opened.first_moved().map(Path::to_owned) else { return };
        // Whoever closed them meanwhile may have moved them.
        if self.lock().key == Some(key) {
            self.worker.tell(Input::Fail { vm: key, failure: Failure::Moved { path } });
        }
    }
}
