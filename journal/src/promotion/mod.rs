//! Promotion: the journal's oldest segments go to the recovery disks (C2). Sans-I/O: whoever drives it owns the files.
//!
//! The caller announces it ([`crate::writer::Change::AnnouncePromotion`]), at once or when this machine has read the segments' footers
//! ([`Promotion::before_announcing`]), and moves the low-water mark when it has ended ([`crate::writer::Change::EndPromotion`]). In between
//! the machine finds the newest record of each block and carries those blocks over: a chunk is read in the order of the journal and written in the order of the disk, while the next one is
//! read. Then it syncs the disks. Doing it again after a crash, whole or in part, gives the same disks.

mod base;
mod chunks;
mod error;
mod footers;
mod run;
mod runs;
mod slot_read;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::bad_ranges::{BadRange, BadRanges};
use crate::crypt::Ciphers;
use crate::format::bad_list::MAX_BAD_RANGES;
use crate::format::{ChainPoint, FooterEvent, Gap, PAGE_BYTES, Superblock};
use crate::index::IndexBuilder;
use crate::planted::{Bug, planted};
use crate::storage::{AlignedBuf, Op, Purpose, StorageError};
use crate::writer::ClosedSegment;

use base::Patched;
use chunks::{Chunk, Chunks};
pub use error::PromotionError;
use run::Run;
pub use runs::TransferSizes;
use runs::{Runs, Work};
use slot_read::SlotRead;

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
    /// What of the recovery disks can't be trusted now: what couldn't before and wasn't written over, and the damaged records of
    /// this promotion (C5).
    pub bad_ranges: BadRanges,
}

/// One promotion under way.
#[derive(Debug)]
pub struct Promotion {
    through: ChainPoint,
    superblock: Superblock,
    segments: Vec<ClosedSegment>,
    ciphers: Ciphers,
    /// The images' space stays reserved where they read zeroes.
    reserved: Vec<bool>,
    sizes: TransferSizes,
    stage: Stage,
    /// The recovery disks may be touched.
    is_announced: bool,
    /// Payloads that the disk doesn't give back end it, rather than count as damaged.
    is_patient: bool,
    /// What nobody knows of the segments, by their numbers.
    gaps: Vec<(u64, Gap)>,
    /// Begins and ends of syncs, by the segments' numbers.
    syncs: BTreeMap<u64, Vec<FooterEvent>>,
    ready: VecDeque<(Doing, PromotionFile, Op)>,
    running: BTreeMap<u64, (Doing, PromotionFile)>,
    next_token: u64,
    /// Of footers and chunks that are being read.
    reading_bytes: u64,
    /// Of runs whose base is being read, or that are being written.
    writing_bytes: u64,
    touched: Vec<bool>,
    size_bytes: Vec<u64>,
    written_bytes: u64,
    bad_ranges: BadRanges,
    /// Parts of damaged records.
    damaged: Vec<BadRange>,
    /// What the recovery disks have lost, and nobody has noted yet.
    lost: Vec<BadRange>,
}

#[derive(Debug)]
enum Stage {
    /// Finding out what the segments hold.
    Footers {
        /// The next segment to ask.
        next: usize,
        /// How many have not told yet.
        missing: usize,
        builders: Vec<IndexBuilder>,
        /// Slots that are read whole, by segment.
        slots: BTreeMap<usize, SlotRead>,
    },
    Carrying(Box<Carrying>),
    Syncing,
    Done,
}

#[derive(Debug)]
struct Carrying {
    chunks: Chunks,
    /// The chunk that is read while the one before is written.
    next: Option<Chunk>,
    runs: Option<Runs>,
    /// Runs that wait for what is on the disk.
    waiting: BTreeMap<u64, Run>,
    patched: BTreeMap<u64, Patched>,
    next_run: u64,
}

#[derive(Clone, Debug)]
enum Doing {
    ReadFooter { segment: usize },
    ReadSlot { segment: usize, range: Range<u64> },
    ReadChunk { read: usize },
    ReadPage { read: usize, offset_bytes: u64 },
    ReadBase { run: u64 },
    ReadBasePage { run: u64, offset_bytes: u64 },
    Write { len_bytes: u64 },
    Punch { volume: u16, offset_bytes: u64, len_bytes: u64 },
    Reserve,
    Sync,
}

impl Doing {
    /// What of a disk is being written now: the next chunk may share pages with it.
    fn is_of_runs(&self) -> bool {
        matches!(
            self,
            Self::ReadBase { .. }
                | Self::ReadBasePage { .. }
                | Self::Write { .. }
                | Self::Punch { .. }
                | Self::Reserve
        )
    }
}

/// Operations of one promotion in the kernel at once.
const MAX_RUNNING: usize = 128;

impl Promotion {
    /// Promotes these segments, the oldest of the journal. `bad_ranges` is what of the recovery disks can't be trusted before. `reserved` says of each volume's recovery disk whether its space stays reserved
    /// where it reads zeroes.
    pub fn new(
        superblock: Superblock,
        bad_ranges: BadRanges,
        segments: Vec<ClosedSegment>,
        reserved: Vec<bool>,
        sizes: TransferSizes,
    ) -> Self {
        let through = segments.last().map_or(superblock.low_water, |segment| segment.last);
        let count = superblock.volumes.len();
        let size_bytes = superblock.volumes.iter().map(|volume| volume.size_bytes).collect();
        let skipped = usize::from(planted(Bug::PromotionSkipsSegment) && segments.len() > 1);
        let missing = segments.len() - skipped;
        let builders = std::iter::repeat_with(IndexBuilder::default).take(count).collect();
        let ciphers = segments.iter().map(|segment| (segment.header.slot, &segment.cipher));
        let ciphers = Ciphers::new(superblock.slot_len_bytes, ciphers);
        Self {
            through,
            superblock,
            segments,
            ciphers,
            reserved,
            sizes,
            stage: Stage::Footers { next: skipped, missing, builders, slots: BTreeMap::new() },
            is_announced: true,
            is_patient: false,
            gaps: Vec::new(),
            syncs: BTreeMap::new(),
            ready: VecDeque::new(),
            running: BTreeMap::new(),
            next_token: 1,
            reading_bytes: 0,
            writing_bytes: 0,
            touched: vec![false; count],
            size_bytes,
            written_bytes: 0,
            bad_ranges,
            damaged: Vec::new(),
            lost: Vec::new(),
        }
    }

    /// For one that isn't announced yet: it finds out what the segments hold, and waits. If that can't be found out, nothing was announced
    /// for which all before it would be given up.
    #[must_use]
    pub fn before_announcing(mut self) -> Self {
        self.is_announced = false;
        self
    }

    /// For one that is tried again: a disk that fails for a while has lost nothing. What can't be read ends it then, rather than count as
    /// damaged.
    #[must_use]
    pub fn patient(mut self) -> Self {
        self.is_patient = true;
        self
    }

    /// Whether it only waits for being announced.
    pub fn waits_for_announcement(&self) -> bool {
        !self.is_announced
            && self.running.is_empty()
            && matches!(self.stage, Stage::Footers { missing: 0, .. })
    }

    /// It is announced, durably: the recovery disks may be touched.
    pub fn announced(&mut self) {
        self.is_announced = true;
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
            bad_ranges: self.bad_ranges.clone(),
        })
    }

    /// The next thing to do, as long as no more than about `window_bytes` are under way.
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
            (Doing::ReadSlot { segment, range }, result) => self.slot_read(segment, &range, result)?,
            (Doing::ReadChunk { read }, result) => self.chunk_read(read, result)?,
            (Doing::ReadPage { read, offset_bytes }, result) => {
                self.page_read(read, offset_bytes, result)?;
            }
            (Doing::ReadBase { run }, result) => self.base_read(run, file, result)?,
            (Doing::ReadBasePage { run, offset_bytes }, result) => {
                self.base_page_read(run, offset_bytes, file, result)?;
            }
            (Doing::Write { len_bytes }, Ok(_)) => {
                self.writing_bytes -= len_bytes;
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
        if matches!(self.stage, Stage::Footers { missing: 0, .. }) {
            self.check_gaps()?;
        }
        self.check_lost()?;
        self.end_stage();
        Ok(matches!(self.stage, Stage::Done))
    }

    fn advance(&mut self, window_bytes: u64) {
        self.end_stage();
        // Reading and writing have half of it each, and at least one operation.
        let has_room = |bytes: u64| bytes == 0 || bytes < window_bytes / 2;
        while self.ready.is_empty() && has_room(self.reading_bytes) && self.begin_read() {}
        while self.ready.is_empty() && has_room(self.writing_bytes) && self.begin_work() {}
    }

    /// The next read of the journal; false if there is none now.
    fn begin_read(&mut self) -> bool {
        match &mut self.stage {
            Stage::Footers { next, .. } if *next < self.segments.len() => {
                let segment = *next;
                *next += 1;
                self.ask_for_footer(segment);
                true
            }
            Stage::Carrying(carrying) => {
                if carrying.next.is_none() {
                    carrying.next = carrying.chunks.next();
                }
                let Some((read, range)) = carrying.next.as_mut().and_then(Chunk::next_read) else {
                    return false;
                };
                let len_bytes = range.end - range.start;
                self.reading_bytes += len_bytes;
                let buffer = AlignedBuf::zeroed(len_bytes as usize);
                let op = Op::Read { offset_bytes: range.start, buffer };
                self.ready.push_back((Doing::ReadChunk { read }, PromotionFile::Journal, op));
                true
            }
            _ => false,
        }
    }

    /// The next stretch of a recovery disk; false if there is none now.
    fn begin_work(&mut self) -> bool {
        let Stage::Carrying(carrying) = &mut self.stage else { return false };
        let Carrying { chunks, next, runs, .. } = &mut **carrying;
        if runs.as_ref().is_none_or(Runs::is_done) {
            // The next chunk may share pages with this one: what is on the disk is read only when this one is there.
            if self.running.values().any(|(doing, _)| doing.is_of_runs()) {
                return false;
            }
            let Some(chunk) = next.take_if(|chunk| chunk.is_read()) else { return false };
            *runs = Some(Runs::new(chunk, self.sizes));
        }
        match runs.as_mut().and_then(|runs| runs.next(chunks.indexes())) {
            Some(Work::Run(run)) => self.begin_run(run),
            Some(Work::Zeroes { volume, offset_bytes, len_bytes }) => {
                self.touched[usize::from(volume)] = true;
                let doing = Doing::Punch { volume, offset_bytes, len_bytes };
                let op = Op::Punch { offset_bytes, len_bytes };
                self.ready.push_back((doing, PromotionFile::Disk(volume), op));
            }
            None => return false,
        }
        true
    }

    /// Goes from stage to stage as long as nothing is left of one: a promotion without anything to write ends at once.
    fn end_stage(&mut self) {
        while self.ready.is_empty() && self.running.is_empty() {
            match &mut self.stage {
                Stage::Footers { missing: 0, builders, .. } if self.is_announced => {
                    let indexes = std::mem::take(builders).into_iter().map(IndexBuilder::build).collect();
                    let chunks = Chunks::new(indexes, self.sizes.chunk_bytes);
                    let carrying = Carrying {
                        chunks,
                        next: None,
                        runs: None,
                        waiting: BTreeMap::new(),
                        patched: BTreeMap::new(),
                        next_run: 0,
                    };
                    self.stage = Stage::Carrying(Box::new(carrying));
                }
                Stage::Carrying(carrying) if carrying.is_done() && self.lost.is_empty() => {
                    self.bad_ranges.heal_promoted(carrying.chunks.indexes());
                    self.damaged.drain(..).for_each(|damaged| self.bad_ranges.add(damaged));
                    self.bad_ranges.coarsen(MAX_BAD_RANGES);
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

    fn chunk_read(
        &mut self,
        read: usize,
        result: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<(), PromotionError> {
        let Stage::Carrying(carrying) = &mut self.stage else { return Ok(()) };
        let Some(chunk) = &mut carrying.next else { return Ok(()) };
        let range = chunk.read_range(read);
        match result {
            Ok(buffer) => {
                self.reading_bytes -= range.end - range.start;
                let mut buffer = buffer.expect("a read gives its buffer back");
                self.ciphers.decrypt(range.start, &mut buffer);
                chunk.take(read, buffer);
            }
            Err(error) if error.is_medium() => {
                // Page by page: only what can't be read is lost, and its checksums will tell.
                chunk.begin_again(read);
                for offset_bytes in range.step_by(PAGE_BYTES) {
                    let op = Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(PAGE_BYTES) };
                    let doing = Doing::ReadPage { read, offset_bytes };
                    self.ready.push_back((doing, PromotionFile::Journal, op));
                }
            }
            Err(error) => return Err(PromotionError::Journal(error)),
        }
        Ok(())
    }

    fn page_read(
        &mut self,
        read: usize,
        offset_bytes: u64,
        result: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<(), PromotionError> {
        let Stage::Carrying(carrying) = &mut self.stage else { return Ok(()) };
        let Some(chunk) = &mut carrying.next else { return Ok(()) };
        match result {
            Ok(mut page) => {
                if let Some(page) = &mut page {
                    self.ciphers.decrypt(offset_bytes, page);
                }
                chunk.take_page(read, offset_bytes, page.as_deref());
            }
            Err(error) if error.is_medium() && !self.is_patient => chunk.take_page(read, offset_bytes, None),
            Err(error) => return Err(PromotionError::Journal(error)),
        }
        if chunk.has_read(read) {
            let range = chunk.read_range(read);
            self.reading_bytes -= range.end - range.start;
        }
        Ok(())
    }

    fn begin_run(&mut self, run: Run) {
        // What is damaged is written as it is, and never read.
        self.damaged.extend(run.damage());
        self.touched[usize::from(run.volume())] = true;
        self.writing_bytes += run.len_bytes() as u64;
        if !run.needs_base() {
            return self.write_run(&run, None);
        }
        let Stage::Carrying(carrying) = &mut self.stage else { return };
        let number = carrying.next_run;
        carrying.next_run += 1;
        let op = Op::Read { offset_bytes: run.offset_bytes(), buffer: AlignedBuf::zeroed(run.len_bytes()) };
        self.ready.push_back((Doing::ReadBase { run: number }, PromotionFile::Disk(run.volume()), op));
        carrying.waiting.insert(number, run);
    }

    fn write_run(&mut self, run: &Run, base: Option<AlignedBuf>) {
        let (volume, offset_bytes) = (run.volume(), run.offset_bytes());
        let doing = Doing::Write { len_bytes: run.len_bytes() as u64 };
        let op = Op::Write { offset_bytes, pieces: run.content(base) };
        self.ready.push_back((doing, PromotionFile::Disk(volume), op));
    }
}
