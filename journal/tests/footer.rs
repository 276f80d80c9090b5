//! Footers: what a segment's batches say comes back from the bytes that are written.

use bytes::Bytes;
use journal::batch::{BatchLink, BatchSealer, BatchView, Checkpoint, CheckpointKind, Epoch, Record};
use journal::format::{Footer, FooterBuilder, PAGE_BYTES};
use proptest::prelude::*;
use uuid::Uuid;

fn checkpoint(tag: &str) -> Checkpoint {
    Checkpoint {
        epoch: Epoch { nonce: Uuid::from_u128(1), counter: 17 },
        cut: 12,
        member_set_version: 2,
        time_us: 5,
        kind: CheckpointKind::Tagged,
        tag: tag.to_owned(),
    }
}

fn any_record() -> impl Strategy<Value = Record> {
    prop_oneof![
        (0..8_u16, 0..1000_u64, 1..40_usize).prop_map(|(volume, sector, sectors)| {
            Record::write(0, 5, volume, sector * 512, Bytes::from(vec![7; sectors * 512]))
        }),
        (0..8_u16, 1..1000_u64).prop_map(|(volume, sectors)| Record::zeroes(0, 6, volume, 0, sectors * 512)),
        "[a-z]{0,20}".prop_map(|tag| Record::checkpoint(0, 7, &checkpoint(&tag))),
        Just(Record::end_of_generation(0, 8, Some(Uuid::from_u128(3)))),
        Just(Record::void(0, 9)),
    ]
}

fn seal(records: &[Record]) -> Bytes {
    let link = BatchLink {
        journal_id: Uuid::from_u128(7),
        generation: Uuid::from_u128(9),
        open_count: 3,
        prev_batch_crc: 0,
    };
    let mut sealer = BatchSealer::new();
    for (seq, record) in (1..).zip(records) {
        sealer.push(Record { seq, ..record.clone() }).expect("fits");
    }
    sealer.seal(&link, 0).expect("not empty").to_bytes()
}

proptest! {
    #[test]
    fn a_footer_comes_back_and_has_the_length_that_was_foreseen(
        records in prop::collection::vec(any_record(), 1..40)
    ) {
        let batch = seal(&records);
        let view = BatchView::parse(&batch).expect("valid");
        let mut builder = FooterBuilder::new(0);
        let foreseen_bytes = builder.len_bytes_with(&view);
        builder.add(&view, PAGE_BYTES as u64);
        let footer = builder.finish();
        let bytes = footer.encode();
        prop_assert_eq!(Some(bytes.len() as u64), foreseen_bytes);
        let data_end_bytes = (PAGE_BYTES + batch.len()) as u64;
        let decoded = Footer::decode(&bytes, crc32c::crc32c(&bytes), data_end_bytes);
        prop_assert_eq!(decoded, Ok(footer));
    }
}
