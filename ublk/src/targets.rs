//! Disks that need nothing but this crate: for rigs, benchmarks, and as models of a lane.

mod file_disk;
mod null_disk;

pub use file_disk::FileDisk;
pub use null_disk::NullDisk;
