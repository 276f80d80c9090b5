//! From a ring of records over real QUIC into real files, and back out as views.

use std::fs;
use std::sync::Arc;

use uuid::Uuid;

use super::test_pair::{Datastore, NONCE, SETTINGS, Source, Target, compare, definition};
use super::*;
use crate::api::vpg::VpgDefinition;
use crate::api::{CheckpointId, JournalId, VmId, view::PointInTime};
use crate::view::test_guest::Guest;
use crate::view::{ViewDisk, ViewSettings};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_what_every_checkpoint_shows() {
    let datastore = Datastore::new("checkpoints");
    let vpg = definition(&datastore.0, 2);
    let mut target = Target::start(&vpg).await;
    let mut source = Source::start(&vpg, target.address);

    source.full_sync(1);
    let sync_end = source.published_through();
    source.wait_durable(sync_end).await;
    assert_eq!(target.vm().status().state, crate::api::status::TargetState::Journaling);

    for round in 0..6 {
        for _ in 0..200 {
            source.random_write();
        }
        source.checkpoint();
        match round {
            1 => target.cut_connections(),
            3 => target.restart().await,
            _ => {}
        }
    }
    source.wait_durable(source.published_through()).await;
    assert_eq!(target.vm().checkpoints().await.expect("open").len(), 6);
    assert_eq!(target.vm().status().checkpoint_count, 6);
    for (counter, disks) in source.checkpoints.clone() {
        let checkpoint = CheckpointId { nonce: NONCE, counter };
        compare(&target.vm(), PointInTime::Checkpoint { checkpoint }, &disks).await;
    }

    // A source that restarts has no checkpoint to lose: the history stays, the sync goes through the journal.
    source.new_generation().await;
    source.full_sync(2);
    for _ in 0..50 {
        source.random_write();
    }
    source.checkpoint();
    source.wait_durable(source.published_through()).await;
    target.restart().await;
    assert_eq!(target.vm().checkpoints().await.expect("open").len(), 7);
    for (counter, disks) in source.checkpoints.clone() {
        let checkpoint = CheckpointId { nonce: NONCE, counter };
        compare(&target.vm(), PointInTime::Checkpoint { checkpoint }, &disks).await;
    }
    target.host.delete(target.vm().id()).await.expect("deleted");
    assert_eq!(fs::read_dir(&datastore.0).expect("datastore").count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_and_a_wrong_journal_are_refused() {
    let datastore = Datastore::new("stranger");
    let vpg = definition(&datastore.0, 1);
    let target = Target::start(&vpg).await;
    let refused = |vpg: VpgDefinition| async move {
        let source = Source::start(&vpg, target.address);
        let event = source.next_refusal().await;
        format!("{event:?}")
    };
    let mut other = vpg.clone();
    other.vms[0].journal = JournalId::random();
    assert!(refused(other).await.contains("JournalDiffers"));
    let mut other = vpg.clone();
    other.vms[0].id = VmId::random();
    assert!(refused(other).await.contains("UnknownVm"));
    let mut other = vpg.clone();
    other.vms[0].volumes[0].size_bytes *= 2;
    assert!(refused(other).await.contains("VolumesDiffer"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_do_not_fit_are_named() {
    let datastore = Datastore::new("misfit");
    let vpg = definition(&datastore.0, 1);
    let vm = vpg.vms[0].id;
    let host = TargetHost::start(SETTINGS).expect("started");
    let target = host.ensure(&vpg, vm).await.expect("made");
    let folder = target.folder().clone();
    host.close(vm).await.expect("closed");

    let mut other = vpg.clone();
    other.vms[0].journal = JournalId::random();
    let error = host.ensure(&other, vm).await.err().expect("another journal").to_string();
    assert!(error.contains("journal.hfj is journal"), "{error}");

    // The journal of another VM.
    let mut other = definition(&datastore.0, 1);
    other.vms[0].journal = vpg.vms[0].journal;
    let stranger = other.vms[0].id;
    host.ensure(&other, stranger).await.expect("made");
    let place = host.close(stranger).await.expect("closed");
    fs::copy(folder.journal(), place.journal()).expect("copied");
    let error = error_chain(&host.ensure(&other, stranger).await.err().expect("another VM's"));
    assert!(error.contains(&vm.to_string()) && error.contains(&stranger.to_string()), "{error}");

    let error = host.ensure(&definition(&datastore.0.join("nowhere"), 1), VmId::random()).await.err();
    assert!(error.expect("no such VM").to_string().contains("not in the group"));
    let missing = definition(&datastore.0.join("nowhere"), 1);
    let error = host.ensure(&missing, missing.vms[0].id).await.err().expect("no datastore").to_string();
    assert!(error.contains("nowhere is not there"), "{error}");

    // A newer format.
    let mut bytes = fs::read(folder.journal()).expect("journal");
    for superblock in [0, 64 << 10] {
        bytes[superblock + 8] = 99;
        let crc = journal::format::page_crc(&bytes[superblock..superblock + 4096], 12);
        bytes[superblock + 12..superblock + 16].copy_from_slice(&crc.to_le_bytes());
    }
    fs::write(folder.journal(), bytes).expect("changed");
    let error = error_chain(&host.ensure(&vpg, vm).await.err().expect("newer"));
    assert!(error.contains("99") && error.contains("newer release"), "{error}");
}

/// VMs made from one template can have ids that begin alike; a VM that was renamed keeps its folder.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_begin_alike_are_told_apart() {
    let datastore = Datastore::new("alike");
    let mut vpg = definition(&datastore.0, 1);
    let mut twin = definition(&datastore.0, 1).vms.remove(0);
    let mut bytes = vpg.vms[0].id.0.into_bytes();
    bytes[15] ^= 1;
    twin.id = VmId(Uuid::from_bytes(bytes));
    twin.name = "twin".into();
    vpg.vms.push(twin.clone());
    let host = TargetHost::start(SETTINGS).expect("started");
    let first = host.ensure(&vpg, vpg.vms[0].id).await.expect("made");
    let second = host.ensure(&vpg, twin.id).await.expect("made beside the other");
    assert_ne!(first.folder().path(), second.folder().path());
    let place = host.close(twin.id).await.expect("closed");
    vpg.vms[1].name = "renamed".into();
    let again = host.ensure(&vpg, twin.id).await.expect("found again");
    assert_eq!(again.folder().path(), place.path());
}

/// A failure of the storage makes the journal move its newest segment, and the places that it lay in are used again while the view is open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_outlives_a_failure_of_the_storage() {
    let datastore = Datastore::new("view-failure");
    let vpg = definition(&datastore.0, 1);
    let target = Target::start(&vpg).await;
    let mut source = Source::start(&vpg, target.address);
    source.full_sync(1);
    for _ in 0..50 {
        source.random_write();
    }
    source.checkpoint();
    source.wait_durable(source.published_through()).await;

    let checkpoint = CheckpointId { nonce: NONCE, counter: 1 };
    let opened = target.vm().open_view(PointInTime::Checkpoint { checkpoint }).await.expect("opened");
    let (disk, pin) = view_disk(opened);
    pin.shows(&disk).expect("nothing has failed");
    let as_it_was = &source.checkpoints[&1][0].clone();
    Guest::new(&disk, 2, 1).compare(as_it_was);

    // One that is being opened meanwhile is not served by places that may be old.
    let between = target.vm().open_view(PointInTime::Checkpoint { checkpoint }).await.expect("opened");
    target.fail_storage().await;
    let (late, late_pin) = view_disk(between);
    let refused = late_pin.shows(&late).expect_err("the journal was opened anew meanwhile");
    assert!(matches!(refused, TargetError::NotOpen { .. }), "{refused}");
    // More than all slots that there were.
    for _ in 0..1500 {
        source.random_write();
    }
    source.wait_durable(source.published_through()).await;
    Guest::new(&disk, 2, 2).compare(as_it_was);
    assert_eq!((disk.first_damage(), disk.is_gone()), (None, false));
}

fn view_disk(opened: OpenedView) -> (Arc<ViewDisk>, Arc<Pin>) {
    let mut opened = opened;
    let (source, pin) = (opened.source(0).expect("it was there"), Arc::clone(&opened.pin));
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: false };
    (ViewDisk::new(source, settings, None).expect("a view"), pin)
}
