//! Whether a folder can hold journals: writable, O_DIRECT, holes, space.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::{missing, ok, warning};
use crate::api::status::Check;

/// Less free space than this is worth a word, in bytes.
const LOW_SPACE_BYTES: u64 = 10 << 30;

/// Tries what the journal will do, on a temporary file in `folder`.
pub(super) fn check(folder: &Path) -> Check {
    let name = format!("datastore {}", folder.display());
    let probe = folder.join(format!(".holdfast-doctor-{}", std::process::id()));
    let tried = try_file(&probe);
    let _ = std::fs::remove_file(&probe);
    match tried {
        Ok(()) => {}
        Err((step, error)) => {
            let remedy = match (step, error.raw_os_error()) {
                ("create a file in it", Some(libc::ENOENT)) => {
                    "make the folder, or take it out of `datastores` if this VRA is no target"
                }
                ("create a file in it", Some(libc::EROFS)) => {
                    "the file system is read-only: repair it and mount it for writing"
                }
                ("create a file in it", _) => "give the VRA's user the right to write there",
                ("write with O_DIRECT", _) => "use a file system with direct I/O (ext4, xfs, btrfs)",
                (_, Some(libc::ENOSPC | libc::EDQUOT)) => "make space",
                _ => "use a file system that can preallocate and punch holes (ext4, xfs, btrfs)",
            };
            return missing(&name, format!("cannot {step}: {error}"), remedy);
        }
    }
    match nix::sys::statvfs::statvfs(folder) {
        Ok(space) => {
            let free = space.blocks_available() * space.fragment_size();
            let found = format!("O_DIRECT, preallocation and holes work; {} GiB free", free >> 30);
            if free < LOW_SPACE_BYTES {
                warning(&name, found, "make space for journals")
            } else {
                ok(&name, found)
            }
        }
        Err(error) => warning(&name, format!("its free space isn't known: {error}"), "check the file system"),
    }
}

fn try_file(probe: &Path) -> Result<(), (&'static str, io::Error)> {
    const BLOCK_BYTES: usize = 4096;
    #[repr(align(4096))]
    struct Block([u8; BLOCK_BYTES]);

    let create = |error| ("create a file in it", error);
    File::create(probe).map_err(create)?;
    let direct = |error| ("write with O_DIRECT", error);
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(probe).map_err(direct)?;
    let allocate = |error: nix::Error| ("preallocate", error.into());
    fallocate(&file, FallocateFlags::empty(), 0, 16 * BLOCK_BYTES as i64).map_err(allocate)?;
    let block = Box::new(Block([0xa5; BLOCK_BYTES]));
    file.write_all_at(&block.0, 0).map_err(direct)?;
    file.sync_data().map_err(|error| ("sync", error))?;
    let punch = |error: nix::Error| ("punch a hole", error.into());
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, flags, 0, BLOCK_BYTES as i64).map_err(punch)?;
    let mut back = Box::new(Block([1; BLOCK_BYTES]));
    file.read_exact_at(&mut back.0, 0).map_err(|error| ("read with O_DIRECT", error))?;
    if back.0 != [0; BLOCK_BYTES] {
        return Err(("punch a hole", io::Error::other("it doesn't read as zeroes")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::status::CheckState;

    #[test]
    fn a_folder_that_is_not_there_is_named_with_a_remedy() {
        let check = check(Path::new("/nonexistent/holdfast"));
        assert_eq!(check.state, CheckState::Missing);
        assert!(check.name.contains("/nonexistent/holdfast"), "{check:?}");
        assert!(check.remedy.is_some_and(|remedy| remedy.contains("make the folder")));
    }

    #[test]
    fn the_probe_leaves_nothing_behind() {
        let folder = std::env::temp_dir().join(format!("daemon-doctor-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("folder");
        let check = check(&folder);
        assert_eq!(std::fs::read_dir(&folder).expect("list").count(), 0, "{check:?}");
        std::fs::remove_dir(&folder).expect("remove");
    }
}
