//! How a read of a view is put together, without I/O: what is read straight into the request's memory, what is fetched into
//! memory of the lane and copied over it, and what is zeroes.

use std::ops::Range;

use journal::crypt::{Cipher, Ciphers};
use journal::view::{JournalPart, ReadPart, ViewError, VolumeView};
use ublk::serve::FileId;

use super::scratch::SECTOR_BYTES;
use super::scratch::map::{Place, Run};

/// The journal among the files of a view.
pub(super) const JOURNAL_FILE: FileId = FileId(0);
/// The recovery disk.
pub(super) const RECOVERY_DISK_FILE: FileId = FileId(1);
/// The scratch file, if there is one.
pub(super) const SCRATCH_FILE: FileId = FileId(2);

/// Journal ranges closer than this are fetched as one, in bytes.
const JOIN_GAP_BYTES: u64 = 16 << 10;
/// What checking whole units can add to a journal part, in bytes.
const UNIT_SLACK_BYTES: u64 = 16 << 10;

/// The limits of a view's files and memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlanLimits {
    /// Longest fetch, in bytes.
    pub(super) fetch_max_bytes: u64,
    /// Unit of I/O on the recovery disk, in bytes.
    pub(super) disk_align_bytes: u64,
    /// The same of the journal.
    pub(super) journal_align_bytes: u64,
    /// The scratch file of the disk beneath, if there is one: the last of the files.
    pub(super) kept_file: FileId,
}

/// How to read a range.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// What is read into the request's memory, before anything else is put there.
    pub(super) direct: Option<Direct>,
    /// What is fetched, then copied over it.
    pub(super) fetches: Vec<Fetch>,
    /// Ranges of the disk that are filled with zeroes.
    pub(super) zeroes: Vec<Range<u64>>,
    /// Something comes from the recovery disk.
    pub(super) uses_recovery_disk: bool,
}

/// A read into the request's memory.
#[derive(Clone, Debug)]
pub(super) struct Direct {
    /// From which file.
    pub(super) file: FileId,
    /// Where in the file, in bytes.
    pub(super) file_offset_bytes: u64,
    /// What part of the disk it is, in bytes.
    pub(super) range: Range<u64>,
    /// What is checked there.
    parts: Vec<JournalPart>,
}

impl Direct {
    /// Decrypts what was read of the journal into `memory`, whose first byte is `memory_offset_bytes` on the disk.
    pub(super) fn decrypt(&self, ciphers: &Ciphers, memory: &mut [u8], memory_offset_bytes: u64) {
        if self.file == JOURNAL_FILE {
            let begin = (self.range.start - memory_offset_bytes) as usize;
            let len_bytes = (self.range.end - self.range.start) as usize;
            ciphers.decrypt(self.file_offset_bytes, &mut memory[begin..begin + len_bytes]);
        }
    }

    /// Checks what was read into `memory`, whose first byte is `memory_offset_bytes` on the disk.
    ///
    /// # Errors
    /// A checksum is wrong.
    pub(super) fn check(&self, memory: &[u8], memory_offset_bytes: u64) -> Result<(), ViewError> {
        self.parts.iter().try_for_each(|part| {
            let begin = (part.offset_bytes - memory_offset_bytes) as usize;
            part.check_exact(&memory[begin..begin + part.len_bytes as usize])
        })
    }
}

/// A read into memory of the lane.
#[derive(Debug)]
pub(super) struct Fetch {
    /// From which file.
    pub(super) file: FileId,
    /// Where in the file, in bytes.
    pub(super) offset_bytes: u64,
    /// How much, in bytes.
    pub(super) len_bytes: u64,
    /// What of it is wanted.
    uses: Vec<Use>,
}

#[derive(Debug)]
enum Use {
    /// Checked, then copied.
    Journal(JournalPart),
    /// Copied: place on the disk, place in the file, length.
    Plain { offset_bytes: u64, file_offset_bytes: u64, len_bytes: u64 },
}

impl Fetch {
    /// Decrypts what was fetched of the journal, or with `cipher`, which is that of the scratch file it was fetched of.
    pub(super) fn decrypt(&self, ciphers: &Ciphers, cipher: Option<&Cipher>, fetched: &mut [u8]) {
        let fetched = &mut fetched[..self.len_bytes as usize];
        match (self.file, cipher) {
            (JOURNAL_FILE, _) => ciphers.decrypt(self.offset_bytes, fetched),
            (_, Some(cipher)) => cipher.decrypt(self.offset_bytes, fetched),
            _ => {}
        }
    }

    /// Copies what is wanted of `fetched` into `into`, whose first byte is `into_offset_bytes` on the disk.
    ///
    /// # Errors
    /// A checksum is wrong.
    pub(super) fn apply(
        &self,
        fetched: &[u8],
        into: &mut [u8],
        into_offset_bytes: u64,
    ) -> Result<(), ViewError> {
        for wanted in &self.uses {
            let (offset_bytes, bytes) = match wanted {
                Use::Journal(part) => {
                    let from = (part.read_offset_bytes - self.offset_bytes) as usize;
                    (part.offset_bytes, part.check(&fetched[from..from + part.read_len_bytes])?)
                }
                Use::Plain { offset_bytes, file_offset_bytes, len_bytes } => {
                    let from = (file_offset_bytes - self.offset_bytes) as usize;
                    (*offset_bytes, &fetched[from..from + *len_bytes as usize])
                }
            };
            let to = (offset_bytes - into_offset_bytes) as usize;
            into[to..to + bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }
}

/// Plans a read of `runs`, which are in order and without gaps. `disk_len_bytes` says how long the recovery disk is, given a place up to
/// which it matters: behind its end it is zero until promotion comes to the resize.
///
/// # Errors
/// The range is outside of the disk, or a part of it is lost (C5).
pub(super) fn plan(
    volume: &VolumeView,
    runs: &[Run],
    limits: &PlanLimits,
    disk_len_bytes: impl FnOnce(u64) -> u64,
) -> Result<Plan, ViewError> {
    let mut plan = Plan::default();
    let (mut disk_ranges, mut journal_parts) = (Vec::new(), Vec::new());
    for run in runs {
        let range = run.offset_bytes..run.offset_bytes + run.len_bytes;
        match run.place {
            Place::Zeroes => plan.zeroes.push(range),
            Place::Scratch(from) => {
                plan.fetch(SCRATCH_FILE, range.start, from, run.len_bytes, SECTOR_BYTES, limits);
            }
            Place::Kept(from) => {
                plan.fetch(limits.kept_file, range.start, from, run.len_bytes, SECTOR_BYTES, limits);
            }
            Place::Below => {
                let step_bytes = limits.fetch_max_bytes - UNIT_SLACK_BYTES;
                for start in range.clone().step_by(step_bytes as usize) {
                    let len_bytes = step_bytes.min(range.end - start);
                    for part in volume.plan_read(start, len_bytes)? {
                        match part {
                            ReadPart::RecoveryDisk { offset_bytes, len_bytes } => {
                                push_joined(&mut disk_ranges, offset_bytes..offset_bytes + len_bytes);
                            }
                            ReadPart::Zeroes { offset_bytes, len_bytes } => {
                                push_joined(&mut plan.zeroes, offset_bytes..offset_bytes + len_bytes);
                            }
                            ReadPart::Journal(part) => journal_parts.push(part),
                            ReadPart::Bad(bad) => return Err(bad.into()),
                        }
                    }
                }
            }
        }
    }
    if let Some(last) = disk_ranges.last() {
        plan.uses_recovery_disk = true;
        // Asked for only now: what was promoted before the plan was made is in the file by now.
        let len_bytes = disk_len_bytes(last.end);
        for range in &mut disk_ranges {
            if range.end > len_bytes {
                plan.zeroes.push(range.start.max(len_bytes)..range.end);
                range.end = len_bytes.max(range.start);
            }
        }
        disk_ranges.retain(|range| !range.is_empty());
    }
    plan.read_disk(&disk_ranges, runs, limits);
    if !plan.uses_recovery_disk
        && let Some(range) = one_stretch(&journal_parts, runs, limits)
        && let Some(file_offset_bytes) = journal_parts[0].exact_offset_bytes()
    {
        plan.direct = Some(Direct { file: JOURNAL_FILE, file_offset_bytes, range, parts: journal_parts });
        return Ok(plan);
    }
    plan.fetch_journal(journal_parts, limits);
    Ok(plan)
}

impl Plan {
    /// One read into the request's memory if the disk's alignment lets it fit, else one for each range beside it.
    fn read_disk(&mut self, ranges: &[Range<u64>], runs: &[Run], limits: &PlanLimits) {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return };
        let align = limits.disk_align_bytes;
        let hull = first.start / align * align..last.end.next_multiple_of(align);
        let whole_start = runs.first().map_or(0, |run| run.offset_bytes);
        let whole_end = runs.last().map_or(0, |run| run.offset_bytes + run.len_bytes);
        if whole_start <= hull.start && hull.end <= whole_end && whole_start.is_multiple_of(align) {
            let file_offset_bytes = hull.start;
            self.direct =
                Some(Direct { file: RECOVERY_DISK_FILE, file_offset_bytes, range: hull, parts: Vec::new() });
            return;
        }
        for range in ranges {
            self.fetch(RECOVERY_DISK_FILE, range.start, range.start, range.end - range.start, align, limits);
        }
    }

    fn fetch(
        &mut self,
        file: FileId,
        offset_bytes: u64,
        from: u64,
        len_bytes: u64,
        align: u64,
        limits: &PlanLimits,
    ) {
        let step_bytes = limits.fetch_max_bytes - UNIT_SLACK_BYTES;
        for done in (0..len_bytes).step_by(step_bytes as usize) {
            let (from, len_bytes) = (from + done, step_bytes.min(len_bytes - done));
            let start = from / align * align;
            let end = (from + len_bytes).next_multiple_of(align);
            let wanted = Use::Plain { offset_bytes: offset_bytes + done, file_offset_bytes: from, len_bytes };
            self.fetches.push(Fetch {
                file,
                offset_bytes: start,
                len_bytes: end - start,
                uses: vec![wanted],
            });
        }
    }

    fn fetch_journal(&mut self, mut parts: Vec<JournalPart>, limits: &PlanLimits) {
        parts.sort_by_key(|part| part.read_offset_bytes);
        let mut open: Option<Fetch> = None;
        for part in parts {
            let end = part.read_offset_bytes + part.read_len_bytes as u64;
            if let Some(fetch) = &mut open
                && part.read_offset_bytes <= fetch.offset_bytes + fetch.len_bytes + JOIN_GAP_BYTES
                && end.saturating_sub(fetch.offset_bytes) <= limits.fetch_max_bytes
            {
                fetch.len_bytes = fetch.len_bytes.max(end - fetch.offset_bytes);
                fetch.uses.push(Use::Journal(part));
                continue;
            }
            self.fetches.extend(open.take());
            open = Some(Fetch {
                file: JOURNAL_FILE,
                offset_bytes: part.read_offset_bytes,
                len_bytes: part.read_len_bytes as u64,
                uses: vec![Use::Journal(part)],
            });
        }
        self.fetches.extend(open);
    }
}

/// The part of the disk that these parts are, if they follow one another in the journal too, and can be read and checked as they are.
fn one_stretch(parts: &[JournalPart], runs: &[Run], limits: &PlanLimits) -> Option<Range<u64>> {
    let (first, last) = (parts.first()?, parts.last()?);
    let file_offset_bytes = first.exact_offset_bytes()?;
    for pair in parts.windows(2) {
        let (before, after) = (&pair[0], &pair[1]);
        let follows = before.offset_bytes + before.len_bytes == after.offset_bytes
            && before.exact_offset_bytes()? + before.len_bytes == after.exact_offset_bytes()?;
        if !follows {
            return None;
        }
    }
    last.exact_offset_bytes()?;
    let range = first.offset_bytes..last.offset_bytes + last.len_bytes;
    let align = limits.journal_align_bytes;
    let memory_offset_bytes = range.start - runs.first()?.offset_bytes;
    let is_aligned = [file_offset_bytes, range.end - range.start, memory_offset_bytes]
        .iter()
        .all(|place| place.is_multiple_of(align));
    is_aligned.then_some(range)
}

fn push_joined(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}
