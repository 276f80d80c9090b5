//! Two daemons: what a guest wrote at the source comes back at the target after the source was killed.

mod common;

use std::time::{Duration, Instant};

use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::view::ViewSubject;
use ::vra::api::vpg::{VmDefinition, VolumeDefinition};
use ::vra::api::{Attach, CheckpointId, Detach, RemoveVpg};
use ::vra::api::{
    CheckpointInfo, CloseView, DoorAddress, DoorRequest, ErrorCode, JournalId, ListCheckpoints, OpenView,
    PointInTime, Request, Response, SetTrust, TagCheckpoint, TimeUs, ViewId, ViewInfo, ViewMode, VmId,
    VolumeInfo, VpgDefinition, VpgId, VraId,
};
use common::TestCa;
use common::vra::{PATIENCE, Vra, nbdcopy, qemu_io};

const DISK_BYTES: u64 = 16 << 20;

fn definition(source: &Vra, target: &Vra, volumes: &[VolumeInfo]) -> VpgDefinition {
    let vm = VmDefinition {
        id: volumes[0].vm,
        name: volumes[0].vm_name.clone(),
        journal: JournalId::random(),
        volumes: volumes
            .iter()
            .map(|volume| VolumeDefinition {
                id: volume.volume,
                number: volume.number,
                size_bytes: volume.size_bytes,
                logical_block_bytes: volume.logical_block_bytes,
                source_path: volume.path.clone(),
            })
            .collect(),
        source: source.endpoint.clone(),
        target: target.endpoint.clone(),
        datastore: target.path("datastore"),
        journal_limit_bytes: 512 << 20,
        history_s: 3600,
        give_up_history: true,
    };
    VpgDefinition {
        id: VpgId::random(),
        name: "shop".to_owned(),
        revision: 1,
        member_set_version: 1,
        checkpoint_interval_ms: 1000,
        hold_deadline_ms: 500,
        vms: vec![vm],
    }
}

async fn apply(vra: &Vra, definition: &VpgDefinition) {
    match vra.ask(Request::ApplyVpg(definition.clone())).await {
        Response::Vpg(applied) => assert!(applied.missing_volumes.is_empty(), "{applied:?}"),
        other => panic!("{other:?}"),
    }
}

async fn tag(source: &Vra, vpg: VpgId, tag: &str) -> CheckpointInfo {
    match source.ask(Request::TagCheckpoint(TagCheckpoint { vpg, tag: tag.to_owned() })).await {
        Response::Checkpoint(checkpoint) => checkpoint,
        other => panic!("{other:?}"),
    }
}

async fn checkpoints(target: &Vra, vpg: VpgId) -> Vec<CheckpointInfo> {
    let list = ListCheckpoints {
        vpg,
        vm: None,
        from_us: None,
        to_us: None,
        tagged: false,
        newest_first: false,
        after: None,
        limit: 1000,
    };
    match target.ask(Request::ListCheckpoints(list)).await {
        Response::Checkpoints(page) => page.checkpoints,
        other => panic!("{other:?}"),
    }
}

/// Waits until the target holds a checkpoint.
async fn wait_for_checkpoint(target: &Vra, vpg: VpgId, id: CheckpointId) {
    let deadline = Instant::now() + PATIENCE;
    while !checkpoints(target, vpg).await.iter().any(|info| info.id == id && info.complete) {
        assert!(Instant::now() < deadline, "checkpoint {id} never came\n{}", target.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn open(vpg: VpgId, at: PointInTime, mode: ViewMode) -> OpenView {
    OpenView {
        subject: ViewSubject::Vpg { vpg },
        at,
        mode,
        door: DoorRequest::Nbd { listen: None },
        view: Some(ViewId::random()),
        label: Some("test".to_owned()),
    }
}

async fn open_view(target: &Vra, open: &OpenView) -> ViewInfo {
    match target.ask(Request::OpenView(open.clone())).await {
        Response::View(view) => view,
        other => panic!("{other:?}"),
    }
}

fn door(volume: &VolumeInfo) -> DoorAddress {
    volume.door.clone().expect("served")
}

fn pattern(byte: u8, offset_kib: u64, len_kib: u64) -> Vec<String> {
    vec![format!("write -P {byte} {offset_kib}k {len_kib}k")]
}

/// A pair that streams, with one VM of two disks.
async fn streaming_pair(name: &str, ca: &TestCa) -> Option<(Vra, Vra, Vec<VolumeInfo>, VpgDefinition)> {
    let source = Vra::start(&format!("{name}-a"), Some(ca));
    let target = Vra::start(&format!("{name}-b"), Some(ca));
    let vm = VmId::random();
    let first = source.attach(vm, "db", &source.disk("0.raw", DISK_BYTES)).await;
    let second = source.attach(vm, "db", &source.disk("1.raw", DISK_BYTES / 2)).await;
    // What is there before the protection comes with the first sync.
    qemu_io(&door(&first), &pattern(1, 64, 1024))?;
    let volumes = vec![first, second];
    let definition = definition(&source, &target, &volumes);
    apply(&target, &definition).await;
    apply(&source, &definition).await;
    source.wait_for("streaming", |status| status.source_vms[0].mode == SourceMode::Streaming).await;
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    Some((source, target, volumes, definition))
}

#[tokio::test]
async fn a_killed_source_comes_back_at_the_target_as_it_was_at_each_checkpoint() {
    let ca = TestCa::new();
    let Some((mut source, mut target, volumes, definition)) = streaming_pair("e2e", &ca).await else {
        return;
    };
    let vpg = definition.id;
    qemu_io(&door(&volumes[0]), &pattern(2, 512, 1024));
    qemu_io(&door(&volumes[1]), &pattern(3, 0, 64));
    let tagged = tag(&source, vpg, "before the mistake").await;
    let as_tagged: Vec<Vec<u8>> =
        volumes.iter().map(|volume| std::fs::read(&volume.path).expect("disk")).collect();
    qemu_io(&door(&volumes[0]), &pattern(4, 0, 2048));
    qemu_io(&door(&volumes[1]), &[format!("discard 0 {}", 64 << 10), "write -z 1M 64k".to_owned()]);
    let last = tag(&source, vpg, "last").await;
    let as_last: Vec<Vec<u8>> =
        volumes.iter().map(|volume| std::fs::read(&volume.path).expect("disk")).collect();
    wait_for_checkpoint(&target, vpg, last.id).await;
    source.kill();
    target.wait_for("disconnected", |status| !status.target_vms[0].connected).await;

    let list = checkpoints(&target, vpg).await;
    assert!(list.iter().any(|info| info.tag.as_deref() == Some("before the mistake")), "{list:?}");
    assert!(list.is_sorted_by_key(|info| info.time_us));
    let wanted = open(vpg, PointInTime::Checkpoint { checkpoint: tagged.id }, ViewMode::Scratch);
    let view = open_view(&target, &wanted).await;
    assert_eq!(open_view(&target, &wanted).await, view, "opening again changes nothing");
    let at_last = open(vpg, PointInTime::Checkpoint { checkpoint: last.id }, ViewMode::ReadOnly);
    let last_view = open_view(&target, &at_last).await;
    let copy = target.path("copy.raw");
    for (disk, expected) in view.disks.iter().zip(&as_tagged) {
        let Some(found) = nbdcopy(&disk.door, &copy) else { return };
        assert!(&found == expected, "disk {} differs at the tagged checkpoint", disk.number);
    }
    for (disk, expected) in last_view.disks.iter().zip(&as_last) {
        assert!(
            &nbdcopy(&disk.door, &copy).expect("nbdcopy") == expected,
            "disk {} differs at the last",
            disk.number
        );
    }
    // Scratch: what is written to a view is there, in that view alone.
    qemu_io(&view.disks[0].door, &["write -P 9 0 64k".to_owned(), "read -P 9 0 64k".to_owned()]);
    qemu_io(&last_view.disks[0].door, &["read -P 4 0 64k".to_owned()]);
    let error = target.refusal(Request::RemoveVpg(RemoveVpg { vpg, keep_files: false })).await;
    assert_eq!(error.code, ErrorCode::Busy, "{error}");
    target.ask(Request::CloseView(CloseView { view: view.view })).await;
    target.ask(Request::CloseView(CloseView { view: view.view })).await;

    // All of it once more after the target was killed too.
    target.kill();
    target.serve();
    target.wait_for("open", |status| !status.target_vms.is_empty()).await;
    let again = open_view(&target, &wanted).await;
    for (disk, expected) in again.disks.iter().zip(&as_tagged) {
        assert!(
            &nbdcopy(&disk.door, &copy).expect("nbdcopy") == expected,
            "disk {} after a restart",
            disk.number
        );
    }
    target.ask(Request::CloseView(CloseView { view: again.view })).await;
    target.ask(Request::RemoveVpg(RemoveVpg { vpg, keep_files: false })).await;
    assert_eq!(std::fs::read_dir(target.path("datastore")).expect("datastore").count(), 0);
}

#[tokio::test]
async fn replication_goes_on_after_either_side_was_killed() {
    let ca = TestCa::new();
    let Some((mut source, mut target, volumes, definition)) = streaming_pair("kills", &ca).await else {
        return;
    };
    let vpg = definition.id;
    target.kill();
    qemu_io(&door(&volumes[0]), &pattern(5, 4096, 512));
    target.serve();
    source.wait_for("streaming again", |status| status.source_vms[0].connected).await;
    let after_target = tag(&source, vpg, "after the target's kill").await;
    wait_for_checkpoint(&target, vpg, after_target.id).await;
    source.kill();
    source.serve();
    source.wait_for("streaming again", |status| status.source_vms[0].mode == SourceMode::Streaming).await;
    qemu_io(&door(&volumes[0]), &pattern(6, 4096, 64));
    let after_source = tag(&source, vpg, "after the source's kill").await;
    let expected = std::fs::read(&volumes[0].path).expect("disk");
    wait_for_checkpoint(&target, vpg, after_source.id).await;
    let at = PointInTime::Checkpoint { checkpoint: after_source.id };
    let view = open_view(&target, &open(vpg, at, ViewMode::ReadOnly)).await;
    let Some(found) = nbdcopy(&view.disks[0].door, &target.path("copy.raw")) else { return };
    assert!(found == expected, "the disk differs after both were killed");
}

#[tokio::test]
async fn a_disk_detached_by_force_goes_on_as_the_same_volume_when_it_is_attached_again() {
    let ca = TestCa::new();
    let Some((source, target, volumes, definition)) = streaming_pair("again", &ca).await else { return };
    let (vpg, vm) = (definition.id, volumes[0].vm);
    for volume in &volumes {
        source.ask(Request::Detach(Detach { volume: volume.volume, force: true })).await;
    }
    let waits =
        source.wait_for("waiting", |status| status.source_vms[0].mode == SourceMode::WaitingForVolumes);
    waits.await;
    let attach = |path: &std::path::Path, number| {
        Request::Attach(Attach {
            vm,
            vm_name: "db".to_owned(),
            volume: None,
            number,
            path: path.to_owned(),
            door: DoorRequest::Nbd { listen: None },
            force_raw: false,
        })
    };
    let error = source.refusal(attach(&volumes[0].path, None)).await;
    assert!(error.message.contains("volumes 0, 1 of VM db"), "{error}");
    let error = source.refusal(attach(&volumes[0].path, Some(1))).await;
    assert!(error.message.contains("which a VPG protects"), "another disk was taken: {error}");
    source.ask(attach(&volumes[1].path, Some(1))).await;
    source.ask(attach(&volumes[0].path, None)).await;
    let status =
        source.wait_for("streaming", |status| status.source_vms[0].mode == SourceMode::Streaming).await;
    for (was, is) in volumes.iter().zip(&status.volumes) {
        assert_eq!((is.volume, is.number, &is.path), (was.volume, was.number, &was.path));
    }
    let tagged = tag(&source, vpg, "again").await;
    wait_for_checkpoint(&target, vpg, tagged.id).await;
}

#[tokio::test]
async fn moments_and_peers_that_are_not_there_are_refused_by_name() {
    let ca = TestCa::new();
    let Some((source, target, volumes, definition)) = streaming_pair("refusals", &ca).await else { return };
    let vpg = definition.id;
    let tagged = tag(&source, vpg, "one").await;
    wait_for_checkpoint(&target, vpg, tagged.id).await;
    let unknown = CheckpointId { nonce: 1, counter: 2 };
    let cases = [
        (PointInTime::Checkpoint { checkpoint: unknown }, ErrorCode::NotFound, "there is no checkpoint 0000"),
        (PointInTime::Time { time_us: TimeUs(1_000_000) }, ErrorCode::NotFound, "at or before 1970-01-01"),
    ];
    for (at, code, words) in cases {
        let error = target.refusal(Request::OpenView(open(vpg, at, ViewMode::ReadOnly))).await;
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(words) && error.remedy.is_some(), "{error}");
    }
    let error = target
        .refusal(Request::OpenView(open(VpgId::random(), PointInTime::Latest, ViewMode::ReadOnly)))
        .await;
    assert_eq!(error.code, ErrorCode::NotFound, "{error}");
    let error = source.refusal(Request::Detach(Detach { volume: volumes[0].volume, force: false })).await;
    assert!(error.message.contains("is protected by VPG \"shop\""), "{error}");

    let mut changed = definition.clone();
    changed.name = "other".to_owned();
    let error = source.refusal(Request::ApplyVpg(changed.clone())).await;
    assert_eq!(error.code, ErrorCode::Conflict, "{error}");
    changed.revision = 0;
    let error = source.refusal(Request::ApplyVpg(changed)).await;
    assert_eq!(error.code, ErrorCode::Stale, "{error}");
    let mut elsewhere = definition.clone();
    elsewhere.id = VpgId::random();
    elsewhere.vms[0].id = VmId::random();
    elsewhere.vms[0].datastore = "/etc".into();
    let error = target.refusal(Request::ApplyVpg(elsewhere)).await;
    assert_eq!(error.code, ErrorCode::Forbidden, "{error}");

    let revoked =
        SetTrust { version: 1, revoked_serials: vec![], revoked_vras: vec![source.id, VraId::random()] };
    target.ask(Request::SetTrust(revoked)).await;
    let status = source
        .wait_for("an alert", |status| status.alerts.iter().any(|alert| alert.code == "not-connected"))
        .await;
    let deadline = Instant::now() + PATIENCE;
    let mut alerts = status.alerts;
    while !alerts.iter().any(|alert| alert.message.contains("it is revoked")) {
        assert!(Instant::now() < deadline, "{alerts:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
        alerts = source.status().await.alerts;
    }
    let stale = target.refusal(Request::SetTrust(SetTrust::default())).await;
    assert_eq!(stale.code, ErrorCode::Stale, "{stale}");
}
