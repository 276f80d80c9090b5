//! Where a write meets the wire: capture, shipping, receiving, sync, checkpoints and the control API.

#![cfg_attr(
    test,
    allow(
        clippy::duplicate_mod,
        reason = "the numbering core is compiled twice: see capture::interleavings"
    )
)]

pub mod api;
pub mod capture;
pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod guest;
pub mod journal_tool;
pub mod link;
pub mod pki;
pub mod planted;
pub mod receive;
pub mod report;
pub mod sharing;
pub mod ship;
pub mod sync;
pub mod view;
pub mod wire;
