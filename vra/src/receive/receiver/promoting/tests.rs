use std::fs::File;
use std::os::unix::fs::FileExt;

use journal::batch::{Checkpoint, CheckpointKind, Epoch, Record};
use journal::format::FooterEvent;
use journal::promotion::TransferSizes;
use journal::storage::Op;
use journal::writer::Limits;
use uuid::Uuid;

use super::*;
use crate::api::{JournalId, VmId, VolumeId};
use crate::receive::VmIdentity;
use crate::receive::receiver_types::ReceiverPolicy;
use crate::view::test_journal::TestJournal;
use crate::wire::VolumeShape;

const SIZE_BYTES: u64 = 12 << 20;
const NOW: Now = Now { mono_us: 10_000_000, wall_us: 10_000_000 };

/// A receiver over a journal with so many sealed segments, and a checkpoint behind them; with `announce` the intent to promote them is durable.
/// And the end of the last one.
fn receiver(name: &str, segments: usize, announce: bool) -> (Receiver, ChainPoint, TestJournal) {
    let mut journal = TestJournal::new(name, SIZE_BYTES, "{}");
    journal.write(0, vec![1; 4096]);
    journal.flush();
    for offset_bytes in (0..SIZE_BYTES).step_by(256 << 10) {
        if journal.writer.closed_segments().count() + 1 < segments {
            journal.write(offset_bytes, vec![1; 256 << 10]);
            journal.flush();
        }
    }
    journal.checkpoint("first", 1);
    journal.flush();
    journal.change(Change::Seal);
    journal.write(0, vec![2; 4096]);
    let cut = journal.checkpoint("second", 2);
    journal.flush();
    assert_eq!(journal.writer.closed_segments().count(), segments);
    let through = journal.writer.closed_segments().last().expect("a sealed segment").last;
    if announce {
        journal.change(Change::AnnouncePromotion { through });
    }
    let writer = journal.take_writer();
    assert_eq!(writer.superblock().promotion_intent_seq, if announce { through.seq } else { 0 });
    let epoch = Epoch { nonce: Uuid::from_u128(7), counter: 1 };
    let (kind, tag) = (CheckpointKind::Automatic, String::new());
    let checkpoint = Checkpoint { epoch, cut, member_set_version: 1, time_us: 2, kind, tag };
    let record = Record::checkpoint(cut + 1, 1, &checkpoint);
    let events = vec![FooterEvent { position_seq: record.seq, record }];
    let shape = VolumeShape {
        volume: 0,
        id: VolumeId::random(),
        logical_block_bytes: 512,
        size_bytes: SIZE_BYTES,
        left: false,
    };
    let identity = VmIdentity { vm: VmId::random(), journal: JournalId::random(), volumes: vec![shape] };
    let policy = ReceiverPolicy {
        limits: Limits::default(),
        history_us: 0,
        promotion: TransferSizes::default(),
        give_up_history: false,
        window_bytes: 1 << 20,
    };
    (Receiver::new(identity, policy, writer, events, &[false]), through, journal)
}

/// One that waits for the announcement: the intent is durable, and nobody was told.
fn announcing(name: &str, segments: usize, closing: bool) -> (Receiver, TestJournal) {
    let (mut receiver, through, journal) = receiver(name, segments, true);
    let promotion = Box::new(receiver.promotion(through).before_announcing());
    receiver.promoting.stage = Stage::Announcing { ticket: 7, promotion, due: Due::default() };
    if closing {
        receiver.stop_promoting();
    }
    assert!(receiver.promotion_changed(7, NOW));
    (receiver, journal)
}

#[test]
fn what_is_announced_while_the_files_are_closed_is_left_to_the_next_opening() {
    let (mut receiver, _journal) = announcing("announcing", 1, false);
    assert!(receiver.promotion_action(NOW).is_some(), "it is carried out");
    let (mut receiver, _journal) = announcing("announcing-closed", 1, true);
    assert!(receiver.promoting.is_idle() && receiver.promotion_action(NOW).is_none());
}

#[test]
fn little_is_under_way_while_this_journal_or_one_beside_it_takes_writes() {
    const SEGMENTS: usize = 6;
    // Bytes that a promotion reads before any of it has ended.
    let under_way = |name: &str, change: fn(&mut Receiver)| {
        let (mut receiver, journal) = announcing(name, SEGMENTS, false);
        let file = File::open(journal.path()).expect("the journal");
        for _ in 0..SEGMENTS {
            let footer = receiver.promotion_action(NOW).expect("the footers come first");
            let Op::Read { offset_bytes, mut buffer } = footer.op else { panic!("they are read") };
            file.read_exact_at(&mut buffer, offset_bytes).expect("read");
            receiver.promotion_done(footer.token, Ok(Some(buffer)), NOW);
        }
        change(&mut receiver);
        let mut bytes = 0;
        while let Some(action) = receiver.promotion_action(NOW) {
            let Op::Read { buffer, .. } = action.op else { panic!("nothing was read yet") };
            bytes += buffer.len();
        }
        bytes
    };
    let quiet = under_way("quiet", |_| {});
    let busy = under_way("busy", |receiver| receiver.last_append_us = NOW.mono_us - BUSY_US / 2);
    let beside = under_way("beside", |receiver| receiver.note_neighbours_append(NOW.mono_us - BUSY_US / 2));
    let waits_for_room = under_way("waits", |receiver| {
        receiver.last_append_us = NOW.mono_us;
        receiver.full = true;
    });
    assert!(0 < busy && busy * 2 <= quiet, "{busy} bytes and {quiet}");
    assert_eq!((beside, waits_for_room), (busy, quiet));
}

/// The announcement alone takes away all before it.
#[test]
fn a_segment_that_nobody_knows_is_found_before_its_promotion_is_announced() {
    let (mut receiver, through, _journal) = receiver("promoting-lost", 1, false);
    let now = Now { mono_us: 1, wall_us: 1 };
    assert_eq!(receiver.history.checkpoints().len(), 1);
    // Not at the first try: a disk may fail for a while.
    receiver.promoting.lost_failures = LOST_AFTER - 1;
    receiver.promote(now);
    // The disk has nothing but zeroes where footer and batches were.
    while let Some(PromotionAction { token, op, .. }) = receiver.promotion_action(now) {
        let Op::Read { buffer, .. } = op else { panic!("it only looks") };
        receiver.promotion_done(token, Ok(Some(buffer)), now);
    }
    assert_eq!(receiver.writer.superblock().promotion_intent_seq, 0);
    assert!(receiver.writer.is_idle(), "nothing is to be announced");
    let is_stuck = |output: &ReceiverOutput| {
        let ReceiverOutput::Event(ReceiverEvent::PromotionStuck { error }) = output else { return false };
        matches!(error, PromotionError::Gap { last_seq, .. } if *last_seq == through.seq)
    };
    assert!(receiver.outputs.iter().any(is_stuck));
    assert!(receiver.history.checkpoints().is_empty(), "nothing behind it counts any more");
}

/// Views get the time to make way before the sender is told that the journal is full.
#[test]
fn a_full_journal_waits_a_while_for_views_to_make_way() {
    let (mut receiver, through, _journal) = receiver("promoting-view", 1, false);
    receiver.policy.history_us = u64::MAX / 2;
    receiver.pins.view = Some(1);
    (receiver.full, receiver.full_told) = (true, Some(false));
    let later = |by_us: u64| Now { mono_us: NOW.mono_us + by_us, wall_us: NOW.wall_us + by_us };
    let told_full = |receiver: &Receiver| {
        receiver
            .outputs
            .iter()
            .any(|output| matches!(output, ReceiverOutput::Event(ReceiverEvent::Full { .. })))
    };
    receiver.promote(NOW);
    receiver.promote(later(VIEW_PATIENCE_US - 1));
    let is_told = |output: &&ReceiverOutput| {
        let ReceiverOutput::Event(ReceiverEvent::ViewInTheWay { through_seq }) = output else { return false };
        *through_seq == Some(through.seq)
    };
    assert_eq!(receiver.outputs.iter().filter(is_told).count(), 1);
    assert!(!told_full(&receiver));
    receiver.promote(later(VIEW_PATIENCE_US));
    assert!(told_full(&receiver), "not for ever");

    // A view that has made way is not waited for, and the next one gets the same time.
    receiver.outputs.clear();
    receiver.pins.view = None;
    receiver.full_told = Some(false);
    receiver.promote(later(VIEW_PATIENCE_US));
    assert!(matches!(receiver.promoting.stage, Stage::Looking { .. }), "{:?}", receiver.promoting.stage);
    assert!(!told_full(&receiver));
}
