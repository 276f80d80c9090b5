//! Passwords of inventory sources, sealed with a key that is not in the database: who has only one of the two has no password.
//!
//! A sealed password is the hex of a random nonce (12 bytes) and what AES-256-GCM makes of the text. The source's name is bound to it, so
//! that one row's password can't be moved to another.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use vra::config::{SecretFileError, read_secret, write_atomic};
use zeroize::Zeroizing;

/// First line of the key's file, before the key.
const FILE_PREFIX: &str = "holdfast-credential-key-1:";
const KEY_BYTES: usize = 32;

/// The key of all passwords.
pub struct CredentialKey {
    path: PathBuf,
    key: LessSafeKey,
}

/// Why passwords can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The key's file can't be read: others may, or the system refuses.
    #[error("the manager cannot use the key of its sources' passwords; run it as root or as its own user")]
    Secret(#[source] SecretFileError),
    /// The file could not be written.
    #[error("cannot write {path}: {source}; run this as root or as the manager's user")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It holds no key.
    #[error(
        "{path} holds no key: restore it from a backup, or remove it and give the sources their passwords again"
    )]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// The system has no random numbers.
    #[error("the system has no random numbers")]
    NoRandom,
    /// The password was sealed with another key, for another source, or is damaged.
    #[error(
        "the password of source {from} cannot be opened with {path}: give it again with `zvm source edit {from} --password-file FILE`"
    )]
    NotOpened {
        /// The source.
        from: String,
        /// The key's file.
        path: PathBuf,
    },
}

impl CredentialKey {
    /// Reads the key's file; makes it where there is none.
    pub fn open(path: &Path) -> Result<Self, CredentialError> {
        // Two that make it at once would seal with two keys.
        static MAKING: Mutex<()> = Mutex::new(());
        let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        let text = match read_secret(path) {
            Ok(text) => text,
            Err(error) if error.is_not_found() => Self::create(path)?,
            Err(error) => return Err(CredentialError::Secret(error)),
        };
        let no_key = || CredentialError::NoKey { path: path.into() };
        let hex = text.trim().strip_prefix(FILE_PREFIX).ok_or_else(no_key)?;
        let bytes = from_hex(hex).filter(|bytes| bytes.len() == KEY_BYTES).ok_or_else(no_key)?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes).map_err(|_| no_key())?;
        Ok(Self { path: path.into(), key: LessSafeKey::new(key) })
    }

    fn create(path: &Path) -> Result<Zeroizing<String>, CredentialError> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        fill_random(&mut *key)?;
        let text = Zeroizing::new(format!("{FILE_PREFIX}{}\n", *Zeroizing::new(hex(&*key))));
        write_atomic(path, text.as_bytes(), 0o600)
            .map_err(|source| CredentialError::Write { path: path.into(), source })?;
        Ok(text)
    }

    /// Seals the password of a source.
    pub fn seal(&self, source: &str, password: &str) -> Result<String, CredentialError> {
        let mut nonce = [0; NONCE_LEN];
        fill_random(&mut nonce)?;
        let mut bytes = password.as_bytes().to_vec();
        let aad = Aad::from(source.as_bytes());
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut bytes)
            .map_err(|_| CredentialError::NoRandom)?;
        Ok(hex(&nonce) + &hex(&bytes))
    }

    /// Opens the sealed password of a source.
    pub fn unseal(&self, source: &str, sealed: &str) -> Result<Zeroizing<String>, CredentialError> {
        let not_opened = || CredentialError::NotOpened { from: source.into(), path: self.path.clone() };
        let mut bytes = from_hex(sealed).ok_or_else(not_opened)?;
        let (nonce, sealed) = bytes.split_first_chunk_mut::<NONCE_LEN>().ok_or_else(not_opened)?;
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened =
            self.key.open_in_place(nonce, Aad::from(source.as_bytes()), sealed).map_err(|_| not_opened())?;
        let text = std::str::from_utf8(opened).map_err(|_| not_opened())?;
        Ok(Zeroizing::new(text.to_owned()))
    }
}

impl std::fmt::Debug for CredentialKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CredentialKey").field("path", &self.path).finish_non_exhaustive()
    }
}

fn fill_random(bytes: &mut [u8]) -> Result<(), CredentialError> {
    use ring::rand::{SecureRandom, SystemRandom};
    SystemRandom::new().fill(bytes).map_err(|_| CredentialError::NoRandom)
}

fn hex(bytes: &[u8]) -> String {
    vra::api::enroll::hex(bytes)
}

fn from_hex(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| (byte as char).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes: Option<Vec<u8>> =
        digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect();
    bytes.map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_opens_only_with_its_key_and_for_its_source() {
        let folder = std::env::temp_dir().join(format!("credentials-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("credential-key");
        let key = CredentialKey::open(&path).unwrap();
        let sealed = key.seal("vc", "hunter2 ü").unwrap();
        assert!(!sealed.contains("hunter2") && sealed != key.seal("vc", "hunter2 ü").unwrap());
        let again = CredentialKey::open(&path).unwrap();
        assert_eq!(*again.unseal("vc", &sealed).unwrap(), "hunter2 ü");
        let mut damaged = sealed.clone();
        damaged.replace_range(30..31, if &damaged[30..31] == "0" { "1" } else { "0" });
        for (source, sealed) in
            [("other", sealed.as_str()), ("vc", &damaged), ("vc", "zz"), ("vc", "00"), ("vc", "é")]
        {
            assert!(
                matches!(again.unseal(source, sealed), Err(CredentialError::NotOpened { .. })),
                "{sealed}"
            );
        }
        std::fs::remove_file(&path).unwrap();
        let other = CredentialKey::open(&path).unwrap();
        assert!(other.unseal("vc", &sealed).is_err(), "another key");
        assert!(!format!("{other:?}").contains("key:"));
        std::fs::write(&path, "nothing").unwrap();
        assert!(matches!(CredentialKey::open(&path), Err(CredentialError::NoKey { .. })));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
