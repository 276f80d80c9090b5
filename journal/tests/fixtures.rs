//! Journals of format version 1 as they were written when it was new: this release reads them, names their damage, and goes on writing.
//! `fixtures/v1/README.md` says what they are.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bytes::Bytes;
use journal::batch::{BatchLink, BatchSealer, BatchView, Record};
use journal::crypt::{Encryption, KeyError, Keys, SiteKeys};
use journal::format::{JournalState, SUPERBLOCK_OFFSETS, Superblock, SuperblockError};
use journal::recovery::{Damage, Hidden, OpenError, OpenOptions, SurveyOptions, open};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{Blocking, FileId, Purpose, StorageError};
use journal::view::{Reader, ViewError};
use journal::writer::{Change, Limits, Writer, drive};

/// A fixture, unpacked into a folder of its own that goes with it.
struct Fixture {
    folder: PathBuf,
    /// For one that is encrypted.
    keys: SiteKeys,
    checkpoints: Vec<Expected>,
}

/// A line of `checkpoints.tsv`.
#[derive(Debug, PartialEq, Eq)]
struct Expected {
    seq: u64,
    cut: u64,
    time_us: u64,
    tag: String,
    /// CRC32C of each disk, or the number of the record whose payload is damaged.
    disks: Vec<Result<u32, u64>>,
}

impl Fixture {
    fn unpack(name: &str) -> Self {
        let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1").join(name);
        let folder = std::env::temp_dir().join(format!("holdfast-fixture-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a temporary folder");
        for file in ["journal.hfj", "disk-0.raw", "disk-1.raw"] {
            let mut gzip = Command::new("gzip");
            gzip.arg("-dc").stdin(File::open(packed.join(format!("{file}.gz"))).expect("the fixture"));
            gzip.stdout(Stdio::from(File::create(folder.join(file)).expect("a file")));
            assert!(gzip.status().expect("gzip").success(), "{file}");
        }
        let lines = fs::read_to_string(packed.join("checkpoints.tsv")).expect("what is expected");
        let checkpoints = lines.lines().skip(1).map(Expected::parse).collect();
        let keys = fs::read_to_string(packed.join("site.key")).ok();
        let keys = keys.map(|text| SiteKeys::parse(&text).expect("site keys")).unwrap_or_default();
        Self { folder, keys, checkpoints }
    }

    fn path(&self) -> PathBuf {
        self.folder.join("journal.hfj")
    }

    fn read(&self) -> Result<Reader, ViewError> {
        let (mut storage, file) = ring(&self.path(), Access::ReadOnly);
        let options = SurveyOptions { keys: self.keys.clone(), ..SurveyOptions::default() };
        Reader::open(&mut storage, file, &options)
    }

    /// Read-only everything is as expected.
    fn assert_readable(&self) -> Reader {
        let reader = self.read().expect("readable");
        let entries = reader.catalogue().checkpoints().iter();
        let found = entries.map(|entry| {
            let checkpoint = &entry.checkpoint;
            let disks = (0..2).map(|disk| self.image_crc(&reader, checkpoint.cut, disk)).collect();
            let (cut, time_us, tag) = (checkpoint.cut, checkpoint.time_us, checkpoint.tag.clone());
            Expected { seq: entry.seq, cut, time_us, tag, disks }
        });
        assert_eq!(found.collect::<Vec<_>>(), self.checkpoints);
        reader
    }

    /// CRC32C of a disk at a number, or the record that is damaged.
    fn image_crc(&self, reader: &Reader, seq: u64, disk: u16) -> Result<u32, u64> {
        let (mut storage, file) = ring(&self.path(), Access::ReadOnly);
        let base = DirectFile::open(&self.folder.join(format!("disk-{disk}.raw")), Access::ReadOnly);
        let base = storage.add_file(base.expect("the recovery disk"));
        let view = reader.view(seq).expect("in the history").take_volume(disk).expect("has this disk");
        let mut bytes = vec![0xee; view.size_bytes() as usize];
        match view.read(&mut storage, file, 0, &mut bytes, |storage, at, into| read(storage, base, at, into))
        {
            Ok(()) => Ok(crc32c::crc32c(&bytes)),
            Err(ViewError::Corrupt { seq, .. }) => Err(seq),
            Err(error) => panic!("{error}"),
        }
    }

    /// A writer finds all up to `tail_seq`, goes on, and leaves what was there readable. Gives what it was told of records behind that.
    fn assert_writable(&self, tail_seq: u64) -> Option<Hidden> {
        let (mut storage, file) = ring(&self.path(), Access::Exclusive);
        let options = OpenOptions { keys: Keys::new(self.keys.clone()), ..OpenOptions::default() };
        let opened = open(&mut storage, file, &options).expect("as writer");
        assert_eq!(opened.tail.seq, tail_seq);
        let (generation, hidden) = (opened.superblock.tail_generation, opened.hidden);
        let limits = Limits { max_slots: 16, min_slots: 0, grow_slots: 2, group_bytes: 1 << 20 };
        let link = BatchLink {
            journal_id: opened.superblock.journal_id,
            generation,
            open_count: opened.superblock.open_count,
            prev_batch_crc: opened.tail.batch_crc,
        };
        let mut writer = Writer::new(opened, limits);
        let claim = Change::Claim { generation, parent: generation, first_seq: tail_seq + 1 };
        writer.change(claim).expect("its own generation");
        drive(&mut writer, &mut storage, file).expect("claimed");
        let mut sealer = BatchSealer::new();
        let record = Record::write(tail_seq + 1, 1, 0, 0, Bytes::from_static(&[0x11; 512]));
        sealer.push(record).expect("the first record");
        let batch = sealer.seal(&link, 0).expect("not empty").to_bytes();
        writer.offer(batch.clone(), &BatchView::parse(&batch).expect("valid"), 1).expect("follows");
        drive(&mut writer, &mut storage, file).expect("written");
        drop(storage);
        assert_eq!(self.assert_readable().newest_seq(), tail_seq + 1);
        hidden
    }

    /// A writer finds the sync that was under way after `seq`, and syncs all anew.
    fn end_sync(&self, seq: u64) {
        let (mut storage, file) = ring(&self.path(), Access::Exclusive);
        let opened = open(&mut storage, file, &OpenOptions::default()).expect("as writer");
        assert_eq!(opened.tail.seq, seq);
        let superblock = opened.superblock.clone();
        let limits = Limits { max_slots: 16, min_slots: 0, grow_slots: 2, group_bytes: 1 << 20 };
        let mut link = BatchLink {
            journal_id: superblock.journal_id,
            generation: superblock.tail_generation,
            open_count: superblock.open_count,
            prev_batch_crc: opened.tail.batch_crc,
        };
        let mut writer = Writer::new(opened, limits);
        let (generation, parent) = (link.generation, superblock.parent_generation);
        writer.change(Change::Claim { generation, parent, first_seq: seq + 1 }).expect("its own generation");
        writer.change(Change::BeginBaseSync { sync_id: 11 }).expect("there is no history");
        drive(&mut writer, &mut storage, file).expect("begun");
        for (volume, state) in (0_u16..).zip(&superblock.volumes) {
            let (first, size_bytes) = (seq + 1 + 2 * u64::from(volume), state.size_bytes);
            let mut sealer = BatchSealer::new();
            sealer.push(Record::sync_begin(first, 1, volume, size_bytes, 11)).expect("the first record");
            sealer.push(Record::sync_end(first + 1, 1, volume, size_bytes, 11)).expect("the second record");
            let batch = sealer.seal(&link, 0).expect("not empty").to_bytes();
            let view = BatchView::parse(&batch).expect("valid");
            link.prev_batch_crc = view.crc();
            let through = writer.accept_for_base(&view, 1).expect("follows");
            let end = usize::from(volume) + 1 == superblock.volumes.len();
            writer.change(Change::AdvanceBase { through, end }).expect("it goes on");
            drive(&mut writer, &mut storage, file).expect("durable");
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Expected {
    fn parse(line: &str) -> Self {
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |index: usize| fields[index].parse::<u64>().expect("a number");
        let disk = |field: &&str| match field.strip_prefix("damaged record ") {
            Some(seq) => Err(seq.parse().expect("a number")),
            None => Ok(u32::from_str_radix(field, 16).expect("a CRC")),
        };
        let disks = fields[4..].iter().map(disk).collect();
        Self { seq: number(0), cut: number(1), time_us: number(2), tag: fields[3].to_owned(), disks }
    }
}

fn ring(path: &Path, access: Access) -> (RingStorage, FileId) {
    let mut storage = RingStorage::new(64).expect("io_uring");
    let file = storage.add_file(DirectFile::open(path, access).expect("open"));
    (storage, file)
}

/// Reads a part of a recovery disk, in whole pages.
fn read(storage: &mut RingStorage, disk: FileId, at: u64, into: &mut [u8]) -> Result<(), StorageError> {
    let (begin, end) = (at / 4096 * 4096, (at + into.len() as u64).next_multiple_of(4096));
    let pages = Blocking::new(storage, disk, Purpose::RecoveryDisk).read(begin, (end - begin) as usize)?;
    into.copy_from_slice(&pages[(at - begin) as usize..][..into.len()]);
    Ok(())
}

#[test]
fn a_good_journal_is_read_and_written() {
    let fixture = Fixture::unpack("good");
    let survey = fixture.assert_readable().survey;
    assert_eq!((survey.damage, survey.hidden), (None, None));
    assert_eq!(survey.segments.len(), 3);
    assert_eq!(survey.manifest.map(|manifest| manifest.text).as_deref(), Some(r#"{"vm":"sample"}"#));
    assert_eq!(fixture.assert_writable(survey.tail.seq), None);
}

#[test]
fn a_torn_tail_is_no_damage() {
    let fixture = Fixture::unpack("torn-tail");
    let survey = fixture.assert_readable().survey;
    assert_eq!((survey.damage, survey.hidden), (None, None));
    assert_eq!(fixture.assert_writable(survey.tail.seq), None);
}

#[test]
fn a_damaged_payload_is_named_by_its_record_and_stops_no_writer() {
    let fixture = Fixture::unpack("corrupt-payload");
    let survey = fixture.assert_readable().survey;
    assert_eq!((survey.damage, survey.hidden), (None, None));
    fixture.assert_writable(survey.tail.seq);
}

#[test]
fn records_behind_a_batch_with_a_damaged_header_are_named() {
    let fixture = Fixture::unpack("corrupt-header");
    let survey = fixture.assert_readable().survey;
    let newest = survey.segments.last().expect("three segments").header.clone();
    let (after_seq, slot) = (survey.tail.seq, newest.slot);
    let hidden = Hidden { segment: 3, slot, after_seq, resumes_seq: Some(after_seq + 2) };
    assert_eq!((survey.damage, survey.hidden), (None, Some(hidden)));
    assert_eq!(fixture.assert_writable(after_seq), Some(hidden), "the next writer is told, too");
}

#[test]
fn a_lost_segment_is_damage_that_a_writer_refuses() {
    let fixture = Fixture::unpack("lost-segment");
    let survey = fixture.assert_readable().survey;
    let first = survey.segments.last().expect("one segment").last();
    let damage = survey.damage.expect("two segments can't be reached");
    assert_eq!((survey.segments.len(), damage.after_seq), (1, first.seq));
    assert_eq!(damage, Damage { after_seq: first.seq, resumes_after_seq: first.seq + 4, stop: None });
    let (mut storage, file) = ring(&fixture.path(), Access::Exclusive);
    let refused = open(&mut storage, file, &OpenOptions::default()).expect_err("damaged");
    assert!(matches!(refused, OpenError::Damaged(found) if found == damage), "{refused}");
}

#[test]
fn one_copy_of_the_superblock_is_enough_and_a_writer_mends_the_other() {
    let fixture = Fixture::unpack("damaged-superblock");
    let copies = || {
        let bytes = fs::read(fixture.path()).expect("the journal");
        SUPERBLOCK_OFFSETS.map(|place| Superblock::decode(&bytes[place as usize..]).map(|_| ()))
    };
    assert_eq!(copies(), [Err(SuperblockError::Crc), Ok(())]);
    let survey = fixture.assert_readable().survey;
    fixture.assert_writable(survey.tail.seq);
    assert_eq!(copies(), [Ok(()), Ok(())]);
}

#[test]
fn an_encrypted_journal_is_read_and_written_with_its_site_key() {
    let mut fixture = Fixture::unpack("encrypted");
    let survey = fixture.assert_readable().survey;
    assert_eq!((survey.damage, survey.hidden), (None, None));
    assert_eq!(survey.segments.len(), 3);
    assert!(survey.segments.iter().all(|segment| segment.header.encryption.is_some()));
    let Encryption::On(key) = survey.superblock.encryption else { panic!("it is encrypted") };
    let site_key_id = fixture.keys.current().expect("a site key").id();
    assert_eq!(key.site_key_id(), site_key_id);
    assert_eq!(fixture.assert_writable(survey.tail.seq), None);
    // It is the same journal as the plain one.
    assert_eq!(fixture.checkpoints, Fixture::unpack("good").checkpoints);

    fixture.keys = SiteKeys::default();
    let refused = fixture.read().expect_err("without its key");
    let ViewError::Open(OpenError::Key(KeyError::Missing(missing))) = refused else { panic!("{refused}") };
    assert_eq!(missing, site_key_id);
}

#[test]
fn what_was_promoted_damaged_is_named_from_the_list_until_it_is_written_again() {
    let fixture = Fixture::unpack("bad-list");
    let survey = fixture.assert_readable().survey;
    assert_eq!((survey.damage, survey.hidden), (None, None));
    assert!(survey.superblock.bad_list.is_some());
    let damaged = fixture.checkpoints.iter().find_map(|checkpoint| checkpoint.disks[0].err());
    let found: Vec<_> = survey.bad_ranges.iter().map(|bad| (bad.volume, bad.offset_bytes, bad.seq)).collect();
    assert_eq!(found, [(0, 12 << 10, damaged.expect("`third` needs it"))]);
    fixture.assert_writable(survey.tail.seq);
    assert_eq!(
        fixture.read().expect("readable").survey.bad_ranges,
        survey.bad_ranges,
        "the list outlives a writer"
    );
}

#[test]
fn a_journal_that_is_encrypted_no_more_needs_its_key_for_what_was() {
    let mut fixture = Fixture::unpack("decrypted");
    let survey = fixture.assert_readable().survey;
    assert_eq!(survey.superblock.encryption, Encryption::Off);
    let encrypted = survey.segments.iter().map(|segment| segment.header.encryption.is_some());
    assert_eq!(encrypted.collect::<Vec<_>>(), [true, true, false]);
    assert_eq!(fixture.assert_writable(survey.tail.seq), None);
    // It is the same journal as the plain one.
    assert_eq!(fixture.checkpoints, Fixture::unpack("good").checkpoints);

    fixture.keys = SiteKeys::default();
    let refused = fixture.read().expect_err("without its key");
    assert!(matches!(refused, ViewError::Open(OpenError::Key(KeyError::Missing(_)))), "{refused}");
}

/// B6: without a history nothing can be opened, a writer finds the sync where it was, and the next sync ends it.
#[test]
fn a_journal_without_history_goes_on_with_a_sync() {
    for (name, state) in [
        ("first-sync", JournalState::FirstSync { sync_id: 9 }),
        ("history-given-up", JournalState::HistoryGivenUp { sync_id: 10 }),
    ] {
        let fixture = Fixture::unpack(name);
        let reader = fixture.assert_readable();
        let superblock = &reader.survey.superblock;
        assert_eq!((superblock.state, reader.survey.segments.len()), (state, 0), "{name}");
        for seq in 0..=superblock.low_water.seq + 1 {
            assert!(matches!(reader.view(seq), Err(ViewError::NoHistory)), "{name} at {seq}");
        }
        fixture.end_sync(superblock.low_water.seq);
        let after = fixture.read().expect("readable").survey.superblock;
        assert_eq!(after.state, JournalState::Consistent, "{name}");
        assert!(after.volumes.iter().all(|volume| volume.base_seq == after.low_water.seq), "{name}");
    }
}

/// C2: the intent through the last number of segment 2 is durable, a part of its blocks is on the recovery disks.
#[test]
fn a_journal_in_the_middle_of_a_promotion_opens_from_the_intent_on() {
    let fixture = Fixture::unpack("half-promoted");
    let whole = Fixture::unpack("good");
    let reader = fixture.assert_readable();
    let superblock = &reader.survey.superblock;
    let through = superblock.promotion_intent_seq;
    assert!(superblock.low_water.seq < through, "it has not ended");
    assert_eq!(Some(through), reader.survey.segments.get(1).map(|segment| segment.last().seq));
    let tags: Vec<&str> = fixture.checkpoints.iter().map(|checkpoint| checkpoint.tag.as_str()).collect();
    assert_eq!(tags, ["third", "fourth"]);
    let base = |fixture: &Fixture, disk: u16| {
        fs::read(fixture.folder.join(format!("disk-{disk}.raw"))).expect("a disk")
    };
    let changed = (0..2).filter(|disk| base(&fixture, *disk) != base(&whole, *disk)).count();
    assert_eq!(changed, 1, "one disk was written to, the other not yet");

    for seq in superblock.low_water.seq..through {
        let refused = reader.view(seq).expect_err("announced");
        assert!(
            matches!(refused, ViewError::Gone { oldest_seq, .. } if oldest_seq == through),
            "{seq}: {refused}"
        );
    }
    // Nothing lies between the checkpoint `second` and the intent's end but the checkpoint's own record.
    let second = &whole.checkpoints[1];
    assert_eq!((second.seq, second.tag.as_str()), (through, "second"));
    for seq in [through, through + 1] {
        for (disk, expected) in (0..).zip(&second.disks) {
            let expected = if seq == through {
                *expected
            } else {
                whole.image_crc(&whole.read().expect("whole"), seq, disk)
            };
            assert_eq!(fixture.image_crc(&reader, seq, disk), expected, "disk {disk} at {seq}");
        }
    }
    let tail_seq = reader.survey.tail.seq;
    fixture.assert_writable(tail_seq);
}
