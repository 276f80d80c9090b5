//! A simulated file: what of it is durable, and what was written since.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::super::Purpose;
use super::{Fault, SimRng};

pub(super) const SECTOR_BYTES: usize = 512;

#[derive(Clone, Debug, Default)]
pub(super) struct SimFile {
    pub(super) durable: Vec<u8>,
    /// Written and not synced, by sector.
    pub(super) dirty: BTreeMap<u64, Dirty>,
    pub(super) len_bytes: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Dirty {
    /// A sector's, shared with those of the same write.
    pub(super) data: Bytes,
    pub(super) write: u64,
    pub(super) purpose: Purpose,
    /// A sync failed since: no later sync makes it durable.
    pub(super) forgotten: bool,
}

impl SimFile {
    /// Copies what is durable as a whole and then the few sectors that aren't: most reads meet none.
    pub(super) fn read(&self, offset_bytes: u64, into: &mut [u8]) {
        let there = self.durable.get(offset_bytes as usize..).unwrap_or_default();
        let count = there.len().min(into.len());
        into[..count].copy_from_slice(&there[..count]);
        into[count..].fill(0);
        let first = offset_bytes / SECTOR_BYTES as u64;
        let end = first + into.len().div_ceil(SECTOR_BYTES) as u64;
        for (sector, dirty) in self.dirty.range(first..end) {
            let chunk = &mut into[(sector - first) as usize * SECTOR_BYTES..];
            let count = chunk.len().min(SECTOR_BYTES);
            chunk[..count].copy_from_slice(&dirty.data[..count]);
        }
    }

    /// Flips bits of a byte; false if it was never written.
    pub(super) fn flip(&mut self, at: u64, bits: u8) -> bool {
        if let Some(dirty) = self.dirty.get_mut(&(at / SECTOR_BYTES as u64)) {
            let mut data = dirty.data.to_vec();
            data[(at % SECTOR_BYTES as u64) as usize] ^= bits;
            dirty.data = data.into();
            return true;
        }
        let Some(byte) = self.durable.get_mut(at as usize) else { return false };
        *byte ^= bits;
        true
    }

    /// What is cut off is gone at once, so that whoever still needs it is found out.
    pub(super) fn truncate(&mut self, len_bytes: u64) {
        self.len_bytes = len_bytes;
        self.durable.truncate(len_bytes as usize);
        drop(self.dirty.split_off(&(len_bytes / SECTOR_BYTES as u64)));
    }

    pub(super) fn sync(&mut self, before_write: u64) {
        let Self { durable, dirty, .. } = self;
        dirty.retain(|sector, dirty| {
            let stays = dirty.forgotten || dirty.write >= before_write;
            if !stays {
                put(durable, *sector, &dirty.data);
            }
            stays
        });
    }
}

pub(super) fn put(durable: &mut Vec<u8>, sector: u64, data: &[u8]) {
    let at = sector as usize * SECTOR_BYTES;
    if durable.len() < at + SECTOR_BYTES {
        durable.resize(at + SECTOR_BYTES, 0);
    }
    durable[at..at + SECTOR_BYTES].copy_from_slice(data);
}

/// What becomes of a write that was not synced.
#[derive(Clone, Copy)]
pub(super) struct Fate {
    pub(super) fault: Fault,
    /// In how many sectors at once it is torn.
    pub(super) granule: u64,
    pub(super) salt: u64,
}

impl Fate {
    pub(super) fn keeps(self, sector: u64) -> bool {
        match self.fault {
            Fault::KeptWrite => true,
            Fault::TornWrite => SimRng::new(self.salt ^ (sector / self.granule)).one_in(2),
            _ => false,
        }
    }
}
