//! The simulation of checkpoints across hosts: several source VRAs with the product's machine, holds and numbering cores, a
//! network between them that delays, loses, repeats and partitions, VRAs that die, and an application whose writes form a chain over
//! VMs of different hosts.
//!
//! What is a model here is what [`super::World`] has for real: guests' disks, and the streams with their journals, of which only the
//! order matters.

mod chain;
mod group_vm;
mod host;
mod network;
mod offered;
mod reached;
mod shape;
mod world;

pub use reached::{Reached, ReachedCount};

use super::planted::PlantedBug;
use super::{Failure, on_all_cores, told_by};
use world::HostsWorld;

/// Runs one seed, with a planted bug or without; `traced` prints what happens.
///
/// # Errors
/// The promise that was broken.
pub fn run_hosts_seed(seed: u64, bug: Option<PlantedBug>, traced: bool) -> Result<ReachedCount, Failure> {
    PlantedBug::plant(bug);
    let result = std::panic::catch_unwind(|| HostsWorld::new(seed, traced).run());
    PlantedBug::plant(None);
    match result {
        Ok(Ok(reached)) => Ok(reached),
        Ok(Err(what)) => Err(Failure { seed, what }),
        Err(panic) => Err(Failure { seed, what: told_by(&*panic) }),
    }
}

/// Runs seeds on all cores until one fails.
///
/// # Errors
/// The lowest seed that failed among those that were run.
pub fn run_many_hosts(seeds: std::ops::Range<u64>, bug: Option<PlantedBug>) -> Result<ReachedCount, Failure> {
    on_all_cores(seeds, |seed| run_hosts_seed(seed, bug, false), ReachedCount::add)
}
