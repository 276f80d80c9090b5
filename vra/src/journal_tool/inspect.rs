//! `vra-journal inspect`.

use std::io::Write;
use std::path::Path;

use journal::crypt::SiteKeys;
use journal::format::JournalState;
use journal::recovery::Content;
use serde::Serialize;

use super::moment::describe;
use super::place::{Journal, Manifest};
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
    /// ... to here.
    newest_seq: u64,
    checkpoints: usize,
    slot_bytes: u64,
    slots: u32,
    free_slots: usize,
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
    last_seq: u64,
    /// Bytes of batches in it.
    data_bytes: u64,
    sealed: bool,
}

/// Says what a journal is.
pub(super) fn run(path: &Path, keys: &SiteKeys, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let journal = Journal::open(path, keys)?;
    let facts = facts(&journal);
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
    writeln!(out, "history       records {} to {}", facts.oldest_seq, facts.newest_seq)?;
    let checkpoints = journal.reader.catalogue().checkpoints();
    let ends = checkpoints.first().zip(checkpoints.last());
    let ends = ends.map(|(first, last)| format!(": {} to {}", describe(first), describe(last)));
    writeln!(out, "checkpoints   {}{}", facts.checkpoints, ends.unwrap_or_default())?;
    let slot = text::bytes(facts.slot_bytes);
    writeln!(out, "space         {} slots of {slot}, {} free", facts.slots, facts.free_slots)?;
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
        let size = text::bytes(segment.data_bytes);
        let state = if segment.sealed { "sealed" } else { "open" };
        writeln!(
            out,
            "segment {:<5} records {} to {}, {size}, slot {}, {state}",
            segment.number, segment.first_seq, segment.last_seq, segment.slot
        )?;
    }
    Ok(())
}

fn facts(journal: &Journal) -> Facts {
    let survey = &journal.reader.survey;
    let superblock = &survey.superblock;
    let disks = superblock.volumes.iter().enumerate().map(|(number, volume)| {
        let metadata = std::fs::metadata(journal.disk_path(number as u16)).ok();
        Disk {
            number,
            id: volume.id.to_string(),
            size_bytes: volume.size_bytes,
            base_seq: volume.base_seq,
            recovery_disk_bytes: metadata
                .map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512),
        }
    });
    let segments = survey.segments.iter().map(|segment| Segment {
        number: segment.header.number,
        slot: segment.header.slot,
        first_seq: segment.header.after.seq + 1,
        last_seq: segment.last().seq,
        data_bytes: segment.data_end_bytes() - journal::format::PAGE_BYTES as u64,
        sealed: matches!(segment.content, Content::Sealed(_)),
    });
    Facts {
        path: journal.path.display().to_string(),
        vm: journal.vm_name(),
        vm_id: superblock.vm_id.to_string(),
        vpg: journal.manifest.as_ref().map(|manifest: &Manifest| manifest.vpg.name.clone()),
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
        newest_seq: journal.reader.newest_seq(),
        checkpoints: journal.reader.catalogue().checkpoints().len(),
        slot_bytes: superblock.slot_len_bytes,
        slots: superblock.slot_count,
        free_slots: survey.free_slots.len(),
        disks: disks.collect(),
        segments: segments.collect(),
        damage: journal.cut_short.as_ref().map(|why| format!("{why}; `vra-journal verify` says more")),
    }
}
