//! Every operation of a target's storage, with every crash, and failing: what was promised is there. And the planted bugs that only this shows.

use hwtests::sim::{Effort, PlantedBug, run_matrix};
use journal::planted::Bug;
use vra::planted::Planted;

#[test]
fn every_operation_survives_every_crash_and_its_failure() {
    let effort = if std::env::var_os("HOLDFAST_LONG").is_some() { Effort::Long } else { Effort::Short };
    let matrix = run_matrix(effort, None).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{matrix}\n{:?}", matrix.counts());
    assert_eq!(matrix.missing(), Vec::<String>::new());
}

/// These do nothing wrong as long as nobody dies and nothing fails.
const SHOWN_BY_CRASHES: [PlantedBug; 9] = [
    PlantedBug::Journal(Bug::FailedSyncForgotten),
    PlantedBug::Journal(Bug::AheadCountsAsSynced),
    PlantedBug::Journal(Bug::RecoveryWithoutSync),
    PlantedBug::Journal(Bug::HalfCarriedSegmentTaken),
    PlantedBug::Journal(Bug::SealedBeforeSync),
    PlantedBug::Journal(Bug::LowWaterNotSynced),
    PlantedBug::Journal(Bug::IntentIgnoredByViews),
    PlantedBug::Vra(Planted::BaseMovedEarly),
    PlantedBug::Vra(Planted::PromotionNotAnnounced),
];

#[test]
fn bugs_that_only_a_crash_shows_are_found() {
    for bug in SHOWN_BY_CRASHES {
        let failure = run_matrix(Effort::Short, Some(bug)).expect_err(&format!("{bug} is not found"));
        assert!(failure.case.is_some(), "{bug} shows without a crash, too: {failure}");
    }
}
