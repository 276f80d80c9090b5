//! A VM's disks as they were at a sequence number: recovery disks and the journal up to it.

mod part;
mod promoted;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::bad_ranges::BadRange;
use crate::batch::{Checkpoint, RecordKind};
use crate::catalogue::{Catalogue, CheckpointEntry};
use crate::crypt::Ciphers;
use crate::format::{Footer, FooterEvent, Gap, Superblock, SuperblockError, VolumeState};
use crate::index::{Index, IndexBuilder};
use crate::planted::{Bug, planted};
use crate::recovery::{
    Content, OpenError, Segment, SegmentError, Survey, SurveyOptions, each_footer, survey,
};
use crate::storage::{AlignedBuf, Blocking, FileId, Purpose, Storage, StorageError};

pub use part::JournalPart;
pub use promoted::Promoted;

/// A journal opened to read, beside its writer if there is one. Nothing is written and no lock is needed.
#[derive(Debug)]
pub struct Reader {
    /// What the file holds.
    pub survey: Survey,
    footers: Vec<Footer>,
    catalogue: Catalogue,
    /// Checkpoints older than the history that somebody else keeps: their cuts, and through where.
    kept: BTreeMap<u64, u64>,
}

/// Why a view cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The journal cannot be opened.
    #[error("the journal cannot be opened")]
    Open(#[from] OpenError),
    /// A segment cannot be read.
    #[error("the journal cannot be read")]
    Segment(#[from] SegmentError),
    /// The file failed.
    #[error("the journal's file failed")]
    Storage(#[from] StorageError),
    /// The number is older or newer than the history, or promotion has announced itself through it (C2).
    #[error("record {seq} is not in the history, which reaches from {oldest_seq} to {newest_seq}")]
    Gone {
        /// The number.
        seq: u64,
        /// The oldest number that can be opened.
        oldest_seq: u64,
        /// The newest.
        newest_seq: u64,
    },
    /// There is no history: the first sync isn't complete, or the history was given up.
    #[error("the journal has no history: a sync is not complete")]
    NoHistory,
    /// A sync was under way at that number.
    #[error("at record {seq} a sync was under way: the disks were not consistent")]
    InsideSync {
        /// The number.
        seq: u64,
    },
    /// The VM has no such volume, or it had none at that number.
    #[error("volume {0} is not in this view")]
    NoVolume(u16),
    /// The read goes over the disk's end.
    #[error("the range is outside of the disk")]
    Range,
    /// What was read is not what was written.
    #[error("checksum of record {seq} is wrong at {offset_bytes} of volume {volume}")]
    Corrupt {
        /// The record.
        seq: u64,
        /// The volume.
        volume: u16,
        /// Where on the volume, in bytes.
        offset_bytes: u64,
    },
    /// The superblock can't be read any more.
    #[error("the journal's superblock cannot be read")]
    Superblock(#[source] SuperblockError),
    /// Whoever opens it didn't want so much memory to be taken.
    #[error("the journal's index takes too much memory")]
    TooLarge {
        /// What it takes while it is opened, in bytes.
        opening_bytes: u64,
    },
}

impl From<BadRange> for ViewError {
    fn from(bad: BadRange) -> Self {
        Self::Corrupt { seq: bad.seq, volume: bad.volume, offset_bytes: bad.offset_bytes }
    }
}

impl Reader {
    /// Finds out what a journal holds.
    ///
    /// # Errors
    /// The file is no journal, or a segment cannot be read.
    pub fn open<S: Storage>(
        storage: &mut S,
        file: FileId,
        options: &SurveyOptions,
    ) -> Result<Self, ViewError> {
        Self::open_if(storage, file, options, |_| true)
    }

    /// The same, if `may_take` allows the bytes of memory that it takes to make a view, of which about a third stays.
    ///
    /// # Errors
    /// As for [`Reader::open`], and [`ViewError::TooLarge`].
    pub fn open_if<S: Storage>(
        storage: &mut S,
        file: FileId,
        options: &SurveyOptions,
        mut may_take: impl FnMut(u64) -> bool,
    ) -> Result<Self, ViewError> {
        let mut tries_left = 10;
        loop {
            let found = Self::try_open(storage, file, options, &mut may_take);
            if let Err(ViewError::TooLarge { .. }) = found {
                return found;
            }
            // Beside a writer, segments may have been freed and reused meanwhile.
            let mut io = Blocking::new(storage, file, Purpose::View);
            let now = crate::recovery::read_superblock(&mut io, options.skip_unreadable)?.superblock;
            let unchanged = found
                .as_ref()
                .is_ok_and(|reader| reader.survey.superblock.low_water_segment == now.low_water_segment);
            tries_left -= 1;
            if unchanged || tries_left == 0 || (found.is_err() && tries_left < 8) {
                return found;
            }
        }
    }

    fn try_open<S: Storage>(
        storage: &mut S,
        file: FileId,
        options: &SurveyOptions,
        may_take: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Self, ViewError> {
        let survey = survey(storage, file, options)?;
        let footer_bytes = |segment: &Segment| match &segment.content {
            Content::Sealed(trailer) => trailer.footer_len_bytes,
            // Its batches were read: no footer is needed for what they hold.
            Content::Scanned(_) => 0,
        };
        let footers_bytes = survey.segments.iter().map(footer_bytes).fold(0_u64, u64::saturating_add);
        // The footers, what is put in order, and the index are there together for a while.
        let opening_bytes = footers_bytes.saturating_mul(3);
        if !may_take(opening_bytes) {
            return Err(ViewError::TooLarge { opening_bytes });
        }
        Self::of(storage, file, survey)
    }

    /// Reads what a survey found. Nobody writes to the file meanwhile.
    ///
    /// # Errors
    /// A segment cannot be read.
    pub fn of<S: Storage>(storage: &mut S, file: FileId, survey: Survey) -> Result<Self, ViewError> {
        let mut io = Blocking::new(storage, file, Purpose::View);
        let mut footers = Vec::with_capacity(survey.segments.len());
        each_footer(&survey.segments, &mut io, &survey.superblock, |footer| footers.push(footer))?;
        let catalogue =
            Catalogue::build(&survey.superblock, footers.iter().flat_map(|footer| &footer.events));
        Ok(Self { survey, footers, catalogue, kept: BTreeMap::new() })
    }

    /// The journal's checkpoints.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// Everything in the journal that is not data, in the order of the stream.
    pub fn events(&self) -> impl Iterator<Item = &FooterEvent> {
        self.footers.iter().flat_map(|footer| &footer.events)
    }

    /// Records that nobody can read any more although later ones are there: from the first of each on nothing can be opened, until a sync
    /// that began behind it has ended.
    pub fn gaps(&self) -> impl Iterator<Item = Gap> {
        self.footers.iter().flat_map(|footer| &footer.gaps).copied().filter(Gap::has_records)
    }

    /// The footers of the segments, oldest first.
    pub fn footers(&self) -> &[Footer] {
        &self.footers
    }

    /// The newest number.
    pub fn newest_seq(&self) -> u64 {
        self.survey.tail.seq
    }

    /// The disks as they were after record `seq`. Any number of the history between syncs will do; a group's disks belong
    /// together only at a checkpoint's cut.
    ///
    /// # Errors
    /// The number is not in the history.
    pub fn view(&self, seq: u64) -> Result<View, ViewError> {
        self.view_kept(seq, self.kept_seq(seq).unwrap_or(seq))
    }

    /// Lists a checkpoint that is older than the history, of which somebody else keeps everything that the records after its cut and up to
    /// `kept_seq` have changed. False if that isn't enough.
    pub fn add_kept(&mut self, checkpoint: Checkpoint, kept_seq: u64) -> bool {
        let superblock = &self.survey.superblock;
        let is_enough = kept_seq >= superblock.oldest_seq() && !superblock.state.is_base_sync();
        if is_enough {
            self.kept.insert(checkpoint.cut, kept_seq);
            self.catalogue.add(CheckpointEntry { seq: checkpoint.cut, checkpoint });
        }
        is_enough
    }

    /// Through where somebody else keeps what the records after this number have changed, if it is that of a checkpoint older than the history.
    pub fn kept_seq(&self, seq: u64) -> Option<u64> {
        self.kept.get(&seq).copied()
    }

    /// The same for a view of which somebody else keeps everything that the records after `seq` and up to `kept_seq` have changed: only
    /// beneath that it is as it was.
    ///
    /// # Errors
    /// The number is not in the history, or what was promoted was not kept.
    pub fn view_kept(&self, seq: u64, kept_seq: u64) -> Result<View, ViewError> {
        let superblock = &self.survey.superblock;
        if superblock.state.is_base_sync() {
            return Err(ViewError::NoHistory);
        }
        let (oldest_seq, newest_seq) = (superblock.oldest_seq(), self.newest_seq());
        if kept_seq.max(seq) < oldest_seq || seq > newest_seq {
            return Err(ViewError::Gone { seq, oldest_seq, newest_seq });
        }
        // What is below the low-water mark was looked at when the view was first opened.
        if seq >= superblock.low_water.seq && !self.catalogue.is_consistent(seq) {
            return Err(ViewError::InsideSync { seq });
        }
        let ciphers = self.survey.ciphers();
        let mut volumes = BTreeMap::new();
        for (number, state) in (0_u16..).zip(&superblock.volumes) {
            if state.base_seq > seq {
                continue;
            }
            volumes.insert(number, self.volume_view(number, state, seq, ciphers.clone()));
        }
        Ok(View { seq, volumes })
    }

    fn volume_view(&self, number: u16, state: &VolumeState, seq: u64, ciphers: Ciphers) -> VolumeView {
        let slot_len_bytes = self.survey.superblock.slot_len_bytes;
        let extent_count = self.footers.iter().map(|footer| footer.extents_of(number).len()).sum();
        let mut builder = IndexBuilder::with_capacity(extent_count);
        for (segment, footer) in self.survey.segments.iter().zip(&self.footers) {
            if footer.base_seq < seq {
                builder.add(footer, segment.header.slot, slot_len_bytes, number, state.base_seq, seq);
            }
        }
        let promoted = Promoted::new(&self.survey.bad_ranges);
        let resizes = self.events().filter(|event| {
            let record = &event.record;
            record.kind == RecordKind::Resize && record.volume == number && record.seq <= seq
        });
        let size_bytes = resizes.last().map_or(state.size_bytes, |event| event.record.len_bytes);
        VolumeView { number, size_bytes, index: builder.build(), promoted, ciphers }
    }
}

/// The disks of a VM at a sequence number.
#[derive(Debug)]
pub struct View {
    seq: u64,
    volumes: BTreeMap<u16, VolumeView>,
}

impl View {
    /// The number.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Follows a promotion that goes on beneath the view, through at most the view's own number.
    pub fn follow(&mut self, promoted: &Promoted) {
        self.volumes.values_mut().for_each(|volume| volume.promoted = promoted.clone());
    }

    /// The volumes that existed then.
    pub fn volumes(&self) -> impl Iterator<Item = &VolumeView> {
        self.volumes.values()
    }

    /// One volume.
    ///
    /// # Errors
    /// It isn't in the view.
    pub fn volume(&self, number: u16) -> Result<&VolumeView, ViewError> {
        self.volumes.get(&number).ok_or(ViewError::NoVolume(number))
    }

    /// Takes one volume out, to serve it.
    ///
    /// # Errors
    /// It isn't in the view.
    pub fn take_volume(&mut self, number: u16) -> Result<VolumeView, ViewError> {
        self.volumes.remove(&number).ok_or(ViewError::NoVolume(number))
    }
}

/// Whether a view at `seq` may still be read, from a superblock read after the recovery disk was (C2). Recovery disks
/// change under a view only after promotion has announced itself, so a reader in another process asks this after each read
/// of a recovery disk.
///
/// # Errors
/// The checkpoint is gone.
pub fn still_there(superblock: &Superblock, seq: u64) -> Result<(), ViewError> {
    let oldest_seq = superblock.oldest_seq();
    if superblock.state.is_base_sync() || seq < oldest_seq {
        return Err(ViewError::Gone { seq, oldest_seq, newest_seq: seq });
    }
    Ok(())
}

/// One disk at a sequence number.
#[derive(Debug)]
pub struct VolumeView {
    number: u16,
    size_bytes: u64,
    index: Index,
    promoted: Promoted,
    ciphers: Ciphers,
}

/// A part of a read: where it comes from. Parts are in order and cover the range asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadPart {
    /// From the recovery disk, at the same place.
    RecoveryDisk {
        /// Place on the volume and on the recovery disk, in bytes.
        offset_bytes: u64,
        /// Length, in bytes.
        len_bytes: u64,
    },
    /// Zeroes.
    Zeroes {
        /// Place on the volume, in bytes.
        offset_bytes: u64,
        /// Length, in bytes.
        len_bytes: u64,
    },
    /// From the journal's file.
    Journal(JournalPart),
    /// Lost, because the record was damaged before it was promoted (C5): an error.
    Bad(BadRange),
}

impl From<JournalPart> for ReadPart {
    fn from(part: JournalPart) -> Self {
        Self::Journal(part)
    }
}

impl VolumeView {
    /// Which volume of the VM.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Its size then, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Where each byte is.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// What decrypts the journal's part of a read.
    pub fn ciphers(&self) -> &Ciphers {
        &self.ciphers
    }

    /// How far the promotion beneath the view has come.
    pub fn promoted(&self) -> &Promoted {
        &self.promoted
    }

    /// The first part of a range that the recovery disk has lost (C5).
    pub fn first_bad(&self, range: Range<u64>) -> Option<BadRange> {
        self.promoted.snapshot().1?.first_in(self.number, range)
    }

    /// How to read a range, in parts. If a checksum is wrong and promotion has come further since, what was read is not what the record
    /// wrote: it is to be planned and read again.
    ///
    /// # Errors
    /// The range is outside of the disk.
    pub fn plan_read(&self, offset_bytes: u64, len_bytes: u64) -> Result<Vec<ReadPart>, ViewError> {
        let end_bytes = offset_bytes.checked_add(len_bytes).filter(|end| *end <= self.size_bytes);
        let end_bytes = end_bytes.ok_or(ViewError::Range)?;
        let (mut parts, mut at) = (Vec::new(), offset_bytes);
        let (promoted_seq, bad_ranges) = self.promoted.snapshot();
        let promoted_seq = if planted(Bug::ViewNotRepointed) { 0 } else { promoted_seq };
        let gap = |parts: &mut Vec<ReadPart>, mut from: u64, until: u64| {
            while from < until {
                let bad = bad_ranges.as_ref().and_then(|bad| bad.first_in(self.number, from..until));
                let good_end = bad.map_or(until, |bad| bad.offset_bytes);
                if from < good_end {
                    parts.push(ReadPart::RecoveryDisk { offset_bytes: from, len_bytes: good_end - from });
                }
                parts.extend(bad.map(ReadPart::Bad));
                from = bad.map_or(until, |bad| bad.offset_bytes + bad.len_bytes);
            }
        };
        for piece in self.index.overlapping(offset_bytes, len_bytes) {
            if piece.seq <= promoted_seq {
                continue;
            }
            let (from, until) = (piece.offset_bytes.max(at), piece.end_bytes().min(end_bytes));
            gap(&mut parts, at, from);
            parts.push(match piece.payload() {
                None => ReadPart::Zeroes { offset_bytes: from, len_bytes: until - from },
                Some(payload) => {
                    JournalPart::new(self.number, &self.index, piece, &payload, from..until).into()
                }
            });
            at = until;
        }
        gap(&mut parts, at, end_bytes);
        Ok(parts)
    }

    /// Reads a range at once, for tools and tests. `read_disk` reads the recovery disk: place, memory to fill.
    ///
    /// # Errors
    /// A file failed, or a checksum is wrong.
    pub fn read<S: Storage>(
        &self,
        storage: &mut S,
        journal: FileId,
        offset_bytes: u64,
        into: &mut [u8],
        mut read_disk: impl FnMut(&mut S, u64, &mut [u8]) -> Result<(), StorageError>,
    ) -> Result<(), ViewError> {
        let mut rest = into;
        for part in self.plan_read(offset_bytes, rest.len() as u64)? {
            let len_bytes = match &part {
                ReadPart::RecoveryDisk { len_bytes, .. } | ReadPart::Zeroes { len_bytes, .. } => *len_bytes,
                ReadPart::Journal(part) => part.len_bytes,
                ReadPart::Bad(bad) => bad.len_bytes,
            };
            let (now, later) = rest.split_at_mut(len_bytes as usize);
            rest = later;
            match part {
                ReadPart::Bad(bad) => return Err(bad.into()),
                ReadPart::Zeroes { .. } => now.fill(0),
                ReadPart::RecoveryDisk { offset_bytes, .. } => read_disk(storage, offset_bytes, now)?,
                ReadPart::Journal(part) => {
                    let mut io = Blocking::new(storage, journal, Purpose::View);
                    let mut read: AlignedBuf = io.read(part.read_offset_bytes, part.read_len_bytes)?;
                    self.ciphers.decrypt(part.read_offset_bytes, &mut read);
                    now.copy_from_slice(part.check(&read)?);
                }
            }
        }
        Ok(())
    }
}
