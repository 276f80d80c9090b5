use proptest::prelude::*;
use zerocopy::FromZeros as _;

use super::*;
use crate::batch::RecordKind;

const SLOT_BYTES: u64 = 1 << 20;
const DISK_SECTORS: u64 = 80;

/// A record as the footer of its segment tells: place and length in sectors, zeroes or not.
#[derive(Clone, Copy, Debug)]
struct Written {
    place: u64,
    len: u64,
    zeroes: bool,
}

/// The footer of segment `number`, whose records follow those of the segments before.
fn footer(number: usize, base_seq: u64, records: &[Written]) -> Footer {
    let mut extents = Vec::new();
    for (delta, record) in (1_u32..).zip(records) {
        let mut extent = ExtentEntry::new_zeroed();
        extent.offset_bytes = (record.place * 512).into();
        extent.seq_delta = delta.into();
        extent.len_sectors = (record.len as u32).into();
        extent.kind = if record.zeroes { RecordKind::Zeroes as u8 } else { RecordKind::Write as u8 };
        if !record.zeroes {
            extent.payload_sector = (8 + delta * 32).into();
            // One of more than a unit has its checksums in the table.
            extent.crc = (number as u32 * 100 + delta).into();
            if record.len > 8 {
                extent.crc = 0.into();
            }
        }
        extents.push(extent);
    }
    extents.sort_by_key(|extent| (extent.offset_bytes.get(), extent.seq_delta.get()));
    Footer { base_seq, extents, crcs: vec![7, 8, 9, 10], events: Vec::new(), gaps: Vec::new() }
}

fn written() -> impl Strategy<Value = Written> {
    (0..DISK_SECTORS, 1_u64..24, 0_u32..4).prop_map(|(place, len, kind)| Written {
        place,
        len: len.min(DISK_SECTORS - place),
        zeroes: kind == 0,
    })
}

proptest! {
    /// Against an array of sectors, whatever the order in which footers come.
    #[test]
    fn each_sector_is_the_newest_record_s(
        segments in prop::collection::vec(prop::collection::vec(written(), 0..12), 1..5),
        base_seq in 0_u64..8,
        cut_off in 0_u64..12,
        backwards in any::<bool>(),
    ) {
        let mut footers = Vec::new();
        let mut seq = 0;
        for (number, records) in segments.iter().enumerate() {
            footers.push((number as u32, footer(number, seq, records)));
            seq += records.len() as u64;
        }
        let through_seq = seq.saturating_sub(cut_off);
        // Number of the record, its segment and its sector within the payload.
        let mut model = [None; DISK_SECTORS as usize];
        let mut seq = 0;
        for (number, records) in segments.iter().enumerate() {
            for (delta, record) in (1_u64..).zip(records) {
                seq += 1;
                if seq <= base_seq || seq > through_seq {
                    continue;
                }
                for sector in 0..record.len {
                    let place = (!record.zeroes)
                        .then(|| slot_offset_bytes(number as u32, SLOT_BYTES) + (8 + delta * 32 + sector) * 512);
                    model[(record.place + sector) as usize] = Some((seq, place));
                }
            }
        }
        if backwards {
            footers.reverse();
        }
        let mut builder = IndexBuilder::default();
        for (slot, footer) in &footers {
            builder.add(footer, *slot, SLOT_BYTES, 0, base_seq, through_seq);
        }
        let index = builder.build();
        let mut found = [None; DISK_SECTORS as usize];
        let mut end_bytes = 0;
        for piece in index.pieces() {
            prop_assert!(end_bytes <= piece.offset_bytes && piece.len_bytes() > 0);
            end_bytes = piece.end_bytes();
            for at in (piece.offset_bytes..piece.end_bytes()).step_by(512) {
                let place = piece.payload().map(|payload| {
                    prop_assert!(piece.end_bytes() <= payload.offset_bytes + payload.len_bytes);
                    Ok(payload.file_offset_bytes + at - payload.offset_bytes)
                });
                found[(at / 512) as usize] = Some((piece.seq, place.transpose()?));
            }
        }
        prop_assert_eq!(found, model);
        for begin in [0, 17, 40] {
            let overlapping: Vec<u64> = index.overlapping(begin * 512, 20 * 512).map(|piece| piece.offset_bytes).collect();
            let expected = index.pieces().iter().filter(|piece| piece.end_bytes() > begin * 512 && piece.offset_bytes < (begin + 20) * 512);
            prop_assert_eq!(overlapping, expected.map(|piece| piece.offset_bytes).collect::<Vec<_>>());
        }
    }
}
