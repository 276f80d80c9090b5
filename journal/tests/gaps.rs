//! A sealed segment that has lost its footer and heads of its batches: nobody knows what those wrote. All before them opens as ever, and
//! what is behind them when a full sync that began behind them has ended.
#![cfg(feature = "sim")]

mod sim_target;

use journal::batch::Record;
use journal::format::{Gap, VolumeState};
use journal::promotion::PromotionError;
use journal::recovery::rebuild;
use journal::view::{Reader, ViewError};
use journal::writer::Change;

use sim_target::{Site, Target, VOLUME_BYTES};

const PAGE: u64 = 4096;

/// Where batches begin in the file.
struct Places {
    before: u64,
    lost: u64,
    behind: u64,
    footer: u64,
}

impl Places {
    fn break_them(&self, site: &Site, heads: &[u64]) {
        for place in heads.iter().chain([&self.footer]) {
            site.disk.break_pages(site.journal, *place..*place + 1);
        }
    }
}

/// A sealed segment with three batches, of which the first and the last have a checkpoint. `lost` makes the second one.
fn sealed(target: &mut Target<'_>, lost: impl FnOnce(&mut Target<'_>)) -> Places {
    target.base_sync();
    let fill = |target: &Target<'_>| target.writer.open_fill_bytes().max(PAGE);
    let before = fill(target);
    target.write(0, &[1, 2]);
    target.checkpoint("before");
    target.append();
    let second = fill(target);
    lost(target);
    let third = fill(target);
    target.write(128 << 10, &[4]);
    target.checkpoint("behind");
    target.append();
    target.change(Change::Seal);
    target.drive();
    let segment = target.writer.closed_segments().next().expect("a sealed segment").clone();
    let place = |at| Site::place(segment.header.slot, at);
    let footer = place(segment.trailer.expect("sealed").data_end_bytes);
    Places { before: place(before), lost: place(second), behind: place(third), footer }
}

fn a_write(target: &mut Target<'_>) {
    target.write(64 << 10, &[3]);
    target.append();
}

fn newest(target: &mut Target<'_>) {
    target.write(4096, &[9]);
    target.checkpoint("newest");
    target.append();
}

/// What a source does after its restart.
fn full_sync(target: &mut Target<'_>, sync_id: u64) {
    target.push(|seq| Record::sync_begin(seq, 1, 0, VOLUME_BYTES, sync_id));
    target.push(|seq| Record { sync_id, ..Record::zeroes(seq, 1, 0, 0, VOLUME_BYTES) });
    target.append();
    end_sync(target, sync_id);
}

fn end_sync(target: &mut Target<'_>, sync_id: u64) {
    target.push(|seq| Record::sync_end(seq, 1, 0, VOLUME_BYTES, sync_id));
    target.append();
}

fn reader(site: &Site) -> Reader {
    Reader::open(&mut site.disk.storage(), site.journal, &Default::default()).expect("readable")
}

fn tags(site: &Site) -> Vec<String> {
    reader(site).catalogue().checkpoints().iter().map(|entry| entry.checkpoint.tag.clone()).collect()
}

/// The first byte at a place of the disk at a number.
fn read(site: &Site, seq: u64, offset_bytes: u64) -> Result<u8, ViewError> {
    let view = reader(site).view(seq)?;
    let mut bytes = vec![0; 4096];
    view.volume(0)?.read(
        &mut site.disk.storage(),
        site.journal,
        offset_bytes,
        &mut bytes,
        |_, at, into| {
            into.copy_from_slice(&site.disk.contents(site.recovery_disk)[at as usize..][..into.len()]);
            Ok(())
        },
    )?;
    Ok(bytes[0])
}

#[test]
fn what_is_before_a_gap_opens_and_what_is_behind_it_is_as_inside_a_sync() {
    let site = Site::new(8);
    let mut target = site.target();
    let places = sealed(&mut target, a_write);
    newest(&mut target);
    drop(target);
    let cut = reader(&site).catalogue().checkpoints()[0].checkpoint.cut;
    let tail = site.survey().tail;
    places.break_them(&site, &[places.lost]);

    assert_eq!(tags(&site), ["before"]);
    assert_eq!(read(&site, cut, 0).expect("before"), 1);
    // The lost one is the record behind the checkpoint's own.
    let first_seq = cut + 2;
    let gaps: Vec<Gap> = reader(&site).gaps().collect();
    assert_eq!(gaps, [Gap { first_seq, last_seq: first_seq }]);
    assert_eq!(read(&site, first_seq - 1, 0).expect("the last that is known"), 1);
    for seq in first_seq..=tail.seq {
        assert!(matches!(read(&site, seq, 0), Err(ViewError::InsideSync { .. })), "{seq}");
    }
    // Replication goes on.
    let mut target = site.target();
    assert_eq!(target.writer.durable(), tail);
    target.write(0, &[8]);
    target.append();
}

#[test]
fn a_gap_may_be_a_whole_segment_or_its_end() {
    let site = Site::new(8);
    let mut target = site.target();
    let places = sealed(&mut target, a_write);
    newest(&mut target);
    drop(target);
    places.break_them(&site, &[places.behind]);
    assert_eq!(tags(&site), ["before"]);
    let seq = reader(&site).gaps().next().expect("a gap").first_seq;
    assert_eq!(read(&site, seq - 1, 64 << 10).expect("the batch before it"), 3);
    places.break_them(&site, &[places.before, places.lost]);
    assert!(tags(&site).is_empty());
    let segment = site.survey().segments[0].clone();
    let whole = Gap { first_seq: segment.header.after.seq + 1, last_seq: segment.last().seq };
    assert_eq!(reader(&site).gaps().collect::<Vec<_>>(), [whole]);
    site.open().expect("replication goes on");
}

#[test]
fn a_full_sync_that_began_behind_a_gap_ends_it() {
    let site = Site::new(8);
    let mut target = site.target();
    let places = sealed(&mut target, a_write);
    places.break_them(&site, &[places.lost]);
    full_sync(&mut target, 21);
    newest(&mut target);
    target.change(Change::Seal);
    newest(&mut target);
    target.drive();
    assert_eq!(tags(&site), ["before", "newest", "newest"]);
    let cut = reader(&site).catalogue().checkpoints()[1].checkpoint.cut;
    assert_eq!(read(&site, cut, 4096).expect("behind the sync"), 9);
    // What was lost was written again.
    assert_eq!(read(&site, cut, 64 << 10).expect("behind the sync"), 0);
    target.promote(2);
    assert!(target.writer.bad_ranges().is_empty());
    assert_eq!(site.disk.contents(site.recovery_disk)[4096], 9);
    assert_eq!(tags(&site), ["newest"]);
}

/// The sync's end, or what it copied, may be what is lost.
#[test]
fn a_sync_that_began_before_a_gap_does_not_end_it() {
    let site = Site::new(8);
    let mut target = site.target();
    target.base_sync();
    let places = {
        target.push(|seq| Record::sync_begin(seq, 1, 0, VOLUME_BYTES, 21));
        target.append();
        let lost = target.writer.open_fill_bytes();
        a_write(&mut target);
        end_sync(&mut target, 21);
        newest(&mut target);
        target.change(Change::Seal);
        target.drive();
        let segment = target.writer.closed_segments().next().expect("sealed").clone();
        let place = |at| Site::place(segment.header.slot, at);
        let footer = place(segment.trailer.expect("sealed").data_end_bytes);
        Places { before: 0, lost: place(lost), behind: 0, footer }
    };
    assert_eq!(tags(&site), ["newest"]);
    places.break_them(&site, &[places.lost]);
    assert!(tags(&site).is_empty());
    end_sync(&mut target, 21);
    newest(&mut target);
    assert!(tags(&site).is_empty());
}

#[test]
fn a_lost_batch_of_the_target_itself_hides_nothing_but_from_a_rebuild() {
    let site = Site::new(8);
    let mut target = site.target();
    let places = sealed(&mut target, |target| {
        // An intent, in the same segment.
        target.change(Change::Seal);
        a_write(target);
        let through = target.writer.closed_segments().next().expect("closed").last;
        target.change(Change::AnnouncePromotion { through });
        target.drive();
    });
    let segment = target.writer.closed_segments().nth(1).expect("the second one").clone();
    let place = |at| Site::place(segment.header.slot, at);
    let footer = place(segment.trailer.as_ref().expect("sealed").data_end_bytes);
    let volumes: Vec<VolumeState> = target.writer.superblock().volumes.clone();
    newest(&mut target);
    drop(target);
    let rebuilt = |volumes| {
        let keys = site.keys.site().clone();
        rebuild(&mut site.disk.storage(), site.journal, None, volumes, &keys).expect("there are segments")
    };
    let before = (rebuilt(volumes.clone()), tags(&site));
    assert!(before.0.gap.is_none() && before.0.superblock.promotion_intent_seq > 0);
    // The write's batch is the first of its segment, with a payload of a page; then comes the intent.
    let intent = place(PAGE + 2 * PAGE);
    Places { footer, ..places }.break_them(&site, &[intent]);
    assert_eq!(tags(&site), before.1);
    assert_eq!(reader(&site).gaps().count(), 0);
    assert!(rebuilt(volumes).gap.is_some(), "it would take the recovery disks to be older than they are");
}

/// The intent in the open segment is behind a batch that can't be read: without superblocks nobody knows how new the recovery disks are.
#[test]
fn without_superblocks_nothing_is_opened_over_a_lost_batch_of_the_open_segment() {
    let site = Site::new(8);
    let mut target = site.target();
    sealed(&mut target, a_write);
    target.change(Change::Seal);
    a_write(&mut target);
    let through = target.writer.closed_segments().next().expect("closed").last;
    target.change(Change::AnnouncePromotion { through });
    newest(&mut target);
    let volumes: Vec<VolumeState> = target.writer.superblock().volumes.clone();
    drop(target);
    let rebuilt = || {
        let keys = site.keys.site().clone();
        let found = rebuild(&mut site.disk.storage(), site.journal, None, volumes.clone(), &keys);
        found.expect("there are segments")
    };
    let whole = rebuilt();
    assert!(whole.gap.is_none() && whole.superblock.promotion_intent_seq == through.seq);
    let open = site.survey().segments.last().expect("the open one").header.slot;
    site.zero_pages(Site::place(open, PAGE), 1);
    let survey = site.survey();
    assert!(survey.hidden.is_some(), "{:?}", survey.hidden);
    assert!(rebuilt().gap.is_some(), "it would take the recovery disks to be older than they are");
}

#[test]
fn a_promotion_over_a_gap_that_no_sync_ended_finds_out_before_it_is_announced() {
    let site = Site::new(8);
    let mut target = site.target();
    let places = sealed(&mut target, a_write);
    newest(&mut target);
    places.break_them(&site, &[places.lost]);
    let before = site.disk.contents(site.recovery_disk);
    let error = target.look(1).expect_err("nobody knows what to promote");
    assert!(matches!(error, PromotionError::Gap { number: 1, .. }), "{error}");
    assert_eq!(target.writer.superblock().promotion_intent_seq, 0);
    assert_eq!(site.disk.contents(site.recovery_disk), before);
    assert_eq!(tags(&site), ["before"]);
    // One that looks, is announced and goes on does what another one does.
    full_sync(&mut target, 21);
    newest(&mut target);
    target.change(Change::Seal);
    target.drive();
    target.look(2).expect("a sync has ended since");
    target.promote(2);
}
