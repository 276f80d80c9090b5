use std::time::Duration;

use journal::bad_ranges::BadRange;

use super::*;
use crate::api::vpg::CheckpointKind;
use crate::receive::receiver_types::ReceiverEvent;
use crate::receive::test_pair::{Datastore, NONCE, Source, Target, definition};

fn id(counter: u64) -> crate::api::CheckpointId {
    crate::api::CheckpointId { nonce: NONCE, counter }
}

/// A VM with two checkpoints.
async fn pair(name: &str) -> (Datastore, Target, Source) {
    let datastore = Datastore::new(name);
    let vpg = definition(&datastore.0, 1);
    let target = Target::start(&vpg).await;
    let mut source = Source::start(&vpg, target.address);
    source.full_sync(1);
    for _ in 0..2 {
        source.random_write();
        source.checkpoint();
    }
    source.wait_durable(source.published_through()).await;
    (datastore, target, source)
}

/// A lock of a checkpoint that there isn't.
fn stranger(counter: u64, cut: u64) -> LockedCheckpoint {
    let kind = CheckpointKind::Application;
    LockedCheckpoint {
        checkpoint: id(counter),
        cut,
        time_us: TimeUs(1),
        member_set_version: 1,
        kind,
        tag: None,
    }
}

/// Puts something in the overlays' place.
fn let_no_overlay_be(vm: &TargetVm, cut: u64) {
    std::fs::create_dir_all(vm.folder().overlay(cut, 0)).expect("made");
}

fn locked(vm: &TargetVm) -> Vec<u64> {
    vm.locked_checkpoints().iter().map(|locked| locked.checkpoint.counter).collect()
}

fn alert(vm: &TargetVm, code: &str) -> Option<Alert> {
    vm.alerts().into_iter().find(|alert| alert.code == code)
}

async fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..1500 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("in vain: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_is_in_force_once_it_is_durable_and_not_at_all_otherwise() {
    let (_datastore, mut target, _source) = pair("lock-fails").await;
    target.fail_at_manifest();
    target.vm().lock_checkpoint(id(1)).await.expect_err("the storage failed");
    assert_eq!(locked(&target.vm()), [0; 0], "it was promised to none");
    target.wait_open_again().await;
    target.vm().lock_checkpoint(id(1)).await.expect("locked");
    target.restart().await;
    assert_eq!(locked(&target.vm()), [1], "it was promised");

    // As one that another request has just begun to lock.
    let vm = target.vm();
    let listed = vm.checkpoints().await.expect("open").find(id(2)).cloned().expect("listed");
    vm.lock().manifest.locked.push(LockedCheckpoint::from(&listed));
    vm.lock_checkpoint(id(2)).await.expect("locked");
    target.restart().await;
    assert_eq!(locked(&target.vm()), [1, 2], "who asks again is promised no less");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lock_keeps_is_let_go_of_when_the_unlocking_is_durable() {
    let (_datastore, mut target, _source) = pair("unlock-fails").await;
    target.vm().lock_checkpoint(id(1)).await.expect("locked");
    let cut = target.vm().locked_checkpoints()[0].cut;
    target.fail_at_manifest();
    target.vm().unlock_checkpoint(id(1)).await.expect_err("the storage failed");
    assert_eq!(target.vm().lock().needed().lock, Some(cut));
    target.wait_open_again().await;
    assert_eq!(locked(&target.vm()), [1]);
    target.restart().await;
    assert_eq!(locked(&target.vm()), [1], "the file knows that it was put back");
    let released = target.vm().unlock_checkpoint(id(1)).await.expect("unlocked");
    assert_eq!(released.map(|locked| locked.checkpoint), Some(id(1)));
    assert_eq!(target.vm().unlock_checkpoint(id(1)).await.expect("again is harmless"), None);
    assert_eq!(target.vm().lock().needed().lock, None);
    target.restart().await;
    assert_eq!(locked(&target.vm()), [0; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_could_not_be_noted_is_noted_when_the_files_are_open_again() {
    let (_datastore, mut target, _source) = pair("noted").await;
    let vm = target.vm();
    let listed = vm.checkpoints().await.expect("open").find(id(2)).cloned().expect("listed");
    vm.lock().manifest.locked.push(LockedCheckpoint::from(&listed));
    target.fail_storage().await;
    target.restart().await;
    assert_eq!(locked(&target.vm()), [2]);
}

/// The history was given up, or promoted past a lock that had been given up, and a crash came before the manifest was written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_without_its_checkpoint_is_forgotten_at_the_next_opening() {
    let (_datastore, mut target, _source) = pair("stale").await;
    let vm = target.vm();
    vm.lock_checkpoint(id(2)).await.expect("locked");
    let stale = stranger(9, 1);
    vm.lock().manifest.locked.push(stale.clone());
    let written = vm.write_manifest(&vm.lock()).expect("open");
    written.await.expect("open").expect("written");
    for _ in 0..2 {
        target.restart().await;
        assert_eq!(locked(&target.vm()), [2]);
        assert!(target.vm().lock().needed().lock.is_some_and(|cut| cut > 1));
    }
    let vm = target.vm();
    vm.lock().manifest.locked.push(stale);
    target.fail_storage().await;
    assert_eq!(locked(&vm), [2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_that_cannot_be_noted_are_refused_with_the_reason() {
    let (_datastore, target, _source) = pair("many").await;
    let vm = target.vm();
    let other = |counter| stranger(counter, 1 << 40);
    vm.lock().manifest.locked.extend((100..1100).map(other));
    let error = vm.lock_checkpoint(id(1)).await.expect_err("too many").to_string();
    assert!(error.contains("1000 checkpoints") && error.contains("unlock some"), "{error}");
    vm.lock().manifest.locked.truncate(999);
    vm.lock_checkpoint(id(1)).await.expect("as many as there may be fit into the manifest");
    assert_eq!(vm.lock().manifest.locked.len(), 1000);
    vm.unlock_checkpoint(id(1)).await.expect("unlocked");

    vm.lock().manifest.vpg.name = "n".repeat(400 << 10);
    let error = crate::report::chain(&vm.lock_checkpoint(id(1)).await.expect_err("too long"));
    assert!(error.contains("was not written") && error.contains("length"), "{error}");
    assert!(!locked(&vm).contains(&1), "it is taken back");
    assert!(vm.key().is_some(), "nothing has failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alerts_of_locks_go_when_their_reason_has_gone_and_tell_the_newest() {
    let (_datastore, target, _source) = pair("lock-alerts").await;
    let vm = target.vm();
    let mut group = vm.vpg();
    group.vms[0].give_up_history = false;
    vm.redefine(&group).expect("only a limit");
    let mut cuts = Vec::new();
    for counter in [1, 2] {
        vm.lock_checkpoint(id(counter)).await.expect("locked");
        cuts.push(vm.locked_checkpoints().last().expect("locked").cut);
        let_no_overlay_be(&vm, cuts[counter as usize - 1]);
    }
    vm.clone().event(ReceiverEvent::LockInTheWay { cut: cuts[0] });
    wait_for("raised", || alert(&vm, "lock-in-the-way").is_some()).await;
    let first = alert(&vm, "lock-in-the-way").expect("raised");
    assert!(first.message.contains("lock-") && first.message.contains("directory"), "{first:?}");
    vm.clone().event(ReceiverEvent::LockInTheWay { cut: cuts[1] });
    let is_other = || alert(&vm, "lock-in-the-way").is_some_and(|alert| alert.message != first.message);
    wait_for("another one is", is_other).await;
    vm.clone().event(ReceiverEvent::LockOutOfTheWay);
    assert_eq!(alert(&vm, "lock-in-the-way"), None);
    assert_eq!(locked(&vm), [1, 2]);

    group.vms[0].give_up_history = true;
    vm.redefine(&group).expect("only a limit");
    vm.clone().event(ReceiverEvent::LockInTheWay { cut: cuts[0] });
    wait_for("given up", || locked(&vm) == [2]).await;
    let first = alert(&vm, "lock-given-up").expect("raised");
    vm.clone().event(ReceiverEvent::LockInTheWay { cut: cuts[1] });
    wait_for("given up", || locked(&vm).is_empty()).await;
    assert_ne!(alert(&vm, "lock-given-up").expect("raised").message, first.message, "the second one is told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_of_the_recovery_disks_is_told_once_for_each_change() {
    let (_datastore, target, _source) = pair("bad-ranges").await;
    let vm = target.vm();
    let mut bad_ranges = BadRanges::default();
    let mut promoted = |through_seq, seq: u64| {
        bad_ranges.add(BadRange { volume: 0, offset_bytes: seq * 4096, len_bytes: 4096, seq });
        let bad_ranges = bad_ranges.clone();
        vm.clone().event(ReceiverEvent::Promoted { through_seq, written_bytes: 0, bad_ranges });
        alert(&vm, "recovery-disk-damaged").expect("raised")
    };
    let first = promoted(1, 1);
    tokio::time::sleep(Duration::from_millis(2)).await;
    assert_eq!(promoted(1, 1), first, "the very same alert");
    assert_ne!(promoted(1, 2).message, first.message);
    vm.clone().event(ReceiverEvent::SyncEnded);
    assert_eq!(alert(&vm, "recovery-disk-damaged"), None);
}

/// Two locks of one cut in a journal without room, first for a group that rather stops, then for one that gives up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_in_the_way_of_a_full_journal_are_told_again_when_they_can_be_given_up() {
    let datastore = Datastore::new("lock-full");
    let mut vpg = definition(&datastore.0, 1);
    (vpg.vms[0].journal_limit_bytes, vpg.vms[0].give_up_history) = (64 << 20, false);
    let target = Target::start(&vpg).await;
    let mut source = Source::start(&vpg, target.address);
    source.full_sync(1);
    source.random_write();
    let cut = source.published_through();
    source.checkpoint_at(cut);
    source.checkpoint_at(cut);
    source.wait_durable(source.published_through()).await;
    let vm = target.vm();
    for counter in [1, 2] {
        vm.lock_checkpoint(id(counter)).await.expect("locked");
    }
    let_no_overlay_be(&vm, vm.locked_checkpoints()[0].cut);
    while alert(&vm, "journal-full").is_none() {
        for _ in 0..100 {
            source.random_write();
        }
        source.checkpoint();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(source.published_through() < 30_000, "the journal is not full");
    }
    wait_for("told", || alert(&vm, "lock-in-the-way").is_some()).await;
    assert_eq!(locked(&vm), [1, 2]);
    vpg.revision += 1;
    vpg.vms[0].give_up_history = true;
    vm.redefine(&vpg).expect("only a limit");
    wait_for("given up", || locked(&vm).is_empty()).await;
    wait_for("out of the way", || alert(&vm, "lock-in-the-way").is_none()).await;
    assert!(alert(&vm, "lock-given-up").is_some());
    source.wait_durable(source.published_through()).await;
}

/// Somebody moves the journal away, or puts a copy in its place: what were written to the open file would be where nobody looks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_moved_or_replaced_take_no_more_writes_until_they_are_back() {
    let (_datastore, mut target, mut source) = pair("moved").await;
    let vm = target.vm();
    let (journal, disk) = (vm.folder().journal(), vm.folder().disk(0));
    for file in [&journal, &disk] {
        let aside = file.with_extension("aside");
        std::fs::rename(file, &aside).expect("moved");
        wait_for("it is noticed", || vm.key().is_none()).await;
        let alert = alert(&vm, "storage-failed").expect("told");
        let name = file.display().to_string();
        assert!(alert.message.contains(&format!("{name} was moved")), "{}", alert.message);
        // A copy isn't it, either.
        std::fs::copy(&aside, file).expect("copied");
        tokio::time::sleep(Duration::from_secs(6)).await;
        let error = vm.checkpoints().await.map(drop).expect_err("not opened").to_string();
        assert!(error.contains(&name) && error.contains("put back the file"), "{error}");
        std::fs::rename(&aside, file).expect("moved back");
        wait_for("it is open again", || vm.key().is_some()).await;
        source.random_write();
        source.checkpoint();
        source.wait_durable(source.published_through()).await;
    }
    // With the files closed all may be replaced by a copy.
    target.cut_connections();
    target.restart().await;
    assert_eq!(target.vm().checkpoints().await.expect("open").len(), 4);
}
