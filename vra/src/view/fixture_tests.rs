//! Scratch files of format version 1 as they were written when it was new, in `journal/tests/fixtures/v1/locked`: a view's own, and the overlay of
//! a locked checkpoint. What `vra-journal` makes of the folder is in `vra/tests/fixtures.rs`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use journal::crypt::{Encryption, Keyring, SiteKeys};
use journal::storage::ring::{Access, DirectFile};
use journal::writer::Change;
use ublk::serve::Op;
use uuid::Uuid;

use super::test_guest::Guest;
use super::test_journal::TestJournal;
use super::tests::view_source;
use super::*;
use crate::api::CheckpointId;
use crate::api::TimeUs;
use crate::receive::{LockedCheckpoint, Manifest, VmFolder};

const SIZE_BYTES: u64 = 256 << 10;
const FILES: [&str; 4] =
    ["journal.hfj", "disk-0.raw", "lock-8-0.raw", "scratch-00000000-0000-0000-0000-000000000007-0.raw"];

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../journal/tests/fixtures/v1/locked")
}

fn gzip(arguments: &[&str], from: &Path, to: &Path) {
    let mut gzip = Command::new("gzip");
    gzip.args(arguments)
        .stdin(File::open(from).expect("the file"))
        .stdout(Stdio::from(File::create(to).expect("a file")));
    assert!(gzip.status().expect("gzip").success(), "{}", from.display());
}

/// What is expected: name and CRC32C of each disk.
fn expected(name: &str) -> u32 {
    let lines = std::fs::read_to_string(fixture().join("expected.tsv")).expect("what is expected");
    let crc = lines.lines().find_map(|line| line.split_once('\t').filter(|(what, _)| *what == name));
    u32::from_str_radix(crc.expect("it is in the list").1, 16).expect("a CRC")
}

fn keys(keyring: &Keyring) -> ScratchKeys<'_> {
    ScratchKeys { keyring, encryption: Encryption::Never }
}

fn owner(view: u128, seq: u64) -> ScratchOwner {
    ScratchOwner {
        vra: Uuid::from_u128(9),
        view: Uuid::from_u128(view),
        vm: Uuid::from_u128(2),
        journal: Uuid::from_u128(1),
        volume: Uuid::from_u128(5),
        number: 0,
        seq,
        disk_bytes: SIZE_BYTES,
        logical_block_bytes: 512,
    }
}

fn manifest() -> Manifest {
    let id = |number: u8| format!("00000000-0000-0000-0000-0000000000{number:02}");
    let end = serde_json::json!({ "id": id(9), "address": "vra:9710" });
    let text = serde_json::json!({
        "version": 1, "written_by": "a test", "vm": id(2), "disks": ["disk-0.raw"], "disks_reserved": true,
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
    });
    Manifest::parse(&text.to_string()).expect("a manifest")
}

/// Records that overlap those of other rounds.
fn write_some(journal: &mut TestJournal, round: u64) {
    for number in 0..5 {
        let offset_bytes = (number * 40 + round * 8) << 10;
        journal.write(offset_bytes, vec![0x10 * round as u8 + number as u8; 12 << 10]);
    }
    journal.flush();
}

fn disk(journal: &TestJournal, seq: u64, scratch: ScratchFile) -> Arc<ViewDisk> {
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: false };
    let source = view_source(journal, seq, Freshness::Superblock);
    ViewDisk::new(source, settings, Some(scratch)).expect("a view")
}

#[test]
#[ignore = "writes journal/tests/fixtures/v1/locked if it is missing"]
fn make_the_fixture() {
    if fixture().exists() {
        // It is as an older release wrote it.
        return;
    }
    let mut manifest = manifest();
    let mut journal = TestJournal::new("locked-fixture", SIZE_BYTES, &manifest.to_text());
    let folder = VmFolder::at(journal.folder.clone());
    write_some(&mut journal, 1);
    journal.write(0, vec![0x77; 4096]);
    let cut = journal.checkpoint("kept", 1_000_000);
    journal.change(Change::Seal);
    journal.flush();
    manifest.locked.push(LockedCheckpoint {
        checkpoint: CheckpointId { nonce: 77, counter: cut },
        cut,
        time_us: TimeUs(1_000_000),
        member_set_version: 1,
        kind: Default::default(),
        tag: Some("kept".into()),
    });
    journal.change(Change::SetManifest(manifest.to_text()));
    let keyring = journal.writer.keyring().clone();
    let overlay =
        ScratchFile::make_overlay(&folder.overlay(cut, 0), &owner(0, cut), &keys(&keyring), SIZE_BYTES);
    let kept = disk(&journal, cut, overlay.expect("an overlay"));
    write_some(&mut journal, 2);
    journal.change(Change::Seal);
    let open = |path: PathBuf| DirectFile::open(&path, Access::ReadOnly).expect("open");
    let mut below =
        Below::new(open(journal.path()), &open(journal.folder.join("disk-0.raw"))).expect("io_uring");
    kept.preserve(journal.seq, &journal.changed(cut), &mut below).expect("kept");
    journal.promote();
    drop(kept);
    write_some(&mut journal, 3);
    let newest = journal.checkpoint("newest", 2_000_000);
    journal.flush();

    let path = folder.scratch(crate::api::ViewId(Uuid::from_u128(7)), 0);
    let live = journal.folder.join("live.map");
    let scratch = ScratchFile::make(&path, &live, &owner(7, newest), &keys(&keyring), SIZE_BYTES);
    let view = disk(&journal, newest, scratch.expect("a scratch"));
    let mut guest = Guest::new(&view, 1, 3);
    let mut model = journal.model(newest);
    for (op, at, fill) in [
        (Op::Write, 8192, 0x61),
        (Op::Write, 100 << 10, 0x62),
        (Op::WriteZeroes { unmap: false }, 40 << 10, 0),
    ] {
        guest.change(op, false, at, fill).expect("written");
        model[at as usize..at as usize + 4096].fill(fill);
    }
    guest.compare(&model);
    drop(guest);
    assert!(view.close_scratch().expect("closed"));

    std::fs::create_dir_all(fixture()).expect("a folder");
    for file in FILES {
        gzip(&["-9nc"], &journal.folder.join(file), &fixture().join(format!("{file}.gz")));
    }
    let crc = |bytes: &[u8]| format!("{:08x}", crc32c::crc32c(bytes));
    let (kept, newest) = (crc(&journal.model(cut)), crc(&journal.model(newest)));
    let lines = format!("kept\t{kept}\nnewest\t{newest}\nscratch\t{}\n", crc(&model));
    std::fs::write(fixture().join("expected.tsv"), lines).expect("written");
}

#[test]
fn a_scratch_file_of_version_1_is_opened_with_what_was_written_to_it() {
    let folder = std::env::temp_dir().join(format!("holdfast-fixture-scratch-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    for file in FILES {
        gzip(&["-dc"], &fixture().join(format!("{file}.gz")), &folder.join(file));
    }
    let keyring = Keyring::new(Uuid::from_u128(1), SiteKeys::default());
    let path = folder.join(FILES[3]);
    let owner = ScratchFile::owner(&path).expect("readable").expect("a scratch");
    assert_eq!((owner.view, owner.disk_bytes), (Uuid::from_u128(7), SIZE_BYTES));
    let scratch = ScratchFile::open(&path, &folder.join("live.map"), &owner, &keys(&keyring), Instant::now())
        .expect("open");
    let (mut storage, file) = ring(&folder.join("journal.hfj"));
    let reader = journal::view::Reader::open(&mut storage, file, &Default::default()).expect("a journal");
    let direct = |name: &str| {
        let file = DirectFile::open(&folder.join(name), Access::ReadOnly).expect("open");
        file.file().try_clone().expect("another descriptor")
    };
    let source = ViewSource {
        volume: reader.view(owner.seq).expect("in the history").take_volume(0).expect("its disk"),
        journal: direct("journal.hfj"),
        recovery_disk: direct("disk-0.raw"),
        seq: owner.seq,
        freshness: Freshness::Superblock,
        beneath: None,
        keep: Box::new(()),
    };
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: false };
    let view = ViewDisk::new(source, settings, Some(scratch)).expect("a view");
    let mut guest = Guest::new(&view, 1, 1);
    let pieces = (0..SIZE_BYTES).step_by(64 << 10).map(|at| guest.read(at, 64 << 10).expect("readable"));
    let found: Vec<u8> = pieces.collect::<Vec<_>>().concat();
    assert_eq!(crc32c::crc32c(&found), expected("scratch"));
    assert_ne!(expected("scratch"), expected("newest"), "the guest has written");
    drop((guest, view));
    std::fs::remove_dir_all(folder).expect("removed");
}

fn ring(path: &Path) -> (journal::storage::ring::RingStorage, journal::storage::FileId) {
    let mut storage = journal::storage::ring::RingStorage::new(16).expect("io_uring");
    let file = storage.add_file(DirectFile::open(path, Access::ReadOnly).expect("open"));
    (storage, file)
}
