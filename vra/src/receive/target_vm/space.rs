//! The datastore's room: thin recovery disks say so, and both they and journals warn before it is full.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::TargetVm;
use crate::api::status::Severity;

/// What a VM's files may still take, and what there is on their datastore, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::receive) struct Space {
    /// The filesystem.
    device: u64,
    /// By recovery disks whose space isn't reserved.
    thin_bytes: u64,
    /// By the journal, up to its limit.
    journal_bytes: u64,
    free_bytes: u64,
}

const THIN: &str = "recovery-disks-thin";
const LOW: &str = "datastore-low";
const OVERCOMMITTED: &str = "datastore-overcommitted";

impl TargetVm {
    /// What the VM's files may grow by, while they are open. Waits for the filesystem.
    pub(in crate::receive) fn space(&self) -> Option<Space> {
        let (disks, journal_limit_bytes): (Vec<(PathBuf, u64)>, u64) = {
            let inner = self.lock();
            inner.key?;
            let definition = inner.manifest.vm().ok()?;
            let volumes =
                definition.volumes.iter().filter(|volume| !inner.manifest.disks_reserved && !volume.left);
            let disks = volumes.map(|volume| (self.folder.disk(volume.number), volume.size_bytes)).collect();
            (disks, definition.journal_limit())
        };
        if !disks.is_empty() {
            let message = format!(
                "the recovery disks in {} are thin: the datastore's filesystem could not reserve their space",
                self.folder.path().display()
            );
            let remedy = "keep enough of the datastore free for all of them, or move it to ext4 or xfs";
            self.alert(THIN, Severity::Warning, message, remedy);
        }
        let taken_bytes = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.blocks() * 512);
        let thin_bytes =
            disks.iter().map(|(path, size_bytes)| size_bytes.saturating_sub(taken_bytes(path))).sum();
        let journal_bytes = journal_limit_bytes.saturating_sub(taken_bytes(&self.folder.journal()));
        let datastore = nix::sys::statvfs::statvfs(self.folder.path()).ok()?;
        let free_bytes = datastore.blocks_available() * datastore.fragment_size();
        self.lock().datastore_free_bytes = Some(free_bytes);
        let device = std::fs::metadata(self.folder.path()).ok()?.dev();
        Some(Space { device, thin_bytes, journal_bytes, free_bytes })
    }

    /// Warns if the datastore has too little for all that lies there.
    pub(in crate::receive) fn tell_space(&self, space: Option<Space>, all: &[Space]) {
        let datastore = self.folder.path().display();
        if space.is_some_and(|space| space.is_low(all)) {
            let message = format!(
                "the datastore of {datastore} has less room than its thin recovery disks may still take"
            );
            let remedy = "free space there before it is full: without it nothing can be promoted, and the journal fills up";
            self.alert(LOW, Severity::Critical, message, remedy);
        } else {
            self.lock().alerts.remove(LOW);
        }
        if let Some((wanted_bytes, free_bytes)) = space.and_then(|space| space.overcommitted(all)) {
            let message = format!(
                "the journals on the datastore of {datastore} may still grow by {wanted_bytes} bytes, and only {free_bytes} are free: \
                 history will be shortened before its limits are reached"
            );
            let remedy = "free space there, or lower the limits of journals that lie there";
            self.alert(OVERCOMMITTED, Severity::Warning, message, remedy);
        } else {
            self.lock().alerts.remove(OVERCOMMITTED);
        }
    }
}

impl Space {
    /// Whether the datastore lacks room for all thin disks that lie there. Journals and others take from the same space: some is left to
    /// them.
    fn is_low(self, all: &[Self]) -> bool {
        let wanted_bytes = self.sum(all, |space| space.thin_bytes);
        wanted_bytes > 0 && self.free_bytes < wanted_bytes.saturating_add(wanted_bytes / 10)
    }

    /// What all that lies there may still take and what is free, in bytes, if that is less.
    fn overcommitted(self, all: &[Self]) -> Option<(u64, u64)> {
        let wanted_bytes = self.sum(all, |space| space.thin_bytes.saturating_add(space.journal_bytes));
        (wanted_bytes > self.free_bytes).then_some((wanted_bytes, self.free_bytes))
    }

    fn sum(self, all: &[Self], of: impl Fn(&Self) -> u64) -> u64 {
        let same = all.iter().filter(|space| space.device == self.device);
        same.map(of).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_warns_while_there_is_still_time() {
        let space =
            |device, thin_bytes, free_bytes| Space { device, thin_bytes, journal_bytes: 0, free_bytes };
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

    #[test]
    fn limits_of_journals_that_the_datastore_has_no_room_for_are_told() {
        let space = |device, journal_bytes| Space { device, thin_bytes: 10, journal_bytes, free_bytes: 300 };
        let all = [space(1, 140), space(1, 141), space(2, 290)];
        assert_eq!(all.map(|space| space.overcommitted(&all)), [Some((301, 300)), Some((301, 300)), None]);
        assert!(!all[0].is_low(&all));
    }
}
