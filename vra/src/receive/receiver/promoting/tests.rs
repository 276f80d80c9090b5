use std::fs::File;
use std::os::unix::fs::FileExt;

use journal::promotion::TransferSizes;
use journal::storage::Op;
use journal::writer::Limits;

use super::*;
use crate::api::{JournalId, VmId, VolumeId};
use crate::receive::VmIdentity;
use crate::receive::receiver_types::ReceiverPolicy;
use crate::view::test_journal::TestJournal;
use crate::wire::VolumeShape;

const SIZE_BYTES: u64 = 12 << 20;
/// So many are promoted.
const SEGMENTS: usize = 6;
const NOW: Now = Now { mono_us: 10_000_000, wall_us: 10_000_000 };

/// A receiver over a journal that announces a promotion of its oldest segments: the intent is durable, and nobody was told.
fn announcing(name: &str, closing: bool) -> (Receiver, TestJournal) {
    let mut journal = TestJournal::new(name, SIZE_BYTES, "{}");
    for offset_bytes in (0..SIZE_BYTES).step_by(256 << 10) {
        journal.write(offset_bytes, vec![1; 256 << 10]);
        journal.flush();
    }
    journal.checkpoint("first", 1);
    journal.flush();
    journal.change(Change::Seal);
    journal.write(0, vec![2; 4096]);
    journal.checkpoint("second", 2);
    journal.flush();
    let through = journal.writer.closed_segments().nth(SEGMENTS - 1).expect("a sealed segment").last;
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
    assert!(receiver.promotion_changed(7, NOW));
    (receiver, journal)
}

#[test]
fn what_is_announced_while_the_files_are_closed_is_left_to_the_next_opening() {
    let (mut receiver, _journal) = announcing("announcing", false);
    assert!(receiver.promotion_action(NOW).is_some(), "it is carried out");
    let (mut receiver, _journal) = announcing("announcing-closed", true);
    assert!(receiver.promoting.is_idle() && receiver.promotion_action(NOW).is_none());
}

#[test]
fn little_is_under_way_while_this_journal_or_one_beside_it_takes_writes() {
    // Bytes that a promotion reads before any of it has ended.
    let under_way = |name: &str, change: fn(&mut Receiver)| {
        let (mut receiver, journal) = announcing(name, false);
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
