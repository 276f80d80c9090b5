//! The simulation's seeds, and the planted bugs that it must find.

use hwtests::sim::{run_many, run_seed};
use journal::planted::ALL;

/// How many seeds: a thousand, or with `HOLDFAST_LONG` twenty thousand.
fn seed_count() -> u64 {
    if std::env::var_os("HOLDFAST_LONG").is_some() { 20_000 } else { 1_000 }
}

#[test]
fn every_promise_is_kept_and_everything_is_reached() {
    let coverage = run_many(0..seed_count(), None).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(coverage.missing(), Vec::<String>::new());
}

#[test]
fn planted_bugs_are_found() {
    let missed: Vec<_> = std::thread::scope(|scope| {
        let halves: Vec<_> = ALL
            .chunks(ALL.len().div_ceil(2))
            .map(|bugs| {
                scope.spawn(move || {
                    let found =
                        |bug| (0..MOST_SEEDS_FOR_A_BUG).any(|seed| run_seed(seed, Some(bug)).is_err());
                    bugs.iter().copied().filter(|bug| !found(*bug)).collect::<Vec<_>>()
                })
            })
            .collect();
        halves.into_iter().flat_map(|half| half.join().expect("no thread panics")).collect()
    });
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// The rarest bug needs two crashes at the right steps and a stale batch at the right place.
const MOST_SEEDS_FOR_A_BUG: u64 = 10_000;
