//! The demo: the product's main job with real processes, devices, filesystems and a database.

mod devices;
mod production;
mod report;
mod scenario;
mod tree;
mod workload;

pub use report::{Recovery, Report};
pub use scenario::{Size, run};
pub use workload::Recovered;
