//! A disk's front doors: the trait that serves a disk, the ublk driver and the NBD server. Nothing of replication.

pub mod arena;
pub mod host;
pub mod nbd;
#[allow(dead_code, reason = "used by the doors")]
pub mod reactor;
pub mod serve;
#[allow(dead_code, reason = "used by the doors")]
mod table;
