//! Checkpoints across hosts whose VRAs reach each other late and not always.

mod common;
#[path = "../../hwtests/src/relay.rs"]
#[allow(unreachable_pub, reason = "shared with the rig")]
#[allow(dead_code, reason = "a part of it is used here")]
mod relay;

use std::time::{Duration, Instant};

use ::vra::api::{CheckpointInfo, VraStatus};
use common::TestCa;
use common::spanning::Site;
use common::spanning::chain::Chain;
use common::vra::PATIENCE;
use relay::Relay;

/// How many percent of the epochs must be offered: of few on a busy machine, so it says little. `spanning_namespaces.rs` has the gate's share.
const LEAST_PERCENT: u64 = 45;

/// Three delays on the way of one attempt, and what a busy machine adds.
const DEADLINE_MS: u32 = 150;

/// A busy machine wakes the thread that lets holds expire so late, in µs.
const LATE_US: u64 = 100_000;

/// Attempts that this VRA coordinated, and those of them that gave no checkpoint.
fn aborted(status: &VraStatus) -> u64 {
    status.vpgs[0].aborted_epochs
}

#[tokio::test(flavor = "multi_thread")]
async fn most_epochs_are_offered_with_delays_and_losses_and_a_cut_ends_them_until_it_is_mended() {
    let ca = TestCa::new();
    let mut relays = Vec::new();
    let site = Site::streaming("delays", &ca, |definition, sources| {
        definition.hold_deadline_ms = DEADLINE_MS;
        for (number, (vm, source)) in definition.vms.iter_mut().zip(sources).enumerate() {
            let server = source.endpoint.address.parse().expect("an address");
            let relay = Relay::start(server, 40 + number as u64).expect("relay");
            vm.source.address = relay.address().to_string();
            relays.push(relay);
        }
    })
    .await;
    site.wait_for_newer(0).await;
    for relay in &relays {
        relay.delay_up_to(Duration::from_millis(50));
        relay.lose_permille(10);
    }
    let (first, aborted_before) =
        (site.wait_for_newer(0).await.time_us, aborted(&site.sources[0].status().await));
    let chain = Chain::start(site.doors.clone(), Duration::from_micros(300));
    tokio::time::sleep(Duration::from_secs(20)).await;
    let chain = chain.stop();
    let status = site.sources[0].status().await;
    let aborted = aborted(&status) - aborted_before;
    if let Some(last) = &status.vpgs[0].last_checkpoint {
        site.wait_until_offered(last.id).await;
    }
    let is_new = |info: &CheckpointInfo| info.time_us > first;
    let offered: Vec<CheckpointInfo> = site.offered().await.into_iter().filter(is_new).collect();
    println!("{} offered, {aborted} not; {} links; {:?}", offered.len(), chain.count(), status.vpgs[0].hold);
    for source in &site.sources {
        let hold = source.status().await.source_vms[0].hold;
        println!("held: {hold:?}");
        assert!(hold.max_us <= u64::from(DEADLINE_MS) * 1000 + LATE_US, "{hold:?}");
    }
    let epochs = offered.len() as u64 + aborted;
    assert!(
        offered.len() as u64 * 100 >= epochs * LEAST_PERCENT,
        "{} of {epochs} epochs are offered",
        offered.len()
    );
    for info in offered.iter().rev().step_by(offered.len().div_ceil(8)) {
        chain.newest_at(&site, info.id).await;
    }

    // One of three can't be reached, and reaches nobody: each side says who is missing.
    relays.iter().for_each(|relay| relay.delay_up_to(Duration::ZERO));
    relays[2].cut(true);
    let is_missing =
        |status: &VraStatus| status.alerts.iter().any(|alert| alert.code == "group-member-missing");
    // What the third says to others goes by their relays, which are not cut: it is heard, and hears no answer.
    site.sources[2].wait_for("alone or not", |status| status.vpgs[0].coordinator.is_some()).await;
    let newest = site.offered().await.pop().expect("some").time_us;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let later = site.offered().await.pop().expect("some").time_us;
    assert!(later.0 <= newest.0 + 2_000_000, "checkpoints without a member that can't be reached");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = site.sources[0].status().await;
        let told = status.alerts.iter().any(|alert| alert.code == "group-not-checkpointed");
        if told || is_missing(&status) {
            break;
        }
        assert!(Instant::now() < deadline, "nobody says so: {status:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    relays[2].cut(false);
    site.wait_for_newer(later.0).await;
}
