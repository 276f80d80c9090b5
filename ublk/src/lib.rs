//! A disk's front doors: the trait that serves a disk, the ublk driver and the NBD server. Nothing of replication.

pub mod arena;
pub mod backing;
pub mod control;
pub mod cookie;
pub mod device;
pub mod features;
pub mod host;
pub mod nbd;
pub mod params;
pub mod process;
mod queue;
pub mod reactor;
pub mod serve;
pub mod sweep;
mod table;
pub mod targets;
pub mod uapi;
