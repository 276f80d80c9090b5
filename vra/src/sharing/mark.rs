//! The mark beside a shared disk: it says which volume the disk is, so that another host knows it is the same file, and whoever asks for
//! the disk's lock locks the mark.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::api::VolumeId;

/// Longest content that is read, in bytes.
const MAX_BYTES: u64 = 256;

/// A disk's mark, open.
#[derive(Debug)]
pub struct Mark {
    file: Mutex<File>,
    path: PathBuf,
}

/// Why a disk can't be shared.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    /// There is none.
    #[error("{} isn't there: the disk is not shared by its owner, or this is not the same storage", path.display())]
    Missing {
        /// The mark.
        path: PathBuf,
    },
    /// It is another volume's.
    #[error("{} says that the disk is volume {found:?}, not {expected}: it is another disk than the owner's", path.display())]
    Differs {
        /// The mark.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What was expected.
        expected: VolumeId,
    },
    /// The filesystem's.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The mark.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Mark {
    /// Marks a disk as a volume. To be called by who has the disk's lock.
    ///
    /// # Errors
    /// [`MarkError::Io`].
    pub fn make(disk: &Path, volume: VolumeId) -> Result<Self, MarkError> {
        let path = path_of(disk);
        let made = (|| {
            let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
            // Not replaced: others may have it open.
            file.set_len(0)?;
            writeln!(file, "{volume}")?;
            file.sync_all()?;
            File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
            Ok(file)
        })();
        match made {
            Ok(file) => Ok(Self { file: Mutex::new(file), path }),
            Err(source) => Err(MarkError::Io { action: "write", path, source }),
        }
    }

    /// The mark of a disk that must be this volume.
    ///
    /// # Errors
    /// [`MarkError`].
    pub fn open(disk: &Path, volume: VolumeId) -> Result<Self, MarkError> {
        let path = path_of(disk);
        let mut file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(MarkError::Missing { path });
            }
            Err(source) => return Err(MarkError::Io { action: "open", path, source }),
        };
        let mut bytes = Vec::new();
        let read =
            file.seek(SeekFrom::Start(0)).and_then(|_| (&file).take(MAX_BYTES).read_to_end(&mut bytes));
        if let Err(source) = read {
            return Err(MarkError::Io { action: "read", path, source });
        }
        let found = String::from_utf8_lossy(&bytes).trim().to_owned();
        if found != volume.to_string() {
            return Err(MarkError::Differs { path, found, expected: volume });
        }
        Ok(Self { file: Mutex::new(file), path })
    }

    /// Asks for the disk, unless somebody else does. Whether it is asked for now. A mark that was taken away and made again is asked by its new
    /// file, which the owner looks at.
    ///
    /// # Errors
    /// The filesystem can't say.
    pub fn ask(&self) -> io::Result<bool> {
        let mut file = self.lock();
        if let Ok(there) = fs::metadata(&self.path)
            && (there.dev(), there.ino()) != file.metadata().map(|open| (open.dev(), open.ino()))?
        {
            *file = File::options().read(true).write(true).open(&self.path)?;
        }
        match file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Asks no more.
    ///
    /// # Errors
    /// The filesystem can't say.
    pub fn stop_asking(&self) -> io::Result<()> {
        self.lock().unlock()
    }

    /// Whether somebody else asks for the disk. Not to be called by who asks.
    ///
    /// # Errors
    /// The filesystem can't say.
    pub fn is_asked_for(&self) -> io::Result<bool> {
        let is_free = self.ask()?;
        if is_free {
            self.stop_asking()?;
        }
        Ok(!is_free)
    }

    fn lock(&self) -> MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the mark away: the disk is shared no more.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn remove(&self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

/// `DIR/.NAME.holdfast-shared`.
fn path_of(disk: &Path) -> PathBuf {
    let name = disk.file_name().unwrap_or_default().to_string_lossy();
    disk.with_file_name(format!(".{name}.holdfast-shared"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_names_its_volume_and_is_asked_by_one() {
        let folder = std::env::temp_dir().join(format!("holdfast-mark-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("folder");
        let (disk, volume) = (folder.join("db.img"), VolumeId::random());
        assert!(matches!(Mark::open(&disk, volume), Err(MarkError::Missing { .. })));
        let owner = Mark::make(&disk, volume).expect("made");
        let (one, other) =
            (Mark::open(&disk, volume).expect("open"), Mark::open(&disk, volume).expect("open"));
        assert!(!owner.is_asked_for().expect("lock"));
        assert!(one.ask().expect("lock") && one.ask().expect("again") && !other.ask().expect("lock"));
        assert!(owner.is_asked_for().expect("lock"));
        drop(one);
        assert!(!owner.is_asked_for().expect("lock") && other.ask().expect("lock"));
        // Made anew for another volume, it is the same file to those that have it open.
        let again = VolumeId::random();
        let owner = Mark::make(&disk, again).expect("made");
        assert!(owner.is_asked_for().expect("lock"));
        let error = Mark::open(&disk, volume).expect_err("another volume").to_string();
        assert!(error.contains(&again.to_string()) && error.contains(&volume.to_string()), "{error}");
        // Taken away and made once more, it is another file: who asks comes to that one.
        assert!(other.stop_asking().is_ok());
        owner.remove().expect("removed");
        assert!(matches!(Mark::open(&disk, again), Err(MarkError::Missing { .. })));
        assert!(other.ask().expect("nobody sees it") && other.stop_asking().is_ok());
        let owner = Mark::make(&disk, again).expect("made");
        assert!(other.ask().expect("lock") && owner.is_asked_for().expect("lock"));
        fs::remove_dir_all(&folder).expect("removed");
    }
}
