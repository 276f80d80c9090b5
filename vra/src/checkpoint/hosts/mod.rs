//! Checkpoints of groups whose VMs are on several hosts: the protocol between their source VRAs. `docs/capture.md` draws it.
//!
//! [`SpanningGroups`] is one VRA's end of it, a machine without sockets and clock. Messages may be lost, late, out of order and
//! repeated, and any number of coordinators may be at work: what then happens is no checkpoint, never a wrong one.

mod attempt;
mod back_off;
mod coordinator;
mod failure;
mod group;
mod liveness;
mod machine;
mod participant;
mod round_trip;
#[cfg(test)]
mod tests;

pub use failure::EpochFailure;
pub use group::{GroupHost, SpanningGroup};
pub use liveness::{ALIVE_EVERY_US, LIVE_FOR_US};
pub use machine::{AskId, Holder, SpanningGroups, SpanningOutput, SpanningStatus, TakenByHosts};
pub use round_trip::LEAST_DEADLINE_US;
