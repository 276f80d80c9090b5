//! A journal in a real file, through io_uring and O_DIRECT.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use journal::batch::{BatchLink, BatchSealer, BatchView, Checkpoint, CheckpointKind, Epoch, Record};
use journal::crypt::Encryption;
use journal::format::manifest::MAX_MANIFEST_BYTES;
use journal::format::{JournalState, VolumeState};
use journal::recovery::{NewJournal, OpenError, OpenOptions, SurveyOptions, create, open};
use journal::storage::ring::{Access, DirectFile, OpenFileError, RingStorage};
use journal::storage::{FileId, Op, Storage};
use journal::view::{Reader, ViewError};
use journal::writer::{Change, Event, Limits, State, Writer, drive};
use uuid::Uuid;

const GENERATION: Uuid = Uuid::from_u128(0x6e);
const SLOT_BYTES: u64 = 64 << 10;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("holdfast-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }

    fn journal(&self) -> PathBuf {
        self.0.join("journal.hfj")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn ring(path: &Path, access: Access) -> (RingStorage, FileId) {
    let mut storage = RingStorage::new(64).expect("io_uring");
    let file = storage.add_file(DirectFile::open(path, access).expect("open"));
    (storage, file)
}

fn create_journal(path: &Path) {
    let (mut storage, file) = ring(path, Access::Create);
    let volume = VolumeState { id: Uuid::from_u128(5), base_seq: 0, size_bytes: 1 << 20, fresh_image: true };
    let new = NewJournal {
        journal_id: Uuid::from_u128(1),
        vm_id: Uuid::from_u128(2),
        vpg_id: Uuid::from_u128(3),
        slot_len_bytes: SLOT_BYTES,
        slot_count: 3,
        volumes: vec![volume],
        manifest: r#"{"vm":"test"}"#.into(),
        encryption: Encryption::Never,
    };
    create(&mut storage, file, &new).expect("create");
}

/// A writer with its stream: batches follow one another as a source would send them.
struct Target {
    storage: RingStorage,
    file: FileId,
    writer: Writer,
    sealer: BatchSealer,
    seq: u64,
    crc: u32,
}

impl Target {
    fn open(path: &Path) -> Self {
        let (mut storage, file) = ring(path, Access::Exclusive);
        let opened = open(&mut storage, file, &OpenOptions::default()).expect("open");
        let mut writer =
            Writer::new(opened, Limits { max_slots: 8, min_slots: 0, grow_slots: 2, group_bytes: 1 << 20 });
        writer
            .change(Change::Claim { generation: GENERATION, parent: Uuid::nil(), first_seq: 1 })
            .expect("claim");
        let events = drive(&mut writer, &mut storage, file).expect("drive");
        assert!(matches!(events[..], [Event::Granted { .. }]), "{events:?}");
        let durable = writer.durable();
        let (seq, crc) = (durable.seq, durable.batch_crc);
        Self { storage, file, writer, sealer: BatchSealer::new(), seq, crc }
    }

    fn drive(&mut self) -> Vec<Event> {
        drive(&mut self.writer, &mut self.storage, self.file).expect("drive")
    }

    fn change(&mut self, change: Change) {
        self.writer.change(change).expect("allowed");
        self.drive();
    }

    fn push(&mut self, make: impl FnOnce(u64) -> Record) {
        self.seq += 1;
        self.sealer.push(make(self.seq)).expect("fits");
    }

    fn seal(&mut self) -> Bytes {
        let link = BatchLink {
            journal_id: Uuid::from_u128(1),
            generation: GENERATION,
            open_count: self.writer.superblock().open_count,
            prev_batch_crc: self.crc,
        };
        let batch = self.sealer.seal(&link, 0).expect("not empty");
        self.crc = batch.crc;
        batch.to_bytes()
    }

    fn offer(&mut self) {
        let batch = self.seal();
        let view = BatchView::parse(&batch).expect("valid");
        self.writer.offer(batch.clone(), &view, 1000 + self.seq).expect("offered");
    }

    /// The first sync, of nothing, and its end: from now on there is a history.
    fn end_base_sync(&mut self) {
        self.change(Change::BeginBaseSync { sync_id: 9 });
        self.push(|seq| Record::sync_begin(seq, 1, 0, 1 << 20, 9));
        self.push(|seq| Record::sync_end(seq, 1, 0, 1 << 20, 9));
        let batch = self.seal();
        let view = BatchView::parse(&batch).expect("valid");
        let through = self.writer.accept_for_base(&view, 1).expect("accepted");
        self.change(Change::AdvanceBase { through, end: true });
        assert_eq!(self.writer.superblock().state, JournalState::Consistent);
        assert_eq!(self.writer.durable(), through);
    }

    fn checkpoint(&mut self, tag: &str) {
        let cut = self.seq;
        let epoch = Epoch { nonce: Uuid::from_u128(77), counter: cut };
        let (kind, tag) = (CheckpointKind::Tagged, tag.to_owned());
        let checkpoint =
            Checkpoint { epoch, cut, member_set_version: 1, time_us: 1_000_000 + cut, kind, tag };
        self.push(|seq| Record::checkpoint(seq, 1, &checkpoint));
    }
}

fn reader(path: &Path) -> (RingStorage, FileId, Reader) {
    let (mut storage, file) = ring(path, Access::ReadOnly);
    let reader = Reader::open(&mut storage, file, &SurveyOptions::default()).expect("readable");
    (storage, file, reader)
}

fn read_at(path: &Path, seq: u64, offset_bytes: u64, len_bytes: usize) -> Result<Vec<u8>, ViewError> {
    let (mut storage, file, reader) = reader(path);
    let view = reader.view(seq)?;
    let mut bytes = vec![0xee; len_bytes];
    view.volume(0)?.read(&mut storage, file, offset_bytes, &mut bytes, |_, _, into| {
        into.fill(0xdd);
        Ok(())
    })?;
    Ok(bytes)
}

#[test]
fn writes_come_back_at_every_checkpoint_across_slots_and_openings() {
    let folder = Folder::new("roundtrip");
    create_journal(&folder.journal());
    let mut target = Target::open(&folder.journal());
    target.end_base_sync();
    let mut cuts = Vec::new();
    for round in 0..24_u8 {
        // Overlapping places, so that newest must win; 20 KiB a round fills a slot every third time.
        let data = vec![round + 1; 12 << 10];
        target.push(|seq| Record::write(seq, 1, 0, u64::from(round % 3) * 4096, data.into()));
        target.push(|seq| Record::write(seq, 1, 0, 512, vec![0x80 | round; 512].into()));
        target.checkpoint(&format!("round {round}"));
        cuts.push(target.seq - 1);
        target.offer();
        let events = target.drive();
        if target.writer.state() == State::Full {
            cuts.pop();
            break;
        }
        assert!(events.iter().any(|event| matches!(event, Event::Durable(point) if point.seq == target.seq)));
        if round % 5 == 4 {
            drop(target);
            target = Target::open(&folder.journal());
        }
    }
    assert_eq!(target.writer.superblock().slot_count, 8, "it grew to its limit");
    assert!(cuts.len() >= 12, "{}", cuts.len());
    let (_, _, reader) = reader(&folder.journal());
    let found: Vec<u64> = reader.catalogue().checkpoints().iter().map(|entry| entry.checkpoint.cut).collect();
    assert_eq!(found, cuts);
    assert_eq!(
        reader.survey.manifest.as_ref().map(|manifest| manifest.text.as_str()),
        Some(r#"{"vm":"test"}"#)
    );

    let mut model = vec![0xdd_u8; 24 << 10];
    for (round, cut) in (0_u8..).zip(cuts) {
        let at = usize::from(round % 3) * 4096;
        model[at..at + (12 << 10)].fill(round + 1);
        model[512..1024].fill(0x80 | round);
        assert_eq!(
            read_at(&folder.journal(), cut, 0, model.len()).expect("readable"),
            model,
            "round {round}"
        );
    }
}

#[test]
fn a_manifest_that_is_longer_than_a_page_is_read_whole() {
    let folder = Folder::new("manifest");
    create_journal(&folder.journal());
    for len_bytes in [4096 - 64, 4097 - 64, MAX_MANIFEST_BYTES] {
        let text = "m".repeat(len_bytes);
        let mut target = Target::open(&folder.journal());
        target.change(Change::SetManifest(text.clone()));
        drop(target);
        let (_, _, reader) = reader(&folder.journal());
        assert!(reader.survey.manifest.is_some_and(|manifest| manifest.text == text), "{len_bytes} bytes");
    }
}

/// B6: what the journal has of a volume up to its base is older than the volume's recovery disk.
#[test]
fn records_up_to_a_volumes_base_are_not_read_and_older_views_leave_the_volume_out() {
    let folder = Folder::new("base");
    create_journal(&folder.journal());
    let mut target = Target::open(&folder.journal());
    target.end_base_sync();
    let write = |volume, offset_bytes, fill| {
        move |seq| Record::write(seq, 1, volume, offset_bytes, Bytes::from(vec![fill; 4096]))
    };
    target.push(write(1, 0, 1));
    target.push(write(1, 4096, 2));
    let base_seq = target.seq;
    target.push(write(1, 4096, 3));
    let newest_seq = target.seq;
    target.offer();
    target.drive();
    let mut volumes = target.writer.superblock().volumes.clone();
    volumes.push(VolumeState { id: Uuid::from_u128(6), base_seq, size_bytes: 1 << 20, fresh_image: false });
    target.change(Change::SetVolumes(volumes));
    let (mut storage, file, reader) = reader(&folder.journal());
    let before = reader.view(base_seq - 1).expect("in the history");
    assert!(before.volume(0).is_ok());
    assert!(matches!(before.volume(1), Err(ViewError::NoVolume(1))), "its disk is newer than that");
    let mut read = |seq| {
        let (view, mut bytes) = (reader.view(seq).expect("in the history"), vec![0xee; 8192]);
        let volume = view.volume(1).expect("its base is not above that");
        let from_disk = |_: &mut RingStorage, _, into: &mut [u8]| {
            into.fill(0xdd);
            Ok(())
        };
        volume.read(&mut storage, file, 0, &mut bytes, from_disk).expect("readable");
        (bytes[0], bytes[4096])
    };
    assert_eq!(read(base_seq), (0xdd, 0xdd), "the recovery disk has them");
    assert_eq!(read(newest_seq), (0xdd, 3));
}

#[test]
fn a_group_is_written_while_the_one_before_is_synced_and_acknowledged_after_it() {
    let folder = Folder::new("ahead");
    create_journal(&folder.journal());
    let mut target = Target::open(&folder.journal());
    target.end_base_sync();
    let group = |target: &mut Target| {
        target.push(|seq| Record::write(seq, 1, 0, 4096, Bytes::from(vec![seq as u8; 4096])));
        target.offer();
        target.seq
    };
    // A segment is begun, so that nothing but batches is left to do.
    group(&mut target);
    target.drive();
    let first = group(&mut target);
    let action = |target: &mut Target| {
        let action = target.writer.next_action()?;
        Some((action.token, matches!(action.op, Op::Sync)))
    };
    let done = |target: &mut Target, token| {
        target.writer.done(token, Ok(()));
        std::iter::from_fn(|| target.writer.poll_event()).collect::<Vec<_>>()
    };
    let (first_write, false) = action(&mut target).expect("a write") else { panic!("not a sync") };
    assert_eq!(action(&mut target), None, "its sync waits for its write");
    assert_eq!(done(&mut target, first_write), []);
    let (first_sync, true) = action(&mut target).expect("a sync") else { panic!("not a write") };

    let second = group(&mut target);
    let (second_write, false) = action(&mut target).expect("written ahead") else { panic!("not a sync") };
    assert_eq!(done(&mut target, second_write), [], "written, and no sync since");
    assert_eq!(action(&mut target), None, "one sync at a time");
    let durable = |events: &[Event]| match events {
        [Event::Durable(point)] => point.seq,
        _ => panic!("{events:?}"),
    };
    assert_eq!(
        durable(&done(&mut target, first_sync)),
        first,
        "the first sync counts for the first group alone"
    );
    let (second_sync, true) = action(&mut target).expect("a sync") else { panic!("not a write") };
    assert_eq!(durable(&done(&mut target, second_sync)), second);
    assert!(target.writer.is_idle());
}

#[test]
fn a_flipped_bit_is_named_by_its_record() {
    let folder = Folder::new("flip");
    create_journal(&folder.journal());
    let mut target = Target::open(&folder.journal());
    target.end_base_sync();
    target.push(|seq| Record::write(seq, 1, 0, 0, vec![1; 8192].into()));
    target.offer();
    target.push(|seq| Record::write(seq, 1, 0, 65536, vec![2; 8192].into()));
    target.offer();
    target.drive();
    target.change(Change::Seal);
    let seq = target.seq;
    drop(target);
    let mut bytes = std::fs::read(folder.journal()).expect("read");
    let place =
        bytes.windows(8192).position(|window| window == [2; 8192]).expect("the payload is in the file");
    bytes[place + 5000] ^= 4;
    std::fs::write(folder.journal(), bytes).expect("write");
    assert_eq!(read_at(&folder.journal(), seq, 0, 8192).expect("the other record is whole"), vec![1; 8192]);
    assert_eq!(read_at(&folder.journal(), seq, 65536, 4096).expect("its first unit is whole"), vec![2; 4096]);
    let error = read_at(&folder.journal(), seq, 65536 + 4096, 512).expect_err("damaged");
    assert!(matches!(error, ViewError::Corrupt { seq: 4, volume: 0, .. }), "{error}");
}

#[test]
fn refusals_name_the_reason() {
    let folder = Folder::new("refuse");
    create_journal(&folder.journal());
    let target = Target::open(&folder.journal());
    let busy = DirectFile::open(&folder.journal(), Access::Exclusive).expect_err("locked");
    assert!(matches!(busy, OpenFileError::Busy { .. }), "{busy}");
    drop(target);
    let (mut storage, file) = ring(&folder.journal(), Access::Exclusive);
    let options =
        OpenOptions { vm_id: Some(Uuid::from_u128(99)), trusted_through: None, ..OpenOptions::default() };
    let error = open(&mut storage, file, &options).expect_err("another VM's");
    assert!(matches!(error, OpenError::OtherVm { .. }), "{error}");
    drop(storage);

    let mut bytes = std::fs::read(folder.journal()).expect("read");
    let newer = {
        bytes[8] = 2;
        let crc = journal::format::page_crc(&bytes[..4096], 12);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes.clone()
    };
    std::fs::write(folder.journal(), newer).expect("write");
    let (mut storage, file) = ring(&folder.journal(), Access::Exclusive);
    let error = open(&mut storage, file, &OpenOptions::default()).expect_err("newer");
    assert!(matches!(error, OpenError::Newer(_)), "{error}");
    drop(storage);

    std::fs::write(folder.journal(), vec![0; 1 << 20]).expect("write");
    let (mut storage, file) = ring(&folder.journal(), Access::Exclusive);
    let error = open(&mut storage, file, &OpenOptions::default()).expect_err("no journal");
    assert!(matches!(error, OpenError::NotAJournal), "{error}");
}

#[test]
fn another_thread_wakes_a_waiting_ring() {
    let mut storage = RingStorage::new(8).expect("io_uring");
    let waker = storage.waker();
    let waiting = std::thread::spawn(move || {
        let mut done = Vec::new();
        storage.collect(true, &mut done).expect("woken");
        assert!(done.is_empty());
    });
    waker.wake();
    waiting.join().expect("ended");
}

/// An opening whose sync fails leaves a copy of the newest segment that may not be durable. The next one copies that, and must not lay
/// its own copy over the one that is.
#[test]
fn an_opening_after_a_failed_one_leaves_the_oldest_copy_alone() {
    let folder = Folder::new("older-copy");
    let path = folder.0.join("journal.hfj");
    create_journal(&path);
    let mut target = Target::open(&path);
    target.end_base_sync();
    target.push(|seq| Record::write(seq, seq, 0, 4096, vec![7; 4096].into()));
    target.offer();
    target.drive();
    let last_slot = |opened: &journal::recovery::Opened| opened.segments.last().expect("one").header.slot;
    let original = target.writer.superblock().open_count;
    drop(target);
    let (mut storage, file) = ring(&path, Access::Exclusive);
    let survey = |storage: &mut RingStorage| {
        journal::recovery::survey(storage, file, &SurveyOptions::default()).expect("readable")
    };
    let first = survey(&mut storage).segments.last().expect("one").header.clone();
    assert_eq!((first.open_count, survey(&mut storage).older_copy), (original, None));

    let failed = open(&mut storage, file, &OpenOptions::default()).expect("open");
    let found = survey(&mut storage);
    assert_eq!(found.segments.last().expect("one").header.slot, last_slot(&failed), "the newest copy counts");
    assert_eq!(found.older_copy, Some(first.slot));
    let next = open(&mut storage, file, &OpenOptions::default()).expect("open");
    assert!(![first.slot, last_slot(&failed)].contains(&last_slot(&next)));
    assert_eq!(survey(&mut storage).older_copy, Some(first.slot), "still the one that was there first");

    // The copies are the same bytes, but for their first pages.
    let bytes = std::fs::read(&path).expect("journal");
    let batches = |slot: u32| {
        let begin = journal::format::slot_offset_bytes(slot, SLOT_BYTES) as usize + 4096;
        bytes[begin..begin + 8192].to_vec()
    };
    assert_eq!(batches(first.slot), batches(last_slot(&next)));
}
