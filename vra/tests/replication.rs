//! Two daemons: what a guest wrote at the source comes back at the target after the source was killed.

mod common;

use std::time::{Duration, Instant};

use ::vra::api::status::SourceMode;
use ::vra::api::{
    Attach, CheckpointId, CloseView, Detach, DoorRequest, ErrorCode, PointInTime, RemoveVpg, Request,
    SetTrust, TimeUs, ViewMode, VmId, VpgId, VraId, VraStatus,
};
use common::TestCa;
use common::pair::{
    apply, checkpoints, door, open, open_view, pattern, streaming_pair, tag, wait_for_checkpoint,
};
use common::vra::{PATIENCE, nbdcopy, qemu_io};

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
    for view in [again.view, last_view.view] {
        target.ask(Request::CloseView(CloseView { view })).await;
    }
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
async fn a_target_with_another_address_gets_the_stream_where_it_was() {
    let ca = TestCa::new();
    let Some((source, mut target, volumes, mut definition)) = streaming_pair("moved", &ca).await else {
        return;
    };
    let generation = source.status().await.source_vms[0].generation;
    target.kill();
    target.move_elsewhere();
    target.serve();
    qemu_io(&door(&volumes[0]), &pattern(6, 128, 64));
    definition.revision = 2;
    definition.vms[0].target.address.clone_from(&target.endpoint.address);
    apply(&target, &definition).await;
    apply(&source, &definition).await;
    let is_streaming = |status: &VraStatus| status.source_vms[0].connected;
    let status = source.wait_for("streaming there", is_streaming).await;
    assert_eq!(status.source_vms[0].generation, generation, "without a full sync");
    let tagged = tag(&source, definition.id, "there").await;
    wait_for_checkpoint(&target, definition.id, tagged.id).await;
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
            shared: None,
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
