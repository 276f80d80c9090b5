//! A disk as it was, copied into a raw image.

use std::fs::File;

use anyhow::Context;
use journal::format::{PAGE_BYTES, Superblock};
use journal::storage::ring::{Access, DirectFile};
use journal::storage::{Blocking, FileId, Purpose, StorageError};
use journal::view::{ReadPart, ViewError, still_there};
use serde::Serialize;

use super::disk::{DiskAt, next, remedy};
use super::image::Image;
use super::place::read_superblock;
use super::progress::Progress;
use super::signals::Signals;
use super::storage::ToolStorage;
use crate::report::chain;

/// How much is read at once, in bytes.
const STEP_BYTES: u64 = 1 << 20;
const SECTOR_BYTES: usize = 512;

/// A copy under way.
pub(super) struct Copy {
    from: DiskAt,
    storage: ToolStorage,
    journal: FileId,
    recovery_disk: FileId,
    /// The recovery disk again, to ask for its holes.
    holes: File,
    skips_damage: bool,
    skipped: Vec<Skipped>,
}

/// A copy that has ended.
#[derive(Debug)]
pub(super) struct Copied {
    /// How much of it holds data, in bytes.
    pub(super) data_bytes: u64,
    /// What is zeroes there though nobody wrote them, in order.
    pub(super) skipped: Vec<Skipped>,
}

/// A part of a disk that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Skipped {
    /// Where, in bytes.
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
    /// The record that wrote it, as far as it is known.
    pub(super) seq: Option<u64>,
    /// Why.
    pub(super) what: String,
}

/// Whether anything is there, or the damage that keeps it from being read.
type Read = Result<bool, ViewError>;

impl Copy {
    /// Of this disk.
    pub(super) fn new(from: DiskAt) -> anyhow::Result<Self> {
        if from.has_overlay() {
            anyhow::bail!("{} is not in journal and recovery disk alone", from.name());
        }
        let mut storage = ToolStorage::new(64).context("cannot set up io_uring: is it disabled here?")?;
        let journal = storage.add_file(DirectFile::open(&from.journal, Access::ReadOnly)?);
        let disk = DirectFile::open(&from.recovery_disk, Access::ReadOnly)?;
        let holes = disk.file().try_clone()?;
        let recovery_disk = storage.add_file(disk);
        Ok(Self { from, storage, journal, recovery_disk, holes, skips_damage: false, skipped: Vec::new() })
    }

    /// Goes on over what can't be read, if that is wanted: there the image has zeroes.
    pub(super) fn skipping_damage(self, skips_damage: bool) -> Self {
        Self { skips_damage, ..self }
    }

    /// Copies all of it.
    pub(super) fn run(
        mut self,
        image: &Image,
        progress: &mut Progress,
        signals: &mut Signals,
    ) -> anyhow::Result<Copied> {
        let size_bytes = self.from.size_bytes();
        image.set_len(size_bytes)?;
        let mut buffer = vec![0; STEP_BYTES as usize];
        let (mut at, mut data_bytes) = (0, 0);
        while at < size_bytes {
            signals.check()?;
            let bytes = &mut buffer[..STEP_BYTES.min(size_bytes - at) as usize];
            let is_there = match self.read(at, bytes)? {
                Ok(is_there) => is_there,
                Err(_) if self.skips_damage => {
                    self.read_over_damage(at, bytes, signals)?;
                    true
                }
                Err(error) => {
                    let remedy = remedy(self.is_lost(&error));
                    let what = format!("{} cannot be read at {at}; {remedy}", self.from.name());
                    return Err(anyhow::Error::new(error).context(what));
                }
            };
            if is_there {
                data_bytes += image.write(at, bytes)?;
            }
            at += bytes.len() as u64;
            progress.set(at);
        }
        Ok(Copied { data_bytes, skipped: self.skipped })
    }

    /// Reads a range as far as it can be read. The rest becomes zeroes.
    fn read_over_damage(&mut self, at: u64, bytes: &mut [u8], signals: &mut Signals) -> anyhow::Result<()> {
        for (number, page) in (0..).zip(bytes.chunks_mut(PAGE_BYTES)) {
            signals.check()?;
            let at = at + number * PAGE_BYTES as u64;
            match self.read(at, page)? {
                Ok(_) => {}
                // What is checked together begins at any sector.
                Err(ViewError::Corrupt { .. }) => {
                    for (number, sector) in (0..).zip(page.chunks_mut(SECTOR_BYTES)) {
                        let at = at + number * SECTOR_BYTES as u64;
                        if let Err(error) = self.read(at, sector)? {
                            self.skip(at, sector, &error)?;
                        }
                    }
                }
                // A disk that fails may take long to say so.
                Err(error) => self.skip(at, page, &error)?,
            }
        }
        Ok(())
    }

    /// Notes down a part that can't be read, and makes it zeroes.
    fn skip(&mut self, offset_bytes: u64, bytes: &mut [u8], error: &ViewError) -> anyhow::Result<()> {
        bytes.fill(0);
        let len_bytes = bytes.len() as u64;
        let (seq, what) = match error {
            ViewError::Corrupt { seq, .. } if self.is_lost(error) => {
                (Some(*seq), "the record was damaged before it was promoted".to_owned())
            }
            ViewError::Corrupt { seq, .. } => (Some(*seq), "the record is damaged".to_owned()),
            error => {
                let parts = self.from.volume.plan_read(offset_bytes, len_bytes)?;
                let seq = parts.iter().find_map(|part| match part {
                    ReadPart::Journal(part) => Some(part.seq),
                    _ => None,
                });
                (seq, chain(error))
            }
        };
        match self.skipped.last_mut() {
            Some(last)
                if last.offset_bytes + last.len_bytes == offset_bytes
                    && last.seq == seq
                    && (last.what == what || !matches!(error, ViewError::Corrupt { .. })) =>
            {
                last.len_bytes += len_bytes;
            }
            _ => self.skipped.push(Skipped { offset_bytes, len_bytes, seq, what }),
        }
        Ok(())
    }

    /// Whether what is damaged is the recovery disk's.
    fn is_lost(&self, error: &ViewError) -> bool {
        matches!(error, ViewError::Corrupt { offset_bytes, .. }
            if self.from.volume.first_bad(*offset_bytes..*offset_bytes + 1).is_some())
    }

    /// Reads a range.
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> anyhow::Result<Read> {
        loop {
            let volume = &self.from.volume;
            let promoted_seq = volume.promoted().through_seq();
            let parts = volume.plan_read(at, bytes.len() as u64)?;
            let is_empty = parts.iter().all(|part| match part {
                ReadPart::Zeroes { .. } => true,
                ReadPart::RecoveryDisk { offset_bytes, len_bytes } => {
                    let data = next(&self.holes, *offset_bytes, libc::SEEK_DATA);
                    data.is_none_or(|data| data >= offset_bytes + len_bytes)
                }
                ReadPart::Journal(_) | ReadPart::Bad(_) => false,
            });
            let uses_disk = parts.iter().any(|part| matches!(part, ReadPart::RecoveryDisk { .. }));
            let disk = self.recovery_disk;
            let read = match is_empty {
                true => {
                    bytes.fill(0);
                    Ok(())
                }
                false => volume.read(&mut self.storage, self.journal, at, bytes, |storage, from, into| {
                    read_disk(storage, disk, from, into)
                }),
            };
            if let Err(error) = read {
                let moved = self.look_again()?;
                if moved || self.from.volume.promoted().through_seq() > promoted_seq {
                    // What was there lies elsewhere now: on the recovery disk if it was promoted, else in another slot.
                    continue;
                }
                let is_damage = match &error {
                    ViewError::Corrupt { .. } => true,
                    ViewError::Storage(error) => error.is_medium(),
                    _ => false,
                };
                return if is_damage { Ok(Err(error)) } else { Err(error.into()) };
            }
            if uses_disk {
                self.check_still_there()?;
            }
            return Ok(Ok(!is_empty));
        }
    }

    /// Recovery disks change only after the superblock has said so (C2). Whether the disk was looked for anew, since what of its recovery
    /// disk can't be trusted has changed (C5).
    fn check_still_there(&mut self) -> anyhow::Result<bool> {
        if self.from.is_alone {
            // A VRA that has the journal open writes one at its next change, and promotes.
            let is_back = read_superblock(&mut self.storage, self.journal).is_some();
            anyhow::ensure!(
                !is_back,
                "a superblock was written meanwhile: something writes this journal; try again"
            );
            return Ok(false);
        }
        let superblock = self.superblock()?;
        still_there(&superblock, self.from.seq)
            .context("the checkpoint went away while it was copied; choose a newer one")?;
        let is_known = self.from.layout.knows_bad_ranges(&superblock);
        if is_known {
            self.from.volume.promoted().raise(superblock.low_water.seq);
        } else {
            self.collect()?;
        }
        Ok(!is_known)
    }

    /// After something could not be read: finds the segments again if they may lie elsewhere. Whether they do.
    fn look_again(&mut self) -> anyhow::Result<bool> {
        if self.check_still_there()? {
            return Ok(true);
        }
        if self.from.is_alone {
            return Ok(false);
        }
        let now = self.superblock()?;
        if self.from.layout.may_have_changed(&now) { self.collect() } else { Ok(false) }
    }

    fn superblock(&mut self) -> anyhow::Result<Superblock> {
        read_superblock(&mut self.storage, self.journal)
            .context("the journal's superblocks cannot be read any more")
    }

    /// Finds out anew where each byte was. Whether that is another place.
    fn collect(&mut self) -> anyhow::Result<bool> {
        let (volume, layout) =
            self.from.collect()().context("the journal changed and cannot be read again")?;
        let moved = layout != self.from.layout;
        (self.from.volume, self.from.layout) = (volume, layout);
        Ok(moved)
    }
}

/// Reads a recovery disk, in whole pages. Behind its end it is zero until promotion comes to the resize.
fn read_disk(
    storage: &mut ToolStorage,
    disk: FileId,
    offset_bytes: u64,
    into: &mut [u8],
) -> Result<(), StorageError> {
    let page = PAGE_BYTES as u64;
    let mut io = Blocking::new(storage, disk, Purpose::RecoveryDisk);
    let there = io.file_len_bytes()?.saturating_sub(offset_bytes).min(into.len() as u64) as usize;
    let (into, behind) = into.split_at_mut(there);
    behind.fill(0);
    if into.is_empty() {
        return Ok(());
    }
    let start = offset_bytes / page * page;
    let end = (offset_bytes + into.len() as u64).next_multiple_of(page);
    let read = io.read(start, (end - start) as usize)?;
    let skip = (offset_bytes - start) as usize;
    into.copy_from_slice(&read[skip..skip + into.len()]);
    Ok(())
}
