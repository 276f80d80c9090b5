//! Locks on open files, and who holds one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockMode {
    Exclusive,
    Shared,
}

/// `flock`: the lock belongs to the open file, which every I/O under way pins. Whether it was had.
pub(super) fn try_lock(file: &File, mode: LockMode) -> io::Result<bool> {
    let operation = match mode {
        LockMode::Exclusive => libc::LOCK_EX,
        LockMode::Shared => libc::LOCK_SH,
    };
    // SAFETY: the descriptor is open; no memory is involved.
    if unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EWOULDBLOCK) { Ok(false) } else { Err(error) }
}

/// Gives a `flock` up.
pub(super) fn unlock(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open; no memory is involved.
    match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Words for whoever has the lock that was not had.
pub(super) fn describe_holder(file: &File) -> String {
    let holder = file.metadata().ok().and_then(|metadata| {
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        find_holder(&locks, metadata.dev(), metadata.ino())
    });
    match holder {
        Some(pid) => {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let name = if name.is_empty() { "ended, its I/O is still under way" } else { name.trim() };
            format!("process {pid} ({name}) has locked it: detach it there first")
        }
        None => "another process has locked it (on a shared filesystem perhaps on another host): detach it there first"
            .to_owned(),
    }
}

/// The process in a line of `/proc/locks` such as `4: FLOCK  ADVISORY  WRITE 1234 fd:01:4711 0 EOF`.
fn find_holder(locks: &str, device: u64, inode: u64) -> Option<u32> {
    let file = format!("{:02x}:{:02x}:{inode}", libc::major(device), libc::minor(device));
    locks
        .lines()
        .filter(|line| !line.contains("->"))
        .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>())
        .find(|words| words.get(1) == Some(&"FLOCK") && words.get(5) == Some(&file.as_str()))
        .and_then(|words| words.get(4)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_found_by_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 08:01:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 22 08:01:78 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 33 08:01:77 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 44 08:01:77 0 EOF\n";
        assert_eq!(find_holder(locks, libc::makedev(8, 1), 77), Some(33));
        assert_eq!(find_holder(locks, libc::makedev(8, 2), 77), None);
    }
}
