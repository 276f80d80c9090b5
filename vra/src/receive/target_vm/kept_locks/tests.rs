use std::os::fd::AsRawFd;

use super::*;
use crate::api::{CheckpointId, PointInTime};
use crate::receive::TargetSettings;
use crate::receive::test_pair::{Datastore, Disks, NONCE, SETTINGS, Source, Target, definition};
use crate::view::test_guest::Guest;

fn id(counter: u64) -> CheckpointId {
    CheckpointId { nonce: NONCE, counter }
}

/// Views of both disks at a checkpoint, opened as soon as that is possible.
async fn views(vm: &Arc<TargetVm>, counter: u64, scratch: Option<&Datastore>) -> Vec<Arc<ViewDisk>> {
    let at = PointInTime::Checkpoint { checkpoint: id(counter) };
    let mut opened = loop {
        match vm.open_view(at).await {
            Ok(opened) => break opened,
            Err(TargetError::NotOpen { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(error) => panic!("{}", error_chain(&error)),
        }
    };
    let disks = 0..vm.definition().volumes.len() as u16;
    let disk = |volume| {
        let source = opened.source(volume).expect("it was there");
        let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: true };
        let scratch = scratch.map(|folder| {
            let path = folder.0.join(format!("scratch-{volume}.raw"));
            ScratchFile::create(&path, 4 << 20, false).expect("scratch")
        });
        let disk = ViewDisk::new(source, settings, scratch).expect("a view");
        opened.pin.shows(&disk).expect("nothing has failed");
        disk
    };
    disks.map(disk).collect()
}

fn compare(disks: &[Arc<ViewDisk>], expected: &Disks, seed: u64) {
    for (disk, expected) in disks.iter().zip(expected) {
        Guest::new(disk, 2, seed).compare(expected);
        assert_eq!((disk.first_damage(), disk.is_gone()), (None, false));
    }
}

/// Writes until everything up to a number was promoted.
async fn write_past(source: &mut Source, vm: &Arc<TargetVm>, seq: u64) {
    let end = source.published_through() + 40_000;
    while vm.oldest_seq().await.expect("open") <= seq {
        for _ in 0..200 {
            source.random_write();
        }
        source.checkpoint();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(source.published_through() < end, "nothing makes way: {:?}", vm.alerts());
    }
}

fn overlay_count(vm: &TargetVm) -> usize {
    let names = std::fs::read_dir(vm.folder().path()).expect("folder").filter_map(Result::ok);
    names.filter(|entry| entry.file_name().to_string_lossy().starts_with("lock-")).count()
}

/// Two locks, in a journal that has room for little more than what is written between two looks at it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locked_checkpoints_outlive_the_room_of_the_journal_restarts_and_failures() {
    let datastore = Datastore::new("kept-locks");
    let mut vpg = definition(&datastore.0, 2);
    (vpg.vms[0].journal_limit_bytes, vpg.vms[0].give_up_history) = (64 << 20, false);
    let mut target = Target::start(&vpg).await;
    let mut source = Source::start(&vpg, target.address);
    source.full_sync(1);
    for _ in 0..2 {
        for _ in 0..40 {
            source.random_write();
        }
        source.checkpoint();
    }
    source.wait_durable(source.published_through()).await;
    let vm = target.vm();
    for counter in [1, 2] {
        vm.lock_checkpoint(id(counter)).await.expect("locked");
    }
    let first = vm.locked_checkpoints()[0].cut;
    assert_eq!(overlay_count(&vm), 0, "nothing is copied as long as there is room");
    write_past(&mut source, &vm, vm.locked_checkpoints()[1].cut).await;
    assert_eq!(overlay_count(&vm), 4);
    let listed = vm.checkpoints().await.expect("open");
    assert_eq!(listed.first().map(|listed| listed.id), Some(id(1)), "it is listed though it is old");

    // Some that stay open, with what their guest writes on top of the overlay.
    let kept = [source.checkpoints[&1].clone(), source.checkpoints[&2].clone()];
    let read_only = views(&vm, 2, None).await;
    let written = views(&vm, 1, Some(&datastore)).await;
    let mut as_written = kept[0].clone();
    for (disk, model) in written.iter().zip(&mut as_written) {
        Guest::new(disk, 2, 5).write_some(model, 20);
    }
    compare(&read_only, &kept[1], 1);
    compare(&written, &as_written, 2);
    let newest = vm.status().durable_through;
    write_past(&mut source, &vm, newest).await;
    compare(&read_only, &kept[1], 3);
    compare(&written, &as_written, 4);

    target.fail_storage().await;
    compare(&read_only, &kept[1], 5);
    compare(&written, &as_written, 6);
    let newest = vm.status().durable_through;
    write_past(&mut source, &vm, newest).await;
    compare(&read_only, &kept[1], 7);
    compare(&written, &as_written, 8);
    drop((read_only, written));

    target.restart().await;
    let vm = target.vm();
    compare(&views(&vm, 2, None).await, &kept[1], 9);
    let newest = vm.status().durable_through;
    write_past(&mut source, &vm, newest).await;
    compare(&views(&vm, 1, None).await, &kept[0], 10);
    let is_of_locks = |alert: &crate::api::status::Alert| alert.code.starts_with("lock-");
    assert!(!vm.alerts().iter().any(is_of_locks), "nobody has to care");

    // Views of it are right until they are closed.
    let last = views(&vm, 1, None).await;
    assert!(vm.unlock_checkpoint(id(1)).await.expect("unlocked").is_some());
    assert_eq!(vm.lock().kept_locks.keys().filter(|cut| **cut == first).count(), 0);
    let newest = vm.status().durable_through;
    write_past(&mut source, &vm, newest).await;
    compare(&last, &kept[0], 11);
    drop(last);
    assert_eq!(overlay_count(&vm), 2);
    let gone = vm.open_view(PointInTime::Checkpoint { checkpoint: id(1) }).await.map(drop).expect_err("gone");
    assert!(matches!(gone, TargetError::NoSuchCheckpoint { .. }), "{gone}");
    compare(&views(&vm, 2, None).await, &kept[1], 12);
}

/// What a former process left of overlays without the lock, or without what they were to keep, is found out at the opening.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlays_of_no_lock_go_and_lost_ones_are_told() {
    let datastore = Datastore::new("lost-locks");
    let mut vpg = definition(&datastore.0, 2);
    vpg.vms[0].journal_limit_bytes = 64 << 20;
    let mut target = Target::start(&vpg).await;
    let mut source = Source::start(&vpg, target.address);
    source.full_sync(1);
    source.random_write();
    source.checkpoint();
    source.wait_durable(source.published_through()).await;
    let vm = target.vm();
    vm.lock_checkpoint(id(1)).await.expect("locked");
    let cut = vm.locked_checkpoints()[0].cut;
    write_past(&mut source, &vm, cut).await;
    let stray = vm.folder().overlay(cut + 1, 0);
    std::fs::write(&stray, b"whatever").expect("written");
    let overlay = vm.folder().overlay(cut, 1);
    drop(vm);
    target.restart().await;
    assert!(!stray.exists(), "nobody needs it");
    assert!(overlay.exists());
    views(&target.vm(), 1, None).await;

    // What another process has may come back.
    let held = std::fs::File::open(&overlay).expect("overlay");
    target.host.shut_down().await;
    // SAFETY: the descriptor is open; no memory is involved.
    assert_eq!(unsafe { libc::flock(held.as_raw_fd(), libc::LOCK_EX) }, 0);
    target.restart().await;
    let vm = target.vm();
    while !vm.alerts().iter().any(|alert| alert.code == NOT_OPEN) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(overlay.exists() && vm.locked_checkpoints().len() == 1);
    drop((held, vm));
    views(&target.vm(), 1, None).await;
    assert!(!target.vm().alerts().iter().any(|alert| alert.code == NOT_OPEN));

    target.host.shut_down().await;
    let mut bytes = std::fs::read(&overlay).expect("overlay");
    for copy in [0, 64 << 10] {
        bytes[copy + 100] ^= 1;
    }
    std::fs::write(&overlay, bytes).expect("damaged");
    target.restart().await;
    let vm = target.vm();
    for _ in 0..500 {
        if vm.locked_checkpoints().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(vm.locked_checkpoints(), []);
    let alert = vm.alerts().into_iter().find(|alert| alert.code == LOST).expect("told");
    assert!(alert.message.contains("lock-") && alert.message.contains(&cut.to_string()), "{}", alert.message);
    write_past(&mut source, &vm, vm.status().durable_through).await;
    assert_eq!(overlay_count(&vm), 0, "they are of no use any more");
}

/// An overlay with less room than what changes: replication pauses, or the lock goes with all views of it, as the group prefers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_whose_overlay_is_full_pauses_replication_or_is_given_up() {
    let datastore = Datastore::new("full-locks");
    let mut vpg = definition(&datastore.0, 2);
    (vpg.vms[0].journal_limit_bytes, vpg.vms[0].give_up_history) = (64 << 20, false);
    let target = Target::start_with(&vpg, TargetSettings { overlay_bytes: 1 << 20, ..SETTINGS }).await;
    let mut source = Source::start(&vpg, target.address);
    source.full_sync(1);
    source.random_write();
    source.checkpoint();
    source.wait_durable(source.published_through()).await;
    let vm = target.vm();
    vm.lock_checkpoint(id(1)).await.expect("locked");
    let told = |code: &str| vm.alerts().into_iter().find(|alert| alert.code == code);
    let mut on_top = None;
    while told("lock-in-the-way").is_none() || told("journal-full").is_none() {
        for _ in 0..100 {
            source.random_write();
        }
        source.checkpoint();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(source.published_through() < 60_000, "the journal is not full");
        if on_top.is_none() && overlay_count(&vm) > 0 {
            on_top = Some(views(&vm, 1, None).await);
        }
    }
    let message = told("lock-in-the-way").expect("told").message;
    assert!(message.contains("scratch is full"), "{message}");
    let on_top = on_top.expect("it was kept for a while");
    compare(&on_top, &source.checkpoints[&1], 1);
    assert_eq!(vm.locked_checkpoints().len(), 1);

    vpg.revision += 1;
    vpg.vms[0].give_up_history = true;
    vm.redefine(&vpg).expect("only a limit");
    source.wait_durable(source.published_through()).await;
    assert_eq!(vm.locked_checkpoints(), []);
    assert!(told("lock-given-up").is_some() && told("lock-in-the-way").is_none());
    assert!(on_top.iter().all(|disk| disk.is_gone()), "what it shows is not there any more");
    assert!(Guest::new(&on_top[0], 1, 1).read(0, 4096).is_err());
    drop(on_top);
    assert_eq!(overlay_count(&vm), 0);
}
