use std::path::Path;

use journal::crypt::{SiteKey, SiteKeys};
use journal::format::{PAGE_BYTES, slot_offset_bytes};
use journal::writer::Change;
use serde_json::{Value, json};

use super::*;
use crate::view::test_journal::TestJournal;

pub(super) const SIZE_BYTES: u64 = 4 << 20;
/// 2026-11-22T17:30:00Z in microseconds.
pub(super) const START_US: u64 = 1_795_368_600_000_000;

/// A VM's journal in a datastore, with three checkpoints; the cuts.
pub(super) fn protected(name: &str) -> (TestJournal, Vec<u64>) {
    protected_by(None, name)
}

/// The same, encrypted if there is a site key.
pub(super) fn protected_by(site_key: Option<&SiteKey>, name: &str) -> (TestJournal, Vec<u64>) {
    let datastore = std::env::temp_dir().join(format!("holdfast-tool-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&datastore);
    let folder = datastore.join("shop-00000003").join("db-00000002");
    let mut journal = TestJournal::encrypted_by(site_key, folder, SIZE_BYTES, &manifest().to_string());
    let mut cuts = Vec::new();
    for (round, tag) in ["", "before upgrade", ""].into_iter().enumerate() {
        journal.random_changes(round as u64, 80, 200);
        cuts.push(journal.checkpoint(tag, START_US + round as u64 * 60_000_000));
        journal.flush();
    }
    (journal, cuts)
}

fn manifest() -> Value {
    let id = |number: u8| format!("00000000-0000-0000-0000-0000000000{number:02}");
    let end = json!({ "id": id(9), "address": "vra:9710" });
    json!({
        "version": 1,
        "written_by": "a test",
        "vm": id(2),
        "disks": ["disk-0.raw"],
        "disks_reserved": true,
        "vpg": {
            "id": id(3), "name": "shop", "revision": 1, "member_set_version": 1,
            "checkpoint_interval_ms": 5000, "hold_deadline_ms": 100,
            "vms": [{
                "id": id(2), "name": "db", "journal": id(1), "source": end, "target": end,
                "datastore": "/datastore", "journal_limit_bytes": 1 << 30, "history_s": 3600,
                "give_up_history": true,
                "volumes": [{
                    "id": id(5), "number": 0, "size_bytes": SIZE_BYTES, "logical_block_bytes": 512,
                    "source_path": "/dev/vg/db"
                }],
            }],
        },
    })
}

pub(super) fn datastore(journal: &TestJournal) -> &Path {
    journal.folder.ancestors().nth(2).expect("two folders down")
}

pub(super) struct CleanUp<'a>(pub(super) &'a Path);

impl Drop for CleanUp<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.0);
    }
}

pub(super) fn call(arguments: &[&str]) -> anyhow::Result<(String, ExitCode)> {
    let all = std::iter::once("vra-journal").chain(arguments.iter().copied());
    let args = Args::try_parse_from(all)?;
    let mut out = Vec::new();
    let code = run(&args, &mut out)?;
    Ok((String::from_utf8(out).expect("text"), code))
}

pub(super) fn answer(arguments: &[&str]) -> Value {
    let (text, _) = call(arguments).expect("it works");
    serde_json::from_str(&text).expect("JSON")
}

pub(super) fn failure(arguments: &[&str]) -> String {
    chain(call(arguments).expect_err("it fails").as_ref())
}

#[test]
fn the_command_line_is_consistent() {
    <Args as clap::CommandFactory>::command().debug_assert();
}

#[test]
fn a_datastore_is_listed_and_a_journal_described() {
    let (journal, cuts) = protected("list");
    let _clean_up = CleanUp(datastore(&journal));
    let store = datastore(&journal).to_string_lossy().into_owned();
    let list = answer(&["ls", &store, "--json"]);
    let vpg = &list["vpgs"][0];
    assert_eq!((&vpg["name"], &vpg["checkpoints"]), (&json!("shop"), &json!(3)));
    let vm = &vpg["vms"][0];
    assert_eq!((&vm["name"], &vm["checkpoints"], &vm["member"]), (&json!("db"), &json!(3), &json!(true)));
    assert_eq!(vm["disks"], json!([{ "number": 0, "size_bytes": SIZE_BYTES, "missing": false }]));
    assert_eq!(
        (&vm["oldest_time_us"], &vm["newest_time_us"]),
        (&json!(START_US), &json!(START_US + 120_000_000))
    );
    let facts = answer(&["inspect", &store, "--json"]);
    assert_eq!(facts["state"], "consistent");
    assert_eq!(facts["newest_seq"], journal.seq);
    assert_eq!(facts["disks"][0]["size_bytes"], SIZE_BYTES);
    assert_eq!(facts["damage"], Value::Null);
    let checkpoints = answer(&["checkpoints", &journal.path().to_string_lossy(), "--json"]);
    let found: Vec<_> =
        checkpoints["checkpoints"].as_array().expect("list").iter().map(|at| &at["cut"]).collect();
    assert_eq!(found, cuts.iter().map(|cut| json!(cut)).collect::<Vec<_>>().iter().collect::<Vec<_>>());
    std::fs::create_dir(datastore(&journal).join("broken")).expect("folder");
    std::fs::write(datastore(&journal).join("broken/journal.hfj"), "no journal").expect("file");
    let list = answer(&["ls", &store, "--json"]);
    assert!(
        list["unreadable"][0]["folder"].as_str().is_some_and(|folder| folder.ends_with("broken")),
        "{list}"
    );
    let (text, _) = call(&["ls", &store]).expect("it works");
    for part in ["VPG shop", "VM db", "disk 0 of 4.0 MiB", "3 checkpoints: ", "cannot be opened: "] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    std::fs::remove_dir_all(datastore(&journal).join("broken")).expect("removed");
    for command in ["ls", "inspect", "checkpoints"] {
        let (text, _) = call(&[command, &store]).expect("it works");
        assert!(!text.is_empty());
    }
}

#[test]
fn a_disk_is_extracted_at_each_kind_of_moment() {
    let (journal, cuts) = protected("extract");
    let _clean_up = CleanUp(datastore(&journal));
    let store = datastore(&journal).to_string_lossy().into_owned();
    let out = journal.folder.join("out.img");
    let out_name = out.to_string_lossy().into_owned();
    let middle = cuts[0] + 7;
    for (at, seq) in [
        ("latest".to_owned(), cuts[2]),
        ("before upgrade".to_owned(), cuts[1]),
        (middle.to_string(), middle),
        ("2026-11-22T17:30:59Z".to_owned(), cuts[0]),
        (format!("{:032x}-{}", 77, cuts[1]), cuts[1]),
    ] {
        let arguments = ["extract", &store, "--at", &at, "--out", &out_name, "--force", "--quiet"];
        let (text, _) = call(&arguments).expect("extracted");
        assert!(text.contains("disk 0 of db"), "{text}");
        assert!(std::fs::read(&out).expect("image") == journal.model(seq), "wrong bytes at {at}");
    }
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&out).expect("image"));
    assert!(blocks * 512 < SIZE_BYTES, "the image is not sparse");
    assert!(!journal.folder.join("out.img.partial").exists());
}

#[test]
fn what_cannot_be_extracted_is_named_with_a_remedy() {
    let (mut journal, cuts) = protected("failures");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let store = store.to_string_lossy().into_owned();
    let out = journal.folder.join("out.img").to_string_lossy().into_owned();
    let extract = |at: &str| failure(&["extract", &store, "--at", at, "--out", &out, "--quiet"]);
    let text = extract("before upgrad");
    assert!(text.contains("before upgrade") && text.contains("nearest"), "{text}");
    let text = extract("2020-01-01T00:00:00Z");
    assert!(text.contains("the oldest is") && text.contains(&cuts[0].to_string()), "{text}");
    let text = extract("0000000000000000000000000000004d-999999");
    assert!(text.contains("no checkpoint 0000000000000000000000000000004d-999999"), "{text}");
    let text = failure(&["extract", &store, "--at", "latest", "--vm", "nobody", "--out", &out]);
    assert!(text.contains("there are: db"), "{text}");
    let text = extract("999999");
    assert!(text.contains("999999") && text.contains(&cuts[2].to_string()), "{text}");
    let text = failure(&["extract", &store, "--at", "latest", "--disk", "3", "--out", &out]);
    assert!(text.contains("numbered from 0"), "{text}");
    std::fs::write(&out, "precious").expect("file");
    let text = extract("latest");
    assert!(text.contains("--force"), "{text}");
    assert_eq!(std::fs::read(&out).expect("file"), b"precious");
    // Not even by force: there may be nothing else that knows.
    for name in ["journal.hfj", "disk-0.raw", "disk-7.raw", "lock-1-0.raw"] {
        let own = journal.path().with_file_name(name).to_string_lossy().into_owned();
        let text = failure(&["extract", &store, "--at", "latest", "--out", &own, "--quiet", "--force"]);
        assert!(text.contains("another folder"), "{text}");
    }
    let text = failure(&["inspect", "/nonexistent/datastore"]);
    assert!(text.contains("/nonexistent/datastore"), "{text}");
    for command in ["inspect", "verify"] {
        let text = failure(&[command, &out]);
        assert!(text.contains("not a journal"), "{text}");
    }
    journal.change(Change::GiveUpHistory { sync_id: 12 });
    let text = extract("latest");
    assert!(text.contains("no checkpoint"), "{text}");
}

#[test]
fn damage_before_the_newest_records_is_told_to_whoever_asks_for_the_latest() {
    let (mut journal, cuts) = protected("cut-short");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let path = journal.path();
    journal.write(65536, vec![0x22; 16384]);
    journal.flush();
    let damaged_seq = journal.seq;
    let intact = std::fs::read(&path).expect("journal");
    assert_eq!(place::Journal::open(&path, &SiteKeys::default()).expect("whole").cut_short, None);

    // Nothing was written after it: a batch like that may have been torn by a power cut.
    TestJournal::flip_bit(&path, &[0x22; 16384], 17);
    assert_eq!(place::Journal::open(&path, &SiteKeys::default()).expect("torn").cut_short, None);

    std::fs::write(&path, &intact).expect("journal");
    journal.write(0, vec![0x33; 4096]);
    journal.checkpoint("after it", START_US + 600_000_000);
    journal.flush();
    let later = std::fs::read(&path).expect("journal");
    TestJournal::flip_bit(&path, &[0x22; 16384], 17);
    let damaged = place::Journal::open(&path, &SiteKeys::default()).expect("damaged");
    let why = damaged.cut_short.expect("told");
    assert!(why.contains(&format!("records {damaged_seq} to {damaged_seq} cannot be read")), "{why}");
    let store = store.to_string_lossy().into_owned();
    let facts = answer(&["inspect", &store, "--json"]);
    assert!(facts["damage"].as_str().is_some_and(|text| text.contains(&why)), "{facts}");

    // Nothing says any more that a batch was there.
    let mut headless = std::fs::read(&path).expect("journal");
    let payload =
        headless.windows(16300).position(|window| window == &[0x22; 16384][..16300]).expect("payload");
    let head = headless[..payload].windows(8).rposition(|window| window == b"HFBATCH\0").expect("its batch");
    headless[head..head + 512].fill(0);
    std::fs::write(&path, &headless).expect("journal");
    let why = place::Journal::open(&path, &SiteKeys::default()).expect("damaged").cut_short.expect("told");
    assert!(why.contains(&format!("records {damaged_seq} to {damaged_seq} cannot be read")), "{why}");
    let out = journal.folder.join("out.img").to_string_lossy().into_owned();
    let (text, _) =
        call(&["extract", &store, "--at", "latest", "--out", &out, "--quiet"]).expect("an older one");
    assert!(text.contains(&cuts[2].to_string()), "{text}");

    // The newest segment's first batch: nothing of the segment can be read.
    std::fs::write(&path, &later).expect("journal");
    let newest = place::Journal::open(&path, &SiteKeys::default())
        .expect("whole")
        .reader
        .survey
        .segments
        .pop()
        .expect("a segment");
    assert!(newest.data_end_bytes() > 16384, "it has more than one batch");
    let mut beheaded = later;
    beheaded[slot_offset_bytes(newest.header.slot, 1 << 20) as usize + PAGE_BYTES + 100] ^= 1;
    std::fs::write(&path, &beheaded).expect("journal");
    let why = place::Journal::open(&path, &SiteKeys::default()).expect("damaged").cut_short.expect("told");
    assert!(why.starts_with("records ") && why.ends_with("cannot be read"), "{why}");
    let (text, _) = call(&["verify", &store]).expect("checked");
    assert!(text.contains("damaged"), "{text}");
}

#[test]
fn records_of_a_segment_whose_beginning_is_gone_are_told_of() {
    let (mut journal, _) = protected("no-beginning");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let path = journal.path();
    journal.write(0, vec![0x66; 4096]);
    journal.flush();
    // The segment is copied, and goes on.
    journal.reopen();
    journal.write(4096, vec![0x77; 4096]);
    journal.flush();
    let intact = std::fs::read(&path).expect("journal");
    let newest = place::Journal::open(&path, &SiteKeys::default())
        .expect("whole")
        .reader
        .survey
        .segments
        .pop()
        .expect("a segment");
    assert!(newest.header.carried_end_bytes > PAGE_BYTES as u64, "a part of it was copied");
    let begin = slot_offset_bytes(newest.header.slot, 1 << 20) as usize;
    for damaged in [begin + 20, begin + PAGE_BYTES + 100] {
        let mut bytes = intact.clone();
        bytes[damaged] ^= 1;
        std::fs::write(&path, &bytes).expect("journal");
        let why = place::Journal::open(&path, &SiteKeys::default()).expect("damaged").cut_short;
        assert!(why.is_some(), "byte {damaged} of the file, segment at {begin}");
    }
}

#[test]
fn a_journal_without_superblocks_is_read_by_its_segments() {
    let (mut journal, cuts) = protected("rebuilt");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    journal.random_changes(9, 60, 16);
    let last = journal.checkpoint("last", START_US + 900_000_000);
    journal.flush();
    let path = journal.path();
    let mut bytes = std::fs::read(&path).expect("journal");
    for offset_bytes in journal::format::SUPERBLOCK_OFFSETS {
        bytes[offset_bytes as usize..offset_bytes as usize + PAGE_BYTES].fill(0x5a);
    }
    std::fs::write(&path, &bytes).expect("journal");
    let opened = place::Journal::open(&path, &SiteKeys::default()).expect("rebuilt");
    assert!(opened.is_rebuilt);
    let cuts: Vec<u64> = cuts.into_iter().chain([last]).collect();
    let listed = opened.reader.catalogue().checkpoints().iter().map(|entry| entry.checkpoint.cut);
    assert_eq!(listed.collect::<Vec<_>>(), cuts);
    let out = journal.folder.join("out.img").to_string_lossy().into_owned();
    for cut in cuts {
        let at = cut.to_string();
        call(&["extract", &store.to_string_lossy(), "--at", &at, "--out", &out, "--force", "--quiet"])
            .expect("extracted");
        assert!(std::fs::read(&out).expect("image") == journal.model(cut), "wrong bytes at {cut}");
    }
    let (text, _) = call(&["verify", &store.to_string_lossy()]).expect("checked");
    assert!(text.contains("superblock: no superblock is here") && text.contains("2 damaged"), "{text}");
}

#[test]
fn a_slot_that_an_opening_passed_over_is_no_damage() {
    let (mut journal, _) = protected("passed-over");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let path = journal.path();
    journal.write(0, vec![0x44; 4096]);
    journal.flush();
    journal.write(8192, vec![0x55; 4096]);
    journal.flush();
    // A power cut tore the batch before the last one; then the journal was opened again.
    TestJournal::flip_bit(&path, &[0x44; 4096], 17);
    let path_name = path.to_string_lossy().into_owned();
    let (text, _) = call(&["verify", &path_name]).expect("checked");
    assert!(text.contains("damaged"), "{text}");
    journal.reopen();
    let (text, _) = call(&["verify", &path_name]).expect("checked");
    assert!(text.contains("all whole"), "{text}");
}

#[test]
fn what_is_no_journal_of_this_release_is_refused() {
    let (journal, _) = protected("foreign");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    let path = journal.path();
    let (store, intact) = (store.to_string_lossy().into_owned(), std::fs::read(&path).expect("journal"));
    let disk = journal.folder.join("disk-0.raw");
    let out = journal.folder.join("out.img").to_string_lossy().into_owned();
    let extract = ["extract", &store, "--at", "latest", "--out", &out, "--quiet"];

    let mut newer = intact.clone();
    for copy in [0, 64 << 10] {
        newer[copy + 8] = 2;
        let crc = journal::format::page_crc(&newer[copy..copy + 4096], 12);
        newer[copy + 12..copy + 16].copy_from_slice(&crc.to_le_bytes());
    }
    std::fs::write(&path, &newer).expect("journal");
    let text = failure(&extract);
    assert!(text.contains("format version 2 is not known") && text.contains("newer release"), "{text}");

    let mut damaged = intact.clone();
    for copy in [0, 64 << 10] {
        damaged[copy + 100] ^= 1;
    }
    std::fs::write(&path, &damaged).expect("journal");
    call(&extract).expect("the segments tell what is there");
    damaged.truncate(1 << 20);
    std::fs::write(&path, &damaged).expect("journal");
    let text = failure(&extract);
    assert!(text.contains("both superblocks are damaged"), "{text}");

    // A recovery disk that was cut would read as zeroes where it ends.
    std::fs::write(&path, &intact).expect("journal");
    let extract = [&extract[..], &["--force"]].concat();
    std::fs::File::options().write(true).open(&disk).and_then(|disk| disk.set_len(1 << 20)).expect("cut");
    let text = failure(&extract);
    assert!(text.contains("disk-0.raw has 1048576 bytes, its volume has 4194304"), "{text}");
    for gib in ["0", "18446744073709551615"] {
        let serve =
            ["serve", &store, "--at", "latest", "--socket", "/s", "--scratch", "/x", "--scratch-gib", gib];
        assert!(failure(&serve).contains("not in 1..=1048576"), "{gib}");
    }
}

#[test]
fn the_newest_batch_may_be_torn_anywhere() {
    let (mut journal, _) = protected("torn");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    journal.write(65536, vec![0x22; 16384]);
    journal.flush();
    let path = journal.path();
    TestJournal::flip_bit(&path, &[0x22; 16384], 2 * 4096 + 17);
    let found = verify::check(&path, &SiteKeys::default()).expect("readable");
    assert!(found.damage.is_empty(), "{found:?}");
    assert!(found.notes.iter().any(|note| note.contains("unit 2")), "{found:?}");
}

#[test]
fn verify_finds_every_flipped_bit_and_names_it() {
    let (mut journal, _) = protected("verify");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    journal.write(0, vec![0x11; 16384]);
    journal.write(65536, vec![0x22; 16384]);
    let damaged_seq = journal.seq;
    journal.write(SIZE_BYTES / 2, vec![0x33; 16384]);
    journal.flush();
    let path = journal.path();
    let path_name = path.to_string_lossy().into_owned();
    let whole = verify::check(&path, &SiteKeys::default()).expect("readable");
    assert!(whole.damage.is_empty(), "{whole:?}");
    journal.change(Change::Seal);
    let whole = verify::check(&path, &SiteKeys::default()).expect("readable");
    assert!(whole.damage.is_empty(), "{whole:?}");
    let intact = std::fs::read(&path).expect("journal");

    // A payload, in its third unit.
    TestJournal::flip_bit(&path, &[0x22; 16384], 2 * 4096 + 17);
    let damage = verify::check(&path, &SiteKeys::default()).expect("readable").damage;
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert_eq!(damage[0].seq, Some(damaged_seq));
    assert!(damage[0].what.contains(&format!("disk 0 at {}", 65536 + 8192)), "{damage:?}");
    let (text, code) = call(&["verify", &path_name]).expect("it works");
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(EXIT_DAMAGED)));
    assert!(text.contains(&format!("record {damaged_seq}")), "{text}");

    // A batch's head: the records in it are gone, those after it are found again.
    std::fs::write(&path, &intact).expect("journal");
    let payload = intact.windows(16384).position(|window| window == [0x22; 16384]).expect("payload");
    let head = intact[..payload].windows(8).rposition(|window| window == b"HFBATCH\0").expect("its batch");
    let mut bytes = intact.clone();
    bytes[head + 40] ^= 1;
    std::fs::write(&path, &bytes).expect("journal");
    let damage = verify::check(&path, &SiteKeys::default()).expect("readable").damage;
    assert!(damage.iter().any(|damage| damage.seq.is_some_and(|seq| seq <= damaged_seq)), "{damage:?}");

    // Superblock, manifest, and the segment's last page.
    for (place, name) in [(100, "superblock"), ((128 << 10) + 70, "manifest")] {
        let mut bytes = intact.clone();
        bytes[place] ^= 1;
        std::fs::write(&path, &bytes).expect("journal");
        let damage = verify::check(&path, &SiteKeys::default()).expect("readable").damage;
        assert!(damage.iter().any(|damage| damage.what.starts_with(name)), "{name}: {damage:?}");
    }

    std::fs::write(&path, &intact).expect("journal");
    std::fs::remove_file(journal.folder.join("disk-0.raw")).expect("disk");
    let damage = verify::check(&path, &SiteKeys::default()).expect("readable").damage;
    assert!(damage[0].what.contains("disk-0.raw"), "{damage:?}");
}

#[test]
fn a_grown_disk_is_extracted_though_its_recovery_disk_has_not_grown() {
    let (mut journal, cuts) = protected("grown");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    journal.resize(SIZE_BYTES + (3 << 20) + 4096);
    journal.write(SIZE_BYTES + (2 << 20), vec![0x3c; 8192]);
    let cut = journal.checkpoint("grown", START_US + 600_000_000);
    journal.flush();
    let out = journal.folder.join("out.img").to_string_lossy().into_owned();
    for cut in [cuts[2], cut] {
        let at = cut.to_string();
        call(&["extract", &store.to_string_lossy(), "--at", &at, "--out", &out, "--force", "--quiet"])
            .expect("extracted");
        assert!(std::fs::read(&out).expect("image") == journal.model(cut), "wrong bytes at {cut}");
    }
}
