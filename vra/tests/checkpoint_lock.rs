//! A locked checkpoint outlives the history, restarts, and the room of its journal.

mod common;

use std::time::Duration;

use ::vra::api::{
    CheckpointId, CheckpointInfo, ErrorCode, JournalId, LockCheckpoint, PointInTime, Request, Response,
    ViewMode, VmId, VolumeId, VpgId, VraStatus,
};
use common::TestCa;
use common::pair::{
    apply, checkpoints, door, open, open_view, overrun, pattern, streaming_pair, tag, wait_for_checkpoint,
};
use common::vra::{Vra, nbdcopy, qemu_io};

async fn lock(target: &Vra, vpg: VpgId, checkpoint: CheckpointId, locked: bool) -> CheckpointInfo {
    match target.ask(Request::LockCheckpoint(LockCheckpoint { vpg, checkpoint, locked })).await {
        Response::Checkpoint(info) => info,
        other => panic!("{other:?}"),
    }
}

async fn find(target: &Vra, vpg: VpgId, id: CheckpointId) -> Option<CheckpointInfo> {
    checkpoints(target, vpg).await.into_iter().find(|info| info.id == id)
}

#[tokio::test]
async fn a_checkpoint_is_unlocked_though_it_is_complete_no_more() {
    let ca = TestCa::new();
    let Some((source, target, _volumes, mut definition)) = streaming_pair("unlock", &ca).await else {
        return;
    };
    let vpg = definition.id;
    let kept = tag(&source, vpg, "kept").await;
    wait_for_checkpoint(&target, vpg, kept.id).await;
    assert!(lock(&target, vpg, kept.id, true).await.locked);

    let mut joined = definition.vms[0].clone();
    (joined.id, joined.journal, joined.name) = (VmId::random(), JournalId::random(), "web".to_owned());
    joined.volumes.iter_mut().for_each(|volume| volume.id = VolumeId::random());
    definition.vms.push(joined);
    (definition.revision, definition.member_set_version) = (2, 2);
    apply(&target, &definition).await;
    let held = find(&target, vpg, kept.id).await.expect("listed");
    assert!(held.partly_locked && !held.locked && !held.complete, "{held:?}");
    let again = LockCheckpoint { vpg, checkpoint: kept.id, locked: true };
    let error = target.refusal(Request::LockCheckpoint(again)).await;
    assert_eq!(error.code, ErrorCode::NotReady, "only complete ones are locked: {error}");

    assert!(!lock(&target, vpg, kept.id, false).await.locked);
    assert!(!find(&target, vpg, kept.id).await.expect("listed").locked);
    assert!(!lock(&target, vpg, kept.id, false).await.locked, "again is harmless");
    let unknown = CheckpointId { nonce: 1, counter: 2 };
    let unlock = LockCheckpoint { vpg, checkpoint: unknown, locked: false };
    assert_eq!(target.refusal(Request::LockCheckpoint(unlock)).await.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_locked_checkpoint_stays_until_it_is_unlocked() {
    let ca = TestCa::new();
    let Some((source, mut target, volumes, mut definition)) = streaming_pair("lock", &ca).await else {
        return;
    };
    let vpg = definition.id;
    // Hardly any history: what nothing keeps is promoted soon.
    definition.revision += 1;
    definition.vms[0].history_s = 1;
    definition.vms[0].journal_limit_bytes = 256 << 20;
    apply(&target, &definition).await;
    apply(&source, &definition).await;

    qemu_io(&door(&volumes[0]), &pattern(2, 512, 1024));
    let before = tag(&source, vpg, "before").await;
    let kept = tag(&source, vpg, "kept").await;
    let as_kept = std::fs::read(&volumes[0].path).expect("disk");
    wait_for_checkpoint(&target, vpg, kept.id).await;
    assert!(!find(&target, vpg, kept.id).await.expect("listed").locked);
    let unknown = CheckpointId { nonce: 1, counter: 2 };
    let refused = LockCheckpoint { vpg, checkpoint: unknown, locked: true };
    let error = target.refusal(Request::LockCheckpoint(refused)).await;
    assert_eq!(error.code, ErrorCode::NotFound, "{error}");
    assert!(lock(&target, vpg, kept.id, true).await.locked);
    assert!(lock(&target, vpg, kept.id, true).await.locked, "again is harmless");
    assert!(find(&target, vpg, kept.id).await.expect("listed").locked);

    let write_some = async |byte: u8| {
        qemu_io(&door(&volumes[0]), &pattern(byte, 0, 12 << 10));
        tokio::time::sleep(Duration::from_millis(1500)).await;
    };
    for round in 0..4 {
        write_some(20 + round).await;
        if round == 1 {
            target.kill();
            target.serve();
            target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
        }
    }
    let held = find(&target, vpg, kept.id).await.expect("the lock keeps it");
    assert!(held.locked && held.complete, "{held:?}");
    let at = PointInTime::Checkpoint { checkpoint: kept.id };
    let view = open_view(&target, &open(vpg, at, ViewMode::ReadOnly)).await;
    if let Some(found) = nbdcopy(&view.disks[0].door, &target.path("copy.raw")) {
        assert!(found == as_kept, "the locked checkpoint differs");
    }
    target.ask(Request::CloseView(::vra::api::CloseView { view: view.view })).await;

    assert!(!lock(&target, vpg, kept.id, false).await.locked);
    for round in 0..20 {
        write_some(40 + round).await;
        if find(&target, vpg, kept.id).await.is_none() {
            break;
        }
    }
    assert!(find(&target, vpg, kept.id).await.is_none(), "nothing keeps it any more");
    assert!(find(&target, vpg, before.id).await.is_none());

    // A lock outlives the room of the journal too, and so do views of it.
    qemu_io(&door(&volumes[0]), &pattern(3, 512, 1024));
    let newer = tag(&source, vpg, "newer").await;
    let as_newer = std::fs::read(&volumes[0].path).expect("disk");
    wait_for_checkpoint(&target, vpg, newer.id).await;
    assert!(lock(&target, vpg, newer.id, true).await.locked);
    overrun(&source, vpg, &door(&volumes[0])).await;
    let status = target.wait_for("open", |status| status.target_vms.iter().all(|vm| vm.connected)).await;
    let oldest = status.target_vms[0].history_from_us.expect("there are checkpoints");
    assert!(oldest > newer.time_us, "the journal still holds the checkpoint: this shows nothing");
    assert!(!status.alerts.iter().any(|alert| alert.code.starts_with("lock-")), "{:?}", status.alerts);
    let held = find(&target, vpg, newer.id).await.expect("listed");
    assert!(held.locked && held.complete && held.tag.as_deref() == Some("newer"), "{held:?}");
    // By the datastore's files alone, beside the VRA.
    if std::process::Command::new("qemu-img").arg("--version").output().is_ok() {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vra-journal"));
        command.arg("extract").arg(status.target_vms[0].folder.join("journal.hfj"));
        command.args(["--at", "newer", "--disk", "0", "--quiet", "--out"]).arg(target.path("extracted.raw"));
        let extracted = command.output().expect("vra-journal");
        assert!(extracted.status.success(), "{}", String::from_utf8_lossy(&extracted.stderr));
        assert!(std::fs::read(target.path("extracted.raw")).expect("image") == as_newer, "it differs");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vra-journal"));
        command.arg("extract").arg(target.path("datastore")).args([
            "--vpg",
            &definition.name,
            "--at",
            "newer",
        ]);
        command.args(["--quiet", "--out-dir"]).arg(target.path("group"));
        let extracted = command.output().expect("vra-journal");
        assert!(extracted.status.success(), "{}", String::from_utf8_lossy(&extracted.stderr));
        let images: Vec<_> = std::fs::read_dir(target.path("group")).expect("folder").flatten().collect();
        let first = images.iter().find(|image| image.file_name().to_string_lossy().ends_with("-disk-0.raw"));
        assert!(std::fs::read(first.expect("an image").path()).expect("image") == as_newer, "it differs");
    }
    let at = PointInTime::Checkpoint { checkpoint: newer.id };
    let view = open_view(&target, &open(vpg, at, ViewMode::Scratch)).await;
    qemu_io(&view.disks[0].door, &pattern(0xB3, 2 << 10, 256));
    let mut written = as_newer.clone();
    written[2 << 20..(2 << 20) + (256 << 10)].fill(0xB3);
    target.kill();
    target.serve();
    target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
    target.wait_for("served", |status| status.views.iter().all(|view| view.problem.is_none())).await;
    overrun(&source, vpg, &door(&volumes[0])).await;
    let read_only = open_view(&target, &open(vpg, at, ViewMode::ReadOnly)).await;
    for (view, expected) in [(&view, &written), (&read_only, &as_newer)] {
        if let Some(found) = nbdcopy(&view.disks[0].door, &target.path("copy.raw")) {
            assert!(found == *expected, "the locked checkpoint differs");
        }
        target.ask(Request::CloseView(::vra::api::CloseView { view: view.view })).await;
    }
    // Unlocked, it is kept for whoever looks at it, over an orderly restart too.
    let last_view = open_view(&target, &open(vpg, at, ViewMode::Scratch)).await;
    assert!(!lock(&target, vpg, newer.id, false).await.locked);
    assert!(find(&target, vpg, newer.id).await.is_none(), "it is older than the history");
    target.stop();
    target.serve();
    target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
    let served = |status: &VraStatus| {
        status.views.len() == 1 && status.views.iter().all(|view| view.problem.is_none())
    };
    target.wait_for("served", served).await;
    overrun(&source, vpg, &door(&volumes[0])).await;
    if let Some(found) = nbdcopy(&last_view.disks[0].door, &target.path("copy.raw")) {
        assert!(found == as_newer, "the view of what was locked differs");
    }
    target.ask(Request::CloseView(::vra::api::CloseView { view: last_view.view })).await;
    let overlays = || {
        let entries = std::fs::read_dir(&status.target_vms[0].folder).expect("folder").flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("lock-")).count()
    };
    for _ in 0..100 {
        if overlays() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(overlays(), 0, "nobody needs them any more");
    let last = tag(&source, vpg, "last").await;
    wait_for_checkpoint(&target, vpg, last.id).await;
}
