//! Where a write meets the wire: capture, shipping, receiving, sync, checkpoints and the control API.

pub mod api;
pub mod clock;
pub mod config;
pub mod control;
pub mod link;
pub mod pki;
pub mod planted;
pub mod ship;
pub mod wire;
