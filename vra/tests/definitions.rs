//! A group's definition is in force for all of the group's VMs at a target or for none, whatever is in the way of one of them, and whenever the
//! VRA dies.

mod common;

use std::path::PathBuf;

use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::vpg::VolumeDefinition;
use ::vra::api::{
    CloseView, ErrorCode, FormerVm, JournalId, PointInTime, Request, ViewMode, VmId, VolumeId, VolumeInfo,
    VpgDefinition, VraStatus,
};
use common::TestCa;
use common::pair::{DISK_BYTES, apply, definition, open, open_view, tag, wait_for_checkpoint};
use common::vra::Vra;

/// A source and a target with a group of two VMs, `db` and `web`, of one disk each.
struct Pair {
    source: Vra,
    target: Vra,
    group: VpgDefinition,
}

async fn pair(name: &str) -> Pair {
    let ca = TestCa::new();
    let source = Vra::start(&format!("{name}-a"), Some(&ca));
    let target = Vra::start(&format!("{name}-b"), Some(&ca));
    let mut group = None;
    for vm in ["db", "web"] {
        let volume = source.attach(VmId::random(), vm, &source.disk(&format!("{vm}.raw"), DISK_BYTES)).await;
        let of_one = definition(&source, &target, &[volume]);
        group
            .get_or_insert_with(|| VpgDefinition { vms: Vec::new(), ..of_one.clone() })
            .vms
            .extend(of_one.vms);
    }
    let group = group.expect("two VMs");
    apply(&target, &group).await;
    apply(&source, &group).await;
    let pair = Pair { source, target, group };
    pair.wait_until_it_streams().await;
    pair
}

impl Pair {
    async fn wait_until_it_streams(&self) {
        let streams = |status: &VraStatus| {
            let mut vms = status.source_vms.iter();
            status.source_vms.len() == self.group.vms.len()
                && vms.all(|vm| vm.mode == SourceMode::Streaming && vm.connected && vm.sync.is_none())
        };
        self.source.wait_for("streaming", streams).await;
        let journals = |status: &VraStatus| {
            status.target_vms.len() == self.group.vms.len()
                && status.target_vms.iter().all(|vm| vm.state == TargetState::Journaling)
        };
        self.target.wait_for("journaling", journals).await;
    }

    /// All VMs go on under the group's definition.
    async fn assert_goes_on(&self, what: &str) {
        self.wait_until_it_streams().await;
        let now = tag(&self.source, self.group.id, what).await;
        wait_for_checkpoint(&self.target, self.group.id, now.id).await;
        let status = self.target.status().await;
        assert_eq!(status.vpgs[0].revision, self.group.revision, "{what}");
        assert!(!status.alerts.iter().any(|alert| alert.code == "journal-not-open"), "{what}: {status:?}");
        for vm in &self.group.vms {
            let disks = vm.volumes.iter().map(|volume| format!("disk-{}.raw", volume.number));
            let mut expected: Vec<String> = disks.chain(["journal.hfj".to_owned()]).collect();
            expected.sort();
            assert_eq!(self.files_of(vm.id).await, expected, "{what}: {}", vm.name);
        }
    }

    async fn folder_of(&self, vm: VmId) -> PathBuf {
        let status = self.target.status().await;
        status.target_vms.iter().find(|target| target.vm == vm).expect("a target").folder.clone()
    }

    async fn files_of(&self, vm: VmId) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder_of(vm).await).expect("the VM's folder");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }

    /// The group with a second disk of `db`.
    fn with_disk_of_db(&self, volume: &VolumeInfo) -> VpgDefinition {
        let mut next = self.next();
        next.member_set_version += 1;
        next.vms[0].volumes.push(joining(volume.volume, volume.size_bytes));
        next
    }

    fn next(&self) -> VpgDefinition {
        VpgDefinition { revision: self.group.revision + 1, ..self.group.clone() }
    }

    async fn second_disk_of_db(&self) -> VolumeInfo {
        let path = self.source.disk("db-1.raw", DISK_BYTES);
        self.source.attach(self.group.vms[0].id, "db", &path).await
    }

    /// As if the target had died when another definition came into force, before anything followed it.
    fn put_in_force(&self, definition: &VpgDefinition, leaving: Option<&FormerVm>) {
        let path = self.target.path("state/vra.json");
        let text = std::fs::read_to_string(&path).expect("the state");
        let mut state: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        state["value"]["vpgs"][definition.id.to_string()] =
            serde_json::to_value(definition).expect("a definition");
        if let Some(former) = leaving {
            state["value"]["letting_go"] =
                serde_json::json!([{ "vpg": definition.id, "vpg_name": definition.name, "former": former }]);
        }
        std::fs::write(&path, state.to_string()).expect("the state");
    }
}

fn joining(id: VolumeId, size_bytes: u64) -> VolumeDefinition {
    VolumeDefinition {
        id,
        number: 1,
        size_bytes,
        logical_block_bytes: 512,
        source_path: "/another".into(),
        left: false,
        swap: false,
    }
}

/// A disk that no datastore has room for.
const HUGE_BYTES: u64 = 8 << 40;

#[tokio::test]
async fn a_definition_that_one_vm_cannot_have_is_in_force_for_none() {
    let mut pair = pair("all").await;
    let second = pair.second_disk_of_db().await;
    let with_disk = pair.with_disk_of_db(&second);

    // Each would be fine for db, the first VM.
    let mut no_room = with_disk.clone();
    no_room.vms[1].volumes.push(joining(VolumeId::random(), HUGE_BYTES));
    let mut no_room_for_another = with_disk.clone();
    let mut another = with_disk.vms[1].clone();
    (another.id, another.name, another.journal) = (VmId::random(), "cache".into(), JournalId::random());
    another.volumes[0].id = VolumeId::random();
    another.volumes[0].size_bytes = HUGE_BYTES;
    no_room_for_another.vms.push(another);
    let mut too_low = with_disk.clone();
    too_low.vms[1].journal_limit_bytes = 64 << 20;
    let mut another_journal = with_disk.clone();
    another_journal.vms[1].journal = JournalId::random();
    let mut other_disks = with_disk.clone();
    other_disks.vms[1].volumes[0].id = VolumeId::random();
    let mut leaving = pair.next();
    leaving.vms[0].volumes.push(joining(second.volume, second.size_bytes));
    leaving.vms[0].volumes[0].left = true;
    leaving.vms[1].volumes.push(joining(VolumeId::random(), HUGE_BYTES));
    let refusals = [
        (no_room, ErrorCode::Exhausted, "web", "free space"),
        (no_room_for_another, ErrorCode::Exhausted, "cache", "free space"),
        (too_low, ErrorCode::BadRequest, "web", "give it at least"),
        (another_journal, ErrorCode::Conflict, "web", "move the folder away"),
        (other_disks, ErrorCode::Conflict, "web", "with a new journal"),
        (leaving, ErrorCode::Exhausted, "web", "free space"),
    ];
    for (refused, code, vm, remedy) in refusals {
        let error = pair.target.refusal(Request::ApplyVpg(refused)).await;
        assert_eq!(error.code, code, "{error:?}");
        assert!(error.message.starts_with(&format!("VM {vm}: ")), "{error:?}");
        assert!(error.message.contains(remedy), "{error:?}");
        pair.assert_goes_on(remedy).await;
    }

    // A view of web is in its way, and not in db's.
    let now = tag(&pair.source, pair.group.id, "shown").await;
    wait_for_checkpoint(&pair.target, pair.group.id, now.id).await;
    let at = open(pair.group.id, PointInTime::Checkpoint { checkpoint: now.id }, ViewMode::ReadOnly);
    let view = open_view(&pair.target, &at).await;
    let mut both = with_disk.clone();
    both.vms[1].volumes.push(joining(VolumeId::random(), DISK_BYTES));
    let error = pair.target.refusal(Request::ApplyVpg(both)).await;
    assert_eq!(error.code, ErrorCode::Busy, "{error:?}");
    pair.target.ask(Request::CloseView(CloseView { view: view.view })).await;

    pair.target.kill();
    pair.target.serve();
    pair.assert_goes_on("after a restart").await;

    // Nothing of it is in the way of what can be.
    pair.group = with_disk;
    apply(&pair.target, &pair.group).await;
    apply(&pair.source, &pair.group).await;
    pair.assert_goes_on("with the disk").await;
}

#[tokio::test]
async fn a_vra_that_dies_as_a_definition_comes_into_force_follows_it_wholly() {
    let mut pair = pair("died").await;
    let second = pair.second_disk_of_db().await;
    let web_folder = pair.folder_of(pair.group.vms[1].id).await;

    // It died before: what it had reserved goes.
    pair.target.kill();
    let db_folder = web_folder.parent().expect("the group's").read_dir().expect("folder");
    let db_folder = db_folder
        .map(|entry| entry.expect("entry").path())
        .find(|path| *path != web_folder)
        .expect("that of db");
    std::fs::write(db_folder.join("disk-1.raw"), vec![0; 4096]).expect("written");
    pair.target.serve();
    pair.assert_goes_on("under the older one").await;

    // It died then: db gets its disk, web goes, another comes, and all is as if it hadn't.
    let mut next = pair.with_disk_of_db(&second);
    let web = next.vms.remove(1);
    let third = VmId::random();
    let volume = pair.source.attach(third, "cache", &pair.source.disk("cache.raw", DISK_BYTES)).await;
    next.vms.extend(definition(&pair.source, &pair.target, &[volume]).vms);
    let former = FormerVm {
        id: web.id,
        name: web.name.clone(),
        journal: web.journal,
        target: pair.target.id,
        datastore: web.datastore.clone(),
        keep_files: false,
        revision: next.revision,
    };
    next.former = vec![former.clone()];
    pair.target.kill();
    pair.put_in_force(&next, Some(&former));
    pair.target.serve();
    pair.group = next;
    apply(&pair.source, &pair.group).await;
    pair.assert_goes_on("under the newer one").await;
    assert!(!web_folder.exists(), "what has left is gone");
    let state = std::fs::read_to_string(pair.target.path("state/vra.json")).expect("the state");
    assert!(!state.contains("letting_go"), "nothing is to be done once more: {state}");
}

#[tokio::test]
async fn a_disk_that_leaves_before_its_target_had_it_takes_no_space() {
    let mut pair = pair("never").await;
    let second = pair.second_disk_of_db().await;
    let huge = |left| VolumeDefinition { left, ..joining(second.volume, HUGE_BYTES) };
    let mut refused = pair.next();
    refused.vms[0].volumes.push(huge(false));
    let error = pair.target.refusal(Request::ApplyVpg(refused.clone())).await;
    assert_eq!(error.code, ErrorCode::Exhausted, "{error:?}");

    // Without a trace, by who knows that it never was there.
    pair.group.revision = 3;
    apply(&pair.target, &pair.group).await;
    pair.assert_goes_on("without it").await;

    // Or as one that has left.
    let mut left = pair.next();
    left.member_set_version += 1;
    left.vms[0].volumes.push(huge(true));
    apply(&pair.target, &left).await;
    let disk = pair.folder_of(left.vms[0].id).await.join("disk-1.raw");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&disk.metadata().expect("a placeholder"));
    assert_eq!(blocks, 0);
    apply(&pair.source, &left).await;
    pair.group = left;
    pair.assert_goes_on("as one that has left").await;
    let at = open(pair.group.id, PointInTime::Latest, ViewMode::ReadOnly);
    let view = open_view(&pair.target, &at).await;
    assert_eq!(view.disks.len(), 2, "one of each VM");
    pair.target.ask(Request::CloseView(CloseView { view: view.view })).await;

    // It is in the journal: a definition without it is none of that journal.
    let mut lacking = pair.next();
    lacking.vms[0].volumes.pop();
    let error = pair.target.refusal(Request::ApplyVpg(lacking)).await;
    assert_eq!(error.code, ErrorCode::Conflict, "{error:?}");
    assert!(error.message.contains("without disk 1") && error.message.contains("protect the disk again"));
}
