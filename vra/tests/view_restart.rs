//! Views over NBD while their daemon is killed, stopped and started again.

mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ::vra::api::status::TargetState;
use ::vra::api::{
    CheckpointInfo, CloseView, PointInTime, Request, Response, ViewInfo, ViewMode, VolumeInfo, VpgDefinition,
    VpgId, VraStatus,
};
use common::TestCa;
use common::pair::{
    DISK_BYTES, apply, checkpoints, door, open, open_view, pattern, streaming_pair, tag, wait_for_checkpoint,
};
use common::vra::{PATIENCE, Vra, nbdcopy, qemu_io, qemu_io_unflushed};
use serde_json::Value;

/// A pair with a checkpoint, and what the disks were then.
struct Stand {
    source: Vra,
    target: Vra,
    volumes: Vec<VolumeInfo>,
    definition: VpgDefinition,
    tagged: CheckpointInfo,
    as_tagged: Vec<Vec<u8>>,
}

impl Stand {
    async fn new(name: &str) -> Option<Self> {
        let ca = TestCa::new();
        let (source, target, volumes, definition) = streaming_pair(name, &ca).await?;
        qemu_io(&door(&volumes[0]), &pattern(2, 512, 1024));
        let tagged = tag(&source, definition.id, "tested").await;
        let as_tagged = volumes.iter().map(|volume| std::fs::read(&volume.path).expect("disk")).collect();
        wait_for_checkpoint(&target, definition.id, tagged.id).await;
        Some(Self { source, target, volumes, definition, tagged, as_tagged })
    }

    async fn open(&self, mode: ViewMode) -> ViewInfo {
        let at = PointInTime::Checkpoint { checkpoint: self.tagged.id };
        open_view(&self.target, &open(self.definition.id, at, mode)).await
    }

    async fn close(&self, view: &ViewInfo) {
        self.target.ask(Request::CloseView(CloseView { view: view.view })).await;
    }

    async fn views(&self) -> Vec<ViewInfo> {
        match self.target.ask(Request::ListViews).await {
            Response::Views(views) => views,
            other => panic!("{other:?}"),
        }
    }

    /// The scratch files, and what is left of their maps in memory.
    fn scratch(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.target.path("datastore"), self.target.path("run")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("folder") {
                let path = entry.expect("entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("scratch-"))
                {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }

    async fn alert(&self, code: &str) -> VraStatus {
        self.target.wait_for(code, |status| status.alerts.iter().any(|alert| alert.code == code)).await
    }

    /// Kills the target, changes what its state says of views, and starts it again.
    fn restart_with(&mut self, change: impl FnOnce(&mut Value)) {
        self.target.kill();
        let path = self.target.path("state/vra.json");
        let mut state: Value = serde_json::from_slice(&std::fs::read(&path).expect("state")).expect("JSON");
        change(&mut state["value"]["views"]);
        std::fs::write(&path, serde_json::to_vec(&state).expect("JSON")).expect("state");
        self.target.serve();
    }
}

fn fill(image: &mut [u8], byte: u8, offset_kib: usize, len_kib: usize) {
    image[offset_kib << 10..][..len_kib << 10].fill(byte);
}

async fn oldest(target: &Vra, vpg: VpgId) -> CheckpointInfo {
    checkpoints(target, vpg).await.into_iter().next().expect("one")
}

#[tokio::test]
async fn a_view_with_scratch_goes_on_after_each_end_of_its_daemon_and_keeps_its_history() {
    let Some(mut stand) = Stand::new("goes-on").await else { return };
    let vpg = stand.definition.id;
    // Hardly any history: what no view needs is promoted soon. The journal has room, or views would have to make way.
    stand.definition.revision += 1;
    stand.definition.vms[0].history_s = 1;
    apply(&stand.target, &stand.definition).await;
    apply(&stand.source, &stand.definition).await;

    let tested = stand.open(ViewMode::Scratch).await;
    let looked_at = stand.open(ViewMode::ReadOnly).await;
    let mut image = stand.as_tagged[0].clone();
    qemu_io(
        &tested.disks[0].door,
        &["write -P 9 0 64k".to_owned(), "discard 1M 1M".to_owned(), "flush".to_owned()],
    );
    fill(&mut image, 9, 0, 64);
    fill(&mut image, 0, 1024, 1024);
    // Answered, and never flushed: a guest that runs on would miss it.
    qemu_io_unflushed(
        &tested.disks[0].door,
        &["write -P 10 2M 4k".to_owned(), "write -z 300k 7k".to_owned()],
    );
    fill(&mut image, 10, 2048, 4);
    fill(&mut image, 0, 300, 7);

    let copy = stand.target.path("copy.raw");
    for round in 0..4_u8 {
        if round % 2 == 0 {
            stand.target.kill();
        } else {
            stand.target.stop();
        }
        // Journals fill up while nothing but the record of the view holds the history.
        stand.target.serve();
        let views = stand.views().await;
        assert_eq!(views, [tested.clone(), looked_at.clone()], "round {round}");
        for _ in 0..3 {
            qemu_io(&door(&stand.volumes[0]), &pattern(20 + round, 0, 12 << 10));
            tokio::time::sleep(Duration::from_millis(1500)).await;
        }
        let Some(found) = nbdcopy(&tested.disks[0].door, &copy) else { return };
        assert!(found == image, "round {round}: the disk of the test differs");
        assert!(nbdcopy(&tested.disks[1].door, &copy).expect("copied") == stand.as_tagged[1]);
        assert!(nbdcopy(&looked_at.disks[0].door, &copy).expect("copied") == stand.as_tagged[0]);
        let at = 3072 + usize::from(round) * 64;
        qemu_io_unflushed(&tested.disks[0].door, &[format!("write -P {} {at}k 8k", 30 + round)]);
        fill(&mut image, 30 + round, at, 8);
    }
    // A view that can't be served keeps its history, too.
    stand.target.kill();
    let maps = stand.scratch().into_iter().filter(|path| path.extension().is_some_and(|end| end == "map"));
    let maps: Vec<PathBuf> = maps.collect();
    maps.iter().for_each(|map| std::fs::rename(map, map.with_extension("away")).expect("renamed"));
    stand.target.serve();
    stand.close(&looked_at).await;
    stand.alert("view-not-served").await;
    for round in 0..4 {
        qemu_io(&door(&stand.volumes[0]), &pattern(50 + round, 0, 12 << 10));
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }
    let is_kept = checkpoints(&stand.target, vpg).await.iter().any(|info| info.id == stand.tagged.id);
    assert!(is_kept, "the checkpoint of an open view was promoted");
    stand.target.kill();
    maps.iter().for_each(|map| std::fs::rename(map.with_extension("away"), map).expect("renamed"));
    stand.target.serve();
    assert!(nbdcopy(&tested.disks[0].door, &copy).expect("copied") == image, "the disk of the test differs");

    assert_eq!(stand.scratch().len(), 4, "two files, and their maps");
    stand.close(&tested).await;
    assert_eq!(stand.scratch(), Vec::<PathBuf>::new());
    // Promotion was held up by the views alone.
    let deadline = Instant::now() + PATIENCE;
    while oldest(&stand.target, vpg).await.time_us <= stand.tagged.time_us {
        assert!(Instant::now() < deadline, "nothing is promoted\n{}", stand.target.log());
        qemu_io(&door(&stand.volumes[0]), &pattern(60, 0, 4 << 10));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    stand.target.kill();
    stand.target.serve();
    assert_eq!(stand.views().await, []);
    let log = stand.target.log();
    assert!(!log.contains("belongs to no view"), "{log}");
}

#[tokio::test]
async fn a_view_that_cannot_be_served_again_is_told_and_its_scratch_kept_until_it_is_closed() {
    let Some(mut stand) = Stand::new("told").await else { return };
    let gone = stand.open(ViewMode::Scratch).await;
    let whole = stand.open(ViewMode::Scratch).await;
    qemu_io(&whole.disks[0].door, &pattern(9, 0, 64));
    let id = gone.view.to_string();
    stand.restart_with(|views| {
        for disk in views[&id]["info"]["disks"].as_array_mut().expect("disks") {
            disk["sequence"] = 1.into();
        }
    });
    let status = stand.alert("view-not-served").await;
    let alert = status.alerts.iter().find(|alert| alert.code == "view-not-served").expect("raised");
    assert!(alert.message.contains(&id) && !alert.message.contains(&whole.view.to_string()), "{alert:?}");
    assert!(alert.remedy.as_deref().is_some_and(|remedy| remedy.contains("close the view")), "{alert:?}");
    let problem =
        |views: &[ViewInfo], id| views.iter().find(|view| view.view == id).expect("listed").problem.clone();
    let views = stand.views().await;
    assert!(problem(&views, gone.view).is_some() && problem(&views, whole.view).is_none(), "{views:?}");
    assert_eq!(stand.scratch().len(), 8, "nothing of it is removed");
    qemu_io(&whole.disks[0].door, &["read -P 9 0 64k".to_owned()]);
    stand.close(&gone).await;
    assert_eq!(stand.scratch().len(), 4);

    // Without what was answered and not flushed a guest must not go on.
    stand.target.kill();
    for map in stand.scratch().iter().filter(|path| path.extension().is_some_and(|end| end == "map")) {
        std::fs::remove_file(map).expect("removed");
    }
    stand.target.serve();
    stand.alert("view-not-served").await;
    let problem = problem(&stand.views().await, whole.view).expect("not served");
    assert!(problem.contains("a guest that still runs would miss it"), "{problem}");
    stand.close(&whole).await;
    assert_eq!(stand.scratch(), Vec::<PathBuf>::new());
    let cleared = |status: &VraStatus| status.alerts.iter().all(|alert| alert.code != "view-not-served");
    stand.target.wait_for("without the alert", cleared).await;
}

/// As after the death of a daemon whose I/O hangs: the other views, and all else, must not wait for it.
#[tokio::test]
async fn a_scratch_that_stays_locked_holds_up_nothing_but_its_view() {
    let Some(mut stand) = Stand::new("locked").await else { return };
    let views = [stand.open(ViewMode::Scratch).await, stand.open(ViewMode::Scratch).await];
    let free = stand.open(ViewMode::ReadOnly).await;
    stand.target.kill();
    let is_file = |path: &PathBuf| path.extension().is_some_and(|end| end == "raw");
    let held: Vec<_> = stand
        .scratch()
        .iter()
        .filter(|path| is_file(path))
        .map(|path| {
            let file = std::fs::File::open(path).expect("a scratch file");
            file.lock().expect("free");
            file
        })
        .collect();
    assert_eq!(held.len(), 4);
    let began = Instant::now();
    stand.target.serve();
    let problems = stand.views().await.into_iter().filter(|view| view.problem.is_some()).count();
    assert!(began.elapsed() < Duration::from_secs(10), "the start took {:?}", began.elapsed());
    assert_eq!(problems, 2, "the two with scratch");
    let copy = stand.target.path("copy.raw");
    assert!(nbdcopy(&free.disks[0].door, &copy).is_none_or(|found| found == stand.as_tagged[0]));
    drop(held);
    let until = Instant::now() + PATIENCE;
    while stand.views().await.iter().any(|view| view.problem.is_some()) {
        assert!(Instant::now() < until, "{:?}", stand.views().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for view in &views {
        qemu_io(&view.disks[0].door, &pattern(9, 0, 64));
    }
}

#[tokio::test]
async fn what_belongs_to_no_view_is_found_and_removed_only_if_it_is_ours() {
    let Some(mut stand) = Stand::new("orphans").await else { return };
    let cut_short = stand.open(ViewMode::Scratch).await;
    let forgotten = stand.open(ViewMode::Scratch).await;
    let (half, no_more) = (cut_short.view.to_string(), forgotten.view.to_string());
    let folder = stand.scratch()[0].parent().expect("folder").to_owned();
    let strange = folder.join("scratch-of-somebody-0.raw");
    std::fs::write(&strange, b"HFSCRATC and nothing else").expect("written");
    stand.restart_with(|views| {
        views[&half]["stage"] = "opening".into();
        views.as_object_mut().expect("views").remove(&no_more);
    });
    assert_eq!(stand.views().await, []);
    assert_eq!(stand.scratch(), std::slice::from_ref(&strange));
    let status = stand.alert("scratch-orphan-removed").await;
    let message = |status: &VraStatus, code: &str| {
        status.alerts.iter().find(|alert| alert.code == code).expect("raised").message.clone()
    };
    assert!(message(&status, "scratch-orphan-removed").contains(&no_more));
    let status = stand.alert("scratch-orphan").await;
    assert!(message(&status, "scratch-orphan").contains("scratch-of-somebody-0.raw"));
    std::fs::remove_file(strange).expect("removed");
    let cleared = |status: &VraStatus| status.alerts.iter().all(|alert| alert.code != "scratch-orphan");
    stand.target.wait_for("without the alert", cleared).await;
    stand.target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    assert_eq!(stand.volumes[0].size_bytes, DISK_BYTES);
}
