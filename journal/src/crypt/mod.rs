//! Encryption at rest. Batches and footers of a segment lie in the file under a key of that segment alone; what the key comes from is
//! in the segment's first page, wrapped by a key of the site. Nothing else of the file is encrypted: see `docs/journal-format.md`.

mod cipher;
mod keyring;
mod site_key;
mod xts;

pub use cipher::{Cipher, Ciphers};
pub use keyring::{Keyring, Keys, NewKey};
pub use site_key::{KeyFileError, SiteKey, SiteKeyId, SiteKeys};
pub use xts::{SECTOR_BYTES, Xts};

use uuid::Uuid;

/// Length of a wrapped key, in bytes.
pub const WRAPPED_KEY_BYTES: usize = 96;
/// Length of a segment's salt, in bytes.
pub const SALT_BYTES: usize = 16;

/// A journal's key as it lies in the file: a site key opens it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct WrappedKey {
    /// Names the key within the journal.
    pub key_id: Uuid,
    /// Site key's id, nonce, ciphertext and tag; zeroes behind.
    pub bytes: [u8; WRAPPED_KEY_BYTES],
}

impl WrappedKey {
    /// The site key that opens it.
    pub fn site_key_id(&self) -> SiteKeyId {
        let mut id = [0; SiteKeyId::LEN_BYTES];
        id.copy_from_slice(&self.bytes[..SiteKeyId::LEN_BYTES]);
        SiteKeyId(id)
    }
}

impl std::fmt::Debug for WrappedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WrappedKey({} by site key {})", self.key_id, self.site_key_id())
    }
}

/// What a segment's key is made from, in its first and last page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentKey {
    /// The journal's key when the segment began.
    pub key: WrappedKey,
    /// Unlike that of any other segment under the same key.
    pub salt: [u8; SALT_BYTES],
}

/// Whether the journal encrypts what it writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encryption {
    /// It never did.
    #[default]
    Never,
    /// It did, and some segments may still be encrypted.
    Off,
    /// Segments are begun with this key.
    On(WrappedKey),
}

/// A key could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gives no random numbers for a key")]
pub struct NoRandom;

/// Why what is encrypted cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The site key isn't there.
    #[error("it is encrypted, and site key {0} is not known here: give that key")]
    Missing(SiteKeyId),
    /// The wrapped key was changed, or another journal's was put there.
    #[error("key {0} of the journal is damaged: the site key doesn't open it")]
    Damaged(Uuid),
}
