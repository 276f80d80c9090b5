//! The simulation: guest, source, target and storage under one seed, against a model that knows every acknowledged write.
//!
//! A seed decides everything, so a failure is its seed. What may go wrong is the storage's (`journal::storage::sim`) and
//! the world's: crashes of the target at any operation, power cuts, reconnects, new generations, full journals.

mod model;
mod target;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use journal::planted::{Bug, plant};
use journal::storage::Purpose;
use journal::storage::sim::Fault;

pub use world::{Happening, World};

/// What a run reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Which fault met an operation of which purpose, how often.
    pub faults: BTreeMap<(Fault, Purpose), u64>,
    /// What else happened, how often.
    pub happenings: BTreeMap<Happening, u64>,
}

impl Coverage {
    /// Adds another run's.
    pub fn add(&mut self, other: &Coverage) {
        for (key, count) in &other.faults {
            *self.faults.entry(*key).or_default() += count;
        }
        for (key, count) in &other.happenings {
            *self.happenings.entry(*key).or_default() += count;
        }
    }

    /// What had to be reached and wasn't.
    pub fn missing(&self) -> Vec<String> {
        let faults = REQUIRED_FAULTS.iter().filter(|key| !self.faults.contains_key(key));
        let happenings = Happening::ALL.iter().filter(|key| !self.happenings.contains_key(key));
        faults
            .map(|(fault, purpose)| format!("{fault:?} at {purpose:?}"))
            .chain(happenings.map(|happening| format!("{happening:?}")))
            .collect()
    }
}

/// A seed whose run broke a promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The seed: the same one fails again.
    pub seed: u64,
    /// Which promise.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}: {}", self.seed, self.what)
    }
}

impl std::error::Error for Failure {}

/// Runs one seed, with a planted bug or without.
///
/// # Errors
/// The promise that was broken.
pub fn run_seed(seed: u64, bug: Option<Bug>) -> Result<Coverage, Failure> {
    plant(bug);
    let result = std::panic::catch_unwind(|| World::new(seed).run());
    plant(None);
    match result {
        Ok(Ok(coverage)) => Ok(coverage),
        Ok(Err(what)) => Err(Failure { seed, what }),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(Failure { seed, what: format!("panic: {}", text.unwrap_or_default()) })
        }
    }
}

/// Runs seeds on all cores until one fails; which core runs a seed changes nothing.
///
/// # Errors
/// The lowest seed that failed among those that were run.
pub fn run_many(seeds: std::ops::Range<u64>, bug: Option<Bug>) -> Result<Coverage, Failure> {
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let worker = || {
        let mut coverage = Coverage::default();
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            match run_seed(seed, bug) {
                Ok(reached) => coverage.add(&reached),
                Err(failure) => {
                    stop.store(true, Ordering::Relaxed);
                    return Err(failure);
                }
            }
        }
        Ok(coverage)
    };
    let results: Vec<Result<Coverage, Failure>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        running.into_iter().map(|thread| thread.join().expect("a seed's panic is caught")).collect()
    });
    let mut coverage = Coverage::default();
    let mut failures = Vec::new();
    for result in results {
        match result {
            Ok(reached) => coverage.add(&reached),
            Err(failure) => failures.push(failure),
        }
    }
    failures.into_iter().min_by_key(|failure| failure.seed).map_or(Ok(coverage), Err)
}

/// Every fault at each step of each operation that can meet it.
const REQUIRED_FAULTS: &[(Fault, Purpose)] = &[
    (Fault::Kill, Purpose::Append),
    (Fault::Kill, Purpose::Seal),
    (Fault::Kill, Purpose::Superblock),
    (Fault::Kill, Purpose::SuperblockMirror),
    (Fault::Kill, Purpose::Manifest),
    (Fault::Kill, Purpose::Grow),
    (Fault::Kill, Purpose::Carry),
    (Fault::Kill, Purpose::Survey),
    (Fault::Kill, Purpose::RecoveryDisk),
    (Fault::PowerCut, Purpose::Append),
    (Fault::PowerCut, Purpose::Seal),
    (Fault::PowerCut, Purpose::Superblock),
    (Fault::PowerCut, Purpose::SuperblockMirror),
    (Fault::PowerCut, Purpose::Manifest),
    (Fault::PowerCut, Purpose::Grow),
    (Fault::PowerCut, Purpose::Carry),
    (Fault::PowerCut, Purpose::Survey),
    (Fault::PowerCut, Purpose::RecoveryDisk),
    (Fault::TornWrite, Purpose::Append),
    (Fault::TornWrite, Purpose::Seal),
    (Fault::TornWrite, Purpose::Superblock),
    (Fault::TornWrite, Purpose::SuperblockMirror),
    (Fault::TornWrite, Purpose::Manifest),
    (Fault::TornWrite, Purpose::Carry),
    (Fault::TornWrite, Purpose::RecoveryDisk),
    (Fault::LostWrite, Purpose::Append),
    (Fault::LostWrite, Purpose::Seal),
    (Fault::LostWrite, Purpose::Superblock),
    (Fault::LostWrite, Purpose::SuperblockMirror),
    (Fault::LostWrite, Purpose::Manifest),
    (Fault::LostWrite, Purpose::Carry),
    (Fault::LostWrite, Purpose::RecoveryDisk),
    (Fault::KeptWrite, Purpose::Append),
    (Fault::KeptWrite, Purpose::Superblock),
    (Fault::KeptWrite, Purpose::Carry),
    (Fault::LateLanding, Purpose::Append),
    (Fault::LateLanding, Purpose::Superblock),
    (Fault::LateLanding, Purpose::Carry),
    (Fault::LateLanding, Purpose::RecoveryDisk),
    (Fault::Error, Purpose::Append),
    (Fault::Error, Purpose::Superblock),
    (Fault::Error, Purpose::Carry),
    (Fault::Error, Purpose::Survey),
    (Fault::FailedSync, Purpose::Append),
    (Fault::FailedSync, Purpose::Superblock),
    (Fault::FailedSync, Purpose::Carry),
    (Fault::FailedSync, Purpose::RecoveryDisk),
    (Fault::NoSpace, Purpose::Grow),
];
