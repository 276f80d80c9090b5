//! A journal of millions of records that has everything but their payloads: what an opening reads is there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Result;
use journal::batch::RecordKind;
use journal::crypt::Encryption;
use journal::format::{
    ChainPoint, ExtentEntry, Footer, JournalState, PAGE_BYTES, SUPERBLOCK_OFFSETS, SegmentHeader,
    SegmentTrailer, Superblock, VolumeState, slot_offset_bytes,
};
use uuid::Uuid;
use zerocopy::FromZeros as _;

use super::scattered;

/// Length of a record, in bytes.
const RECORD_BYTES: u64 = 4096;
const SLOT_BYTES: u64 = 64 << 20;
/// As many as a slot of 64 MiB holds with their headers.
const RECORDS_PER_SLOT: u64 = 15_900;

/// Makes one; gives how long all its footers are, in bytes.
pub(super) fn make(path: &Path, record_count: u64, disk_bytes: u64) -> Result<u64> {
    let id = Uuid::from_u128(7);
    let slot_count = record_count.div_ceil(RECORDS_PER_SLOT) as u32;
    let file = File::create(path)?;
    // Payloads are never read: their space stays a hole.
    file.set_len(slot_offset_bytes(slot_count, SLOT_BYTES))?;
    let mut footers_bytes = 0;
    let point = |seq: u64| ChainPoint { seq, batch_crc: seq as u32 };
    for slot in 0..slot_count {
        let after_seq = u64::from(slot) * RECORDS_PER_SLOT;
        let last_seq = record_count.min(after_seq + RECORDS_PER_SLOT);
        let header = SegmentHeader {
            journal_id: id,
            number: u64::from(slot) + 1,
            slot,
            open_count: 1,
            after: point(after_seq),
            carried_end_bytes: PAGE_BYTES as u64,
            begin_time_us: 1,
            slot_len_bytes: SLOT_BYTES,
            encryption: None,
            low_water: None,
        };
        let mut extents: Vec<ExtentEntry> = (after_seq + 1..=last_seq)
            .map(|seq| {
                let delta = seq - after_seq;
                let mut extent = ExtentEntry::new_zeroed();
                extent.offset_bytes = (scattered(seq, disk_bytes / RECORD_BYTES) * RECORD_BYTES).into();
                extent.seq_delta = (delta as u32).into();
                extent.len_sectors = ((RECORD_BYTES / 512) as u32).into();
                extent.payload_sector = ((delta * 8) as u32).into();
                extent.crc = (seq as u32).into();
                extent.kind = RecordKind::Write as u8;
                extent
            })
            .collect();
        extents.sort_unstable_by_key(|extent| (extent.offset_bytes.get(), extent.seq_delta.get()));
        let footer = Footer { base_seq: after_seq, extents, ..Footer::default() }.encode();
        let trailer = SegmentTrailer {
            header: header.clone(),
            data_end_bytes: SLOT_BYTES - PAGE_BYTES as u64 - footer.len() as u64,
            footer_len_bytes: footer.len() as u64,
            footer_crc: crc32c::crc32c(&footer),
            last: point(last_seq),
            end_time_us: 1,
        };
        let begin = slot_offset_bytes(slot, SLOT_BYTES);
        file.write_all_at(&header.encode(), begin)?;
        file.write_all_at(&footer, begin + trailer.data_end_bytes)?;
        file.write_all_at(&trailer.encode(), begin + SLOT_BYTES - PAGE_BYTES as u64)?;
        footers_bytes += footer.len() as u64;
    }
    let superblock = Superblock {
        sequence: 1,
        journal_id: id,
        vm_id: id,
        vpg_id: id,
        slot_len_bytes: SLOT_BYTES,
        slot_count,
        open_count: 1,
        manifest: None,
        bad_list: None,
        low_water_segment: 1,
        low_water: ChainPoint::default(),
        state: JournalState::Consistent,
        promotion_intent_seq: 0,
        tail_generation: id,
        parent_generation: Uuid::nil(),
        generation_first_seq: 1,
        generation_fork_seq: 0,
        receive_time_us: 1,
        encryption: Encryption::Never,
        volumes: vec![VolumeState { id, base_seq: 0, size_bytes: disk_bytes, fresh_image: true }],
    };
    SUPERBLOCK_OFFSETS.iter().try_for_each(|place| file.write_all_at(&superblock.encode(), *place))?;
    file.sync_all()?;
    Ok(footers_bytes)
}
