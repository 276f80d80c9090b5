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

const SIZE_BYTES: u64 = 1 << 20;

/// A receiver over a journal with a sealed segment and a checkpoint behind it; with `announce` the intent to promote the segment is durable.
/// And the segment's end.
fn receiver(name: &str, announce: bool) -> (Receiver, ChainPoint) {
    let mut journal = TestJournal::new(name, SIZE_BYTES, "{}");
    journal.write(0, vec![1; 4096]);
    journal.checkpoint("first", 1);
    journal.flush();
    journal.change(Change::Seal);
    journal.write(0, vec![2; 4096]);
    let cut = journal.checkpoint("second", 2);
    journal.flush();
    let through = journal.writer.closed_segments().next().expect("a sealed segment").last;
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
    let shape =
        VolumeShape { volume: 0, id: VolumeId::random(), logical_block_bytes: 512, size_bytes: SIZE_BYTES };
    let identity = VmIdentity { vm: VmId::random(), journal: JournalId::random(), volumes: vec![shape] };
    let policy = ReceiverPolicy {
        limits: Limits::default(),
        history_us: 0,
        promotion: TransferSizes::default(),
        give_up_history: false,
        window_bytes: 1 << 20,
    };
    (Receiver::new(identity, policy, writer, events, &[false]), through)
}

/// One that waits for the announcement: the intent is durable, and nobody was told.
fn announcing(closing: bool) -> Receiver {
    let name = if closing { "announcing-closed" } else { "announcing" };
    let (mut receiver, through) = receiver(name, true);
    let promotion = Box::new(receiver.promotion(through).before_announcing());
    receiver.promoting.stage = Stage::Announcing { ticket: 7, promotion, due: Due::default() };
    if closing {
        receiver.stop_promoting();
    }
    assert!(receiver.promotion_changed(7, Now { mono_us: 1, wall_us: 1 }));
    receiver
}

#[test]
fn what_is_announced_while_the_files_are_closed_is_left_to_the_next_opening() {
    let mut receiver = announcing(false);
    assert!(receiver.promotion_action().is_some(), "it is carried out");
    let mut receiver = announcing(true);
    assert!(receiver.promoting.is_idle() && receiver.promotion_action().is_none());
}

/// The announcement alone takes away all before it.
#[test]
fn a_segment_that_nobody_knows_is_found_before_its_promotion_is_announced() {
    let (mut receiver, through) = receiver("promoting-lost", false);
    let now = Now { mono_us: 1, wall_us: 1 };
    assert_eq!(receiver.history.checkpoints().len(), 1);
    receiver.promote(now);
    // The disk has nothing but zeroes where footer and batches were.
    while let Some(PromotionAction { token, op, .. }) = receiver.promotion_action() {
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
