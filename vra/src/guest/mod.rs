//! Guests that are frozen for a checkpoint, so that their filesystems are clean in it, and that are thawed again whatever happens (D5).
//!
//! A guest's agent has no time-out of its own, and its channel serves one client. So a guest that is about to be frozen is noted on disk first
//! ([`frozen`]), and another process ([`guard`]) owns the channel: it freezes the guest, and thaws it when the VRA says so, dies or takes too long.
//! A VRA that starts lets those be thawed that are still noted.

mod agent;
mod frozen;
mod guard;

pub use agent::{AgentError, GuestAgent};
pub use frozen::{FrozenGuest, FrozenGuests};
pub use guard::{Guard, GuardEnd, LONGEST_FREEZE, Told, run as run_guard};
