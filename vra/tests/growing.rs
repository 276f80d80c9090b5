//! A protected disk grows (E3): its guest gets the rest once the target has the space and the stream has said it. What was recovered before
//! keeps the size of then.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::{
    CheckpointId, CheckpointInfo, CloseView, ErrorCode, LockCheckpoint, OpenView, PointInTime, Request,
    Response, ViewId, ViewInfo, ViewMode, VolumeId, VolumeInfo, VpgId, VraStatus,
};
use ::vra::control::ClientError;
use common::TestCa;
use common::pair::{
    DISK_BYTES, apply, checkpoints, door, open, open_view, overrun, pattern, streaming_pair, tag,
    wait_for_checkpoint,
};
use common::recovered::{copies, extract, lose_superblocks, walk};
use common::vra::{PATIENCE, Vra, nbdcopy, qemu_io};

const GROWN_BYTES: u64 = DISK_BYTES + (8 << 20);
/// Where what is new of the first disk begins, in KiB.
const NEW_KIB: u64 = DISK_BYTES >> 10;

fn lengthen(path: &Path, size_bytes: u64) {
    OpenOptions::new().write(true).open(path).expect("disk").set_len(size_bytes).expect("longer");
}

async fn volume(vra: &Vra, id: VolumeId) -> VolumeInfo {
    match vra.ask(Request::List).await {
        Response::Volumes(volumes) => volumes.into_iter().find(|info| info.volume == id).expect("attached"),
        other => panic!("{other:?}"),
    }
}

async fn wait_for_volume(vra: &Vra, id: VolumeId, what: &str, is_so: impl Fn(&VolumeInfo) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so(&volume(vra, id).await) {
        assert!(Instant::now() < deadline, "{what}: {:?}\n{}", volume(vra, id).await, vra.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn is_streaming(status: &VraStatus) -> bool {
    let vm = &status.source_vms[0];
    vm.mode == SourceMode::Streaming && vm.connected
}

/// Opens a view once what is kept is open again after a start.
async fn open_when_ready(target: &Vra, open: &OpenView) -> ViewInfo {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match target.client().await.call(Request::OpenView(open.clone())).await {
            Ok(Response::View(view)) => return view,
            Err(ClientError::Api(error))
                if error.code == ErrorCode::NotReady && Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => panic!("{other:?}\n{}", target.log()),
        }
    }
}

/// The disks of a checkpoint as a view shows them.
async fn shown(target: &Vra, vpg: VpgId, at: &CheckpointInfo) -> Vec<Vec<u8>> {
    let at = open(vpg, PointInTime::Checkpoint { checkpoint: at.id }, ViewMode::Scratch);
    let view = open_when_ready(target, &OpenView { view: Some(ViewId::random()), ..at }).await;
    let disks = copies(target, &view);
    target.ask(Request::CloseView(CloseView { view: view.view })).await;
    disks
}

/// Waits until promotion has passed a checkpoint.
async fn wait_until_gone(target: &Vra, vpg: VpgId, id: CheckpointId) {
    let deadline = Instant::now() + PATIENCE;
    while checkpoints(target, vpg).await.iter().any(|info| info.id == id) {
        assert!(Instant::now() < deadline, "nothing was promoted\n{}", target.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Length of the first disk's recovery disk, in bytes.
fn recovery_disk_bytes(target: &Vra) -> u64 {
    let disk = walk(&target.path("datastore")).find(|path| path.ends_with("disk-0.raw")).expect("the disk");
    std::fs::metadata(disk).expect("disk").len()
}

fn files_of(volumes: &[VolumeInfo]) -> Vec<Vec<u8>> {
    volumes.iter().map(|volume| std::fs::read(&volume.path).expect("disk")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_grows_while_its_guest_writes_and_older_checkpoints_keep_its_size() {
    let ca = TestCa::new();
    let Some((source, mut target, volumes, mut group)) = streaming_pair("grows", &ca).await else { return };
    let (vpg, first) = (group.id, volumes[0].volume);
    qemu_io(&door(&volumes[0]), &pattern(2, 4096, 1024));
    let before = tag(&source, vpg, "before").await;
    wait_for_checkpoint(&target, vpg, before.id).await;
    let disks_before = files_of(&volumes);
    let generation = source.status().await.source_vms[0].generation;

    // Seen at once, given to nobody before the definition says so.
    lengthen(&volumes[0].path, GROWN_BYTES);
    // As a block device may have it.
    let local = OpenOptions::new().write(true).open(&volumes[0].path).expect("disk");
    local.write_all_at(&[0x5a; 1 << 20], GROWN_BYTES - (1 << 20)).expect("written");
    wait_for_volume(&source, first, "seen", |info| info.grown_bytes == Some(GROWN_BYTES)).await;
    assert_eq!(volume(&source, first).await.size_bytes, DISK_BYTES);
    let told = |status: &VraStatus| status.alerts.iter().any(|alert| alert.code == "volume-grown");
    source.wait_for("an alert", told).await;

    (group.revision, group.vms[0].volumes[0].size_bytes) = (2, GROWN_BYTES + 4096);
    let refused = source.refusal(Request::ApplyVpg(group.clone())).await;
    assert_eq!(refused.code, ErrorCode::Conflict, "more than the disk has: {refused:?}");
    group.vms[0].volumes[0].size_bytes = GROWN_BYTES;
    apply(&target, &group).await;
    assert_eq!(recovery_disk_bytes(&target), GROWN_BYTES);
    apply(&source, &group).await;
    wait_for_volume(&source, first, "grown", |info| info.size_bytes == GROWN_BYTES).await;
    source.wait_for("streaming", is_streaming).await;
    assert_eq!(source.status().await.source_vms[0].generation, generation, "without a full sync");
    source.wait_for("no alert", |status| !told(status)).await;

    qemu_io(&door(&volumes[0]), &pattern(3, NEW_KIB - 512, 1024)).expect("the guest has what is new");
    let after = tag(&source, vpg, "after").await;
    wait_for_checkpoint(&target, vpg, after.id).await;
    let disks_after = files_of(&volumes);
    assert_eq!(disks_after[0].len() as u64, GROWN_BYTES);

    // Smaller again it doesn't get.
    let mut shrunk = group.clone();
    (shrunk.revision, shrunk.vms[0].volumes[0].size_bytes) = (3, DISK_BYTES);
    let refused = target.refusal(Request::ApplyVpg(shrunk)).await;
    assert!(refused.message.contains("only grows"), "{refused:?}");

    for restarted in [false, true] {
        if restarted {
            target.kill();
            target.serve();
            target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
        }
        assert!(shown(&target, vpg, &before).await == disks_before, "restarted: {restarted}");
        assert!(shown(&target, vpg, &after).await == disks_after, "restarted: {restarted}");
    }
    target.stop();
    assert!(extract(&target, "before") == disks_before, "without a VRA");
    assert!(extract(&target, "after") == disks_after, "without a VRA");
    lose_superblocks(&target);
    // What was its size then nothing tells any more: it reads zeroes behind that.
    let mut larger = disks_before;
    larger[0].resize(GROWN_BYTES as usize, 0);
    assert!(extract(&target, "before") == larger, "without superblocks");
    assert!(extract(&target, "after") == disks_after, "without superblocks");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_of_a_disk_before_it_grew_keeps_its_size_when_its_growth_is_promoted() {
    let ca = TestCa::new();
    let Some((source, mut target, volumes, mut group)) = streaming_pair("kept", &ca).await else { return };
    let (vpg, first) = (group.id, volumes[0].volume);
    (group.revision, group.vms[0].journal_limit_bytes, group.vms[0].history_s) = (2, 256 << 20, 60);
    apply(&target, &group).await;
    apply(&source, &group).await;
    let locked = tag(&source, vpg, "locked").await;
    wait_for_checkpoint(&target, vpg, locked.id).await;
    let disks_then = files_of(&volumes);
    let lock = LockCheckpoint { vpg, checkpoint: locked.id, locked: true };
    target.ask(Request::LockCheckpoint(lock)).await;
    let tested = open(vpg, PointInTime::Checkpoint { checkpoint: locked.id }, ViewMode::Scratch);
    let view = open_view(&target, &tested).await;
    qemu_io(&view.disks[0].door, &pattern(9, 0, 64)).expect("writable");
    let mut disk_in_test = disks_then[0].clone();
    disk_in_test[..64 << 10].fill(9);

    lengthen(&volumes[0].path, GROWN_BYTES);
    wait_for_volume(&source, first, "seen", |info| info.grown_bytes.is_some()).await;
    (group.revision, group.vms[0].volumes[0].size_bytes) = (3, GROWN_BYTES);
    apply(&target, &group).await;
    apply(&source, &group).await;
    wait_for_volume(&source, first, "grown", |info| info.size_bytes == GROWN_BYTES).await;
    qemu_io(&door(&volumes[0]), &pattern(4, NEW_KIB, 2048)).expect("the guest has what is new");
    let between = tag(&source, vpg, "between").await;
    wait_for_checkpoint(&target, vpg, between.id).await;
    overrun(&source, vpg, &door(&volumes[0])).await;
    wait_until_gone(&target, vpg, between.id).await;

    for restarted in [false, true] {
        if restarted {
            target.kill();
            target.serve();
            target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
        }
        assert!(shown(&target, vpg, &locked).await == disks_then, "restarted: {restarted}");
        let view = open_when_ready(&target, &tested).await;
        assert_eq!(view.disks[0].size_bytes, DISK_BYTES);
        let copy = nbdcopy(&view.disks[0].door, &target.path("test.raw")).expect("installed");
        assert!(copy == disk_in_test, "restarted: {restarted}");
    }
    target.stop();
    assert!(extract(&target, "locked") == disks_then, "without a VRA");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_disk_has_grown_by_is_promoted_and_survives_the_death_of_both_sides() {
    let ca = TestCa::new();
    let Some((mut source, mut target, volumes, mut group)) = streaming_pair("grown", &ca).await else {
        return;
    };
    let (vpg, first) = (group.id, volumes[0].volume);
    lengthen(&volumes[0].path, GROWN_BYTES);
    (group.revision, group.vms[0].volumes[0].size_bytes) = (2, GROWN_BYTES);
    (group.vms[0].journal_limit_bytes, group.vms[0].history_s) = (256 << 20, 60);
    wait_for_volume(&source, first, "seen", |info| info.grown_bytes.is_some()).await;
    // The source is told first: what its guest writes behind the former end waits for a target that knows of it.
    apply(&source, &group).await;
    wait_for_volume(&source, first, "grown", |info| info.size_bytes == GROWN_BYTES).await;
    qemu_io(&door(&volumes[0]), &pattern(4, NEW_KIB, 2048)).expect("the guest has what is new");
    source.wait_for("a target that doesn't know yet", |status| !status.source_vms[0].connected).await;
    // Before it can have noted anything more.
    source.kill();
    source.serve();
    wait_for_volume(&source, first, "as large as before", |info| info.size_bytes == GROWN_BYTES).await;
    apply(&target, &group).await;
    source.wait_for("streaming", is_streaming).await;
    qemu_io(&door(&volumes[0]), &pattern(5, NEW_KIB + 4096, 2048)).expect("served");
    let kept = tag(&source, vpg, "kept").await;
    wait_for_checkpoint(&target, vpg, kept.id).await;

    overrun(&source, vpg, &door(&volumes[0])).await;
    wait_until_gone(&target, vpg, kept.id).await;
    let last = tag(&source, vpg, "last").await;
    wait_for_checkpoint(&target, vpg, last.id).await;
    let disks = files_of(&volumes);
    target.kill();
    target.serve();
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    assert!(shown(&target, vpg, &last).await == disks);
    target.stop();
    assert!(extract(&target, "last") == disks);
}
