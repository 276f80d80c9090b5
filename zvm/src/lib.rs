//! The manager: site certificates, inventory, protection groups, checkpoints and recovery operations. It speaks to
//! VRAs through `vra::api` alone and never touches a byte of a disk; replication and checkpoints go on without it.

pub mod authority;
pub mod clock;
pub mod config;
pub mod inventory;
pub mod units;
