//! `vra-journal inspect`.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use journal::crypt::{SiteKeyId, SiteKeys, WrappedKey};
use journal::format::{JournalState, PAGE_BYTES, Superblock};
use journal::recovery::Content;
use serde::Serialize;

use super::contents::{Part, Visitor, visit};
use super::locked::missing_key;
use super::moment::describe;
use super::place::{Journal, Manifest, find_one};
use super::text;

/// What a journal is.
#[derive(Serialize)]
struct Facts {
    path: String,
    vm: String,
    vm_id: String,
    vpg: Option<String>,
    journal_id: String,
    state: String,
    /// How often it was opened to be written.
    open_count: u64,
    tail_generation: String,
    parent_generation: String,
    /// The history reaches from here ...
    oldest_seq: u64,
    /// ... to here, if that can be told.
    newest_seq: Option<u64>,
    checkpoints: Option<usize>,
    /// How segments are encrypted that begin from now on.
    encryption: Encryption,
    /// The site key without which what isn't here can't be told, and that wasn't given.
    locked_by_site_key: Option<String>,
    slot_bytes: u64,
    slots: u32,
    free_slots: Option<usize>,
    disks: Vec<Disk>,
    segments: Vec<Segment>,
    /// Set if records in the middle of the history cannot be read.
    damage: Option<String>,
}

#[derive(Serialize)]
struct Disk {
    number: usize,
    id: String,
    size_bytes: u64,
    /// Records up to this one are in the recovery disk.
    base_seq: u64,
    /// Bytes that the recovery disk's file takes on the datastore; none if it is missing.
    recovery_disk_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Segment {
    number: u64,
    slot: u32,
    first_seq: u64,
    last_seq: Option<u64>,
    /// Bytes of batches in it.
    data_bytes: Option<u64>,
    sealed: bool,
    encryption: Encryption,
}

/// How something is encrypted.
#[derive(Serialize)]
struct Encryption {
    /// `none`, or how.
    method: &'static str,
    /// The journal's key.
    key_id: Option<String>,
    /// The site key that opens that.
    site_key_id: Option<String>,
}

impl Encryption {
    fn of((method, key): (&'static str, Option<&WrappedKey>)) -> Self {
        let ids = key.map(|key| (key.key_id.to_string(), key.site_key_id().to_string()));
        let (key_id, site_key_id) = ids.unzip();
        Self { method, key_id, site_key_id }
    }
}

impl std::fmt::Display for Encryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.method)?;
        match (&self.key_id, &self.site_key_id) {
            (Some(key_id), Some(site_key_id)) => write!(f, ", key {key_id} (site key {site_key_id})"),
            _ => Ok(()),
        }
    }
}

/// Says what a journal is. Without the key of one that is encrypted, what is plain of it.
pub(super) fn run(path: &Path, keys: &SiteKeys, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let (facts, ends) = match Journal::open(path, keys) {
        Ok(journal) => {
            let checkpoints = journal.reader.catalogue().checkpoints();
            let ends = checkpoints.first().zip(checkpoints.last());
            let ends = ends.map(|(first, last)| format!(": {} to {}", describe(first), describe(last)));
            (facts(&journal), ends)
        }
        Err(error) => match missing_key(&error) {
            Some(site_key) => (locked_facts(&find_one(path)?, keys, site_key)?, None),
            None => return Err(error),
        },
    };
    if json {
        serde_json::to_writer_pretty(&mut *out, &facts)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "journal       {} ({})", facts.path, facts.journal_id)?;
    writeln!(out, "VM            {} ({})", facts.vm, facts.vm_id)?;
    writeln!(
        out,
        "group         {}",
        facts.vpg.as_deref().unwrap_or("unknown: the manifest cannot be read")
    )?;
    writeln!(out, "state         {}", facts.state)?;
    writeln!(out, "generation    {} (parent {})", facts.tail_generation, facts.parent_generation)?;
    let newest = facts.newest_seq.map_or("its end, which is encrypted".to_owned(), |seq| seq.to_string());
    writeln!(out, "history       records {} to {newest}", facts.oldest_seq)?;
    match facts.checkpoints {
        Some(count) => writeln!(out, "checkpoints   {count}{}", ends.unwrap_or_default())?,
        None => writeln!(out, "checkpoints   encrypted")?,
    }
    writeln!(out, "encryption    {}", facts.encryption)?;
    if let Some(site_key) = &facts.locked_by_site_key {
        writeln!(out, "locked        more is told with site key {site_key}: give its file with --key-file")?;
    }
    let slot = text::bytes(facts.slot_bytes);
    let free = facts.free_slots.map_or(String::new(), |free| format!(", {free} free"));
    writeln!(out, "space         {} slots of {slot}{free}", facts.slots)?;
    if let Some(damage) = &facts.damage {
        writeln!(out, "damage        {damage}")?;
    }
    for disk in &facts.disks {
        let file = disk.recovery_disk_bytes.map_or("recovery disk missing".to_owned(), |bytes| {
            format!("{} on the datastore", text::bytes(bytes))
        });
        let size = text::bytes(disk.size_bytes);
        writeln!(out, "disk {:<8} {size}, {file}, base at record {}", disk.number, disk.base_seq)?;
    }
    for segment in &facts.segments {
        let size = segment.data_bytes.map_or(String::new(), |bytes| format!("{}, ", text::bytes(bytes)));
        let state = if segment.sealed { "sealed" } else { "open" };
        let last = segment.last_seq.map_or("its end".to_owned(), |seq| seq.to_string());
        let encryption = match segment.encryption.key_id {
            Some(_) => format!(", {}", segment.encryption),
            None => String::new(),
        };
        writeln!(
            out,
            "segment {:<5} records {} to {last}, {size}slot {}, {state}{encryption}",
            segment.number, segment.first_seq, segment.slot
        )?;
    }
    Ok(())
}

fn facts(journal: &Journal) -> Facts {
    let (survey, warnings) = (&journal.reader.survey, journal.warnings());
    let segments = survey.segments.iter().map(|segment| Segment {
        number: segment.header.number,
        slot: segment.header.slot,
        first_seq: segment.header.after.seq + 1,
        last_seq: Some(segment.last().seq),
        data_bytes: Some(segment.data_end_bytes() - PAGE_BYTES as u64),
        sealed: matches!(segment.content, Content::Sealed(_)),
        encryption: Encryption::of(text::segment_encryption(&segment.header)),
    });
    Facts {
        newest_seq: Some(journal.reader.newest_seq()),
        checkpoints: Some(journal.reader.catalogue().checkpoints().len()),
        free_slots: Some(survey.free_slots.len()),
        segments: segments.collect(),
        damage: (!warnings.is_empty())
            .then(|| format!("{}; `vra-journal verify` says more", warnings.join("; "))),
        ..plain_facts(&journal.path, journal.vm_name(), journal.manifest.as_ref(), &survey.superblock)
    }
}

/// What superblock and manifest say.
fn plain_facts(path: &Path, vm: String, manifest: Option<&Manifest>, superblock: &Superblock) -> Facts {
    let disks = superblock.volumes.iter().enumerate().map(|(number, volume)| {
        let metadata = std::fs::metadata(path.with_file_name(format!("disk-{number}.raw"))).ok();
        Disk {
            number,
            id: volume.id.to_string(),
            size_bytes: volume.size_bytes,
            base_seq: volume.base_seq,
            recovery_disk_bytes: metadata
                .map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512),
        }
    });
    Facts {
        path: path.display().to_string(),
        vm,
        vm_id: superblock.vm_id.to_string(),
        vpg: manifest.map(|manifest| manifest.vpg.name.clone()),
        journal_id: superblock.journal_id.to_string(),
        state: match superblock.state {
            JournalState::Consistent => "consistent".to_owned(),
            JournalState::FirstSync { .. } => {
                "the first sync has not ended: nothing can be recovered yet".to_owned()
            }
            JournalState::HistoryGivenUp { .. } => {
                "the history was given up: nothing can be recovered until the sync that replaces it has ended"
                    .to_owned()
            }
        },
        open_count: superblock.open_count,
        tail_generation: superblock.tail_generation.to_string(),
        parent_generation: superblock.parent_generation.to_string(),
        oldest_seq: superblock.oldest_seq(),
        newest_seq: None,
        checkpoints: None,
        encryption: Encryption::of(text::encryption(&superblock.encryption)),
        locked_by_site_key: None,
        slot_bytes: superblock.slot_len_bytes,
        slots: superblock.slot_count,
        free_slots: None,
        disks: disks.collect(),
        segments: Vec::new(),
        damage: None,
    }
}

/// What can be told without the key.
fn locked_facts(path: &Path, keys: &SiteKeys, site_key: SiteKeyId) -> anyhow::Result<Facts> {
    let mut seen = Plain::default();
    visit(path, keys, &mut seen)?;
    let superblock = seen.superblock.context("no superblock can be read")?;
    let manifest = seen.manifest;
    let vm = manifest.as_ref().and_then(Manifest::vm).map(|vm| vm.name.clone());
    let segments = seen.segments.into_iter().map(|segment| Segment {
        number: segment.header.number,
        slot: segment.header.slot,
        first_seq: segment.header.after.seq + 1,
        last_seq: segment.trailer.as_ref().map(|trailer| trailer.last.seq),
        data_bytes: segment.trailer.as_ref().map(|trailer| trailer.data_end_bytes - PAGE_BYTES as u64),
        sealed: segment.trailer.is_some(),
        encryption: Encryption::of(text::segment_encryption(&segment.header)),
    });
    Ok(Facts {
        segments: segments.collect(),
        locked_by_site_key: Some(site_key.to_string()),
        ..plain_facts(
            path,
            vm.unwrap_or_else(|| superblock.vm_id.to_string()),
            manifest.as_ref(),
            &superblock,
        )
    })
}

/// The parts of a file that are never encrypted.
#[derive(Default)]
struct Plain {
    superblock: Option<Superblock>,
    manifest: Option<Manifest>,
    segments: Vec<super::contents::Segment>,
}

impl Visitor for Plain {
    const WANTS_BATCHES: bool = false;

    fn visit(&mut self, part: Part<'_>) -> anyhow::Result<()> {
        match part {
            Part::Superblock { superblock, counts: true, .. } => self.superblock = Some(superblock.clone()),
            Part::Manifest { manifest, counts: true, .. } => {
                self.manifest = serde_json::from_str(&manifest.text).ok();
            }
            Part::Segment(segment) => self.segments.push(segment.clone()),
            _ => {}
        }
        Ok(())
    }
}
