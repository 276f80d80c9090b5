//! Batches: what goes in comes out, and nothing malformed gets through.

use bytes::Bytes;
use journal::batch::{
    BatchError, BatchHeader, BatchLink, BatchSealer, BatchView, Checkpoint, CheckpointKind, Epoch,
    MAX_BATCH_BYTES, MAX_RECORD_PAYLOAD, MAX_RECORDS, PushError, Record, RecordKind, RecordView,
    unit_matches,
};
use proptest::prelude::*;
use uuid::Uuid;

fn link() -> BatchLink {
    BatchLink {
        journal_id: Uuid::from_u128(7),
        generation: Uuid::from_u128(9),
        open_count: 3,
        prev_batch_crc: 0xdead_beef,
    }
}

fn seal(records: impl IntoIterator<Item = Record>) -> Bytes {
    let mut sealer = BatchSealer::new();
    for record in records {
        sealer.push(record).expect("fits");
    }
    let expected_len_bytes = sealer.len_bytes();
    let batch = sealer.seal(&link(), 0).expect("not empty");
    assert!(sealer.is_empty());
    assert_eq!(batch.len_bytes(), expected_len_bytes);
    batch.to_bytes()
}

fn checkpoint() -> Checkpoint {
    Checkpoint {
        epoch: Epoch { nonce: Uuid::from_u128(1), counter: 17 },
        cut: 12,
        member_set_version: 2,
        time_us: 1_800_000_000_000_000,
        kind: CheckpointKind::Tagged,
        tag: "before the upgrade".into(),
    }
}

fn any_record() -> impl Strategy<Value = Record> {
    let data = (1..20_usize, any::<u8>()).prop_map(|(sectors, seed)| {
        Bytes::from(
            (0..sectors * 512).map(|i| seed.wrapping_mul(i as u8) ^ (i >> 8) as u8).collect::<Vec<u8>>(),
        )
    });
    let place = (0..64_u16, 0..1_u64 << 40).prop_map(|(volume, sector)| (volume, sector * 512));
    prop_oneof![
        (place.clone(), data.clone()).prop_map(|((volume, at), data)| Record::write(0, 5, volume, at, data)),
        (place.clone(), 1..1_u64 << 30).prop_map(|((volume, at), n)| Record::zeroes(
            0,
            6,
            volume,
            at,
            n * 512
        )),
        (place, data, 1..u64::MAX)
            .prop_map(|((volume, at), data, id)| Record::sync_data(0, 7, volume, at, id, data)),
        Just(Record::void(0, 8)),
        "\\PC{0,90}".prop_map(|tag| Record::checkpoint(0, 9, &Checkpoint { tag, ..checkpoint() })),
        (0..64_u16, 1..u64::MAX).prop_map(|(volume, id)| Record::sync_begin(0, 10, volume, 1 << 30, id)),
        (0..64_u16, 1..u64::MAX).prop_map(|(volume, id)| Record::sync_end(0, 11, volume, 1 << 30, id)),
        (0..64_u16).prop_map(|volume| Record::resize(0, 12, volume, 1 << 31)),
        any::<Option<u128>>().prop_map(|id| Record::end_of_generation(0, 13, id.map(Uuid::from_u128))),
    ]
}

proptest! {
    #[test]
    fn records_survive_the_round_trip(first_seq in 1..u64::MAX / 2, mut records in prop::collection::vec(any_record(), 1..40)) {
        let ends = |record: &Record| record.kind == RecordKind::SyncEnd;
        let count = records.iter().position(ends).map_or(records.len(), |index| index + 1);
        records.truncate(count);
        for (seq, record) in (first_seq..).zip(&mut records) {
            record.seq = seq;
        }
        let bytes = seal(records.clone());
        prop_assert_eq!(bytes.len() % 4096, 0);
        prop_assert_eq!(BatchHeader::needed(&bytes), Ok(bytes.len()));
        let view = BatchView::parse(&bytes).expect("valid");
        prop_assert_eq!(view.link(), link());
        prop_assert_eq!(view.first_seq(), first_seq);
        prop_assert_eq!(view.last_seq(), first_seq + records.len() as u64 - 1);
        let found: Vec<Record> = view.records().map(|record| record.to_record(&bytes)).collect();
        prop_assert_eq!(found, records);
        for record in view.records() {
            prop_assert_eq!(record.payload_offset_bytes() % 512, 0);
            for (unit, crc) in record.payload().chunks(4096).zip(record.crcs()) {
                prop_assert!(unit_matches(unit, crc));
            }
        }
    }

    #[test]
    fn no_flipped_bit_of_head_or_payload_gets_through(bit in 0..(128 + 2 * 64 + 4 + 512) * 8_usize) {
        let bytes = seal([Record::write(5, 1, 0, 4096, vec![0xa5; 512].into()), Record::void(6, 2)]);
        let head_bits = (128 + 2 * 64 + 4) * 8;
        // The bits after the CRC table and before the payload are padding, which nobody reads.
        let bit = if bit < head_bits { bit } else { bit - head_bits + 512 * 8 };
        let mut flipped = bytes.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let error = BatchView::parse(&flipped).map(|view| view.record_count()).expect_err("must be noticed");
        if bit >= 512 * 8 {
            prop_assert_eq!(error, BatchError::PayloadCrc { seq: 5, unit: 0 });
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused_without_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..600), as_header in any::<bool>()) {
        if as_header && bytes.len() > 16 {
            bytes[..16].copy_from_slice(b"HFBATCH\0\x01\0\x80\0\0\0\0\0");
        }
        let _ = BatchHeader::needed(&bytes);
        prop_assert!(BatchView::parse(&bytes).is_err());
    }
}

#[test]
fn every_unit_of_a_long_payload_has_its_own_checksum() {
    let bytes = seal([Record::write(1, 1, 0, 0, vec![7; MAX_RECORD_PAYLOAD].into())]);
    let start =
        BatchView::parse(&bytes).expect("valid").records().next().expect("one").payload_offset_bytes();
    let mut flipped = bytes.to_vec();
    flipped[start + 200 * 4096 + 5] ^= 1;
    assert_eq!(BatchView::parse(&flipped).unwrap_err(), BatchError::PayloadCrc { seq: 1, unit: 200 });
}

#[test]
fn a_stream_reader_learns_the_length_from_the_header() {
    let bytes = seal([Record::void(1, 1)]);
    for known in 0..BatchHeader::LEN {
        assert_eq!(BatchHeader::needed(&bytes[..known]), Ok(BatchHeader::LEN));
    }
    assert_eq!(BatchHeader::needed(&bytes[..BatchHeader::LEN]), Ok(4096));
    assert_eq!(BatchHeader::needed(b"HFX"), Err(BatchError::Magic));
    let short = BatchView::parse(&bytes[..4095]).map(|view| view.record_count());
    assert_eq!(short, Err(BatchError::Short { needed_bytes: 4096, given_bytes: 4095 }));
}

#[test]
fn a_newer_version_is_named() {
    let mut bytes = seal([Record::void(1, 1)]).to_vec();
    bytes[8] = 2;
    assert_eq!(BatchHeader::needed(&bytes), Err(BatchError::Version(2)));
    assert_eq!(BatchView::parse(&bytes).unwrap_err(), BatchError::Version(2));
}

#[test]
fn the_sealer_keeps_the_order_and_the_limits() {
    let mut sealer = BatchSealer::new();
    sealer.push(Record::void(10, 1)).expect("first");
    assert_eq!(sealer.push(Record::void(12, 1)), Err(PushError::Order { seq: 12, last_seq: 10 }));
    assert_eq!(sealer.push(Record::void(10, 1)), Err(PushError::Order { seq: 10, last_seq: 10 }));
    assert!(matches!(sealer.push(Record::promotion_intent(1, 5)), Err(PushError::Order { .. })));
    let unaligned = Record::write(11, 1, 0, 100, vec![0; 512].into());
    assert!(matches!(sealer.push(unaligned), Err(PushError::Record { seq: 11, .. })));
    let mut pushed = 0;
    let full = loop {
        match sealer.push(Record::write(11 + pushed, 1, 0, 0, vec![0; MAX_RECORD_PAYLOAD].into())) {
            Ok(()) => pushed += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(pushed, 3);
    assert!(matches!(full, PushError::Full(record) if record.seq == 14));
    let batch = sealer.seal(&link(), 0).expect("not empty");
    assert!(batch.len_bytes() <= MAX_BATCH_BYTES);
    assert_eq!((batch.first_seq, batch.last_seq), (10, 13));
    assert!(sealer.seal(&link(), 0).is_none());

    for seq in 1..=MAX_RECORDS as u64 {
        sealer.push(Record::void(seq, 1)).expect("fits");
    }
    assert!(matches!(sealer.push(Record::void(MAX_RECORDS as u64 + 1, 1)), Err(PushError::Full(_))));
    let bytes = sealer.seal(&link(), 0).expect("not empty").to_bytes();
    assert_eq!(BatchView::parse(&bytes).expect("valid").record_count(), MAX_RECORDS);
}

#[test]
fn a_sync_end_ends_its_batch() {
    let mut sealer = BatchSealer::new();
    sealer.push(Record::sync_end(5, 1, 0, 4096, 9)).expect("first");
    assert!(matches!(sealer.push(Record::void(6, 1)), Err(PushError::Full(_))));
}

#[test]
fn records_of_the_target_have_batches_of_their_own() {
    let mut sealer = BatchSealer::new();
    sealer.push(Record::promotion_intent(1, 5)).expect("first");
    assert!(matches!(sealer.push(Record::void(8, 1)), Err(PushError::Order { .. })));
    let bytes = sealer.seal(&link(), 77).expect("not empty").to_bytes();
    let view = BatchView::parse(&bytes).expect("valid");
    assert!(view.is_local());
    assert_eq!((view.first_seq(), view.last_seq()), (77, 77));
    let record = view.records().next().expect("one");
    assert_eq!((record.kind(), record.argument(), record.seq()), (RecordKind::PromotionIntent, 5, 0));
}

#[test]
fn a_checkpoint_is_read_back_and_a_long_tag_is_cut_at_a_character() {
    let tag = "é".repeat(200);
    let bytes = seal([
        Record::checkpoint(1, 1, &checkpoint()),
        Record::checkpoint(2, 1, &Checkpoint { tag, ..checkpoint() }),
    ]);
    let view = BatchView::parse(&bytes).expect("valid");
    let found: Vec<Checkpoint> =
        view.records().filter_map(|record: RecordView<'_>| record.checkpoint()).collect();
    assert_eq!(found[0], checkpoint());
    assert_eq!(found[1].tag, "é".repeat(127));
}
