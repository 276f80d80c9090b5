//! The simulation's seeds, and the planted bugs that it must find.

use std::sync::Mutex;

use hwtests::sim::{PlantedBug, is_scripted, run_many, run_seed};
use journal::planted::Bug;

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
    let next = Mutex::new(PlantedBug::all().into_iter());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut missed = Vec::new();
    let search = || {
        let mut missed = Vec::new();
        loop {
            let bug = next.lock().expect("no thread panics").next();
            let Some(bug) = bug else { return missed };
            let found = seeds_for(bug).any(|seed| run_seed(seed, Some(bug)).is_err());
            missed.extend((!found).then_some(bug));
        }
    };
    std::thread::scope(|scope| {
        let searching: Vec<_> = (0..threads).map(|_| scope.spawn(search)).collect();
        for thread in searching {
            missed.extend(thread.join().expect("no thread panics"));
        }
    });
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// The journal's rarest bugs need two crashes at the right steps and a stale batch at the right place: scripted sources go on
/// with numbers that were sent before, and their worlds cost less. One shows only where much happens between two syncs.
fn seeds_for(bug: PlantedBug) -> impl Iterator<Item = u64> {
    let is_journals = matches!(bug, PlantedBug::Journal(_));
    let any_source = !is_journals || bug == PlantedBug::Journal(Bug::SuperblockNotSettled);
    let most = if is_journals { 10_000 } else { 3_000 };
    (0..).filter(move |seed| any_source || *seed < ANY_SOURCE_BELOW || is_scripted(*seed)).take(most)
}

/// Below this seed a bug is looked for behind any source.
const ANY_SOURCE_BELOW: u64 = 100;
