//! Why there is no scratch.

use std::io;
use std::path::PathBuf;

use journal::crypt::{KeyError, NoRandom};

use super::format::{DISK_MAX_BYTES, ScratchFormatError};
use super::map::MapDamage;

/// Why there is no scratch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScratchError {
    /// The operating system.
    #[error("cannot {action} the scratch file {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The space.
    #[error(
        "no space for {} MiB of scratch at {}: free space, or ask for less scratch", len_bytes >> 20, path.display()
    )]
    Space {
        /// The file.
        path: PathBuf,
        /// Its length, in bytes.
        len_bytes: u64,
    },
    /// Memory for the map.
    #[error("no memory for the map of the scratch file {} ({}): make room there", path.display(), live.display())]
    Memory {
        /// The scratch file.
        path: PathBuf,
        /// The file that holds the map while the process runs.
        live: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk.
    #[error(
        "a disk of {disk_bytes} bytes is too long for scratch, {DISK_MAX_BYTES} are possible: open it read-only"
    )]
    DiskTooLong {
        /// Its size, in bytes.
        disk_bytes: u64,
    },
    /// There is none.
    #[error("the scratch file {} is gone: close the view, what was written to it is lost", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Another process works on it, or one that died has still I/O under way (A4).
    #[error("the scratch file {} is locked by another process: if that lasts, end it", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The bytes.
    #[error("the scratch file {} can't be read: {source}; close the view, which removes it", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ScratchFormatError,
    },
    /// The map.
    #[error("the scratch file {} is damaged: {source}; close the view, which removes it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: MapDamage,
    },
    /// The key.
    #[error("the scratch file {}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why it can't be read or written.
        source: KeyError,
    },
    /// A key could not be made.
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
    /// The file is another view's.
    #[error("the scratch file {} belongs to another view or disk: put the right one back, or close the view", path.display())]
    Other {
        /// The file.
        path: PathBuf,
    },
    /// The map of the former process has gone without a restart of the host.
    #[error(
        "{} is gone, which held what had been written to {} and not flushed yet: a guest that still runs would miss it. End the guest, and \
         close the view", live.display(), path.display()
    )]
    LiveMapLost {
        /// The scratch file.
        path: PathBuf,
        /// The file that held the map.
        live: PathBuf,
    },
}
