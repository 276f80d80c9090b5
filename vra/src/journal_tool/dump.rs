//! `vra-journal dump`.

use std::collections::HashSet;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context;
use journal::bad_ranges::BadRange;
use journal::batch::{BatchError, BatchView, RecordKind, RecordView};
use journal::crypt::{SiteKeyId, SiteKeys};
use journal::format::{
    BAD_LIST_OFFSETS, JournalState, MANIFEST_OFFSETS, SUPERBLOCK_OFFSETS, SegmentHeader, Superblock,
    slot_offset_bytes,
};
use serde_json::{Map, Value, json};

use super::contents::{Part, Segment, Visitor, visit};
use super::damage::Damage;
use super::locked::Locked;
use super::place::{Journal, find_one};
use super::text;
use crate::api::CheckpointId;

/// Prints what a journal's file holds, one JSON object a line. True if something is damaged.
pub(super) fn run(path: &Path, keys: &SiteKeys, records: bool, out: &mut dyn Write) -> anyhow::Result<bool> {
    let path = find_one(path)?;
    let openable = Journal::open(&path, keys).ok().map(|journal| {
        let checkpoints = journal.reader.catalogue().checkpoints();
        checkpoints.iter().map(|entry| entry.seq).collect::<HashSet<u64>>()
    });
    let (out, counts) = (BufWriter::new(out), Counts::default());
    let mut dump = Dump { out, records, openable, counts, locked: None };
    visit(&path, keys, &mut dump)?;
    let Counts { segments, batches, records, checkpoints, damage } = dump.counts;
    let end = json!({
        "type": "end", "segments": segments, "batches": batches, "records": records, "checkpoints": checkpoints,
        "damage": damage,
    });
    dump.line(&end)?;
    dump.out.flush().context("cannot write")?;
    if let Some(site_key) = dump.locked {
        return Err(Locked::new(&path, site_key, keys)).context("not all of it was dumped");
    }
    Ok(damage > 0)
}

struct Dump<'a> {
    out: BufWriter<&'a mut dyn Write>,
    /// Each record is told, too.
    records: bool,
    /// Numbers of the records of those checkpoints that can be opened, if any can.
    openable: Option<HashSet<u64>>,
    counts: Counts,
    /// A site key that is missing.
    locked: Option<SiteKeyId>,
}

/// How many of each were told.
#[derive(Default)]
struct Counts {
    segments: u64,
    batches: u64,
    records: u64,
    checkpoints: u64,
    damage: u64,
}

impl Visitor for Dump<'_> {
    const WANTS_BATCHES: bool = true;

    fn visit(&mut self, part: Part<'_>) -> anyhow::Result<()> {
        match part {
            Part::Superblock { copy, superblock, counts } => {
                let place = SUPERBLOCK_OFFSETS[copy];
                self.object(
                    "superblock",
                    json!({ "copy": copy, "file_offset_bytes": place, "counts": counts }),
                    [superblock_facts(superblock)],
                )
            }
            Part::Manifest { slot, manifest, counts } => {
                let text = serde_json::from_str(&manifest.text);
                self.line(&json!({
                    "type": "manifest", "slot": slot, "file_offset_bytes": MANIFEST_OFFSETS[slot], "counts": counts,
                    "journal": manifest.journal_id, "sequence": manifest.sequence,
                    "content": text.unwrap_or_else(|_| Value::String(manifest.text.clone())),
                }))
            }
            Part::BadList { slot, list, counts } => {
                let range = |bad: BadRange| {
                    json!({
                        "volume": bad.volume, "offset_bytes": bad.offset_bytes, "len_bytes": bad.len_bytes, "seq": bad.seq,
                    })
                };
                self.line(&json!({
                    "type": "bad_list", "slot": slot, "file_offset_bytes": BAD_LIST_OFFSETS[slot], "counts": counts,
                    "journal": list.journal_id, "sequence": list.sequence,
                    "ranges": list.ranges.iter().map(range).collect::<Vec<_>>(),
                }))
            }
            Part::Locked(site_key) => {
                self.locked = Some(site_key);
                let what =
                    format!("the segment is encrypted: what is in it is told only with site key {site_key}");
                self.line(&json!({ "type": "note", "what": what }))
            }
            Part::Segment(segment) => {
                self.counts.segments += 1;
                self.object("segment", header_facts(&segment.header), [trailer_facts(segment)])
            }
            Part::Batch { segment, file_offset_bytes, batch, damage } => {
                self.batch(segment, file_offset_bytes, batch, damage)
            }
            Part::EndOfSegment { .. } => Ok(()),
            Part::Damage(damage) => {
                self.counts.damage += 1;
                let Damage { seq, segment, place, file_offset_bytes, what } = damage;
                self.line(&json!({
                    "type": "damage", "seq": seq, "segment": segment, "file_offset_bytes": file_offset_bytes,
                    "volume": place.map(|place| place.volume),
                    "offset_bytes": place.map(|place| place.offset_bytes),
                    "len_bytes": place.map(|place| place.len_bytes), "what": what,
                }))
            }
            Part::Note(what) => self.line(&json!({ "type": "note", "what": what })),
        }
    }
}

impl Dump<'_> {
    fn line(&mut self, value: &Value) -> anyhow::Result<()> {
        serde_json::to_writer(&mut self.out, value).context("cannot write")?;
        writeln!(self.out).context("cannot write")
    }

    /// An object whose keys are those of several.
    fn object<const N: usize>(&mut self, kind: &str, first: Value, others: [Value; N]) -> anyhow::Result<()> {
        let mut all = Map::new();
        all.insert("type".to_owned(), kind.into());
        for facts in std::iter::once(first).chain(others) {
            if let Value::Object(facts) = facts {
                all.extend(facts);
            }
        }
        self.line(&Value::Object(all))
    }

    fn batch(
        &mut self,
        segment: u64,
        file_offset_bytes: u64,
        batch: &BatchView<'_>,
        damage: &[BatchError],
    ) -> anyhow::Result<()> {
        self.counts.batches += 1;
        self.counts.records += batch.record_count() as u64;
        let link = batch.link();
        self.line(&json!({
            "type": "batch", "segment": segment, "file_offset_bytes": file_offset_bytes,
            "len_bytes": batch.len_bytes(), "local": batch.is_local(), "generation": link.generation,
            "open_count": link.open_count, "first_seq": batch.first_seq(), "last_seq": batch.last_seq(),
            "records": batch.record_count(), "crc": batch.crc(), "prev_batch_crc": link.prev_batch_crc,
        }))?;
        for record in batch.records() {
            let is_damaged = damage
                .iter()
                .any(|error| matches!(error, BatchError::PayloadCrc { seq, .. } if *seq == record.seq()));
            if self.records {
                let offset_bytes = file_offset_bytes + record.payload_offset_bytes() as u64;
                self.line(&record_facts(&record, segment, offset_bytes, is_damaged))?;
            }
            if record.kind() == RecordKind::Checkpoint && !is_damaged {
                self.checkpoint(&record)?;
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self, record: &RecordView<'_>) -> anyhow::Result<()> {
        // With a damaged payload there is none.
        let Some(found) = record.checkpoint() else { return Ok(()) };
        self.counts.checkpoints += 1;
        let id = CheckpointId { nonce: found.epoch.nonce.as_u128(), counter: found.epoch.counter };
        let can_be_opened = self.openable.as_ref().map(|openable| openable.contains(&record.seq()));
        self.line(&json!({
            "type": "checkpoint", "seq": record.seq(), "cut": found.cut, "id": id, "time_us": found.time_us,
            "kind": text::checkpoint_kind(found.kind), "tag": found.tag,
            "member_set_version": found.member_set_version, "can_be_opened": can_be_opened,
        }))
    }
}

fn superblock_facts(superblock: &Superblock) -> Value {
    let (state, sync_id) = match superblock.state {
        JournalState::FirstSync { sync_id } => ("first_sync", sync_id),
        JournalState::Consistent => ("consistent", 0),
        JournalState::HistoryGivenUp { sync_id } => ("history_given_up", sync_id),
    };
    let (encryption, key) = text::encryption(&superblock.encryption);
    let volumes = superblock.volumes.iter().enumerate().map(|(number, volume)| {
        json!({
            "number": number, "id": volume.id, "base_seq": volume.base_seq, "size_bytes": volume.size_bytes,
            "fresh_image": volume.fresh_image,
        })
    });
    json!({
        "sequence": superblock.sequence,
        "journal": superblock.journal_id,
        "vm": superblock.vm_id,
        "vpg": superblock.vpg_id,
        "slot_len_bytes": superblock.slot_len_bytes,
        "slot_count": superblock.slot_count,
        "state": state,
        "state_sync_id": sync_id,
        "open_count": superblock.open_count,
        "low_water_segment": superblock.low_water_segment,
        "low_water_seq": superblock.low_water.seq,
        "low_water_batch_crc": superblock.low_water.batch_crc,
        "manifest_slot": superblock.manifest.map(|place| place.slot),
        "manifest_crc": superblock.manifest.map(|place| place.crc),
        "bad_list_slot": superblock.bad_list.map(|place| place.slot),
        "bad_list_crc": superblock.bad_list.map(|place| place.crc),
        "encryption": encryption,
        "encryption_key_id": key.map(|key| key.key_id),
        "site_key_id": key.map(|key| key.site_key_id().to_string()),
        "promotion_intent_seq": superblock.promotion_intent_seq,
        "tail_generation": superblock.tail_generation,
        "parent_generation": superblock.parent_generation,
        "generation_first_seq": superblock.generation_first_seq,
        "generation_fork_seq": superblock.generation_fork_seq,
        "receive_time_us": superblock.receive_time_us,
        "volumes": volumes.collect::<Vec<_>>(),
    })
}

fn header_facts(header: &SegmentHeader) -> Value {
    let (encryption, key) = text::segment_encryption(header);
    json!({
        "segment": header.number,
        "slot": header.slot,
        "file_offset_bytes": slot_offset_bytes(header.slot, header.slot_len_bytes),
        "journal": header.journal_id,
        "open_count": header.open_count,
        "after_seq": header.after.seq,
        "after_batch_crc": header.after.batch_crc,
        "carried_end_bytes": header.carried_end_bytes,
        "begin_time_us": header.begin_time_us,
        "encryption": encryption,
        "encryption_key_id": key.map(|key| key.key_id),
        "site_key_id": key.map(|key| key.site_key_id().to_string()),
    })
}

fn trailer_facts(segment: &Segment) -> Value {
    let trailer = segment.trailer.as_ref();
    json!({
        "sealed": trailer.is_some(),
        "data_end_bytes": trailer.map(|trailer| trailer.data_end_bytes),
        "footer_len_bytes": trailer.map(|trailer| trailer.footer_len_bytes),
        "footer_crc": trailer.map(|trailer| trailer.footer_crc),
        "last_seq": trailer.map(|trailer| trailer.last.seq),
        "last_batch_crc": trailer.map(|trailer| trailer.last.batch_crc),
        "end_time_us": trailer.map(|trailer| trailer.end_time_us),
    })
}

fn record_facts(record: &RecordView<'_>, segment: u64, payload_offset_bytes: u64, is_damaged: bool) -> Value {
    let payload_len_bytes = record.payload().len();
    json!({
        "type": "record",
        "segment": segment,
        "seq": record.seq(),
        "time_us": record.time_us(),
        "kind": kind_name(record.kind()),
        "volume": record.volume(),
        "offset_bytes": record.offset_bytes(),
        "len_bytes": record.len_bytes(),
        "sync_id": record.sync_id(),
        "argument": record.argument(),
        "payload_len_bytes": payload_len_bytes,
        "payload_file_offset_bytes": (payload_len_bytes > 0).then_some(payload_offset_bytes),
        "payload_crcs": record.crcs().collect::<Vec<u32>>(),
        "damaged": is_damaged,
    })
}

fn kind_name(kind: RecordKind) -> &'static str {
    match kind {
        RecordKind::Write => "write",
        RecordKind::Zeroes => "zeroes",
        RecordKind::Void => "void",
        RecordKind::Checkpoint => "checkpoint",
        RecordKind::SyncBegin => "sync_begin",
        RecordKind::SyncData => "sync_data",
        RecordKind::SyncEnd => "sync_end",
        RecordKind::VerifyDigest => "verify_digest",
        RecordKind::Resize => "resize",
        RecordKind::PromotionIntent => "promotion_intent",
        RecordKind::EndOfGeneration => "end_of_generation",
    }
}
