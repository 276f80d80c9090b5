//! A disk that can't give back single pages: the tool saves what can be saved.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use journal::crypt::{SiteKey, SiteKeys};
use journal::format::{
    BAD_LIST_OFFSETS, MANIFEST_OFFSETS, PAGE_BYTES, SUPERBLOCK_OFFSETS, slot_offset_bytes,
};
use journal::recovery::Content;
use journal::writer::Change;

use super::place::Journal;
use super::storage::break_disk;
use super::tests::{CleanUp, START_US, call, datastore, failure, protected, protected_by};
use super::verify;
use crate::view::test_journal::TestJournal;

const PAGE: u64 = PAGE_BYTES as u64;
const SLOT_BYTES: u64 = 1 << 20;

/// A journal with a sealed segment and an open one, with a checkpoint in each; their cuts.
fn journal_of_two_segments(name: &str) -> (TestJournal, [u64; 2]) {
    let (mut journal, cuts) = protected(name);
    journal.change(Change::Seal);
    journal.write(65536, vec![0x5a; 16384]);
    journal.flush();
    journal.write(2 << 20, vec![0x5b; 16384]);
    let cut = journal.checkpoint("newest", START_US + 600_000_000);
    journal.flush();
    (journal, [cuts[2], cut])
}

fn extracted(journal: &TestJournal, cut: u64) -> Vec<u8> {
    let (out, at) = (journal.folder.join("out.img"), cut.to_string());
    let (store, out_name) = (journal.folder.to_string_lossy(), out.to_string_lossy());
    call(&["extract", &store, "--at", &at, "--out", &out_name, "--quiet", "--force"]).expect("extracted");
    std::fs::read(out).expect("image")
}

#[test]
fn no_single_page_that_cannot_be_read_ends_the_recovery() {
    let (journal, [old_cut, _]) = journal_of_two_segments("broken-pages");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let opened = Journal::open(&journal.path(), &SiteKeys::default()).expect("whole");
    let segments = &opened.reader.survey.segments;
    let slot = |index: usize| slot_offset_bytes(segments[index].header.slot, SLOT_BYTES);
    let sealed = segments.len() - 2;
    let footer = slot(sealed) + segments[sealed].data_end_bytes();
    let named = [
        SUPERBLOCK_OFFSETS[0],
        SUPERBLOCK_OFFSETS[1],
        MANIFEST_OFFSETS[0],
        slot(sealed),
        slot(sealed) + PAGE,
        footer,
        slot(sealed) + SLOT_BYTES - PAGE,
        slot(sealed + 1),
        slot(sealed + 1) + PAGE,
        slot(sealed + 1) + SLOT_BYTES - PAGE,
    ];
    let len_bytes = std::fs::metadata(journal.path()).expect("journal").len();
    let sampled = (0..len_bytes).step_by(97 * PAGE_BYTES);
    for page in named.into_iter().chain(BAD_LIST_OFFSETS).chain(sampled) {
        break_disk(&[(page, PAGE)], &[]);
        let opened = Journal::open(&journal.path(), &SiteKeys::default());
        let opened = opened.unwrap_or_else(|error| panic!("page at {page}: {error:#}"));
        let report = verify::check(&journal.path(), &SiteKeys::default());
        let report = report.unwrap_or_else(|error| panic!("page at {page}: {error:#}"));
        if named.contains(&page) {
            assert!(!report.damage.is_empty(), "page at {page} is not missed");
        }
        let is_listed = opened.reader.catalogue().checkpoints().iter();
        let is_listed = is_listed.filter(|entry| entry.checkpoint.cut == old_cut).count();
        assert_eq!(is_listed, 1, "page at {page}: an older checkpoint is gone");
        // All but data and its checksums is there twice.
        let is_data = (slot(sealed) + PAGE..footer).contains(&page);
        if named.contains(&page) && !is_data {
            assert!(extracted(&journal, old_cut) == journal.model(old_cut), "page at {page}");
        }
    }
    break_disk(&[], &[]);
}

#[test]
fn without_both_superblocks_the_segments_tell() {
    let (journal, cuts) = journal_of_two_segments("broken-superblocks");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    break_disk(&SUPERBLOCK_OFFSETS.map(|place| (place, PAGE)), &[]);
    let opened = Journal::open(&journal.path(), &SiteKeys::default()).expect("rebuilt");
    assert!(opened.is_rebuilt);
    for cut in cuts {
        assert!(extracted(&journal, cut) == journal.model(cut), "at {cut}");
    }
    let report = verify::check(&journal.path(), &SiteKeys::default()).expect("readable");
    assert_eq!(report.damage.len(), 2, "{report:?}");

    // And a page of data: it is named, and only what is in it is lost.
    let needle = journal.model(cuts[1])[65536..65536 + 4096].to_vec();
    let bytes = std::fs::read(journal.path()).expect("journal");
    let place = bytes.windows(4096).position(|window| window == needle).expect("in the file") as u64;
    let [first, second] = SUPERBLOCK_OFFSETS.map(|place| (place, PAGE));
    break_disk(&[first, second, (place + 2 * PAGE, 1)], &[]);
    let report = verify::check(&journal.path(), &SiteKeys::default()).expect("readable");
    let page = place / PAGE * PAGE;
    assert!(report.damage.iter().any(|damage| damage.file_offset_bytes == page + 2 * PAGE), "{report:?}");
    assert!(extracted(&journal, cuts[0]) == journal.model(cuts[0]));

    // With the head of its batch nobody knows how new the recovery disks are.
    break_disk(&[first, second, (place, 1)], &[]);
    let (store, at) = (journal.folder.to_string_lossy().into_owned(), cuts[0].to_string());
    let refused =
        failure(&["extract", &store, "--at", &at, "--out", &format!("{store}/lost.img"), "--quiet"]);
    assert!(refused.contains("both superblocks are lost too"), "{refused}");
}

#[test]
fn a_footer_that_a_power_cut_took_is_written_again_by_the_next_opening() {
    for site_key in [None, Some(SiteKey::random().expect("random"))] {
        let name = if site_key.is_some() { "lost-footer-encrypted" } else { "lost-footer" };
        let (mut journal, cuts) = protected_by(site_key.as_ref(), name);
        let store = datastore(&journal).to_path_buf();
        let _clean_up = CleanUp(&store);
        let keys = SiteKeys::new(site_key.into_iter().collect());
        journal.change(Change::Seal);
        let opened = Journal::open(&journal.path(), &keys).expect("readable");
        let superblock = &opened.reader.survey.superblock;
        let lost = opened.reader.survey.segments.iter().filter_map(|segment| match &segment.content {
            Content::Sealed(trailer) => Some(
                slot_offset_bytes(segment.header.slot, superblock.slot_len_bytes) + trailer.data_end_bytes,
            ),
            Content::Scanned(_) => None,
        });
        let lost: Vec<u64> = lost.collect();
        assert!(!lost.is_empty(), "something is sealed");
        let file = OpenOptions::new().write(true).open(journal.path()).expect("journal");
        lost.iter().for_each(|place| file.write_all_at(&[0; PAGE as usize], *place).expect("written"));
        let damage =
            |journal: &TestJournal| verify::check(&journal.path(), &keys).expect("readable").damage.len();
        assert_eq!(damage(&journal), lost.len());
        journal.reopen();
        assert_eq!(damage(&journal), 0);
        let newest = *cuts.last().expect("some");
        let again = Journal::open(&journal.path(), &keys).expect("readable");
        assert!(again.reader.catalogue().checkpoints().iter().any(|entry| entry.checkpoint.cut == newest));
    }
}

#[test]
fn a_recovery_disk_that_cannot_be_read_stops_the_copy_with_a_remedy() {
    let (journal, [cut, _]) = journal_of_two_segments("broken-disk");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    break_disk(&[], &[(0, 1 << 40)]);
    let (store, at) = (store.to_string_lossy().into_owned(), cut.to_string());
    let out = journal.folder.join("out.img").to_string_lossy().into_owned();
    let text = failure(&["extract", &store, "--at", &at, "--out", &out, "--quiet"]);
    assert!(text.contains("EIO") && text.contains("--skip-damaged"), "{text}");
}
