//! Names of ublk devices that are never another disk's: links in `/dev`, one for each volume that is served. The driver gives a number that
//! is free to whoever asks next; a guest's definition that named the number would get that one's disk.

use std::io;
use std::path::{Path, PathBuf};

use crate::api::VolumeId;

/// Where they are.
const FOLDER: &str = "/dev/holdfast";

/// Links in a folder.
pub(super) struct DeviceLinks {
    folder: PathBuf,
}

impl DeviceLinks {
    /// Those of this host. What an earlier daemon left is removed: its devices may be others' by now.
    pub(super) fn fresh() -> Self {
        Self::fresh_in(Path::new(FOLDER))
    }

    fn fresh_in(folder: &Path) -> Self {
        let links = Self { folder: folder.to_owned() };
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            remove(&entry.path());
        }
        links
    }

    /// Makes a volume's link lead to a device. A failure is only logged: the device works without.
    pub(super) fn point(&self, volume: VolumeId, device: &Path) {
        let made = std::fs::create_dir_all(&self.folder).and_then(|()| {
            self.remove(volume);
            std::os::unix::fs::symlink(device, self.path(volume))
        });
        if let Err(error) = made {
            tracing::warn!(%volume, %error, device = %device.display(), "a device has no name of its own in {FOLDER}");
        }
    }

    /// Removes a volume's link, if there is one.
    pub(super) fn remove(&self, volume: VolumeId) {
        remove(&self.path(volume));
    }

    /// A volume's link, if it leads to the device.
    pub(super) fn of(&self, volume: VolumeId, device: &Path) -> Option<PathBuf> {
        let path = self.path(volume);
        std::fs::read_link(&path).is_ok_and(|target| target == device).then_some(path)
    }

    fn path(&self, volume: VolumeId) -> PathBuf {
        self.folder.join(volume.to_string())
    }
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, link = %path.display(), "a device's name could not be removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_its_volumes_alone_and_gone_with_the_daemon_that_made_it() {
        let folder = std::env::temp_dir().join(format!("device-links-{}", std::process::id()));
        let links = DeviceLinks::fresh_in(&folder);
        let (one, other) = (VolumeId::random(), VolumeId::random());
        links.point(one, Path::new("/dev/ublkb0"));
        links.point(one, Path::new("/dev/ublkb1"));
        let link = links.of(one, Path::new("/dev/ublkb1")).unwrap();
        assert!(link.ends_with(one.to_string()));
        assert_eq!(
            (links.of(one, Path::new("/dev/ublkb0")), links.of(other, Path::new("/dev/ublkb1"))),
            (None, None)
        );
        links.remove(other);
        let next = DeviceLinks::fresh_in(&folder);
        assert_eq!(next.of(one, Path::new("/dev/ublkb1")), None);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
