//! Checkpoints of a group: one moment in several VMs, held together (D1 to D3), on one host or, in [`hosts`], on several.
//! `docs/capture.md` has the protocol.

mod checkpointer;
mod freeze;
mod held_epoch;
mod hold_log;
pub mod hosts;
mod local_hold;
mod state_word;
#[cfg(test)]
mod tests;

pub use checkpointer::{Checkpointer, GroupSettings, GroupStatus, HOLD_DEADLINE_US};
pub use freeze::Freeze;
pub use held_epoch::{CommitRefusal, HeldEpoch};
pub use local_hold::{CheckpointRefusal, LocalHold, Member, TakenCheckpoint, TakenMember};
