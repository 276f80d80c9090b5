//! The simulation: guest, source, network, target and storage under one seed, against a model that knows every write and every
//! acknowledgement.
//!
//! A seed decides everything, so a failure is its seed. The machines are the product's own; what may go wrong is the storage's
//! (`journal::storage::sim`), the network's (`streams.rs`) and the world's (`world.rs`).

mod ageing;
mod coverage;
mod damage;
mod door;
mod env;
mod group;
mod guest;
pub mod hosts;
mod kinds;
mod ledger;
mod local_disk;
mod making;
mod matrix;
mod planted;
mod protected;
mod rebuilt;
mod recovered;
mod scripted;
mod shape;
mod shipper;
mod streams;
mod target;
mod vm;
mod world;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub use coverage::{Coverage, Disturbance, Happening, Moment};
pub use matrix::{Case, Effort, Matrix, MatrixFailure, run_case, run_matrix};
pub use planted::PlantedBug;
pub use world::{World, is_scripted};

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
pub fn run_seed(seed: u64, bug: Option<PlantedBug>) -> Result<Coverage, Failure> {
    run(seed, bug, false)
}

/// The same, and prints what happens.
///
/// # Errors
/// The promise that was broken.
pub fn trace_seed(seed: u64, bug: Option<PlantedBug>) -> Result<Coverage, Failure> {
    run(seed, bug, true)
}

fn run(seed: u64, bug: Option<PlantedBug>, traced: bool) -> Result<Coverage, Failure> {
    PlantedBug::plant(bug);
    let result = std::panic::catch_unwind(|| World::new(seed, traced)?.run());
    PlantedBug::plant(None);
    match result {
        Ok(Ok(coverage)) => Ok(coverage),
        Ok(Err(what)) => Err(Failure { seed, what }),
        Err(panic) => Err(Failure { seed, what: told_by(&*panic) }),
    }
}

fn told_by(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
    format!("panic: {}", text.unwrap_or_default())
}

/// Runs seeds on all cores until one fails; which core runs a seed changes nothing.
///
/// # Errors
/// The lowest seed that failed among those that were run.
pub fn run_many(seeds: std::ops::Range<u64>, bug: Option<PlantedBug>) -> Result<Coverage, Failure> {
    on_all_cores(seeds, |seed| run_seed(seed, bug), Coverage::add)
}

/// Runs seeds on all cores until one fails, and adds up what they reached.
fn on_all_cores<T: Default + Send>(
    seeds: std::ops::Range<u64>,
    run: impl Fn(u64) -> Result<T, Failure> + Sync,
    add: impl Fn(&mut T, &T) + Sync,
) -> Result<T, Failure> {
    keep_freed_memory();
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let worker = || {
        let mut sum = T::default();
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            match run(seed) {
                Ok(reached) => add(&mut sum, &reached),
                Err(failure) => {
                    stop.store(true, Ordering::Relaxed);
                    return Err(failure);
                }
            }
        }
        Ok(sum)
    };
    let results: Vec<Result<T, Failure>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        running.into_iter().map(|thread| thread.join().expect("a seed's panic is caught")).collect()
    });
    let mut sum = T::default();
    let mut failures = Vec::new();
    for result in results {
        match result {
            Ok(reached) => add(&mut sum, &reached),
            Err(failure) => failures.push(failure),
        }
    }
    failures.into_iter().min_by_key(|failure| failure.seed).map_or(Ok(sum), Err)
}

/// The allocator gives nothing back to the kernel: worlds are many, short and alike.
fn keep_freed_memory() {
    const KEPT_BYTES: libc::c_int = 32 << 20;
    // SAFETY: only sets two of the allocator's limits, which may be done at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}
