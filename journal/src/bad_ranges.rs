//! What of the recovery disks is not what it should be, because the record that should have been promoted was damaged (C5).

use std::collections::BTreeMap;
use std::ops::Range;

use crate::index::Index;

/// A stretch of a recovery disk that can't be trusted: it reads as an error until something else is promoted there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRange {
    /// The volume, by number.
    pub volume: u16,
    /// Place on the volume, in bytes.
    pub offset_bytes: u64,
    /// Length, in bytes.
    pub len_bytes: u64,
    /// The record that was damaged; of what the recovery disk itself has lost, the low-water mark then.
    pub seq: u64,
}

/// All of a VM's, disjoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BadRanges {
    /// End and record, by volume and place.
    ranges: BTreeMap<(u16, u64), (u64, u64)>,
}

impl BadRanges {
    /// Whether all is good.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// All of them, by volume and place.
    pub fn iter(&self) -> impl Iterator<Item = BadRange> {
        self.ranges.iter().map(|(&(volume, offset_bytes), &(end_bytes, seq))| BadRange {
            volume,
            offset_bytes,
            len_bytes: end_bytes - offset_bytes,
            seq,
        })
    }

    /// The first one within a range of a volume, cut to it.
    pub fn first_in(&self, volume: u16, range: Range<u64>) -> Option<BadRange> {
        let before = self.ranges.range((volume, 0)..(volume, range.start)).next_back();
        let within = self.ranges.range((volume, range.start)..(volume, range.end.max(range.start)));
        let (&(_, start), &(end, seq)) =
            before.into_iter().chain(within).find(|(_, (end, _))| *end > range.start)?;
        let (offset_bytes, end) = (start.max(range.start), end.min(range.end));
        Some(BadRange { volume, offset_bytes, len_bytes: end - offset_bytes, seq })
    }

    /// Whether all of a range of a volume is bad.
    pub(crate) fn covers(&self, volume: u16, range: Range<u64>) -> bool {
        let mut at = range.start;
        while let Some(bad) = self.first_in(volume, at..range.end).filter(|bad| bad.offset_bytes == at) {
            at += bad.len_bytes;
        }
        at >= range.end
    }

    /// Adds one, in place of what overlaps it.
    pub fn add(&mut self, bad: BadRange) {
        let BadRange { volume, offset_bytes, len_bytes, seq } = bad;
        let (mut begin, mut end) = (offset_bytes, offset_bytes + len_bytes);
        self.heal(volume, begin..end);
        // Neighbours of one record are one.
        if let Some((&(_, start), &(until, of))) = self.ranges.range((volume, 0)..(volume, begin)).next_back()
            && until == begin
            && of == seq
        {
            begin = start;
        }
        if let Some(&(until, of)) = self.ranges.get(&(volume, end))
            && of == seq
        {
            self.ranges.remove(&(volume, end));
            end = until;
        }
        self.ranges.insert((volume, begin), (end, seq));
    }

    /// Something good was put over a range.
    pub fn heal(&mut self, volume: u16, range: Range<u64>) {
        if self.ranges.is_empty() || range.is_empty() {
            return;
        }
        while let Some(found) = self.first_in(volume, range.clone()) {
            let start = if self.ranges.contains_key(&(volume, found.offset_bytes)) {
                found.offset_bytes
            } else {
                let before = self.ranges.range((volume, 0)..(volume, found.offset_bytes)).next_back();
                before.map_or(found.offset_bytes, |((_, start), _)| *start)
            };
            let Some((end, seq)) = self.ranges.remove(&(volume, start)) else { return };
            if start < range.start {
                self.ranges.insert((volume, start), (range.start, seq));
            }
            if end > range.end {
                self.ranges.insert((volume, range.end), (end, seq));
            }
        }
    }

    /// Makes them fewer, if they are more than this many: what lies between those that are nearest to one another counts as bad too.
    pub(crate) fn coarsen(&mut self, most: usize) {
        while self.ranges.len() > most {
            let all: Vec<BadRange> = self.iter().collect();
            let gaps = all.windows(2).filter(|pair| pair[0].volume == pair[1].volume);
            let mut gaps: Vec<(u64, usize)> = gaps
                .map(|pair| pair[1].offset_bytes - pair[0].offset_bytes - pair[0].len_bytes)
                .zip(0..)
                .collect();
            gaps.sort_unstable();
            // Half of what is too much: merging two may make more of them neighbours.
            let surplus = (self.ranges.len() - most).div_ceil(2);
            let widest = gaps.get(surplus - 1).map_or(u64::MAX, |(gap, _)| *gap);
            self.ranges.clear();
            let mut last: Option<BadRange> = None;
            for bad in all {
                match &mut last {
                    Some(last)
                        if last.volume == bad.volume
                            && bad.offset_bytes - last.offset_bytes - last.len_bytes <= widest =>
                    {
                        last.len_bytes = bad.offset_bytes + bad.len_bytes - last.offset_bytes;
                    }
                    _ => {
                        if let Some(done) = last.replace(bad) {
                            self.insert(done);
                        }
                    }
                }
            }
            if let Some(done) = last {
                self.insert(done);
            }
        }
    }

    fn insert(&mut self, bad: BadRange) {
        self.ranges.insert((bad.volume, bad.offset_bytes), (bad.offset_bytes + bad.len_bytes, bad.seq));
    }

    /// Everything of these indexes was put onto the disks.
    pub(crate) fn heal_promoted(&mut self, indexes: &[Index]) {
        for bad in self.clone().iter() {
            let Some(index) = indexes.get(usize::from(bad.volume)) else { continue };
            for piece in index.overlapping(bad.offset_bytes, bad.len_bytes) {
                self.heal(bad.volume, piece.offset_bytes..piece.end_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests;
