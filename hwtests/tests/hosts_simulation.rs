//! The seeds of checkpoints across hosts, and the planted bugs that they must find.

use hwtests::sim::PlantedBug;
use hwtests::sim::hosts::{run_hosts_seed, run_many_hosts};

/// How many seeds: 300, or with `HOLDFAST_LONG` five thousand.
fn seed_count() -> u64 {
    if std::env::var_os("HOLDFAST_LONG").is_some() { 5_000 } else { 300 }
}

#[test]
fn every_checkpoint_offered_is_one_moment_on_all_hosts() {
    let reached = run_many_hosts(0..seed_count(), None).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{reached:?}");
    assert_eq!(reached.missing(), []);
}

#[test]
fn planted_bugs_are_found_across_hosts() {
    let is_missed = |bug: &PlantedBug| (0..2_000).all(|seed| run_hosts_seed(seed, Some(*bug), false).is_ok());
    let missed: Vec<PlantedBug> = PlantedBug::of_hosts().into_iter().filter(is_missed).collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}
