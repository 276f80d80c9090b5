//! A disk joins a protected VM: what was recovered before doesn't have it, what comes later does. A disk leaves one, and it is the other way round.
//! And a disk of which only syncs count.

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::vpg::VolumeDefinition;
use ::vra::api::{
    Attach, CloseView, Detach, DoorRequest, ErrorCode, OpenView, PointInTime, Request, ViewMode, VmId,
    VraStatus,
};
use common::TestCa;
use common::pair::{
    DISK_BYTES, apply, checkpoints, definition, door, open, overrun, pattern, tag, wait_for_checkpoint,
};
use common::recovered::{extract, lose_superblocks, shown, walk};
use common::vra::{Vra, qemu_io};

#[tokio::test]
async fn a_disk_joins_a_vm_and_older_checkpoints_stay_as_they_were() {
    let ca = TestCa::new();
    let source = Vra::start("added-a", Some(&ca));
    let mut target = Vra::start("added-b", Some(&ca));
    let vm = VmId::random();
    let first = source.attach(vm, "db", &source.disk("0.raw", DISK_BYTES)).await;
    if qemu_io(&door(&first), &pattern(1, 64, 1024)).is_none() {
        return;
    }
    let mut group = definition(&source, &target, std::slice::from_ref(&first));
    let vpg = group.id;
    apply(&target, &group).await;
    apply(&source, &group).await;
    let streams = |status: &VraStatus| status.source_vms[0].mode == SourceMode::Streaming;
    source.wait_for("streaming", streams).await;
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    qemu_io(&door(&first), &pattern(2, 2048, 1024));
    let before = tag(&source, vpg, "before").await;
    wait_for_checkpoint(&target, vpg, before.id).await;
    let first_then = std::fs::read(&first.path).expect("disk");

    let second = source.attach(vm, "db", &source.disk("1.raw", DISK_BYTES / 2)).await;
    qemu_io(&door(&second), &pattern(3, 0, 512));
    group.vms[0].volumes.push(VolumeDefinition {
        id: second.volume,
        number: 1,
        size_bytes: second.size_bytes,
        logical_block_bytes: second.logical_block_bytes,
        source_path: second.path.clone(),
        left: false,
        swap: false,
    });
    (group.revision, group.member_set_version) = (2, 2);

    // Not while somebody looks at the VM's disks: its files are closed for it.
    let at_before = open(vpg, PointInTime::Checkpoint { checkpoint: before.id }, ViewMode::ReadOnly);
    let (view, _) = shown(&target, &at_before).await;
    let refused = target.refusal(Request::ApplyVpg(group.clone())).await;
    assert_eq!(refused.code, ErrorCode::Busy, "{refused:?}");
    target.ask(Request::CloseView(CloseView { view: view.view })).await;

    // The source is told first: it waits until its target knows of the disk.
    apply(&source, &group).await;
    qemu_io(&door(&first), &pattern(4, 4096, 1024));
    apply(&target, &group).await;
    source.wait_for("streaming again", |status| streams(status) && status.source_vms[0].connected).await;
    qemu_io(&door(&second), &pattern(5, 1024, 512));
    let after = tag(&source, vpg, "after").await;
    wait_for_checkpoint(&target, vpg, after.id).await;
    qemu_io(&door(&second), &pattern(6, 1024, 512));

    let mut disks_after =
        [&first.path, &second.path].map(|path: &PathBuf| std::fs::read(path).expect("disk"));
    disks_after[1][1 << 20..(1 << 20) + (512 << 10)].fill(5);
    let at_after = open(vpg, PointInTime::Checkpoint { checkpoint: after.id }, ViewMode::Scratch);
    for restarted in [false, true] {
        if restarted {
            target.kill();
            target.serve();
            target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
        }
        let at_before = OpenView { view: Some(::vra::api::ViewId::random()), ..at_before.clone() };
        let (view, disks) = shown(&target, &at_before).await;
        assert_eq!(disks.len(), 1, "the checkpoint is older than the disk");
        assert!(disks[0] == first_then, "restarted: {restarted}");
        target.ask(Request::CloseView(CloseView { view: view.view })).await;
        let at_after = OpenView { view: Some(::vra::api::ViewId::random()), ..at_after.clone() };
        let (view, disks) = shown(&target, &at_after).await;
        assert!(disks == disks_after, "restarted: {restarted}");
        target.ask(Request::CloseView(CloseView { view: view.view })).await;
    }

    // And without any VRA.
    target.stop();
    assert!(extract(&target, "before") == [&first_then[..]]);
    assert!(extract(&target, "after") == disks_after);

    // Not even with superblocks.
    lose_superblocks(&target);
    assert!(extract(&target, "before") == [first_then]);
    assert!(extract(&target, "after") == disks_after);
}

#[tokio::test]
async fn a_journal_that_is_made_after_a_disk_left_is_without_it() {
    let ca = TestCa::new();
    let source = Vra::start("anew-a", Some(&ca));
    let mut target = Vra::start("anew-b", Some(&ca));
    let vm = VmId::random();
    let mut volumes = Vec::new();
    for number in 0..2 {
        volumes.push(source.attach(vm, "db", &source.disk(&format!("{number}.raw"), DISK_BYTES)).await);
    }
    if qemu_io(&door(&volumes[0]), &pattern(1, 64, 1024)).is_none() {
        return;
    }
    qemu_io(&door(&volumes[1]), &pattern(2, 64, 1024));
    let mut group = definition(&source, &target, &volumes);
    group.vms[0].volumes[1].left = true;
    apply(&target, &group).await;
    apply(&source, &group).await;
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    let tagged = tag(&source, group.id, "now").await;
    wait_for_checkpoint(&target, group.id, tagged.id).await;
    let first = std::fs::read(&volumes[0].path).expect("disk");
    let at = open(group.id, PointInTime::Checkpoint { checkpoint: tagged.id }, ViewMode::ReadOnly);
    let (view, disks) = shown(&target, &at).await;
    assert!(disks == [&first[..]], "not one of zeroes");
    target.ask(Request::CloseView(CloseView { view: view.view })).await;
    target.stop();
    assert!(extract(&target, "now") == [first]);
}

#[tokio::test]
async fn a_disk_leaves_a_vm_and_older_checkpoints_keep_it() {
    let ca = TestCa::new();
    let source = Vra::start("left-a", Some(&ca));
    let mut target = Vra::start("left-b", Some(&ca));
    let vm = VmId::random();
    let mut volumes = Vec::new();
    for number in 0..2 {
        volumes.push(source.attach(vm, "db", &source.disk(&format!("{number}.raw"), DISK_BYTES)).await);
    }
    let [first, second] = &volumes[..] else { unreachable!("two") };
    if qemu_io(&door(first), &pattern(1, 64, 1024)).is_none() {
        return;
    }
    qemu_io(&door(second), &pattern(2, 64, 1024));
    let mut group = definition(&source, &target, &volumes);
    let vpg = group.id;
    apply(&target, &group).await;
    apply(&source, &group).await;
    let streams = |status: &VraStatus| {
        status.source_vms[0].mode == SourceMode::Streaming && status.source_vms[0].connected
    };
    source.wait_for("streaming", streams).await;
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    let before = tag(&source, vpg, "before").await;
    wait_for_checkpoint(&target, vpg, before.id).await;
    let both = [&first.path, &second.path].map(|path: &PathBuf| std::fs::read(path).expect("disk"));

    group.vms[0].volumes[1].left = true;
    (group.revision, group.member_set_version) = (2, 2);
    // The source is told first: there is no checkpoint in which the disk is there and empty.
    apply(&source, &group).await;
    source.wait_for("a target that has it still", |status| !status.source_vms[0].connected).await;
    qemu_io(&door(first), &pattern(3, 64, 1024));
    qemu_io(&door(second), &pattern(4, 64, 1024)).expect("it is served on");
    apply(&target, &group).await;
    source.wait_for("streaming again", streams).await;
    let after = tag(&source, vpg, "after").await;
    wait_for_checkpoint(&target, vpg, after.id).await;
    source.ask(Request::Detach(Detach { volume: second.volume, force: false })).await;
    let first_after = std::fs::read(&first.path).expect("disk");

    let at = |checkpoint| OpenView {
        view: Some(::vra::api::ViewId::random()),
        ..open(vpg, PointInTime::Checkpoint { checkpoint }, ViewMode::ReadOnly)
    };
    for restarted in [false, true] {
        if restarted {
            target.kill();
            target.serve();
            target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
        }
        let (view, disks) = shown(&target, &at(before.id)).await;
        assert!(disks == both, "restarted: {restarted}");
        target.ask(Request::CloseView(CloseView { view: view.view })).await;
        let (view, disks) = shown(&target, &at(after.id)).await;
        assert!(disks == [&first_after[..]], "restarted: {restarted}");
        target.ask(Request::CloseView(CloseView { view: view.view })).await;
    }

    // It doesn't come back under its number, and a new disk gets another one.
    let mut back = group.clone();
    back.vms[0].volumes[1].left = false;
    (back.revision, back.member_set_version) = (3, 3);
    let refused = target.refusal(Request::ApplyVpg(back)).await;
    assert!(refused.message.contains("volumes"), "{refused:?}");
    let again = Attach {
        vm,
        vm_name: "db".into(),
        volume: Some(second.volume),
        number: None,
        path: second.path.clone(),
        door: DoorRequest::Nbd { listen: None },
        force_raw: false,
        shared: None,
    };
    let refused = source.refusal(Request::Attach(again)).await;
    assert!(refused.code == ErrorCode::Conflict && refused.message.contains("has left"), "{refused:?}");
    let third = source.attach(vm, "db", &source.disk("2.raw", DISK_BYTES)).await;
    assert_eq!(third.number, 2);

    target.stop();
    assert!(extract(&target, "before") == both);
    assert!(extract(&target, "after") == [&first_after[..]]);
    lose_superblocks(&target);
    assert!(extract(&target, "before") == both);
    assert!(extract(&target, "after") == [first_after]);
}

#[tokio::test]
async fn the_space_of_a_disk_that_left_is_given_back_with_the_last_checkpoint_that_shows_it() {
    let ca = TestCa::new();
    let source = Vra::start("space-a", Some(&ca));
    let target = Vra::start("space-b", Some(&ca));
    let vm = VmId::random();
    let mut volumes = Vec::new();
    for number in 0..2 {
        volumes.push(source.attach(vm, "db", &source.disk(&format!("{number}.raw"), DISK_BYTES)).await);
    }
    if qemu_io(&door(&volumes[1]), &pattern(1, 64, 1024)).is_none() {
        return;
    }
    let mut group = definition(&source, &target, &volumes);
    group.vms[0].journal_limit_bytes = 256 << 20;
    apply(&target, &group).await;
    apply(&source, &group).await;
    let streams = |status: &VraStatus| {
        let vm = &status.source_vms[0];
        vm.mode == SourceMode::Streaming && vm.connected && vm.sync.is_none()
    };
    source.wait_for("streaming", streams).await;
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    let before = tag(&source, group.id, "before").await;
    wait_for_checkpoint(&target, group.id, before.id).await;
    let disk = walk(&target.path("datastore")).find(|path| path.ends_with("disk-1.raw")).expect("the disk");
    let taken_bytes = || disk.metadata().expect("the disk").blocks() * 512;
    assert_eq!(taken_bytes(), DISK_BYTES);

    group.vms[0].volumes[1].left = true;
    (group.revision, group.member_set_version) = (2, 2);
    apply(&target, &group).await;
    apply(&source, &group).await;
    source.wait_for("streaming again", streams).await;
    let after = tag(&source, group.id, "after").await;
    wait_for_checkpoint(&target, group.id, after.id).await;
    let shows = async |id| checkpoints(&target, group.id).await.iter().any(|info| info.id == id);
    assert!(shows(before.id).await);
    assert_eq!(taken_bytes(), DISK_BYTES, "a checkpoint shows it");
    overrun(&source, group.id, &door(&volumes[0])).await;
    target.wait_for("space", |_| taken_bytes() == 0).await;
    assert!(!shows(before.id).await);
}

#[tokio::test]
async fn what_is_written_to_a_swap_disk_after_a_sync_is_not_captured() {
    let ca = TestCa::new();
    let source = Vra::start("swap-a", Some(&ca));
    let target = Vra::start("swap-b", Some(&ca));
    let vm = VmId::random();
    let mut volumes = Vec::new();
    for number in 0..2 {
        volumes.push(source.attach(vm, "db", &source.disk(&format!("{number}.raw"), DISK_BYTES)).await);
    }
    let [first, swap] = &volumes[..] else { unreachable!("two") };
    if qemu_io(&door(first), &pattern(1, 64, 1024)).is_none() {
        return;
    }
    qemu_io(&door(swap), &pattern(2, 64, 1024));
    let mut group = definition(&source, &target, &volumes);
    group.vms[0].volumes[1].swap = true;
    let vpg = group.id;
    apply(&target, &group).await;
    apply(&source, &group).await;
    let streams = |status: &VraStatus| {
        status.source_vms[0].mode == SourceMode::Streaming && status.source_vms[0].sync.is_none()
    };
    source.wait_for("streaming", streams).await;
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    let synced = std::fs::read(&swap.path).expect("disk");
    qemu_io(&door(swap), &pattern(3, 64, 1024));
    qemu_io(&door(first), &pattern(4, 64, 1024));
    let one = tag(&source, vpg, "one").await;
    wait_for_checkpoint(&target, vpg, one.id).await;
    let at = |checkpoint| OpenView {
        view: Some(::vra::api::ViewId::random()),
        ..open(vpg, PointInTime::Checkpoint { checkpoint }, ViewMode::ReadOnly)
    };
    let (view, disks) = shown(&target, &at(one.id)).await;
    assert!(disks[0] == std::fs::read(&first.path).expect("disk"));
    assert!(disks[1] == synced && synced != std::fs::read(&swap.path).expect("disk"));
    target.ask(Request::CloseView(CloseView { view: view.view })).await;

    // It is no swap any more: the sync that follows has it as it is, and what is written then counts.
    group.vms[0].volumes[1].swap = false;
    group.revision = 2;
    apply(&target, &group).await;
    apply(&source, &group).await;
    source.wait_for("streaming again", streams).await;
    qemu_io(&door(swap), &pattern(5, 2048, 1024));
    let two = tag(&source, vpg, "two").await;
    wait_for_checkpoint(&target, vpg, two.id).await;
    let (_, disks) = shown(&target, &at(two.id)).await;
    assert!(disks[1] == std::fs::read(&swap.path).expect("disk"));
}
