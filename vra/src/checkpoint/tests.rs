//! Group checkpoints over real cores.

use std::sync::Arc;
use std::time::{Duration, Instant};

use journal::batch::{Checkpoint, CheckpointKind, Epoch, RecordKind};
use ublk::serve::Wake;
use uuid::Uuid;

use super::*;
use crate::api::{VmId, VpgId};
use crate::capture::modes::{HoldRefusal, OverflowReason, PublishRefusal};
use crate::capture::numbering::{
    ByteRange, Consumer, CoreLimits, NewWrite, Offer, Received, Ticket, VmCore, Wakeups, ring,
};
use crate::clock::Now;

struct NoBell;

impl Wake for NoBell {
    fn wake(&self) {}
}

pub(super) struct Vm {
    pub(super) member: Member,
    consumer: Consumer,
    lane: u32,
}

impl Vm {
    pub(super) fn new(number: u128) -> Self {
        let (producer, consumer) = ring(256, 1);
        let limits = CoreLimits { writes_in_flight: 16, retained_bytes: 1 << 20 };
        let core = Arc::new(VmCore::new(producer, limits, 1, 1 << 20));
        core.with(|core, _| {
            core.add_volume();
            core.start_streaming().expect("an empty ring");
        });
        let lane = core.add_lane(Arc::new(NoBell));
        Self {
            member: Member { vm: VmId(Uuid::from_u128(number)), core, freeze: Freeze::default() },
            consumer,
            lane,
        }
    }

    pub(super) fn write(&self) -> Ticket {
        let range = ByteRange::new(512 * self.member.core.with(|core, _| core.numbers().0), 512);
        let new = NewWrite { lane: self.lane, token: 0, volume: 0, range };
        match self.member.core.receive(&new, &mut Offer::Zeroes, 0, &mut Wakeups::default()) {
            Received::Issue(ticket) | Received::Wait(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }

    /// Whether the write's completion is held.
    pub(super) fn lands_held(&self, ticket: Ticket) -> bool {
        self.member.core.landed(ticket, true, &mut Wakeups::default()).held
    }

    pub(super) fn checkpoints(&mut self) -> Vec<(u64, Checkpoint)> {
        let mut found = Vec::new();
        self.consumer.walk(0, |entry| {
            if entry.kind == RecordKind::Checkpoint {
                let body = entry.payload.to_bytes();
                found.push((entry.seq, Checkpoint::decode(&body).expect("a checkpoint")));
            }
            true
        });
        found
    }
}

fn at(mono_us: u64) -> Now {
    Now { mono_us, wall_us: 5_000_000 + mono_us }
}

fn checkpoint() -> Checkpoint {
    Checkpoint {
        epoch: Epoch { nonce: Uuid::from_u128(9), counter: 4 },
        cut: 0,
        member_set_version: 3,
        time_us: 77,
        kind: CheckpointKind::Tagged,
        tag: "before".into(),
    }
}

#[test]
fn each_member_writes_the_epoch_with_its_own_cut_even_without_writes() {
    let (mut busy, mut idle) = (Vm::new(1), Vm::new(2));
    busy.write();
    busy.write();
    let members = [busy.member.clone(), idle.member.clone()];
    let hold = LocalHold::begin(&members, at(0), 100, &mut |_| {}).expect("both stream");
    let above = busy.write();
    let taken = hold.release(&checkpoint(), at(40)).expect("in time");
    assert!(!busy.lands_held(above), "released");
    let parts: Vec<(u64, u64)> = taken.members.iter().map(|member| (member.cut, member.seq)).collect();
    assert_eq!((parts, taken.held_us), (vec![(2, 4), (0, 1)], 40));
    assert_eq!(busy.checkpoints(), [(4, Checkpoint { cut: 2, ..checkpoint() })]);
    assert_eq!(idle.checkpoints(), [(1, Checkpoint { cut: 0, ..checkpoint() })]);
}

#[test]
fn a_member_that_is_not_streaming_or_in_a_sync_aborts_the_epoch_at_once() {
    let (mut ready, other) = (Vm::new(1), Vm::new(2));
    let members = [ready.member.clone(), other.member.clone()];
    let sync =
        |sync_id| other.member.core.with(|core, wakeups| core.begin_sync(sync_id, &[(0, 512)], 0, wakeups));
    sync(1).expect("streaming");
    let refused = LocalHold::begin(&members, at(0), 100, &mut |_| {}).err();
    let vm = other.member.vm;
    assert_eq!(refused, Some(CheckpointRefusal::Hold { vm, refusal: HoldRefusal::InSync }));
    let ticket = ready.write();
    assert!(!ready.lands_held(ticket), "the first member is not left held");
    other.member.core.with(|core, wakeups| core.overflow(OverflowReason::Requested, wakeups));
    let refused = LocalHold::begin(&members, at(0), 100, &mut |_| {}).err();
    assert_eq!(refused, Some(CheckpointRefusal::Hold { vm, refusal: HoldRefusal::NotStreaming }));
    assert_eq!(ready.checkpoints(), []);
}

#[test]
fn past_its_deadline_a_member_writes_nothing() {
    let mut vm = Vm::new(1);
    let mut held = None;
    let hold = LocalHold::begin(&[vm.member.clone()], at(0), 100, &mut |epoch| held = Some(epoch.clone()))
        .expect("streaming");
    let ticket = vm.write();
    let held = held.expect("watched");
    assert!(!held.expire_if_due(at(99)));
    assert!(held.expire_if_due(at(105)));
    assert_eq!(hold.held_us(at(400)), 105, "held until it was let go");
    assert!(!vm.lands_held(ticket));
    let refused = hold.release(&checkpoint(), at(100));
    let vm_id = vm.member.vm;
    assert_eq!(refused, Err(CheckpointRefusal::Commit { vm: vm_id, refusal: CommitRefusal::Expired }));
    assert_eq!(vm.checkpoints(), []);
}

#[test]
fn an_overflow_during_the_hold_leaves_no_record() {
    let mut vm = Vm::new(1);
    let hold = LocalHold::begin(&[vm.member.clone()], at(0), 100, &mut |_| {}).expect("streaming");
    vm.member.core.with(|core, wakeups| core.overflow(OverflowReason::Requested, wakeups));
    let refusal = CommitRefusal::NotPublished(PublishRefusal::NotStreaming);
    let expected = CheckpointRefusal::Commit { vm: vm.member.vm, refusal };
    assert_eq!(hold.release(&checkpoint(), at(1)), Err(expected));
    assert_eq!(vm.checkpoints(), []);
}

#[test]
fn a_guest_that_is_frozen_only_after_its_cut_gives_no_application_checkpoint() {
    let mut vm = Vm::new(1);
    let freeze = vm.member.freeze.clone();
    freeze.set_agent(true);
    let application = Checkpoint { kind: CheckpointKind::Application, ..checkpoint() };
    let until = Instant::now() + Duration::from_secs(60);
    // The hold is watched once its cut was taken.
    let hold = LocalHold::begin(&[vm.member.clone()], at(0), 100, &mut |_| freeze.begin(until));
    let refused = hold.expect("streaming").release(&application, at(1));
    assert_eq!(refused, Err(CheckpointRefusal::NotFrozen { vm: vm.member.vm }));
    assert_eq!(vm.checkpoints(), []);
    let hold = LocalHold::begin(&[vm.member.clone()], at(2), 100, &mut |_| {}).expect("streaming");
    hold.release(&application, at(3)).expect("frozen all along");
    assert_eq!(vm.checkpoints().len(), 1);
}

#[test]
fn commit_and_expiry_never_both_win() {
    let mut vm = Vm::new(1);
    let mut committed = 0;
    for round in 0..1000 {
        let held = HeldEpoch::begin(vm.member.core.clone(), 100).expect("streaming");
        let commit = || held.commit(&checkpoint(), at(0)).is_ok();
        // The thread that is spawned comes late as a rule: each side gets its turn.
        let (won, expired) = std::thread::scope(|scope| {
            if round % 2 == 0 {
                let expiry = scope.spawn(|| held.expire());
                (commit(), expiry.join().expect("no panic"))
            } else {
                let won = scope.spawn(commit);
                let expired = held.expire();
                (won.join().expect("no panic"), expired)
            }
        });
        assert_ne!(won, expired);
        committed += usize::from(won);
        assert_eq!(vm.checkpoints().len(), usize::from(won));
        vm.consumer.free_through(u64::MAX);
        assert!(!vm.member.core.is_holding());
    }
    assert!(0 < committed && committed < 1000, "both sides win at times: {committed}");
}

#[test]
fn the_checkpointer_takes_them_by_the_clock_and_on_request() {
    let (mut first, second) = (Vm::new(1), Vm::new(2));
    let checkpointer = Checkpointer::start(Uuid::from_u128(5)).expect("threads");
    let vpg = VpgId::random();
    assert_eq!(checkpointer.take(vpg, CheckpointKind::Tagged, "x").err(), Some(CheckpointRefusal::NoMembers));
    let settings = GroupSettings {
        members: vec![first.member.clone(), second.member.clone()],
        interval_us: 10_000,
        deadline_us: HOLD_DEADLINE_US,
        member_set_version: 2,
    };
    checkpointer.set_group(vpg, settings);
    // A machine that is busy enough may let a hold expire; the next one is as good.
    let taken = std::iter::repeat_with(|| checkpointer.take(vpg, CheckpointKind::Tagged, "by hand"))
        .take(50)
        .find_map(Result::ok)
        .expect("one of fifty");
    assert_eq!((taken.tag.as_str(), taken.kind), ("by hand", CheckpointKind::Tagged));
    let patience = Instant::now() + Duration::from_secs(20);
    while checkpointer.status(vpg).is_some_and(|status| status.hold.count < 3) {
        assert!(Instant::now() < patience, "the clock takes some");
        std::thread::sleep(Duration::from_millis(2));
    }
    checkpointer.remove_group(vpg);
    assert!(checkpointer.status(vpg).is_none());
    drop(checkpointer);
    let found = first.checkpoints();
    assert!(found.iter().any(|(_, checkpoint)| checkpoint.kind == CheckpointKind::Automatic));
    assert!(found.iter().all(|(_, checkpoint)| checkpoint.epoch.nonce == Uuid::from_u128(5)));
    let counters: Vec<u64> = found.iter().map(|(_, checkpoint)| checkpoint.epoch.counter).collect();
    assert!(counters.is_sorted_by(|a, b| a < b), "{counters:?}");
}

#[test]
fn the_second_thread_lets_a_forgotten_hold_expire() {
    let vm = Vm::new(1);
    let checkpointer = Checkpointer::start(Uuid::from_u128(5)).expect("threads");
    let hold = checkpointer.hold(std::slice::from_ref(&vm.member), 5_000).expect("streaming");
    let ticket = vm.write();
    let held = vm.lands_held(ticket);
    let patience = Instant::now() + Duration::from_secs(20);
    while vm.member.core.is_holding() {
        assert!(Instant::now() < patience, "it expires by itself");
        std::thread::sleep(Duration::from_millis(1));
    }
    if held {
        assert!(vm.member.core.complete_held(ticket, &mut Wakeups::default()));
    }
    assert!(hold.release(&checkpoint(), at(1 << 40)).is_err());
}
