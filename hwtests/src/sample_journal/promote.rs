//! Promotion of a sample journal, whole or cut short.

use anyhow::{Context, Result, ensure};
use journal::promotion::{Promoted, Promotion, PromotionError, PromotionFile, TransferSizes};
use journal::storage::ring::{Access, DirectFile};
use journal::storage::{Completion, FileId, Op, Storage};
use journal::writer::Change;

use super::SampleJournal;

/// Disk content under way at once, in bytes.
const WINDOW_BYTES: u64 = 64 << 10;

/// How a promotion ended.
#[derive(Clone, Debug)]
pub enum Ended {
    /// All is promoted.
    Whole(Promoted),
    /// It was cut short, as by the death of the process: announced, some of it written.
    Cut,
    /// It can't go on.
    Stuck(PromotionError),
}

impl SampleJournal<'_> {
    /// How many segments are sealed.
    pub fn sealed_count(&self) -> usize {
        self.writer.closed_segments().len()
    }

    /// The last number of one of the sealed segments, counted from the oldest.
    pub fn sealed_end(&self, index: usize) -> Option<u64> {
        self.writer.closed_segments().nth(index).map(|segment| segment.last.seq)
    }

    /// Promotes the oldest segments. After `most_writes` writes to recovery disks it is cut short.
    pub fn promote(&mut self, segments: usize, most_writes: usize) -> Result<Ended> {
        let segments: Vec<_> = self.writer.closed_segments().take(segments).cloned().collect();
        let through = segments.last().context("no segment to promote")?.last;
        self.change(Change::AnnouncePromotion { through })?;
        let superblock = self.writer.superblock().clone();
        let reserved = vec![false; superblock.volumes.len()];
        let mut disks = Vec::new();
        for volume in 0..self.model.volume_count() {
            let disk = DirectFile::open(&self.folder.disk(volume), Access::Exclusive)?;
            disks.push(self.storage.add_file(disk));
        }
        let sizes =
            TransferSizes { run_max_bytes: 16 << 10, punch_min_bytes: 8 << 10, chunk_bytes: 32 << 10 };
        let promotion =
            Promotion::new(superblock, self.writer.bad_ranges().clone(), segments, reserved, sizes);
        let ended = self.run(promotion, &disks, most_writes);
        for disk in disks {
            self.storage.remove_file(disk);
        }
        let ended = ended?;
        if let Ended::Whole(Promoted { through, size_bytes, bad_ranges, .. }) = ended.clone() {
            self.change(Change::EndPromotion { through, size_bytes, bad_ranges })?;
        }
        Ok(ended)
    }

    /// Gives free slots back.
    pub fn shrink(&mut self) -> Result<()> {
        self.change(Change::Shrink { spare_slots: 0 })
    }

    fn run(&mut self, mut promotion: Promotion, disks: &[FileId], most_writes: usize) -> Result<Ended> {
        let (mut under_way, mut writes, mut told, mut done) = (0, 0, false, Vec::<Completion>::new());
        loop {
            while let Some(action) = promotion.poll_action(WINDOW_BYTES) {
                if matches!(action.file, PromotionFile::Disk(_)) && !matches!(action.op, Op::Read { .. }) {
                    if writes == most_writes {
                        while under_way > 0 {
                            self.storage.collect(true, &mut done)?;
                            under_way -= done.drain(..).count();
                        }
                        return Ok(Ended::Cut);
                    }
                    writes += 1;
                }
                let file = match action.file {
                    PromotionFile::Journal => self.file,
                    PromotionFile::Disk(volume) => disks[usize::from(volume)],
                };
                self.storage.submit(file, action.token, action.purpose, action.op);
                under_way += 1;
            }
            if let Some(promoted) = promotion.promoted() {
                ensure!(told, "the promotion ended without a word");
                return Ok(Ended::Whole(promoted));
            }
            self.storage.collect(true, &mut done)?;
            let mut stuck = None;
            for Completion { token, result } in done.drain(..) {
                under_way -= 1;
                match promotion.done(token, result) {
                    Ok(ended) => told |= ended,
                    Err(error) => {
                        stuck.get_or_insert(error);
                    }
                }
            }
            if let Some(error) = stuck {
                while under_way > 0 {
                    self.storage.collect(true, &mut done)?;
                    under_way -= done.drain(..).count();
                }
                return Ok(Ended::Stuck(error));
            }
        }
    }
}
