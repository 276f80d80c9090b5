//! The manager: site certificates, inventory, protection groups, checkpoints and recovery operations. It speaks to
//! VRAs through `vra::api` alone and never touches a byte of a disk; replication and checkpoints go on without it.

pub mod api;
pub mod authority;
pub mod cli;
pub mod clock;
pub mod conditions;
pub mod config;
pub mod credentials;
pub mod health;
pub mod inventory;
pub mod manager;
pub mod model;
pub mod rebuild;
pub mod reconcile;
pub mod remote;
pub mod serve;
pub mod site_key_file;
pub mod store;
pub mod units;
