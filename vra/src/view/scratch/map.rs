//! Where each sector is.
//!
//! The data of a scratch is cut in chunks, given to parts of the disk in the order of their first write. An entry of the map says of a chunk of
//! the disk which sectors were written and which read zeroes, so a small write copies nothing; a bit says of a chunk without an entry whether
//! it reads zeroes as a whole. A discarded chunk keeps its place: a read that was planned before may still be on its way there.
//!
//! All of it is in words that a file may be behind ([`Words`]). They are stored in such an order that they are right after each: a process
//! that dies between two of them leaves a map in which only what was not answered yet is old or new.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::format::Shape;
use super::pages::{PageVersion, Pages};
use super::words::Words;
use super::{CHUNK_BYTES, ENTRY_WORDS, SECTOR_BYTES, SECTORS};

/// Where a range of a view's disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::view) enum Place {
    /// Never written: as it was.
    Below,
    /// In the scratch file, from this byte on.
    Scratch(u64),
    /// As it was, in the scratch file of the disk beneath, from this byte on.
    Kept(u64),
    /// Reads zeroes.
    Zeroes,
}

/// A run of bytes of the disk that are in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::view) struct Run {
    /// First byte on the disk.
    pub(in crate::view) offset_bytes: u64,
    /// Length in bytes.
    pub(in crate::view) len_bytes: u64,
    /// Where it is.
    pub(in crate::view) place: Place,
}

/// All chunks of the scratch file are in use. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::view) struct ScratchFull;

/// What a map contradicts itself in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its map contradicts itself: {0}")]
pub struct MapDamage(&'static str);

/// Where each sector is. All ranges are multiples of a sector.
#[derive(Debug)]
pub(in crate::view) struct ScratchMap {
    shape: Shape,
    /// First byte of the data in the file.
    data_offset_bytes: u64,
    words: Words,
    /// What the file knows of it; none for a scratch that ends with its process.
    pages: Option<Pages>,
    /// Which entry a chunk of the disk has.
    slots: BTreeMap<u64, u32>,
    /// Runs of whole chunks that read zeroes unless an entry says otherwise: start and end, in chunks.
    zeroes: BTreeMap<u64, u64>,
    free_slots: Free,
    free_places: Free,
    /// Entries without a chunk of the file.
    bare: u32,
    /// Entries that say no more than their chunk's bit, and that the file may have: free once it has the bit.
    emptied: Vec<u32>,
    /// Every store, for the test of what a process leaves that dies between two.
    #[cfg(test)]
    stores: Vec<(usize, u64)>,
}

/// An entry, decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    chunk: u64,
    /// Its chunk of the scratch file.
    place: Option<u32>,
    written: u128,
    zero: u128,
}

/// Numbers that are free, the lowest first.
#[derive(Debug)]
struct Free {
    returned: Vec<u32>,
    next: u32,
    end: u32,
}

impl Free {
    fn new(end: u32) -> Self {
        Self { returned: Vec::new(), next: 0, end }
    }

    /// All below `end` but those in use.
    fn except(used: &[bool]) -> Self {
        let end = used.len() as u32;
        let next = used.iter().rposition(|used| *used).map_or(0, |last| last as u32 + 1);
        let returned = (0..next).rev().filter(|number| !used[*number as usize]).collect();
        Self { returned, next, end }
    }

    fn count(&self) -> u32 {
        self.returned.len() as u32 + self.end - self.next
    }

    fn take(&mut self) -> Option<u32> {
        self.returned.pop().or_else(|| {
            (self.next < self.end).then(|| {
                self.next += 1;
                self.next - 1
            })
        })
    }

    fn give(&mut self, number: u32) {
        self.returned.push(number);
    }
}

impl ScratchMap {
    /// An empty map of a scratch that ends with its process, over a file that holds nothing but data.
    pub(in crate::view) fn passing(shape: Shape, words: Words) -> Self {
        Self {
            shape,
            data_offset_bytes: 0,
            words,
            pages: None,
            slots: BTreeMap::new(),
            zeroes: BTreeMap::new(),
            free_slots: Free::new(shape.entries),
            free_places: Free::new(shape.places),
            bare: 0,
            emptied: Vec::new(),
            #[cfg(test)]
            stores: Vec::new(),
        }
    }

    /// The map that `words` say; `pages` have what the file knows of it.
    pub(in crate::view) fn lasting(shape: Shape, words: Words, mut pages: Pages) -> Result<Self, MapDamage> {
        pages.compare(&words);
        let mut map = Self::passing(shape, words);
        map.data_offset_bytes = shape.data_offset_bytes();
        map.pages = Some(pages);
        map.read_zeroes();
        let mut used_places = vec![false; shape.places as usize];
        let mut used_slots = vec![false; shape.entries as usize];
        let mut empty_chunks = Vec::new();
        for slot in 0..shape.entries {
            let Some(entry) = map.entry(slot) else { continue };
            used_slots[slot as usize] = true;
            if entry.chunk >= shape.disk_chunks() {
                return Err(MapDamage("a chunk is beyond the disk's end"));
            }
            if map.slots.insert(entry.chunk, slot).is_some() {
                return Err(MapDamage("a chunk has two entries"));
            }
            match entry.place {
                None if entry.written != 0 => return Err(MapDamage("data has no place")),
                None => {
                    map.bare += 1;
                    if entry.zero == u128::MAX {
                        map.emptied.push(slot);
                        empty_chunks.push(entry.chunk);
                    }
                }
                Some(place) => match used_places.get_mut(place as usize) {
                    None => return Err(MapDamage("a place is beyond the file's end")),
                    Some(true) => return Err(MapDamage("two chunks have one place")),
                    Some(used) => *used = true,
                },
            }
        }
        for chunk in empty_chunks {
            map.add_zero_chunks(chunk..chunk + 1);
        }
        map.free_places = Free::except(&used_places);
        map.free_slots = Free::except(&used_slots);
        Ok(map)
    }

    /// How much of the scratch file's data is in use, in bytes.
    pub(in crate::view) fn used_bytes(&self) -> u64 {
        u64::from(self.shape.places - self.free_places.count()) * CHUNK_BYTES
    }

    /// Where a range is, in order and without gaps.
    pub(in crate::view) fn find(&self, offset_bytes: u64, len_bytes: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let end_bytes = offset_bytes + len_bytes;
        let mut at = offset_bytes;
        while at < end_bytes {
            let (run_bytes, place) = self.run_at(at, end_bytes);
            let joined = runs.last_mut().filter(|last| match (last.place, place) {
                (Place::Scratch(from), Place::Scratch(to)) => from + last.len_bytes == to,
                (last, next) => last == next,
            });
            match joined {
                Some(last) => last.len_bytes += run_bytes,
                None => runs.push(Run { offset_bytes: at, len_bytes: run_bytes, place }),
            }
            at += run_bytes;
        }
        runs
    }

    /// Where a write of a range goes in the scratch file: runs of disk and file. Takes chunks for it; the range reads as before until
    /// [`ScratchMap::written`].
    ///
    /// # Errors
    /// The file has too few free chunks left.
    pub(in crate::view) fn place(
        &mut self,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Vec<Run>, ScratchFull> {
        let lacking = pieces(offset_bytes, len_bytes)
            .filter(|(number, _)| self.find_entry(*number).is_none_or(|(_, entry)| entry.place.is_none()));
        if lacking.count() as u64 > u64::from(self.free_places.count()) {
            return Err(ScratchFull);
        }
        let mut runs: Vec<Run> = Vec::new();
        for (number, sectors) in pieces(offset_bytes, len_bytes) {
            let place = match self.find_entry(number) {
                Some((_, Entry { place: Some(place), .. })) => place,
                Some((slot, _)) => {
                    let place = self.free_places.take().ok_or(ScratchFull)?;
                    self.bare -= 1;
                    self.store(slot, 1, u64::from(place) + 1);
                    place
                }
                None => {
                    let place = self.free_places.take().ok_or(ScratchFull)?;
                    self.add_entry(number, Some(place)).ok_or(ScratchFull)?;
                    place
                }
            };
            let from = self.data_offset_bytes + u64::from(place) * CHUNK_BYTES + sectors.start * SECTOR_BYTES;
            let run_bytes = (sectors.end - sectors.start) * SECTOR_BYTES;
            let at = number * CHUNK_BYTES + sectors.start * SECTOR_BYTES;
            match runs.last_mut() {
                Some(Run { len_bytes, place: Place::Scratch(start), .. }) if *start + *len_bytes == from => {
                    *len_bytes += run_bytes;
                }
                _ => {
                    runs.push(Run { offset_bytes: at, len_bytes: run_bytes, place: Place::Scratch(from) });
                }
            }
        }
        Ok(runs)
    }

    /// A write has landed: from now on the range is in the scratch file.
    pub(in crate::view) fn written(&mut self, offset_bytes: u64, len_bytes: u64) {
        for (number, sectors) in pieces(offset_bytes, len_bytes) {
            if let Some((slot, entry)) = self.find_entry(number) {
                // Where both bits are set the data counts.
                self.store_bits(slot, WRITTEN, entry.written | mask(&sectors));
                self.store_bits(slot, ZERO, entry.zero & !mask(&sectors));
            }
        }
    }

    /// Whether a write of the range is durable once its data is: the file says already that the range is where such a write goes.
    pub(in crate::view) fn is_in_place(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        let Some(pages) = &self.pages else { return true };
        pieces(offset_bytes, len_bytes).all(|(number, sectors)| {
            let Some((slot, entry)) = self.find_entry(number) else { return false };
            let first = slot as usize * ENTRY_WORDS;
            let settled = decode(&pages.settled()[first..first + ENTRY_WORDS]);
            let has_all = |entry: Entry| entry.written & mask(&sectors) == mask(&sectors);
            pages.is_written(first)
                && has_all(entry)
                && settled.is_some_and(|settled| {
                    (settled.chunk, settled.place) == (entry.chunk, entry.place) && has_all(settled)
                })
        })
    }

    /// From now on the range reads zeroes.
    ///
    /// # Errors
    /// Part of a chunk that has no entry takes one, and one of the file's chunks if there are too many such entries; none of these is
    /// left either.
    pub(in crate::view) fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), ScratchFull> {
        let whole = offset_bytes.div_ceil(CHUNK_BYTES)..(offset_bytes + len_bytes) / CHUNK_BYTES;
        let (head, tail) = if whole.start >= whole.end {
            (offset_bytes..offset_bytes + len_bytes, 0..0)
        } else {
            (offset_bytes..whole.start * CHUNK_BYTES, whole.end * CHUNK_BYTES..offset_bytes + len_bytes)
        };
        let parts = || [&head, &tail].into_iter().flat_map(|part| pieces(part.start, part.end - part.start));
        let lacking = parts()
            .filter(|(number, _)| self.find_entry(*number).is_none() && !self.is_zero_chunk(*number))
            .count() as u32;
        let spare = self.bare_max() - self.bare.min(self.bare_max());
        if lacking.saturating_sub(spare) > self.free_places.count() {
            return Err(ScratchFull);
        }
        for (number, sectors) in parts() {
            self.zero_sectors(number, &sectors)?;
        }
        if whole.start < whole.end {
            // First the bits: an entry counts for more.
            self.add_zero_chunks(whole.clone());
            let slots: Vec<u32> = self.slots.range(whole).map(|(_, slot)| *slot).collect();
            for slot in slots {
                self.zero_entry(slot, u128::MAX);
            }
        }
        Ok(())
    }

    /// A commit begins: all changes up to now are to be written. How many pages that are.
    pub(in crate::view) fn begin_commit(&mut self) -> u32 {
        let Some(pages) = &mut self.pages else { return 0 };
        pages.begin(&self.words);
        pages.writing_count()
    }

    /// The next commit leaves both copies of every page as they are to be.
    pub(in crate::view) fn catch_up(&mut self) {
        if let Some(pages) = &mut self.pages {
            pages.catch_up();
        }
    }

    /// The pages, to encode what is to be written.
    pub(in crate::view) fn pages(&self) -> Option<&Pages> {
        self.pages.as_ref()
    }

    /// The commit's pages are durable.
    pub(in crate::view) fn end_commit(&mut self) {
        let Some(pages) = &mut self.pages else { return };
        pages.end();
        let zeroes_word = self.shape.zeroes_word();
        for slot in std::mem::take(&mut self.emptied) {
            let Some(entry) = self.entry(slot).filter(Entry::is_empty) else { continue };
            let settled = self.pages.as_ref().map_or(&[][..], Pages::settled);
            let bits = settled.get(zeroes_word + (entry.chunk / 64) as usize).copied().unwrap_or(0);
            if bits >> (entry.chunk % 64) & 1 == 1 {
                self.remove_entry(slot, entry.chunk);
            } else {
                self.emptied.push(slot);
            }
        }
    }

    /// Most entries without a chunk of the file, so that each of those has an entry left.
    fn bare_max(&self) -> u32 {
        self.shape.entries - self.shape.places
    }

    fn zero_sectors(&mut self, number: u64, sectors: &Range<u64>) -> Result<(), ScratchFull> {
        let slot = match self.slots.get(&number) {
            Some(slot) => *slot,
            None if self.is_zero_chunk(number) => return Ok(()),
            None => {
                let place = match self.bare < self.bare_max() {
                    true => None,
                    false => Some(self.free_places.take().ok_or(ScratchFull)?),
                };
                self.add_entry(number, place).ok_or(ScratchFull)?
            }
        };
        self.zero_entry(slot, mask(sectors));
        Ok(())
    }

    fn zero_entry(&mut self, slot: u32, sectors: u128) {
        let Some(entry) = self.entry(slot).filter(|entry| !entry.is_empty()) else { return };
        let zero = entry.zero | sectors;
        if entry.place.is_none() && zero == u128::MAX {
            self.add_zero_chunks(entry.chunk..entry.chunk + 1);
        }
        self.store_bits(slot, ZERO, zero);
        self.store_bits(slot, WRITTEN, entry.written & !sectors);
        if entry.place.is_some() || zero != u128::MAX {
            return;
        }
        let first = slot as usize * ENTRY_WORDS;
        let in_file = self.pages.as_ref().is_some_and(|pages| pages.settled()[first] == entry.chunk + 1);
        if in_file {
            self.emptied.push(slot);
        } else {
            self.remove_entry(slot, entry.chunk);
        }
    }

    /// The run that begins at `at`, up to `end_bytes` at most.
    fn run_at(&self, at: u64, end_bytes: u64) -> (u64, Place) {
        let number = at / CHUNK_BYTES;
        let Some((_, entry)) = self.find_entry(number) else {
            let next_chunk = self.slots.range(number..).next().map_or(u64::MAX, |(next, _)| *next);
            let (place, until) = match self.zeroes.range(..=number).next_back() {
                Some((_, &end)) if number < end => (Place::Zeroes, end),
                _ => {
                    let next = self.zeroes.range(number + 1..).next();
                    (Place::Below, next.map_or(u64::MAX, |(start, _)| *start))
                }
            };
            let until = until.min(next_chunk).saturating_mul(CHUNK_BYTES).min(end_bytes);
            return (until - at, place);
        };
        let first = at % CHUNK_BYTES / SECTOR_BYTES;
        let state = |sector: u64| (entry.written >> sector & 1 == 1, entry.zero >> sector & 1 == 1);
        let same = (first..SECTORS).take_while(|sector| state(*sector) == state(first)).count() as u64;
        let place = match (state(first), entry.place) {
            ((true, _), Some(place)) => {
                Place::Scratch(self.data_offset_bytes + u64::from(place) * CHUNK_BYTES + first * SECTOR_BYTES)
            }
            ((_, true), _) => Place::Zeroes,
            _ => Place::Below,
        };
        ((same * SECTOR_BYTES).min(end_bytes - at), place)
    }

    fn find_entry(&self, number: u64) -> Option<(u32, Entry)> {
        let slot = *self.slots.get(&number)?;
        Some((slot, self.entry(slot)?))
    }

    fn entry(&self, slot: u32) -> Option<Entry> {
        let first = slot as usize * ENTRY_WORDS;
        let words: [u64; ENTRY_WORDS] =
            std::array::from_fn(|index| self.words[first + index].load(Ordering::Relaxed));
        decode(&words)
    }

    /// A new entry: as the chunk was before.
    fn add_entry(&mut self, number: u64, place: Option<u32>) -> Option<u32> {
        let slot = self.free_slots.take()?;
        let zero = if self.is_zero_chunk(number) { u128::MAX } else { 0 };
        self.store(slot, 1, place.map_or(0, |place| u64::from(place) + 1));
        self.store_bits(slot, WRITTEN, 0);
        self.store_bits(slot, ZERO, zero);
        self.store(slot, 0, number + 1);
        self.slots.insert(number, slot);
        self.bare += u32::from(place.is_none());
        Some(slot)
    }

    fn remove_entry(&mut self, slot: u32, number: u64) {
        self.store(slot, 0, 0);
        self.store_bits(slot, ZERO, 0);
        self.slots.remove(&number);
        self.free_slots.give(slot);
        self.bare -= 1;
    }

    fn store(&mut self, slot: u32, part: usize, value: u64) {
        self.store_word(slot as usize * ENTRY_WORDS + part, value);
    }

    fn store_bits(&mut self, slot: u32, part: usize, bits: u128) {
        self.store(slot, part, bits as u64);
        self.store(slot, part + 1, (bits >> 64) as u64);
    }

    fn store_word(&mut self, index: usize, value: u64) {
        let word = &self.words[index];
        if word.load(Ordering::Relaxed) != value {
            // In this order for whoever finds the words after the process's death.
            word.store(value, Ordering::Release);
            #[cfg(test)]
            self.stores.push((index, value));
            if let Some(pages) = &mut self.pages {
                pages.touch(index);
            }
        }
    }

    fn is_zero_chunk(&self, number: u64) -> bool {
        self.zeroes.range(..=number).next_back().is_some_and(|(_, end)| number < *end)
    }

    fn add_zero_chunks(&mut self, chunks: Range<u64>) {
        if self.pages.is_some() {
            let zeroes_word = self.shape.zeroes_word();
            for word in chunks.start / 64..chunks.end.div_ceil(64) {
                let first = word * 64;
                let (from, to) = (chunks.start.max(first) - first, chunks.end.min(first + 64) - first);
                let bits = (u64::MAX >> (64 - (to - from))) << from;
                let index = zeroes_word + word as usize;
                self.store_word(index, self.words[index].load(Ordering::Relaxed) | bits);
            }
        }
        self.add_zero_run(chunks);
    }

    fn add_zero_run(&mut self, chunks: Range<u64>) {
        let (mut start, mut end) = (chunks.start, chunks.end);
        let before = self.zeroes.range(..=start).next_back().map(|(start, end)| (*start, *end));
        if let Some((before_start, before_end)) = before
            && before_end >= start
        {
            (start, end) = (before_start, end.max(before_end));
        }
        let inside: Vec<(u64, u64)> =
            self.zeroes.range(start..=end).map(|(start, end)| (*start, *end)).collect();
        for (inside_start, inside_end) in inside {
            self.zeroes.remove(&inside_start);
            end = end.max(inside_end);
        }
        self.zeroes.insert(start, end);
    }

    /// Takes the runs of zeroes from their bits.
    fn read_zeroes(&mut self) {
        let first = self.shape.zeroes_word();
        let mut open: Option<u64> = None;
        for number in 0..self.shape.disk_chunks().div_ceil(64) {
            let word = self.words[first + number as usize].load(Ordering::Relaxed);
            if (word == 0 && open.is_none()) || (word == u64::MAX && open.is_some()) {
                continue;
            }
            for bit in 0..64 {
                match (word >> bit & 1 == 1, open) {
                    (true, None) => open = Some(number * 64 + bit),
                    (false, Some(start)) => {
                        self.zeroes.insert(start, number * 64 + bit);
                        open = None;
                    }
                    _ => {}
                }
            }
        }
        if let Some(start) = open {
            self.zeroes.insert(start, self.shape.disk_chunks());
        }
    }
}

/// Words of an entry: the bits of sectors with data, and of those that read zeroes.
const WRITTEN: usize = 2;
const ZERO: usize = 4;

impl Entry {
    /// It says no more than that the chunk reads zeroes, and has no place to keep.
    fn is_empty(&self) -> bool {
        self.place.is_none() && self.zero == u128::MAX
    }
}

fn decode(words: &[u64]) -> Option<Entry> {
    let chunk = words[0].checked_sub(1)?;
    let bits = |part: usize| u128::from(words[part]) | u128::from(words[part + 1]) << 64;
    let place = words[1].checked_sub(1).map(|place| u32::try_from(place).unwrap_or(u32::MAX));
    Some(Entry { chunk, place, written: bits(WRITTEN), zero: bits(ZERO) })
}

/// Leaves of two entries of a chunk only the one whose page is newer: the other was given up, but its page was not written any more.
pub(super) fn drop_stale(shape: Shape, words: &mut [u64], versions: &[PageVersion]) -> Result<(), MapDamage> {
    let sequence = |slot: u32| versions[slot as usize * ENTRY_WORDS / super::format::PAGE_WORDS].sequence;
    let mut found: BTreeMap<u64, u32> = BTreeMap::new();
    for slot in 0..shape.entries {
        let first = slot as usize * ENTRY_WORDS;
        let Some(entry) = decode(&words[first..first + ENTRY_WORDS]) else { continue };
        let Some(other) = found.insert(entry.chunk, slot) else { continue };
        let stale = match sequence(other).cmp(&sequence(slot)) {
            std::cmp::Ordering::Less => other,
            std::cmp::Ordering::Greater => slot,
            std::cmp::Ordering::Equal => return Err(MapDamage("a chunk has two entries")),
        };
        found.insert(entry.chunk, if stale == slot { other } else { slot });
        let first = stale as usize * ENTRY_WORDS;
        words[first..first + ENTRY_WORDS].fill(0);
    }
    Ok(())
}

/// A range as parts of chunks: number and sectors.
fn pieces(offset_bytes: u64, len_bytes: u64) -> impl Iterator<Item = (u64, Range<u64>)> {
    let (start, end) = (offset_bytes / SECTOR_BYTES, (offset_bytes + len_bytes) / SECTOR_BYTES);
    (start / SECTORS..end.div_ceil(SECTORS)).map(move |number| {
        let first = number * SECTORS;
        (number, start.max(first) - first..end.min(first + SECTORS) - first)
    })
}

fn mask(sectors: &Range<u64>) -> u128 {
    let count = sectors.end - sectors.start;
    let ones = if count >= SECTORS { u128::MAX } else { (1 << count) - 1 };
    ones << sectors.start
}

#[cfg(test)]
mod tests;
