//! Recovery disks whose space isn't reserved: they say so, and warn before the datastore is full.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::TargetVm;
use crate::api::status::Severity;

/// What thin recovery disks may still take, and what there is on their datastore, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::receive) struct ThinSpace {
    /// The filesystem.
    device: u64,
    wanted_bytes: u64,
    free_bytes: u64,
}

const THIN: &str = "recovery-disks-thin";
const LOW: &str = "datastore-low";

impl TargetVm {
    /// What the recovery disks may grow by, if their space isn't reserved: then that is told. Waits for the filesystem.
    pub(in crate::receive) fn thin_space(&self) -> Option<ThinSpace> {
        let disks: Vec<(PathBuf, u64)> = {
            let inner = self.lock();
            if inner.manifest.disks_reserved || inner.key.is_none() {
                return None;
            }
            let definition = inner.manifest.vm().ok()?;
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
        let datastore = nix::sys::statvfs::statvfs(self.folder.path()).ok()?;
        let free_bytes = datastore.blocks_available() * datastore.fragment_size();
        let device = std::fs::metadata(self.folder.path()).ok()?.dev();
        Some(ThinSpace { device, wanted_bytes, free_bytes })
    }

    /// Warns if the datastore has too little for all thin recovery disks that lie there.
    pub(in crate::receive) fn tell_space(&self, is_low: bool) {
        if !is_low {
            self.lock().alerts.remove(LOW);
            return;
        }
        let message = format!(
            "the datastore of {} has less room than its thin recovery disks may still take",
            self.folder.path().display(),
        );
        let remedy = "free space there before it is full: without it nothing can be promoted, and the journal fills up";
        self.alert(LOW, Severity::Critical, message, remedy);
    }
}

impl ThinSpace {
    /// Whether the datastore lacks room for all that lie there. Journals and others take from the same space: some is left to them.
    pub(in crate::receive) fn is_low(self, all: &[Self]) -> bool {
        let same = all.iter().filter(|space| space.device == self.device);
        let wanted_bytes = same.fold(0_u64, |sum, space| sum.saturating_add(space.wanted_bytes));
        wanted_bytes > 0 && self.free_bytes < wanted_bytes.saturating_add(wanted_bytes / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_warns_while_there_is_still_time() {
        let space = |device, wanted_bytes, free_bytes| ThinSpace { device, wanted_bytes, free_bytes };
        let is_low = |wanted_bytes, free_bytes| {
            let space = space(1, wanted_bytes, free_bytes);
            space.is_low(&[space])
        };
        assert!(!is_low(0, 0), "nothing more can be taken");
        assert!(!is_low(100, 110));
        assert!(is_low(100, 109));
        assert!(is_low(u64::MAX, u64::MAX - 1));
        let all = [space(1, 100, 200), space(1, 100, 200), space(2, 100, 200)];
        assert_eq!(all.map(|space| space.is_low(&all)), [true, true, false], "VMs share a datastore");
    }
}
