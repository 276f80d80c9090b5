//! A locked checkpoint outlives the history, a restart, and everything but a journal that has no room.

mod common;

use std::time::Duration;

use ::vra::api::status::SourceMode;
use ::vra::api::{
    CheckpointId, CheckpointInfo, ErrorCode, JournalId, LockCheckpoint, PointInTime, Request, Response,
    ViewMode, VmId, VolumeId, VpgId, VraStatus,
};
use common::TestCa;
use common::pair::{
    apply, checkpoints, door, open, open_view, pattern, streaming_pair, tag, wait_for_checkpoint,
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
    assert!(held.locked && !held.complete, "{held:?}");
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
async fn a_locked_checkpoint_stays_until_it_is_unlocked_or_the_journal_has_no_room() {
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
    let mut newer = None;
    for round in 0..20 {
        write_some(40 + round).await;
        newer = checkpoints(&target, vpg).await.pop();
        if find(&target, vpg, kept.id).await.is_none() {
            break;
        }
    }
    assert!(find(&target, vpg, kept.id).await.is_none(), "nothing keeps it any more");
    assert!(find(&target, vpg, before.id).await.is_none());

    // A lock gives way to replication.
    let newer = newer.expect("there are checkpoints");
    assert!(lock(&target, vpg, newer.id, true).await.locked);
    let mut is_locked = true;
    for round in 0..60_u8 {
        qemu_io(&door(&volumes[0]), &pattern(60 + round, 0, 12 << 10));
        // Not more than the source's memory holds.
        let is_sent = |status: &VraStatus| {
            status
                .source_vms
                .iter()
                .all(|vm| vm.mode == SourceMode::Streaming && vm.durable_through == vm.last_sequence)
        };
        source.wait_for("sent", is_sent).await;
        is_locked = checkpoints(&target, vpg).await.iter().any(|info| info.locked);
        if !is_locked {
            break;
        }
    }
    assert!(!is_locked, "the journal went on growing");
    target.wait_for("told", |status| status.alerts.iter().any(|alert| alert.code == "lock-given-up")).await;
    let last = tag(&source, vpg, "last").await;
    wait_for_checkpoint(&target, vpg, last.id).await;
}
