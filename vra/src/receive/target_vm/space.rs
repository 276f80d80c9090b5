//! Recovery disks whose space isn't reserved: they say so, and warn before the datastore is full.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::TargetVm;
use crate::api::status::Severity;

/// What thin recovery disks may still take, and what there is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ThinSpace {
    wanted_bytes: u64,
    free_bytes: u64,
}

const THIN: &str = "recovery-disks-thin";
const LOW: &str = "datastore-low";

impl TargetVm {
    /// Looks whether the datastore has room for what the recovery disks may grow by, if their space isn't reserved. Waits for the
    /// filesystem.
    pub(in crate::receive) fn look_at_space(&self) {
        let disks: Vec<(PathBuf, u64)> = {
            let inner = self.lock();
            if inner.manifest.disks_reserved || inner.key.is_none() {
                return;
            }
            let Ok(definition) = inner.manifest.vm() else { return };
            let volumes = definition.volumes.iter();
            volumes.map(|volume| (self.folder.disk(volume.number), volume.size_bytes)).collect()
        };
        let message = format!(
            "the recovery disks in {} are thin: the datastore's filesystem could not reserve their space",
            self.folder.path().display()
        );
        let remedy = "keep enough of the datastore free for all of them, or move it to ext4 or xfs";
        self.alert(THIN, Severity::Warning, message, remedy);
        let taken_bytes = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.blocks() * 512);
        let wanted_bytes =
            disks.iter().map(|(path, size_bytes)| size_bytes.saturating_sub(taken_bytes(path))).sum();
        let Ok(datastore) = nix::sys::statvfs::statvfs(self.folder.path()) else { return };
        let free_bytes = datastore.blocks_available() * datastore.fragment_size();
        let space = ThinSpace { wanted_bytes, free_bytes };
        if !space.is_low() {
            self.lock().alerts.remove(LOW);
            return;
        }
        let message = format!(
            "the datastore of {} has {} MiB free, and its thin recovery disks may still take {} MiB",
            self.folder.path().display(),
            free_bytes >> 20,
            wanted_bytes >> 20
        );
        let remedy = "free space there before it is full: without it nothing can be promoted, and the journal fills up";
        self.alert(LOW, Severity::Critical, message, remedy);
    }
}

impl ThinSpace {
    /// Other VMs and journals take from the same space: some is left to them.
    fn is_low(self) -> bool {
        self.wanted_bytes > 0 && self.free_bytes < self.wanted_bytes.saturating_add(self.wanted_bytes / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_warns_while_there_is_still_time() {
        let space = |wanted_bytes, free_bytes| ThinSpace { wanted_bytes, free_bytes };
        assert!(!space(0, 0).is_low(), "nothing more can be taken");
        assert!(!space(100, 110).is_low());
        assert!(space(100, 109).is_low());
        assert!(space(u64::MAX, u64::MAX - 1).is_low());
    }
}
