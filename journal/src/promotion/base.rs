//! What a recovery disk has where records cover a part of a page: read before the page is written, over what the disk can't give back.

use super::run::Run;
use super::{Carrying, Doing, Promotion, PromotionError, PromotionFile, Stage};
use crate::bad_ranges::{BadRange, BadRanges};
use crate::format::PAGE_BYTES;
use crate::format::bad_list::MAX_BAD_RANGES;
use crate::storage::{AlignedBuf, Op, StorageError};

/// A stretch whose base comes page by page, since the disk couldn't give all of it.
#[derive(Debug)]
pub(super) struct Patched {
    run: Run,
    base: AlignedBuf,
    /// Pages that have not been read yet.
    missing: usize,
    /// Those that the disk can't give back, by their places on the disk.
    lost: Vec<u64>,
}

impl Promotion {
    /// What of the recovery disks can't be trusted, with what this promotion found that they have lost, for
    /// [`crate::writer::Change::NoteBadRanges`].
    pub fn bad_ranges_with_lost(&self) -> BadRanges {
        let mut all = self.bad_ranges.clone();
        self.lost.iter().for_each(|lost| all.add(*lost));
        all.coarsen(MAX_BAD_RANGES);
        all
    }

    pub(super) fn base_read(
        &mut self,
        number: u64,
        file: PromotionFile,
        result: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<(), PromotionError> {
        let Stage::Carrying(carrying) = &mut self.stage else { return Ok(()) };
        let Some(run) = carrying.waiting.remove(&number) else { return Ok(()) };
        match result {
            Ok(base) => self.write_run(&run, base),
            Err(error) if error.is_medium() => {
                let (begin, len_bytes) = (run.offset_bytes(), run.len_bytes());
                for offset_bytes in (begin..begin + len_bytes as u64).step_by(PAGE_BYTES) {
                    let op = Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(PAGE_BYTES) };
                    self.ready.push_back((Doing::ReadBasePage { run: number, offset_bytes }, file, op));
                }
                let (base, missing) = (AlignedBuf::zeroed(len_bytes), len_bytes / PAGE_BYTES);
                carrying.patched.insert(number, Patched { run, base, missing, lost: Vec::new() });
            }
            Err(source) => return Err(PromotionError::of(file, source)),
        }
        Ok(())
    }

    pub(super) fn base_page_read(
        &mut self,
        number: u64,
        offset_bytes: u64,
        file: PromotionFile,
        result: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<(), PromotionError> {
        let Stage::Carrying(carrying) = &mut self.stage else { return Ok(()) };
        let Some(patched) = carrying.patched.get_mut(&number) else { return Ok(()) };
        patched.missing -= 1;
        match result {
            Ok(page) => {
                let begin = (offset_bytes - patched.run.offset_bytes()) as usize;
                let page = page.expect("a read gives its buffer back");
                patched.base[begin..begin + PAGE_BYTES].copy_from_slice(&page);
            }
            Err(error) if error.is_medium() => patched.lost.push(offset_bytes),
            Err(source) => return Err(PromotionError::of(file, source)),
        }
        if patched.missing > 0 {
            return Ok(());
        }
        let Some(patched) = carrying.patched.remove(&number) else { return Ok(()) };
        self.take_patched(patched);
        Ok(())
    }

    /// What is lost reads zeroes, and counts as bad. That must be durable before the page is written: then nothing tells any more that the
    /// zeroes are not what was there, and a promotion that is cut short is done again.
    fn take_patched(&mut self, patched: Patched) {
        let Patched { run, base, lost, .. } = patched;
        let volume = run.volume();
        let pages = lost.iter().flat_map(|page| run.uncovered(*page..page + PAGE_BYTES as u64));
        let unknown: Vec<BadRange> = pages
            .filter(|range| !self.bad_ranges.covers(volume, range.clone()))
            .map(|range| BadRange {
                volume,
                offset_bytes: range.start,
                len_bytes: range.end - range.start,
                seq: self.superblock.low_water.seq,
            })
            .collect();
        if unknown.is_empty() {
            return self.write_run(&run, Some(base));
        }
        self.writing_bytes -= run.len_bytes() as u64;
        self.lost.extend(unknown);
    }

    /// Nothing is left to do but what waits for the lost places being noted.
    pub(super) fn check_lost(&self) -> Result<(), PromotionError> {
        let is_done = self.ready.is_empty()
            && self.running.is_empty()
            && matches!(&self.stage, Stage::Carrying(carrying) if carrying.is_done());
        match self.lost.first() {
            Some(lost) if is_done => Err(PromotionError::DiskLost { volume: lost.volume }),
            _ => Ok(()),
        }
    }
}

impl Carrying {
    pub(super) fn is_done(&self) -> bool {
        self.chunks.is_done() && self.next.is_none() && self.runs.as_ref().is_none_or(super::Runs::is_done)
    }
}
