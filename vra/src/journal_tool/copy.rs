//! A disk as it was, copied into a raw image.

use std::fs::File;

use anyhow::Context;
use journal::format::{PAGE_BYTES, Superblock};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{Blocking, FileId, Purpose, StorageError};
use journal::view::{ReadPart, still_there};

use super::disk::{DiskAt, next};
use super::image::Image;
use super::place::read_superblock;
use super::progress::Progress;
use super::signals::Signals;

/// How much is read at once, in bytes.
const STEP_BYTES: u64 = 1 << 20;

/// A copy under way.
pub(super) struct Copy {
    from: DiskAt,
    storage: RingStorage,
    journal: FileId,
    recovery_disk: FileId,
    /// The recovery disk again, to ask for its holes.
    holes: File,
}

impl Copy {
    /// Of this disk.
    pub(super) fn new(from: DiskAt) -> anyhow::Result<Self> {
        let mut storage = RingStorage::new(64).context("cannot set up io_uring: is it disabled here?")?;
        let journal = storage.add_file(DirectFile::open(&from.journal, Access::ReadOnly)?);
        let disk = DirectFile::open(&from.recovery_disk, Access::ReadOnly)?;
        let holes = disk.file().try_clone()?;
        let recovery_disk = storage.add_file(disk);
        Ok(Self { from, storage, journal, recovery_disk, holes })
    }

    /// Copies all of it; how much holds data, in bytes.
    pub(super) fn run(
        &mut self,
        image: &Image,
        progress: &mut Progress,
        signals: &mut Signals,
    ) -> anyhow::Result<u64> {
        let size_bytes = self.from.size_bytes();
        image.set_len(size_bytes)?;
        let mut buffer = vec![0; STEP_BYTES as usize];
        let (mut at, mut data_bytes) = (0, 0);
        while at < size_bytes {
            signals.check()?;
            let bytes = &mut buffer[..STEP_BYTES.min(size_bytes - at) as usize];
            if self.read(at, bytes)? {
                data_bytes += image.write(at, bytes)?;
            }
            at += bytes.len() as u64;
            progress.set(at);
        }
        Ok(data_bytes)
    }

    /// Reads a range; false if nothing is there.
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> anyhow::Result<bool> {
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
                true => Ok(()),
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
                return Err(anyhow::Error::new(error).context(format!(
                    "{} cannot be read at {at}; `vra-journal verify` names all damage, an older checkpoint may be whole",
                    self.from.name()
                )));
            }
            if uses_disk {
                self.check_still_there()?;
            }
            return Ok(!is_empty);
        }
    }

    /// Recovery disks change only after the superblock has said so (C2). Whether the disk was looked for anew, since what of its recovery
    /// disk can't be trusted has changed (C5).
    fn check_still_there(&mut self) -> anyhow::Result<bool> {
        if self.from.is_alone {
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
    storage: &mut RingStorage,
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
