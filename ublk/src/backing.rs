//! A raw file or block device that holds a disk's data: opened for direct I/O, locked, and looked at.

mod lock;
mod probe;

pub use probe::direct_io_align;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::backing::lock::LockMode;
use crate::serve::Geometry;

/// What is wanted of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingSettings {
    /// Only reads: the lock is shared with other readers, and the geometry says so.
    pub read_only: bool,
    /// How long to wait for a lock that another process holds. A dead daemon's I/O holds its lock until the last of
    /// it has ended, so its successor waits (A4); zero for one that should not find anybody.
    pub lock_wait: Duration,
    /// Refuses files that begin as an image format does. To be off where the guest's own first block has been the
    /// beginning before: it may look like anything.
    pub refuse_image_formats: bool,
    /// The lock is taken later, by [`Backing::try_lock`], and nothing may be written before: for a file that several hosts have open, of which
    /// one at a time writes. Locks on block devices don't reach other hosts, so those are refused.
    pub lock_later: bool,
}

impl BackingSettings {
    /// For a disk that is attached for the first time.
    pub const FIRST_ATTACH: Self =
        Self { read_only: false, lock_wait: Duration::ZERO, refuse_image_formats: true, lock_later: false };
    /// For a disk that could not be opened before: the next try comes soon.
    pub const RETRY: Self = Self { lock_wait: Duration::ZERO, ..Self::RECOVERY };
    /// For a disk that a daemon before us had.
    pub const RECOVERY: Self = Self {
        read_only: false,
        lock_wait: Duration::from_secs(30),
        refuse_image_formats: false,
        lock_later: false,
    };
    /// For a file that another host may be writing to.
    pub const SHARED: Self = Self { lock_later: true, ..Self::RETRY };
}

/// What the path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// An open, locked raw disk. Everything that does I/O to it uses [`Backing::file`], whose lock then outlives this process
/// until its last I/O has ended.
#[derive(Debug)]
pub struct Backing {
    file: File,
    path: PathBuf,
    kind: BackingKind,
    geometry: Geometry,
}

/// Why a path cannot hold a disk.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// Nothing there.
    #[error(
        "{} does not exist: check the path, or make the disk with `truncate -s SIZE` or `fallocate -l SIZE`",
        path.display()
    )]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A directory, a socket, …
    #[error("{} is neither a regular file nor a block device: give the path of a raw disk image or of a device", path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
    },
    /// No permission.
    #[error("no permission to open {}: run as root, or give the user that runs this the right to read and write it", path.display())]
    Denied {
        /// The path.
        path: PathBuf,
    },
    /// Wanted for writing, and cannot be written.
    #[error(
        "{} is read-only (the device, or the filesystem that it lies on): make it writable, or attach it read-only",
        path.display()
    )]
    ReadOnly {
        /// The path.
        path: PathBuf,
    },
    /// Another process works on it.
    #[error("{} is busy: {holder}", path.display())]
    Busy {
        /// The path.
        path: PathBuf,
        /// Who has it, as far as is known, and the remedy.
        holder: String,
    },
    /// A device, where hosts are to share a file.
    #[error(
        "{} is a block device, whose locks other hosts don't see: a disk that hosts share must be a file on a filesystem \
         with locks across them, such as NFS",
        path.display()
    )]
    NotShareable {
        /// The path.
        path: PathBuf,
    },
    /// The filesystem has no direct I/O.
    #[error(
        "{} is on a filesystem without direct I/O (O_DIRECT): put it on ext4, xfs, btrfs, nfs or a block device",
        path.display()
    )]
    NoDirectIo {
        /// The path.
        path: PathBuf,
    },
    /// Direct I/O wants more alignment than a guest's blocks have.
    #[error("{} needs direct I/O in units of {align_bytes} bytes, at most 4096 is supported", path.display())]
    Alignment {
        /// The path.
        path: PathBuf,
        /// What it needs.
        align_bytes: u32,
    },
    /// No bytes.
    #[error("{} is empty: check the path, or make the disk with `truncate -s SIZE` or `fallocate -l SIZE`", path.display())]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// Ends inside a block.
    #[error(
        "{} has {size_bytes} bytes, which is not a multiple of its block size {block_bytes}: grow it with \
         `truncate -s %{block_bytes}`",
        path.display()
    )]
    Size {
        /// The path.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// Its logical block size.
        block_bytes: u32,
    },
    /// Not raw.
    #[error(
        "{} is a {format} image, not a raw disk: convert it with `qemu-img convert -O raw`",
        path.display()
    )]
    ImageFormat {
        /// The path.
        path: PathBuf,
        /// What it looks like.
        format: &'static str,
    },
    /// Anything else.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Backing {
    /// Opens, locks and measures a raw disk.
    ///
    /// # Errors
    /// [`BackingError`], which names the path and the remedy.
    pub fn open(path: &Path, settings: BackingSettings) -> Result<Self, BackingError> {
        let deadline = Instant::now() + settings.lock_wait;
        let (file, kind) = loop {
            match open_and_lock(path, settings) {
                Err(BackingError::Busy { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => break other?,
            }
        };
        let facts = probe::probe(&file, kind, path)?;
        if settings.refuse_image_formats
            && let Some(format) = probe::image_format(&facts.head)
        {
            return Err(BackingError::ImageFormat { path: path.to_owned(), format });
        }
        facts.check_size(path)?;
        let geometry = facts.geometry(settings.read_only);
        Ok(Self { file, path: path.to_owned(), kind, geometry })
    }

    /// The open file, for direct I/O.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// File or block device.
    pub fn kind(&self) -> BackingKind {
        self.kind
    }

    /// Its truth for a guest: block sizes, cache, what it can zero.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// How large the file or device is now, in bytes: in whole logical blocks.
    ///
    /// # Errors
    /// The system doesn't say.
    pub fn size_now(&self) -> io::Result<u64> {
        let size_bytes = probe::size_bytes(&self.file, self.kind)?;
        let block_bytes = u64::from(self.geometry.logical_block_bytes);
        Ok(size_bytes - size_bytes % block_bytes)
    }

    /// Takes the lock for writing, if nobody else has it; again is harmless. Of a file that was opened with [`BackingSettings::lock_later`].
    ///
    /// # Errors
    /// The filesystem can't say.
    pub fn try_lock(&self) -> Result<bool, BackingError> {
        let locked = lock::try_lock(&self.file, LockMode::Exclusive);
        locked.map_err(|source| BackingError::Io { action: "lock", path: self.path.clone(), source })
    }

    /// Gives the lock up. Nothing may be being written by then.
    ///
    /// # Errors
    /// The filesystem refused: then it is to be taken as still held.
    pub fn unlock(&self) -> Result<(), BackingError> {
        lock::unlock(&self.file).map_err(|source| BackingError::Io {
            action: "unlock",
            path: self.path.clone(),
            source,
        })
    }
}

fn open_and_lock(path: &Path, settings: BackingSettings) -> Result<(File, BackingKind), BackingError> {
    let BackingSettings { read_only, lock_later, .. } = settings;
    let owned = || path.to_owned();
    let file_type = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(BackingError::Missing { path: owned() });
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(BackingError::Denied { path: owned() });
        }
        Err(source) => return Err(BackingError::Io { action: "look at", path: owned(), source }),
    };
    let kind = if file_type.is_file() {
        BackingKind::File
    } else if file_type.is_block_device() {
        BackingKind::BlockDevice
    } else {
        return Err(BackingError::NotADisk { path: owned() });
    };
    if lock_later && kind == BackingKind::BlockDevice {
        return Err(BackingError::NotShareable { path: owned() });
    }
    let mut flags = libc::O_DIRECT;
    if kind == BackingKind::BlockDevice && !read_only {
        flags |= libc::O_EXCL;
    }
    let opened = File::options().read(true).write(!read_only).custom_flags(flags).open(path);
    let file = opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) => BackingError::NoDirectIo { path: owned() },
        Some(libc::EROFS) => BackingError::ReadOnly { path: owned() },
        Some(libc::EBUSY) => BackingError::Busy {
            path: owned(),
            holder: "it is mounted, or part of another device (`lsblk` shows which): release it first"
                .to_owned(),
        },
        Some(libc::EACCES | libc::EPERM) if kind == BackingKind::BlockDevice && is_root() => {
            BackingError::ReadOnly { path: owned() }
        }
        Some(libc::EACCES | libc::EPERM) => BackingError::Denied { path: owned() },
        _ => BackingError::Io { action: "open", path: owned(), source },
    })?;
    if lock_later {
        return Ok((file, kind));
    }
    let mode = if read_only { LockMode::Shared } else { LockMode::Exclusive };
    match lock::try_lock(&file, mode) {
        Ok(true) => Ok((file, kind)),
        Ok(false) => Err(BackingError::Busy { path: owned(), holder: lock::describe_holder(&file) }),
        Err(source) => Err(BackingError::Io { action: "lock", path: owned(), source }),
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[cfg(test)]
mod tests;
