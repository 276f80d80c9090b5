//! Beside a VRA that opens the journal anew: what it moves is found again, and what is damaged is still told.

use journal::bad_ranges::BadRanges;
use journal::crypt::SiteKeys;
use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock, slot_offset_bytes};
use journal::writer::Change;

use super::contents::{Part, Visitor, last_of, visit};
use super::copy::Copy;
use super::damage::Damage;
use super::disk::DiskAt;
use super::image::Image;
use super::place::Journal;
use super::progress::Progress;
use super::signals::Signals;
use super::tests::{CleanUp, SIZE_BYTES, START_US, datastore, protected};
use super::verify;
use crate::report::chain;
use crate::view::test_journal::TestJournal;

const SLOT_BYTES: u64 = 1 << 20;

fn only_disk(journal: &TestJournal, seq: u64) -> DiskAt {
    let opened = Journal::open(&journal.path(), &SiteKeys::default()).expect("readable");
    DiskAt::of(&opened, seq, Some(0)).expect("in the history").remove(0)
}

/// Where the newest segment is, and the bytes there.
fn newest_slot(journal: &TestJournal) -> (u32, Vec<u8>) {
    let opened = Journal::open(&journal.path(), &SiteKeys::default()).expect("readable");
    let slot = opened.reader.survey.segments.last().expect("a segment").header.slot;
    let place = slot_offset_bytes(slot, SLOT_BYTES) as usize + PAGE_BYTES;
    (slot, std::fs::read(journal.path()).expect("journal")[place..][..64 << 10].to_vec())
}

/// Opens the journal anew, and writes until the slot of its newest segment has something else in it.
fn reopen_and_reuse(journal: &mut TestJournal) {
    let (slot, before) = newest_slot(journal);
    journal.reopen();
    for round in 0..64 {
        journal.random_changes(1000 + round, 30, 200);
        let place = slot_offset_bytes(slot, SLOT_BYTES) as usize + PAGE_BYTES;
        let now = std::fs::read(journal.path()).expect("journal")[place..][..64 << 10].to_vec();
        if now != before {
            return;
        }
    }
    panic!("slot {slot} was never used again");
}

/// What a copy of the disk gives.
fn copied(disk: DiskAt, journal: &TestJournal) -> anyhow::Result<Vec<u8>> {
    let image = Image::create(&journal.folder.join("moved.img"), false)?;
    let mut signals = Signals::to_look_for()?;
    Copy::new(disk)?.run(&image, &mut Progress::new(SIZE_BYTES, true), &mut signals)?;
    Ok(std::fs::read(image.partial())?)
}

#[test]
fn a_copy_goes_on_over_segments_that_were_moved() {
    let (mut journal, cuts) = protected("moved");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    // Something that is nowhere but in the newest segment.
    journal.change(Change::Seal);
    journal.write(0, vec![0x5a; 64 << 10]);
    let cut = journal.checkpoint("newest", START_US + 600_000_000);
    journal.flush();
    let (old, disk) = (only_disk(&journal, cuts[1]), only_disk(&journal, cut));
    let model = journal.model(cut);
    reopen_and_reuse(&mut journal);
    assert!(copied(disk, &journal).expect("readable") == model);
    assert!(copied(old, &journal).expect("readable") == journal.model(cuts[1]));

    // Twice more while a third reader goes on.
    let disk = only_disk(&journal, cut);
    reopen_and_reuse(&mut journal);
    reopen_and_reuse(&mut journal);
    assert!(copied(disk, &journal).expect("readable") == model);
}

/// A reader that comes between an opening's count in the superblock and the end of its copy still reads the old segment, and nothing in the
/// superblock changes any more when that one's slot is used again.
#[test]
fn a_copy_that_began_in_the_middle_of_an_opening_goes_on() {
    let (mut journal, _) = protected("moved-unsettled");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    journal.change(Change::Seal);
    journal.write(0, vec![0x5a; 64 << 10]);
    let cut = journal.checkpoint("newest", START_US + 600_000_000);
    journal.flush();
    let model = journal.model(cut);
    let mut opening = std::fs::read(journal.path()).expect("journal");
    reopen_and_reuse(&mut journal);
    let after = std::fs::read(journal.path()).expect("journal");
    for place in SUPERBLOCK_OFFSETS.map(|offset_bytes| offset_bytes as usize) {
        let mut superblock = Superblock::decode(&opening[place..]).expect("valid");
        superblock.open_count += 1;
        opening[place..place + PAGE_BYTES].copy_from_slice(&superblock.encode());
    }
    std::fs::write(journal.path(), &opening).expect("written");
    let disk = only_disk(&journal, cut);
    std::fs::write(journal.path(), &after).expect("written");
    let now = Journal::open(&journal.path(), &SiteKeys::default()).expect("readable");
    let counts = |bytes: &[u8]| Superblock::decode(bytes).expect("valid").open_count;
    assert_eq!(counts(&opening), now.reader.survey.superblock.open_count, "nothing in the superblock tells");
    assert!(copied(disk, &journal).expect("readable") == model);
}

#[test]
fn damage_is_told_though_the_journal_was_opened_anew() {
    let (mut journal, _) = protected("moved-damage");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    journal.write(0, vec![0x5a; 64 << 10]);
    let damaged_seq = journal.seq;
    let cut = journal.checkpoint("newest", START_US + 600_000_000);
    journal.flush();
    journal.change(Change::Seal);
    journal.write(SIZE_BYTES / 2, vec![0x5b; 4096]);
    journal.flush();
    let disk = only_disk(&journal, cut);
    journal.reopen();
    TestJournal::flip_bit(&journal.path(), &[0x5a; 16384], 5000);
    let error = chain(copied(disk, &journal).expect_err("damaged").as_ref());
    assert!(error.contains(&format!("record {damaged_seq}")) && error.contains("disk 0 of db"), "{error}");
    assert!(!journal.folder.join("moved.img.partial").exists());
}

#[test]
fn a_copy_ends_when_the_history_goes() {
    let (mut journal, cuts) = protected("moved-gone");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let disk = only_disk(&journal, cuts[1]);
    journal.change(Change::GiveUpHistory { sync_id: 12 });
    let error = chain(copied(disk, &journal).expect_err("gone").as_ref());
    assert!(error.contains("went away") && error.contains("choose a newer one"), "{error}");
}

/// Does something to a journal after the first segment was told.
struct Meanwhile<'a, F> {
    journal: &'a mut TestJournal,
    act: Option<F>,
    damage: Vec<Damage>,
    notes: Vec<String>,
    newest_seq: u64,
}

impl<F: FnOnce(&mut TestJournal)> Visitor for Meanwhile<'_, F> {
    const WANTS_BATCHES: bool = false;

    fn visit(&mut self, part: Part<'_>) -> anyhow::Result<()> {
        match part {
            Part::EndOfSegment { segment, walked } => {
                self.newest_seq = last_of(segment, walked).seq;
                if let Some(act) = self.act.take() {
                    act(self.journal);
                }
            }
            Part::Damage(damage) => self.damage.push(damage),
            Part::Note(note) => self.notes.push(note),
            _ => {}
        }
        Ok(())
    }
}

fn visited(journal: &mut TestJournal, act: impl FnOnce(&mut TestJournal)) -> (Vec<String>, u64) {
    let path = journal.path();
    let (damage, notes) = (Vec::new(), Vec::new());
    let mut meanwhile = Meanwhile { journal, act: Some(act), damage, notes, newest_seq: 0 };
    visit(&path, &SiteKeys::default(), &mut meanwhile).expect("readable");
    let Meanwhile { act, damage, notes, newest_seq, .. } = meanwhile;
    assert!(act.is_none() && damage.is_empty(), "{damage:?}");
    (notes, newest_seq)
}

#[test]
fn a_walk_over_a_file_follows_what_a_writer_moves_and_promotes() {
    let (mut journal, _) = protected("moved-walk");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    for round in 0..3 {
        journal.change(Change::Seal);
        journal.random_changes(50 + round, 30, 100);
    }
    let before = journal.seq;
    let (_, newest_seq) = visited(&mut journal, reopen_and_reuse);
    assert!(newest_seq >= before, "{newest_seq} of {before}");

    // All sealed segments are promoted, and their slots are used again.
    journal.checkpoint("promote up to here", START_US + 600_000_000);
    journal.flush();
    let before = journal.seq;
    let (notes, newest_seq) = visited(&mut journal, |journal| {
        let closed: Vec<_> = journal.writer.closed_segments().cloned().collect();
        let through = closed[closed.len() - 1].last;
        journal.change(Change::AnnouncePromotion { through });
        journal.change(Change::EndPromotion {
            through,
            size_bytes: vec![SIZE_BYTES],
            bad_ranges: BadRanges::default(),
        });
        for round in 0..20 {
            journal.random_changes(2000 + round, 30, 200);
        }
    });
    assert!(notes.iter().any(|note| note.contains("were promoted while this ran")), "{notes:?}");
    assert!(newest_seq >= before, "{newest_seq} of {before}");
}

/// While a writer goes on and opens its journal again and again, nothing is called damaged.
#[test]
fn verify_beside_a_writer_finds_no_damage() {
    let (mut journal, _) = protected("moved-verify");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let path = journal.path();
    let ended = std::sync::atomic::AtomicBool::new(false);
    let is_ended = || ended.load(std::sync::atomic::Ordering::Acquire);
    std::thread::scope(|scope| {
        let checker = scope.spawn(|| {
            loop {
                let report = verify::check(&path, &SiteKeys::default()).expect("readable");
                assert!(report.damage.is_empty(), "{report:?}");
                if is_ended() {
                    return;
                }
            }
        });
        for round in 0..40 {
            journal.random_changes(round, 20, 60);
            if round % 4 == 3 {
                journal.reopen();
            }
            if checker.is_finished() {
                break;
            }
        }
        ended.store(true, std::sync::atomic::Ordering::Release);
        checker.join().expect("no damage");
    });
}
