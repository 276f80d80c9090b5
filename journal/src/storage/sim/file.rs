//! A simulated file: what of it is durable, and what was written since.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;

use super::{Fault, OpKind, SimRng};
use crate::format::PAGE_BYTES;

pub(super) const SECTOR_BYTES: usize = 512;

/// The pages that a range of a file touches.
pub(super) fn pages(offset_bytes: u64, len_bytes: u64) -> Range<u64> {
    let page = PAGE_BYTES as u64;
    offset_bytes / page..(offset_bytes + len_bytes).div_ceil(page)
}

fn page_of(sector: u64) -> u64 {
    sector * SECTOR_BYTES as u64 / PAGE_BYTES as u64
}

#[derive(Clone, Debug, Default)]
pub(super) struct SimFile {
    pub(super) durable: Vec<u8>,
    /// Written and not synced, by sector.
    pub(super) dirty: BTreeMap<u64, Dirty>,
    pub(super) len_bytes: u64,
    /// Pages whose space was given back: they read zeroes, and to write them takes space.
    pub(super) holes: BTreeSet<u64>,
    /// Pages that can't be read until they are written.
    pub(super) broken: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
pub(super) struct Dirty {
    /// A sector's, shared with those of the same write.
    pub(super) data: Bytes,
    pub(super) write: u64,
    pub(super) kind: OpKind,
    /// A sync failed since: no later sync makes it durable.
    pub(super) forgotten: bool,
}

impl SimFile {
    /// How much space it takes, in bytes.
    pub(super) fn used_bytes(&self) -> u64 {
        self.len_bytes - (self.holes.len() * PAGE_BYTES) as u64
    }

    /// How much more space it takes once a range has all of its own, in bytes.
    pub(super) fn lacking_bytes(&self, offset_bytes: u64, len_bytes: u64) -> u64 {
        let grown = (offset_bytes + len_bytes).saturating_sub(self.len_bytes);
        grown + (self.holes.range(pages(offset_bytes, len_bytes)).count() * PAGE_BYTES) as u64
    }

    /// A range has its space.
    pub(super) fn reserve(&mut self, offset_bytes: u64, len_bytes: u64) {
        pages(offset_bytes, len_bytes).for_each(|page| _ = self.holes.remove(&page));
    }

    /// Whether the disk can't give a range back.
    pub(super) fn is_broken(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        self.broken.range(pages(offset_bytes, len_bytes)).next().is_some()
    }

    /// What was written to a sector is lost: if it was given back, it has its content and its space again.
    pub(super) fn undo(&mut self, sector: u64) {
        self.holes.remove(&page_of(sector));
    }

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
        drop(self.holes.split_off(&len_bytes.div_ceil(PAGE_BYTES as u64)));
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
