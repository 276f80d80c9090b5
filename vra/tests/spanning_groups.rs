//! A VPG whose VMs are on three source VRAs and whose journals are on two targets: every checkpoint that all journals hold is one moment.

mod common;

use std::time::Duration;

use ::vra::api::{CheckpointInfo, JournalId, Request, TagCheckpoint, VmId, VraId, VraStatus};
use common::TestCa;
use common::pair::{DISK_BYTES, definition, tag};
use common::spanning::Site;
use common::spanning::chain::Chain;
use common::vra::Vra;

/// Links of the chain between two checkpoints at least.
const LEAST_LINKS: u64 = 20;

#[tokio::test(flavor = "multi_thread")]
async fn every_checkpoint_over_three_hosts_holds_a_beginning_of_the_chain() {
    let ca = TestCa::new();
    let site = Site::streaming("chain", &ca, |_, _| {}).await;
    let vpg = site.definition.id;
    let first = site.wait_for_newer(0).await;
    let chain = Chain::start(site.doors.clone(), Duration::from_micros(300));
    tokio::time::sleep(Duration::from_secs(6)).await;
    // Any source makes one that is asked for.
    let tagged = tag(&site.sources[2], vpg, "by hand").await;
    assert_eq!(tagged.vms.len(), 3);
    let chain = chain.stop();
    site.wait_until_offered(tagged.id).await;

    let offered: Vec<CheckpointInfo> =
        site.offered().await.into_iter().filter(|info| info.time_us >= first.time_us).collect();
    assert!(offered.len() >= 4, "{offered:?}");
    assert!(offered.iter().any(|info| info.tag.as_deref() == Some("by hand")));
    let mut newest = Vec::new();
    for info in offered.iter().rev().take(8).rev() {
        newest.push(chain.newest_at(&site, info.id).await);
    }
    let automatic = newest.windows(2).filter(|pair| pair[1] >= pair[0] + LEAST_LINKS).count();
    assert!(automatic >= 3, "the chain came to {newest:?} at the checkpoints");

    let coordinator = site.sources[0].status().await;
    let status = &coordinator.vpgs[0];
    assert_eq!((status.coordinator, status.missing.len()), (Some(site.sources[0].id), 0));
    assert!(status.last_checkpoint.is_some() && status.hold.count > 0, "{status:?}");
    let held = &site.sources[1].status().await.source_vms[0].hold;
    assert!(0 < held.median_us && held.median_us <= held.p99_us && held.p99_us <= held.max_us, "{held:?}");
    println!("{} links, holds of the second source: {held:?}", chain.count());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_member_there_is_no_checkpoint_and_whoever_is_next_says_so() {
    let ca = TestCa::new();
    let mut site = Site::streaming("missing", &ca, |_, _| {}).await;
    let before = site.wait_for_newer(0).await;
    for dead in [2, 0] {
        let next = if dead == 0 { 1 } else { 0 };
        site.sources[dead].kill();
        let is_named = |status: &VraStatus| {
            status.alerts.iter().any(|alert| {
                alert.code == "group-member-missing" && alert.message.contains(&format!("vm{dead}"))
            })
        };
        let status = site.sources[next].wait_for("an alert", is_named).await;
        assert_eq!(status.vpgs[0].coordinator, Some(site.sources[next].id));
        assert_eq!(status.vpgs[0].missing, [site.sources[dead].id]);
        let refused = site.sources[next].refusal(Request::TagCheckpoint(TagCheckpoint {
            vpg: site.definition.id,
            tag: "without it".to_owned(),
            application: false,
        }));
        let refused = refused.await;
        assert!(refused.message.contains("doesn't answer") && refused.remedy.is_some(), "{refused}");
        let newest = site.offered().await.pop().expect("older ones stay");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(site.offered().await.pop().map(|info| info.id), Some(newest.id));
        site.sources[dead].serve();
        site.wait_until_streaming().await;
        let newer = site.wait_for_newer(newest.time_us.0.max(before.time_us.0)).await;
        assert_ne!(newer.id, newest.id);
        site.sources[next].wait_for("no alert", |status| !is_named(status)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_that_names_coordinators_wrongly_is_refused() {
    let ca = TestCa::new();
    let vra = Vra::start("coordinators", Some(&ca));
    let volume = vra.attach(VmId::random(), "db", &vra.disk("0.raw", DISK_BYTES)).await;
    let mut wrong = definition(&vra, &vra, &[volume]);
    wrong.vms[0].journal = JournalId::random();
    wrong.coordinators = vec![VraId::random()];
    let error = vra.refusal(Request::ApplyVpg(wrong)).await;
    assert!(error.message.contains("is not a source VRA of it"), "{error}");
}
