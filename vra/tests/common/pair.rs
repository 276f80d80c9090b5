//! A source and a target with a VM of two disks between them.

use std::time::{Duration, Instant};

use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::view::ViewSubject;
use ::vra::api::vpg::{VmDefinition, VolumeDefinition};
use ::vra::api::{
    CheckpointId, CheckpointInfo, DoorAddress, DoorRequest, JournalId, ListCheckpoints, MemberSince,
    OpenView, PointInTime, Request, Response, TagCheckpoint, ViewId, ViewInfo, ViewMode, VmId, VolumeInfo,
    VpgDefinition, VpgId, VraStatus,
};

use super::TestCa;
use super::vra::{PATIENCE, Vra, qemu_io};

pub const DISK_BYTES: u64 = 16 << 20;

pub fn definition(source: &Vra, target: &Vra, volumes: &[VolumeInfo]) -> VpgDefinition {
    let vm = VmDefinition {
        id: volumes[0].vm,
        name: volumes[0].vm_name.clone(),
        journal: JournalId::random(),
        member_since: MemberSince::default(),
        volumes: volumes
            .iter()
            .map(|volume| VolumeDefinition {
                id: volume.volume,
                number: volume.number,
                size_bytes: volume.size_bytes,
                logical_block_bytes: volume.logical_block_bytes,
                source_path: volume.path.clone(),
                left: false,
                swap: false,
            })
            .collect(),
        source: source.endpoint.clone(),
        takeover: None,
        target: target.endpoint.clone(),
        datastore: target.path("datastore"),
        journal_limit_bytes: 512 << 20,
        journal_limit_percent: None,
        journal_warning: None,
        journal_minimum_bytes: 0,
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
        encrypt: false,
        paused: false,
        notes: None,
        coordinators: Vec::new(),
        vms: vec![vm],
        former: Vec::new(),
    }
}

pub async fn apply(vra: &Vra, definition: &VpgDefinition) {
    match vra.ask(Request::ApplyVpg(definition.clone())).await {
        Response::Vpg(applied) => assert!(applied.missing_volumes.is_empty(), "{applied:?}"),
        other => panic!("{other:?}"),
    }
}

pub async fn tag(source: &Vra, vpg: VpgId, tag: &str) -> CheckpointInfo {
    match source
        .ask(Request::TagCheckpoint(TagCheckpoint { vpg, tag: tag.to_owned(), application: false }))
        .await
    {
        Response::Checkpoint(checkpoint) => checkpoint,
        other => panic!("{other:?}"),
    }
}

pub async fn checkpoints(target: &Vra, vpg: VpgId) -> Vec<CheckpointInfo> {
    let list = ListCheckpoints {
        vpg,
        vm: None,
        from_us: None,
        to_us: None,
        tagged: false,
        newest_first: false,
        by_cut: false,
        after: None,
        limit: 1000,
    };
    match target.ask(Request::ListCheckpoints(list)).await {
        Response::Checkpoints(page) => page.checkpoints,
        other => panic!("{other:?}"),
    }
}

/// Waits until the target holds a checkpoint.
pub async fn wait_for_checkpoint(target: &Vra, vpg: VpgId, id: CheckpointId) {
    let deadline = Instant::now() + PATIENCE;
    while !checkpoints(target, vpg).await.iter().any(|info| info.id == id && info.complete) {
        assert!(Instant::now() < deadline, "checkpoint {id} never came\n{}", target.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn open(vpg: VpgId, at: PointInTime, mode: ViewMode) -> OpenView {
    OpenView {
        subject: ViewSubject::Vpg { vpg },
        at,
        mode,
        door: DoorRequest::Nbd { listen: None },
        view: Some(ViewId::random()),
        label: Some("test".to_owned()),
    }
}

pub async fn open_view(target: &Vra, open: &OpenView) -> ViewInfo {
    match target.ask(Request::OpenView(open.clone())).await {
        Response::View(view) => view,
        other => panic!("{other:?}"),
    }
}

pub fn door(volume: &VolumeInfo) -> DoorAddress {
    volume.door.clone().expect("served")
}

pub fn pattern(byte: u8, offset_kib: u64, len_kib: u64) -> Vec<String> {
    vec![format!("write -P {byte} {offset_kib}k {len_kib}k")]
}

/// A pair that streams, with one VM of two disks.
pub async fn streaming_pair(name: &str, ca: &TestCa) -> Option<(Vra, Vra, Vec<VolumeInfo>, VpgDefinition)> {
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

/// Writes until a journal of 256 MiB must have promoted what it began with.
pub async fn overrun(source: &Vra, vpg: VpgId, door: &DoorAddress) {
    for round in 0..24_u8 {
        qemu_io(door, &pattern(100 + round, 1024, 12 << 10));
        // Not more than the source's memory holds; and what is older than a checkpoint can be promoted.
        let is_sent = |status: &VraStatus| {
            let mut vms = status.source_vms.iter();
            vms.all(|vm| vm.mode == SourceMode::Streaming && vm.durable_through == vm.last_sequence)
        };
        source.wait_for("sent", is_sent).await;
        tag(source, vpg, "on the way").await;
    }
}
