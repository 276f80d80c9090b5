//! `vra-journal verify`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use journal::format::manifest::Manifest;
use journal::format::{
    MANIFEST_OFFSETS, MANIFEST_SLOT_BYTES, PAGE_BYTES, PageError, SUPERBLOCK_OFFSETS, SegmentHeader,
    SegmentTrailer, Superblock, slot_offset_bytes,
};
use journal::recovery::{OpenError, SurveyOptions, survey};
use journal::storage::ring::RingStorage;
use journal::storage::{Blocking, Purpose};
use serde::Serialize;

use super::place::{find_one, open_file, rebuilt};
use super::text;
use super::walk::walk;

/// What was checked and what is wrong.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    path: String,
    segments: u64,
    batches: u64,
    records: u64,
    /// Bytes of payload whose checksums were compared.
    payload_bytes: u64,
    newest_seq: u64,
    /// Damage, in the order of the file's parts.
    pub(super) damage: Vec<Damage>,
    /// What is unusual but no damage.
    pub(super) notes: Vec<String>,
}

/// Something that cannot be read any more.
#[derive(Debug, Serialize)]
pub(super) struct Damage {
    /// The record, where one is to blame; of a stretch the first.
    pub(super) seq: Option<u64>,
    segment: Option<u64>,
    /// Place in the journal's file, in bytes.
    file_offset_bytes: u64,
    pub(super) what: String,
}

/// Checks a journal. True if something is damaged.
pub(super) fn run(path: &Path, json: bool, out: &mut dyn Write) -> anyhow::Result<bool> {
    let report = check(&find_one(path)?)?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)?;
        return Ok(!report.damage.is_empty());
    }
    for note in &report.notes {
        writeln!(out, "note: {note}")?;
    }
    for Damage { segment, file_offset_bytes, what, .. } in &report.damage {
        let segment = segment.map_or(String::new(), |segment| format!("segment {segment}, "));
        writeln!(out, "damaged: {what} ({segment}byte {file_offset_bytes} of the file)")?;
    }
    writeln!(
        out,
        "{} segments, {} batches, {} records up to {}, {} of payload: {}",
        report.segments,
        report.batches,
        report.records,
        report.newest_seq,
        text::bytes(report.payload_bytes),
        if report.damage.is_empty() {
            "all whole".to_owned()
        } else {
            format!("{} damaged", report.damage.len())
        }
    )?;
    if let Some(first) = report.damage.iter().filter_map(|damage| damage.seq).min() {
        writeln!(
            out,
            "Views before record {first} are whole. Later ones read EIO where a damaged record was not overwritten; \
             if records are missing between others, nothing after them can be opened."
        )?;
    }
    Ok(!report.damage.is_empty())
}

/// Checks every header, record and payload of a journal's file.
pub(super) fn check(path: &Path) -> anyhow::Result<Report> {
    let (mut storage, file) = open_file(path)?;
    let mut io = Blocking::new(&mut storage, file, Purpose::View);
    let mut report = Report { path: path.display().to_string(), ..Report::default() };
    let superblock = match report.superblock(&mut io) {
        Ok(superblock) => superblock,
        // The segments can be checked without them.
        Err(error) => rebuilt(&mut storage, file, path)
            .map_err(|_| error)
            .with_context(|| format!("cannot check {}", path.display()))?,
    };
    let mut io = Blocking::new(&mut storage, file, Purpose::View);
    report.manifest(&mut io, &superblock);
    let mut segments = report.segments(&mut io, &superblock)?;
    let options = SurveyOptions { skip_unreadable: true, ..SurveyOptions::default() };
    if let Ok(survey) = survey(&mut storage, file, options) {
        // What a later opening passed over when it looked for the stream's end was never acknowledged.
        let counts = |slot: u32| survey.segments.iter().any(|segment| segment.header.slot == slot);
        segments.retain(|_, (header, trailer)| {
            trailer.is_some() || header.open_count == superblock.open_count || counts(header.slot)
        });
    }
    let mut io = Blocking::new(&mut storage, file, Purpose::View);
    report.walk(&mut io, &superblock, segments)?;
    for (number, volume) in superblock.volumes.iter().enumerate() {
        let disk = path.with_file_name(format!("disk-{number}.raw"));
        let len_bytes = std::fs::metadata(&disk).map(|metadata| metadata.len());
        if !len_bytes.as_ref().is_ok_and(|len_bytes| *len_bytes >= volume.size_bytes) {
            let found = len_bytes.map_or_else(|error| error.to_string(), |len| format!("it has {len} bytes"));
            let wanted = volume.size_bytes;
            report.damaged(None, 0, format!("{}: {found}, {wanted} are needed", disk.display()));
        }
    }
    Ok(report)
}

impl Report {
    fn damaged(&mut self, segment: Option<u64>, file_offset_bytes: u64, what: String) {
        self.damage.push(Damage { seq: None, segment, file_offset_bytes, what });
    }

    /// Both copies; the newer whole one counts.
    fn superblock(&mut self, io: &mut Blocking<'_, RingStorage>) -> anyhow::Result<Superblock> {
        if io.file_len_bytes()? < SUPERBLOCK_OFFSETS[1] + PAGE_BYTES as u64 {
            return Err(OpenError::NotAJournal.into());
        }
        let mut copies = Vec::new();
        let mut last_error = None;
        for offset_bytes in SUPERBLOCK_OFFSETS {
            let copy = io.read(offset_bytes, PAGE_BYTES).map_err(anyhow::Error::from);
            match copy.and_then(|page| Ok(Superblock::decode(&page)?)) {
                Ok(copy) => copies.push(copy),
                Err(error) => {
                    self.damaged(None, offset_bytes, format!("superblock: {error:#}"));
                    last_error = Some(error);
                }
            }
        }
        let newest = copies.into_iter().max_by_key(|copy| copy.sequence);
        newest.ok_or_else(|| last_error.unwrap_or_else(|| anyhow::anyhow!("no superblock")))
    }

    fn manifest(&mut self, io: &mut Blocking<'_, RingStorage>, superblock: &Superblock) {
        let Some(place) = superblock.manifest else {
            if superblock.sequence == 0 {
                return;
            }
            self.notes.push("the journal has no manifest".to_owned());
            return;
        };
        let offset_bytes = MANIFEST_OFFSETS[place.slot as usize];
        match io.read(offset_bytes, MANIFEST_SLOT_BYTES) {
            Err(error) => self.damaged(None, offset_bytes, format!("manifest: {error}")),
            Ok(bytes) => match Manifest::decode(&bytes) {
                Err(error) => self.damaged(None, offset_bytes, format!("manifest: {error}")),
                Ok((_, crc)) if crc != place.crc => {
                    let what = "manifest: it is not the one that the superblock names".to_owned();
                    self.damaged(None, offset_bytes, what);
                }
                Ok(_) => {}
            },
        }
    }

    /// The newest life of each segment of the history, by number.
    fn segments(
        &mut self,
        io: &mut Blocking<'_, RingStorage>,
        superblock: &Superblock,
    ) -> anyhow::Result<BTreeMap<u64, (SegmentHeader, Option<SegmentTrailer>)>> {
        let slot_len_bytes = superblock.slot_len_bytes;
        let mut found: BTreeMap<u64, (SegmentHeader, Option<SegmentTrailer>)> = BTreeMap::new();
        for slot in 0..superblock.slot_count {
            let offset_bytes = slot_offset_bytes(slot, slot_len_bytes);
            let last_page = offset_bytes + slot_len_bytes - PAGE_BYTES as u64;
            let ours = |header: &SegmentHeader| {
                header.journal_id == superblock.journal_id
                    && header.slot == slot
                    && header.number >= superblock.low_water_segment
                    && header.open_count <= superblock.open_count
            };
            let header = io.read(offset_bytes, PAGE_BYTES)?;
            let header = SegmentHeader::decode(&header, slot_len_bytes);
            let trailer = io.read(last_page, PAGE_BYTES)?;
            let trailer = SegmentTrailer::decode(&trailer, slot_len_bytes);
            if matches!(trailer, Err(PageError::Crc)) && header.as_ref().is_ok_and(ours) {
                self.notes
                    .push(format!("slot {slot}: the segment's last page is torn, so its batches were read"));
            }
            let trailer = trailer.ok().filter(|trailer| ours(&trailer.header));
            let header = match (header, &trailer) {
                (Ok(header), _) => header,
                (Err(PageError::Magic), None) => continue,
                (Err(error), Some(trailer)) => {
                    let number = trailer.header.number;
                    self.damaged(Some(number), offset_bytes, format!("segment header: {error}"));
                    trailer.header.clone()
                }
                (Err(error), None) => {
                    self.damaged(None, offset_bytes, format!("segment header of slot {slot}: {error}"));
                    continue;
                }
            };
            if !ours(&header) {
                continue;
            }
            let trailer = trailer.filter(|trailer| trailer.header == header);
            let newer =
                found.get(&header.number).is_none_or(|(other, _)| other.open_count < header.open_count);
            if newer {
                found.insert(header.number, (header, trailer));
            }
        }
        Ok(found)
    }

    fn walk(
        &mut self,
        io: &mut Blocking<'_, RingStorage>,
        superblock: &Superblock,
        segments: BTreeMap<u64, (SegmentHeader, Option<SegmentTrailer>)>,
    ) -> anyhow::Result<()> {
        let slot_len_bytes = superblock.slot_len_bytes;
        let mut last = superblock.low_water;
        let mut wanted = superblock.low_water_segment;
        let newest = segments.keys().next_back().copied();
        for (number, (header, trailer)) in segments {
            let offset_bytes = slot_offset_bytes(header.slot, slot_len_bytes);
            if number != wanted || header.after.seq != last.seq {
                let (from, until) = (last.seq + 1, header.after.seq);
                self.damage.push(Damage {
                    seq: Some(from),
                    segment: Some(number),
                    file_offset_bytes: offset_bytes,
                    what: format!("records {from} to {until} are missing before this segment"),
                });
            }
            let slot = match io.read(offset_bytes, slot_len_bytes as usize) {
                Ok(slot) => slot,
                Err(error) => {
                    self.damaged(Some(number), offset_bytes, format!("cannot be read: {error}"));
                    wanted = number + 1;
                    continue;
                }
            };
            let walked = walk(&slot, &header, trailer.as_ref());
            self.segments += 1;
            self.batches += walked.batches;
            self.records += walked.records;
            self.payload_bytes += walked.payload_bytes;
            last = trailer.as_ref().map_or(walked.last, |trailer| trailer.last);
            wanted = number + 1;
            for finding in walked.findings {
                self.damage.push(Damage {
                    seq: finding.seq,
                    segment: Some(number),
                    file_offset_bytes: offset_bytes + finding.slot_offset_bytes,
                    what: finding.what,
                });
            }
            if let Some(torn) = walked.torn_tail {
                let place = format!("the newest batch was never written to its end: {torn}");
                if newest == Some(number) {
                    self.notes.push(place);
                } else {
                    self.damaged(Some(number), offset_bytes, place);
                }
            }
        }
        self.newest_seq = last.seq;
        Ok(())
    }
}
