//! The site's keys, which wrap the keys of encrypted journals: a file in the manager's state folder, in the form that `vra-journal
//! --key-file` reads.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use vra::api::site_keys::{KeyFileError, NoRandom, SiteKey, SiteKeyId, SiteKeys};
use vra::api::{MAX_SITE_KEYS, SetSiteKeys, SiteKeyLine};
use zeroize::Zeroizing;

/// The keys and their file. Whoever has the file and the datastores has the data; without it encrypted journals are lost.
#[derive(Debug)]
pub struct SiteKeyFile {
    path: PathBuf,
    keys: RwLock<SiteKeys>,
}

/// Why there are no site keys.
#[derive(Debug, thiserror::Error)]
pub enum SiteKeyError {
    /// Others may read the file.
    #[error(
        "{path} can be read by others (mode {mode:03o}): run `chmod 600 {path}`, and `zvm site-key rotate` if others use this host"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file could not be read or written.
    #[error("cannot access {path}: {source}; run this as root or as the manager's user")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It does not hold keys.
    #[error(
        "{path} is damaged: {source}; restore it from a backup, encrypted journals cannot be read without it"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: KeyFileError,
    },
    /// The system has no random numbers.
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
    /// There is no room for another one.
    #[error(
        "{path} has {MAX_SITE_KEYS} keys already: take those out that no history needs any more, and restart the manager"
    )]
    TooMany {
        /// The file.
        path: PathBuf,
    },
}

impl SiteKeyFile {
    /// Reads the file; makes a key where there is none.
    ///
    /// # Errors
    /// [`SiteKeyError`].
    pub fn open(path: &Path) -> Result<Self, SiteKeyError> {
        let file = |source| SiteKeyError::File { path: path.into(), source };
        let mode = match std::fs::metadata(path) {
            Ok(metadata) => metadata.permissions().mode() & 0o777,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let made = Self { path: path.into(), keys: RwLock::default() };
                made.rotate()?;
                return Ok(made);
            }
            Err(error) => return Err(file(error)),
        };
        if mode & 0o077 != 0 {
            return Err(SiteKeyError::Exposed { path: path.into(), mode });
        }
        let text = Zeroizing::new(std::fs::read_to_string(path).map_err(file)?);
        let keys =
            SiteKeys::parse(&text).map_err(|source| SiteKeyError::Damaged { path: path.into(), source })?;
        Ok(Self { path: path.into(), keys: RwLock::new(keys) })
    }

    /// Makes a new key, which wraps from now on; the former ones still open what they wrapped.
    ///
    /// # Errors
    /// [`SiteKeyError`]; the keys are as before then.
    pub fn rotate(&self) -> Result<(), SiteKeyError> {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if keys.iter().count() >= MAX_SITE_KEYS {
            return Err(SiteKeyError::TooMany { path: self.path.clone() });
        }
        let new = SiteKey::random()?;
        let next = SiteKeys::new(std::iter::once(new).chain(keys.iter().cloned()).collect());
        let mut text = Zeroizing::new(String::from(
            "# Keys of encrypted journals, the one in use first. Keep a copy away from the datastores: without it they cannot be read.\n",
        ));
        for key in next.iter() {
            text.push_str(&key.to_line());
            text.push('\n');
        }
        vra::config::write_atomic(&self.path, text.as_bytes(), 0o600)
            .map_err(|source| SiteKeyError::File { path: self.path.clone(), source })?;
        *keys = next;
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The keys' names, the one that wraps first.
    pub fn ids(&self) -> Vec<String> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.iter().map(SiteKey::id).map(|id: SiteKeyId| id.to_string()).collect()
    }

    /// For a VRA that keeps encrypted journals.
    pub fn request(&self) -> SetSiteKeys {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        SetSiteKeys { keys: keys.iter().map(|key| SiteKeyLine(key.to_line().to_string())).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_kept_and_turned() {
        let folder = std::env::temp_dir().join(format!("site-keys-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("site-keys");
        let first = SiteKeyFile::open(&path).unwrap().ids();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let file = SiteKeyFile::open(&path).unwrap();
        assert_eq!(file.ids(), first);
        file.rotate().unwrap();
        let ids = file.ids();
        assert_eq!((ids.len(), &ids[1]), (2, &first[0]), "the new one comes first");
        assert_eq!(SiteKeyFile::open(&path).unwrap().ids(), ids);
        assert!(!format!("{:?}", file.request()).contains("holdfast-site-key"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(SiteKeyFile::open(&path), Err(SiteKeyError::Exposed { mode: 0o640, .. })));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
