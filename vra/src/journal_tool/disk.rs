//! A disk as it was, read from the datastore's files beside a VRA that may be using them.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use journal::crypt::SiteKeys;
use journal::storage::ring::{Access, DirectFile};
use journal::view::VolumeView;

use super::image::HOLE_BYTES;
use super::place::Journal;
use crate::view::{Collect, Freshness, Layout, ScratchFile, ViewDisk, ViewSettings, ViewSource};

/// A disk at a moment.
pub(super) struct DiskAt {
    /// The VM's name.
    pub(super) vm: String,
    /// Its number in the VM.
    pub(super) number: u16,
    /// The last record that counts.
    pub(super) seq: u64,
    /// Where each byte was.
    pub(super) volume: VolumeView,
    /// Where the segments were when that was found out.
    pub(super) layout: Layout,
    /// No VRA can have opened a journal without superblocks.
    pub(super) is_alone: bool,
    /// What was promoted past it, if it is a locked checkpoint older than the history, and a view to go with it.
    beneath: Option<(ScratchFile, VolumeView)>,
    /// The journal's file.
    pub(super) journal: PathBuf,
    /// The recovery disk's.
    pub(super) recovery_disk: PathBuf,
    /// It was accepted that nobody knows what of the recovery disk is lost.
    without_bad_list: bool,
    keys: SiteKeys,
    logical_block_bytes: u32,
    #[cfg(test)]
    _alive: alive::Alive,
}

impl DiskAt {
    /// The disks of a VM after record `seq`: one, or all that it had.
    pub(super) fn of(journal: &Journal, seq: u64, only: Option<u16>) -> anyhow::Result<Vec<Self>> {
        let mut view = journal.reader.view(seq)?;
        let is_kept = journal.reader.kept_seq(seq).is_some();
        let mut other = is_kept.then(|| journal.reader.view(seq)).transpose()?;
        let numbers: Vec<u16> = match only {
            Some(number) => vec![number],
            None => view
                .volumes()
                .map(VolumeView::number)
                .filter(|number| !journal.has_left(*number, seq))
                .collect(),
        };
        if numbers.is_empty() {
            bail!("the VM {} had no disk at record {seq}; choose a later moment", journal.vm_name());
        }
        let disk = |number| {
            if journal.has_left(number, seq) {
                bail!(journal.no_disk(number));
            }
            let Ok(volume) = view.take_volume(number) else { bail!(journal.no_disk(number)) };
            // What is wrong with it is to be told before anything is written.
            journal.open_disk(number)?;
            let beneath = match &mut other {
                Some(other) => Some((journal.overlay(seq, number)?, other.take_volume(number)?)),
                None => None,
            };
            Ok(Self {
                beneath,
                vm: journal.vm_name(),
                number,
                seq,
                volume,
                layout: Layout::of(&journal.reader.survey),
                is_alone: journal.is_rebuilt,
                journal: journal.path.clone(),
                recovery_disk: journal.disk_path(number),
                without_bad_list: journal.reader.survey.bad_list_lost.is_some(),
                keys: journal.keys.clone(),
                logical_block_bytes: journal.logical_block_bytes(number),
                #[cfg(test)]
                _alive: alive::Alive::new(),
            })
        };
        numbers.into_iter().map(disk).collect()
    }

    /// Its length, in bytes. An overlay tells what it was then, the journal what it is where promotion has come to (E3).
    pub(super) fn size_bytes(&self) -> u64 {
        let kept = self.beneath.as_ref().and_then(|(overlay, _)| overlay.disk_bytes());
        kept.map_or(self.volume.size_bytes(), |kept| kept.min(self.volume.size_bytes()))
    }

    /// Whether the files alone don't tell what it was like: an overlay has a part of it.
    pub(super) fn has_overlay(&self) -> bool {
        self.beneath.is_some()
    }

    /// In words.
    pub(super) fn name(&self) -> String {
        format!("disk {} of {}", self.number, self.vm)
    }

    /// How to find out again where each byte was.
    pub(super) fn collect(&self) -> Collect {
        let (path, keys, seq, number) = (self.journal.clone(), self.keys.clone(), self.seq, self.number);
        let without_bad_list = self.without_bad_list;
        Box::new(move || {
            let journal = Journal::open(&path, &keys)?;
            journal.check_bad_list(without_bad_list)?;
            let volume = journal.reader.view(seq)?.take_volume(number)?;
            Ok((volume, Layout::of(&journal.reader.survey)))
        })
    }

    /// As a disk that doors serve.
    pub(super) fn served(self, scratch: Option<crate::view::ScratchFile>) -> anyhow::Result<Arc<ViewDisk>> {
        let settings = ViewSettings { logical_block_bytes: self.logical_block_bytes, look_for_holes: true };
        let freshness = match self.is_alone {
            true => Freshness::Flag(Arc::default()),
            false => Freshness::Collected { layout: self.layout.clone(), collect: self.collect() },
        };
        let source = |volume, freshness, beneath| -> anyhow::Result<ViewSource> {
            Ok(ViewSource {
                journal: DirectFile::open(&self.journal, Access::ReadOnly)?.file().try_clone()?,
                recovery_disk: DirectFile::open(&self.recovery_disk, Access::ReadOnly)?.file().try_clone()?,
                seq: self.seq,
                volume,
                freshness,
                beneath,
                keep: Box::new(()),
            })
        };
        let beneath = match self.beneath {
            Some((overlay, volume)) => {
                Some(ViewDisk::new(source(volume, Freshness::Superblock, None)?, settings, Some(overlay))?)
            }
            None => None,
        };
        Ok(ViewDisk::new(source(self.volume, freshness, beneath)?, settings, scratch)?)
    }

    /// The most space that a sparse image of it takes, in bytes: blocks of [`HOLE_BYTES`] that may hold something. Waits for the
    /// filesystem's metadata.
    pub(super) fn needed_bytes(&self) -> anyhow::Result<u64> {
        let recovery_disk = DirectFile::open(&self.recovery_disk, Access::ReadOnly)?;
        let mut blocks = Blocks::default();
        let mut at = 0;
        for piece in self.volume.index().pieces() {
            let end_bytes = piece.end_bytes().min(self.size_bytes());
            blocks.add_data_of(recovery_disk.file(), at, piece.offset_bytes.min(self.size_bytes()));
            if !piece.is_zeroes() {
                blocks.add(piece.offset_bytes, end_bytes);
            }
            at = end_bytes;
        }
        blocks.add_data_of(recovery_disk.file(), at, self.size_bytes());
        Ok(blocks.count * HOLE_BYTES)
    }
}

/// What helps against damage. What is `lost` is so on the recovery disk, before all that the journal still has.
pub(super) fn remedy(lost: bool) -> &'static str {
    match lost {
        true => {
            "it is lost on the recovery disk, so an older checkpoint does not help: one after the place was written again does, or \
             --skip-damaged, which has zeroes there; `vra-journal verify` names all damage"
        }
        false => {
            "a checkpoint before the damaged record may be whole, or one after the place was written again; --skip-damaged has zeroes \
             there; `vra-journal verify` names all damage"
        }
    }
}

/// Blocks of [`HOLE_BYTES`] that hold something, met in order.
#[derive(Default)]
struct Blocks {
    count: u64,
    /// The first one that isn't counted.
    next: u64,
}

impl Blocks {
    fn add(&mut self, from: u64, until: u64) {
        if from < until {
            let (first, behind) = ((from / HOLE_BYTES).max(self.next), until.div_ceil(HOLE_BYTES));
            self.count += behind.saturating_sub(first);
            self.next = self.next.max(behind);
        }
    }

    /// What a file has in a range that isn't a hole.
    fn add_data_of(&mut self, file: &File, mut at: u64, end_bytes: u64) {
        while at < end_bytes {
            let Some(data) = next(file, at, libc::SEEK_DATA).filter(|data| *data < end_bytes) else { return };
            let hole = next(file, data, libc::SEEK_HOLE).unwrap_or(end_bytes).min(end_bytes);
            self.add(data, hole);
            at = hole.max(at + 1);
        }
    }
}

/// The next place of data, or the next hole, at or after a place of a file, in bytes. Nothing if the file ends before; the place itself
/// if the filesystem doesn't say.
pub(super) fn next(file: &File, at_bytes: u64, whence: i32) -> Option<u64> {
    // SAFETY: no memory is involved; nobody else uses the descriptor's position.
    let place =
        unsafe { libc::lseek(std::os::fd::AsRawFd::as_raw_fd(file), at_bytes as libc::off_t, whence) };
    match u64::try_from(place) {
        Ok(place) => Some(place),
        Err(_) if nix::errno::Errno::last() == nix::errno::Errno::ENXIO => None,
        Err(_) if whence == libc::SEEK_DATA => Some(at_bytes),
        Err(_) => None,
    }
}

/// How many disks a thread has at once, with all that it is known where their bytes are.
#[cfg(test)]
pub(super) mod alive {
    use std::cell::Cell;

    thread_local! {
        static NOW: Cell<usize> = const { Cell::new(0) };
        static MOST: Cell<usize> = const { Cell::new(0) };
    }

    pub(super) struct Alive(());

    impl Alive {
        pub(super) fn new() -> Self {
            NOW.set(NOW.get() + 1);
            MOST.set(MOST.get().max(NOW.get()));
            Self(())
        }
    }

    impl Drop for Alive {
        fn drop(&mut self) {
            NOW.set(NOW.get() - 1);
        }
    }

    /// The most so far.
    pub(in crate::journal_tool) fn most() -> usize {
        MOST.get()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn blocks_that_hold_something_are_counted_once() {
        let mut blocks = Blocks::default();
        for (from, until) in
            [(0, 0), (1, 2), (512, 1024), (HOLE_BYTES - 1, HOLE_BYTES + 1), (5 * HOLE_BYTES, 7 * HOLE_BYTES)]
        {
            blocks.add(from, until);
        }
        assert_eq!(blocks.count, 4);
    }

    #[test]
    fn holes_of_a_file_are_not_counted() {
        let path = std::env::temp_dir().join(format!("holdfast-holes-{}", std::process::id()));
        let file =
            File::options().create(true).truncate(true).read(true).write(true).open(&path).expect("a file");
        std::fs::remove_file(&path).expect("removed");
        file.set_len(100 * HOLE_BYTES).expect("long");
        file.write_all_at(&[1; 4096], 10 * HOLE_BYTES).expect("written");
        file.write_all_at(&[1; 4096], 90 * HOLE_BYTES).expect("written");
        file.sync_all().expect("synced");
        let count = |from: u64, until: u64| {
            let mut blocks = Blocks::default();
            blocks.add_data_of(&file, from * HOLE_BYTES, until * HOLE_BYTES);
            blocks.count
        };
        // Behind the file's end there is nothing.
        assert_eq!((count(0, 100), count(0, 200), count(11, 90), count(90, 91)), (2, 2, 0, 1));
    }
}
