use journal::promotion::TransferSizes;
use journal::writer::Limits;

use super::*;
use crate::api::{JournalId, VmId, VolumeId};
use crate::receive::VmIdentity;
use crate::receive::receiver_types::ReceiverPolicy;
use crate::view::test_journal::TestJournal;
use crate::wire::VolumeShape;

const SIZE_BYTES: u64 = 1 << 20;

/// A receiver over a journal that announces a promotion of its oldest segment: the intent is durable, and nobody was told.
fn announcing(closing: bool) -> Receiver {
    let name = if closing { "announcing-closed" } else { "announcing" };
    let mut journal = TestJournal::new(name, SIZE_BYTES, "{}");
    journal.write(0, vec![1; 4096]);
    journal.checkpoint("first", 1);
    journal.flush();
    journal.change(Change::Seal);
    journal.write(0, vec![2; 4096]);
    journal.checkpoint("second", 2);
    journal.flush();
    let through = journal.writer.closed_segments().next().expect("a sealed segment").last;
    journal.change(Change::AnnouncePromotion { through });
    let writer = journal.take_writer();
    assert_eq!(writer.superblock().promotion_intent_seq, through.seq);
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
    let mut receiver = Receiver::new(identity, policy, writer, Vec::new(), &[false]);
    receiver.promoting.stage = Stage::Announcing { ticket: 7, through, due: Due::default() };
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
