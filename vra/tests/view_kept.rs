//! Views that stay open while the journal has no more room for the history that they show.

mod common;

use ::vra::api::{CloseView, PointInTime, Request, ViewInfo, ViewMode, VraStatus};
use common::TestCa;
use common::pair::{
    apply, door, open, open_view, overrun, pattern, streaming_pair, tag, wait_for_checkpoint,
};
use common::vra::{Vra, nbdcopy, qemu_io};

fn is_right(target: &Vra, view: &ViewInfo, expected: &[u8]) {
    if let Some(found) = nbdcopy(&view.disks[0].door, &target.path("copy.raw")) {
        assert!(found == expected, "the view differs");
    }
}

#[tokio::test]
async fn a_test_goes_on_while_its_history_is_promoted_and_a_read_only_view_gives_way() {
    let ca = TestCa::new();
    let Some((source, mut target, volumes, mut definition)) = streaming_pair("kept", &ca).await else {
        return;
    };
    let vpg = definition.id;
    definition.revision += 1;
    definition.vms[0].journal_limit_bytes = 256 << 20;
    apply(&target, &definition).await;
    apply(&source, &definition).await;
    qemu_io(&door(&volumes[0]), &pattern(2, 512, 1024));
    let tagged = tag(&source, vpg, "tested").await;
    let mut expected = std::fs::read(&volumes[0].path).expect("disk");
    wait_for_checkpoint(&target, vpg, tagged.id).await;

    let at = PointInTime::Checkpoint { checkpoint: tagged.id };
    let kept = open_view(&target, &open(vpg, at, ViewMode::Scratch)).await;
    let given_up = open_view(&target, &open(vpg, at, ViewMode::ReadOnly)).await;
    qemu_io(&kept.disks[0].door, &pattern(0xB3, 2 << 10, 256));
    expected[2 << 20..(2 << 20) + (256 << 10)].fill(0xB3);
    overrun(&source, vpg, &door(&volumes[0])).await;

    let is_told = |status: &VraStatus| status.alerts.iter().any(|alert| alert.code == "view-expired");
    let status = target.wait_for("a view gave way", is_told).await;
    let problem = |status: &VraStatus, view: &ViewInfo| {
        let found = status.views.iter().find(|found| found.view == view.view).expect("listed");
        found.problem.clone()
    };
    assert!(problem(&status, &given_up).is_some_and(|problem| problem.contains("gone")));
    assert_eq!(problem(&status, &kept), None);
    assert!(!status.alerts.iter().any(|alert| alert.code == "journal-full"), "{:?}", status.alerts);
    is_right(&target, &kept, &expected);
    // Its checkpoint is no more in the journal, and the view is still there after the death of the VRA.
    let before = status.target_vms[0].history_from_us.expect("there are checkpoints");
    assert!(before > tagged.time_us, "the journal still holds the checkpoint: this shows nothing");
    target.kill();
    target.serve();
    target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
    target.wait_for("served", |status| problem(status, &kept).is_none()).await;
    is_right(&target, &kept, &expected);
    qemu_io(&kept.disks[0].door, &pattern(0xB4, 4 << 10, 256));
    expected[4 << 20..(4 << 20) + (256 << 10)].fill(0xB4);
    // The one that was given up is still there, and keeps nothing.
    overrun(&source, vpg, &door(&volumes[0])).await;
    is_right(&target, &kept, &expected);
    let status = target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
    assert!(
        status.target_vms[0].history_from_us.expect("there are checkpoints") > before,
        "nothing was promoted"
    );
    assert!(problem(&status, &given_up).is_some_and(|problem| problem.contains("history")));
    target.ask(Request::CloseView(CloseView { view: given_up.view })).await;
    target.wait_for("no word of it", |status| !is_told(status)).await;
    target.ask(Request::CloseView(CloseView { view: kept.view })).await;
    let last = tag(&source, vpg, "last").await;
    wait_for_checkpoint(&target, vpg, last.id).await;
}
