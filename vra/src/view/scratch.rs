//! What a writable view keeps of what was written to it: where each sector is, without I/O.
//!
//! The scratch file is cut in chunks, given to parts of the disk in the order of their first write. Within a chunk bits say which
//! sectors were written and which read zeroes, so a small write copies nothing. A discarded chunk keeps its place: a
//! read that was planned before may still be on its way there. All state is in [`ScratchMap`]; what would make it
//! survive a crash is writing down its entries.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use ublk::serve::Waker;

/// Length of a chunk, in bytes.
pub const CHUNK_BYTES: u64 = 64 << 10;
/// Unit of everything, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors of a chunk: one bit each in a `u128`.
const SECTORS: u64 = CHUNK_BYTES / SECTOR_BYTES;
const _: () = assert!(SECTORS == 128);

/// Where a range of a view's disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Never written: as it was.
    Below,
    /// In the scratch file, from this byte on.
    Scratch(u64),
    /// Reads zeroes.
    Zeroes,
}

/// A run of bytes of the disk that are in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// First byte on the disk.
    pub(super) offset_bytes: u64,
    /// Length in bytes.
    pub(super) len_bytes: u64,
    /// Where it is.
    pub(super) place: Place,
}

/// All chunks of the scratch file are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ScratchFull;

/// Where each sector is. All ranges are multiples of a sector.
#[derive(Debug)]
pub(super) struct ScratchMap {
    chunks: BTreeMap<u64, Chunk>,
    /// Runs of whole chunks that read zeroes unless `chunks` says otherwise: start and end, in chunks.
    zeroes: BTreeMap<u64, u64>,
    places_max: u64,
    places: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    /// Its chunk of the scratch file.
    place: Option<u64>,
    written: u128,
    zero: u128,
}

impl ScratchMap {
    /// A map over a scratch file of `len_bytes`.
    pub(super) fn new(len_bytes: u64) -> Self {
        let places_max = len_bytes / CHUNK_BYTES;
        Self { chunks: BTreeMap::new(), zeroes: BTreeMap::new(), places_max, places: 0 }
    }

    /// How much of the scratch file is in use, in bytes.
    pub(super) fn used_bytes(&self) -> u64 {
        self.places * CHUNK_BYTES
    }

    /// Where a range is, in order and without gaps.
    pub(super) fn find(&self, offset_bytes: u64, len_bytes: u64) -> Vec<Run> {
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
    /// The file has no free chunk left; those taken so far stay with their part of the disk.
    pub(super) fn place(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<Vec<Run>, ScratchFull> {
        let mut runs: Vec<Run> = Vec::new();
        for (number, sectors) in pieces(offset_bytes, len_bytes) {
            let in_zeroes = self.is_zero_chunk(number);
            let chunk = self
                .chunks
                .entry(number)
                .or_insert_with(|| Chunk { zero: if in_zeroes { u128::MAX } else { 0 }, ..Chunk::default() });
            let place = match chunk.place {
                Some(place) => place,
                None if self.places < self.places_max => {
                    self.places += 1;
                    *chunk.place.insert(self.places - 1)
                }
                None => return Err(ScratchFull),
            };
            let from = place * CHUNK_BYTES + sectors.start * SECTOR_BYTES;
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
    pub(super) fn written(&mut self, offset_bytes: u64, len_bytes: u64) {
        for (number, sectors) in pieces(offset_bytes, len_bytes) {
            if let Some(chunk) = self.chunks.get_mut(&number) {
                chunk.written |= mask(&sectors);
                chunk.zero &= !mask(&sectors);
            }
        }
    }

    /// From now on the range reads zeroes.
    pub(super) fn zero(&mut self, offset_bytes: u64, len_bytes: u64) {
        let whole = offset_bytes.div_ceil(CHUNK_BYTES)..(offset_bytes + len_bytes) / CHUNK_BYTES;
        if whole.start >= whole.end {
            for (number, sectors) in pieces(offset_bytes, len_bytes) {
                self.zero_sectors(number, &sectors);
            }
            return;
        }
        let head_bytes = whole.start * CHUNK_BYTES - offset_bytes;
        for (number, sectors) in pieces(offset_bytes, head_bytes) {
            self.zero_sectors(number, &sectors);
        }
        let tail = whole.end * CHUNK_BYTES;
        for (number, sectors) in pieces(tail, offset_bytes + len_bytes - tail) {
            self.zero_sectors(number, &sectors);
        }
        let emptied: Vec<u64> = self
            .chunks
            .range_mut(whole.clone())
            .filter_map(|(number, chunk)| {
                (chunk.written, chunk.zero) = (0, u128::MAX);
                chunk.place.is_none().then_some(*number)
            })
            .collect();
        for number in emptied {
            self.chunks.remove(&number);
        }
        self.add_zero_chunks(whole);
    }

    fn zero_sectors(&mut self, number: u64, sectors: &Range<u64>) {
        let in_zeroes = self.is_zero_chunk(number);
        let chunk = self
            .chunks
            .entry(number)
            .or_insert_with(|| Chunk { zero: if in_zeroes { u128::MAX } else { 0 }, ..Chunk::default() });
        chunk.written &= !mask(sectors);
        chunk.zero |= mask(sectors);
    }

    /// The run that begins at `at`, up to `end_bytes` at most.
    fn run_at(&self, at: u64, end_bytes: u64) -> (u64, Place) {
        let number = at / CHUNK_BYTES;
        let Some(chunk) = self.chunks.get(&number) else {
            let next_chunk = self.chunks.range(number..).next().map_or(u64::MAX, |(next, _)| *next);
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
        let state = |sector: u64| (chunk.written >> sector & 1 == 1, chunk.zero >> sector & 1 == 1);
        let same = (first..SECTORS).take_while(|sector| state(*sector) == state(first)).count() as u64;
        let place = match (state(first), chunk.place) {
            ((true, _), Some(place)) => Place::Scratch(place * CHUNK_BYTES + first * SECTOR_BYTES),
            ((_, true), _) => Place::Zeroes,
            _ => Place::Below,
        };
        ((same * SECTOR_BYTES).min(end_bytes - at), place)
    }

    fn is_zero_chunk(&self, number: u64) -> bool {
        self.zeroes.range(..=number).next_back().is_some_and(|(_, end)| number < *end)
    }

    fn add_zero_chunks(&mut self, chunks: Range<u64>) {
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
}

/// Puts overlapping changes in the order in which they came: a later one waits for the earlier.
#[derive(Default)]
pub(super) struct Gate {
    changes: VecDeque<Change>,
    next_id: u64,
}

/// A change's name at the [`Gate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pass(u64);

struct Change {
    id: u64,
    range: Range<u64>,
    waker: Waker,
    waits: bool,
}

impl Gate {
    /// A change of a range comes. True if it may run now, else `waker` is called when it may.
    pub(super) fn enter(&mut self, offset_bytes: u64, len_bytes: u64, waker: &Waker) -> (Pass, bool) {
        let range = offset_bytes..offset_bytes + len_bytes;
        let waits = self.changes.iter().any(|change| overlap(&change.range, &range));
        let id = self.next_id;
        self.next_id += 1;
        self.changes.push_back(Change { id, range, waker: waker.clone(), waits });
        (Pass(id), !waits)
    }

    /// Whether a change that waited may run now.
    pub(super) fn may_run(&self, pass: Pass) -> bool {
        self.changes.iter().any(|change| change.id == pass.0 && !change.waits)
    }

    /// A change is done.
    pub(super) fn leave(&mut self, pass: Pass) {
        let Some(index) = self.changes.iter().position(|change| change.id == pass.0) else { return };
        let Some(done) = self.changes.remove(index) else { return };
        for later in index..self.changes.len() {
            let range = self.changes[later].range.clone();
            if !self.changes[later].waits || !overlap(&range, &done.range) {
                continue;
            }
            let blocked = self.changes.iter().take(later).any(|change| overlap(&change.range, &range));
            if !blocked {
                self.changes[later].waits = false;
                self.changes[later].waker.wake();
            }
        }
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
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
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use ublk::serve::Wake;

    use super::*;

    const SIZE_BYTES: u64 = 8 * CHUNK_BYTES;

    proptest! {
        /// Against a plain array of sectors: which write made each, or zeroes, or nothing.
        #[test]
        fn every_sector_is_where_the_last_change_put_it(
            changes in prop::collection::vec((0..3_u8, 0..1024_u64, 1..300_u64), 1..60)
        ) {
            let mut map = ScratchMap::new(SIZE_BYTES);
            let mut file = vec![0_u32; (SIZE_BYTES / SECTOR_BYTES) as usize];
            let mut model = vec![None; (SIZE_BYTES / SECTOR_BYTES) as usize];
            for (round, (kind, sector, sectors)) in changes.into_iter().enumerate() {
                let sectors = sectors.min(1024 - sector);
                let (offset, len) = (sector * SECTOR_BYTES, sectors * SECTOR_BYTES);
                let content = if kind == 0 { 0 } else { round as u32 + 1 };
                if kind == 0 {
                    map.zero(offset, len);
                } else {
                    let mut at = offset;
                    for run in map.place(offset, len).expect("room for the whole disk") {
                        prop_assert_eq!(run.offset_bytes, at);
                        let Place::Scratch(from) = run.place else { panic!("{run:?}") };
                        let first = (from / SECTOR_BYTES) as usize;
                        file[first..first + (run.len_bytes / SECTOR_BYTES) as usize].fill(content);
                        at += run.len_bytes;
                    }
                    prop_assert_eq!(at, offset + len);
                    map.written(offset, len);
                }
                model[sector as usize..(sector + sectors) as usize].fill(Some(content));
                let mut at = 0;
                for run in map.find(0, SIZE_BYTES) {
                    prop_assert_eq!(run.offset_bytes, at);
                    for sector in 0..run.len_bytes / SECTOR_BYTES {
                        let found = match run.place {
                            Place::Below => None,
                            Place::Zeroes => Some(0),
                            Place::Scratch(from) => Some(file[(from / SECTOR_BYTES + sector) as usize]),
                        };
                        prop_assert_eq!(found, model[(at / SECTOR_BYTES + sector) as usize]);
                    }
                    at += run.len_bytes;
                }
                prop_assert_eq!(at, SIZE_BYTES);
            }
        }
    }

    #[test]
    fn a_huge_discard_costs_one_entry_and_a_full_file_says_so() {
        let mut map = ScratchMap::new(2 * CHUNK_BYTES);
        map.zero(512, 1 << 50);
        assert!(map.chunks.len() <= 2 && map.zeroes.len() == 1);
        assert!(map.place(CHUNK_BYTES - 512, CHUNK_BYTES).is_ok());
        assert_eq!(map.place(1 << 30, 512), Err(ScratchFull));
        assert_eq!(map.used_bytes(), 2 * CHUNK_BYTES);
    }

    struct Silent;

    impl Wake for Silent {
        fn wake(&self) {}
    }

    #[test]
    fn overlapping_changes_run_in_their_order() {
        let waker: Waker = Arc::new(Silent);
        let mut gate = Gate::default();
        let (first, runs) = gate.enter(0, 10, &waker);
        assert!(runs);
        let (second, runs) = gate.enter(5, 10, &waker);
        assert!(!runs);
        let (third, runs) = gate.enter(12, 10, &waker);
        assert!(!runs, "it overlaps one that waits");
        let (apart, runs) = gate.enter(100, 10, &waker);
        assert!(runs);
        gate.leave(first);
        assert!(gate.may_run(second) && !gate.may_run(third));
        gate.leave(apart);
        gate.leave(second);
        assert!(gate.may_run(third));
    }
}
