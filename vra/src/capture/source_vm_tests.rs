//! A source VM's generations, numbers and store.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ublk::serve::{Disk, Geometry};

use super::modes::{Mode, OverflowReason};
use super::numbering::{ByteRange, NewWrite, Offer, Received, Wakeups};
use super::{
    CaptureLimits, ProtectedDisk, RetainedEntries, SEQUENCE_BLOCK, SequenceState, SequenceStore,
    SequenceStoreError, SourceAction, SourceAlert, SourceVm,
};
use crate::api::GenerationId;
use crate::clock::Now;
use crate::ship::{GenerationStart, Retained};

const NOW: Now = Now { mono_us: 1, wall_us: 1 };
const LIMITS: CaptureLimits =
    CaptureLimits { ring_entries: 64, dense_bytes: 1 << 16, ..CaptureLimits::STANDARD };

#[derive(Default)]
struct Store {
    state: Mutex<Option<SequenceState>>,
    fails: AtomicBool,
}

impl SequenceStore for Store {
    fn load(&self) -> Result<Option<SequenceState>, SequenceStoreError> {
        Ok(self.state.lock().expect("one thread").clone())
    }

    fn save(&self, state: &SequenceState) -> Result<(), SequenceStoreError> {
        if self.fails.load(Ordering::Relaxed) {
            let source = std::io::Error::from_raw_os_error(libc::EROFS);
            return Err(SequenceStoreError::Io { action: "write", path: "state".into(), source });
        }
        *self.state.lock().expect("one thread") = Some(state.clone());
        Ok(())
    }
}

fn disk() -> Arc<ProtectedDisk> {
    let geometry = Geometry {
        size_bytes: 1 << 20,
        logical_block_bytes: 512,
        physical_block_bytes: 512,
        volatile_cache: false,
        fua: false,
        read_only: false,
        discard: None,
        write_zeroes: None,
    };
    Arc::new(ProtectedDisk::new(File::open("/dev/null").expect("/dev/null"), geometry, Arc::new(|| 1)))
}

fn protect(store: &Arc<Store>) -> Arc<SourceVm> {
    let vm = SourceVm::protect(vec![disk()], LIMITS, store.clone(), GenerationId::random());
    Arc::new(vm.expect("memory and a store"))
}

fn tick(vm: &SourceVm) -> Vec<SourceAction> {
    vm.tick(NOW, &mut || u128::from_le_bytes(*uuid::Uuid::new_v4().as_bytes()))
}

fn stream(vm: &SourceVm) {
    vm.granted(vm.generation().generation, true);
    assert!(tick(vm).iter().any(|action| matches!(action, SourceAction::BeginSync(_))));
}

fn write(vm: &SourceVm, lane: u32, count: u64) {
    for _ in 0..count {
        let new = NewWrite { lane, token: 0, volume: 0, range: ByteRange::new(0, 512) };
        let wakeups = &mut Wakeups::default();
        match vm.core().receive(&new, &mut Offer::Zeroes, 0, wakeups) {
            Received::Issue(ticket) => vm.core().landed(ticket, true, wakeups),
            other => panic!("{other:?}"),
        };
    }
}

fn lane(vm: &SourceVm) -> u32 {
    struct NoBell;
    impl ublk::serve::Wake for NoBell {
        fn wake(&self) {}
    }
    vm.core().add_lane(Arc::new(NoBell))
}

fn begun(actions: &[SourceAction]) -> Option<&GenerationStart> {
    actions.iter().find_map(|action| match action {
        SourceAction::BeginGeneration(start) => Some(start),
        _ => None,
    })
}

#[test]
fn nothing_is_captured_before_the_grant_and_a_sync_comes_first() {
    let vm = protect(&Arc::default());
    let lane = lane(&vm);
    write(&vm, lane, 3);
    assert!(tick(&vm).is_empty());
    vm.granted(GenerationId::random(), true);
    assert!(tick(&vm).is_empty(), "a grant of another generation");
    stream(&vm);
    write(&vm, lane, 1);
    let mut records = Vec::new();
    RetainedEntries(vm.clone()).take_ready(1, usize::MAX, usize::MAX, &mut records);
    let kinds: Vec<_> = records.iter().map(|record| (record.seq, record.kind)).collect();
    use journal::batch::RecordKind::{SyncBegin, Zeroes};
    assert_eq!(kinds, [(1, SyncBegin), (2, Zeroes)]);
    assert_eq!(RetainedEntries(vm).published_through(), 2);
}

#[test]
fn each_start_is_a_generation_above_all_numbers_before() {
    let store = Arc::default();
    let first = protect(&store).generation();
    let second = protect(&store).generation();
    assert_eq!((first.first_seq, second.first_seq), (1, 1 + SEQUENCE_BLOCK));
    assert_eq!(second.ancestors, [first.generation]);
    let vm = protect(&store);
    assert_eq!(vm.generation().ancestors, [second.generation, first.generation]);
    stream(&vm);
    tick(&vm);
    assert_eq!(vm.generation().ancestors, [], "from a grant on they need not be remembered");
    let granted = vm.generation().generation;
    assert_eq!(protect(&store).generation().ancestors, [granted]);
}

#[test]
fn numbers_are_reserved_ahead_and_never_given_unreserved() {
    let store = Arc::<Store>::default();
    let vm = protect(&store);
    let lane = lane(&vm);
    let mut retained = RetainedEntries(vm.clone());
    stream(&vm);
    let give = |retained: &mut RetainedEntries, count: u64| {
        for _ in 0..count / 32 {
            write(&vm, lane, 32);
            retained.free_through(u64::MAX);
        }
    };
    give(&mut retained, SEQUENCE_BLOCK * 3 / 4);
    tick(&vm);
    let ceiling_seq = store.load().expect("kept").expect("saved").ceiling_seq;
    assert_eq!(ceiling_seq, 1 + 2 * SEQUENCE_BLOCK);
    store.fails.store(true, Ordering::Relaxed);
    give(&mut retained, SEQUENCE_BLOCK * 3 / 2);
    let reason = OverflowReason::NumbersExhausted;
    assert_eq!(vm.snapshot().mode, Mode::Overflow { from_seq: ceiling_seq, reason });
    let alerts = tick(&vm);
    assert!(
        matches!(&alerts[0], SourceAction::Alert(SourceAlert::Store(text)) if text.contains("Read-only"))
    );
    assert!(matches!(alerts[1], SourceAction::Alert(SourceAlert::Overflow { .. })));
    assert!(tick(&vm).is_empty(), "told once, and no new generation while it can't be saved");
    store.fails.store(false, Ordering::Relaxed);
    let actions = tick(&vm);
    assert_eq!(begun(&actions).expect("a new generation").first_seq, ceiling_seq);
}

#[test]
fn an_overflow_ends_in_a_new_generation_once_it_has_drained() {
    let vm = protect(&Arc::default());
    let lane = lane(&vm);
    let mut retained = RetainedEntries(vm.clone());
    stream(&vm);
    write(&vm, lane, 100);
    assert_eq!(vm.snapshot().retained_entries, 48, "three quarters of 64");
    let actions = tick(&vm);
    assert!(matches!(actions[..], [SourceAction::Alert(SourceAlert::Overflow { from_seq: 49, .. })]));
    let before = vm.generation();
    retained.free_through(47);
    assert!(begun(&tick(&vm)).is_none());
    retained.free_through(48);
    let actions = tick(&vm);
    let start = begun(&actions).expect("drained");
    assert_eq!((start.first_seq, &start.ancestors[..]), (49, &[before.generation][..]));
    assert_eq!(vm.snapshot().mode, Mode::Stopped);
    stream(&vm);
    assert_eq!(vm.snapshot().overflow_count, 1);
}

#[test]
fn a_renewal_gives_up_what_is_retained() {
    let vm = protect(&Arc::default());
    let lane = lane(&vm);
    stream(&vm);
    write(&vm, lane, 5);
    vm.renew();
    let actions = tick(&vm);
    assert_eq!(begun(&actions).expect("at once").first_seq, 7);
    assert_eq!(vm.snapshot().retained_entries, 0);
    vm.renew();
    assert!(begun(&tick(&vm)).is_some(), "also before the grant");
    assert!(begun(&tick(&vm)).is_none());
}

#[test]
fn it_is_told_since_when_nothing_is_captured() {
    let vm = SourceVm::protect(vec![disk()], LIMITS, Arc::<Store>::default(), GenerationId::random());
    let vm = vm.expect("memory and a store");
    assert_eq!(vm.snapshot().uncaptured_since_us, None, "nothing ever was");
    stream(&vm);
    let new = NewWrite { lane: lane(&vm), token: 0, volume: 0, range: ByteRange::new(0, 512) };
    let received = vm.core().receive(&new, &mut Offer::Zeroes, u64::MAX / 2, &mut Wakeups::default());
    assert!(matches!(received, Received::Issue(_)));
    assert_eq!(vm.snapshot().uncaptured_since_us, None);
    vm.unprotect();
    assert_eq!(vm.snapshot().uncaptured_since_us, Some(u64::MAX / 2), "the last number's time");
}

#[test]
fn an_unprotected_disk_is_served_on_and_can_come_back() {
    let store = Arc::<Store>::default();
    let disk = disk();
    let vm = SourceVm::protect(vec![disk.clone()], LIMITS, store.clone(), GenerationId::random())
        .expect("memory and a store");
    stream(&vm);
    vm.unprotect();
    assert!(disk.is_settled());
    assert!(matches!(vm.snapshot().mode, Mode::Overflow { reason: OverflowReason::Requested, .. }));
    let again = SourceVm::protect(vec![disk.clone()], LIMITS, store, GenerationId::random());
    let again = again.expect("memory and a store");
    assert_eq!(again.generation().ancestors.first(), Some(&vm.generation().generation));
    assert_eq!(disk.geometry().size_bytes, 1 << 20);
    stream(&again);
}
