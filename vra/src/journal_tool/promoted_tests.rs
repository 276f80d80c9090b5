//! Damage that promotion left on the recovery disks (C5), also while somebody reads.

use journal::crypt::SiteKeys;
use journal::writer::Change;

use super::copy::Copy;
use super::disk::DiskAt;
use super::image::Image;
use super::place::Journal;
use super::progress::Progress;
use super::signals::Signals;
use super::tests::{CleanUp, SIZE_BYTES, datastore, protected};
use crate::report::chain;
use crate::view::test_journal::TestJournal;

/// Where a record is damaged: where the recovery disk has data.
const PLACE: u64 = SIZE_BYTES / 4 + 65536;

/// Writes a record and seals its segment.
fn seal_after(journal: &mut TestJournal, offset_bytes: u64, data: Vec<u8>) -> u64 {
    journal.write(offset_bytes, data);
    journal.flush();
    journal.change(Change::Seal);
    journal.seq
}

/// Promotes a record that is damaged in its second 4 KiB; the record.
fn promote_damaged(journal: &mut TestJournal) -> u64 {
    let seq = seal_after(journal, PLACE, vec![0x5a; 16384]);
    TestJournal::flip_bit(&journal.path(), &[0x5a; 16384], 5000);
    journal.promote();
    seq
}

fn only_disk(journal: &TestJournal, seq: u64) -> DiskAt {
    let opened = Journal::open(&journal.path(), &SiteKeys::default()).expect("readable");
    DiskAt::of(&opened, seq, Some(0)).expect("in the history").remove(0)
}

/// What a copy of the disk gives.
fn copied(disk: DiskAt, journal: &TestJournal) -> anyhow::Result<Vec<u8>> {
    let image = Image::create(&journal.folder.join("promoted.img"), false)?;
    let mut signals = Signals::to_look_for()?;
    Copy::new(disk)?.run(&image, &mut Progress::new(SIZE_BYTES, true), &mut signals)?;
    Ok(std::fs::read(image.partial())?)
}

#[test]
fn a_copy_stops_at_a_record_that_is_promoted_damaged_meanwhile() {
    let (mut journal, _) = protected("promoted-damaged");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let seq = seal_after(&mut journal, PLACE, vec![0x5a; 16384]);
    let disk = only_disk(&journal, seq);
    TestJournal::flip_bit(&journal.path(), &[0x5a; 16384], 5000);
    journal.promote();
    assert_eq!(journal.writer.bad_ranges().len(), 1);
    let error = chain(copied(disk, &journal).expect_err("damaged").as_ref());
    assert!(error.contains(&format!("record {seq}")), "{error}");
}

#[test]
fn a_copy_goes_on_over_a_bad_range_that_is_promoted_over_meanwhile() {
    let (mut journal, _) = protected("promoted-over");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    promote_damaged(&mut journal);
    let seq = seal_after(&mut journal, PLACE + 4096, vec![0x5b; 4096]);
    let disk = only_disk(&journal, seq);
    journal.promote();
    assert!(journal.writer.bad_ranges().is_empty());
    assert!(copied(disk, &journal).expect("readable") == journal.model(seq));
}
