//! A disk's front doors: the trait that serves a disk, the ublk driver and the NBD server. Nothing of replication.

pub mod arena;
pub mod serve;
