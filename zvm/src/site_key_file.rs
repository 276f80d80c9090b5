//! The site's keys, which wrap the keys of encrypted journals: a file in the manager's state folder, in the form that `vra-journal
//! --key-file` reads.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use vra::api::site_keys::{KeyFileError, NoRandom, SiteKey, SiteKeyId, SiteKeys};
use vra::api::{MAX_SITE_KEYS, SetSiteKeys, SiteKeyLine};
use vra::config::{SecretFileError, SiteKeyFileError, read_site_keys};
use zeroize::Zeroizing;

/// The keys and their file. Whoever has the file and the datastores has the data; without it encrypted journals are lost.
#[derive(Debug)]
pub struct SiteKeyFile {
    path: PathBuf,
    keys: RwLock<SiteKeys>,
}

/// What the database says of the keys that the file should have.
#[derive(Debug, Clone, Default)]
pub struct NotedSiteKeys {
    /// Names of keys that the file had.
    pub ids: BTreeSet<String>,
    /// There are groups whose journals are encrypted.
    pub are_in_use: bool,
}

/// What to do about keys that the file should have and lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LostSiteKeys {
    /// Begin nothing: the VRAs may have the only copies.
    Refuse,
    /// Go on without: what they wrapped can't be read any more.
    Forget,
}

/// Why there are no site keys.
#[derive(Debug, thiserror::Error)]
pub enum SiteKeyError {
    /// The file can't be read: others may, or the system refuses.
    #[error("the manager cannot use its site keys; run it as root or as its own user")]
    Secret(#[source] SecretFileError),
    /// The file could not be written.
    #[error("cannot write {path}: {source}; run this as root or as the manager's user")]
    Write {
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
    /// It is gone, or lacks keys that it had.
    #[error(
        "{path} {}: put its newest backup there, with every line that any copy of it has (in any order below the first). VRAs keep the keys in memory until they are restarted, so leave them \
         running. If the keys are lost for good, `zvm serve --forget-lost-site-keys` goes on without them; what they encrypted can't be read again",
        lost(ids)
    )]
    Lost {
        /// The file.
        path: PathBuf,
        /// The names of the keys; none if only groups that use some are known.
        ids: Vec<String>,
    },
    /// The system has no random numbers.
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
    /// There is no room for another one.
    #[error(
        "{path} has {MAX_SITE_KEYS} keys already: stop the manager, keep a copy of the file, take those out that no history needs any more, and run `zvm serve --forget-lost-site-keys` once"
    )]
    TooMany {
        /// The file.
        path: PathBuf,
    },
}

impl SiteKeyFile {
    /// Reads the file; makes a key where there never was one.
    ///
    /// # Errors
    /// [`SiteKeyError`].
    pub fn open(path: &Path, noted: &NotedSiteKeys, lost: LostSiteKeys) -> Result<Self, SiteKeyError> {
        let keys = match read_site_keys(path) {
            Ok(keys) => keys,
            Err(SiteKeyFileError::Secret(error)) if error.is_not_found() => SiteKeys::default(),
            Err(SiteKeyFileError::Secret(error)) => return Err(SiteKeyError::Secret(error)),
            Err(SiteKeyFileError::NotKeys { path, source }) => {
                return Err(SiteKeyError::Damaged { path, source });
            }
        };
        let found: BTreeSet<String> = keys.iter().map(|key| key.id().to_string()).collect();
        let ids: Vec<String> = noted.ids.difference(&found).cloned().collect();
        if !ids.is_empty() || keys.is_empty() && noted.are_in_use {
            if lost == LostSiteKeys::Refuse {
                return Err(SiteKeyError::Lost { path: path.into(), ids });
            }
            tracing::warn!(?ids, "site keys are lost; the manager goes on without them");
        }
        let is_new = keys.is_empty();
        let file = Self { path: path.into(), keys: RwLock::new(keys) };
        if is_new {
            file.rotate()?;
        }
        Ok(file)
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
            .map_err(|source| SiteKeyError::Write { path: self.path.clone(), source })?;
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

fn lost(ids: &[String]) -> String {
    match ids {
        [] => "is missing, and there are groups with encrypted journals".to_owned(),
        ids => format!("lacks site keys that it had, {}", ids.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_made_kept_and_turned() {
        let folder = std::env::temp_dir().join(format!("site-keys-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("site-keys");
        let open = |noted: &[String]| {
            let noted = NotedSiteKeys { ids: noted.iter().cloned().collect(), are_in_use: false };
            SiteKeyFile::open(&path, &noted, LostSiteKeys::Refuse)
        };
        let first = open(&[]).unwrap().ids();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let file = open(&first).unwrap();
        assert_eq!(file.ids(), first);
        file.rotate().unwrap();
        let ids = file.ids();
        assert_eq!((ids.len(), &ids[1]), (2, &first[0]), "the new one comes first");
        assert_eq!(open(&first).unwrap().ids(), ids, "one that the database doesn't know yet");
        assert!(!format!("{:?}", file.request()).contains("holdfast-site-key"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let exposed = open(&ids);
        assert!(matches!(exposed, Err(SiteKeyError::Secret(SecretFileError::Exposed { mode: 0o640, .. }))));
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_file_that_is_lost_or_too_old_is_not_replaced_by_a_new_key() {
        let folder = std::env::temp_dir().join(format!("site-keys-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("site-keys");
        let open = |noted: &NotedSiteKeys, lost| SiteKeyFile::open(&path, noted, lost);
        let file = open(&NotedSiteKeys::default(), LostSiteKeys::Refuse).unwrap();
        let older = std::fs::read(&path).unwrap();
        file.rotate().unwrap();
        let noted = NotedSiteKeys { ids: file.ids().into_iter().collect(), are_in_use: true };
        let newest = file.ids()[0].clone();

        vra::config::write_atomic(&path, &older, 0o600).unwrap();
        let error = open(&noted, LostSiteKeys::Refuse).unwrap_err();
        assert!(matches!(&error, SiteKeyError::Lost { ids, .. } if *ids == [newest.clone()]), "{error}");
        assert!(error.to_string().contains(&newest) && error.to_string().contains("--forget-lost-site-keys"));
        assert_eq!(std::fs::read(&path).unwrap(), older, "it is as it was");

        std::fs::remove_file(&path).unwrap();
        let unknown = NotedSiteKeys { are_in_use: true, ..NotedSiteKeys::default() };
        for noted in [&noted, &unknown] {
            let error = open(noted, LostSiteKeys::Refuse).unwrap_err();
            assert!(matches!(error, SiteKeyError::Lost { .. }), "{error}");
            assert!(!path.exists(), "no new key");
        }
        let forgotten = open(&noted, LostSiteKeys::Forget).unwrap();
        assert!(!noted.ids.contains(&forgotten.ids()[0]));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
