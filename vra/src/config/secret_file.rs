//! Files with secrets: keys, which nobody but their owner may read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use journal::crypt::{KeyFileError, SiteKeys};
use zeroize::Zeroizing;

/// Why a file with a secret isn't read.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// Others may read it.
    #[error("{} can be read by others (mode {mode:03o}): run `chmod 600 {}`, and make a new secret if others use this host", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The operating system refused.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl SecretFileError {
    /// Whether there is no such file.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Reads a text that is secret; its memory is zeroed when it is dropped.
///
/// # Errors
/// [`SecretFileError`], also if group or others have any right to the file.
pub fn read_secret(path: &Path) -> Result<Zeroizing<String>, SecretFileError> {
    let failed = |source| SecretFileError::File { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(SecretFileError::Exposed { path: path.to_owned(), mode });
    }
    // As long as the file at once: a text that grows would leave parts of itself behind.
    let mut text = Zeroizing::new(String::with_capacity(metadata.len() as usize + 1));
    file.read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

/// Why there are no site keys to be had from a file.
#[derive(Debug, thiserror::Error)]
pub enum SiteKeyFileError {
    /// It isn't read.
    #[error(transparent)]
    Secret(#[from] SecretFileError),
    /// It holds something else.
    #[error("{} is not a file of site keys: give the one that `zvm site-key list` names, or a copy of it", path.display())]
    NotKeys {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: KeyFileError,
    },
}

/// Reads a file of site keys.
///
/// # Errors
/// [`SiteKeyFileError`].
pub fn read_site_keys(path: &Path) -> Result<SiteKeys, SiteKeyFileError> {
    let text = read_secret(path)?;
    SiteKeys::parse(&text).map_err(|source| SiteKeyFileError::NotKeys { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_that_others_can_read_is_refused() {
        let path = std::env::temp_dir().join(format!("holdfast-secret-{}", std::process::id()));
        std::fs::write(&path, "hidden").expect("a file");
        for (mode, is_read) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)]
        {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("its mode");
            match read_secret(&path) {
                Ok(text) => assert!(is_read && *text == "hidden", "{mode:o}"),
                Err(SecretFileError::Exposed { mode: found, .. }) => assert!(!is_read && found == mode),
                Err(error) => panic!("{error}"),
            }
        }
        std::fs::remove_file(&path).expect("removed");
        assert!(read_secret(&path).expect_err("gone").is_not_found());
    }
}
