//! Small files that must survive a power cut.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Replaces a file as a whole: new file in the same folder, `fsync`, `rename`, `fsync` of the folder. After a crash there is the
/// old content or the new one.
///
/// # Errors
/// The operating system's; the old content is then still there, but for a failed sync of the folder, after which it may be either.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let fresh = folder.join(format!(".{name}.new-{}", std::process::id()));
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&fresh);
    })?;
    File::open(folder)?.sync_all()
}

/// One value in one JSON file, written with [`write_atomic`]. The file is `{"format": N, "value": ...}`.
#[derive(Debug)]
pub struct Store<T> {
    path: PathBuf,
    format: u32,
    value: T,
}

/// Why a state file can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file couldn't be read.
    #[error("cannot read the state file {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder isn't there and couldn't be made.
    #[error("cannot make the folder {}: {source}; make it by hand, run the VRA as root, or name another in the configuration", path.display())]
    Folder {
        /// Which folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file couldn't be written: the change was not made.
    #[error("cannot write the state file {}: {source}; make space or repair the file system that it is on", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file isn't what this program writes.
    #[error("the state file {} is damaged: {source}; restore it from a backup, or move it away to start empty", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where and how.
        source: serde_json::Error,
    },
    /// The file was written by a newer version.
    #[error("the state file {} has format {found}, this version knows up to {known}; run the version that wrote it, or a newer one", path.display())]
    Newer {
        /// Which file.
        path: PathBuf,
        /// The file's format.
        found: u32,
        /// The newest known one.
        known: u32,
    },
}

#[derive(Serialize)]
struct Out<'a, T> {
    format: u32,
    value: &'a T,
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

#[derive(Deserialize)]
struct In<T> {
    value: T,
}

impl<T: Serialize + DeserializeOwned + Clone> Store<T> {
    /// Reads a file; `initial` where there is none yet (it isn't written until the first change).
    ///
    /// # Errors
    /// [`StoreError::Read`], [`StoreError::Damaged`], [`StoreError::Newer`].
    pub fn open(path: &Path, format: u32, initial: T) -> Result<Self, StoreError> {
        let damaged = |source| StoreError::Damaged { path: path.to_owned(), source };
        let value = match std::fs::read(path) {
            Ok(bytes) => {
                let found: Format = serde_json::from_slice(&bytes).map_err(damaged)?;
                if found.format > format {
                    return Err(StoreError::Newer {
                        path: path.to_owned(),
                        found: found.format,
                        known: format,
                    });
                }
                let content: In<T> = serde_json::from_slice(&bytes).map_err(damaged)?;
                content.value
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => initial,
            Err(source) => return Err(StoreError::Read { path: path.to_owned(), source }),
        };
        Ok(Self { path: path.to_owned(), format, value })
    }

    /// The value as it is on disk.
    pub fn get(&self) -> &T {
        &self.value
    }

    /// Changes the value, on disk first.
    ///
    /// # Errors
    /// [`StoreError::Write`]; the value is then unchanged in memory.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> Result<R, StoreError> {
        let mut next = self.value.clone();
        let result = change(&mut next);
        let write = |source| StoreError::Write { path: self.path.clone(), source };
        let bytes = serde_json::to_vec_pretty(&Out { format: self.format, value: &next })
            .map_err(|error| write(error.into()))?;
        write_atomic(&self.path, &bytes, 0o600).map_err(write)?;
        self.value = next;
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("daemon-store-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("temporary folder");
        folder
    }

    #[test]
    fn a_change_is_on_disk_before_it_is_seen_and_a_failed_one_is_not_seen() {
        let folder = folder("change");
        let path = folder.join("state.json");
        let mut store = Store::open(&path, 1, vec![1_u32]).expect("new");
        store.update(|value| value.push(2)).expect("write");
        assert_eq!(Store::open(&path, 1, Vec::<u32>::new()).expect("again").get(), &[1, 2]);
        std::fs::remove_dir_all(&folder).expect("remove");
        let error = store.update(|value| value.push(3)).expect_err("no folder");
        assert!(matches!(error, StoreError::Write { .. }), "{error}");
        assert_eq!(store.get(), &[1, 2]);
    }

    #[test]
    fn damaged_and_newer_files_are_named() {
        let folder = folder("bad");
        let path = folder.join("state.json");
        std::fs::write(&path, b"{\"format\":1,").expect("write");
        let error = Store::open(&path, 1, 0_u32).expect_err("damaged").to_string();
        assert!(error.contains("state.json is damaged"), "{error}");
        std::fs::write(&path, b"{\"format\":9,\"value\":{\"of\":\"the future\"}}").expect("write");
        let error = Store::open(&path, 1, 0_u32).expect_err("newer").to_string();
        assert!(error.contains("has format 9, this version knows up to 1"), "{error}");
        std::fs::remove_dir_all(&folder).expect("remove");
    }
}
