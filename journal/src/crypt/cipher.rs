//! What reads and writes the places of encrypted segments.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::NoRandom;
use crate::format::{FIRST_SLOT_OFFSET_BYTES, PAGE_BYTES, slot_offset_bytes};

use super::xts::{SECTOR_BYTES, Xts};

/// A segment's key, or none: then bytes stay as they are. Cheap to clone.
#[derive(Clone, Default)]
pub struct Cipher(Option<Arc<Xts>>);

impl Cipher {
    /// Of a segment that isn't encrypted.
    pub fn plain() -> Self {
        Self(None)
    }

    pub(super) fn of(xts: Xts) -> Self {
        Self(Some(Arc::new(xts)))
    }

    /// With a random key that nobody keeps: for a file that ends with the process.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn passing() -> Result<Self, NoRandom> {
        let mut key = Zeroizing::new([0; Xts::KEY_BYTES]);
        SystemRandom::new().fill(&mut *key).map_err(|_| NoRandom)?;
        Ok(Self::of(Xts::new(&key)))
    }

    /// Whether bytes stay as they are.
    pub fn is_plain(&self) -> bool {
        self.0.is_none()
    }

    /// Encrypts in place what goes to `place_bytes` from the slot's start. Whole sectors.
    pub fn encrypt(&self, place_bytes: u64, bytes: &mut [u8]) {
        if let Some(xts) = &self.0 {
            xts.encrypt(place_bytes / SECTOR_BYTES as u64, bytes);
        }
    }

    /// Decrypts in place what was read at `place_bytes` from the slot's start. Whole sectors.
    pub fn decrypt(&self, place_bytes: u64, bytes: &mut [u8]) {
        if let Some(xts) = &self.0 {
            xts.decrypt(place_bytes / SECTOR_BYTES as u64, bytes);
        }
    }

    /// Encrypts in place what goes to the slot's start; its first page never is encrypted.
    pub fn encrypt_slot(&self, slot: &mut [u8]) {
        if let Some(batches) = slot.get_mut(PAGE_BYTES..) {
            self.encrypt(PAGE_BYTES as u64, batches);
        }
    }

    /// Decrypts in place what was read from the slot's start on; its first page never is encrypted.
    pub fn decrypt_slot(&self, slot: &mut [u8]) {
        if let Some(batches) = slot.get_mut(PAGE_BYTES..) {
            self.decrypt(PAGE_BYTES as u64, batches);
        }
    }
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_plain() { "Cipher(plain)" } else { "Cipher(XTS)" })
    }
}

/// The ciphers of a journal's slots: for reads that know a place in the file alone. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Ciphers {
    slot_len_bytes: u64,
    /// Those of encrypted slots.
    by_slot: Arc<BTreeMap<u32, Cipher>>,
}

impl Ciphers {
    /// Those of these slots.
    pub fn new<'a>(slot_len_bytes: u64, slots: impl IntoIterator<Item = (u32, &'a Cipher)>) -> Self {
        let slots = slots.into_iter().filter(|(_, cipher)| !cipher.is_plain());
        let by_slot = slots.map(|(slot, cipher)| (slot, cipher.clone())).collect();
        Self { slot_len_bytes, by_slot: Arc::new(by_slot) }
    }

    /// Whether bytes stay as they are.
    pub fn are_plain(&self) -> bool {
        self.by_slot.is_empty()
    }

    /// Decrypts in place what was read at `offset_bytes` of the file: whole sectors, of as many slots as they reach over.
    pub fn decrypt(&self, offset_bytes: u64, bytes: &mut [u8]) {
        if self.are_plain() {
            return;
        }
        let mut done = 0;
        while done < bytes.len() {
            let at = offset_bytes + done as u64;
            let (slot, range) = self.slot_at(at);
            let len_bytes = (range.end - at).min((bytes.len() - done) as u64) as usize;
            if let Some(cipher) = slot.and_then(|slot| self.by_slot.get(&slot)) {
                cipher.decrypt(at - range.start, &mut bytes[done..done + len_bytes]);
            }
            done += len_bytes;
        }
    }

    /// The slot at a place, if there is one, and where it or what is before all slots lies.
    fn slot_at(&self, offset_bytes: u64) -> (Option<u32>, Range<u64>) {
        let Some(in_slots) = offset_bytes.checked_sub(FIRST_SLOT_OFFSET_BYTES) else {
            return (None, 0..FIRST_SLOT_OFFSET_BYTES);
        };
        let slot = u32::try_from(in_slots / self.slot_len_bytes).unwrap_or(u32::MAX);
        let begin = slot_offset_bytes(slot, self.slot_len_bytes);
        (Some(slot), begin..begin + self.slot_len_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_over_slots_takes_the_key_of_each() {
        let slot_len_bytes = 64 << 10;
        let (first, third) = (Cipher::of(Xts::new(&[1; 64])), Cipher::of(Xts::new(&[3; 64])));
        let plain: Vec<u8> = (0..3 * slot_len_bytes as usize).map(|at| (at >> 4) as u8).collect();
        let mut file = plain.clone();
        let len_bytes = slot_len_bytes as usize;
        first.encrypt(0, &mut file[..len_bytes]);
        third.encrypt(0, &mut file[2 * len_bytes..]);
        let unkeyed = Cipher::plain();
        let ciphers = Ciphers::new(slot_len_bytes, [(0, &first), (1, &unkeyed), (2, &third)]);
        let part = len_bytes - 1024..2 * len_bytes + 512;
        ciphers.decrypt(FIRST_SLOT_OFFSET_BYTES + part.start as u64, &mut file[part.clone()]);
        assert!(file[part.clone()] == plain[part]);
    }
}
