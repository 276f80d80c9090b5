//! Promotion: the journal's oldest segments go to the recovery disks (C2). Sans-I/O: whoever drives it owns the files.
//!
//! The caller has announced it ([`crate::writer::Change::AnnouncePromotion`]) and moves the low-water mark when it has ended
//! ([`crate::writer::Change::EndPromotion`]). In between this machine reads the segments' footers, finds the newest record of each block,
//! and carries those blocks over in the order of the disk; then it syncs the disks. Doing it again after a crash, whole or in part, gives the
//! same disks.

mod run;
mod runs;

use std::collections::{BTreeMap, VecDeque};

use crate::batch::RecordKind;
use crate::format::{ChainPoint, Footer, FooterEvent, Superblock, slot_offset_bytes};
use crate::index::IndexBuilder;
use crate::planted::{Bug, planted};
use crate::scan::{Ownership, scan};
use crate::storage::{AlignedBuf, Op, Purpose, StorageError};
use crate::writer::ClosedSegment;

use run::Run;
pub use runs::TransferSizes;
use runs::{Runs, Work};

/// A file that a promotion works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromotionFile {
    /// The journal.
    Journal,
    /// The recovery disk of the volume with this number.
    Disk(u16),
}

/// Something to do. The answer comes by [`Promotion::done`].
#[derive(Debug)]
pub struct PromotionAction {
    /// Names it in the answer.
    pub token: u64,
    /// On which file.
    pub file: PromotionFile,
    /// What it is for.
    pub purpose: Purpose,
    /// What to do.
    pub op: Op,
}

/// What a promotion did, for [`crate::writer::Change::EndPromotion`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promoted {
    /// The recovery disks hold everything up to here, durably.
    pub through: ChainPoint,
    /// The volumes' sizes there, by number, in bytes.
    pub size_bytes: Vec<u64>,
    /// How much was written to the recovery disks, in bytes, without zeroes.
    pub written_bytes: u64,
}

/// Why a promotion cannot go on. The journal and the recovery disks stay as they are: announced, not promoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromotionError {
    /// A recovery disk failed.
    #[error("recovery disk {volume} failed")]
    Disk {
        /// Its volume.
        volume: u16,
        /// Why.
        #[source]
        source: StorageError,
    },
    /// The journal's file failed.
    #[error("the journal's file failed")]
    Journal(#[source] StorageError),
    /// A segment's footer and batches are damaged: it isn't known what it holds.
    #[error("segment {number} is damaged after record {after_seq}, and so is its footer")]
    Segment {
        /// The segment.
        number: u64,
        /// The last record that can be read.
        after_seq: u64,
    },
    /// A record's payload is damaged.
    #[error("checksum of record {seq} is wrong at {offset_bytes} of volume {volume}")]
    Record {
        /// The record.
        seq: u64,
        /// Its volume.
        volume: u16,
        /// Where on the volume, in bytes.
        offset_bytes: u64,
    },
}

impl PromotionError {
    fn of(file: PromotionFile, source: StorageError) -> Self {
        match file {
            PromotionFile::Journal => Self::Journal(source),
            PromotionFile::Disk(volume) => Self::Disk { volume, source },
        }
    }
}

/// One promotion under way.
#[derive(Debug)]
pub struct Promotion {
    through: ChainPoint,
    superblock: Superblock,
    segments: Vec<ClosedSegment>,
    /// The images' space stays reserved where they read zeroes.
    reserved: Vec<bool>,
    sizes: TransferSizes,
    stage: Stage,
    ready: VecDeque<(Doing, PromotionFile, Op)>,
    running: BTreeMap<u64, (Doing, PromotionFile)>,
    next_token: u64,
    /// Runs whose reads have not all ended.
    reading: BTreeMap<u64, Run>,
    next_run: u64,
    /// Of runs that are being read or written.
    in_flight_bytes: u64,
    touched: Vec<bool>,
    size_bytes: Vec<u64>,
    written_bytes: u64,
}

#[derive(Debug)]
enum Stage {
    /// Finding out what the segments hold; how many have not told yet.
    Footers {
        missing: usize,
        builders: Vec<IndexBuilder>,
    },
    Carrying(Runs),
    Syncing,
    Done,
}

#[derive(Clone, Copy, Debug)]
enum Doing {
    ReadFooter { segment: usize },
    ReadSlot { segment: usize },
    ReadFor { run: u64, read: usize },
    Write { len_bytes: u64 },
    Punch { volume: u16, offset_bytes: u64, len_bytes: u64 },
    Reserve,
    Sync,
}

/// Operations of one promotion in the kernel at once.
const MAX_RUNNING: usize = 128;

impl Promotion {
    /// Promotes these segments, the oldest of the journal. `reserved` says of each volume's recovery disk whether its space stays reserved
    /// where it reads zeroes.
    pub fn new(
        superblock: Superblock,
        segments: Vec<ClosedSegment>,
        reserved: Vec<bool>,
        sizes: TransferSizes,
    ) -> Self {
        let through = segments.last().map_or(superblock.low_water, |segment| segment.last);
        let count = superblock.volumes.len();
        let size_bytes = superblock.volumes.iter().map(|volume| volume.size_bytes).collect();
        let mut promotion = Self {
            through,
            superblock,
            segments,
            reserved,
            sizes,
            stage: Stage::Done,
            ready: VecDeque::new(),
            running: BTreeMap::new(),
            next_token: 1,
            reading: BTreeMap::new(),
            next_run: 0,
            in_flight_bytes: 0,
            touched: vec![false; count],
            size_bytes,
            written_bytes: 0,
        };
        let skipped = usize::from(planted(Bug::PromotionSkipsSegment) && promotion.segments.len() > 1);
        for segment in skipped..promotion.segments.len() {
            promotion.ask_for_footer(segment);
        }
        let builders = std::iter::repeat_with(IndexBuilder::default).take(count).collect();
        promotion.stage = Stage::Footers { missing: promotion.ready.len(), builders };
        promotion
    }

    /// Where it ends.
    pub fn through(&self) -> ChainPoint {
        self.through
    }

    /// Whether an operation is under way.
    pub fn is_busy(&self) -> bool {
        !self.running.is_empty()
    }

    /// What it did, once it has ended.
    pub fn promoted(&self) -> Option<Promoted> {
        matches!(self.stage, Stage::Done).then(|| Promoted {
            through: self.through,
            size_bytes: self.size_bytes.clone(),
            written_bytes: self.written_bytes,
        })
    }

    /// The next thing to do, as long as no more than `window_bytes` of disk content are under way.
    pub fn poll_action(&mut self, window_bytes: u64) -> Option<PromotionAction> {
        if self.running.len() >= MAX_RUNNING {
            return None;
        }
        self.advance(window_bytes);
        let (doing, file, op) = self.ready.pop_front()?;
        let token = self.next_token;
        self.next_token += 1;
        self.running.insert(token, (doing, file));
        let purpose = match file {
            PromotionFile::Journal => Purpose::PromotionRead,
            PromotionFile::Disk(_) => Purpose::Promotion,
        };
        Some(PromotionAction { token, file, purpose, op })
    }

    /// An action has ended. True when the promotion has.
    ///
    /// # Errors
    /// It cannot go on. Whoever drives it waits until nothing is under way, then drops it.
    pub fn done(
        &mut self,
        token: u64,
        result: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<bool, PromotionError> {
        let Some((doing, file)) = self.running.remove(&token) else { return Ok(false) };
        match (doing, result) {
            (Doing::ReadFooter { segment }, result) => self.footer_read(segment, result.ok().flatten()),
            (Doing::ReadSlot { segment }, result) => {
                let slot = result.map_err(PromotionError::Journal)?.expect("a read gives its buffer back");
                self.slot_read(segment, &slot)?;
            }
            (Doing::ReadFor { run, read }, result) => self.run_read(run, read, result)?,
            (Doing::Write { len_bytes }, Ok(_)) => {
                self.in_flight_bytes -= len_bytes;
                self.written_bytes += len_bytes;
            }
            (Doing::Punch { volume, offset_bytes, len_bytes }, Ok(_)) => {
                if self.reserved[usize::from(volume)] {
                    let op = Op::Allocate { offset_bytes, len_bytes };
                    self.ready.push_back((Doing::Reserve, PromotionFile::Disk(volume), op));
                }
            }
            (Doing::Reserve | Doing::Sync, Ok(_)) => {}
            (_, Err(source)) => return Err(PromotionError::of(file, source)),
        }
        self.end_stage();
        Ok(matches!(self.stage, Stage::Done))
    }

    fn advance(&mut self, window_bytes: u64) {
        self.end_stage();
        while self.ready.is_empty() && (self.in_flight_bytes == 0 || self.in_flight_bytes < window_bytes) {
            let Stage::Carrying(runs) = &mut self.stage else { return };
            match runs.next() {
                Some(Work::Run(run)) => self.begin_run(run),
                Some(Work::Zeroes { volume, offset_bytes, len_bytes }) => {
                    self.touched[usize::from(volume)] = true;
                    let doing = Doing::Punch { volume, offset_bytes, len_bytes };
                    let op = Op::Punch { offset_bytes, len_bytes };
                    self.ready.push_back((doing, PromotionFile::Disk(volume), op));
                }
                None => return,
            }
        }
    }

    /// Goes from stage to stage as long as nothing is left of one: a promotion without anything to write ends at once.
    fn end_stage(&mut self) {
        while self.ready.is_empty() && self.running.is_empty() {
            match &mut self.stage {
                Stage::Footers { missing: 0, builders } => {
                    let indexes = std::mem::take(builders).into_iter().map(IndexBuilder::build).collect();
                    self.stage = Stage::Carrying(Runs::new(indexes, self.sizes));
                }
                Stage::Carrying(runs) if runs.is_done() => {
                    self.stage = Stage::Syncing;
                    let touched = (0_u16..).zip(&self.touched).filter(|(_, touched)| **touched);
                    if !planted(Bug::PromotionWithoutSync) {
                        let sync = |(volume, _)| (Doing::Sync, PromotionFile::Disk(volume), Op::Sync);
                        self.ready.extend(touched.map(sync));
                    }
                }
                Stage::Syncing => self.stage = Stage::Done,
                Stage::Footers { .. } | Stage::Carrying(_) | Stage::Done => return,
            }
        }
    }

    fn ask_for_footer(&mut self, segment: usize) {
        let ClosedSegment { header, trailer, .. } = &self.segments[segment];
        let Some(trailer) = trailer else { return self.ask_for_slot(segment) };
        let offset_bytes =
            slot_offset_bytes(header.slot, self.superblock.slot_len_bytes) + trailer.data_end_bytes;
        let op = Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(trailer.footer_len_bytes as usize) };
        self.ready.push_back((Doing::ReadFooter { segment }, PromotionFile::Journal, op));
    }

    /// A segment without a footer that can be believed is read whole.
    fn ask_for_slot(&mut self, segment: usize) {
        let slot_len_bytes = self.superblock.slot_len_bytes;
        let offset_bytes = slot_offset_bytes(self.segments[segment].header.slot, slot_len_bytes);
        let op = Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(slot_len_bytes as usize) };
        self.ready.push_back((Doing::ReadSlot { segment }, PromotionFile::Journal, op));
    }

    fn footer_read(&mut self, segment: usize, bytes: Option<AlignedBuf>) {
        let trailer = self.segments[segment].trailer.as_ref();
        let footer = bytes.zip(trailer).and_then(|(bytes, trailer)| {
            Footer::decode(&bytes, trailer.footer_crc, trailer.data_end_bytes).ok()
        });
        match footer {
            Some(footer) => self.take_footer(segment, &footer),
            None => self.ask_for_slot(segment),
        }
    }

    fn slot_read(&mut self, segment: usize, slot: &[u8]) -> Result<(), PromotionError> {
        let ClosedSegment { header, last, .. } = &self.segments[segment];
        let found = scan(slot, header, Ownership::of(&self.superblock), None);
        if found.last.seq < last.seq {
            let (number, after_seq) = (header.number, found.last.seq);
            return Err(PromotionError::Segment { number, after_seq });
        }
        self.take_footer(segment, &found.footer());
        Ok(())
    }

    fn take_footer(&mut self, segment: usize, footer: &Footer) {
        let Stage::Footers { missing, builders } = &mut self.stage else { return };
        *missing -= 1;
        let slot = self.segments[segment].header.slot;
        for (number, builder) in (0_u16..).zip(builders) {
            let base_seq = self.superblock.volumes[usize::from(number)].base_seq;
            builder.add(footer, slot, self.superblock.slot_len_bytes, number, base_seq, self.through.seq);
        }
        for FooterEvent { record, .. } in &footer.events {
            if record.kind == RecordKind::Resize
                && let Some(size_bytes) = self.size_bytes.get_mut(usize::from(record.volume))
            {
                // Disks only grow (E3), so the largest is the last.
                *size_bytes = record.len_bytes.max(*size_bytes);
            }
        }
    }

    fn begin_run(&mut self, run: Run) {
        self.touched[usize::from(run.volume())] = true;
        self.in_flight_bytes += run.len_bytes() as u64;
        if run.is_read() {
            // All zeroes, whose content needs no read and can't be damaged.
            return self.write_run(&run);
        }
        let number = self.next_run;
        self.next_run += 1;
        for (read, wanted) in run.reads().iter().enumerate() {
            let op =
                Op::Read { offset_bytes: wanted.offset_bytes, buffer: AlignedBuf::zeroed(wanted.len_bytes) };
            self.ready.push_back((Doing::ReadFor { run: number, read }, wanted.file, op));
        }
        self.reading.insert(number, run);
    }

    fn run_read(
        &mut self,
        number: u64,
        read: usize,
        result: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<(), PromotionError> {
        let Some(run) = self.reading.get_mut(&number) else { return Ok(()) };
        let file = run.reads()[read].file;
        let buffer = result.map_err(|source| PromotionError::of(file, source))?;
        run.take(read, buffer.expect("a read gives its buffer back"));
        if run.is_read()
            && let Some(run) = self.reading.remove(&number)
        {
            run.check()?;
            self.write_run(&run);
        }
        Ok(())
    }

    fn write_run(&mut self, run: &Run) {
        let (volume, offset_bytes) = (run.volume(), run.offset_bytes());
        let content = run.content();
        let doing = Doing::Write { len_bytes: content.len() as u64 };
        let op = Op::Write { offset_bytes, pieces: vec![content.into_bytes()] };
        self.ready.push_back((doing, PromotionFile::Disk(volume), op));
    }
}
