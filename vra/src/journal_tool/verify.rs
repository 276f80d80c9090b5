//! `vra-journal verify`.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

use journal::crypt::{SiteKeyId, SiteKeys};

use super::contents::{Part, Visitor, last_of, visit};
use super::damage::Damage;
use super::locked::Locked;
use super::place::{Journal, find_one};
use super::text;

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
    /// Locked checkpoints whose overlays are damaged or missing, and why.
    lost_locks: Vec<String>,
    /// What is unusual but no damage.
    pub(super) notes: Vec<String>,
    /// A site key that is missing.
    #[serde(skip)]
    locked: Option<SiteKeyId>,
}

/// Checks a journal. True if something is damaged.
pub(super) fn run(path: &Path, keys: &SiteKeys, json: bool, out: &mut dyn Write) -> anyhow::Result<bool> {
    let report = check(&find_one(path)?, keys)?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)?;
        return Ok(report.is_damaged());
    }
    for note in &report.notes {
        writeln!(out, "note: {note}")?;
    }
    for Damage { segment, file_offset_bytes, what, .. } in &report.damage {
        let segment = segment.map_or(String::new(), |segment| format!("segment {segment}, "));
        writeln!(out, "damaged: {what} ({segment}byte {file_offset_bytes} of the file)")?;
    }
    for lost in &report.lost_locks {
        writeln!(out, "damaged: {lost}")?;
    }
    writeln!(
        out,
        "{} segments, {} batches, {} records up to {}, {} of payload: {}",
        report.segments,
        report.batches,
        report.records,
        report.newest_seq,
        text::bytes(report.payload_bytes),
        if report.is_damaged() {
            format!("{} damaged", report.damage.len() + report.lost_locks.len())
        } else {
            "all whole".to_owned()
        }
    )?;
    if report.damage.iter().any(Damage::is_on_recovery_disk) {
        writeln!(
            out,
            "What is lost of a recovery disk reads EIO at each checkpoint before the place was written again: an older checkpoint \
             does not help, a later one may. `extract --skip-damaged` goes on over it."
        )?;
    }
    let in_history = report.damage.iter().filter(|damage| !damage.is_on_recovery_disk());
    if let Some(first) = in_history.filter_map(|damage| damage.seq).min() {
        writeln!(
            out,
            "Views before record {first} are whole. Later ones read EIO where a damaged record was not overwritten; \
             if records are missing between others, nothing after them can be opened."
        )?;
    }
    Ok(report.is_damaged())
}

/// Checks every header, record and payload of a journal's file.
pub(super) fn check(path: &Path, keys: &SiteKeys) -> anyhow::Result<Report> {
    let mut report = Report { path: path.display().to_string(), ..Report::default() };
    visit(path, keys, &mut report)?;
    if let Some(site_key) = report.locked {
        return Err(Locked::new(path, site_key, keys).into());
    }
    // A journal that can't be opened has damage that was found above.
    if let Ok(journal) = Journal::open(path, keys) {
        report.lost_locks = journal.lost_locks;
    }
    Ok(report)
}

impl Report {
    fn is_damaged(&self) -> bool {
        !self.damage.is_empty() || !self.lost_locks.is_empty()
    }
}

impl Visitor for Report {
    const WANTS_BATCHES: bool = false;

    fn visit(&mut self, part: Part<'_>) -> anyhow::Result<()> {
        match part {
            Part::Superblock { superblock, counts, .. } => {
                if counts {
                    self.newest_seq = superblock.low_water.seq;
                }
            }
            Part::EndOfSegment { segment, walked } => {
                self.segments += 1;
                self.batches += walked.batches;
                self.records += walked.records;
                self.payload_bytes += walked.payload_bytes;
                self.newest_seq = last_of(segment, walked).seq;
            }
            Part::Damage(damage) => self.damage.push(damage),
            Part::Note(note) => self.notes.push(note),
            Part::Locked(site_key) => self.locked = Some(site_key),
            Part::Manifest { .. } | Part::BadList { .. } | Part::Segment(_) | Part::Batch { .. } => {}
        }
        Ok(())
    }
}
