use super::*;
use crate::batch::{BatchLink, BatchSealer, BatchView, Record};
use crate::format::FooterBuilder;
use crate::index::IndexBuilder;

const SLOT_BYTES: u64 = 8 << 20;

/// The index of one segment with these records on volume 0.
fn index(records: Vec<Record>) -> Index {
    let mut sealer = BatchSealer::new();
    for record in records {
        sealer.push(record).expect("room");
    }
    let link = BatchLink {
        journal_id: uuid::Uuid::nil(),
        generation: uuid::Uuid::nil(),
        open_count: 1,
        prev_batch_crc: 0,
    };
    let batch = sealer.seal(&link, 0).expect("records").to_bytes();
    let mut footer = FooterBuilder::new(0);
    footer.add(&BatchView::parse(&batch).expect("whole"), PAGE);
    let mut builder = IndexBuilder::default();
    builder.add(&footer.finish(), 0, SLOT_BYTES, 0, 0, u64::MAX);
    builder.build()
}

fn works(records: Vec<Record>) -> Vec<(u64, u64, bool)> {
    let mut runs = Runs::new(vec![Index::default(), index(records)], TransferSizes::default());
    let mut works = Vec::new();
    while let Some(work) = runs.next() {
        works.push(match work {
            Work::Run(run) => (run.offset_bytes(), run.len_bytes() as u64, false),
            Work::Zeroes { offset_bytes, len_bytes, .. } => (offset_bytes, len_bytes, true),
        });
    }
    assert!(runs.is_done());
    works
}

fn write(seq: u64, offset_bytes: u64, len_bytes: usize) -> Record {
    Record::write(seq, seq, 0, offset_bytes, vec![seq as u8; len_bytes].into())
}

#[test]
fn neighbours_are_written_together_and_a_page_only_once() {
    let records =
        vec![write(1, 8192, 4096), write(2, 4096, 4096), write(3, 12288, 512), write(4, 15872, 512)];
    assert_eq!(works(records), [(4096, 12288, false)]);
    let apart = vec![write(1, 0, 512), write(2, 8192, 512)];
    assert_eq!(works(apart), [(0, 4096, false), (8192, 4096, false)]);
}

#[test]
fn long_stretches_are_cut_at_pages() {
    let records = (0..3).map(|number| write(number + 1, 512 + (number << 20), 1 << 20)).collect();
    let works = works(records);
    assert!(
        works
            .iter()
            .all(|(offset, len, _)| offset % 4096 == 0 && *len <= TransferSizes::default().run_max_bytes),
        "{works:?}"
    );
    assert!(works.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0), "{works:?}");
    assert_eq!(works.iter().map(|(_, len, _)| len).sum::<u64>(), (3 << 20) + 4096);
}

#[test]
fn only_whole_pages_of_long_zeroes_are_punched() {
    let long = vec![Record::zeroes(1, 1, 0, 512, 1 << 20), write(2, 100 * 4096, 512)];
    let punched = works(long);
    let whole = [(0, 4096, false), (4096, 99 * 4096, true), (100 * 4096, 4096, false)];
    assert_eq!(punched[..3], whole);
    assert_eq!(punched[3..], [(101 * 4096, 155 * 4096, true), (256 * 4096, 4096, false)]);
    assert_eq!(works(vec![Record::zeroes(1, 1, 0, 4096, 8192)]), [(4096, 8192, false)]);
}
