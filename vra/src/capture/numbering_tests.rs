//! The numbering core, one thread at a time: against a model, and killed at every step of a publication.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use journal::batch::RecordKind;
use proptest::prelude::*;
use ublk::arena::Arena;
use ublk::serve::Wake;

use super::modes::{HoldRefusal, Mode, OverflowReason, PublishRefusal};
use super::numbering::{
    ByteRange, Consumer, CoreLimits, Drained, NewWrite, Offer, Received, Ticket, VmCore, Wakeups, ring,
};
use super::payload::{DENSE_CHUNK_BYTES, DenseWriter};
use crate::planted::{Planted, Step, kill_at, plant};

#[derive(Default)]
struct Count(AtomicU64);

impl Wake for Count {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn core(ring_entries: usize, limits: CoreLimits) -> (VmCore, Consumer, u32) {
    let (producer, consumer) = ring(ring_entries, 1);
    let core = VmCore::new(producer, limits, 1, 1 << 20);
    let lane = core.add_lane(Arc::new(Count::default()));
    core.with(|core, _| {
        core.add_volume();
        core.start_streaming().expect("an empty ring");
    });
    (core, consumer, lane)
}

const LIMITS: CoreLimits = CoreLimits { writes_in_flight: 16, retained_bytes: 1 << 20 };

fn receive(core: &VmCore, lane: u32, token: u64, start: u64, len: u64, mut offer: Offer) -> Received {
    let new = NewWrite { lane, token, volume: 0, range: ByteRange::new(start, len) };
    core.receive(&new, &mut offer, 0, &mut Wakeups::default())
}

fn issue(core: &VmCore, lane: u32, token: u64, start: u64) -> Ticket {
    match receive(core, lane, token, start, 512, Offer::Zeroes) {
        Received::Issue(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

fn numbers(consumer: &mut Consumer) -> Vec<(u64, RecordKind)> {
    let mut found = Vec::new();
    consumer.walk(0, |entry| {
        found.push((entry.seq, entry.kind));
        true
    });
    found
}

#[test]
fn a_full_ring_overflows_at_one_number_and_streams_again_once_it_is_drained() {
    let (core, mut consumer, lane) = core(16, LIMITS);
    let tickets: Vec<Ticket> = (0..14).map(|n| issue(&core, lane, n, n * 512)).collect();
    let from_seq = 13;
    let overflowed = Mode::Overflow { from_seq, reason: OverflowReason::RingFull };
    assert_eq!(core.with(|core, _| core.mode()), overflowed, "a quarter is kept for control records");
    assert_eq!(numbers(&mut consumer).len(), 12);
    assert!(!core.is_capturing());
    assert_eq!(core.with(|core, _| core.start_streaming()), Err(PublishRefusal::NotDrained));
    assert_eq!(consumer.free_through(u64::MAX), 12);
    assert_eq!(core.with(|core, _| core.start_streaming()), Ok(13), "numbers go on");
    for ticket in tickets {
        core.landed(ticket, true, &mut Wakeups::default());
    }
    issue(&core, lane, 99, 0);
    assert_eq!(numbers(&mut consumer), [(13, RecordKind::Zeroes)]);
}

#[test]
fn memory_numbers_and_missing_slots_overflow_too() {
    for (limits, ceiling, offer, expected) in [
        (CoreLimits { retained_bytes: 4095, ..LIMITS }, 100, None, OverflowReason::MemoryFull),
        (LIMITS, 100, Some(Offer::NoMemory), OverflowReason::MemoryFull),
        (LIMITS, 1, None, OverflowReason::NumbersExhausted),
    ] {
        let (producer, _consumer) = ring(64, 1);
        let core = VmCore::new(producer, limits, 1, ceiling);
        let lane = core.add_lane(Arc::new(Count::default()));
        core.with(|core, _| {
            core.add_volume();
            core.start_streaming().expect("an empty ring");
        });
        let arena = Arena::new(DENSE_CHUNK_BYTES, 1).expect("arena");
        let piece = DenseWriter::new(arena).copy(&[7; 4096]).expect("room");
        let received = receive(&core, lane, 0, 0, 4096, offer.unwrap_or(Offer::Data(piece)));
        assert!(matches!(received, Received::Issue(_)), "the guest's write goes on");
        let mode = core.with(|core, _| core.mode());
        assert_eq!(mode, Mode::Overflow { from_seq: 1, reason: expected });
    }
}

#[test]
fn a_failed_local_write_ends_the_capture() {
    let (core, mut consumer, lane) = core(64, LIMITS);
    let ticket = issue(&core, lane, 0, 0);
    core.landed(ticket, false, &mut Wakeups::default());
    let reason = OverflowReason::LocalWriteError;
    assert_eq!(core.with(|core, _| core.mode()), Mode::Overflow { from_seq: 2, reason });
    issue(&core, lane, 1, 0);
    assert_eq!(numbers(&mut consumer).len(), 1);
}

#[test]
fn a_long_write_takes_several_numbers_in_a_row() {
    let (core, mut consumer, lane) = core(64, LIMITS);
    assert!(matches!(receive(&core, lane, 0, 4096, 5 << 29, Offer::Zeroes), Received::Issue(_)));
    let mut ranges = Vec::new();
    consumer.walk(0, |entry| {
        ranges.push((entry.offset_bytes, entry.len_bytes));
        true
    });
    assert_eq!(ranges, [(4096, 1 << 30), (4096 + (1 << 30), 1 << 30), (4096 + (2 << 30), 1 << 29)]);
}

#[test]
fn a_full_set_defers_before_a_number_is_taken() {
    let (core, mut consumer, lane) = core(64, CoreLimits { writes_in_flight: 1, ..LIMITS });
    let ticket = issue(&core, lane, 0, 0);
    assert_eq!(receive(&core, lane, 1, 512, 512, Offer::Zeroes), Received::Deferred);
    assert_eq!(numbers(&mut consumer).len(), 1);
    let mut drained = Drained::default();
    core.drain(lane, &mut drained);
    assert!(!drained.retry);
    core.landed(ticket, true, &mut Wakeups::default());
    core.drain(lane, &mut drained);
    assert!(drained.retry);
}

#[test]
fn a_hold_holds_what_lies_above_its_cut() {
    let (core, mut consumer, lane) = core(64, LIMITS);
    let wakeups = &mut Wakeups::default();
    let below = issue(&core, lane, 0, 0);
    assert_eq!(core.hold(9), Ok(1));
    assert_eq!(core.hold(10), Err(HoldRefusal::AlreadyHolding));
    let above = issue(&core, lane, 1, 512);
    assert!(!core.landed(below, true, wakeups).held);
    assert!(core.landed(above, true, wakeups).held);
    assert!(core.read_is_held(lane, 0, ByteRange::new(0, 4096)));
    assert!(!core.read_is_held(lane, 0, ByteRange::new(0, 512)), "it saw nothing above the cut");
    assert_eq!(core.commit(8, Bytes::new(), 0), Err(PublishRefusal::NotStreaming), "another epoch");
    assert_eq!(core.commit(9, Bytes::from_static(b"x"), 0), Ok(3));
    core.release(9);
    let mut drained = Drained::default();
    core.drain(lane, &mut drained);
    assert!(drained.recheck_held);
    assert!(core.complete_held(above, wakeups));
    assert_eq!(numbers(&mut consumer)[2], (3, RecordKind::Checkpoint));
    assert!(core.with(|core, _| core.is_idle(0)));
}

#[test]
fn an_overflow_ends_a_hold_without_its_record() {
    let (core, mut consumer, lane) = core(64, LIMITS);
    core.hold(9).expect("streaming");
    let above = issue(&core, lane, 0, 0);
    assert!(core.landed(above, true, &mut Wakeups::default()).held);
    receive(&core, lane, 1, 512, 512, Offer::NoMemory);
    assert_eq!(core.commit(9, Bytes::new(), 0), Err(PublishRefusal::NotStreaming));
    assert!(core.complete_held(above, &mut Wakeups::default()));
    assert_eq!(numbers(&mut consumer).len(), 1);
}

#[test]
fn a_closed_volume_sends_its_writes_elsewhere() {
    let (core, _consumer, lane) = core(64, LIMITS);
    let ticket = issue(&core, lane, 0, 0);
    core.with(|core, wakeups| core.close_volume(0, wakeups));
    assert_eq!(receive(&core, lane, 1, 0, 512, Offer::Zeroes), Received::Moved);
    assert!(!core.with(|core, _| core.is_idle(0)));
    core.landed(ticket, true, &mut Wakeups::default());
    assert!(core.with(|core, _| core.is_idle(0)));
}

#[test]
fn the_doorbell_rings_for_publications_and_changes_of_mode() {
    let (core, _consumer, lane) = core(64, LIMITS);
    let count = Arc::new(Count::default());
    core.set_doorbell(count.clone());
    let ticket = issue(&core, lane, 0, 0);
    assert_eq!(count.0.load(Ordering::Relaxed), 1);
    core.landed(ticket, true, &mut Wakeups::default());
    assert_eq!(count.0.load(Ordering::Relaxed), 1);
    receive(&core, lane, 1, 0, 512, Offer::NoMemory);
    assert_eq!(count.0.load(Ordering::Relaxed), 2, "overflow");
    issue(&core, lane, 2, 512);
    assert_eq!(count.0.load(Ordering::Relaxed), 2, "nothing is captured any more");
}

/// Kills a lane's thread at `step` of its second write. Returns what the consumer finds afterwards, in order without gap.
fn killed_at(step: Step) -> Vec<(u64, RecordKind)> {
    let (core, mut consumer, lane) = core(64, LIMITS);
    issue(&core, lane, 0, 0);
    kill_at(step);
    let death = catch_unwind(AssertUnwindSafe(|| receive(&core, lane, 1, 512, 512, Offer::Zeroes)));
    assert!(death.is_err());
    assert_eq!(core.with(|core, _| core.mode()), Mode::Lost);
    issue(&core, lane, 2, 4096);
    assert_eq!(core.with(|core, _| core.start_streaming()), Err(PublishRefusal::NotStreaming));
    assert_eq!(core.with(|core, _| core.numbers().0), 3, "no number is taken any more");
    numbers(&mut consumer)
}

#[test]
fn killed_at_any_step_every_number_is_published_or_void() {
    for step in [Step::NumberTaken, Step::RangeInserted, Step::EntryStored] {
        assert_eq!(killed_at(step), [(1, RecordKind::Zeroes), (2, RecordKind::Void)], "{step:?}");
    }
    assert_eq!(killed_at(Step::WordStored), [(1, RecordKind::Zeroes), (2, RecordKind::Zeroes)]);
}

#[test]
fn a_word_stored_before_its_entry_is_caught() {
    plant(Some(Planted::WordBeforeEntry));
    let found = killed_at(Step::EntryStored);
    plant(None);
    assert_eq!(found, [(1, RecordKind::Zeroes)], "number 2 looks published and never comes");
}

#[derive(Clone, Debug)]
enum Act {
    Write { lane: u32, start: u64, len: u64 },
    Land(prop::sample::Index),
    Hold,
    Commit,
    Release,
    Ship,
    Free,
    Restart,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (0..3_u32, 0..12_u64, 1..6_u64).prop_map(|(lane, start, len)| Act::Write { lane, start, len }),
        6 => any::<prop::sample::Index>().prop_map(Act::Land),
        1 => Just(Act::Hold),
        1 => Just(Act::Commit),
        1 => Just(Act::Release),
        2 => Just(Act::Ship),
        2 => Just(Act::Free),
        1 => Just(Act::Restart),
    ]
}

proptest! {
    /// Any order of arrivals, landings, holds, shipping and overflows: the stream has no gap, holds exactly the captured
    /// writes in the order in which the disk took overlapping ones, and nothing above a cut completes while it is held.
    #[test]
    fn the_core_agrees_with_its_model(acts in prop::collection::vec(act(), 1..300)) {
        let (core, mut consumer, first_lane) = core(16, CoreLimits { writes_in_flight: 8, ..LIMITS });
        let wakeups = &mut Wakeups::default();
        let lanes = [first_lane, core.add_lane(Arc::new(Count::default())), core.add_lane(Arc::new(Count::default()))];
        let arena = Arena::new(DENSE_CHUNK_BYTES, 8).expect("arena");
        let mut writer = DenseWriter::new(arena);
        let (mut disk, mut target) = ([0_u64; 20], [0_u64; 20]);
        // (ticket, id, start, len, number or 0)
        let mut issued: Vec<(Ticket, u64, u64, u64, u64)> = Vec::new();
        let mut waiting = issued.clone();
        let mut held: VecDeque<(Ticket, u64)> = VecDeque::new();
        let (mut next_id, mut cut, mut shipped, mut in_sync_with_disk) = (1_u64, None, 0, true);
        for act in acts {
            let next_seq = core.with(|core, _| core.numbers().0);
            match act {
                Act::Write { lane, start, len } => {
                    let (id, lane) = (next_id, lanes[lane as usize]);
                    let data: Vec<u8> = id.to_le_bytes().repeat(len as usize * 64);
                    let offer = writer.copy(&data).map_or(Offer::NoMemory, Offer::Data);
                    let received = receive(&core, lane, id, start * 512, len * 512, offer);
                    let number = core.with(|core, _| core.numbers().0 - 1);
                    let number = if number >= next_seq { number } else { 0 };
                    in_sync_with_disk &= number > 0 || received == Received::Deferred;
                    match received {
                        Received::Issue(ticket) => issued.push((ticket, id, start, len, number)),
                        Received::Wait(ticket) => waiting.push((ticket, id, start, len, number)),
                        Received::Deferred => prop_assert_eq!(issued.len() + waiting.len() + held.len(), 8),
                        other => prop_assert!(false, "{:?}", other),
                    }
                    next_id += 1;
                }
                Act::Land(which) if !issued.is_empty() => {
                    let (ticket, id, start, len, number) = issued.remove(which.index(issued.len()));
                    disk[start as usize..(start + len) as usize].fill(id);
                    let landed = core.landed(ticket, true, wakeups);
                    prop_assert_eq!(landed.held, cut.is_some_and(|cut| number > cut));
                    if landed.held {
                        held.push_back((ticket, number));
                    }
                    for lane in lanes {
                        let mut drained = Drained::default();
                        core.drain(lane, &mut drained);
                        for id in drained.ready {
                            let at = waiting.iter().position(|write| write.1 == id).expect("waits");
                            issued.push(waiting.remove(at));
                        }
                    }
                }
                Act::Hold => match core.hold(3) {
                    Ok(found) => {
                        prop_assert_eq!(found, next_seq - 1);
                        prop_assert!(cut.replace(found).is_none());
                    }
                    Err(HoldRefusal::AlreadyHolding) => prop_assert!(cut.is_some()),
                    Err(HoldRefusal::NotStreaming) => prop_assert!(!core.is_capturing()),
                    Err(HoldRefusal::InSync) => prop_assert!(false),
                },
                Act::Commit => {
                    let committed = core.commit(3, Bytes::from_static(b"c"), 0);
                    prop_assert!(cut.is_some() || committed.is_err());
                }
                Act::Release => core.release(3),
                Act::Ship => {
                    shipped = consumer.walk(shipped + 1, |entry| {
                        if entry.kind == RecordKind::Write {
                            let record = entry.to_record();
                            let id = u64::from_le_bytes(record.payload[..8].try_into().expect("eight"));
                            let (start, len) = (entry.offset_bytes / 512, entry.len_bytes / 512);
                            target[start as usize..(start + len) as usize].fill(id);
                        }
                        true
                    }) - 1;
                    prop_assert_eq!(shipped, core.with(|core, _| core.numbers().0 - 1), "no gap");
                }
                Act::Free => { consumer.free_through(shipped); }
                Act::Restart => { let _ = core.with(|core, _| core.start_streaming()); }
                Act::Land(_) => {}
            }
            if !core.is_holding() {
                cut = None;
                for (ticket, _) in held.drain(..) {
                    prop_assert!(core.complete_held(ticket, wakeups));
                }
            }
            for (ticket, number) in &held {
                prop_assert!(*number > cut.expect("held only during a hold"));
                prop_assert!(!core.complete_held(*ticket, wakeups));
            }
            let all_landed = issued.is_empty() && waiting.is_empty();
            if all_landed && in_sync_with_disk && shipped == core.with(|core, _| core.numbers().0 - 1) {
                prop_assert_eq!(target, disk);
            }
        }
    }
}
