//! The demo: the product's main job with real processes, devices, filesystems and a database.

mod devices;
mod process;
mod report;
mod scenario;
mod site;
mod tree;
mod workload;

pub use report::{Recovery, Report};
pub use scenario::{Door, Size, run};
pub use workload::Recovered;
