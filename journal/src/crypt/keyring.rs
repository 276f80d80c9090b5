//! A journal's own keys: made, wrapped, opened, and turned into the keys of its segments.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::site_key::derive;
use super::{
    Cipher, KeyError, NoRandom, SALT_BYTES, SegmentKey, SiteKey, SiteKeyId, SiteKeys, WRAPPED_KEY_BYTES,
    WrappedKey, Xts,
};
use crate::format::SegmentHeader;

/// A journal's key, in bytes.
const KEY_BYTES: usize = 32;
/// Ciphertext and tag of a wrapped key, in bytes.
const SEALED_BYTES: usize = KEY_BYTES + 16;

/// What an opening needs of encryption: the site's keys, and where salts come from. Cheap to clone; by default there is no key.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    site: SiteKeys,
    /// The next opening's salt, if they aren't random.
    seeded: Option<Arc<AtomicU64>>,
}

impl Keys {
    /// These, with random salts.
    pub fn new(site: SiteKeys) -> Self {
        Self { site, seeded: None }
    }

    /// These, with salts that follow from a seed: for simulations.
    pub fn seeded(site: SiteKeys, seed: u64) -> Self {
        Self { site, seeded: Some(Arc::new(AtomicU64::new(seed))) }
    }

    /// The site's keys.
    pub fn site(&self) -> &SiteKeys {
        &self.site
    }

    /// The number that an opening's salts begin with: no other opening has it.
    pub(crate) fn opening_salt(&self) -> u64 {
        let seeded = self.seeded.as_ref().map(|next| next.fetch_add(1, Ordering::Relaxed));
        seeded.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0)
    }
}

/// Random bytes for a new key of a journal.
#[derive(Clone)]
pub struct NewKey {
    id: Uuid,
    secret: Zeroizing<[u8; KEY_BYTES]>,
    nonce: [u8; NONCE_LEN],
}

impl NewKey {
    /// From the system's random numbers.
    ///
    /// # Errors
    /// It gives none.
    pub fn random() -> Result<Self, NoRandom> {
        let mut new =
            Self { id: Uuid::new_v4(), secret: Zeroizing::new([0; KEY_BYTES]), nonce: [0; NONCE_LEN] };
        let random = SystemRandom::new();
        random.fill(&mut *new.secret).map_err(|_| NoRandom)?;
        random.fill(&mut new.nonce).map_err(|_| NoRandom)?;
        Ok(new)
    }

    /// From a seed: for simulations.
    pub fn seeded(seed: u64) -> Self {
        let mut bytes = [0; 16 + KEY_BYTES + NONCE_LEN];
        derive(&seed.to_le_bytes(), &[], &[b"seeded"], &mut bytes);
        let (id, rest) = bytes.split_at(16);
        let (secret, nonce) = rest.split_at(KEY_BYTES);
        let mut new = Self { id: Uuid::nil(), secret: Zeroizing::new([0; KEY_BYTES]), nonce: [0; NONCE_LEN] };
        new.id = Uuid::from_slice(id).expect("16 bytes");
        new.secret.copy_from_slice(secret);
        new.nonce.copy_from_slice(nonce);
        new
    }

    /// As it lies in the journal's file.
    pub fn wrap(&self, journal_id: Uuid, by: &SiteKey) -> WrappedKey {
        let mut sealed = Zeroizing::new([0; SEALED_BYTES]);
        let (ciphertext, tag) = sealed.split_at_mut(KEY_BYTES);
        ciphertext.copy_from_slice(&*self.secret);
        let nonce = Nonce::assume_unique_for_key(self.nonce);
        let sealing =
            wrapping_key(by).seal_in_place_separate_tag(nonce, associated(journal_id, self.id), ciphertext);
        tag.copy_from_slice(sealing.expect("32 bytes are not too long").as_ref());
        let mut bytes = [0; WRAPPED_KEY_BYTES];
        bytes[..SiteKeyId::LEN_BYTES].copy_from_slice(&by.id().0);
        bytes[NONCE_AT..SEALED_AT].copy_from_slice(&self.nonce);
        bytes[SEALED_AT..SEALED_AT + SEALED_BYTES].copy_from_slice(&*sealed);
        WrappedKey { key_id: self.id, bytes }
    }
}

/// Where the nonce is in a wrapped key.
const NONCE_AT: usize = SiteKeyId::LEN_BYTES;
/// Where ciphertext and tag are.
const SEALED_AT: usize = NONCE_AT + NONCE_LEN;

/// The key that wraps is not the site key itself, which has other uses too.
fn wrapping_key(site: &SiteKey) -> LessSafeKey {
    let mut key = Zeroizing::new([0; 32]);
    derive(site.secret(), &[], &[b"holdfast journal keys 1"], &mut *key);
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*key).expect("32 bytes are AES-256's length"))
}

fn associated(journal_id: Uuid, key_id: Uuid) -> Aad<[u8; 32]> {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(journal_id.as_bytes());
    bytes[16..].copy_from_slice(key_id.as_bytes());
    Aad::from(bytes)
}

/// The keys of one journal, opened as they are met. Cheap to clone.
#[derive(Clone)]
pub struct Keyring(Arc<Inner>);

struct Inner {
    journal_id: Uuid,
    site: RwLock<SiteKeys>,
    opened: Mutex<BTreeMap<Uuid, Zeroizing<[u8; KEY_BYTES]>>>,
}

impl Keyring {
    /// Of a journal whose keys these site keys open.
    pub fn new(journal_id: Uuid, site: SiteKeys) -> Self {
        Self(Arc::new(Inner { journal_id, site: RwLock::new(site), opened: Mutex::default() }))
    }

    /// Other site keys. What was opened with the former ones stays open.
    pub fn set_site(&self, site: SiteKeys) {
        *self.0.site.write().unwrap_or_else(PoisonError::into_inner) = site;
    }

    /// What reads and writes a segment.
    ///
    /// # Errors
    /// Its key can't be opened here.
    pub fn cipher(&self, header: &SegmentHeader) -> Result<Cipher, KeyError> {
        let Some(SegmentKey { key, salt }) = &header.encryption else { return Ok(Cipher::plain()) };
        let secret = self.open(key)?;
        // Neither slot nor opening: a copy of a segment that an opening makes is the same bytes.
        let place = [&b"holdfast segment 1"[..], self.0.journal_id.as_bytes(), &header.number.to_le_bytes()];
        Ok(cipher(&secret, salt, &place))
    }

    /// What reads and writes another file of the journal's VM, which is named by `purpose` and a salt of its own.
    ///
    /// # Errors
    /// The key can't be opened here.
    pub fn cipher_of(&self, key: &SegmentKey, purpose: &[u8]) -> Result<Cipher, KeyError> {
        let secret = self.open(&key.key)?;
        Ok(cipher(&secret, &key.salt, &[b"holdfast file 1", self.0.journal_id.as_bytes(), purpose]))
    }

    /// Whether a key can be opened.
    ///
    /// # Errors
    /// It can't.
    pub fn check(&self, key: &WrappedKey) -> Result<(), KeyError> {
        self.open(key).map(drop)
    }

    fn open(&self, key: &WrappedKey) -> Result<Zeroizing<[u8; KEY_BYTES]>, KeyError> {
        let mut opened = self.0.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(secret) = opened.get(&key.key_id) {
            return Ok(secret.clone());
        }
        let site = self.0.site.read().unwrap_or_else(PoisonError::into_inner);
        let site_key = site.find(key.site_key_id()).ok_or(KeyError::Missing(key.site_key_id()))?;
        let mut sealed = Zeroizing::new([0; SEALED_BYTES]);
        sealed.copy_from_slice(&key.bytes[SEALED_AT..SEALED_AT + SEALED_BYTES]);
        let nonce =
            Nonce::try_assume_unique_for_key(&key.bytes[NONCE_AT..SEALED_AT]).expect("as long as a nonce is");
        let associated = associated(self.0.journal_id, key.key_id);
        let plain = wrapping_key(site_key).open_in_place(nonce, associated, &mut *sealed);
        let plain = plain.map_err(|_| KeyError::Damaged(key.key_id))?;
        let mut secret = Zeroizing::new([0; KEY_BYTES]);
        secret.copy_from_slice(plain);
        opened.insert(key.key_id, secret.clone());
        Ok(secret)
    }
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring")
            .field("journal_id", &self.0.journal_id)
            .field("site", &self.0.site.read())
            .finish()
    }
}

fn cipher(secret: &[u8; KEY_BYTES], salt: &[u8; SALT_BYTES], info: &[&[u8]]) -> Cipher {
    let mut key = Zeroizing::new([0; Xts::KEY_BYTES]);
    derive(secret, salt, info, &mut *key);
    Cipher::of(Xts::new(&key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site_key(byte: u8) -> SiteKey {
        SiteKey::new(Zeroizing::new([byte; 32]))
    }

    #[test]
    fn only_its_site_key_and_journal_open_a_key() {
        let (journal_id, site) = (Uuid::from_u128(1), site_key(1));
        let wrapped = NewKey::random().expect("random").wrap(journal_id, &site);
        let keyring =
            |journal: u128, keys: Vec<SiteKey>| Keyring::new(Uuid::from_u128(journal), SiteKeys::new(keys));
        assert_eq!(keyring(1, vec![site_key(2), site.clone()]).check(&wrapped), Ok(()));
        assert_eq!(keyring(1, vec![site_key(2)]).check(&wrapped), Err(KeyError::Missing(site.id())));
        assert_eq!(keyring(2, vec![site.clone()]).check(&wrapped), Err(KeyError::Damaged(wrapped.key_id)));
        for at in [NONCE_AT, SEALED_AT, SEALED_AT + KEY_BYTES] {
            let mut changed = wrapped;
            changed.bytes[at] ^= 1;
            assert_eq!(
                keyring(1, vec![site.clone()]).check(&changed),
                Err(KeyError::Damaged(wrapped.key_id))
            );
        }
    }

    #[test]
    fn segments_have_keys_of_their_own() {
        let (journal_id, site) = (Uuid::from_u128(1), site_key(1));
        let key = NewKey::seeded(5).wrap(journal_id, &site);
        let keyring = Keyring::new(journal_id, SiteKeys::new(vec![site]));
        let header = |number, open_count, salt| SegmentHeader {
            number,
            open_count,
            encryption: Some(SegmentKey { key, salt: [salt; SALT_BYTES] }),
            ..SegmentHeader::default()
        };
        let encrypted = |header: &SegmentHeader| {
            let mut bytes = vec![0; 512];
            keyring.cipher(header).expect("its key is there").encrypt(4096, &mut bytes);
            bytes
        };
        let headers = [header(1, 1, 0), header(2, 1, 0), header(1, 1, 1)];
        let all: std::collections::BTreeSet<Vec<u8>> = headers.iter().map(encrypted).collect();
        assert_eq!(all.len(), headers.len(), "no two are alike");
        assert_eq!(encrypted(&headers[0]), encrypted(&header(1, 2, 0)), "a copy is the same");
    }
}
