//! Damage that promotion left on the recovery disks (C5), also while somebody reads.

use std::process::ExitCode;

use journal::crypt::SiteKeys;
use journal::format::{BAD_LIST_OFFSETS, SUPERBLOCK_OFFSETS};
use journal::writer::Change;
use serde_json::{Value, json};

use super::EXIT_DAMAGED;
use super::copy::Copy;
use super::disk::DiskAt;
use super::image::Image;
use super::place::Journal;
use super::progress::Progress;
use super::signals::Signals;
use super::storage::break_disk;
use super::tests::{CleanUp, SIZE_BYTES, START_US, answer, call, datastore, failure, protected};
use super::verify;
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

/// A journal with a bad range, and a checkpoint; the record that was damaged, and the checkpoint's cut.
fn with_bad_range(name: &str) -> (TestJournal, u64, u64) {
    let (mut journal, _) = protected(name);
    let seq = promote_damaged(&mut journal);
    journal.write(0, vec![0x5c; 4096]);
    let cut = journal.checkpoint("after it", START_US + 600_000_000);
    journal.flush();
    (journal, seq, cut)
}

fn is_damaged(code: ExitCode) -> bool {
    format!("{code:?}") == format!("{:?}", ExitCode::from(EXIT_DAMAGED))
}

fn dumped(store: &str) -> Vec<Value> {
    let (text, code) = call(&["dump", store]).expect("dumped");
    assert!(is_damaged(code), "{text}");
    text.lines().map(|line| serde_json::from_str(line).expect("one object a line")).collect()
}

#[test]
fn what_is_lost_on_a_recovery_disk_is_named_by_all_commands() {
    let (mut journal, seq, _) = with_bad_range("bad-named");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let store = store.to_string_lossy().into_owned();
    let report = verify::check(&journal.path(), &SiteKeys::default()).expect("readable");
    assert_eq!(report.damage.len(), 1, "{report:?}");
    let slot = journal.writer.superblock().bad_list.expect("a list").slot as usize;
    let damage = serde_json::to_value(&report.damage[0]).expect("JSON");
    for (key, expected) in [
        ("seq", seq),
        ("volume", 0),
        ("offset_bytes", PLACE + 4096),
        ("len_bytes", 4096),
        ("file_offset_bytes", BAD_LIST_OFFSETS[slot]),
    ] {
        assert_eq!(damage[key], expected, "{key} of {damage}");
    }
    let (text, code) = call(&["verify", &store]).expect("checked");
    assert!(is_damaged(code) && text.contains("an older checkpoint does not help"), "{text}");
    assert!(!text.contains("are whole. Later ones"), "no view before the record has it: {text}");

    let lines = dumped(&store);
    let lists: Vec<&Value> = lines.iter().filter(|line| line["type"] == "bad_list").collect();
    let counting = lists.iter().find(|list| list["counts"] == true).expect("one counts");
    let range = json!({ "volume": 0, "offset_bytes": PLACE + 4096, "len_bytes": 4096, "seq": seq });
    assert_eq!((&counting["slot"], &counting["ranges"]), (&json!(slot), &json!([range])));
    let damage = lines.iter().find(|line| line["type"] == "damage").expect("told");
    assert_eq!((&damage["volume"], &damage["offset_bytes"]), (&json!(0), &json!(PLACE + 4096)));
    let superblock = lines.iter().find(|line| line["type"] == "superblock").expect("told");
    assert_eq!(superblock["bad_list_slot"], slot);

    let facts = answer(&["inspect", &store, "--json"]);
    assert!(facts["damage"].as_str().is_some_and(|text| text.contains("are lost")), "{facts}");
    let (text, _) = call(&["ls", &store]).expect("listed");
    assert!(text.contains("warning: 4.0 KiB in 1 places of the recovery disks are lost"), "{text}");
    let out = journal.folder.join("out.img").to_string_lossy().into_owned();
    let extract = ["extract", &store, "--at", "latest", "--out", &out, "--quiet"];
    let text = failure(&extract);
    assert!(
        text.contains(&format!("record {seq}")) && text.contains("an older checkpoint does not help"),
        "{text}"
    );
    assert!(text.contains("--skip-damaged"), "{text}");

    // Written over and promoted: nothing is lost any more, and the other slot has the list that counts.
    let at = seal_after(&mut journal, PLACE, vec![0x5d; 16384]).to_string();
    call(&["extract", &store, "--at", &at, "--out", &out, "--quiet"]).expect("an overwrite is enough");
    journal.promote();
    assert!(verify::check(&journal.path(), &SiteKeys::default()).expect("readable").damage.is_empty());
}

#[test]
fn without_the_list_of_what_is_lost_only_extraction_wants_to_be_told() {
    let (journal, seq, cut) = with_bad_range("bad-lost");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let store = store.to_string_lossy().into_owned();
    let slot = journal.writer.superblock().bad_list.expect("a list").slot as usize;
    let intact = std::fs::read(journal.path()).expect("journal");
    let out = journal.folder.join("out.img").to_string_lossy().into_owned();
    let extract = ["extract", &store, "--at", "latest", "--out", &out, "--quiet", "--force"];
    for how in ["damaged", "unreadable", "unreadable, as the superblocks"] {
        let mut bytes = intact.clone();
        match how {
            "damaged" => bytes[BAD_LIST_OFFSETS[slot] as usize + 70] ^= 1,
            "unreadable" => break_disk(&[(BAD_LIST_OFFSETS[slot], 1)], &[]),
            _ => {
                for place in SUPERBLOCK_OFFSETS {
                    bytes[place as usize + 100] ^= 1;
                }
            }
        }
        std::fs::write(journal.path(), &bytes).expect("written");
        let report = verify::check(&journal.path(), &SiteKeys::default()).expect("readable");
        let is_told = |what: &str| what.contains("not known which parts of the recovery disks are lost");
        assert!(report.damage.iter().any(|damage| is_told(&damage.what)), "{how}: {report:?}");
        assert!(dumped(&store).iter().any(|line| line["what"].as_str().is_some_and(is_told)), "{how}");
        let facts = answer(&["inspect", &store, "--json"]);
        let told = facts["damage"].as_str().is_some_and(|text| text.contains("IT IS NOT KNOWN"));
        assert!(told, "{how}: {facts}");
        let listed = answer(&["checkpoints", &store, "--json"]);
        assert_eq!(listed["checkpoints"].as_array().map(Vec::len), Some(1), "{how}");
        let text = failure(&extract);
        assert!(text.contains("--without-bad-list"), "{how}: {text}");
        let text = failure(&["serve", &store, "--at", "latest", "--socket", "/nowhere/socket"]);
        assert!(text.contains("--without-bad-list"), "{how}: {text}");
        let accepted = [&extract[..], &["--without-bad-list"]].concat();
        if how == "unreadable, as the superblocks" {
            // Nothing tells that the last promotion has ended, so the damaged record is read from the journal.
            let text = failure(&accepted);
            assert!(text.contains(&format!("record {seq}")), "{text}");
            break;
        }
        call(&accepted).expect("it was accepted");
        // It has the wrong bytes that the list would have told of, and nothing else is wrong.
        let (found, model) = (std::fs::read(&out).expect("image"), journal.model(cut));
        let wrong: Vec<usize> = (0..found.len()).filter(|at| found[*at] != model[*at]).collect();
        assert_eq!(wrong, [PLACE as usize + 5000], "{how}");
    }
}

#[test]
fn extraction_goes_on_over_damage_if_it_is_told_to() {
    let (mut journal, lost_seq, _) = with_bad_range("skip");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let store = store.to_string_lossy().into_owned();
    // Payloads begin at any sector, and so do the units that are checked.
    journal.write(2 << 20 | 512, vec![0x6a; 3 * 4096]);
    let damaged_seq = journal.seq;
    let cut = journal.checkpoint("damaged", START_US + 700_000_000);
    journal.flush();
    journal.change(Change::Seal);
    TestJournal::flip_bit(&journal.path(), &[0x6a; 3 * 4096], 4096 + 17);
    // A recovery disk with a page that can't be read.
    let unreadable = SIZE_BYTES / 4 - 4096;
    break_disk(&[], &[(unreadable, 4096)]);

    let out = journal.folder.join("out.img");
    let list = journal.folder.join("out.img.damaged.json");
    let out_name = out.to_string_lossy().into_owned();
    let extract = ["extract", &store, "--at", "damaged", "--out", &out_name, "--quiet"];
    assert!(failure(&extract).contains("--skip-damaged"));
    assert!(!out.exists() && !list.exists());
    let (text, code) = call(&[&extract[..], &["--skip-damaged"]].concat()).expect("extracted");
    assert!(is_damaged(code), "{text}");
    let damage: Value = serde_json::from_slice(&std::fs::read(&list).expect("a list")).expect("JSON");
    assert_eq!((&damage["vm"], &damage["disk"]), (&json!("db"), &json!(0)));
    let ranges = damage["ranges"].as_array().expect("a list");
    let told: Vec<(u64, u64, Option<u64>)> = ranges
        .iter()
        .map(|range| {
            let number = |key: &str| range[key].as_u64().expect("a number");
            (number("offset_bytes"), number("len_bytes"), range["seq"].as_u64())
        })
        .collect();
    let expected = [
        (unreadable, 4096, None),
        (PLACE + 4096, 4096, Some(lost_seq)),
        ((2 << 20) + 512 + 4096, 4096, Some(damaged_seq)),
    ];
    assert_eq!(told, expected);
    assert!(ranges[1]["what"].as_str().is_some_and(|what| what.contains("before it was promoted")));
    let mut model = journal.model(cut);
    for (offset_bytes, len_bytes, _) in expected {
        model[offset_bytes as usize..][..len_bytes as usize].fill(0);
    }
    assert!(std::fs::read(&out).expect("image") == model);

    // Nothing is replaced without --force, and the list of an image that is whole now goes.
    std::fs::remove_file(&out).expect("removed");
    assert!(failure(&[&extract[..], &["--skip-damaged"]].concat()).contains("out.img.damaged.json exists"));
    break_disk(&[], &[]);
    journal.write(PLACE, vec![0x6b; 16384]);
    journal.write(2 << 20, vec![0x6c; 16384]);
    let cut = journal.checkpoint("whole", START_US + 800_000_000);
    journal.flush();
    let again =
        ["extract", &store, "--at", "whole", "--out", &out_name, "--quiet", "--force", "--skip-damaged"];
    let (_, code) = call(&again).expect("extracted");
    assert!(!is_damaged(code));
    assert!(std::fs::read(&out).expect("image") == journal.model(cut));
    assert!(!list.exists());
    let text = failure(&[&again[..], &["--format", "qcow2"]].concat());
    assert!(text.contains("qemu-img convert"), "{text}");
}
