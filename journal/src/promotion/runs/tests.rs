use super::super::chunks::Chunks;
use super::*;
use crate::batch::{BatchLink, BatchSealer, BatchView, Record};
use crate::format::FooterBuilder;
use crate::index::IndexBuilder;
use crate::storage::AlignedBuf;

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
    works_in_chunks(records, TransferSizes::default().chunk_bytes)
}

fn works_in_chunks(records: Vec<Record>, chunk_bytes: u64) -> Vec<(u64, u64, bool)> {
    let mut chunks = Chunks::new(vec![Index::default(), index(records)], chunk_bytes);
    let mut works = Vec::new();
    while let Some(mut chunk) = chunks.next() {
        while let Some((read, range)) = chunk.next_read() {
            chunk.take(read, AlignedBuf::zeroed((range.end - range.start) as usize));
        }
        assert!(chunk.is_read());
        let mut runs = Runs::new(chunk, TransferSizes::default());
        while let Some(work) = runs.next(chunks.indexes()) {
            works.push(match work {
                Work::Run(run) => (run.offset_bytes(), run.len_bytes() as u64, false),
                Work::Zeroes { offset_bytes, len_bytes, .. } => (offset_bytes, len_bytes, true),
            });
        }
        assert!(runs.is_done());
    }
    assert!(chunks.is_done());
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
    let zeroes = [(0, 4096, false), (4096, 99 * 4096, true), (100 * 4096, 4096, false)];
    assert_eq!(punched[..3], zeroes);
    let rest = [(101 * 4096, 155 * 4096, true), (256 * 4096, 4096, false), (100 * 4096, 4096, false)];
    assert_eq!(punched[3..], rest, "zeroes come first, data after them");
    assert_eq!(works(vec![Record::zeroes(1, 1, 0, 4096, 8192)]), [(4096, 8192, false)]);
}

#[test]
fn a_chunk_is_written_in_the_order_of_the_disk_and_chunks_in_that_of_the_journal() {
    let places = [7, 3, 5, 1, 6, 0, 4, 2];
    let records = || (1..).zip(places).map(|(seq, place)| write(seq, place * 8192, 8192)).collect::<Vec<_>>();
    let offsets = |chunk_bytes| -> Vec<u64> {
        works_in_chunks(records(), chunk_bytes).iter().map(|(offset, _, _)| offset / 8192).collect()
    };
    assert_eq!(works(records()), [(0, 8 * 8192, false)], "all in one stretch");
    // Records that are next to one another are read together up to 1 MiB, whatever a chunk may be.
    assert_eq!(offsets(4096), [0]);
    let half = 512 << 10;
    let places = [5, 1, 4, 0, 3, 2];
    let far = (1..).zip(places).map(|(seq, place)| write(seq, place * half, half as usize)).collect();
    let starts: Vec<u64> = works_in_chunks(far, 1 << 20).iter().map(|(offset, _, _)| offset / half).collect();
    assert_eq!(starts, [1, 5, 0, 4, 2, 3]);
}
